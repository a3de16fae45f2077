"""Train the small classifier that replaces Inception's features and predictions, on the training part of real images.

    python benchmarks/classifier.py --data-path mnist --out classifier.pt
    python evaluate.py mnist samples/X.npz --weights none --classifier classifier.pt

It sees images as evaluate.py does: RGB, averaged to at most 32x32. The test accuracy is that of the held-out part.
"""

import math
import sys
import time
from pathlib import Path

import torch
from jsonargparse import Namespace
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline import checkpoint
from pipeline.encoders import pixel_features
from runtime import UserError, cli
from runtime.files import in_batches
from runtime.processes import start_world
from runtime.randomness import generator
from small_models import Classifier
from training.datasets import load_dataset, load_held_out
from training.rows import Rows

BATCH, STEPS, SMALLEST = 128, 300, 4  # images of a step; minimum of steps without --epochs; minimum of pixels of a side
SHIFT = 8  # an image is shifted by at most its size / SHIFT


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Train a small classifier of real images, for evaluate.py --classifier.")
    parser.add_argument("--data-path", required=True, help="digits, mnist, cifar10, or a folder `train` of classes")
    parser.add_argument("--data-root", default="data", help="where named data sets lie")
    parser.add_argument("--image-size", type=int | None, help="default: the data's size, 256 for a folder of classes")
    parser.add_argument("--out", required=True, help="the .pt to write")
    parser.add_argument("--epochs", type=int | None, help=f"default: 10, or more for a small set: at least {STEPS:,} steps")
    parser.add_argument("--lr", type=float, default=4e-3, help="the maximum of a one-cycle schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=32, help="channels of the first layer")
    parser.add_device_argument()
    return parser


def main(args: Namespace) -> None:
    world, start = start_world(args.device), time.perf_counter()
    if world.size > 1:
        raise UserError("this script runs in one process; start it without torchrun")
    cli.check_numbers(args, ["epochs", "width"], "at least 1", lambda n: n >= 1)
    cli.check_numbers(args, ["lr"], "above 0", lambda x: x > 0)
    cli.check_numbers(args, ["image_size"], f"in {SMALLEST}..{cli.MAX_SIZE}", lambda n: SMALLEST <= n <= cli.MAX_SIZE)
    cli.check_output_flag(args, "out", ".pt")
    data = load_dataset(args.data_path, args.image_size, args.data_root)
    held_out = load_held_out(args.data_path, data, args.image_size, args.data_root)
    for remark in [remark for part in (data, held_out) for remark in getattr(part, "remarks", [])]:
        print(f"--data-path {args.data_path}: {remark}")
    if len(data) < 2:
        raise UserError(f"`data_path` {args.data_path} holds one image; a classifier needs at least two")
    images, labels = read_all(data)
    torch.manual_seed(args.seed)
    network = {"num_classes": len(data.classes), "width": args.width}
    classifier = Classifier(**network).to(world.device)
    train(classifier, images, labels, data.flip, args, world.device)
    accuracy = measure(classifier.eval(), *read_all(held_out), world.device)
    checkpoint.save(Path(args.out), {
        "classifier": classifier.cpu().state_dict(),
        "spec": {"network": network, "size": list(images.shape[2:]), "data": args.data_path, "test_images": len(held_out),
                 "test_accuracy": accuracy}})
    print(f"Wrote {args.out}: {accuracy:.2%} of {len(held_out):,} held-out images classified correctly, "
          f"{time.perf_counter() - start:.0f} s")


def read_all(data) -> tuple[Tensor, Tensor]:
    """Images (N, 3, h, w) as the classifier sees them, and labels (N,)."""
    if data.kind != "images":
        raise UserError("--data-path holds features; a classifier is trained on images")
    parts = [data.__getitems__(Rows.plain(rows)) for rows in in_batches(len(data), BATCH)]
    images = torch.cat([pixel_features(images) for images, _ in parts])
    return images.expand(-1, 3, -1, -1).contiguous(), torch.cat([labels for _, labels in parts])


def train(classifier: Classifier, images: Tensor, labels: Tensor, flip: bool, args, device: torch.device) -> None:
    """Train with AdamW and a one-cycle schedule. Images are shifted at random, and mirrored at random if `flip`."""
    batch = min(BATCH, max(2, len(images) // 8))  # more steps an epoch for a small set; BatchNorm needs two images
    steps = len(images) // batch
    epochs = args.epochs or max(10, math.ceil(STEPS / steps))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=epochs * steps)
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator("classifier", args.seed, epoch))
        for step, rows in enumerate(tqdm(order.split(batch)[:steps], f"epoch {epoch + 1} of {epochs}")):
            draw = generator("classifier", args.seed, epoch, step)
            x = augment(images[rows], flip, draw).to(device)
            loss = cross_entropy(classifier(x), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def augment(x: Tensor, flip: bool, draw: torch.Generator) -> Tensor:
    """Shift the batch (B, C, h, w) as one, repeating border values. If `flip`, mirror each image at random."""
    height, width = x.shape[2:]
    most = max(1, min(height, width) // SHIFT)
    top, left = torch.randint(2 * most + 1, (2,), generator=draw).tolist()
    x = pad(x, (most,) * 4, mode="replicate")[:, :, top : top + height, left : left + width]
    if flip:
        mirrored = torch.rand(len(x), generator=draw) < 0.5
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)
    return x


@torch.no_grad()
def measure(classifier: Classifier, images: Tensor, labels: Tensor, device: torch.device) -> float:
    """The share of images classified correctly."""
    right = [(classifier(x.to(device)).argmax(dim=1).cpu() == y).sum() for x, y in zip(images.split(512), labels.split(512))]
    return float(sum(right)) / len(labels)


if __name__ == "__main__":
    cli.run(main, build_parser())
