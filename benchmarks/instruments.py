"""What is seen of a network's kernels: where their time goes, and which bytes they move.

Bytes are those of CUDA, counted with fake tensors, so without a GPU:

    with fake_cuda(model), torch.no_grad(), fake_autocast("bf16"):  # a model on the meta device
        with ByteCounter() as counter, FusedAttention(counter):
            model(x, t, y)  # made in here, on "cuda"
    print(counter.bytes)
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runtime.processes import synchronize

KINDS = {  # of kernels, by the first pattern that their names match (see kind_of)
    "attention": r"flash|fmha|attention|sdpa", "convolution": r"conv|dgrad|wgrad|fprop",
    "matmul": r"gemm|nvjet|cutlass|cublas|addmm|::b?mm|linear", "other": ""}
FREE = re.compile("empty|_unsafe_view|detach")  # operations that are no views, but move nothing


def kernel_seconds(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Where the time of one call goes: the seconds of its kernels (on the CPU: of its operations) by KINDS, from a profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's library writes a line at each start and stop
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        call()
        synchronize(device)
    seconds = Counter()
    for event in profiler.key_averages():
        if not cuda or event.device_type == DeviceType.CUDA:  # on CUDA the kernels, not what launched them
            seconds[kind_of(event.key)] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
    return dict(seconds)


def kind_of(kernel: str) -> str:
    """One of KINDS. Triton's pointwise kernels and reductions bear names of what they are fused from, a convolution's too."""
    if kernel.startswith(("triton_poi_", "triton_per_", "triton_red_")):
        return "other"
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))


@contextmanager
def fake_cuda(model: nn.Module) -> Iterator[None]:
    """Inside, every tensor is a fake one, and the weights of a model from the meta device become fake ones on CUDA.

    A fake tensor has all but its data: operations are dispatched as on CUDA, on a machine without it, and tensors of two
    devices do not mix. (Backward does not work so: autograd asks the driver.)
    """
    with FakeTensorMode():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
                        tensors[name] = nn.Parameter(fake, tensor.requires_grad) if tensors is module._parameters else fake
        yield


@contextmanager
def fake_autocast(precision: str) -> Iterator[None]:
    """autocast for CUDA, which torch.autocast refuses on a machine without it."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", precision == "bf16")
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


class ByteCounter(TorchDispatchMode):
    """Adds up the bytes that each operation reads and writes. Views move nothing; what is broadcast counts once."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "aten" and not function.is_view and not FREE.search(function.name()):
            self.bytes += sum(bytes_of(leaf) for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
        return out


class FusedAttention(TorchFunctionMode):
    """Attention as one kernel, which a fake tensor would not get on a machine without CUDA."""

    def __init__(self, counter: ByteCounter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v = args[:3]  # (B, heads, N, D / heads)
        self.counter.bytes += 2 * bytes_of(q) + bytes_of(k) + bytes_of(v)
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)  # as fused kernels lay it out
        return out.transpose(1, 2)


def bytes_of(tensor: Tensor) -> int:
    return tensor.element_size() * math.prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride)
