"""What the benchmarks share: seconds, kernels, multiply-accumulates, and reports that continue."""

import itertools
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from runtime import UserError
from runtime.files import read_json
from runtime.processes import synchronize

KINDS = {  # of kernels: the first whose pattern is found in the kernel's name (see kind_of)
    "attention": r"flash|fmha|attention|sdpa", "convolution": r"conv|dgrad|wgrad|fprop",
    "matmul": r"gemm|nvjet|cutlass|cublas|addmm|::b?mm|linear", "other": ""}


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def open_report(out: Path, settings: dict[str, Any], empty: dict[str, Any]) -> dict[str, Any]:
    """The report at `out`, if there is one, else a new one: `settings` and `empty`. Raises UserError for other settings."""
    if not out.exists():
        return {"settings": settings, **empty}
    report = read_json(out)
    stored = report.get("settings", {})
    if different := [name for name in settings if stored.get(name) != settings[name]]:
        raise UserError(f"`out` {out} has figures of another {', '.join(different)}; name another file, or delete it")
    return report


def describe(figures: dict[str, Any]) -> str:
    """The numbers among figures, with their names."""
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if type(value) in (int, float))


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """The seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def time_in_turn(calls: dict[Any, Callable], rounds: int, device: torch.device, title: str) -> dict[Any, list[float]]:
    """The seconds of each call in each round.

    A round is one call of each, so other load on the machine affects all alike. One more round before them warms up.
    """
    laps = {key: [] for key in calls}
    for _, key in itertools.product(tqdm(range(1 + rounds), title, leave=False), calls):
        laps[key].append(time_call(calls[key], device))
    return {key: seconds[1:] for key, seconds in laps.items()}


def median_ratio(first: list[float], laps: list[float]) -> float:
    """How many times as fast as the first call another one is: the median over the rounds."""
    return statistics.median(reference / seconds for reference, seconds in zip(first, laps))


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


def count_macs(build: Callable[[], nn.Module], shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of the forward pass of one image or latent (C, H, W), on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build()(torch.empty(1, *shape), torch.empty(1), torch.empty(1, dtype=torch.long))
    return counter.get_total_flops() // 2
