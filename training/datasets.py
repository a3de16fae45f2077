"""Data sets of images, by name or path; and features cached from them, by path."""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from runtime import UserError
from runtime.cli import one_line, shortened
from runtime.files import find_files, is_hidden
from runtime.pictures import EXTENSIONS, center_crop, open_rgb
from runtime.processes import World
from training.features import (
    EDM2Features,
    FastDiTFeatures,
    Features,
    LightningDiTFeatures,
    classes_of,
    listed_rows,
)
from training.parquet import ParquetImages, parquet_parts
from training.rows import Rows, TrainingData, mirror, readable_names

DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
FOLDER_IMAGE_SIZE = 256
PARTS = ("train", "training", "val", "valid", "validation", "test", "testing")  # of data sets, as folders are named
OTHER_PICTURES = (".heic", ".heif", ".jfif", ".jpe", ".avif", ".jxl", ".jp2", ".tga", ".svg", ".psd", ".dng", ".cr2", ".cr3",
                  ".nef", ".arw", ".exr", ".pnm", ".pbm", ".ico")  # endings that are told of, and not read
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
    """Pictures in files. They are read, converted to RGB and cropped on access.

    Args:
        remarks: sentences about what was left out.
    """

    kind, channels, flip, made_by, statistics = "images", 3, True, {}, None

    def __init__(self, files: Iterable[Path], labels: np.ndarray, classes: list[str], image_size: int | None,
                 remarks: list[str]):
        self.files = np.array([os.fsencode(file) for file in files])  # an array, whose memory workers share
        self.classes, self.remarks = classes, remarks
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.image_size = (image_size or FOLDER_IMAGE_SIZE,) * 2

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        pictures = [center_crop(open_rgb(os.fsdecode(file)), self.image_size[0]) for file in self.files[rows.indices]]
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        return mirror(images, rows.mirrored), self.labels[rows.indices]


def class_folders(path: Path, image_size: int | None) -> FolderImages:
    """A folder with one sub-folder of pictures per class.

    Raises:
        UserError: it holds the parts of a data set, such as `train` and `val`.
        OSError: it has no classes, or one of them has no pictures.
    """
    with os.scandir(path) as entries:
        entries = sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    folders = [entry.name for entry in entries if entry.is_dir()]
    if not folders:
        raise FileNotFoundError(f"`data_path` {path} is not a folder of classes, one sub-folder of pictures each")
    check_classes(path, folders)
    loose = [entry.name for entry in entries if is_read(entry.name) and not entry.is_dir()]
    listed = [find_files(path / name, EXTENSIONS + OTHER_PICTURES, apart_from=path) for name in folders]
    pictures = [[file for file in files if is_read(file.name)] for files in listed]
    remarks = [f"{len(loose):,} pictures are left out because they lie beside the classes, such as {loose[0]}"] if loose else []
    if other := Counter(file.suffix.lower() for file in itertools.chain(*listed) if not is_read(file.name)):
        counts = ", ".join(f"{count:,} {ending}" for ending, count in other.most_common())
        remarks.append(f"pictures are left out because these endings are not read: {counts} (read are {' '.join(EXTENSIONS)})")
    if empty := [name for name, found in zip(folders, pictures) if not found]:
        raise FileNotFoundError(f"`data_path` {path}: the class {empty[0]} has no pictures ({' '.join(EXTENSIONS)})"
                                + "".join(f"; {remark}" for remark in remarks))
    labels = np.repeat(np.arange(len(folders)), [len(found) for found in pictures])
    return FolderImages(itertools.chain(*pictures), labels, readable_names(folders), image_size, remarks)


def check_classes(path: Path, folders: list[str]) -> None:
    """Raises UserError if the folders below `path` are the parts of a data set: two or more, or one with folders in it; or if
    all of them hold the same two or more parts.
    """
    parts = parts_among(folders)
    if len(parts) > 1 or (parts == folders and next(os.walk(path / parts[0]), ("", [], []))[1]):
        likely = next((name for name in parts if name.lower().startswith("train")), parts[0])
        raise UserError(f"`data_path` {path} holds the parts {', '.join(parts)} of a data set, which are no classes; did you "
                        f"mean {path / likely}?")
    below = (parts_among(next(os.walk(path / name), ("", [], []))[1]) for name in folders)  # lazy: most have none
    if len(first := next(below)) > 1 and all(other == first for other in below):
        raise UserError(f"`data_path` {path}: each class holds the parts {', '.join(first)} of a data set, which would be "
                        f"mixed; move them apart, as {path / first[0] / folders[0]} in place of {path / folders[0] / first[0]}")


def parts_among(folders: Iterable[str]) -> list[str]:
    """Those of the names that are parts of a data set, sorted."""
    return sorted(name for name in folders if name.lower() in PARTS)


def listed_pictures(path: Path, names: list[str], labels: np.ndarray, image_size: int | None,
                    num_classes: int | None) -> FolderImages:
    """Pictures with the labels that EDM's dataset.json lists."""
    files, there = [path / name for name in names], find_files(path, EXTENSIONS)
    known = set(there)
    if absent := [file for file in files if file not in known and not file.is_file()]:
        raise FileNotFoundError(f"{len(absent):,} files of `data_path` {path}/dataset.json are missing, such as {absent[0]}")
    known = set(files)
    unlisted = [file for file in there if file not in known]
    remarks = [f"{len(unlisted):,} pictures are left out because dataset.json does not list them, such as {unlisted[0]}"
               ] if unlisted else []
    return FolderImages(files, labels, classes_of(path, labels, num_classes), image_size, remarks)


def is_read(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


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


def load_everywhere(world: World, name: str, load: Callable[[], TrainingData]) -> TrainingData:
    """`load` the data set of that name on all processes. Only the main one lists the files of a folder, or downloads."""
    return world.main_first(load) if name in NAMED else world.on_main(load)


def load_held_out(name: str, data: TrainingData, image_size: int | None = None, data_root: str = "data") -> TrainingData:
    """The held-out part of the training data `data`, whose labels it gets: a class may be missing, or left out.

    Raises:
        UserError: it holds something else than `data`, or none of its classes.
    """
    held_out = open_dataset(name, image_size, data_root, "val", len(data.classes))
    if held_out.kind != data.kind:
        raise UserError(f"the held-out part of `data_path` {name} holds {held_out.kind}, the training part {data.kind}")
    return held_out if held_out.classes == data.classes else SharedClasses(held_out, data.classes, name)


class SharedClasses(Dataset):
    """The samples of a held-out part whose class is one of `classes`, by name, with the labels of these."""

    def __init__(self, data: TrainingData, classes: list[str], name: str):
        theirs, ours = numbered(data.classes), numbered(classes)
        lacking, added = ([key[0] for key in some if key not in others] for some, others in ((ours, theirs), (theirs, ours)))
        if len(added) == len(theirs) or (added and not hasattr(data, "labels")):
            raise UserError(f"the held-out part of `data_path` {name} has the classes {shortened(added, 5)}; the training part "
                            f"has {shortened(classes, 5)}")
        self.data, self.classes = data, classes
        self.new_labels = torch.tensor([ours.get(key, -1) for key in theirs])
        self.rows = np.flatnonzero(self.new_labels[data.labels] >= 0) if added else np.arange(len(data))
        self.remarks = [*getattr(data, "remarks", []),
                        *([f"the held-out part lacks the classes {shortened(lacking)}"] if lacking else []),
                        *([f"of the held-out part the classes {shortened(added)} are left out: the training part lacks them"]
                          if added else [])]
        for member in ("kind", "image_size", "channels", "flip", "made_by", "statistics", "latent_shape"):
            if hasattr(data, member):
                setattr(self, member, getattr(data, member))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        batch, labels = self.data.__getitems__(Rows(self.rows[rows.indices], rows.mirrored))
        return batch, self.new_labels[labels]


def numbered(classes: list[str]) -> dict[tuple[str, int, int], int]:
    """(name, which one of this name, how many have it) -> label. ImageNet has two cranes and two maillots."""
    counts, seen = Counter(classes), Counter()
    labels = {}
    for label, name in enumerate(classes):
        seen[name] += 1
        labels[name, seen[name], counts[name]] = label
    return labels


def open_dataset(name: str, image_size: int | None, data_root: str, split: str, num_classes: int | None) -> TrainingData:
    if name in NAMED:
        data = NAMED[name](split, image_size, data_root)
        if Path(name).is_dir():
            data.remarks = [f"{name} is the data set of this name; for the folder say ./{name}"]
        return data
    path = Path(name)
    if not path.is_dir():
        raise FileNotFoundError(f"`data_path` {name} is neither a folder nor one of {', '.join(NAMED)}")
    if split == "val" and "val" in parquet_parts(path):
        return ParquetImages(path, split, image_size or FOLDER_IMAGE_SIZE, num_classes)
    folder = path if split == "train" else held_out_folder(path)
    if (folder / "moments.npy").exists():
        return Features(folder, image_size)
    if (folder / "imagenet256_features").is_dir():
        return FastDiTFeatures(folder, image_size, num_classes)
    for file in (folder / "dataset.json", folder / "vae-sd" / "dataset.json"):
        if rows := listed_rows(file):
            kind = EDM2Features if rows[0][0].endswith(".npy") else listed_pictures
            return kind(file.parent, *rows, image_size, num_classes)
    if any(folder.glob("*.safetensors")) and not any(path.is_dir() for path in folder.iterdir()):
        return LightningDiTFeatures(folder, image_size, num_classes)
    if parquet_parts(folder):
        return ParquetImages(folder, "train", image_size or FOLDER_IMAGE_SIZE, num_classes)
    return class_folders(folder, image_size)


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
    except (RuntimeError, OSError, AssertionError, ValueError, LookupError) as error:
        raw = Path(root) / kind / "raw"
        if not isinstance(error, OSError) and len(list(raw.glob("*-ubyte"))) == 4:  # torchvision only looks whether they exist
            raise OSError(f"`data_root` {root}: a file in {raw} is damaged: delete it, then it is made again") from None
        reason = one_line(error)[:200]
        raise FileNotFoundError(f"`data_root` {root}: {kind} is missing and cannot be downloaded: {reason}") from None


NAMED = {"digits": digits, "mnist": mnist, "cifar10": cifar10}  # (split, image_size, data_root) -> data set


def held_out_folder(path: Path) -> Path:
    """The folder `val` or `test` beside a folder `train`."""
    for name in ("val", "test"):
        if path.name == "train" and (path.parent / name).is_dir():
            return path.parent / name
    raise FileNotFoundError(f"no held-out images: `data_path` {path} is not a folder train with a folder val or test beside it")
