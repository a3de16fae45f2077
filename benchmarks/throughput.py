"""Compare training steps and forward passes: images/s, multiply-accumulates, share of the matmul rate, bytes, memory.

    python benchmarks/throughput.py --models DiT-XL/2 DiNext-XL/2 diffusers/DiT-XL/2 --precision bf16 --compile true \
        --batch-size 8 32 128

For each setting (what, precision, compile, batch size) all models are loaded at once and timed in turn. A round is one
call of each, so other load on the machine affects all alike. Figures are medians over --repeats rounds. So are the ratios
at the end; each compares two calls of one round, so they are more reliable than images/s. On CUDA a network with attention
has a row for each fast implementation of it, and ratios are to the first model's fastest row.

- train: forward, loss of `create_diffusion("")`, backward, fused AdamW. forward: under no_grad. Nothing else is timed:
  no data, clipping or EMA. forward in bf16 has weights that were cast once, as in sampling. All weights are drawn from
  N(0, 0.02): with zeros a GPU would stay cool and run faster.
- FLOP/s: 2 per multiply-accumulate of the forward pass; a training step counts as three forward passes.
- of matmul: the share of the FLOP/s of one large square matmul at the same precision, timed in the same rounds.
- MB moved: what the operations of an image's forward pass, run one by one on CUDA, read and write; attention and each other
  operation count as one kernel. Counted without running them, so a CPU tells it too.
- where: the shares of one profiled call's kernel time. "other": elementwise, reductions, copies, the optimizer.
- memory: the peak of the model's weights, AdamW and a step together, without the other models. CUDA only: CPU
  allocators keep no such figure. A setting too large for the GPU, beside the other models, is recorded as such.
- diffusers/NAME: diffusers' DiTTransformer2DModel with the sizes of preset NAME, as an independent reference. Each block
  embeds t and y again with its own weights (XL/2: 750 M parameters, not 675 M). It draws its label drop itself.
"""

import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jsonargparse import Namespace
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.instruments import KINDS, ByteCounter, FusedAttention, fake_autocast, fake_cuda, kernel_seconds
from diffusion import create_diffusion
from models import DiT_models
from runtime import UserError, cli
from runtime.files import check_writable, write_json
from runtime.processes import autocast, cast_weights, start_world, synchronize
from small_models import DIFFUSION_NETWORKS

REFERENCE = "diffusers/"
MATMUL_SIZE = {"cuda": 8192, "mps": 4096, "cpu": 1024}  # large enough for the full rate
ATTENTION = {"cuda": {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}}  # rows of a device
WARM_UP = 3  # calls of each candidate before the rounds; the first ones compile


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Measure the speed and memory of models, side by side.")
    references = [f"{REFERENCE}{name}" for name in DiT_models if name.startswith("DiT-")]
    parser.add_argument("--models", nargs="+", required=True, choices=[*DIFFUSION_NETWORKS, *references],
                        help="names of presets, diffusers/NAME for the reference; ratios are to the first one")
    parser.add_argument("--what", nargs="+", default=["train", "forward"], choices=["train", "forward"])
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"], help="as of train.py")
    parser.add_argument("--compile", type=bool, nargs="+", default=[False], help="false, true, or both")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--image-size", type=int, default=256, help="of 8 x 8 pixels a latent position")
    parser.add_argument("--repeats", type=int, default=20, help="rounds")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: cuda where there is one, else cpu")
    parser.add_argument("--out", type=str | None, help="JSON file for the figures")
    return parser


# --- the timed calls -----------------------------------------------------------------------------


class Setting(NamedTuple):
    """The settings that all candidates of a round share."""

    what: str  # "train" or "forward"
    precision: str
    compile: bool
    batch_size: int

    def __str__(self) -> str:
        return f"{self.what} {self.precision} {'compiled' if self.compile else 'eager'} batch {self.batch_size}"


class DiffusersDiT(nn.Module):
    """diffusers' DiT with a preset's sizes and our models' interface."""

    def __init__(self, name: str, input_size: int):
        from diffusers import DiTTransformer2DModel

        super().__init__()
        preset = DiT_models[name].keywords
        self.transformer = DiTTransformer2DModel(
            num_attention_heads=preset["num_heads"], attention_head_dim=preset["hidden_size"] // preset["num_heads"],
            num_layers=preset["depth"], patch_size=preset["patch_size"], sample_size=input_size,
            in_channels=4, out_channels=8, num_embeds_ada_norm=1000)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.transformer(x, t, y, return_dict=False)[0]


def build(name: str, input_size: int, **changes) -> nn.Module:
    if name.startswith(REFERENCE):
        return DiffusersDiT(name.removeprefix(REFERENCE), input_size)
    return DIFFUSION_NETWORKS[name](input_size=input_size, in_channels=4, num_classes=1000, learn_sigma=True, **changes)


def count_macs(name: str, input_size: int) -> int:
    """Multiply-accumulates of one image's forward pass, counted without running it."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(name, input_size)(torch.empty(1, 4, input_size, input_size), torch.empty(1), torch.empty(1, dtype=torch.long))
    return counter.get_total_flops() // 2


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

    def with_attention() -> None:
        with sdpa_kernel(ATTENTION[device.type][attention]):
            call()

    return with_attention if attention else call


def make_matmul(precision: str, device: torch.device) -> Callable[[], None]:
    matrix = torch.randn(2 * [MATMUL_SIZE[device.type]], device=device)
    return partial(torch.mm, *2 * [matrix.bfloat16() if precision == "bf16" else matrix])


def count_bytes(name: str, precision: str, batch_size: int, input_size: int, **changes) -> float:
    """Bytes that an image's eager forward pass on CUDA reads and writes, counted without running it."""
    with torch.device("meta"):
        model = build(name, input_size, **changes).eval()
    cast_weights(model, precision)
    with fake_cuda(model), torch.no_grad(), fake_autocast(precision):
        with torch.device("cuda"):
            x, t, y = torch.empty(batch_size, 4, input_size, input_size), torch.empty(batch_size), torch.zeros(batch_size)
        with ByteCounter() as counter, FusedAttention(counter):
            model(x, t, y.long())
    return counter.bytes / batch_size


# --- the rounds ----------------------------------------------------------------------------------


@dataclass
class Candidate:
    """One function of a round, the time of each call, and its memory. `call` is None if it was out of memory."""

    device: torch.device
    call: Callable[[], None] | None = None
    memory: int | None = None
    seconds: list[float] = field(default_factory=list)
    where: dict[str, float] = field(default_factory=dict)  # seconds of kernels by KINDS, in one call

    def prepare(self, make: Callable[[], Callable[[], None]]) -> None:
        """Make the call and warm it up. The memory is the last call's peak above the memory used before."""
        cuda = self.device.type == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        self.call = make()
        for _ in range(WARM_UP):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            self.call()
        self.memory = torch.cuda.max_memory_allocated() - before if cuda else None

    def time(self) -> None:
        synchronize(self.device)
        start = time.perf_counter()
        self.call()
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - start)

    def profile(self) -> None:
        self.where = kernel_seconds(self.call, self.device)

    def attempt(self, function: Callable[[], None]) -> None:
        """Call one of the methods above. If it is out of memory, give up the candidate and free its memory."""
        try:
            function()
        except torch.cuda.OutOfMemoryError:
            self.call = None
        if self.call is None:
            free(self.device)  # not above: a live exception keeps its functions' memory


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(setting: Setting, args, macs: dict[str, int], device: torch.device) -> list[dict]:
    """The figures of all models at one setting."""
    torch.compiler.reset()  # otherwise a new batch size compiles code for all sizes
    free(device)
    input_size = args.image_size // 8
    rows = [(name, attention) for name in macs
            for attention in (ATTENTION.get(device.type) if has_attention(name) else None) or [None]]
    matmul, models = Candidate(device), {row: Candidate(device) for row in rows}
    matmul.prepare(partial(make_matmul, setting.precision, device))
    for (name, attention), candidate in models.items():
        make = partial(make_call, name, setting, input_size, device, attention)
        candidate.attempt(partial(candidate.prepare, make))
    for _ in tqdm(range(args.repeats), f"{setting}", leave=False):
        for candidate in (matmul, *models.values()):
            if candidate.call:
                candidate.attempt(candidate.time)
    for candidate in models.values():
        if candidate.call:
            candidate.attempt(candidate.profile)
    matmul_rate = 2 * MATMUL_SIZE[device.type] ** 3 / statistics.median(matmul.seconds)
    moved = {name: count_bytes(name, setting.precision, setting.batch_size, input_size) for name in macs}
    bases = [candidate for (name, _), candidate in models.items() if name == rows[0][0]]
    first = min(bases, key=lambda base: statistics.median(base.seconds) if base.call else math.inf)
    return [{"model": name, "attention": attention, **setting._asdict(), "gmacs": macs[name] / 1e9,
             "bytes_moved": moved[name],
             "matmul_flops_per_second": matmul_rate, **figures(candidate, first, setting, macs[name], matmul_rate)}
            for (name, attention), candidate in models.items()]


def figures(candidate: Candidate, first: Candidate, setting: Setting, macs: int, matmul_rate: float) -> dict:
    """The reported figures of one candidate. "ratio" is its images/s divided by those of `first`."""
    if candidate.call is None:
        return {"out_of_memory": True, "ratio": None}
    pairs = zip(first.seconds, candidate.seconds)
    images_per_second = [setting.batch_size / seconds for seconds in candidate.seconds]
    median = statistics.median(images_per_second)
    flops = median * 2 * macs * (3 if setting.what == "train" else 1)
    return {"out_of_memory": False, "images_per_second": median, "images_per_second_min": min(images_per_second),
            "images_per_second_max": max(images_per_second), "seconds": candidate.seconds, "flops_per_second": flops,
            "of_matmul": flops / matmul_rate, "peak_memory_bytes": candidate.memory, "kernel_seconds": candidate.where,
            "ratio": statistics.median(theirs / own for theirs, own in pairs) if first.call else None}


# --- the report ----------------------------------------------------------------------------------


def name_of(result: dict) -> str:
    return " ".join(filter(None, [result["model"], result["attention"]]))


def line(result: dict) -> str:
    if result["out_of_memory"]:
        return f"  {name_of(result):24} out of memory"
    memory = result["peak_memory_bytes"]
    spread = f"({result['images_per_second_min']:.2f} to {result['images_per_second_max']:.2f})"
    where, kernels = result["kernel_seconds"], sum(result["kernel_seconds"].values()) or 1
    return (f"  {name_of(result):24} {result['images_per_second']:9.2f} images/s {spread:20} "
            f"{result['gmacs']:6.1f} GMAC  {result['flops_per_second'] / 1e12:8.3f} TFLOP/s  "
            f"{result['of_matmul']:4.0%} of matmul  {result['bytes_moved'] / 1e6:8.1f} MB moved  "
            f"{'-' if memory is None else f'{memory / 2**30:.2f} GiB'}  "
            f"{', '.join(f'{kind} {where[kind] / kernels:.0%}' for kind in KINDS if kind in where)}")


def ratios(results: list[dict]) -> str:
    return ", ".join(f"{name_of(result)} {'-' if result['ratio'] is None else format(result['ratio'], '.2f')}"
                     for result in results)


def main(args: Namespace) -> None:
    cli.check_numbers(args, ["image_size", "repeats"], "at least 1", lambda n: n >= 1)
    if min(args.batch_size) < 1 or args.image_size % 8:
        raise UserError(f"--batch-size {args.batch_size} must be positive, --image-size {args.image_size} a multiple of 8")
    if args.out:
        check_writable(Path(args.out).parent)
    device = start_world(args.device).device
    with cli.prefix_errors("--image-size:", *cli.WRONG_VALUE):
        macs = {name: count_macs(name, args.image_size // 8) for name in args.models}
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}")

    settings = [Setting(*values) for values in itertools.product(args.what, args.precision, args.compile, args.batch_size)]
    results = {}
    for setting in settings:
        results[setting] = measure(setting, args, macs, device)
        print(f"{setting}, matmul {results[setting][0]['matmul_flops_per_second'] / 1e12:.3f} TFLOP/s", flush=True)
        print("\n".join(map(line, results[setting])), flush=True)
    if args.out:
        report = {"device": machine, "torch": torch.__version__, "date": f"{date.today()}",
                  "settings": {name: value for name, value in args.as_dict().items() if name != "config"},
                  "results": list(itertools.chain(*results.values()))}
        write_json(Path(args.out), report)
    print(f"images/s over {args.models[0]}'s:")
    for setting in settings:
        print(f"  {setting}: {ratios(results[setting])}")


if __name__ == "__main__":
    cli.run(main, build_parser())
