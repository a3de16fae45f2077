"""Data sets of images, by name or path; and features cached from them, by path."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from runtime import UserError
from runtime.cli import one_line
from runtime.files import find_files
from runtime.pictures import EXTENSIONS, center_crop, open_rgb
from training.features import EDM2Features, FastDiTFeatures, Features, LightningDiTFeatures, edm2_rows
from training.parquet import ParquetImages, parquet_parts
from training.rows import Rows, TrainingData, mirror, readable_names

DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
FOLDER_IMAGE_SIZE = 256
MAX_BYTES = 16e9  # of a data set in memory


class ArrayImages(Dataset):
    """Images in memory: uint8 (N, H, W) or (N, H, W, C), labels (N,)."""

    kind, made_by, statistics = "images", {}, None

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: list[str], flip: bool, image_size: int | None):
        images = images[..., None] if images.ndim == 3 else images
        if image_size not in (None, images.shape[1]):
            if (size := len(images) * image_size**2 * images.shape[3]) > MAX_BYTES:
                raise UserError(f"`image_size` {image_size}: these {len(images):,} images are kept in memory and would take "
                                f"{size / 1e9:.0f} GB")
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
    """A folder with one sub-folder of pictures per class. Pictures are read, converted to RGB and cropped on access."""

    kind, channels, flip, made_by, statistics = "images", 3, True, {}, None

    def __init__(self, path: Path, image_size: int | None):
        folders = sorted(name for name in os.listdir(path) if (path / name).is_dir() and not name.startswith("."))
        pictures = [find_files(path / name, EXTENSIONS, apart_from=path) for name in folders]
        if not folders:
            raise FileNotFoundError(f"`data_path` {path} is not a folder of classes, one sub-folder of pictures each")
        if empty := [name for name, found in zip(folders, pictures) if not found]:
            raise FileNotFoundError(f"`data_path` {path}: the class {empty[0]} has no pictures ({' '.join(EXTENSIONS)})")
        self.paths = np.array([str(file) for found in pictures for file in found])  # arrays: workers share their memory
        self.labels = torch.tensor([label for label, found in enumerate(pictures) for _ in found])
        self.classes = readable_names(folders)
        self.image_size = (image_size or FOLDER_IMAGE_SIZE,) * 2

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        pictures = [center_crop(open_rgb(str(path)), self.image_size[0]) for path in self.paths[rows.indices]]
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        return mirror(images, rows.mirrored), self.labels[rows.indices]


def load_dataset(name: str, image_size: int | None = None, data_root: str = "data", split: str = "train",
                 num_classes: int | None = None) -> TrainingData:
    """Load a data set: one in NAMED, a folder of classes or of parquet files, or features cached from either.

    Args:
        name: a name in NAMED, or the path of a folder.
        image_size: H = W; None keeps the size of a named set, and crops a folder's pictures to 256.
        data_root: folder of the named sets, which are downloaded to it if missing.
        split: "train" or "val" (held-out images): the test part of a named set, the validation part of parquet
            files, the folder `val` or `test` beside a folder `train`.
        num_classes: must match the data. Features without names have as many classes as it says, by default 1,000 (fast-DiT)
            or the highest label + 1.
    """
    dataset = open_dataset(name, image_size, data_root, split, num_classes)
    if num_classes not in (None, len(dataset.classes)):
        raise UserError(f"`num_classes` {num_classes}: {name} has {len(dataset.classes)} classes")
    return dataset


def open_dataset(name: str, image_size: int | None, data_root: str, split: str, num_classes: int | None) -> TrainingData:
    if name in NAMED:
        return NAMED[name](split, image_size, data_root)
    path = Path(name)
    if not path.is_dir():
        raise FileNotFoundError(f"`data_path` {name} is neither a folder nor one of {', '.join(NAMED)}")
    if split == "val" and "val" in parquet_parts(path):
        return ParquetImages(path, split, image_size or FOLDER_IMAGE_SIZE)
    folder = path if split == "train" else held_out_folder(path)
    if (folder / "moments.npy").exists():
        return Features(folder, image_size)
    if (folder / "imagenet256_features").is_dir():
        return FastDiTFeatures(folder, image_size, num_classes)
    for file in (folder / "dataset.json", folder / "vae-sd" / "dataset.json"):
        if rows := edm2_rows(file):
            return EDM2Features(file.parent, *rows, image_size, num_classes)
    if any(folder.glob("*.safetensors")) and not any(path.is_dir() for path in folder.iterdir()):
        return LightningDiTFeatures(folder, image_size, num_classes)
    if parquet_parts(folder):
        return ParquetImages(folder, "train", image_size or FOLDER_IMAGE_SIZE)
    return FolderImages(folder, image_size)


def digits(split: str, image_size: int | None, data_root: str) -> ArrayImages:
    """scikit-learn's 1,797 scans of digits, 8x8. A stratified quarter is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    images, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    return ArrayImages(images, labels, DIGIT_NAMES, flip=False, image_size=image_size)


def mnist(split: str, image_size: int | None, data_root: str) -> ArrayImages:
    found = torchvision_dataset("MNIST", data_root, split)
    return ArrayImages(found.data.numpy(), found.targets, DIGIT_NAMES, flip=False, image_size=image_size)


def cifar10(split: str, image_size: int | None, data_root: str) -> ArrayImages:
    found = torchvision_dataset("CIFAR10", data_root, split)
    return ArrayImages(found.data, found.targets, found.classes, flip=True, image_size=image_size)


def torchvision_dataset(kind: str, root: str, split: str) -> Dataset:
    import torchvision

    try:
        return getattr(torchvision.datasets, kind)(root, train=split == "train", download=True)  # only what is missing
    except (RuntimeError, OSError) as error:
        reason = one_line(error)[:200]
        raise FileNotFoundError(f"`data_root` {root}: {kind} is missing and cannot be downloaded: {reason}") from None


NAMED = {"digits": digits, "mnist": mnist, "cifar10": cifar10}  # (split, image_size, data_root) -> data set


def held_out_folder(path: Path) -> Path:
    """The folder `val` or `test` beside a folder `train`."""
    for name in ("val", "test"):
        if path.name == "train" and (path.parent / name).is_dir():
            return path.parent / name
    raise FileNotFoundError(f"no held-out images: `data_path` {path} is not a folder train with a folder val or test beside it")
