import json
from functools import partial

import pytest
import throughput
import torch
from conftest import assert_one_line

from models import DiT, DiT_models

NAMES = ["DiT-S/2", "DiNext-S/2", "diffusers/DiT-S/2"]
FLAGS = ["--image-size", 32, "--batch-size", 2, "--repeats", 2, "--device", "cpu"]


@pytest.fixture
def tiny(monkeypatch):
    """The presets, and so the reference too, with one narrow block; small matrices."""
    monkeypatch.setitem(DiT_models, "DiT-S/2", partial(DiT, patch_size=2, depth=1, hidden_size=24, num_heads=2))
    monkeypatch.setitem(DiT_models, "DiNext-S/2", partial(DiT_models["DiNext-S/2"].func, patch_size=2, depth=1, hidden_size=24))
    monkeypatch.setitem(throughput.MATMUL_SIZE, "cpu", 16)


def test_the_report_has_all_figures_of_every_setting(tiny, run_here, tmp_path):
    out = tmp_path / "figures.json"
    result = run_here(throughput, "--models", *NAMES, *FLAGS, "--precision", "fp32", "bf16", "--batch-size", 1, 2, "--out", out)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert {"device", "torch", "date", "settings", "results"} == set(report)
    assert report["settings"]["repeats"] == 2
    keys = [tuple(r[key] for key in ("what", "precision", "compile", "batch_size", "model")) for r in report["results"]]
    assert keys == [(what, precision, False, batch, name) for what in ("train", "forward") for precision in ("fp32", "bf16")
                    for batch in (1, 2) for name in NAMES]
    for r in report["results"]:
        assert not r["out_of_memory"]
        assert r["peak_memory_bytes"] is None
        assert 0 < r["images_per_second_min"] <= r["images_per_second"] <= r["images_per_second_max"]
        assert len(r["seconds"]) == 2
        passes = 3 if r["what"] == "train" else 1
        assert r["flops_per_second"] == pytest.approx(r["images_per_second"] * r["gmacs"] * 2e9 * passes)
        assert r["of_matmul"] == pytest.approx(r["flops_per_second"] / r["matmul_flops_per_second"])
        assert r["ratio"] == 1 or r["model"] != NAMES[0]
    assert "images/s over DiT-S/2's:" in result.stdout
    assert len(result.stdout.splitlines()) == 1 + 8 * 4 + 1 + 8


def test_rounds_take_the_candidates_in_turn(tiny, run_here, monkeypatch):
    calls = []

    def make_call(name, *rest):
        return lambda: calls.append(name)

    monkeypatch.setattr(throughput, "make_call", make_call)
    monkeypatch.setattr(throughput, "make_matmul", lambda *_: lambda: calls.append("matmul"))
    run_here(throughput, "--models", *NAMES, *FLAGS, "--what", "forward")
    everyone = ["matmul", *NAMES]
    assert calls == [name for name in everyone for _ in range(throughput.WARM_UP)] + 2 * everyone


def test_a_setting_too_large_is_recorded_and_the_sweep_goes_on(tiny, run_here, monkeypatch, tmp_path):
    make_call = throughput.make_call

    def refuse_large(name, setting, *rest):
        if setting.batch_size == 4 and name == NAMES[0]:
            raise torch.cuda.OutOfMemoryError
        return make_call(name, setting, *rest)

    monkeypatch.setattr(throughput, "make_call", refuse_large)
    out = tmp_path / "figures.json"
    result = run_here(throughput, "--models", *NAMES[:2], *FLAGS, "--what", "train", "--batch-size", 4, 2, "--out", out)
    assert result.returncode == 0, result.stderr
    assert [r["out_of_memory"] for r in json.loads(out.read_text())["results"]] == [True, False, False, False]
    assert "out of memory" in result.stdout


def test_a_training_step_trains_and_a_forward_pass_does_not(tiny, monkeypatch):
    """Gradients are there when the optimizer steps, none are left; forward leaves the weights alone."""
    build, models = throughput.build, []
    monkeypatch.setattr(throughput, "build", lambda *args: models.append(build(*args)) or models[-1])
    for what in ("train", "forward"):
        call = throughput.make_call("DiT-S/2", throughput.Setting(what, "fp32", False, 2), 4, torch.device("cpu"))
        before = [parameter.clone() for parameter in models[-1].parameters()]
        call()
        after = list(models[-1].parameters())
        moved = [not torch.equal(a, b) for a, b in zip(before, after)]
        assert moved == [what == "train" and parameter.requires_grad for parameter in after]
        assert all(parameter.grad is None for parameter in after)


@pytest.mark.parametrize(("name", "gmac"), [("DiT-S/2", 6.1), ("DiT-XL/2", 118.6)])
def test_the_reference_has_the_sizes_of_ours(name, gmac):
    ours, reference = (throughput.count_macs(prefix + name, 32) / 1e9 for prefix in ("", throughput.REFERENCE))
    assert ours == pytest.approx(gmac, abs=0.05)
    assert reference == pytest.approx(ours, rel=0.02)
    with torch.device("meta"):
        ours, reference = (sum(p.numel() for p in throughput.build(prefix + name, 32).parameters())
                           for prefix in ("", throughput.REFERENCE))
    assert 1 < reference / ours < 1.25  # it embeds t and y in every block


@pytest.mark.parametrize(("flags", "words"), [
    (["--models", "DiT-S/3"], ["--models", "DiT-S/3", "DiT-S/2"]),
    (["--models", "DiT-S/2", "--image-size", 24], ["--image-size", "(3, 3)"]),
    (["--models", "DiT-S/2", "--image-size", 60], ["--image-size 60"]),
    (["--models", "DiT-S/2", "--repeats", 0], ["--repeats 0"]),
    (["--models", "DiT-S/2", "--batch-size", 0], ["--batch-size [0]"]),
])
def test_wrong_input_is_one_line(run_here, flags, words):
    assert_one_line(run_here(throughput, *flags), *words)
