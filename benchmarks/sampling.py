"""Compare ways to sample from one checkpoint: calls, s/image, RMSE to the exact solution, Fréchet distance.

    python benchmarks/sampling.py --ckpt results/mnist --data-path mnist --samples 5000 --out sampling.json
    python benchmarks/sampling.py --ckpt results/mnist --sampler ddpm --num-sampling-steps 250 --cfg-scale 1.5 \
        --reuse encoder --rows plain flags           # Faster Diffusion's comparison: key steps, s/image without and with

A row is a way to sample, given as a difference from the reference: DDPM with 250 steps, or Heun with 50 for a flow
checkpoint (which has no DDPM). All rows take guidance, its channels, thresholding and precision from the checkpoint or the
flags. Only the row `flags` and, without reuse, the row `plain` take sampler, steps, eta and reuse from the flags. Ratios
and equality compare with the first row.

- calls: of the model and of its blocks, per image, in both branches of guidance together.
- s/image: sampling and decoding, synchronised; the median over --repeats rounds after a warm-up round. A round is one
  batch of each row in turn, so other load on the machine affects all rows alike. A ratio is the median of the rounds' ratios.
- RMSE: of the last states (latents, or pixels without an autoencoder) for the same labels and start noise. A row with the
  solver and times of the first row (so also the same later noise) is compared with it. Other rows are compared with dpm++
  with 250 steps, guided everywhere, in place of the exact solution. A stochastic row with other times has no RMSE.
- FD-pixel32: the Fréchet distance of raw pixels in [-1, 1], large images averaged to 32x32, between --samples images
  (classes in turn) and the held-out images; mean and standard deviation over --seeds. Equal: the mean is at most the
  reference's mean plus its standard deviation.

With --out each figure is saved in a JSON at once, and the same command continues after an interruption. A PNG beside it
shows distance over time. Without --out nothing is written.
"""

import copy
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.reports import continued, fastest, plot, summarise, table
from diffusion import FlowMatching
from evaluation.extractors import pixel_features
from evaluation.metrics import Gaussian, RunningCovariance, frechet_distance
from pipeline import checkpoint
from pipeline.generation import (
    BATCH,
    Sampling,
    generate,
    prepare_network,
    restore_autoencoder,
    restore_checkpoint,
)
from pipeline.settings import SamplingSettings, add_sampling_arguments
from pipeline.spec import BareWeights, Spec
from runtime import UserError, cli
from runtime.files import in_batches, write_json
from runtime.processes import start_world, synchronize
from training.datasets import load_dataset
from training.rows import Rows

INTERVAL = (100.0, 600.0)  # timesteps with guidance, unless --guidance-interval is given
FAST = dict(sampler="dpm++", num_sampling_steps=20)
REFERENCES = {  # the default first row: of a Gaussian process, and of flow
    "ddpm-250": dict(sampler="ddpm", num_sampling_steps=250),
    "heun-50": dict(sampler="heun", num_sampling_steps=50),
}
ROWS = {  # differences from the reference
    "interval": dict(guidance_interval=INTERVAL),
    "encoder": dict(reuse="encoder"),
    "forecast": dict(reuse="forecast"),
    "bf16": dict(precision="bf16"),
    "ddim-50": dict(sampler="ddim", num_sampling_steps=50),
    "euler-50": dict(sampler="euler", num_sampling_steps=50),
    "heun-10": dict(sampler="heun", num_sampling_steps=10),
    "dpm++-20": FAST,
    "dpm++-15": FAST | dict(num_sampling_steps=15),
    "all-no-reuse": FAST | dict(guidance_interval=INTERVAL),
    "all-encoder": FAST | dict(guidance_interval=INTERVAL, reuse="encoder", key_steps="every:2"),
    "all-forecast": FAST | dict(guidance_interval=INTERVAL, reuse="forecast", key_steps="every:2"),
}
EXACT = dict(sampler="dpm++", num_sampling_steps=250)
RMSE_IMAGES = 16


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Measure the speed and quality of ways to sample from a checkpoint, side by side.")
    add_sampling_arguments(parser)
    parser.add_argument("--rows", type=str, nargs="+", choices=[*REFERENCES, *ROWS, "plain", "flags"],
                        help="the first is the reference; default: all that apply, plain and flags with --reuse only")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64], help="to be timed")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, 0 = none")
    parser.add_argument("--samples", type=int, default=0, help="images for each distance, 0 = no distances")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one distance each")
    parser.add_argument("--data-path", type=str | None, help="the real images: digits, mnist, cifar10 or a folder of classes")
    parser.add_argument("--data-root", default="data", help="where named data sets lie")
    parser.add_argument("--out", type=str | None, help="JSON file for the figures; the plot lies beside it")
    return parser


def main(args: Namespace) -> None:
    torch.set_grad_enabled(False)
    check_flags(args)
    world = start_world(args.device)
    given = SamplingSettings.given(vars(args))
    bare = BareWeights(args.model, args.image_size, args.num_classes, objective=args.objective)
    restored = restore_checkpoint(world, args.ckpt, bare, args.vae)
    sampling = Sampling.of(restored.spec, given, restored.model)
    autoencoder = restore_autoencoder(world, restored, sampling, same=args.vae is None)
    rows = make_rows(args, restored, sampling, world.device)
    report = open_report(args.out, report_settings(args.as_dict(), rows, restored, world.device))
    first, real = next(iter(rows)), real_gaussian(args, restored.spec) if args.samples else None
    for name, row in rows.items():
        if row.plan:
            print(f"{name}: {row.plan}", flush=True)

    def fill(cells: dict, key: object, measure: Callable, *given) -> None:
        """Measure a cell of the report if it is missing."""
        if str(key) not in cells:
            cells[str(key)] = measure(*given)
            save(args.out, report)

    networks = {row.settings.precision: copy.deepcopy(restored.model) for row in (sampling, *rows.values())}
    for precision, network in networks.items():
        prepare_network(network, precision, args.compile)
    draw = partial(draw_in_turn, networks, autoencoder)
    for batch_size in args.batch_sizes if args.repeats else []:
        fill(report["times"], batch_size, time_rows, draw, rows, batch_size, args.repeats, world.device)
    exact = make_sampling(restored.spec, restored.model, sampling.settings, EXACT)
    states = cache(lambda name: final_states(draw, rows.get(name, exact), args.seeds[0]))
    for name, row in rows.items():
        fill(report["rmse"], name, rmse, states, name, nearest(row, first, rows[first]))
    for seed, (name, row) in itertools.product(args.seeds if args.samples else [], rows.items()):
        fill(report["distances"][name], seed, distance, draw, row, seed, args.samples, real)

    report["summary"] = summarise(report["distances"])
    save(args.out, report)
    print(*table(report), *fastest(report), sep="\n")
    if args.out:
        picture = plot(report, Path(args.out).with_suffix(".png"))
        print(f"Wrote {args.out}{f' and {picture}' if picture else ''}")


def check_flags(args: Namespace) -> None:
    cli.check_numbers(args, ["repeats"], "at least 0", lambda n: n >= 0)
    cli.check_numbers(args, ["samples"], "0 or at least 2", lambda n: n == 0 or n >= 2)
    if min(args.batch_sizes) < 1:
        raise UserError(f"--batch-sizes {' '.join(map(str, args.batch_sizes))}: each must be at least 1")
    if args.samples and not args.data_path:
        raise UserError(f"--samples {args.samples} needs --data-path, the images to measure the distance from")
    if args.reuse != "none" and args.rows and "flags" not in args.rows:
        raise UserError(f"--reuse {args.reuse} is measured by the row flags, which --rows lacks")
    cli.check_output_flag(args, "out", ".json")


# --- the rows ------------------------------------------------------------------------------------


def make_rows(args: Namespace, restored: checkpoint.Restored, flags: Sampling, device: torch.device) -> dict[str, Sampling]:
    """The requested rows, or all that apply. The first is the reference."""
    reference = "heun-50" if isinstance(flags.process, FlowMatching) else "ddpm-250"
    useless = {"interval": flags.settings.cfg_scale == 1, "bf16": device.type == "cpu" or args.precision == "bf16"}
    own = ["plain", "flags"] if args.reuse != "none" else []
    every = [reference, *(name for name in ROWS if not useless.get(name)), *own]

    def make(name: str) -> Sampling:
        if name in ("plain", "flags"):
            off = dict(reuse="none", key_steps=None, reuse_args={})
            return flags if name == "flags" else Sampling.of(restored.spec, vars(flags.settings) | off)
        difference = REFERENCES[name] if name in REFERENCES else REFERENCES[reference] | ROWS[name]
        if "guidance_interval" in difference and args.guidance_interval:
            difference = difference | {"guidance_interval": args.guidance_interval}
        with cli.prefix_errors(f"--rows {name}:", *cli.WRONG_VALUE):
            return make_sampling(restored.spec, restored.model, flags.settings, difference)

    return {name: make(name) for name in args.rows or every}


def make_sampling(spec: Spec, model: nn.Module, flags: SamplingSettings, difference: dict[str, Any]) -> Sampling:
    """The flags' guidance, its channels, thresholding and precision, guided everywhere, then changed by `difference`."""
    plain = dict(guidance_interval=None, eta=0.0, reuse="none", key_steps=None, reuse_args={})
    return Sampling.of(spec, vars(flags) | plain | difference, model)


# --- the report, a JSON that grows cell by cell --------------------------------------------------


def report_settings(flags: dict[str, Any], rows: dict[str, Sampling], restored: checkpoint.Restored,
                    device: torch.device) -> dict[str, Any]:
    """All settings that the figures depend on, as JSON will return them. Times of other batch sizes may be added later."""
    other = ("config", "ckpt", "out", "device", "batch_sizes", "repeats")
    flags = {name: value for name, value in flags.items() if name not in other}
    machine = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    own = {name: dict(model_calls=row.model_calls, block_calls=row.block_calls(restored.model)) | row.record()
           for name, row in rows.items()}
    about = {"checkpoint": restored.name, "sha256": restored.sha256(), "device": machine,
             "torch": torch.__version__}
    return json.loads(json.dumps(about | flags | {"rows": own}))


def open_report(out: str | None, settings: dict) -> dict:
    """Begin a report, or continue the one at --out."""
    found = out and continued(Path(out), settings)
    return found or {"settings": settings, "times": {}, "rmse": {}, "distances": {name: {} for name in settings["rows"]}}


def save(out: str | None, report: dict) -> None:
    if out:
        write_json(Path(out), report)


# --- measurements --------------------------------------------------------------------------------


def draw_in_turn(networks: dict[str, nn.Module], autoencoder: nn.Module, sampling: Sampling, indices: range, seed: int,
                 on_step: Callable[[dict[str, Tensor]], object] = lambda step: None) -> Tensor:
    """Draw images (B, H, W, C) uint8 by the network of the precision, with the classes in turn as labels."""
    model = networks[sampling.settings.precision]
    return generate(model, autoencoder, [i % model.num_classes for i in indices], indices, seed, sampling, on_step)


def time_rows(draw: Callable, rows: dict[str, Sampling], batch_size: int, repeats: int, device: torch.device) -> dict:
    """Each row's times at one batch size, or None if it is out of memory."""
    laps = {name: [] for name in rows}  # per round: (seconds in total, before decoding)
    for _, name in itertools.product(tqdm(range(1 + repeats), f"batch {batch_size}", leave=False), rows):
        if laps[name] is not None:
            try:
                laps[name].append(time_batch(draw, rows[name], batch_size, device))
            except torch.cuda.OutOfMemoryError:
                laps[name] = None
            if laps[name] is None:  # not above: a live exception keeps its functions' memory
                tqdm.write(f"{name}: batch {batch_size} is out of memory")
                gc.collect()
                torch.cuda.empty_cache()
    first = next(iter(laps.values()))
    return {name: own and times(own[1:], first and first[1:], batch_size) for name, own in laps.items()}  # [0] warmed up


def time_batch(draw: Callable, sampling: Sampling, batch_size: int, device: torch.device) -> tuple[float, float]:
    """Seconds of one batch: in total, and before decoding."""
    marks, steps = [], itertools.count(1)

    def mark() -> None:
        synchronize(device)
        marks.append(time.perf_counter())

    mark()
    draw(sampling, range(batch_size), 0, lambda step: mark() if next(steps) == sampling.process.num_timesteps else None)
    mark()
    return marks[2] - marks[0], marks[1] - marks[0]


def times(own: list[tuple[float, float]], first: list[tuple[float, float]] | None, batch_size: int) -> dict:
    """The reported times of a row. "ratio": its speed relative to the first row."""
    seconds, sampling = ([lap[part] / batch_size for lap in own] for part in (0, 1))
    ratios = [theirs[0] / mine[0] for theirs, mine in zip(first or [], own)]
    return {"seconds_per_image": statistics.median(seconds), "sampling_seconds_per_image": statistics.median(sampling),
            "ratio": statistics.median(ratios) if ratios else None, "rounds": seconds, "threads": torch.get_num_threads()}


def nearest(row: Sampling, first_name: str, first: Sampling) -> str | None:
    """The row whose last states this row should match: the first, "exact", or None."""
    if solver_of(row) == solver_of(first):
        return first_name
    return None if row.settings.sampler == "ddpm" or row.settings.eta else "exact"


def rmse(states: Callable[[str], Tensor], name: str, to: str | None) -> dict:
    """Root mean square difference between a row's last states and those of the row `to`."""
    return {"rmse": to and (states(name) - states(to)).square().mean().sqrt().item(), "rmse_to": to}


def final_states(draw: Callable, sampling: Sampling, seed: int) -> Tensor:
    """The last states (RMSE_IMAGES, C, H, W)."""
    step = {}
    draw(sampling, range(RMSE_IMAGES), seed, step.update)
    return step["sample"].float()


def distance(draw: Callable, sampling: Sampling, seed: int, samples: int, real: Gaussian) -> float:
    """FD-pixel32 between `samples` drawn images and the real ones."""
    batches = tqdm([range(i, min(i + BATCH, samples)) for i in range(0, samples, BATCH)], "drawing", leave=False)
    return frechet_distance(gaussian_of(draw(sampling, batch, seed).permute(0, 3, 1, 2) for batch in batches), real)


def solver_of(row: Sampling) -> tuple:
    return row.settings.sampler, row.settings.eta, row.times


def real_gaussian(args: Namespace, spec: Spec) -> Gaussian:
    """The Gaussian of the held-out images, or of all images of a folder without a held-out part."""
    open_split = partial(load_dataset, args.data_path, spec.image_size[0], args.data_root)
    try:
        dataset = open_split(split="val")
    except FileNotFoundError:
        dataset = open_split(split="train")
    if dataset.kind != "images" or dataset.channels != spec.channels or list(dataset.classes) != list(spec.classes):
        raise UserError(f"--data-path {args.data_path} does not hold images of the checkpoint's {spec.channels} channels "
                        f"and {len(spec.classes)} classes")
    return gaussian_of(dataset.__getitems__(Rows.plain(rows))[0] for rows in in_batches(len(dataset), BATCH))


def gaussian_of(batches: Iterable[Tensor]) -> Gaussian:
    """The Gaussian of pixels of images (B, C, H, W) uint8, averaged to at most 32x32."""
    running = None
    for images in batches:
        features = pixel_features(images).flatten(1)
        running = (running or RunningCovariance(features.shape[1])).update(features)
    return running.gaussian()


if __name__ == "__main__":
    cli.run(main, build_parser())
