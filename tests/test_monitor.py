"""Figures of a run: to every digit those of sample_ddp.py and evaluate.py, and the run is as it would be without them."""

import json
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import saboteurs
import torch
from conftest import ROOT, SMALL, TINY_RUN, SmallInception, draw_images, read_metrics, run_script

import evaluate
import sample_ddp
import train
from evaluation import extractors, image_sets, monitor
from evaluation import figures as figure_list
from pipeline import checkpoint, drawing, generation
from runtime import UserError
from runtime.processes import start_world
from small_models import Classifier

FLOW = '{"objective": "flow", "sampling": {"num_sampling_steps": "2"}}'
RUN = [*TINY_RUN, "--diffusion-args", FLOW, "--run-name", "r", "--max-steps", 4]
FIGURES = ["--figures-every", 2, "--figures-samples", 70, "--figures-ref", "digits"]  # batches of 32, 32, 6


def figures_of(folder, step):
    return json.loads((folder / "figures" / f"{step:07d}.json").read_text())


def logged(folder):
    """The lines of metrics.jsonl with figures, without their times."""
    return [{key: value for key, value in line.items() if key != "time"} for line in read_metrics(folder)
            if any("-70" in key for key in line)]


def save_classifier(cwd):
    torch.manual_seed(0)
    checkpoint.save(cwd / "c.pt", {"classifier": Classifier(10).state_dict(), "spec": {
        "network": {"num_classes": 10}, "size": [8, 8], "data": "digits", "test_images": 450, "test_accuracy": 0.1}})


@pytest.fixture
def run(tmp_path, monkeypatch, run_here):
    """train.py in tmp_path, of 4 steps with figures after 2 and 4: (finished process, its steps, its images of figures)."""
    monkeypatch.chdir(tmp_path)
    steps, drawn, step, generate = [], [], train.Trainer.step, drawing.generate
    monkeypatch.setattr(train.Trainer, "step", lambda self: (step(self), steps.append(self.state.step)))
    monkeypatch.setattr(drawing, "generate", lambda *args: (drawn.extend(args[3]), generate(*args))[1])

    def call(*flags):
        steps.clear()
        drawn.clear()
        return run_here(train, *RUN, *FIGURES, *flags), list(steps), list(drawn)
    return call


@pytest.fixture
def broken(monkeypatch):
    """Patches owner.name so that `action` is called before its call number `call`."""
    def patch(owner, name, call, action):
        calls = []
        saboteurs.before(monkeypatch, owner, name, lambda *_: calls.append(1) or (len(calls) == call and action()))
    return patch


def lose(error=SystemError):
    """As far as a test in one process can be killed."""
    raise error


@pytest.mark.parametrize("inception", [True, False])
def test_they_are_those_of_the_two_scripts_to_every_digit(run, run_here, tmp_path, monkeypatch, inception):
    save_classifier(tmp_path)
    np.savez("ref.npz", arr_0=draw_images(150, 0))
    if inception:
        monkeypatch.setattr(extractors, "Inception", SmallInception)
        monkeypatch.setattr(extractors, "inception_weights", lambda path: path)
        monkeypatch.setattr(monitor, "cached_inception", lambda: "small")
        for module in (image_sets, figure_list):
            monkeypatch.setattr(module, "STATISTICS", SMALL)
    result, *_ = run("--figures-ref", "[ref.npz, c.pt]", "--precision", "bf16")
    assert result.returncode == 0, result.stderr
    assert not list((tmp_path / "results" / "r" / "figures").glob("*.npz"))

    ckpt = tmp_path / "results" / "r" / "checkpoints" / "0000002.pt"
    drawn = run_here(sample_ddp, "--ckpt", ckpt, "--balanced", "--num-fid-samples", 70, "--device", "cpu")
    assert drawn.returncode == 0, drawn.stderr
    (samples,) = (tmp_path / "samples").glob("*.npz")
    measured = run_here(evaluate, "ref.npz", samples, "--classifier", "c.pt", "--json", "figures.json", "--device", "cpu",
                        *([] if inception else ["--weights", "none"]))
    assert measured.returncode == 0, measured.stderr
    report, found = json.loads((tmp_path / "figures.json").read_text()), figures_of(tmp_path / "results" / "r", 2)
    assert found["figures"] == report["figures"]
    assert (found["made"], found["protocol"]) == (report["made"], report["protocol"])
    assert found["protocol"] in measured.stdout
    by_name = {figure["name"].removesuffix("-70").replace(" ", "_"): figure["value"] for figure in report["figures"]}
    adms = {"FID", "sFID", "Inception_Score", "Precision", "Recall"} if inception else {"FD-pixel32"}
    assert by_name.keys() == {*adms, "FD-classifier", "Label_accuracy"}
    (first, _) = logged(tmp_path / "results" / "r")
    assert first == {"step": 2} | {f"{name}-70": value for name, value in by_name.items()}


def test_a_run_with_them_is_the_run_without_bit_for_bit(run, run_here, tmp_path, monkeypatch):
    """And each leaves generators, grad mode and TF32 as they were, whatever extractors draw."""
    save_classifier(tmp_path)  # whose construction draws initial weights
    measure, opened, survey, states, inside = monitor.Monitor.measure, train.open_monitor, monitor.survey, [], []

    def state():
        return (torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.backends.cuda.matmul.allow_tf32,
                torch.backends.cudnn.allow_tf32)

    def watched(function):
        def call(*args):
            states.append(state())
            result = function(*args)
            states.append(state())
            return result
        return call

    monkeypatch.setattr(monitor.Monitor, "measure", watched(measure))
    monkeypatch.setattr(train, "open_monitor", watched(opened))
    monkeypatch.setattr(monitor, "survey", lambda *args, **kwargs: (torch.rand(3), inside.append(state()),
                                                                    survey(*args, **kwargs))[-1])
    assert run("--figures-ref", "[digits, c.pt]")[0].returncode == 0
    assert len(states) == 6
    assert [rest for _, *rest in inside] == [[False, False, False]]  # REF is surveyed once
    assert all(before == after for before, after in zip(states[::2], states[1::2]))
    assert run_here(train, *RUN, "--run-name", "plain").returncode == 0
    a, b = (checkpoint.load(checkpoint.latest(tmp_path / "results" / name)) for name in ("r", "plain"))
    for part in ("model", "ema", "meter"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part] | b[part])
    for key, moments in a["opt"]["state"].items():
        assert all(torch.equal(value, b["opt"]["state"][key][name]) for name, value in moments.items())


def test_whatever_stops_it_the_same_command_goes_on_there(run, broken, tmp_path, monkeypatch):
    """Lost in the second batch; asked to stop in the third, and in the survey; lost after the figures were logged."""
    assert run("--run-name", "whole")[0].returncode == 0
    folder, whole = tmp_path / "results" / "r", tmp_path / "results" / "whole"

    broken(drawing, "generate", 2, lose)
    with pytest.raises(SystemError):
        run()
    broken(drawing, "generate", 2, lambda: saboteurs.kill(signal.SIGTERM))
    start = time.monotonic()
    result, steps, drawn = run()
    assert (result.returncode, steps, drawn) == (0, [], [*range(32, 70)])
    assert "Stopped by SIGTERM; the same command" in result.stdout
    assert time.monotonic() - start < 10
    assert not (folder / "figures" / "drawing" / "0000002.npz").exists()

    broken(monitor, "open_set", 2, lambda: saboteurs.kill(signal.SIGTERM))  # the first one is REF
    result, steps, drawn = run()
    assert (steps, drawn) == ([], [*range(64, 70)])
    assert "Stopped by SIGTERM" in result.stdout
    assert ("REF:" in result.stderr, "SAMPLES:" in result.stderr, logged(folder)) == (True, False, [])

    broken(monitor, "write_json", 1, lose)
    with pytest.raises(SystemError):
        run()
    result, steps, drawn = run()
    assert (result.returncode, steps, drawn) == (0, [3, 4], [*range(70)])  # those of step 4
    assert logged(folder) == logged(whole)
    assert [figures_of(folder, step)["figures"] for step in (2, 4)] == [figures_of(whole, step)["figures"] for step in (2, 4)]
    assert sorted(path.name for path in (folder / "figures").iterdir()) == ["0000002.json", "0000004.json"]
    result, steps, drawn = run()
    assert (result.returncode, steps, drawn) == (0, [], [])


def test_samples_that_are_not_finite_do_not_end_a_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "guide", lambda *rest: lambda x, t: x * torch.nan)
    result, *_ = run()
    assert result.returncode == 0, result.stderr
    assert "No figures of step 2: its samples are not finite" in result.stdout
    assert "Finished" in result.stdout
    assert (figures_of(tmp_path / "results" / "r", 4)["figures"], run()[2]) == ([], [])


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(monitor, "cached_inception", lambda: None)
    np.savez("large.npz", arr_0=draw_images(9, 0, size=16))
    monkeypatch.setattr(image_sets, "STATISTICS", SMALL)
    np.savez("bare.npz", mu=np.zeros(20), sigma=np.eye(20), mu_s=np.zeros(15), sigma_s=np.eye(15))
    for flags, words in (
            (["--figures-every", "-1"], "`figures_every` -1 is not at least 0"),
            (["--figures-samples", "3"], "`figures_samples` 3 is not at least 4"),
            (["--figures-every", "5"], "`figures_every` needs `figures_ref`"),
            (["--figures-ref", "nowhere"], "`figures_ref`: REF nowhere does not exist"),
            (["--figures-ref", "large.npz"], "`figures_ref`: REF large.npz has images of 16x16.* the run of 8x8"),
            (["--figures-ref", "bare.npz"], "`figures_ref`: REF bare.npz holds statistics.* cache lacks"),
            (["--figures-ref", "[digits, c.pt]"], "`figures_ref`: `classifier` c.pt does not exist")):
        args = train.build_parser().parse_args([*map(str, RUN), "--results-dir", "runs", *flags])
        with pytest.raises((UserError, OSError), match=words):
            (trainer := train.Trainer(args, start_world("cpu"))).begin()
    with pytest.raises(UserError, match="`figures_ref`: DiNext-S/2 is an autoencoder"):
        monitor.open_monitor("digits", 0, 70, "data", "runs", replace(trainer.spec, sampling=None), trainer.autoencoder,
                             trainer.world)
    assert not os.path.exists("runs")


@pytest.mark.slow
def test_two_processes_draw_stop_and_go_on_together(tmp_path):
    """A signal to the second one, which is in the middle of a batch."""
    script = ROOT / "tests" / "saboteurs.py"
    stopped = run_script(script, "signal_in_figures:1", *RUN, *FIGURES, cwd=tmp_path, nproc=2)
    assert "a signal to another process; the same command" in stopped.stdout
    folder = tmp_path / "results" / "r"
    parts = len(list(folder.glob("figures/drawing/0000002.parts/*.npy")))
    assert parts < 3
    run_script(script, "nothing", *RUN, *FIGURES, cwd=tmp_path, nproc=2)
    run_script("sample_ddp.py", "--ckpt", folder / "checkpoints" / "0000002.pt", "--balanced", "--num-fid-samples", 70,
               "--device", "cpu", cwd=tmp_path, nproc=2)
    (samples,) = (tmp_path / "samples").glob("*.npz")
    run_script("evaluate.py", "digits", samples, "--weights", "none", "--json", "figures.json", "--device", "cpu", cwd=tmp_path,
               nproc=2)
    report = json.loads((tmp_path / "figures.json").read_text())
    assert figures_of(folder, 2)["figures"] == report["figures"]
