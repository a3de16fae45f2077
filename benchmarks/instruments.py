"""What the benchmarks share: seconds, kernels, multiply-accumulates, bytes, out of memory, and reports that continue.

Bytes are those that CUDA would move, counted with fake tensors and so without a GPU: see count_bytes in throughput.py.
"""

import contextlib
import gc
import itertools
import math
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from runtime import UserError
from runtime.files import read_json
from runtime.processes import synchronize

KINDS = {  # of kernels: the first whose pattern is found in the kernel's name (see kind_of)
    "attention": r"flash|fmha|attention|sdpa", "convolution": r"conv|dgrad|wgrad|fprop",
    "matmul": r"gemm|nvjet|cutlass|cublas|addmm|::b?mm|linear", "other": ""}
FREE = re.compile("empty|_unsafe_view|detach")  # operations that are not views, but move nothing


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def open_report(out: Path, settings: dict[str, Any], empty: dict[str, Any]) -> dict[str, Any]:
    """The report at `out`, if there is one, else a new one: `settings` and `empty`.

    Raises:
        UserError: the file is not a report, or has other settings.
    """
    if not out.exists():
        return {"settings": settings, **empty}
    try:
        report = read_json(out)
        stored = dict(report["settings"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"`out` {out} exists and is not a report of this script; name another file") from None
    if different := [name for name in settings if stored.get(name) != settings[name]]:
        raise UserError(f"`out` {out} has figures of another {', '.join(different)}; name another file, or delete it")
    return report


# --- time and memory -----------------------------------------------------------------------------


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """The seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def time_in_turn(calls: dict[Any, Callable], rounds: int, device: torch.device, title: str) -> dict[Any, list[float] | None]:
    """The seconds of each call in each round, or None if it is out of memory.

    A round is one call of each, so other load on the machine affects all alike. One more round before them warms up.
    """
    laps = {key: [] for key in calls}
    for _, key in itertools.product(tqdm(range(1 + rounds), title, leave=False), calls):
        if laps[key] is not None:
            seconds = attempt(partial(time_call, calls[key], device))
            laps[key] = None if seconds is None else [*laps[key], seconds]
    return {key: seconds and seconds[1:] for key, seconds in laps.items()}


def median_ratio(first: list[float], laps: list[float]) -> float:
    """How many times as fast as the first call another one is: the median over the rounds."""
    return statistics.median(reference / seconds for reference, seconds in zip(first, laps))


def attempt(call: Callable[[], Any]) -> Any:
    """The result of a call, or None if the GPU is out of memory, which is then freed."""
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        return call()
    gc.collect()  # not in the block above: a live exception keeps the memory of its functions
    torch.cuda.empty_cache()


def kernel_seconds(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """The seconds of the kernels of one call (on the CPU: of its operations) by KINDS, from a profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler's library prints a line at each start and stop
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        call()
        synchronize(device)
    seconds = Counter()
    for event in profiler.key_averages():
        if not cuda or event.device_type == DeviceType.CUDA:  # on CUDA the kernels, not the operations that launch them
            seconds[kind_of(event.key)] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
    return dict(seconds)


def kind_of(kernel: str) -> str:
    """One of KINDS. Triton names pointwise kernels and reductions after all operations fused in them, even convolutions."""
    if kernel.startswith(("triton_poi_", "triton_per_", "triton_red_")):
        return "other"
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))


# --- counted without running ---------------------------------------------------------------------


def count_macs(build: Callable[[], nn.Module], shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of the forward pass of one image or latent (C, H, W), on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build()(torch.empty(1, *shape), torch.empty(1), torch.empty(1, dtype=torch.long))
    return counter.get_total_flops() // 2


@contextlib.contextmanager
def fake_cuda(model: nn.Module) -> Iterator[None]:
    """In this block every tensor is fake, and the weights of a model on the meta device become fake weights on CUDA.

    A fake tensor has everything but data: operations are dispatched as on CUDA, and tensors of two devices do not mix.
    (Backward does not work: autograd asks the driver.)
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
                        tensors[name] = nn.Parameter(fake, tensor.requires_grad) if tensors is module._parameters else fake
        yield


@contextlib.contextmanager
def fake_autocast(precision: str) -> Iterator[None]:
    """autocast for CUDA on a machine without it, where torch.autocast refuses."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", precision == "bf16")
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


class ByteCounter(TorchDispatchMode):
    """Adds up the bytes that each operation reads and writes. Views move nothing; broadcast values count once."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "aten" and not function.is_view and not FREE.search(function.name()):
            self.bytes += sum(bytes_of(leaf) for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
        return out


class FusedAttention(TorchFunctionMode):
    """Counts attention as one fused kernel. Without CUDA, fake tensors would be dispatched to the unfused operations."""

    def __init__(self, counter: ByteCounter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v = args[:3]  # (B, heads, N, D / heads)
        self.counter.bytes += 2 * bytes_of(q) + bytes_of(k) + bytes_of(v)
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)  # the layout of fused kernels
        return out.transpose(1, 2)


def bytes_of(tensor: Tensor) -> int:
    return tensor.element_size() * math.prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride)
