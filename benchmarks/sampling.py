"""Compare ways to sample from one checkpoint: calls, s/image, Fréchet distance.

    python benchmarks/sampling.py --ckpt results/mnist --data-path mnist --samples 5000 --out sampling.json
    python benchmarks/sampling.py --ckpt results/mnist --sampler ddpm --num-sampling-steps 250 --cfg-scale 1.5 \
        --reuse encoder --rows plain flags           # Faster Diffusion's comparison: key steps, s/image without and with

A row is a way to sample, given as a difference from the reference: DDPM with 250 steps, or Heun with 50 for a flow
checkpoint. All rows take guidance, its channels, thresholding and precision from the checkpoint or the flags. Only the row
`flags` and, without reuse, the row `plain` take sampler, steps, eta and reuse from the flags. --guide-ckpt guides all rows, and
then none reuses features.

- calls: of the model and of its blocks, per image, in both branches of guidance together.
- s/image: sampling and decoding; the median over --repeats rounds after a warm-up round. A round is one batch of each row,
  so other load on the machine affects all rows alike. A ratio, to the first row, is the median of the rounds' ratios.
- FD-pixel32: the Fréchet distance of raw pixels in [-1, 1], large images averaged to 32x32, between --samples images
  (classes in turn) and the held-out images; mean and standard deviation over --seeds.

With --out each figure is saved in a JSON at once, and the same command continues after an interruption.
"""

import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from jsonargparse import Namespace
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.instruments import describe, median_ratio, name_of, open_report, time_in_turn
from diffusion import FlowMatching
from evaluation.metrics import Gaussian, RunningCovariance, frechet_distance
from pipeline import checkpoint
from pipeline.encoders import pixel_features
from pipeline.generation import BATCH, Sampling, generate, prepare, restore_autoencoder, restore_checkpoint, restore_guide
from pipeline.settings import SamplingSettings, add_sampling_arguments
from pipeline.spec import BareWeights, Spec
from runtime import UserError, cli
from runtime.files import in_batches, write_json
from runtime.processes import start_world
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
    "ddim-50": dict(sampler="ddim", num_sampling_steps=50),
    "euler-50": dict(sampler="euler", num_sampling_steps=50),
    "heun-10": dict(sampler="heun", num_sampling_steps=10),
    "dpm++-20": FAST,
    "dpm++-15": FAST | dict(num_sampling_steps=15),
    "all-no-reuse": FAST | dict(guidance_interval=INTERVAL),
    "all-encoder": FAST | dict(guidance_interval=INTERVAL, reuse="encoder", key_steps="every:2"),
    "all-forecast": FAST | dict(guidance_interval=INTERVAL, reuse="forecast", key_steps="every:2"),
}


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
    parser.add_argument("--out", type=str | None, help="JSON file for the figures")
    return parser


def main(args: Namespace) -> None:
    torch.set_grad_enabled(False)
    check_flags(args)
    world = start_world(args.device)
    bare = BareWeights(args.model, args.image_size, args.num_classes, objective=args.objective)
    restored = restore_checkpoint(world, args.ckpt, bare, args.vae)
    guide = restore_guide(world, args.guide_ckpt, bare, args.vae)
    flags = Sampling.of(restored.spec, SamplingSettings.given(vars(args)), restored.model, guide)
    autoencoder = restore_autoencoder(world, restored, flags, same=args.vae is None)
    rows = make_rows(args, restored, flags)
    settings = report_settings(args, rows, restored, world.device)
    empty = {"times": {}, "distances": {name: {} for name in rows}}
    report = open_report(Path(args.out), settings, empty) if args.out else {"settings": settings, **empty}
    real = real_gaussian(args, restored.spec) if args.samples else None
    for name, row in rows.items():
        if row.plan:
            print(f"{name}: {row.plan}", flush=True)

    prepare(restored, flags, args.compile)
    model = restored.model

    def draw(row: Sampling, indices: range, seed: int) -> Tensor:
        """Images (B, H, W, C) uint8, with the classes in turn as labels."""
        return generate(model, autoencoder, [i % model.num_classes for i in indices], indices, seed, row)

    def fill(cells: dict, key: object, measure: Callable, *given) -> None:
        """Measure a cell of the report if it is missing."""
        if str(key) not in cells:
            cells[str(key)] = measure(*given)
            save()

    def save() -> None:
        if args.out:
            write_json(Path(args.out), report)

    for batch_size in args.batch_sizes if args.repeats else []:
        fill(report["times"], batch_size, time_rows, draw, rows, batch_size, args.repeats, world.device)
    for seed, (name, row) in itertools.product(args.seeds if args.samples else [], rows.items()):
        fill(report["distances"][name], seed, distance, draw, row, seed, args.samples, real)

    report["summary"] = summarise(report["distances"])
    save()
    print(*(f"{name}: {describe(figures_of(name, report))}" for name in rows), sep="\n")
    if args.out:
        print(f"Wrote {args.out}")


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


def make_rows(args: Namespace, restored: checkpoint.Restored, flags: Sampling) -> dict[str, Sampling]:
    """The requested rows, or all that apply. The first is the reference."""
    reference = "heun-50" if isinstance(flags.process, FlowMatching) else "ddpm-250"
    every = [reference, *(name for name in ROWS if name != "interval" or flags.settings.cfg_scale != 1),
             *(["plain", "flags"] if flags.plan else [])]
    if flags.guide:
        every = [name for name in every if "reuse" not in ROWS.get(name, {})]
    no_reuse = vars(flags.settings) | dict(reuse="none", key_steps=None, reuse_args={})

    def make(name: str) -> Sampling:
        if name in ("plain", "flags"):
            return flags if name == "flags" else Sampling.of(restored.spec, no_reuse, restored.model, flags.guide)
        difference = REFERENCES.get(name) or REFERENCES[reference] | ROWS[name]
        if "guidance_interval" in difference and args.guidance_interval:
            difference = difference | {"guidance_interval": args.guidance_interval}
        with cli.prefix_errors(f"--rows {name}:", *cli.WRONG_VALUE):
            return Sampling.of(restored.spec, no_reuse | dict(guidance_interval=None, eta=0.0) | difference, restored.model,
                               flags.guide)

    return {name: make(name) for name in args.rows or every}


def report_settings(args: Namespace, rows: dict[str, Sampling], restored: checkpoint.Restored, device: torch.device) -> dict:
    """All that the figures depend on, as JSON stores it. Times of other batch sizes may be added later."""
    records = {name: dict(model_calls=row.model_calls, block_calls=row.block_calls(restored.model)) | row.record()
               for name, row in rows.items()}
    flags = {name: args[name] for name in ("vae", "compile", "samples", "data_path")}
    return json.loads(json.dumps({"checkpoint": restored.name, "sha256": restored.sha256(), "device": name_of(device),
                                  "torch": torch.__version__, **flags, "rows": records}))


def time_rows(draw: Callable, rows: dict[str, Sampling], batch_size: int, repeats: int, device: torch.device) -> dict:
    """Each row's times at one batch size. "ratio": its speed relative to the first row."""
    calls = {name: partial(draw, row, range(batch_size), 0) for name, row in rows.items()}
    laps = time_in_turn(calls, repeats, device, f"batch {batch_size}")
    first = next(iter(laps.values()))
    return {name: {
        "seconds_per_image": statistics.median(seconds) / batch_size, "ratio": median_ratio(first, seconds),
        "rounds": [lap / batch_size for lap in seconds], "threads": torch.get_num_threads()} for name, seconds in laps.items()}


def distance(draw: Callable, sampling: Sampling, seed: int, samples: int, real: Gaussian) -> float:
    """FD-pixel32 between `samples` drawn images and the real ones."""
    batches = tqdm([range(i, min(i + BATCH, samples)) for i in range(0, samples, BATCH)], "drawing", leave=False)
    return frechet_distance(gaussian_of(draw(sampling, batch, seed).permute(0, 3, 1, 2) for batch in batches), real)


def real_gaussian(args: Namespace, spec: Spec) -> Gaussian:
    """The Gaussian of the held-out images."""
    dataset = load_dataset(args.data_path, spec.image_size[0], args.data_root, "val")
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


def summarise(distances: dict[str, dict[str, float]]) -> dict[str, dict]:
    """Each row's distance over the seeds."""
    rows = {name: list(cells.values()) for name, cells in distances.items() if cells}
    return {name: {"FD-pixel32": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
            for name, values in rows.items()}


def figures_of(name: str, report: dict) -> dict[str, float]:
    """A row's calls, times at each batch size, and distance."""
    figures = {key: report["settings"]["rows"][name][key] for key in ("model_calls", "block_calls")}
    for batch, times in report["times"].items():
        figures |= {f"batch {batch}: {key}": times[name][key] for key in ("seconds_per_image", "ratio")}
    return figures | report["summary"].get(name, {})


if __name__ == "__main__":
    cli.run(main, build_parser())
