"""Measure how far samples are from real images: two sets of images -> metrics.

    python evaluate.py VIRTUAL_imagenet256_labeled.npz samples/X.npz           # FID, sFID, IS, precision, recall, as in ADM
    torchrun --nproc_per_node=8 evaluate.py REF SAMPLES --json figures.json
    python evaluate.py IMAGES --save-stats ref.npz                             # a reference file for any set of images
    python evaluate.py digits samples/X.npz --weights none --classifier classifier.pt --training-images digits

A set is an `.npz` of images (`arr_0` uint8 NHWC, as sample_ddp.py writes), a folder of images, an `.npz` of statistics
(`mu, sigma, mu_s, sigma_s`, with or without images), or the held-out part of digits, mnist or cifar10.

- FID, sFID, Inception Score, Precision, Recall: as ADM's TensorFlow suite defines them (Dhariwal & Nichol,
  arXiv:2105.05233), on torch-fidelity's port of its Inception.
- FD-pixel32 and FD-classifier: the same Fréchet distance, of pixels averaged to at most 32x32 and of a small classifier's
  features, without a download. They are not FID: each is printed with the distance between two sets of real images.
- Protocol: what decides these figures, in a line for a paper, where sample_ddp.py has written SAMPLES and NAME.json.
- Memorisation: how far samples are from the nearest training image, and how far held-out images are.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from evaluation.extractors import INCEPTION, INCEPTION_SHA256, open_extractors
from evaluation.figures import Figure, kept_of, measure, protocol
from evaluation.image_sets import REFERENCE_IMAGES, STATISTICS, ImageSet, open_set, save_statistics
from evaluation.survey import survey
from runtime import UserError, cli
from runtime.files import read_json, write_json
from runtime.log import peak_memory
from runtime.processes import start_world
from training.datasets import NAMED


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Measure how far samples are from real images.")
    parser.add_argument("ref", help="real images: .npz, folder, .npz of statistics, or digits, mnist, cifar10 (held-out part)")
    parser.add_argument("samples", type=str | None, nargs="?", help="likewise")
    parser.add_argument("--weights", type=str | None,
                        help=f"{INCEPTION}; default: torch's cache, or a download; none: FD-pixel32 instead")
    parser.add_argument("--pr-precision", choices=["adm", "fp32"], default="adm",
                        help="of distances for precision and recall: ADM's fp16, or fp32")
    parser.add_argument("--classifier", type=str | None,
                        help="from benchmarks/classifier.py: FD-classifier, and label accuracy of samples with arr_1")
    parser.add_argument("--training-images", type=str | None,
                        help="a set the samples' model was trained on: the memorisation check (REF then is held-out images)")
    parser.add_argument("--save-stats", type=str | None, help=".npz for the statistics of REF; SAMPLES may then be left out")
    parser.add_argument("--image-size", type=int | None, help="to crop folders of pictures to; default: the size of SAMPLES")
    parser.add_argument("--json", type=str | None, help="file for the figures")
    parser.add_argument("--data-root", default="data", help="where named data sets lie")
    parser.add_device_argument()
    return parser


def main(args: Namespace) -> None:
    torch.set_grad_enabled(False)
    world, start = start_world(args.device, tf32=False), time.perf_counter()
    ref, samples, training = world.main_first(lambda: open_sets(args))
    extractors = world.main_first(lambda: open_extractors(
        ref, samples or ref, world.device, args.weights, args.classifier, pixels=bool(args.training_images)))

    seen = survey(ref, extractors, world, kept_of(training) if samples else ())
    if args.save_stats:
        world.on_main(lambda: save_statistics(Path(args.save_stats), ref, seen.gaussians(STATISTICS)))
    if samples is None:
        return
    figures = measure(ref, samples, training, seen, extractors, world, args.weights != "none", args.pr_precision)
    ref_sha256, made = world.on_main(lambda: (ref.sha256(), how_made(args.samples)))
    line = protocol(made, ref.source, ref_sha256) if made else None
    report = {
        "protocol": line, "made": made, "ref": ref.describe() | {"sha256": ref_sha256}, "samples": samples.describe(),
        "training_images": training and training.describe(),
        "weights": INCEPTION_SHA256 if "inception" in extractors else None,
        "classifier": extractors["classifier"].about if "classifier" in extractors else None,
        "pr_precision": args.pr_precision, "figures": [asdict(figure) for figure in figures],
        "seconds": round(time.perf_counter() - start, 1), "processes": world.size,
        "peak_memory_gib": round(peak_memory(world.device), 2)}
    if world.is_main:
        if samples and Path(args.ref).resolve() == Path(args.samples).resolve():
            print(f"SAMPLES {args.samples} is REF: the set is compared with itself")
        print(*(side.say() for side in (ref, samples, training) if side), *say(figures), sep="\n")
        if line:
            print(f"Protocol: {line}")
        print(f"{report['seconds']} s, {report['peak_memory_gib']} GiB at most; processes: {world.size}")
        if args.json:
            write_json(Path(args.json), report)
            print(f"Wrote {args.json}")


def open_sets(args: Namespace) -> tuple[ImageSet, ImageSet | None, ImageSet | None]:
    """Open REF, SAMPLES and --training-images, and check them and their flags."""
    if not args.samples and (not args.save_stats or args.classifier or args.training_images or args.json):
        raise UserError("SAMPLES is missing; REF alone is enough only for --save-stats, with nothing else to measure")
    if args.save_stats and args.weights == "none":
        raise UserError("--save-stats writes statistics of Inception's features; --weights none leaves them out")
    sources = [Path(source).resolve() for source in (args.ref, args.samples, args.training_images) if source]
    if args.save_stats and Path(args.save_stats).resolve() in sources:
        raise UserError(f"--save-stats {args.save_stats} would overwrite its own images; name another file")
    if args.json and Path(args.json).resolve() in [Path(f"{str(source).removesuffix('.npz')}.json") for source in sources]:
        raise UserError(f"--json {args.json} is where sample_ddp.py keeps the settings of these images; name another file")
    if args.training_images and args.ref not in NAMED and sources[0] == sources[-1]:
        raise UserError(f"--training-images {args.training_images} is REF; the check needs held-out images for REF")
    cli.check_output_flag(args, "json", ".json")
    cli.check_numbers(args, ["image_size"], f"in 1..{cli.MAX_SIZE}", lambda n: 1 <= n <= cli.MAX_SIZE)
    size = args.image_size and (args.image_size, args.image_size)
    samples = open_set(args.samples, "SAMPLES", args.data_root, size) if args.samples else None
    size = samples.images.size if samples and samples.images else size
    ref = open_set(args.ref, "REF", args.data_root, size)
    training = args.training_images and open_set(args.training_images, "--training-images", args.data_root, size, "train")
    if args.save_stats:
        if ref.statistics:
            raise UserError(f"--save-stats: REF {ref.source} already holds statistics")
        count, (height, width) = min(len(ref.images), REFERENCE_IMAGES), ref.images.size
        cli.check_output_flag(args, "save_stats", ".npz", count * height * width * 3)
    for side in filter(None, (samples, ref, training)):
        check_images(side, args, size)
    return ref, samples, training


def check_images(side: ImageSet, args: Namespace, size: tuple[int, int] | None) -> None:
    """Raises UserError if a side lacks images that the flags need, or has images of another size (H, W)."""
    if side.images is None:
        if args.weights == "none" or args.training_images:
            raise UserError(f"{side.title} {side.source} holds statistics of Inception's features, without images; "
                            f"{'--weights none' if args.weights == 'none' else '--training-images'} needs images")
        return
    height, width = side.images.size
    if args.image_size and not height == width == args.image_size:
        raise UserError(f"--image-size {args.image_size}: {side.title} {side.source} holds images of {height}x{width} "
                        "(height x width); only folders of pictures are cropped")
    if size and (height, width) != size:
        raise UserError(f"SAMPLES are {size[0]}x{size[1]} (height x width), the images of {side.title} {height}x{width}; "
                        "expected one size")


def how_made(samples: str) -> dict[str, Any] | None:
    """The settings that sample_ddp.py has written beside SAMPLES, an `.npz` or a folder of its pictures; None without them."""
    try:
        made = read_json(Path(f"{str(Path(samples)).removesuffix('.npz')}.json"))
    except (OSError, UserError):
        return None
    return made if {"checkpoint", "sampler", "steps", "labels", "seed", "precision"} <= made.keys() else None


def say(figures: list[Figure]) -> list[str]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{round(value, 4) + 0.0:.4f}"  # + 0.0: no "-0.0000"

    def line(figure: Figure) -> str:
        floor = "" if figure.floor is None else f"   real images: {number(figure.floor)} ({figure.floor_of})"
        return f"{figure.name:<{width}}  {number(figure.value):>9}{floor}   {figure.remark}".rstrip()

    width = max(len(figure.name) for figure in figures)
    return list(map(line, figures))


if __name__ == "__main__":
    cli.run(main, build_parser())
