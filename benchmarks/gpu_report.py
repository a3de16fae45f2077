"""Measure what a GPU decides, in one command: its ceilings, and the speed of the large networks.

    python benchmarks/gpu_report.py --out benchmarks/results/h200.json      # the same command continues where it was stopped

Stages:

- ceilings: a large matmul, a large copy, and convolutions of the networks, depthwise 7x7 and dense 3x3: forward, dgrad (to
  the input) and wgrad (to the kernel), by dtype, backend and memory format, with the errors against float64.
- networks: training steps and forward passes of NETWORKS, compiled, bf16, as throughput.py measures them: DiT with each
  implementation of attention.

Each figure is printed and written to the JSON at once; figures that it holds are not measured again.
"""

import gc
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import throughput
from benchmarks.instruments import describe, name_of, open_report, time_call
from runtime import cli
from runtime.files import write_json
from runtime.processes import start_world

Row = dict[str, Any]
Item = tuple[str, Callable[[], dict[str, Row]]]  # a name, and what measures its rows: name -> figures

MATMUL, COPIED = 8192, 2**30  # rows of a square matrix; bytes
DEPTHWISE = ((64, 1152, 16), (64, 512, 32), (64, 1024, 16), (64, 2048, 8), (64, 384, 16))  # B, D, H = W
DENSE = ((64, 512, 32), (64, 1024, 16), (64, 1152, 16))  # of DiNext-U-XL, of DiNextV3-XL/2
NETWORKS, LATENT = ("DiT-XL/2", "DiNext-XL/2", "DiNext-U-XL", "DiNextV3-XL/2"), 32  # H = W of what is noised
SETTING = throughput.Setting("train", "bf16", compile=True, batch_size=64)
REPEATS = 20


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Measure what a GPU decides, into one JSON.")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES), help="default: all, in this order")
    parser.add_argument("--out", required=True, help="JSON file for the figures")
    parser.add_device_argument()
    return parser


# --- ceilings --------------------------------------------------------------------------------------


def ceilings(device: torch.device) -> Iterator[Item]:
    for precision in ("bf16", "tf32"):
        yield f"matmul {precision} {MATMUL}", partial(time_matmul, precision, device)
    yield f"copy {COPIED / 2**20:g} MiB", partial(time_copy, device)
    for kind, shapes in (("depthwise 7x7", DEPTHWISE), ("dense 3x3", DENSE)):
        for batch, width, size in shapes:
            kernel = (width, 1, 7, 7) if shapes is DEPTHWISE else (width, width, 3, 3)
            yield (f"{kind} B {batch} D {width} {size}x{size}",
                   partial(time_convolution, (batch, width, size, size), kernel, device))


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """The median time of a call. Ten calls are timed together: one may be shorter than its launch. The first ten warm up."""
    return statistics.median([time_call(lambda: [call() for _ in range(10)], device) / 10 for _ in range(1 + REPEATS)][1:])


def time_matmul(precision: str, device: torch.device) -> dict[str, Row]:
    matrix = torch.randn(MATMUL, MATMUL, device=device, dtype=torch.bfloat16 if precision == "bf16" else None)
    return {"torch.mm": {"tflops": 2 * MATMUL**3 / seconds_of(lambda: matrix @ matrix, device) / 1e12}}


def time_copy(device: torch.device) -> dict[str, Row]:
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"copy_": {"terabytes_per_second": 2 * COPIED / seconds_of(lambda: target.copy_(source), device) / 1e12}}


def time_convolution(shape: tuple, kernel: tuple, device: torch.device) -> dict[str, Row]:
    """A row for each dtype, backend and memory format. `shape` (B, D, H, W) is that of the output too."""
    x, g = torch.randn(2, *shape, device=device)
    w = torch.randn(kernel, device=device) / math.prod(kernel[1:]) ** 0.5
    rows = {}
    for dtype in (torch.bfloat16, torch.float32):
        for name, cudnn, benchmark in (("cudnn", True, False), ("cudnn benchmark", True, True), ("native", False, False)):
            for layout, form in (("NHWC", torch.channels_last), ("NCHW", torch.contiguous_format)):
                tensors = [tensor.to(dtype).contiguous(memory_format=form) for tensor in (x, w, g)]
                with torch.backends.cudnn.flags(enabled=cudnn, benchmark=benchmark):
                    rows[f"{str(dtype)[6:]} {name} {layout}"] = convolution_row(*tensors, device)
    return rows


def convolution_row(x, w, g, device: torch.device) -> Row:
    """Milliseconds and relative errors of the three passes."""
    groups, padding = x.shape[1] // w.shape[1], w.shape[2] // 2

    def backward(g, x, w, wanted: list[bool]):
        return torch.ops.aten.convolution_backward(
            g, x, w, None, [1, 1], [padding, padding], [1, 1], False, [0, 0], groups, wanted)

    passes = {"forward": lambda x, w, g: F.conv2d(x, w, padding=padding, groups=groups),
              "dgrad": lambda x, w, g: backward(g, x, w, [True, False, False])[0],
              "wgrad": lambda x, w, g: backward(g, x, w, [False, True, False])[1]}
    exact = [tensor.double() for tensor in (x, w, g)]
    row = {}
    for name, run in passes.items():
        row[f"{name}_ms"] = 1000 * seconds_of(partial(run, x, w, g), device)
        found, expected = run(x, w, g).double(), run(*exact)
        row[f"{name}_error"] = ((found - expected).norm() / expected.norm()).item()
    return {"three_passes_ms": sum(row[f"{name}_ms"] for name in passes)} | row


# --- networks --------------------------------------------------------------------------------------


def networks(device: torch.device) -> Iterator[Item]:
    def measure(what: str) -> dict[str, Row]:
        results = throughput.measure(SETTING._replace(what=what), NETWORKS, LATENT, REPEATS, device)
        return {throughput.title_of(result): result for result in results}

    for what in ("train", "forward"):
        yield f"{what} batch {SETTING.batch_size}", partial(measure, what)


# --- the report ------------------------------------------------------------------------------------

STAGES = {"ceilings": ceilings, "networks": networks}


def run_stage(stage: str, report: dict, out: Path, device: torch.device) -> None:
    """Measure what a stage's part of the report lacks."""
    for name, measure in STAGES[stage](device):
        if name in report["stages"].get(stage, {}):
            continue
        print(f"{stage}: {name}", flush=True)
        try:
            rows = measure()
        except (RuntimeError, OSError) as error:  # only this figure is lost
            print(f"  failed: {cli.one_line(error)}", flush=True)
            report["failed"][f"{stage}: {name}"] = cli.one_line(error)
        else:
            report["failed"].pop(f"{stage}: {name}", None)
            report["stages"].setdefault(stage, {})[name] = rows
            for row, figures in rows.items():
                print(f"  {row}: {describe(figures)}", flush=True)
        write_json(out, report)
        gc.collect()
        torch.cuda.empty_cache()


def main(args: Namespace) -> None:
    cli.check_output_flag(args, "out", ".json")
    out, device = Path(args.out), start_world(args.device).device
    settings = {"device": name_of(device), "torch": torch.__version__}
    report = open_report(out, settings, {"date": f"{date.today()}", "failed": {}, "stages": {}})
    for stage in args.stages:
        run_stage(stage, report, out, device)
    print(f"Wrote {out}; {len(report['failed'])} failed")


if __name__ == "__main__":
    cli.run(main, build_parser())
