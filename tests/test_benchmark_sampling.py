import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import sampling
import torch
from conftest import assert_one_line, save_random_checkpoint

from runtime.files import sha256

TINY = ["--batch-sizes", 2, "--repeats", 1, "--device", "cpu"]
DIGITS = ["--data-path", "digits", "--samples", 12, "--seeds", 0, 1]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A checkpoint of random weights with learned variance, of digits' shape, guided by 2."""
    classes = sampling.load_dataset("digits").classes
    return save_random_checkpoint(tmp_path_factory.mktemp("gaussian") / "g.pt", 1, classes)


@pytest.fixture
def few_steps(monkeypatch):
    """References and rows of few steps."""
    monkeypatch.setitem(sampling.REFERENCES, "ddpm-250", dict(sampler="ddpm", num_sampling_steps=10))
    monkeypatch.setitem(sampling.REFERENCES, "heun-50", dict(sampler="heun", num_sampling_steps=3))
    for name in sampling.ROWS:
        steps = {"num_sampling_steps": 4} if "num_sampling_steps" in sampling.ROWS[name] else {}
        monkeypatch.setitem(sampling.ROWS, name, sampling.ROWS[name] | steps)


@pytest.fixture
def calls(monkeypatch):
    """The (sampler, reuse, images, seed) of each call of generate."""
    made, generate = [], sampling.generate

    def listen(model, autoencoder, labels, indices, seed, settings):
        made.append((settings.settings.sampler, settings.plan is not None, len(labels), seed))
        return generate(model, autoencoder, labels, indices, seed, settings)

    monkeypatch.setattr(sampling, "generate", listen)
    return made


def test_the_report_has_all_figures_of_every_row(few_steps, digits_run, run_here, tmp_path):
    out = tmp_path / "figures.json"
    result = run_here(sampling, "--ckpt", digits_run, *TINY, *DIGITS, "--out", out)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    settings = report["settings"]
    assert settings["sha256"] == sha256(digits_run)
    assert (settings["checkpoint"], settings["device"]) == ("g", "cpu")
    counts = {name: (row["model_calls"], row["block_calls"]) for name, row in settings["rows"].items()}
    assert counts == {
        "ddpm-250": (20, 40),
        "interval": (15, 30),  # of t 999, 888, ..., 0 those in 100..600: 111, ..., 555
        "encoder": (20, 40 - 2 * 5),  # of 10 evaluations all but 1..5 are keys; the encoder is 1 block of 2
        "forecast": (20, 2 * 2 * 5),  # keys 0, 1, 2, 4, 8; nothing elsewhere
        "ddim-50": (8, 16), "euler-50": (8, 16), "heun-10": (14, 28), "dpm++-20": (8, 16), "dpm++-15": (8, 16),
        "all-no-reuse": (5, 10),  # of t 999, 666, 333, 0 guided at 333
        "all-encoder": (5, 10 - 1 - 1),  # keys 0 and 2
        "all-forecast": (5, 10 - 2),  # keys 0, 1 and 2
    }
    for name in counts:
        cell, summary = report["times"]["2"][name], report["summary"][name]
        assert cell["seconds_per_image"] == cell["rounds"][0] > 0
        assert set(report["distances"][name]) == {"0", "1"}
        assert summary["FD-pixel32"] == pytest.approx(sum(report["distances"][name].values()) / 2)
        assert f"\n{name}: model_calls {counts[name][0]}, " in f"\n{result.stdout}"
    assert report["times"]["2"]["ddpm-250"]["ratio"] == 1


def test_a_flow_checkpoint_has_heun_for_a_reference(few_steps, tiny_run, run_here, tmp_path):
    out = tmp_path / "figures.json"
    result = run_here(sampling, "--ckpt", tiny_run, "--repeats", 0, "--out", out)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    rows = list(report["settings"]["rows"])
    assert rows[0] == "heun-50"
    assert set(sampling.ROWS) - set(rows) == {"interval"}  # its guidance is 1
    assert report["times"] == report["summary"] == {}


def test_with_and_without_reuse_in_one_command(digits_run, run_here, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_here(sampling, "--ckpt", digits_run, *TINY, "--reuse", "encoder", "--key-steps", "0,2", "--rows", "plain",
                      "flags", "--cfg-scale", 1.5)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(
        "flags: the first 1 of 2 blocks run on 2 of 4 evaluations (0,2; order 0; prior noise 0.0): 0 2\n")
    plain, flags = result.stdout.splitlines()[-2:]
    assert plain.startswith("plain: model_calls 8, block_calls 16, batch 2: seconds_per_image ")
    assert flags.startswith("flags: model_calls 8, block_calls 12, ")
    assert calls == 2 * [("ddpm", False, 2, 0), ("ddpm", True, 2, 0)]  # a round to warm up, one timed
    assert list(tmp_path.iterdir()) == []


def test_the_same_command_does_what_is_missing(few_steps, digits_run, run_here, calls, tmp_path):
    out = tmp_path / "figures.json"
    command = ["--ckpt", digits_run, *TINY, *DIGITS, "--rows", "ddpm-250", "ddim-50", "--out", out]
    assert run_here(sampling, *command).returncode == 0
    assert len(calls) == 2 * 2 + 2 * 2  # rounds, distances
    whole = json.loads(out.read_text())
    del whole["times"]["2"], whole["distances"]["ddim-50"]["1"]
    out.write_text(json.dumps(whole))
    calls.clear()
    assert run_here(sampling, *command).returncode == 0
    assert calls[:4] == 2 * [("ddpm", False, 2, 0), ("ddim", False, 2, 0)]
    assert calls[4:] == [("ddim", False, 12, 1)]
    assert json.loads(out.read_text())["summary"] == whole["summary"]
    calls.clear()
    assert run_here(sampling, *command).returncode == 0
    assert calls == []


def test_the_interval_of_the_flags_is_that_of_the_interval_rows_alone(few_steps, digits_run, run_here, calls):
    result = run_here(sampling, "--ckpt", digits_run, "--repeats", 0, "--guidance-interval", 300, 400,
                      "--rows", "ddpm-250", "interval", "flags", "all-no-reuse")
    made = re.findall(r"(\S+): model_calls (\d+)", result.stdout)
    assert made == [("ddpm-250", "20"), ("interval", "11"), ("flags", "5"), ("all-no-reuse", "5")]


def test_times_are_medians_and_ratios_compare_calls_of_one_round(monkeypatch):
    laps = {"a": [8, 8, 8], "b": [8, 2, 4]}
    monkeypatch.setattr(sampling, "time_in_turn", lambda *_: laps)
    cell = sampling.time_rows(len, {"a": None, "b": None}, 2, 3, torch.device("cpu"))["b"]
    assert cell == {"seconds_per_image": 2, "ratio": 2, "rounds": [4, 1, 2], "threads": torch.get_num_threads()}


def test_distances_have_a_mean_and_a_deviation():
    summary = sampling.summarise({"three": dict(enumerate([4.0, 5.0, 6.0])), "one": {0: 5.0}, "none": {}})
    assert summary == {"three": {"FD-pixel32": 5, "std": 1}, "one": {"FD-pixel32": 5, "std": None}}


def test_the_gaussian_is_of_pixels_of_at_most_32():
    images = torch.tensor([0, 255], dtype=torch.uint8).repeat(2, 1, 64, 32)  # 64 x 64, columns in turn black and white
    gaussian = sampling.gaussian_of([images[:1], images[1:]])
    assert gaussian.mean.shape == (32 * 32,)
    assert np.abs(gaussian.mean).max() < 1e-12
    assert np.abs(gaussian.covariance).max() < 1e-12


def test_wrong_input_is_one_line_before_any_work(tiny_run, run_here, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, words in ((["--rows", "ddpm-251"], ["--rows", "ddpm-251"]),
                         (["--rows", "ddpm-250"], ["--rows ddpm-250", "FlowMatching"]),
                         (["--samples", 10, "--data-path", "nowhere"], ["--data-path nowhere"])):
        assert_one_line(run_here(sampling, "--ckpt", tiny_run, "--repeats", 0, *flags), *words)
    assert calls == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flags", "words"), [
    (["--samples=10"], "--samples 10 needs --data-path"), (["--samples=1", "--data-path=digits"], "`samples` 1 "),
    (["--repeats=-1"], "`repeats` -1 "), (["--batch-sizes", "1", "0"], "--batch-sizes 1 0"),
    (["--reuse=encoder", "--rows", "heun-50"], "--reuse encoder.*flags")])
def test_wrong_flags(flags, words):
    with pytest.raises(ValueError, match=words):
        sampling.check_flags(sampling.build_parser().parse_args(flags))


def test_data_of_another_kind_are_refused():
    args = SimpleNamespace(data_path="digits", data_root="data")
    spec = SimpleNamespace(image_size=(8, 8), channels=1, classes=sampling.load_dataset("digits").classes)
    assert len(sampling.real_gaussian(args, spec).mean) == 64
    for name, value in (("channels", 3), ("classes", ["one", "two"])):
        with pytest.raises(ValueError, match="--data-path digits does not hold"):
            sampling.real_gaussian(args, SimpleNamespace(**vars(spec) | {name: value}))


def test_another_report_is_not_overwritten(few_steps, digits_run, run_here, tmp_path):
    out = tmp_path / "figures.json"
    command = ["--ckpt", digits_run, "--repeats", 0, "--rows", "ddim-50", "--out", out]
    assert run_here(sampling, *command).returncode == 0
    text = out.read_text()
    assert_one_line(run_here(sampling, *command, "--cfg-scale", 3), f"--out {out}", "another rows;")
    assert out.read_text() == text
