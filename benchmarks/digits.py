"""The demo's figures: how well samples of a digits checkpoint are read, and how near they are to real digits.

    python benchmarks/digits.py --ckpt results/digits

Draws images of all classes in turn, without guidance. Label accuracy: the share that sklearn's SVC(gamma="scale"), trained
on the training part, reads as their label. Fréchet distance: of raw pixels in [-1, 1] (64-d) from the held-out quarter.
Beside each figure stands the same figure of real images: the held-out ones, and the training part drawn again.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.svm import SVC

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime
from autoencoders import to_unit_range
from data import load_dataset
from metrics import frechet_distance
from sample import add_sampling_arguments, generate, prepare

BATCH = 500


def build_parser() -> runtime.ArgumentParser:
    parser = runtime.ArgumentParser("Measure a digits checkpoint.")
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=5000)
    parser.add_argument("--out", type=str | None, help="JSON file for the figures")
    return parser


def main(args) -> None:
    world = runtime.start_world(args.device)
    args.cfg_scale = 1.0 if args.cfg_scale is None else args.cfg_scale
    restored, autoencoder, sampling = prepare(args, world)
    start, count = time.perf_counter(), args.num_samples
    labels = np.arange(count) % len(restored.spec["classes"])
    images = torch.cat([
        generate(restored.model, autoencoder, labels[i : i + BATCH].tolist(), range(i, min(i + BATCH, count)), args.seed,
                 sampling).cpu()
        for i in range(0, count, BATCH)])
    seconds = time.perf_counter() - start

    train, held_out = load_dataset("digits"), load_dataset("digits", split="val")
    train_pixels, held_out_pixels, pixels = map(flat, (train.images, held_out.images, images))
    classifier = SVC(gamma="scale").fit(train_pixels, train.labels)
    redrawn = train_pixels[np.random.default_rng(args.seed).integers(len(train_pixels), size=count)]
    figures = {
        "samples": count, "seconds": round(seconds, 2), **sampling.describe(),
        "label_accuracy": round(float(classifier.score(pixels, labels)), 4),
        "label_accuracy_held_out": round(float(classifier.score(held_out_pixels, held_out.labels)), 4),
        "frechet_distance": round(frechet_distance(pixels, held_out_pixels), 4),
        "frechet_distance_train_redrawn": round(frechet_distance(redrawn, held_out_pixels), 4),
    }
    print(json.dumps(figures, indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=2) + "\n")


def flat(images: torch.Tensor) -> np.ndarray:
    """uint8 of any layout with one channel -> (N, 64) in [-1, 1]."""
    return to_unit_range(images).flatten(1).double().numpy()


if __name__ == "__main__":
    runtime.run(main, build_parser())
