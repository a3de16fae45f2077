"""Compare training steps and forward passes: images/s, multiply-accumulates, share of the matmul rate, bytes, memory.

    python benchmarks/throughput.py --models DiT-XL/2 DiNext-XL/2 diffusers/DiT-XL/2 --precision bf16 --compile true \
        --batch-size 8 32 128

For each setting (what, precision, compile, batch size) all models are loaded at once and timed in turn. A round is one
call of each, so other load on the machine affects all alike. Figures are medians over --repeats rounds. The ratios at the
end are medians too; each compares two calls of one round, so they are more reliable than images/s. On CUDA a network with
attention has a row for each fast implementation of it, and ratios are to the first model's fastest row.

- train: forward, loss of `create_diffusion("")`, backward, fused AdamW. forward: under no_grad. Nothing else is timed:
  no data, clipping or EMA. forward in bf16 has weights that were cast once, as in sampling. All weights are drawn from
  N(0, 0.02): with zeros a GPU would stay cool and run faster.
- FLOP/s: 2 per multiply-accumulate of the forward pass; a training step counts as three forward passes.
- of matmul: the share of the FLOP/s of one large square matmul at the same precision, timed in the same rounds.
- MB moved: what the operations of an image's eager forward pass read and write on CUDA; attention and each other operation
  count as one kernel. Counted without running them, so on a CPU too.
- where: the shares of one profiled call's kernel time. "other": elementwise, reductions, copies, the optimizer.
- memory: the peak of the model's weights, AdamW and a step together, without the other models. CUDA only: CPU
  allocators do not report it. A setting too large for the GPU, beside the other models, is recorded as out of memory.
- diffusers/NAME: diffusers' DiTTransformer2DModel with the sizes of preset NAME, as an independent reference. Each block
  embeds t and y again with its own weights (XL/2: 750 M parameters, not 675 M). It draws its label drop itself.
"""

import gc
import itertools
import statistics
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jsonargparse import Namespace
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import instruments
from benchmarks.instruments import KINDS, attempt, kernel_seconds, median_ratio, time_in_turn
from diffusion import create_diffusion
from models import DiT_models
from runtime import UserError, cli
from runtime.files import write_json
from runtime.processes import autocast, cast_weights, start_world
from small_models import DIFFUSION_NETWORKS

REFERENCE = "diffusers/"
MATMUL_SIZE = {"cuda": 8192, "mps": 4096, "cpu": 1024}  # large enough for the full rate
ATTENTION = {"cuda": {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}}  # rows of a device


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Measure the speed and memory of models, side by side.")
    references = [f"{REFERENCE}{name}" for name in DiT_models if name.startswith("DiT-")]
    parser.add_argument("--models", nargs="+", required=True, choices=[*DIFFUSION_NETWORKS, *references],
                        help="names of presets, diffusers/NAME for the reference; ratios are to the first model")
    parser.add_argument("--what", nargs="+", default=["train", "forward"], choices=["train", "forward"])
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"], help="as of train.py")
    parser.add_argument("--compile", type=bool, nargs="+", default=[False], help="false, true, or both")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--image-size", type=int, default=256, help="8 x 8 pixels are one latent position")
    parser.add_argument("--repeats", type=int, default=20, help="rounds")
    parser.add_device_argument()
    parser.add_argument("--out", type=str | None, help="JSON file for the figures")
    return parser


# --- the timed calls -----------------------------------------------------------------------------


class Setting(NamedTuple):
    """The settings that all models of a round share."""

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

    def with_attention() -> None:
        with sdpa_kernel(ATTENTION[device.type][attention]):
            call()

    return with_attention if attention else call


def make_matmul(precision: str, device: torch.device) -> Callable[[], Tensor]:
    matrix = torch.randn(2 * [MATMUL_SIZE[device.type]], device=device)
    return partial(torch.mm, *2 * [matrix.bfloat16() if precision == "bf16" else matrix])


def count_bytes(name: str, precision: str, batch_size: int, input_size: int, **changes) -> float:
    """Bytes that an image's eager forward pass on CUDA reads and writes, counted without running it."""
    with torch.device("meta"):
        model = build(name, input_size, **changes).eval()
    cast_weights(model, precision)
    with instruments.fake_cuda(model), torch.no_grad(), instruments.fake_autocast(precision):
        with torch.device("cuda"):
            x, t, y = torch.empty(batch_size, 4, input_size, input_size), torch.empty(batch_size), torch.zeros(batch_size)
        with instruments.ByteCounter() as counter, instruments.FusedAttention(counter):
            model(x, t, y.long())
    return counter.bytes / batch_size


# --- the rounds ----------------------------------------------------------------------------------


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


def measure(setting: Setting, args, macs: dict[str, int], device: torch.device) -> list[dict]:
    """The figures of all models at one setting."""
    torch.compiler.reset()  # otherwise a new batch size compiles code for all sizes
    gc.collect()
    torch.cuda.empty_cache()
    input_size = args.image_size // 8
    makes = {(name, attention): partial(make_call, name, setting, input_size, device, attention) for name in macs
             for attention in (ATTENTION.get(device.type) if has_attention(name) else None) or [None]}
    prepared = {key: attempt(partial(prepare, make, device)) for key, make in makes.items()}
    calls = {"matmul": make_matmul(setting.precision, device)} | {key: made[0] for key, made in prepared.items() if made}
    laps = time_in_turn(calls, args.repeats, device, f"{setting}")
    matmul_rate = 2 * MATMUL_SIZE[device.type] ** 3 / statistics.median(laps["matmul"])
    base = min((laps[key] for key in makes if key[0] == args.models[0] and laps.get(key)), key=statistics.median, default=None)
    results = []
    for (name, attention), made in prepared.items():
        seconds = laps.get((name, attention))
        results.append({"model": name, "attention": attention, **setting._asdict(), "gmacs": macs[name] / 1e9,
                        "bytes_moved": count_bytes(name, setting.precision, setting.batch_size, input_size),
                        "matmul_flops_per_second": matmul_rate, "out_of_memory": seconds is None, "ratio": None})
        if seconds:
            results[-1] |= speed(seconds, base, setting, macs[name], matmul_rate)
            results[-1] |= {"peak_memory_bytes": made[1], "kernel_seconds": kernel_seconds(made[0], device)}
    return results


def speed(seconds: list[float], base: list[float] | None, setting: Setting, macs: int, matmul_rate: float) -> dict:
    """The figures of the seconds of a model. "ratio" is its images/s over those of `base`."""
    images_per_second = setting.batch_size / statistics.median(seconds)
    flops = images_per_second * 2 * macs * (3 if setting.what == "train" else 1)
    return {"images_per_second": images_per_second, "seconds": seconds, "flops_per_second": flops,
            "of_matmul": flops / matmul_rate, "ratio": base and median_ratio(base, seconds)}


# --- the report ----------------------------------------------------------------------------------


def title_of(result: dict) -> str:
    return " ".join(filter(None, [result["model"], result["attention"]]))


def line(result: dict) -> str:
    if result["out_of_memory"]:
        return f"  {title_of(result):24} out of memory"
    memory, kernels, size = result["peak_memory_bytes"], result["kernel_seconds"], result["batch_size"]
    spread = f"({size / max(result['seconds']):.2f} to {size / min(result['seconds']):.2f})"
    return (f"  {title_of(result):24} {result['images_per_second']:9.2f} images/s {spread:20} "
            f"{result['gmacs']:6.1f} GMAC  {result['flops_per_second'] / 1e12:8.3f} TFLOP/s  "
            f"{result['of_matmul']:4.0%} of matmul  {result['bytes_moved'] / 1e6:8.1f} MB moved  "
            f"{'-' if memory is None else f'{memory / 2**30:.2f} GiB'}  "
            f"{', '.join(f'{kind} {kernels[kind] / sum(kernels.values()):.0%}' for kind in KINDS if kind in kernels)}")


def main(args: Namespace) -> None:
    cli.check_numbers(args, ["image_size", "repeats"], "at least 1", lambda n: n >= 1)
    if min(args.batch_size) < 1 or args.image_size % 8:
        raise UserError(f"--batch-size {args.batch_size} must be positive, --image-size {args.image_size} a multiple of 8")
    cli.check_output_flag(args, "out", ".json")
    device = start_world(args.device).device
    with cli.prefix_errors("--image-size:", *cli.WRONG_VALUE):
        macs = {name: count_macs(name, args.image_size // 8) for name in args.models}
    machine = f"{instruments.name_of(device)}, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}")
    results = {}
    for values in itertools.product(args.what, args.precision, args.compile, args.batch_size):
        setting = Setting(*values)
        results[setting] = measure(setting, args, macs, device)
        print(f"{setting}, matmul {results[setting][0]['matmul_flops_per_second'] / 1e12:.3f} TFLOP/s", flush=True)
        print("\n".join(map(line, results[setting])), flush=True)
    if args.out:
        write_json(Path(args.out), {
            "device": machine, "torch": torch.__version__, "date": f"{date.today()}",
            "settings": {name: value for name, value in args.as_dict().items() if name != "config"},
            "results": list(itertools.chain(*results.values()))})
    print(f"images/s over {args.models[0]}'s:")
    for setting, rows in results.items():
        ratios = [f"{title_of(row)} {'-' if row['ratio'] is None else format(row['ratio'], '.2f')}" for row in rows]
        print(f"  {setting}: {', '.join(ratios)}")


if __name__ == "__main__":
    cli.run(main, build_parser())
