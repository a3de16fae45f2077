"""Data sets by name or path, features cached from them, the order in which training reads them, and sets of whole images.

A data set answers `dataset.__getitems__(rows)` with a whole batch, (B, ...) and labels (B,) int64. It has
    kind                    what the batch holds:
        "images"            (B, C, H, W) uint8
        "moments"           (B, 2C, h, w) fp16: mean and log-variance of an autoencoder's posterior
        "latents"           (B, C, h, w) fp32, ready to be noised
    classes                 names
    image_size, channels    (H, W) and C of the images, cached or not
    flip                    whether a mirror image is as good a picture, and at hand
    made_by                 what is known of the autoencoder of cached features; they have `latent_shape` (C, h, w) too
"""

import atexit
import json
import os
import signal
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

NAMED = ("digits", "mnist", "cifar10")
DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
FOLDER_IMAGE_SIZE = 256


class Rows(NamedTuple):
    """Which samples to read, (B,) int64, and which of them as mirror images, (B,) bool."""

    indices: np.ndarray
    mirrored: np.ndarray

    @classmethod
    def plain(cls, indices: np.ndarray) -> "Rows":
        return cls(np.asarray(indices), np.zeros(len(indices), dtype=bool))


class ArrayImages(Dataset):
    """Images in memory: uint8 (N, H, W) or (N, H, W, C), labels (N,)."""

    kind, made_by = "images", {}

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: list[str], flip: bool, image_size: int | None):
        images = images[..., None] if images.ndim == 3 else images
        if image_size not in (None, images.shape[1]):
            images = np.stack([np.atleast_3d(center_crop(Image.fromarray(i.squeeze()), image_size)) for i in images])
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.classes, self.flip = classes, flip
        self.channels, self.image_size = self.images.shape[1], tuple(self.images.shape[2:])

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        return mirror(self.images[rows.indices], rows.mirrored), self.labels[rows.indices]


class FolderImages(Dataset):
    """A folder of classes, one sub-folder of pictures each; read, made RGB and cropped as they are asked for."""

    kind, made_by = "images", {}
    channels = 3
    flip = True

    def __init__(self, path: Path, image_size: int | None):
        from torchvision.datasets import ImageFolder
        try:
            folder = ImageFolder(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--data-path {path} is not a folder of classes, one sub-folder of images each: "
                                    f"{error}") from None
        self.paths = np.array([path for path, _ in folder.samples])  # arrays: worker processes share their memory
        self.labels = torch.tensor([label for _, label in folder.samples])
        self.classes = readable_names(folder.classes)
        self.image_size = (image_size or FOLDER_IMAGE_SIZE,) * 2

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        pictures = [center_crop(open_rgb(path), self.image_size[0]) for path in self.paths[rows.indices]]
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        return mirror(images, rows.mirrored), self.labels[rows.indices]


class Features(Dataset):
    """What extract_features.py wrote: `moments.npy` (N, 2, 2C, h, w) fp16, of each image and of its mirror image;
    `labels.npy` (N,); and `meta.json`, written last. Read where it lies: memory does not grow with N.
    """

    kind = "moments"

    def __init__(self, folder: Path, image_size: int | None):
        if not (folder / "meta.json").is_file():
            raise FileNotFoundError(f"--data-path {folder}: the extraction of its features is not finished; the same "
                                    "extract_features.py command goes on with it")
        self.folder, meta = folder, json.loads((folder / "meta.json").read_text())
        self.classes, self.channels, self.flip = meta["classes"], meta["channels"], meta["flip"]
        self.image_size, self.latent_shape = tuple(meta["image_size"]), tuple(meta["latent_shape"])
        self.made_by = meta["autoencoder"]
        self.map_files()
        if image_size not in (None, self.image_size[0]):
            raise ValueError(f"--image-size {image_size}: the features in {folder} are of images of {self.image_size[0]}")
        if len(self.moments) != meta["rows"] or self.moments.shape[2:] != (2 * self.latent_shape[0], *self.latent_shape[1:]):
            raise ValueError(f"--data-path {folder}: moments.npy has the shape {self.moments.shape}, meta.json tells otherwise")
        self.skipped = np.array(meta["skipped"], dtype=np.int64)  # ascending rows that hold no image

    def map_files(self) -> None:
        try:
            self.moments, self.labels = (np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("moments", "labels"))
        except ValueError as error:
            raise OSError(f"--data-path {self.folder}: a file of features is damaged: {error}") from None

    def __getstate__(self) -> dict:  # a map would be sent to a worker process as all that is in it
        return {name: value for name, value in vars(self).items() if name not in ("moments", "labels")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.map_files()

    def __len__(self) -> int:
        return len(self.moments) - len(self.skipped)

    def __getitems__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        passed = np.searchsorted(self.skipped - np.arange(len(self.skipped)), rows.indices, side="right")
        lines = rows.indices + passed
        return (torch.from_numpy(self.moments[lines, rows.mirrored.astype(np.int64)]),
                torch.from_numpy(self.labels[lines].astype(np.int64)))


class FastDiTFeatures(Dataset):
    """One file a sample, as fast-DiT's extract_features.py writes them: `imagenet256_features/{i}.npy` (1, C, h, w),
    sampled and scaled already, and `imagenet256_labels/{i}.npy` (1,). There are no mirror images.
    """

    kind = "latents"
    flip = False
    channels = 3
    made_by = {"scaling_factor": 0.18215, "shift_factor": 0.0}
    FACTOR = 8  # of the images' size, in Stable Diffusion's autoencoder

    def __init__(self, folder: Path, image_size: int | None, num_classes: int | None):
        self.folder = folder
        self.stems = np.array(sorted(path.stem for path in (folder / "imagenet256_features").glob("*.npy")))
        if not len(self.stems):
            raise FileNotFoundError(f"--data-path {folder}: imagenet256_features holds no .npy files")
        self.latent_shape = self.read("features", self.stems[0]).shape[1:]
        self.image_size = tuple(self.FACTOR * size for size in self.latent_shape[1:])
        if image_size not in (None, self.image_size[0]):
            raise ValueError(f"--image-size {image_size}: the features in {folder} are of images of {self.image_size[0]}")
        self.classes = imagenet_names() if num_classes in (None, 1000) else [str(i) for i in range(num_classes)]

    def __len__(self) -> int:
        return len(self.stems)

    def __getitems__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        stems = self.stems[rows.indices]
        latents = np.concatenate([self.read("features", stem) for stem in stems])
        labels = np.concatenate([self.read("labels", stem) for stem in stems]).astype(np.int64)
        if labels.min() < 0 or labels.max() >= len(self.classes):
            raise ValueError(f"--num-classes {len(self.classes)}: {self.folder} has the label {labels.max()}")
        return torch.from_numpy(latents).float(), torch.from_numpy(labels)

    def read(self, part: str, stem: str) -> np.ndarray:
        path = self.folder / f"imagenet256_{part}" / f"{stem}.npy"
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise OSError(f"cannot read {path}: {error}") from None


def load_dataset(name: str, image_size: int | None = None, data_root: str = "data", split: str = "train",
                 num_classes: int | None = None) -> Dataset:
    """A data set by `--data-path`: a name in NAMED, a folder of classes, or of features cached from one.

    Args:
        image_size: H = W; None keeps the size of a named set, and crops a folder's pictures to 256.
        data_root: where named sets lie, or are downloaded to.
        split: "train" or "val", the held-out part: the test part of a named set, the folder `val` or `test` beside a
            folder `train`.
        num_classes: must be the data's; only fast-DiT's features do not tell (1,000 by default).
    """
    dataset = open_dataset(name, image_size, data_root, split, num_classes)
    if num_classes not in (None, len(dataset.classes)):
        raise ValueError(f"--num-classes {num_classes}: {name} has {len(dataset.classes)} classes")
    return dataset


def open_dataset(name: str, image_size: int | None, data_root: str, split: str, num_classes: int | None) -> Dataset:
    match name:
        case "digits":
            return digits(split, image_size)
        case "mnist":
            mnist = torchvision_dataset("MNIST", data_root, split)
            return ArrayImages(mnist.data.numpy(), mnist.targets, DIGIT_NAMES, flip=False, image_size=image_size)
        case "cifar10":
            cifar = torchvision_dataset("CIFAR10", data_root, split)
            return ArrayImages(cifar.data, cifar.targets, cifar.classes, flip=True, image_size=image_size)
    path = Path(name)
    if not path.is_dir():
        raise FileNotFoundError(f"--data-path {name} is neither a folder nor one of {', '.join(NAMED)}")
    folder = path if split == "train" else held_out_folder(path)
    if (folder / "moments.npy").exists():
        return Features(folder, image_size)
    if (folder / "imagenet256_features").is_dir():
        return FastDiTFeatures(folder, image_size, num_classes)
    return FolderImages(folder, image_size)


def digits(split: str, image_size: int | None) -> ArrayImages:
    """scikit-learn's 1,797 scans of digits, 8x8; a quarter, stratified, is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    images, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    return ArrayImages(images, labels, DIGIT_NAMES, flip=False, image_size=image_size)


def torchvision_dataset(kind: str, root: str, split: str) -> Dataset:
    """MNIST or CIFAR10: as it lies under `root`, else downloaded to it."""
    import torchvision

    dataset = getattr(torchvision.datasets, kind)
    try:
        return dataset(root, train=split == "train", download=True)  # downloads nothing that is already there
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
    raise FileNotFoundError(f"--data-root {root}: {kind} is not there and cannot be downloaded: {reason}")


def held_out_folder(path: Path) -> Path:
    """The folder `val` or `test` beside a folder `train`."""
    for name in ("val", "test"):
        if path.name == "train" and (path.parent / name).is_dir():
            return path.parent / name
    raise FileNotFoundError(f"--val-every needs held-out images: a folder val or test beside a folder train; "
                            f"--data-path is {path}")


def readable_names(folders: list[str]) -> list[str]:
    """English names for ImageNet's folders (n02099601 -> golden retriever); any other name as it is."""
    from timm.data import ImageNetInfo

    imagenet = ImageNetInfo()
    known = set(imagenet.label_names())
    return [imagenet.label_name_to_description(name) if name in known else name for name in folders]


def imagenet_names() -> list[str]:
    from timm.data import ImageNetInfo
    return readable_names(ImageNetInfo().label_names())


def mirror(images: Tensor, mirrored: np.ndarray) -> Tensor:
    """Mirror those of the images (B, C, H, W) that are to be."""
    if not mirrored.any():
        return images
    return torch.where(torch.from_numpy(mirrored).view(-1, 1, 1, 1), images.flip(-1), images)


@contextmanager
def picture(path: str | Path) -> Iterator[Image.Image]:
    """An image file, opened; its header is read, its pixels when they are asked for. OSError that names a damaged one."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # a damaged file fails in many ways
        raise OSError(f"cannot read the image {path}: {error}") from None


def open_rgb(path: str | Path) -> Image.Image:
    """A picture as RGB; greyscale, CMYK and transparent files become RGB."""
    with picture(path) as image:
        return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop: halve by boxes while that stays large enough, bicubic to the shorter side, cut out the middle.

    Returns: (size, size, 3) uint8, or (size, size) of a greyscale image.
    """
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


# --- the order of training -----------------------------------------------------------------------


class GlobalOrder:
    """Which samples step k reads: a new permutation each epoch, a function of (seed, epoch, position) and nothing else.

    Batches run on across the end of an epoch, so that every sample is read equally often.

    Args:
        length: samples of the data set.
        batch_size: of the global batch, over all processes.
        rank, world_size, grad_accum: of this process; `rows` are the rows of a global batch that its micro-batches take.
        flip: whether half of the samples, drawn from (seed, step), are read as mirror images.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, grad_accum: int = 1,
                 flip: bool = False):
        if batch_size % (world_size * grad_accum):
            raise ValueError(f"--global-batch-size {batch_size} is not divisible by {world_size} processes * "
                             f"--grad-accum {grad_accum}")
        self.length, self.batch_size, self.seed, self.flip = length, batch_size, seed, flip
        size = batch_size // (world_size * grad_accum)
        starts = [(micro * world_size + rank) * size for micro in range(grad_accum)]
        self.rows = [slice(start, start + size) for start in starts]
        self._permutations: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> Rows:
        """The global batch of step `step`, from 0."""
        epochs, positions = np.divmod(np.arange(step * self.batch_size, (step + 1) * self.batch_size), self.length)
        indices = [self._permutation(epoch)[positions[epochs == epoch]] for epoch in np.unique(epochs)]
        mirrored = np.random.default_rng((self.seed, step, 1)).random(self.batch_size) < (0.5 if self.flip else 0.0)
        return Rows(np.concatenate(indices), mirrored)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            self._permutations = {key: value for key, value in self._permutations.items() if key == epoch - 1}
            self._permutations[epoch] = np.random.default_rng((self.seed, epoch)).permutation(self.length)
        return self._permutations[epoch]


class MicroBatches:
    """Batch sampler: the samples of each of this process's micro-batches, step after step."""

    def __init__(self, order: GlobalOrder, steps: range):
        self.order, self.steps = order, steps

    def __len__(self) -> int:
        return len(self.steps) * len(self.order.rows)

    def __iter__(self) -> Iterator[Rows]:
        for step in self.steps:
            batch = self.order.batch(step)
            for rows in self.order.rows:
                yield Rows(*(part[rows] for part in batch))


class Batches:
    """Iterator over this process's micro-batches, on `device`; the next one is on its way while one is used.

    `waited` counts the seconds that the reader spent waiting for data.
    """

    def __init__(self, dataset: Dataset, order: GlobalOrder, steps: range, num_workers: int, device: torch.device):
        self.device, self.waited = device, 0.0
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # beside the stream that computes
        self.loader = read_ahead(dataset, MicroBatches(order, steps), num_workers, pin_memory=device.type == "cuda")
        self.upcoming = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        ready = self.upcoming or self._fetch()
        if self.copies and ready:
            torch.cuda.current_stream().wait_stream(self.copies)
            for part in ready:
                part.record_stream(torch.cuda.current_stream())
        self.upcoming = self._fetch()
        self.waited += time.perf_counter() - start
        if ready is None:
            raise StopIteration
        return ready

    def read_waited(self) -> float:
        """The seconds since the last reading."""
        waited, self.waited = self.waited, 0.0
        return waited

    def _fetch(self) -> tuple[Tensor, Tensor] | None:
        batch = next(self.loader, None)
        with torch.cuda.stream(self.copies):  # no stream is the current one
            return batch and tuple(part.to(self.device, non_blocking=True) for part in batch)


def read_ahead(dataset: Dataset, batches: object, num_workers: int, pin_memory: bool = False) -> Iterator:
    """What the data set answers to each element of `batches`, in order, read by worker processes."""
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=as_is, pin_memory=pin_memory,
                        worker_init_fn=leave_signals_to_the_parent)
    reader = in_one_line(loader)
    atexit.register(reader.close)  # ends the workers, who do not hear the signal that Python would end them with
    return reader


def in_one_line(loader: DataLoader) -> Iterator:
    """The batches; what a worker raised is told without the worker's traceback.

    Raises:
        OSError: a file cannot be read, or a worker died.
    """
    try:
        yield from loader
    except (OSError, ValueError) as error:
        raise type(error)(str(error).strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(f"a data worker died ({error}); was it killed for lack of memory? Try fewer --num-workers") from None


def leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and torchrun's SIGTERM reach the whole process group; the parent shall still get its batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def as_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


# --- sets of whole images, to be evaluated --------------------------------------------------------
# `len(images)`; `images.size` (H, W); `images.labels` (N,) or None; and
# `images.read(batches)`, which yields (B, H, W, 3) uint8 for each of the batches (B,) of indices


def open_images(source: str, flag: str, size: tuple[int, int] | None = None, data_root: str = "data", split: str = "val"):
    """A set of images: an `.npz` as ADM's, a folder of pictures, or the part `split` of a named data set.

    Args:
        flag: what the user calls the set, for errors.
        size: (H, W) to bring a named set to; files are taken as they are.
    """
    path = Path(source)
    if source in NAMED:
        return NamedImages(load_dataset(source, size and size[0], data_root, split))
    if path.is_dir():
        return PictureFolder(path, flag)
    if not path.is_file():
        raise FileNotFoundError(f"{flag} {source} does not exist; expected an .npz, a folder of images, or one of "
                                f"{', '.join(NAMED)}")
    return NpzImages(path, flag)


class NpzImages:
    """`arr_0` (N, H, W, 3) uint8 of an `.npz`, read as it is asked for; `arr_1`, if there, holds the labels (N,).

    Nothing in it is unpickled.
    """

    def __init__(self, path: Path, flag: str = "the file"):
        self.path, self.name = path, f"{flag} {path}"
        with told_as_damage(self.name), zipfile.ZipFile(path) as file:
            self.arrays = array_names(file)
            if "arr_0" not in self.arrays:
                raise ValueError(f"{self.name} has no arr_0 among its arrays ({', '.join(self.arrays) or 'none'}); "
                                 "expected images (N, H, W, 3) uint8 as arr_0")
            with file.open("arr_0.npy") as array:
                shape, fortran_order, dtype = npy_header(array, self.name)
                self.start = array.tell()
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran_order:
            raise ValueError(f"{self.name}: arr_0 is {'object' if dtype.hasobject else dtype} {shape}"
                             f"{' in Fortran order' if fortran_order else ''}; expected uint8 (N, H, W, 3)"
                             f"{', as np.ascontiguousarray makes it' if fortran_order else ''}")
        self.count, self.size = shape[0], shape[1:3]

    def __len__(self) -> int:
        return self.count

    @cached_property
    def labels(self) -> np.ndarray | None:
        """ValueError where there are other labels than integers, one an image."""
        if "arr_1" not in self.arrays:
            return None
        with told_as_damage(self.name), zipfile.ZipFile(self.path) as file, file.open("arr_1.npy") as array:
            shape, _, dtype = npy_header(array, self.name)
            if shape != (self.count,) or dtype.kind not in "iu":
                raise ValueError(f"{self.name}: arr_1 is {'object' if dtype.hasobject else dtype} {shape}; expected labels, "
                                 f"integers ({self.count},)")
            content = array.read()
            if len(content) != self.count * dtype.itemsize:
                raise EOFError("arr_1 ends early")
            return np.frombuffer(content, dtype=dtype).astype(np.int64)

    def read(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Indices should ascend from batch to batch: a step back reads the file from its beginning."""
        with told_as_damage(self.name), zipfile.ZipFile(self.path) as file, file.open("arr_0.npy") as array:
            for indices in batches:
                images = np.empty((len(indices), *self.size, 3), dtype=np.uint8)
                for image, index in zip(images, indices):
                    array.seek(self.start + int(index) * image.nbytes)
                    if array.readinto(image.reshape(-1)) != image.nbytes:
                        raise EOFError("arr_0 ends early")
                yield images


class PictureFolder:
    """All pictures of a folder and the folders in it, in the order of their paths, as RGB; all of one size."""

    labels = None

    def __init__(self, path: Path, flag: str):
        from torchvision.datasets.folder import IMG_EXTENSIONS
        self.paths = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        if not self.paths:
            raise FileNotFoundError(f"{flag} {path}: the folder holds no images ({' '.join(IMG_EXTENSIONS)})")
        self.threads = ThreadPoolExecutor()  # pictures are decoded without Python's lock
        sizes = list(self.threads.map(picture_size, self.paths))
        for file, size in zip(self.paths, sizes):
            if size != sizes[0]:
                raise ValueError(f"{flag} {path}: the images must be of one size; {self.paths[0].relative_to(path)} is "
                                 f"{sizes[0][1]}x{sizes[0][0]}, {file.relative_to(path)} {size[1]}x{size[0]} (width x height)")
        self.size = sizes[0]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for indices in batches:
            yield np.stack(list(self.threads.map(lambda index: np.asarray(open_rgb(self.paths[index])), indices)))


class NamedImages:
    """A named data set; greyscale images become RGB, as sample_ddp.py writes them."""

    def __init__(self, dataset: ArrayImages):
        self.images, self.labels, self.size = dataset.images, dataset.labels.numpy(), dataset.image_size

    def __len__(self) -> int:
        return len(self.images)

    def read(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for indices in batches:
            yield self.images[indices].permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()


def picture_size(path: Path) -> tuple[int, int]:
    """(H, W), without reading the pixels."""
    with picture(path) as image:
        return image.size[::-1]


def in_batches(count: int, size: int) -> list[np.ndarray]:
    """0..count-1, so many at a time."""
    return np.split(np.arange(count), range(size, count, size))


@contextmanager
def told_as_damage(name: str):
    """What a damaged `.npz` raises while it is read, as an OSError of one line."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise OSError(f"{name} is truncated or no .npz: {error}") from None


def array_names(file: zipfile.ZipFile) -> list[str]:
    """The arrays of an `.npz`."""
    return [name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy")]


def npy_header(array: zipfile.ZipExtFile, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and type of a `.npy`, of which the header is read: nothing is unpickled."""
    try:
        version = np.lib.format.read_magic(array)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(array)
    except ValueError as error:
        raise OSError(f"{name} is damaged: {error}") from None


def save_npz(path: Path, shape: tuple[int, ...], images: Iterable[np.ndarray], **arrays: np.ndarray) -> None:
    """Write an `.npz`, whole or not at all: `arr_0` of that shape, uint8, which comes in blocks, and the other arrays."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file:
            with file.open("arr_0.npy", "w", force_zip64=True) as array:
                np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for block in images:
                    array.write(block.tobytes())
            for name, values in arrays.items():
                with file.open(f"{name}.npy", "w") as array:
                    np.lib.format.write_array(array, np.asarray(values), allow_pickle=False)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None
