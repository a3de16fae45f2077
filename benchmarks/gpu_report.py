"""Measure all that a GPU decides, in one command: ceilings, networks, sampling, sizes, waiting.

    python benchmarks/gpu_report.py --out benchmarks/results/h200.json
    python benchmarks/gpu_report.py --stages ceilings networks --out …      # the same command continues where it was stopped
    python benchmarks/gpu_report.py --toy --out toy.json                    # all stages with tiny sizes, on a CPU

Stages, the most useful first:

- ceilings: a large matmul, a large copy, and the depthwise 7x7 convolution of DiNext: forward, dgrad (to the input) and
  wgrad (to the kernel), by dtype, backend and memory format, with the errors against float64.
- networks: throughput.py of DiT-XL/2, DiNext-XL/2 and DiNext-U-XL, compiled, bf16; the share of the time in which kernels run.
- sampling: seconds an image from random XL weights, without decoding: DDPM-250, dpm++ 20, interval, both kinds of reuse.
- sizes: throughput.py of the other sizes, batches, eager, and diffusers' DiT if it is installed.
- waiting: how long sample_ddp.py's device waits between batches, and train.py on cached features for data.

Each figure is written to the JSON at once; figures that it holds are not measured again. OUT.md is the same as tables.
"""

import gc
import importlib.util
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jsonargparse import Namespace
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.instruments import kernel_seconds, name_of, open_report, time_call
from pipeline.autoencoders import Pixels
from pipeline.generation import Sampling, generate, prepare_network
from pipeline.spec import BareWeights
from runtime import cli
from runtime.files import write_json, write_text
from runtime.processes import start_world

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, float | str]
Item = tuple[str, Callable[[], dict[str, Row]]]  # a name, and what measures its rows: name -> figures


class Scale(NamedTuple):
    """The sizes of what is measured."""

    matmul: int = 8192
    copied: int = 2**30                   # bytes
    depthwise: tuple = ((64, 1152, 16), (64, 512, 32), (64, 1024, 16), (64, 2048, 8), (64, 384, 16))  # B, D, H = W
    networks: tuple = ("DiT-XL/2", "DiNext-XL/2", "DiNext-U-XL")
    others: tuple = tuple((f"DiT-{size}/2", f"DiNext-{size}/2", f"DiNext-U-{size}") for size in "BSL")
    reference: str = "diffusers/DiT-XL/2"
    image_size: int = 256
    batch: int = 64
    batches: tuple = (8, 64)              # of sampling
    steps: tuple = (250, 20)              # of ddpm and of dpm++
    repeats: int = 20
    compile: bool = True
    precision: str = "bf16"
    waiting: tuple = ("DiT-XL/2", "DiNext-S/2")
    drawn: int = 1024
    trained: int = 60                     # steps


TOY = Scale(matmul=64, copied=2**12, depthwise=((2, 8, 6),), networks=("DiT-S/8", "DiNext-S/8"), others=(("DiNext-U-S",),),
            reference="diffusers/DiT-S/8", image_size=64, batch=1, batches=(2,), steps=(3, 2), repeats=1, compile=False,
            precision="fp32", waiting=("DiNext-S/8",), drawn=6, trained=2)


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Measure all that a GPU decides, into one JSON and one table.")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES), help="default: all, in this order")
    parser.add_argument("--out", required=True, help="JSON file for the figures; OUT.md is the table")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to try the report itself on a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one, else cpu")
    return parser


# --- ceilings --------------------------------------------------------------------------------------


def ceilings(scale: Scale, device: torch.device) -> Iterator[Item]:
    for precision in ("bf16", "tf32"):
        yield f"matmul {precision} {scale.matmul}", partial(time_matmul, scale, precision, device)
    yield f"copy {scale.copied / 2**20:g} MiB", partial(time_copy, scale, device)
    for batch, width, size in scale.depthwise:
        yield f"depthwise 7x7 B {batch} D {width} {size}x{size}", partial(time_depthwise, scale, batch, width, size, device)


def seconds_of(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The median time of a call. Ten calls are timed together: one may be shorter than its launch. The first ten warm up."""
    def ten_calls() -> None:
        for _ in range(10):
            call()

    return statistics.median([time_call(ten_calls, device) / 10 for _ in range(1 + repeats)][1:])


def time_matmul(scale: Scale, precision: str, device: torch.device) -> dict[str, Row]:
    matrix = torch.randn(scale.matmul, scale.matmul, device=device, dtype=torch.bfloat16 if precision == "bf16" else None)
    seconds = seconds_of(lambda: matrix @ matrix, scale.repeats, device)
    return {"torch.mm": {"tflops": 2 * scale.matmul**3 / seconds / 1e12}}


def time_copy(scale: Scale, device: torch.device) -> dict[str, Row]:
    source = torch.ones(scale.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), scale.repeats, device)
    return {"copy_": {"terabytes_per_second": 2 * scale.copied / seconds / 1e12}}


def time_depthwise(scale: Scale, batch: int, width: int, size: int, device: torch.device) -> dict[str, Row]:
    x, g = torch.randn(2, batch, size, size, width, device=device).permute(0, 1, 4, 2, 3)
    w = torch.randn(width, 1, 7, 7, device=device) / 7
    rows = {}
    for dtype in (torch.bfloat16, torch.float32):
        for name, cudnn, benchmark in (("cudnn", True, False), ("cudnn benchmark", True, True), ("native", False, False)):
            for layout, form in (("NHWC", torch.channels_last), ("NCHW", torch.contiguous_format)):
                tensors = [tensor.to(dtype).contiguous(memory_format=form) for tensor in (x, w, g)]
                with torch.backends.cudnn.flags(enabled=cudnn, benchmark=benchmark):
                    rows[f"{str(dtype)[6:]} {name} {layout}"] = depthwise_row(*tensors, scale.repeats, device)
    return rows


def depthwise_row(x, w, g, repeats: int, device: torch.device) -> Row:
    """Milliseconds and relative errors of the three passes."""
    width = w.shape[0]

    def backward(g, x, w, wanted: list[bool]):
        return torch.ops.aten.convolution_backward(g, x, w, None, [1, 1], [3, 3], [1, 1], False, [0, 0], width, wanted)

    passes = {"forward": lambda x, w, g: F.conv2d(x, w, padding=3, groups=width),
              "dgrad": lambda x, w, g: backward(g, x, w, [True, False, False])[0],
              "wgrad": lambda x, w, g: backward(g, x, w, [False, True, False])[1]}
    exact = [tensor.double() for tensor in (x, w, g)]
    row = {}
    for name, run in passes.items():
        row[f"{name}_ms"] = 1000 * seconds_of(partial(run, x, w, g), repeats, device)
        found, expected = run(x, w, g).double(), run(*exact)
        row[f"{name}_error"] = ((found - expected).norm() / expected.norm()).item()
    return {"three_passes_ms": sum(row[f"{name}_ms"] for name in passes)} | row


# --- networks and sizes: throughput.py -------------------------------------------------------------


def networks(scale: Scale, device: torch.device) -> Iterator[Item]:
    for what in ("train", "forward"):
        yield f"{what} batch {scale.batch}", partial(throughput, scale, device, scale.networks, what)


def sizes(scale: Scale, device: torch.device) -> Iterator[Item]:
    for what, models in itertools.product(("train", "forward"), scale.others):
        yield f"{what} batch {scale.batch}, {' '.join(models)}", partial(throughput, scale, device, models, what)
    for batch in scale.batches:
        eager = scale._replace(batch=batch, compile=False)
        yield f"forward batch {batch} eager", partial(throughput, eager, device, scale.networks, "forward")
    if importlib.util.find_spec("diffusers"):
        pair = (scale.reference.removeprefix("diffusers/"), scale.reference)
        yield f"train {scale.reference}", partial(throughput, scale, device, pair, "train")


def throughput(scale: Scale, device: torch.device, models: tuple[str, ...], what: str) -> dict[str, Row]:
    """The figures of throughput.py, by model and attention."""
    with tempfile.TemporaryDirectory() as folder:
        start("benchmarks/throughput.py", "--models", *models, "--what", what, "--batch-size", scale.batch, "--compile",
              scale.compile, "--precision", scale.precision, "--image-size", scale.image_size, "--repeats", scale.repeats,
              "--device", device.type, "--out", "figures.json", cwd=folder)
        results = json.loads((Path(folder) / "figures.json").read_text())["results"]
    return {" ".join(filter(None, [r["model"], r["attention"]])): throughput_row(r) for r in results}


def throughput_row(result: dict) -> Row:
    if result["out_of_memory"]:
        return {"failed": "out of memory"}
    kernels = result["kernel_seconds"]
    total = sum(kernels.values())
    return {"images_per_second": result["images_per_second"], "ratio": result["ratio"], "of_matmul": result["of_matmul"],
            "gib": (result["peak_memory_bytes"] or 0) / 2**30, "mb_moved_eager": result["bytes_moved"] / 1e6,
            "kernels_run": total / statistics.median(result["seconds"]), **{kind: kernels[kind] / total for kind in kernels}}


def start(script: str, *flags: object, cwd: str | Path) -> str:
    """Run a script of this repository; its output. Raises RuntimeError with the end of what it wrote, if it fails."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], cwd=cwd, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{script} ended with code {done.returncode}: {done.stderr[-1000:]}")
    return done.stdout


# --- sampling --------------------------------------------------------------------------------------


def sampling(scale: Scale, device: torch.device) -> Iterator[Item]:
    for name in scale.networks:
        for batch in scale.batches:
            yield f"{name} batch {batch}", partial(time_sampling, scale, name, batch, device)


def time_sampling(scale: Scale, name: str, batch: int, device: torch.device) -> dict[str, Row]:
    """Seconds an image, guided, from random weights. The first call of each row compiles; the second is timed."""
    torch.compiler.reset()
    spec = BareWeights(name, scale.image_size).spec({})
    with device:
        model = spec.model.build().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    prepare_network(model, scale.precision, scale.compile)
    ddpm, fast = (dict(sampler=sampler, num_sampling_steps=str(steps), cfg_scale=1.5, precision=scale.precision)
                  for sampler, steps in zip(("ddpm", "dpm++"), scale.steps))
    rows = {"ddpm": ddpm, "ddpm encoder": ddpm | dict(reuse="encoder"), "dpm++": fast,
            "dpm++ interval": fast | dict(guidance_interval=(100.0, 600.0)),
            "dpm++ encoder": fast | dict(reuse="encoder", key_steps="every:2"),
            "dpm++ forecast": fast | dict(reuse="forecast", key_steps="every:2")}
    labels, indices = [i % model.num_classes for i in range(batch)], range(batch)
    for row, settings in rows.items():
        chosen = Sampling.of(spec, settings, model)
        draw = partial(generate, model, Pixels(), labels, indices, 0, chosen)
        draw()
        seconds = time_call(draw, device)
        rows[row] = {"seconds_per_image": seconds / batch, "model_calls": chosen.model_calls,
                     "block_calls": chosen.block_calls(model),
                     "kernels_run": sum(kernel_seconds(draw, device).values()) / seconds}
    return rows


# --- waiting ---------------------------------------------------------------------------------------


def waiting(scale: Scale, device: torch.device) -> Iterator[Item]:
    for name in scale.waiting:
        yield f"{name} on cached features", partial(time_waiting, scale, name, device)


def time_waiting(scale: Scale, name: str, device: torch.device) -> dict[str, Row]:
    """A run on features of digits, from an autoencoder (factor 4) trained for one step; then images from its checkpoint."""
    digits = ["--data-path", "digits", "--image-size", scale.image_size // 2, "--device", device.type]
    with tempfile.TemporaryDirectory() as folder:
        start("train.py", *digits, "--model", "Autoencoder-F4C8", "--model-args", '{"hidden_size": 8}', "--max-steps", 1,
              "--global-batch-size", 8, "--preview-every", 0, "--run-name", "ae", cwd=folder)
        start("extract_features.py", *digits, "--vae", "results/ae", "--features-path", "features", cwd=folder)
        common = ["--device", device.type, "--precision", scale.precision]
        start("train.py", "--data-path", "features", "--model", name, "--max-steps", scale.trained, "--global-batch-size",
              scale.batch, "--log-every", max(1, scale.trained // 3), "--preview-every", 0,
              *(["--compile"] if scale.compile else []), "--run-name", "run", *common, cwd=folder)
        output = start("sample_ddp.py", "--ckpt", "results/run", "--num-fid-samples", scale.drawn, "--num-sampling-steps",
                       scale.steps[1], "--sampler", "dpm++", "--per-proc-batch-size", max(1, scale.drawn // 4), *common,
                       cwd=folder)
        lines = [json.loads(line) for line in (Path(folder) / "results/run/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "data_wait_share" in line][-1]
    speed, waited = re.search(r"\((\S+) images/s\); between batches the device waited (\S+)% of the time", output).groups()
    return {"train.py": {"images_per_second": last["images_per_second"], "data_wait_share": last["data_wait_share"]},
            "sample_ddp.py": {"images_per_second": float(speed), "between_batches_share": float(waited) / 100}}


# --- the report ------------------------------------------------------------------------------------

STAGES = {"ceilings": ceilings, "networks": networks, "sampling": sampling, "sizes": sizes, "waiting": waiting}


def run_stage(stage: str, report: dict, out: Path, scale: Scale, device: torch.device) -> None:
    """Measure what a stage's part of the report lacks."""
    for name, measure in STAGES[stage](scale, device):
        if name in report["stages"].get(stage, {}):
            continue
        print(f"{stage}: {name}", flush=True)
        try:
            with torch.no_grad():
                rows = measure()
        except (RuntimeError, OSError) as error:  # only this figure is lost
            print(f"  failed: {cli.one_line(error)}", flush=True)
            report["failed"][f"{stage}: {name}"] = cli.one_line(error)
        else:
            report["failed"].pop(f"{stage}: {name}", None)
            report["stages"].setdefault(stage, {})[name] = rows
        write_json(out, report)
        gc.collect()
        torch.cuda.empty_cache()


def markdown(report: dict) -> str:
    """One table a stage, a line for each row of an item."""
    settings = report["settings"]
    lines = [f"# {settings['device']}, torch {settings['torch']}, {report['date']}{', toy sizes' if settings['toy'] else ''}"]
    for stage, items in report["stages"].items():
        lines += ["", f"## {stage}", "", "| | figures |", "|---|---|"]
        for item, rows in items.items():
            for row, figures in rows.items():
                shown = ", ".join(f"{name} {value:.4g}" if isinstance(value, int | float) else f"{name} {value}"
                                  for name, value in figures.items() if value is not None)
                lines.append(f"| {item}: {row} | {shown} |")
    return "\n".join([*lines, "", *(f"Failed: {name}: {why}" for name, why in report["failed"].items())])


def main(args: Namespace) -> None:
    cli.check_output_flag(args, "out", ".json")
    out, device = Path(args.out), start_world(args.device).device
    settings = {"device": name_of(device), "torch": torch.__version__, "toy": args.toy}
    report = open_report(out, settings, {"date": f"{date.today()}", "failed": {}, "stages": {}})
    for stage in args.stages:
        run_stage(stage, report, out, TOY if args.toy else Scale(), device)
    write_text(out.with_suffix(".md"), markdown(report))
    print(f"Wrote {out} and {out.with_suffix('.md')}; {len(report['failed'])} failed")


if __name__ == "__main__":
    cli.run(main, build_parser())
