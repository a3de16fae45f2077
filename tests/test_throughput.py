import json
import time
from functools import partial

import pytest
import throughput
import torch
from conftest import assert_one_line
from torch.nn.attention import SDPBackend

from benchmarks.instruments import ByteCounter, FusedAttention, kind_of
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
    result = run_here(throughput, "--models", *NAMES, *FLAGS, "--precision", "fp32", "bf16", "--out", out)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert {"device", "torch", "date", "settings", "results"} == set(report)
    assert report["settings"]["repeats"] == 2
    keys = [tuple(r[key] for key in ("what", "precision", "compile", "batch_size", "model")) for r in report["results"]]
    assert keys == [(what, precision, False, 2, name) for what in ("train", "forward") for precision in ("fp32", "bf16")
                    for name in NAMES]
    for r in report["results"]:
        assert not r["out_of_memory"]
        assert r["peak_memory_bytes"] is None
        assert r["attention"] is None  # the choice is CUDA's
        assert r["bytes_moved"] > 4 * r["gmacs"]
        assert set(r["kernel_seconds"]) <= set(throughput.KINDS)
        assert 0 < r["kernel_seconds"]["matmul"] < 10
        assert r["images_per_second"] == pytest.approx(2 / (sum(r["seconds"]) / 2))
        assert len(r["seconds"]) == 2
        passes = 3 if r["what"] == "train" else 1
        assert r["flops_per_second"] == pytest.approx(r["images_per_second"] * r["gmacs"] * 2e9 * passes)
        assert r["of_matmul"] == pytest.approx(r["flops_per_second"] / r["matmul_flops_per_second"])
        assert r["ratio"] == 1 or r["model"] != NAMES[0]
    assert "images/s over DiT-S/2's:" in result.stdout
    assert len(result.stdout.splitlines()) == 1 + 4 * 4 + 1 + 4


def test_rounds_take_the_candidates_in_turn(tiny, run_here, monkeypatch):
    calls = []

    def make_call(name, *rest):
        return lambda: calls.append(name)

    monkeypatch.setattr(throughput, "make_call", make_call)
    monkeypatch.setattr(throughput, "make_matmul", lambda *_: lambda: calls.append("matmul"))
    run_here(throughput, "--models", *NAMES, *FLAGS, "--what", "forward")
    everyone = ["matmul", *NAMES]
    assert calls == [name for name in NAMES for _ in range(2)] + 3 * everyone + NAMES  # the first round warms up; the profile


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


def test_a_kernel_is_known_by_its_name():
    kinds = {"triton_poi_fused_convolution_0": "other", "triton_red_fused__scaled_dot_product_flash_attention_2": "other",
             "triton_tem_fused_addmm_4": "matmul", "void flash_fwd_kernel<…>": "attention", "nvjet_hsh_128x256": "matmul",
             "sm90_xmma_fprop_implicit_gemm": "convolution", "void at::native::vectorized_elementwise_kernel": "other"}
    assert {kernel: kind_of(kernel) for kernel in kinds} == kinds


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


def test_every_implementation_of_attention_is_timed_and_the_fastest_is_the_baseline(tiny, run_here, monkeypatch, tmp_path):
    monkeypatch.setattr(throughput, "ATTENTION", {"cpu": {"slow": SDPBackend.MATH, "fast": SDPBackend.FLASH_ATTENTION}})
    make_call, chosen = throughput.make_call, []

    def make(name, setting, input_size, device, attention):
        call = make_call(name, setting, input_size, device, attention)
        return lambda: (chosen.append(attention), time.sleep(0.05 * (attention == "slow")), call())

    monkeypatch.setattr(throughput, "make_call", make)
    out = tmp_path / "figures.json"
    result = run_here(throughput, "--models", *NAMES, *FLAGS, "--what", "forward", "--out", out)
    assert result.returncode == 0, result.stderr
    found = {(r["model"], r["attention"]): r["ratio"] for r in json.loads(out.read_text())["results"]}
    assert list(found) == [(NAMES[0], "slow"), (NAMES[0], "fast"), (NAMES[1], None), (NAMES[2], "slow"), (NAMES[2], "fast")]
    assert set(chosen) == {None, "slow", "fast"}
    assert found[NAMES[0], "fast"] == 1
    assert found[NAMES[0], "slow"] < 0.9
    assert "DiT-S/2 slow" in result.stdout


def test_attention_is_computed_as_asked(tiny, monkeypatch):
    """Each row runs its own kernels."""
    monkeypatch.setattr(throughput, "ATTENTION", {"cpu": {"plain": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}})
    for attention, operation in (("plain", "aten::_scaled_dot_product_attention_math"),
                                 ("flash", "aten::_scaled_dot_product_flash_attention_for_cpu")):
        setting = throughput.Setting("forward", "fp32", False, 2)
        call = throughput.make_call("DiT-S/2", setting, 4, torch.device("cpu"), attention)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            call()
        names = {event.key for event in profiler.key_averages()}
        assert {name for name in names if name.startswith("aten::_scaled_dot_product_")} == {operation}


def test_bytes_of_a_dinext_block_are_counted():
    """Per element of x, 3 D wide inside; bf16, the stream in fp32; written out, one operation a line. Weights apart."""
    elements = 2 * 16 * 16 * 384
    operations = [
        4 + 2,                     # x -> bf16
        2 + 2,                     # depthwise convolution
        2 + 4, 4 + 4, 4 + 4,       # -> fp32, LayerNorm, modulate
        4 + 2, 2 + 3 * 2,          # -> bf16, fc1
        3 * (2 + 2),               # GELU
        3 * 2, 3 * (2 + 2),        # norm, addcmul
        3 * 2 + 2,                 # fc2
        2 + 2, 4 + 2 + 4]          # gate, residual
    one, two = (throughput.count_bytes("DiNext-S/2", "bf16", 2, 32, depth=depth) * 2 for depth in (1, 2))
    weights = 2 * (384 * 49 + 2 * 3 * 384**2 + 3 * 384**2)  # of the convolution, fc1, fc2 and adaLN, in bf16
    assert two - one == pytest.approx(elements * sum(operations) + weights, rel=0.01)


def test_bytes_are_counted_for_other_networks_without_a_gpu():
    for name in ("DiNext-U-S", "PixArt-B/2", "ConvAdaLN", NAMES[2]):
        fp32, bf16 = (throughput.count_bytes(name, precision, 2, 32) for precision in ("fp32", "bf16"))
        assert 0.4 * fp32 < bf16 < fp32, name


def test_attention_counts_as_one_kernel():
    q = torch.empty(2, 3, 4, 5)
    with ByteCounter() as counter, FusedAttention(counter):
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.bytes == 4 * q.nbytes
    assert out.shape == q.shape
    with ByteCounter() as counter:
        q.expand(7, 2, 3, 4, 5) + torch.ones(1).expand(5)
    assert counter.bytes == q.nbytes + 4 + 7 * q.nbytes + 4  # the last: torch.ones writes one number


def test_the_reference_has_the_sizes_of_ours():
    names = "DiT-XL/2", f"{throughput.REFERENCE}DiT-XL/2"
    ours, reference = (throughput.count_macs(name, 32) / 1e9 for name in names)
    assert ours == pytest.approx(118.6, abs=0.05)
    assert reference == pytest.approx(ours, rel=0.02)
    with torch.device("meta"):
        ours, reference = (sum(p.numel() for p in throughput.build(name, 32).parameters()) for name in names)
    assert 1 < reference / ours < 1.25  # it embeds t and y in every block


def test_wrong_input_is_one_line(run_here):
    for flags, words in ((["DiT-S/3"], ["--models", "DiT-S/3", "DiT-S/2"]),
                         (["DiT-S/2", "--image-size", 24], ["--image-size", "(3, 3)"]),
                         (["DiT-S/2", "--image-size", 60], ["--image-size 60"]),
                         (["DiT-S/2", "--repeats", 0], ["--repeats 0"])):
        assert_one_line(run_here(throughput, "--models", *flags), *words)
