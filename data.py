"""Data sets by name or path, and the order in which training reads them.

A data set answers `dataset.__getitems__(indices)` with a whole batch, images (B, C, H, W) uint8 and labels (B,) int64,
and has `classes` (names), `image_size` (H, W), `channels`, and `flip`: whether a mirror image is as good a picture.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

NAMED = ("digits", "mnist", "cifar10")
DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
FOLDER_IMAGE_SIZE = 256


class ArrayImages(Dataset):
    """Images in memory: uint8 (N, H, W) or (N, H, W, C), labels (N,)."""

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

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


class FolderImages(Dataset):
    """A folder of classes, one sub-folder of pictures each; read, made RGB and cropped as they are asked for."""

    channels = 3
    flip = True

    def __init__(self, path: Path, image_size: int | None):
        from torchvision.datasets import ImageFolder
        try:
            folder = ImageFolder(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--data-path {path} is not a folder of classes, one sub-folder of images each: "
                                    f"{error}") from None
        self.samples, self.classes = folder.samples, readable_names(folder.classes)
        self.image_size = (image_size or FOLDER_IMAGE_SIZE,) * 2

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        pictures = [center_crop(open_rgb(self.samples[i][0]), self.image_size[0]) for i in indices]
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor([self.samples[i][1] for i in indices])


def load_dataset(name: str, image_size: int | None = None, data_root: str = "data", split: str = "train") -> Dataset:
    """A data set by `--data-path`: a name in NAMED, or a folder of classes.

    Args:
        image_size: H = W; None keeps the size of a named set, and crops a folder's pictures to 256.
        data_root: where named sets lie, or are downloaded to.
        split: "train" or "val", the held-out part: the test part of a named set, the folder `val` or `test` beside a
            folder `train`.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"--image-size {image_size} is not positive")
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
    return FolderImages(path if split == "train" else held_out_folder(path), image_size)


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


def open_rgb(path: str) -> Image.Image:
    """A picture as RGB; greyscale, CMYK and transparent files become RGB."""
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # a damaged file fails in many ways
        raise OSError(f"cannot read the image {path}: {error}") from None


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
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, grad_accum: int = 1):
        if batch_size % (world_size * grad_accum):
            raise ValueError(f"--global-batch-size {batch_size} is not divisible by {world_size} processes * "
                             f"--grad-accum {grad_accum}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        size = batch_size // (world_size * grad_accum)
        starts = [(micro * world_size + rank) * size for micro in range(grad_accum)]
        self.rows = [slice(start, start + size) for start in starts]
        self._permutations: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> np.ndarray:
        """The samples of step `step`, from 0: (batch_size,)."""
        epochs, positions = np.divmod(np.arange(step * self.batch_size, (step + 1) * self.batch_size), self.length)
        return np.concatenate([self._permutation(epoch)[positions[epochs == epoch]] for epoch in np.unique(epochs)])

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

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            batch = self.order.batch(step)
            for rows in self.order.rows:
                yield batch[rows].tolist()


def load_batches(dataset: Dataset, order: GlobalOrder, steps: range, num_workers: int,
                 device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's micro-batches, on `device`: images (B, C, H, W) uint8, labels (B,).

    The next one is on its way while one is used.
    """
    loader = DataLoader(dataset, batch_sampler=MicroBatches(order, steps), num_workers=num_workers, collate_fn=as_is,
                        pin_memory=device.type == "cuda")
    upcoming = None
    for images, labels in without_worker_traceback(loader):
        ready, upcoming = upcoming, (images.to(device, non_blocking=True), labels.to(device, non_blocking=True))
        if ready is not None:
            yield ready
    if upcoming is not None:
        yield upcoming


def without_worker_traceback(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; an unreadable file that a worker met is told in the words of `open_rgb`."""
    try:
        yield from loader
    except OSError as error:
        raise OSError(str(error).strip().splitlines()[-1].removeprefix("OSError: ")) from None


def as_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1
