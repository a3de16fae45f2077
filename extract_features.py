"""Encode images once, so that training reads latents instead: images -> cached latents.

    torchrun --nproc_per_node=8 extract_features.py --data-path /imagenet/train --features-path features/train
    torchrun --nproc_per_node=8 train.py --data-path features/train

The folder holds `moments.npy` (N, 2, 2C, h, w) fp16: mean and log-variance of the posterior of each image and of its
mirror image, because an autoencoder is not equivariant to flips; `labels.npy` (N,) int64; `files.npy`, by which changed
images are noticed; `skipped.txt`, the images that could not be read or encoded; and, at the end, `meta.json`. Row i is image i,
whichever process writes it. After a kill, the same command continues on any number of processes. With --normalise,
meta.json also has the mean and standard deviation of each channel of the latents; training then normalises by them, and
not as the autoencoder says.
"""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jsonargparse import ActionYesNo, Namespace
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from pipeline.autoencoders import NO_VARIANCE, SDVAE, Pixels, load_autoencoder
from runtime import UserError, cli
from runtime.files import atomic, check_writable, in_batches, write_json, write_text
from runtime.pictures import to_unit_range
from runtime.processes import autocast, start_world
from training.datasets import load_dataset, load_everywhere
from training.order import read_ahead
from training.rows import Rows, TrainingData, choose_flip

NOT_FINITE, PENDING, SKIPPED = -3, -2, -1  # in labels.npy, for rows without latents (yet)


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Encode a data set into a folder of features, which train.py --data-path takes.")
    parser.add_data_arguments()
    parser.add_shared_arguments()
    parser.add_argument("--features-path", required=True, help="the folder to write")
    parser.add_argument("--per-proc-batch-size", type=int, default=32, help="images that a process encodes at once")
    parser.add_argument("--normalise", action="store_true", help="measure mean and std of each channel; train.py uses them")
    parser.add_argument("--flip", action=ActionYesNo(yes_prefix="", no_prefix="no-"), default=None,
                        help="whether train.py mirrors them unless it is told; default: as the data says")
    parser.add_argument("--max-skipped", type=float, default=0.001, help="share of images that may be unreadable")
    return parser


def main(args: Namespace) -> None:
    torch.set_grad_enabled(False)
    world = start_world(args.device)
    cli.check_data_arguments(args)
    cli.check_numbers(args, ["per_proc_batch_size"], "at least 1", lambda n: n >= 1)
    cli.check_numbers(args, ["max_skipped"], "a share, 0..1", lambda x: 0 <= x <= 1)
    data = load_everywhere(world, args.data_path, lambda: load_dataset(
        args.data_path, args.image_size, args.data_root, num_classes=args.num_classes))
    if data.kind != "images":
        raise UserError(f"--data-path {args.data_path} holds features already")
    with cli.prefix_errors("--vae"):
        autoencoder = world.main_first(lambda: load_autoencoder(args.vae or "ema", world.device, raw=args.normalise))
        meta = describe_features(data, autoencoder, args.data_path, args.normalise, choose_flip(data, args.flip))
    folder = world.on_main(lambda: check_writable(args.features_path))
    todo = world.on_main(lambda: lay_out(folder, data, meta))
    if args.compile:
        autoencoder.moments = torch.compile(autoencoder.moments)

    start = time.perf_counter()
    batches = torch.from_numpy(todo).split(args.per_proc_batch_size)[world.rank :: world.size] if len(todo) else ()
    moments, labels = (RowFile(folder / name) for name in ("moments.npy", "labels.npy"))
    writing = None
    with ThreadPoolExecutor(max_workers=1) as writer:
        reader = read_ahead(SkippingReader(data), batches, args.num_workers, pin_memory=world.device.type == "cuda")
        for rows, images, found in tqdm(reader, "encoding", len(batches), unit="batch", disable=not world.is_main):
            encoded = encode(autoencoder, images.to(world.device, non_blocking=True), args.precision)
            if writing:
                writing.result()  # a batch is written while the next one is encoded
            writing = writer.submit(write, moments, labels, rows, encoded, found)
        if writing:
            writing.result()
    world.barrier()
    world.on_main(lambda: finish(folder, data, meta, args.max_skipped * len(data)))
    if world.is_main:
        for remark in getattr(data, "remarks", []):
            print(f"--data-path {args.data_path}: {remark}")
        print(f"{folder} is complete: {len(todo):,} of {len(data):,} images encoded now, {time.perf_counter() - start:.0f} s")


def describe_features(data: TrainingData, autoencoder: nn.Module, data_path: str, normalise: bool, flip: bool) -> dict:
    """The content of meta.json, except the skipped rows."""
    if isinstance(autoencoder, Pixels):
        raise UserError("pixels has no features: train.py reads images directly")
    if normalise and not isinstance(autoencoder, SDVAE):
        raise UserError(f"{autoencoder.spec['vae']}: its latents are normalised already; leave out `normalise`")
    return {
        "autoencoder": autoencoder.spec | autoencoder.identity(),
        "latent_shape": autoencoder.latent_shape(data.image_size, data.channels),
        "image_size": data.image_size, "channels": data.channels, "classes": data.classes, "flip": flip,
        "rows": len(data), "dtype": "float16", "data_path": data_path, "normalise": normalise,
    }


def describe_files(data: TrainingData) -> np.ndarray | None:
    """For each sample a digest of its file's name and size and of its label, and the file's time: (N, 2) int64.

    None for data that are not read from files.
    """
    if not len(files := getattr(data, "files", ())):
        return None
    with ThreadPoolExecutor(32) as pool:  # on a network file system each waits for an answer
        found = list(zip(map(os.fsencode, files), pool.map(os.stat, files)))
    rows = zip(getattr(data, "file_of_row", range(len(data))), np.asarray(data.labels).tolist())
    marks = np.empty((len(data), 2), dtype=np.int64)
    for mark, (number, label) in zip(marks, rows):
        name, stat = found[number]
        digest = hashlib.blake2b(b"%s %d %d" % (name, stat.st_size, label), digest_size=8).digest()
        mark[:] = int.from_bytes(digest, signed=True), stat.st_mtime_ns
    return marks


def lay_out(folder: Path, data: TrainingData, meta: dict) -> np.ndarray:
    """Create the files, or open those of an interrupted run. Returns the rows that are still to be encoded.

    Raises:
        UserError: the folder holds features of other images or of another autoencoder.
        OSError: the disk has no space for the files.
    """
    meta, marks = json.loads(json.dumps(meta)), describe_files(data)
    done, begun = folder / "meta.json", folder / "unfinished.json"
    for path in (done, begun):
        if path.exists():
            stored = {"normalise": False} | json.loads(path.read_text())  # an older version could not normalise
            if different := [key for key in meta if stored.get(key) != meta[key]]:
                raise UserError(f"--features-path {folder} holds other features: their {different[0]} is "
                                f"{stored.get(different[0])}, not {meta[different[0]]}")
            check_files(folder, data, marks, complete=path == done)
            return np.flatnonzero(np.load(folder / "labels.npy", mmap_mode="r") < 0) if path == begun else np.array([], int)
    channels, *size = meta["latent_shape"]
    shape = (meta["rows"], 2, 2 * channels, *size)
    check_writable(folder, 2 * int(np.prod(shape)) + 8 * meta["rows"])
    open_memmap(folder / "moments.npy", "w+", np.float16, shape)
    labels = open_memmap(folder / "labels.npy", "w+", np.int64, (meta["rows"],))
    labels[:] = PENDING
    labels.flush()
    save_marks(folder, marks)
    write_json(begun, meta)
    return np.arange(meta["rows"])


def check_files(folder: Path, data: TrainingData, marks: np.ndarray | None, complete: bool) -> None:
    """Check that the images which are encoded have not changed since, by `describe_files`. The others may: they were repaired.

    Args:
        complete: whether no image will be encoded any more.

    Raises:
        UserError: they have changed.
    """
    path, encoded = folder / "files.npy", np.load(folder / "labels.npy", mmap_mode="r") >= 0
    if marks is None:
        return
    if not path.is_file():
        return print(f"{folder} is of an older version and does not tell of which files it was made: it is taken as it is, "
                     "even if they have changed")
    different = np.load(path) != marks
    changed = different & encoded[:, None]
    if changed.any():
        row, what = int(changed.any(axis=1).argmax()), "name, label or size" if changed[:, 0].any() else "time"
        raise UserError(f"--features-path {folder} was made of other images: {changed.any(axis=1).sum():,} have changed since "
                        f"in {what}, such as {file_of(data, row)}. Delete the folder or choose another one; if they are the "
                        f"same images nevertheless, delete {path}")
    if complete and (repaired := int(different.any(axis=1).sum())):
        print(f"{repaired} images that were left out have changed since: delete {folder} to encode them")
    elif not complete:
        save_marks(folder, marks)


def file_of(data: TrainingData, row: int) -> str | None:
    """The file of a sample, None for data that are not read from files."""
    files = getattr(data, "files", ())
    return os.fsdecode(files[getattr(data, "file_of_row", range(len(data)))[row]]) if len(files) else None


def save_marks(folder: Path, marks: np.ndarray | None) -> None:
    if marks is not None:
        with atomic(folder / "files.npy") as file:
            np.save(file, marks)


class SkippingReader(Dataset):
    """A batch is: the requested rows (B,), the images that can be read, and the labels (B,), SKIPPED for the others."""

    def __init__(self, data: TrainingData):
        self.data = data

    def __getitems__(self, rows: Tensor) -> tuple[np.ndarray, Tensor, np.ndarray]:
        images, labels = [], []
        for row in rows.tolist():
            try:
                image, label = self.data.__getitems__(Rows.plain([row]))
            except OSError:
                labels.append(SKIPPED)
            else:
                images.append(image)
                labels.append(int(label))
        return rows.numpy(), torch.cat(images) if images else torch.empty(0), np.array(labels)


def encode(autoencoder: nn.Module, images: Tensor, precision: str) -> Tensor:
    """images (B, C, H, W) uint8 -> moments of the images and of their mirror images, (B, 2, 2C, h, w) fp16."""
    if not len(images):
        return images
    x = to_unit_range(images)
    with autocast(x.device, precision):
        return torch.stack([autoencoder.moments(x), autoencoder.moments(x.flip(-1))], dim=1).half()


class RowFile:
    """A `.npy` file in which any number of processes write rows.

    Over NFS, a memory map, a file open for reading too, or a write that returns early may write whole pages, with outdated rows
    of other machines. So this file is opened for writing only, with O_DSYNC.
    """

    def __init__(self, path: Path):
        array = np.load(path, mmap_mode="r")
        self.path, self.dtype, self.start, self.stride = path, array.dtype, array.offset, array.strides[0]
        self.file = os.open(path, os.O_WRONLY | os.O_DSYNC)

    def write(self, indices: np.ndarray, rows: np.ndarray) -> None:
        try:
            ends = [*np.flatnonzero(np.diff(indices) != 1) + 1, len(indices)] if len(indices) else []
            for start, end in pairwise([0, *ends]):  # neighbours together
                content = rows[start:end].astype(self.dtype).tobytes()
                os.pwrite(self.file, content, self.start + int(indices[start]) * self.stride)
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror}") from None


def write(moments: RowFile, labels: RowFile, rows: np.ndarray, encoded: Tensor, found: np.ndarray) -> None:
    """Write a batch. The labels come last: they mark the rows as complete, or as left out."""
    read, encoded = np.flatnonzero(found != SKIPPED), encoded.cpu()
    moments.write(rows[read], encoded.numpy())
    found[[row for row, of_image in zip(read, encoded) if not of_image.isfinite().all()]] = NOT_FINITE
    labels.write(rows, found)


def finish(folder: Path, data: TrainingData, meta: dict, limit: float) -> None:
    """List the skipped images and mark the features as complete. Raises UserError if too many were skipped."""
    if (folder / "meta.json").exists():
        return
    labels = np.load(folder / "labels.npy", mmap_mode="r")
    if pending := int((labels == PENDING).sum()):
        raise UserError(f"--features-path {folder} lacks {pending} images; run the same command again to encode them")
    skipped = np.flatnonzero(labels < 0)
    write_text(folder / "skipped.txt", "".join(f"{why_skipped(data, row, labels[row])}\n" for row in skipped))
    if len(skipped) > limit:
        wrong = (labels == NOT_FINITE).sum()
        overflow = f" or encoded (the latents of {wrong} are not finite)" if wrong else ""
        raise UserError(f"{len(skipped)} of {len(data)} images cannot be read{overflow}, more than --max-skipped allows; they "
                        f"are listed in {folder / 'skipped.txt'}. Repair or remove them, then run the same command again")
    measured = measure_latents(folder, np.flatnonzero(labels >= 0)) if meta["normalise"] else {}
    write_json(folder / "meta.json", meta | measured | {"images": len(data) - len(skipped), "skipped": skipped.tolist()})
    (folder / "unfinished.json").unlink(missing_ok=True)


def measure_latents(folder: Path, rows: np.ndarray) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel of the raw latents: Var[z] = E[variance] + Var[mean] of the posteriors."""
    moments = np.load(folder / "moments.npy", mmap_mode="r")
    sums = torch.zeros(3, moments.shape[2] // 2, dtype=torch.float64)  # of means, squared means and variances
    for batch in tqdm(in_batches(len(rows), 1000), "measuring"):
        mean, log_variance = torch.from_numpy(moments[rows[batch]]).double().chunk(2, dim=2)  # (B, 2, C, h, w) each
        sums += torch.stack([part.sum(dim=(0, 1, 3, 4)) for part in (mean, mean**2, log_variance.clamp(NO_VARIANCE, 20).exp())])
    mean, square, variance = sums / (len(rows) * moments[0].size / (2 * sums.shape[1]))
    return {"latents_mean": mean.tolist(), "latents_std": (square - mean**2 + variance).sqrt().tolist()}


def why_skipped(data: TrainingData, row: int, label: int) -> str:
    if label == NOT_FINITE:
        return f"{file_of(data, row) or f'row {row}'}: its latents are not finite in fp16; another autoencoder may not overflow"
    try:
        data.__getitems__(Rows.plain([row]))
    except OSError as error:
        return cli.one_line(error)
    return f"row {row} could not be read at first"


if __name__ == "__main__":
    cli.run(main, build_parser())
