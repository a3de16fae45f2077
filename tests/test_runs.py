import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_RUN, assert_one_line

import train
from diffusion import OBJECTIVES, create_diffusion
from diffusion.flow import FlowMatching
from pipeline import checkpoint
from pipeline.autoencoders import Pixels
from runtime import UserError
from training.datasets import load_dataset
from training.runs import build_run_spec, list_skipped, new_folder, open_run, save_step

# --- flags -> Spec -------------------------------------------------------------------------------


def diffusion_of(**diffusion_args):
    """What a checkpoint stores of --diffusion-args."""
    model_args = {"hidden_size": 8, "depth": 1}
    return build_run_spec("DiNext-S/2", model_args, diffusion_args, load_dataset("digits"), Pixels())[0].diffusion


def test_diffusion_args_are_checked_against_the_objective_s_factory(monkeypatch):
    def huber(timesteps: list[int], time_sampling: str = "uniform", delta: float = 1.0):
        process = FlowMatching(len(timesteps), time_sampling)
        process.delta = delta
        return process

    monkeypatch.setitem(OBJECTIVES, "huber", huber)
    stored = diffusion_of(objective="huber", delta="0.5", label_drop=0.2, input_scale=1.0)
    assert stored == {"objective": "huber", "delta": 0.5, "input_scale": 1.0}  # converted; another objective's default is kept
    assert create_diffusion("10", **stored).delta == 0.5
    for wrong, words in (
            (dict(objective="huber", delt=1), r"unknown key 'delt'; allowed: time_sampling, delta, objective, diffusion_steps, "
                                              r"learn_sigma, label_drop, sampling; did you mean delta\?"),
            (dict(objective="huber", delta="wide"), "Parser key \"delta\": Expected a <class 'float'>. Got value: wide"),
            (dict(objective="huber", sigma_small=True), "sigma_small.* is not supported with objective 'huber'"),
            (dict(delta=0.5), "`delta` is not supported with objective 'epsilon'"), (dict(label_drop="x"), "label_drop"),
            (dict(timestep_respacing="10"), "unknown key 'timestep_respacing'"),
            (dict(objective="hubert"), "'hubert' is unknown; allowed: epsilon, x0, v, flow, flow-map, huber")):
        with pytest.raises(UserError, match=f"^`diffusion_args`: .*{words}"):
            diffusion_of(**wrong)


# --- the folder ----------------------------------------------------------------------------------


def test_runs_are_numbered_named_locked_and_found_again_by_a_restart(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch-a")
    first = open_run(tmp_path, None, "DiT-XL/2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch-b")
    assert [first.name, open_run(tmp_path, None, "DiT-XL/2").name] == ["000-DiT-XL-2", "001-DiT-XL-2"]
    with monkeypatch.context() as restart:
        restart.setenv("TORCHELASTIC_RUN_ID", "launch-a")
        assert open_run(tmp_path, None, "DiT-XL/2") == first  # torchrun does not count a restart for a machine that came back
    with monkeypatch.context() as restart:  # torchrun's default id, the same for all launches
        restart.setenv("TORCHELASTIC_RUN_ID", "none")
        third = open_run(tmp_path, None, "DiT-XL/2")
        assert open_run(tmp_path, None, "DiT-XL/2").name == "003-DiT-XL-2"
        (tmp_path / "003-DiT-XL-2" / "launch").write_text("another")
        restart.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert open_run(tmp_path, None, "DiT-XL/2") == third
    open_run(tmp_path, "mine", "DiT-XL/2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # a process of the same launch would wait for the lock
    second = subprocess.run([sys.executable, ROOT / "tests" / "other_process.py", "open_run", tmp_path, "mine", "DiT-XL/2"],
                            capture_output=True, text=True, check=False)
    assert "UserError: another process is at work in" in second.stderr


def test_a_run_is_a_folder_in_results(tmp_path):
    (tmp_path / "results").mkdir()
    for name in ("", ".", "..", "a/b", "../a", "a/", "/a", "a/.."):
        with pytest.raises(UserError, match=r"`run_name` .* is not the name of a folder in `results_dir`"):
            open_run(tmp_path / "results", name, "DiT-S/2")
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_a_folder_removed_during_a_run_is_made_again(tmp_path):
    folder = tmp_path / "results" / "run"
    for write in (lambda: save_step(folder, {"step": 3, "w": torch.ones(2)}, 0, 0), lambda: list_skipped(folder, ["x"])):
        write()
        shutil.rmtree(folder)
        write()
        shutil.rmtree(tmp_path / "results")
    save_step(folder, {"step": 3, "w": torch.ones(2)}, 0, 0)
    assert checkpoint.load(folder / "checkpoints" / "0000003.pt")["step"] == 3


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "previews").write_text("")
    for name, words in (("file", r"file/checkpoints: Not a directory"), ("run", r"run/previews: File exists"),
                        (256 * "x", "x/checkpoints: File name too long")):
        with pytest.raises(OSError, match=rf"^cannot make the folder .*{words}; choose another `run_name`$") as error:
            open_run(tmp_path, name, "DiT-S/2")
        assert error.value.errno is None  # cli.run makes one line of it


CONTINUED = [*TINY_RUN, "--diffusion-args", '{"objective": "flow"}', "--run-name", "r"]


def changed(part, value):
    def change(state):
        weights = state[part] if part != "opt" else state["opt"]["state"][3]
        name = next(name for name in weights if name != "step")
        weights[name] = value(weights[name])
    return change


@pytest.mark.parametrize(("change", "words"), [
    (changed("model", lambda w: w * torch.nan), "model: .* values of .* are not finite"),
    (changed("ema", lambda w: w * torch.nan), "ema: .* values of .* are not finite"),
    (changed("opt", lambda w: w - torch.inf), "opt: exp_avg 3 is not finite"),
    (changed("opt", lambda w: w[..., :1]), r"opt: exp_avg 3 is \(.*\), the parameter \("),
    (changed("ema", lambda w: w[..., :1]), "size mismatch"), (changed("ema", lambda w: None), "'NoneType' object has no"),
    (lambda state: state["opt"]["state"].update({999: {}}), "list index out of range"),
    (lambda state: state["opt"].pop("state"), "'state'"), (lambda state: state["meter"].pop("total"), "total")])
def test_a_checkpoint_with_wrong_values_is_not_continued(tiny_run, tmp_path, run_here, monkeypatch, change, words):
    newest = checkpoint.latest(tiny_run)
    state = checkpoint.load(newest)
    change(state)
    path = tmp_path / "results" / "r" / "checkpoints" / newest.name
    checkpoint.save(path, state)
    monkeypatch.chdir(tmp_path)
    result = run_here(train, *CONTINUED, "--max-steps", 1 + state["step"])
    assert re.search(rf"^train.py: error: results/r/checkpoints/{newest.name} cannot be continued: .*{words}", result.stderr)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_a_run_that_continues_says_what_it_does_not_read_and_knows_a_renamed_checkpoint(tiny_run, tmp_path, run_here,
                                                                                        monkeypatch):
    newest = checkpoint.latest(tiny_run)
    state = checkpoint.load(newest)
    checkpoints = tmp_path / "results" / "r" / "checkpoints"
    checkpoint.save(checkpoints / newest.name, state)
    monkeypatch.chdir(tmp_path)
    flags = [*CONTINUED, "--max-steps", state["step"]]
    for flag in ("--resume", "--init-from"):
        result = run_here(train, *flags, flag, "gone.pt")
        assert f"; {flag} gone.pt is not used: this run continues its own checkpoint; " in result.stdout, result.stderr
    assert "not used" not in run_here(train, *flags).stdout
    for old, new in ((newest.name, "0000900.pt"), (f"{newest.name}.sha256", "0000900.pt.sha256")):
        (checkpoints / old).rename(checkpoints / new)
    result = run_here(train, *flags)
    assert result.stderr == (f"train.py: error: results/r/checkpoints/0000900.pt is of step {state['step']}: it was renamed; "
                             f"call it {newest.name} again\n")


def test_a_run_keeps_the_label_std_that_was_the_default_when_it_began(tiny_run, tmp_path, run_here, monkeypatch):
    newest = checkpoint.latest(tiny_run)
    state = checkpoint.load(newest)
    state["spec"]["model"]["args"]["label_std"] = 0.02
    checkpoint.save(tmp_path / "results" / "r" / "checkpoints" / newest.name, state)
    monkeypatch.chdir(tmp_path)
    flags = [*CONTINUED, "--max-steps", state["step"] + 1]
    given = ["--model-args", '{"hidden_size": 32, "depth": 2, "label_std": 1.0}']
    assert_one_line(run_here(train, *flags, *given), "was trained with model argument label_std 0.02, not 1.0")
    result = run_here(train, *flags)
    assert result.returncode == 0, result.stderr
    assert checkpoint.restore("results/r").spec.model.args["label_std"] == 0.02
    assert checkpoint.resolve("results/r").name == f"{state['step'] + 1:07d}.pt"


def test_new_runs_are_numbered_after_the_highest_run(tmp_path):
    for name in ("2024run-foo", "2026-11-23", "007-notes", "003-DiT-S-2", "x"):
        (tmp_path / name).mkdir()
    assert new_folder(tmp_path, "DiNext-S-2").name == "004-DiNext-S-2"
    assert new_folder(tmp_path, "DiNext-S-2").name == "005-DiNext-S-2"


def test_the_newest_and_every_mth_checkpoint_are_kept(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    def names():
        return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())

    checkpoint.save(tmp_path / "checkpoints" / "best.pt", {"step": 5})
    for step in (5, 10, 13, 15, 20, 25):  # 13: a run that was stopped there
        save_step(tmp_path, {"step": step}, keep_last=2, every=10)
    kept = [f"{name}.pt" for name in ("0000010", "0000020", "0000025", "best")]
    assert names() == sorted(kept + [f"{name}.sha256" for name in kept])
    assert checkpoint.latest(tmp_path).name == "0000025.pt"
    save_step(tmp_path, {"step": 30}, keep_last=0, every=0)
    assert len(names()) == 10
