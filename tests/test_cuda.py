"""What runs on a GPU: on fake tensors of CUDA everywhere, and, marked `cuda`, on a real one: pytest -m cuda."""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, read_metrics, run_script
from test_models import SEAMED, TINY, family, inputs
from test_models import tiny as tiny_network
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from diffusion import create_diffusion
from diffusion.guidance import guide, in_interval
from diffusion.reuse import Reuse, plan
from diffusion.samplers import SAMPLERS, evaluation_times, samplers_of
from evaluation.extractors import Inception
from pipeline import checkpoint
from pipeline.generation import prepare_network
from runtime.processes import Delayed, autocast
from small_models import DIFFUSION_NETWORKS
from training.state import OptimizerArgs, Training

CUDA = torch.device("cuda")


def cuda(test):
    """The marks of a test that needs a GPU."""
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


# --- fake tensors, on any machine -----------------------------------------------------------------


@contextlib.contextmanager
def fake_cuda(model):
    """In this block every tensor is fake, and the weights of a model on the meta device become fake weights on CUDA.

    A fake tensor has everything but data: operations are dispatched as on CUDA, and tensors of two devices do not mix.
    (Backward does not work: autograd asks the driver.)
    """
    with FakeTensorMode():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
                        is_parameter = tensors is module._parameters
                        tensors[name] = torch.nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
        yield


@contextlib.contextmanager
def fake_autocast(precision):
    """autocast for CUDA on a machine without it, where torch.autocast refuses."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", precision == "bf16")
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


KINDS = list(zip(SEAMED, itertools.cycle(["none", "encoder", "forecast"])))  # each network with one kind of reuse


def check_on_fake_cuda(name, kind, objective, samplers):
    """A tensor that is made on the CPU on the way would not mix with those on CUDA."""
    with torch.device("meta"):
        model = DIFFUSION_NETWORKS[name](**{"input_size": 8, "in_channels": 3, "num_classes": 5, **TINY[family(name)],
                                            "learn_sigma": objective == "epsilon"})
    process = create_diffusion("3", objective=objective)
    draws = [sampling(model, process, sampler, kind) for sampler in samplers]
    with fake_cuda(model), fake_autocast("bf16"):
        x, y = torch.zeros(2, 3, 8, 8, device="cuda"), torch.zeros(2, dtype=torch.long, device="cuda")
        with torch.no_grad():
            assert {draw(x, y).device.type for draw in draws} == {"cuda"}
        loss = process.training_losses(model, x, torch.zeros_like(y), dict(y=y), x)["loss"]
        assert (loss.device.type, loss.dtype) == ("cuda", torch.float32)
        with pytest.raises(RuntimeError, match="device"):
            x + torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_network_its_loss_guidance_and_reuse_stay_on_the_device(name, kind):
    check_on_fake_cuda(name, kind, "epsilon", ["ddim"])


def test_samplers_stay_on_the_device():
    for objective in ("epsilon", "flow"):
        process = create_diffusion("4", objective=objective)
        check_on_fake_cuda("MLP", "none", objective, samplers_of(process))


def sampling(model, process, sampler, kind):
    """The function (start noise, labels) -> sample, as pipeline.generation composes it."""
    times = evaluation_times(SAMPLERS[sampler], process)
    guided = in_interval(times, 1.5, (100, 900))
    chosen = None if kind == "none" else plan(kind, times, guided, len(model.blocks), model.default_split, "every:2")

    def draw(x, y):
        network = Reuse(model, chosen, len(y)) if chosen else model
        network = guide(network, y, model.num_classes, 1.5, model.in_channels, guided)
        *_, last = SAMPLERS[sampler](process, network, x, lambda step: torch.zeros_like(x))
        return last["sample"]

    return draw


# --- a real GPU ------------------------------------------------------------------------------------


def error(found, expected):
    """The relative error of a tensor against an exact one."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


@cuda
def test_depthwise_convolution_and_its_gradients_are_right_in_bf16():
    """PyTorch has an open report of wrong gradients from cuDNN on H100."""
    x, g = torch.randn(2, 4, 16, 16, 1152, device="cuda").permute(0, 1, 4, 2, 3)  # both in channels_last
    w = (torch.randn(1152, 1, 7, 7, device="cuda") / 7).contiguous(memory_format=torch.channels_last)

    def passes(dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, w)]
        out = F.conv2d(*leaves, padding=3, groups=1152)
        return out, *torch.autograd.grad(out, leaves, g.to(dtype))

    x, w, g = (tensor.bfloat16().double() for tensor in (x, w, g))
    for found, expected in zip(passes(torch.bfloat16), passes(torch.float64)):
        assert error(found, expected) < 5e-3


@cuda
@pytest.mark.parametrize(("name", "how", "precision", "tolerance"), [
    ("DiT-S/2", "eager", "fp32", 1e-4), ("DiT-S/2", "compiled", "bf16", 0.1), ("DiNext-S/2", "checkpointed", "tf32", 0.01),
    ("DiNext-U-S", "compiled", "tf32", 0.01), ("DiNext-U-S", "eager", "bf16", 0.1), ("DiNextV3-S/2", "compiled", "bf16", 0.1),
    ("DiNextV3-S/2", "eager", "bf16", 0.1)])
def test_a_step_of_training_is_that_of_the_cpu(name, how, precision, tolerance):
    def gradients(device, precision):
        model = tiny_network(name, gradient_checkpointing=how == "checkpointed").train().to(device)
        if how == "compiled" and device == CUDA:
            model.compile()
        x, t, y = (part.to(device) for part in inputs(model))
        with autocast(device, precision):
            loss = create_diffusion("").training_losses(model, x, t.long(), dict(y=y), x.roll(1, 0))["loss"].mean()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    expected = gradients(torch.device("cpu"), "fp32")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        found = gradients(CUDA, precision)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    assert error(found, expected) < tolerance


@cuda
def test_a_run_resumes_bit_for_bit(tmp_path):
    flags = [*TINY_RUN, "--device", "cuda", "--precision", "bf16"]
    for run, stops in (("whole", [8]), ("broken", [4, 8])):
        for steps in stops:
            run_script("train.py", *flags, "--run-name", run, "--max-steps", steps, "--ckpt-every", 4, cwd=tmp_path)
    whole, broken = (checkpoint.load(tmp_path / "results" / run / "checkpoints" / "0000008.pt") for run in ("whole", "broken"))
    for part in ("model", "ema"):
        for key, value in whole[part].items():
            assert torch.equal(value, broken[part][key]), key
    assert len([line for line in read_metrics(tmp_path / "results" / "whole") if line.get("memory_gib", 0) > 0]) == 8


@cuda
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_samples_in_bf16_are_near_those_of_the_cpu(name, kind):
    model = tiny_network(name, in_channels=3).requires_grad_(False)
    x, y = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    draw = sampling(model, create_diffusion("10", learn_sigma=model.out_channels > 3), "ddim", kind)
    expected = draw(x, y)
    model.cuda()
    assert error(draw(x.cuda(), y.cuda()), expected) < 1e-3
    prepare_network(model, "bf16", compile=False)
    with autocast(CUDA, "bf16"):
        assert error(draw(x.cuda(), y.cuda()), expected) < 0.1


@cuda
def test_a_step_of_training_and_of_sampling_does_not_wait_for_the_device():
    model = tiny_network("DiNext-S/2").train().cuda()
    state = Training.begin(model, 1e-4, OptimizerArgs())
    x, t, y = (part.cuda() for part in inputs(model))
    process = create_diffusion("")  # its tables are copied to the device once

    def step():
        state.begin_step()
        with autocast(CUDA, "bf16"):
            loss = process.training_losses(model, x, t.long(), dict(y=y), x)["loss"].mean()
        loss.backward()
        state.opt.found_inf = state.meter.update({"loss": loss.detach()}, state.clip_gradients(1.0))
        state.opt.step()
        state.opt.zero_grad(set_to_none=True)
        state.update_ema(0.99)
        return Delayed(state.meter.streak)

    draw = torch.no_grad()(sampling(model, create_diffusion("4"), "ddpm", "none"))  # reuse copies its times once a batch
    for mode in ("default", "default", "error"):  # the first calls set up libraries
        torch.cuda.set_sync_debug_mode(mode)
        try:
            step()
            with autocast(CUDA, "bf16"):
                draw(x, y)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@cuda
def test_sample_ddp_draws_under_nccl_what_it_draws_on_the_cpu(tmp_path):
    run_script("train.py", *TINY_RUN, "--run-name", "run", "--max-steps", 2, cwd=tmp_path)
    images = []
    for device in ("cuda", "cpu"):
        run_script("sample_ddp.py", "--ckpt", "results/run", "--num-fid-samples", 20, "--per-proc-batch-size", 8, "--no-tf32",
                   "--num-sampling-steps", 4, "--device", device, "--sample-dir", device, cwd=tmp_path, nproc=1)
        (out,) = (tmp_path / device).glob("*.npz")
        images.append(np.load(out)["arr_0"].astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1


@cuda
def test_features_of_an_evaluation_are_those_of_the_cpu(inception_file):
    images = torch.randint(256, (4, 64, 48, 3), dtype=torch.uint8)
    with torch.no_grad():
        found, expected = (Inception(inception_file, device)(images.to(device)) for device in (CUDA, torch.device("cpu")))
    for name in expected:
        assert error(found[name], expected[name]) < 1e-4, name

