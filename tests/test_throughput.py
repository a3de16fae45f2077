import json
import time
from functools import partial

import pytest
import throughput
import torch
from conftest import assert_one_line
from torch import nn
from torch.nn.attention import SDPBackend

from benchmarks.instruments import kind_of
from models import Attention, DiT, DiT_models

NAMES = ["DiT-S/2", "DiNext-S/2"]
FLAGS = ["--image-size", 32, "--batch-size", 2, "--repeats", 2, "--device", "cpu"]


@pytest.fixture
def tiny(monkeypatch):
    """The presets with one narrow block; small matrices."""
    monkeypatch.setitem(DiT_models, "DiT-S/2", partial(DiT, patch_size=2, depth=1, hidden_size=24, num_heads=2))
    monkeypatch.setitem(DiT_models, "DiNext-S/2", partial(DiT_models["DiNext-S/2"].func, patch_size=2, depth=1, hidden_size=24))
    monkeypatch.setitem(throughput.MATMUL_SIZE, "cpu", 16)
    throughput.count_macs.cache_clear()
    yield
    throughput.count_macs.cache_clear()


def test_the_report_has_all_figures_of_every_setting(tiny, run_here, tmp_path):
    out = tmp_path / "figures.json"
    result = run_here(throughput, "--models", *NAMES, *FLAGS, "--precision", "fp32", "bf16", "--out", out)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert {"device", "torch", "date", "settings", "results"} == set(report)
    keys = [tuple(r[key] for key in ("what", "precision", "compile", "batch_size", "model")) for r in report["results"]]
    assert keys == [(what, precision, False, 2, name) for what in ("train", "forward") for precision in ("fp32", "bf16")
                    for name in NAMES]
    for r in report["results"]:
        assert r["peak_memory_bytes"] is r["attention"] is None  # CUDA's
        assert set(r["kernel_seconds"]) <= set(throughput.instruments.KINDS)
        assert sum(r.get(f"{kind}_share", 0) for kind in throughput.instruments.KINDS) == pytest.approx(1)
        assert r["images_per_second"] == pytest.approx(2 / (sum(r["seconds"]) / 2))
        passes = 3 if r["what"] == "train" else 1
        assert r["flops_per_second"] == pytest.approx(r["images_per_second"] * r["gmacs"] * 2e9 * passes)
        assert r["of_matmul"] == pytest.approx(r["flops_per_second"] / r["matmul_flops_per_second"])
        assert r["ratio"] == 1 or r["model"] != NAMES[0]
    assert "  DiNext-S/2: " in result.stdout


def test_rounds_take_the_networks_in_turn(tiny, monkeypatch):
    calls = []
    monkeypatch.setattr(throughput, "make_call", lambda name, *rest: lambda: calls.append(name))
    monkeypatch.setattr(throughput, "kernel_seconds", lambda *_: {"other": 1.0})
    throughput.measure(throughput.Setting("forward", "fp32", False, 2), NAMES, 4, 2, torch.device("cpu"))
    assert calls == [name for name in NAMES for _ in range(2)] + 3 * NAMES  # prepared; the first round warms up


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


def test_every_implementation_of_attention_is_timed_and_the_fastest_is_the_baseline(tiny, monkeypatch):
    """Each row runs its own kernels, in every call."""
    monkeypatch.setattr(throughput, "ATTENTION", {"cpu": {"slow": SDPBackend.MATH, "fast": SDPBackend.FLASH_ATTENTION}})
    make_call, kernels = throughput.make_call, {}

    def make(name, setting, input_size, device, attention):
        call = make_call(name, setting, input_size, device, attention)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            call()
            call()
        kernels[name, attention] = {e.key: e.count for e in profiler.key_averages() if "_scaled_dot_product_" in e.key}
        return lambda: (time.sleep(0.05 * (attention == "slow")), call())

    monkeypatch.setattr(throughput, "make_call", make)
    results = throughput.measure(throughput.Setting("forward", "fp32", False, 2), NAMES, 4, 2, torch.device("cpu"))
    assert kernels == {(NAMES[0], "slow"): {"aten::_scaled_dot_product_attention_math": 2},
                       (NAMES[0], "fast"): {"aten::_scaled_dot_product_flash_attention_for_cpu": 2}, (NAMES[1], None): {}}
    ratios = {throughput.title_of(result): result["ratio"] for result in results}
    assert list(ratios) == ["DiT-S/2 slow", "DiT-S/2 fast", "DiNext-S/2"]
    assert ratios["DiT-S/2 fast"] == 1
    assert ratios["DiT-S/2 slow"] < 0.9


def test_multiply_accumulates_are_those_of_the_papers():
    assert throughput.count_macs("DiT-XL/2", 32) / 1e9 == pytest.approx(118.6, abs=0.05)


def saved_by(make, shape, precision="bf16"):
    """What a network on a GPU that is not there saves of an input (B, N, D): without its parameters, in bytes."""
    with torch.device("meta"):
        model = make()
    with throughput.fake_cuda(precision):
        own = throughput.move_to_fake_cuda(model)
        return throughput.count_saved(lambda: model(torch.randn(shape, device="cuda")), own)


def test_saved_bytes_are_those_of_a_closed_form():
    """Linear saves its input, GELU its input; the second Linear the output of GELU and, to pass the gradient on, its weight.

    That weight is a parameter, or under autocast a copy in bf16.
    """
    def make():
        return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    positions = 3 * 5
    assert saved_by(make, (3, 5, 8), "fp32") == 4 * positions * (8 + 32 + 32)
    assert saved_by(make, (3, 5, 8), "bf16") == 2 * positions * (8 + 32 + 32) + 2 * 32 * 8


def test_attention_saves_no_matrix_of_all_pairs():
    """Its input, q, k and v in one storage, its output, logsumexp in fp32, the second weight's copy. (24 bytes: of dropout.)"""
    batch, positions, width, heads = 2, 64, 16, 4
    assert saved_by(lambda: Attention(width, heads), (batch, positions, width)) == pytest.approx(
        2 * batch * positions * width * (1 + 3 + 1) + 4 * batch * heads * positions + 2 * width**2, abs=32)


@pytest.mark.parametrize(("name", "kept_anyway"), [("DiT-S/2", True), ("DiNext-S/2", False)])
def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block(tiny, monkeypatch, name, kept_anyway):
    """An input of a block is fp32. DiT's LayerNorm keeps it anyway; DiNext's convolution keeps its copy in bf16."""
    def count(depth, batch=2):
        monkeypatch.setitem(DiT_models, name, partial(preset.func, **preset.keywords | {"depth": depth}))
        return throughput.count_memory(throughput.Setting("memory", "bf16", False, batch), name, 4)

    preset, an_input = DiT_models[name], 4 * (2 * 2 * 2 * 24)  # B, h, w, D
    one, three = count(1), count(3)
    assert one["checkpointed_bytes"] == one["activation_bytes"] + (0 if kept_anyway else an_input)
    assert three["checkpointed_bytes"] == one["checkpointed_bytes"] + 2 * an_input
    assert three["activation_bytes"] > three["checkpointed_bytes"]
    sizes = [count(3, batch)["activation_bytes"] for batch in (2, 4, 6)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0  # the rest does not depend on the batch


def test_memory_is_counted_without_a_gpu(tiny, run_here, tmp_path):
    out = tmp_path / "memory.json"
    flags = [*FLAGS, "--what", "memory", "--precision", "bf16", "--out", out]
    result = run_here(throughput, "--models", *NAMES, "ConvAdaLN", *flags)
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["results"]
    assert [(r["model"], r["attention"], r["what"]) for r in rows] == [
        ("DiT-S/2", "flash", "memory"), ("DiNext-S/2", None, "memory"), ("ConvAdaLN", None, "memory")]
    for r in rows:
        network = throughput.build(r["model"], 4)
        assert r["parameters"] == sum(p.numel() for p in network.parameters() if p.requires_grad)
        assert (r["state_bytes"], r["gradient_bytes"]) == (16 * r["parameters"], 4 * r["parameters"])
    assert not torch.is_autocast_enabled("cuda")
    assert "counted for a GPU, not run" in result.stdout


def test_wrong_input_is_one_line(run_here):
    for flags, words in ((["DiT-S/3"], ["--models", "DiT-S/3", "DiT-S/2"]),
                         (["DiT-S/2", "--image-size", 24], ["--image-size", "(3, 3)"]),
                         (["DiT-S/2", "--image-size", 60], ["--image-size 60"]),
                         (["DiT-S/2", "--what", "memory", "--compile", "true"], ["--what memory", "--compile must be false"]),
                         (["DiT-S/2", "--repeats", 0], ["--repeats 0"])):
        assert_one_line(run_here(throughput, "--models", *flags), *words)
