"""Compare training steps and forward passes: images/s, multiply-accumulates, share of the matmul rate, memory.

    python benchmarks/throughput.py --models DiT-XL/2 DiNext-XL/2 --precision bf16 --compile true --batch-size 8 32 128

For each setting (what, precision, compile, batch size) all models are loaded at once and timed in turn. A round is one
call of each, so other load on the machine affects all alike. Figures are medians over --repeats rounds. On CUDA a network
with attention has a row for each fast implementation of it.

- ratio: to the images/s of the first model's fastest row. It is a median of ratios within a round, so it is more reliable than
  images/s.
- train: forward, loss of `create_diffusion("")`, backward, fused AdamW. forward: under no_grad. Nothing else is timed:
  no data, clipping or EMA. forward in bf16 has weights that were cast once, as in sampling. All weights are drawn from
  N(0, 0.02): with zeros a GPU would stay cool and run faster.
- flops: 2 per multiply-accumulate of the forward pass; a training step counts as three forward passes.
- of_matmul: the share of the FLOP/s of one large square matmul at the same precision, timed in the same rounds.
- …_share: of one profiled call's kernel time. "other": elementwise, reductions, copies, the optimizer. kernels_run is that
  time over the median time of a call.
- peak_memory_bytes: of the model's weights, AdamW and a step together, without the other models. CUDA only.

`--what memory` runs nothing. It counts the bytes of a training step on one GPU, from shapes, in seconds and on any machine:

- state_bytes: 16 a parameter: fp32 weights, EMA and AdamW's two moments. gradient_bytes: 4 a parameter.
- activation_bytes: what an eager forward pass saves for the backward pass, with one of the fast kernels of attention. Each
  storage counts once. Parameters are left out; the bf16 copies of weights that autocast makes are in it.
- checkpointed_bytes: the same with gradient checkpointing, and the block that the backward pass recomputes: the largest one.

Not in it: gradients of activations and other short-lived tensors, workspaces of kernels, buffers of messages, fragmentation.
"""

import contextlib
import gc
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from jsonargparse import Namespace
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import instruments
from benchmarks.instruments import describe, kernel_seconds, median_ratio, time_in_turn
from diffusion import create_diffusion
from runtime import UserError, cli
from runtime.files import write_json
from runtime.processes import autocast, cast_weights, start_world
from small_models import DIFFUSION_NETWORKS

MATMUL_SIZE = {"cuda": 8192, "mps": 4096, "cpu": 1024}  # large enough for the full rate
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ATTENTION = {"cuda": {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}}  # rows of a device


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Measure the speed and memory of models, side by side.")
    parser.add_argument("--models", nargs="+", required=True, choices=list(DIFFUSION_NETWORKS),
                        help="names of presets; ratios are to the first")
    parser.add_argument("--what", nargs="+", default=["train", "forward"], choices=["train", "forward", "memory"])
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"], help="as of train.py")
    parser.add_argument("--compile", type=bool, nargs="+", default=[False], help="false, true, or both")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--image-size", type=int, default=256, help="8 x 8 pixels are one latent position")
    parser.add_argument("--repeats", type=int, default=20, help="rounds")
    parser.add_device_argument()
    parser.add_argument("--out", type=str | None, help="JSON file for the figures")
    return parser


class Setting(NamedTuple):
    """The settings that all models of a round share."""

    what: str  # "train", "forward" or "memory"
    precision: str
    compile: bool
    batch_size: int

    def __str__(self) -> str:
        return f"{self.what} {self.precision} {'compiled' if self.compile else 'eager'} batch {self.batch_size}"


def build(name: str, input_size: int) -> nn.Module:
    return DIFFUSION_NETWORKS[name](input_size=input_size, in_channels=4, num_classes=1000, learn_sigma=True)


@cache
def count_macs(name: str, input_size: int) -> int:
    return instruments.count_macs(partial(build, name, input_size), (4, input_size, input_size))


def has_attention(name: str) -> bool:
    with torch.device("meta"):
        return any("attention" in type(module).__name__.lower() for module in build(name, 32).modules())


def make_call(name: str, setting: Setting, input_size: int, device: torch.device,
              attention: str | None = None) -> Callable[[], None]:
    """One training step or forward pass of a new model, as a function without arguments."""
    with device:
        model = build(name, input_size).train(setting.what == "train")
        x, noise = torch.randn(2, setting.batch_size, 4, input_size, input_size)
        t, y = torch.randint(1000, (2, setting.batch_size))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.02)
    if setting.what == "forward":
        cast_weights(model, setting.precision)
    if setting.compile:
        model.compile()
    process, optimizer = create_diffusion(""), torch.optim.AdamW(parameters, 1e-4, fused=True)

    def train() -> None:
        with autocast(device, setting.precision):
            loss = process.training_losses(model, x, t, dict(y=y), noise)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward() -> None:
        with autocast(device, setting.precision):
            model(x, t.float(), y)

    call = train if setting.what == "train" else forward
    return sdpa_kernel(ATTENTION[device.type][attention])(call) if attention else call


def prepare(make: Callable[[], Callable], device: torch.device) -> tuple[Callable, int | None]:
    """A call that was compiled and warmed up, and its peak of memory above what was in use before."""
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    call = make()
    call()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    call()
    return call, torch.cuda.max_memory_allocated() - before if cuda else None


def measure(setting: Setting, models: list[str], input_size: int, repeats: int, device: torch.device) -> list[dict]:
    """The figures of all models at one setting."""
    torch.compiler.reset()  # otherwise a new batch size compiles code for all sizes
    gc.collect()
    torch.cuda.empty_cache()
    makes = {(name, attention): partial(make_call, name, setting, input_size, device, attention) for name in models
             for attention in (ATTENTION.get(device.type) if has_attention(name) else None) or [None]}
    prepared = {key: prepare(make, device) for key, make in makes.items()}
    matrix = torch.randn(2 * [MATMUL_SIZE[device.type]], device=device, dtype=DTYPES[setting.precision])
    calls = {"matmul": lambda: matrix @ matrix} | {key: call for key, (call, _) in prepared.items()}
    laps = time_in_turn(calls, repeats, device, f"{setting}")
    matmul_rate = 2 * MATMUL_SIZE[device.type] ** 3 / statistics.median(laps["matmul"])
    base = min((laps[key] for key in makes if key[0] == models[0]), key=statistics.median)
    return [{"model": name, "attention": attention, **setting._asdict(), "peak_memory_bytes": memory,
             **figures_of(setting, laps[name, attention], base, count_macs(name, input_size), matmul_rate),
             **where(call, laps[name, attention], device)}
            for (name, attention), (call, memory) in prepared.items()]


def figures_of(setting: Setting, seconds: list[float], base: list[float], macs: int, matmul_rate: float) -> dict:
    """The figures of the seconds of a call in each round. "ratio" is its images/s over those of `base`."""
    images_per_second = setting.batch_size / statistics.median(seconds)
    flops = images_per_second * 2 * macs * (3 if setting.what == "train" else 1)
    return {"images_per_second": images_per_second, "ratio": median_ratio(base, seconds), "seconds": seconds,
            "gmacs": macs / 1e9, "flops_per_second": flops, "matmul_flops_per_second": matmul_rate,
            "of_matmul": flops / matmul_rate}


def where(call: Callable, seconds: list[float], device: torch.device) -> dict:
    """Where the time of a call goes, by kinds of kernels."""
    kernels = kernel_seconds(call, device)
    total = sum(kernels.values())
    return {"kernel_seconds": kernels, "kernels_run": total / statistics.median(seconds),
            **{f"{kind}_share": kernels[kind] / total for kind in kernels}}


# --- memory, computed ------------------------------------------------------------------------------


class FastAttention(TorchFunctionMode):
    """Calls a fast kernel of attention, as PyTorch does where it sees a GPU. `dtype`: of its inputs, as under autocast."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        return torch.ops.aten._scaled_dot_product_flash_attention(*(tensor.to(self.dtype) for tensor in args))[0]


@contextlib.contextmanager
def fake_cuda(precision: str) -> Iterator[None]:
    """Tensors of "cuda" have shapes and no memory, on any machine. Operations choose their dtypes as on a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True), FastAttention(DTYPES[precision]):
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", precision == "bf16")  # torch.autocast itself refuses where there is no GPU
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()


def move_to_fake_cuda(model: nn.Module) -> list[torch.Tensor]:
    """Replace all parameters and buffers of a model, and return the new ones. (`Module.to` does not take fake tensors.)"""
    moved = []
    for module in model.modules():
        for name, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="cuda")
            moved.append(nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
            setattr(module, name, moved[-1])
    return moved


def count_saved(call: Callable[[], object], own: Iterable[torch.Tensor]) -> int:
    """The bytes that a call saves for its backward pass: each storage once, without those of the tensors in `own`."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    left_out = {tensor.untyped_storage()._cdata for tensor in own}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in left_out)


def count_memory(setting: Setting, name: str, input_size: int) -> dict:
    """The bytes of a training step of one model, from shapes. Without gradient checkpointing "checkpointed_bytes" is None."""
    with torch.device("meta"):
        model = build(name, input_size)
    process, batch, calls = create_diffusion(""), setting.batch_size, {}
    with fake_cuda(setting.precision):
        own = move_to_fake_cuda(model)
        x, noise = torch.randn(2, batch, 4, input_size, input_size, device="cuda")
        t, y = torch.randint(1000, (2, batch), device="cuda")
        forward = partial(process.training_losses, model, x, t, dict(y=y), noise)
        hooks = [block.register_forward_pre_hook(calls.__setitem__) for block in getattr(model, "blocks", [])]
        plain, checkpointed = count_saved(forward, own), None
        for hook in hooks:
            hook.remove()
        if hasattr(model, "gradient_checkpointing"):
            model.gradient_checkpointing = True
            largest = max(count_saved(partial(block, *args), [*own, *args]) for block, args in calls.items())
            checkpointed = count_saved(forward, own) + largest
    trained = sum(tensor.numel() for tensor in own if tensor.requires_grad)
    return {"model": name, "attention": "flash" if has_attention(name) else None, **setting._asdict(), "parameters": trained,
            "gmacs": count_macs(name, input_size) / 1e9, "state_bytes": 16 * trained, "gradient_bytes": 4 * trained,
            "activation_bytes": plain, "checkpointed_bytes": checkpointed}


def title_of(result: dict) -> str:
    return " ".join(filter(None, [result["model"], result["attention"]]))


def main(args: Namespace) -> None:
    cli.check_numbers(args, ["image_size", "repeats"], "at least 1", lambda n: n >= 1)
    if min(args.batch_size) < 1 or args.image_size % 8:
        raise UserError(f"--batch-size {args.batch_size} must be positive, --image-size {args.image_size} a multiple of 8")
    if "memory" in args.what and True in args.compile:
        raise UserError("--what memory counts the eager network: --compile must be false")
    cli.check_output_flag(args, "out", ".json")
    device = start_world(args.device).device
    with cli.prefix_errors("--image-size:", *cli.WRONG_VALUE):
        for name in args.models:
            count_macs(name, args.image_size // 8)
    machine = f"{instruments.name_of(device)}, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}")
    report = {"device": machine, "torch": torch.__version__, "date": f"{date.today()}",
              "settings": {name: value for name, value in args.as_dict().items() if name != "config"}, "results": []}
    for setting in itertools.starmap(Setting, itertools.product(args.what, args.precision, args.compile, args.batch_size)):
        if setting.what == "memory":
            rows = [count_memory(setting, name, args.image_size // 8) for name in args.models]
            print(f"{setting}, counted for a GPU, not run")
        else:
            rows = measure(setting, args.models, args.image_size // 8, args.repeats, device)
            print(f"{setting}, matmul {rows[0]['matmul_flops_per_second'] / 1e12:.3f} TFLOP/s")
        print(*(f"  {title_of(row)}: {describe(row)}" for row in rows), sep="\n", flush=True)
        report["results"] += rows
        if args.out:  # now: a larger batch may be too large for the GPU
            write_json(Path(args.out), report)


if __name__ == "__main__":
    cli.run(main, build_parser())
