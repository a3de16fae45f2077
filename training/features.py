"""Features cached from images: those of extract_features.py, and those of fast-DiT, EDM2, REPA and LightningDiT."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from pipeline import checkpoint
from pipeline.autoencoders import without_variance
from pipeline.spec import default_class_names
from runtime import UserError
from runtime.cli import prefix_errors
from training.rows import Rows

META = {"classes", "channels", "flip", "image_size", "latent_shape", "autoencoder", "skipped", "rows"}  # keys of a meta.json


class Features(Dataset):
    """The output of extract_features.py: `moments.npy` (N, 2, 2C, h, w) fp16, of each image and of its mirror image;
    `labels.npy` (N,); and `meta.json`, written last. The files are memory-mapped: memory does not grow with N.
    """

    kind = "moments"

    def __init__(self, folder: Path, image_size: int | None):
        if not (folder / "meta.json").is_file():
            raise FileNotFoundError(f"`data_path` {folder}: the extraction of its features is not finished; the same "
                                    "extract_features.py command continues it")
        self.folder = folder
        with prefix_errors(f"`data_path` {folder}: its features are damaged:", TypeError, ValueError):
            meta = json.loads((folder / "meta.json").read_text())
            if missing := META - set(meta):
                raise UserError(f"meta.json lacks {', '.join(sorted(missing))}")
            self.classes, self.channels, self.flip = meta["classes"], meta["channels"], meta["flip"]
            self.image_size, self.latent_shape = tuple(meta["image_size"]), tuple(meta["latent_shape"])
            self.made_by = meta["autoencoder"]
            self.statistics = (meta["latents_mean"], meta["latents_std"]) if "latents_mean" in meta else None
            self.skipped = np.array(meta["skipped"], dtype=np.int64)  # ascending rows that hold no image
            self.map_files()
            self.check(meta["rows"])
        checked(folder, self.image_size, image_size)

    def map_files(self) -> None:
        self.moments, self.lines = (read_array(self.folder / f"{name}.npy", mmap_mode="r") for name in ("moments", "labels"))

    def check(self, rows: int) -> None:
        """Raises UserError if the arrays do not match meta.json."""
        channels, *size = self.latent_shape
        for name, array, shape in (("moments", self.moments, (rows, 2, 2 * channels, *size)), ("labels", self.lines, (rows,))):
            if array.shape != shape:
                raise UserError(f"{name}.npy has the shape {array.shape}; meta.json says {shape}")
        labels = self.labels
        if wrong := [row for row in (labels.argmin(), labels.argmax()) if not 0 <= labels[row] < len(self.classes)]:
            raise UserError(f"labels.npy holds the label {labels[wrong[0]]}; meta.json says {len(self.classes)} classes")

    @property
    def labels(self) -> np.ndarray:
        return np.delete(self.lines, self.skipped)

    def __getstate__(self) -> dict:  # pickling a map for a worker would copy all its data
        return {name: value for name, value in vars(self).items() if name not in ("moments", "lines")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.map_files()

    def __len__(self) -> int:
        return len(self.moments) - len(self.skipped)

    def __getitems__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        lines = rows.indices + np.searchsorted(self.skipped - np.arange(len(self.skipped)), rows.indices, side="right")
        moments = torch.from_numpy(self.moments[lines, rows.mirrored.astype(np.int64)])
        if not moments.sum(dtype=torch.float32).isfinite():  # 70 times as fast as isfinite() of each number
            row = lines[~moments.flatten(1).isfinite().all(dim=1).numpy()][0]
            raise UserError(f"`data_path` {self.folder}: row {row} of moments.npy is not finite; delete the folder, then "
                            "extract the features again, which leaves such rows out")
        return moments, torch.from_numpy(self.lines[lines].astype(np.int64))


class FastDiTFeatures(Dataset):
    """One file per sample, as fast-DiT's extract_features.py writes them: `imagenet256_features/{i}.npy` (1, C, h, w),
    already sampled and scaled, and `imagenet256_labels/{i}.npy` (1,). There are no mirror images.
    """

    kind = "latents"
    flip, one_sided = False, True
    channels = 3
    made_by, statistics = {"scaling_factor": 0.18215, "shift_factor": 0.0}, None
    FACTOR = 8  # image size / latent size of Stable Diffusion's autoencoder

    def __init__(self, folder: Path, image_size: int | None, num_classes: int | None):
        self.folder = folder
        stems = sorted(path.stem for path in (folder / "imagenet256_features").glob("*.npy"))
        self.stems = np.array([os.fsencode(stem) for stem in stems])  # text would take 4 bytes a character
        if not len(self.stems):
            raise FileNotFoundError(f"`data_path` {folder}: imagenet256_features holds no .npy files")
        self.latent_shape = self.read("features", os.fsdecode(self.stems[0])).shape[1:]
        self.image_size = checked(folder, tuple(self.FACTOR * side for side in self.latent_shape[1:]), image_size)
        self.classes = default_class_names(num_classes or 1000)

    def __len__(self) -> int:
        return len(self.stems)

    def __getitems__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        stems = [os.fsdecode(stem) for stem in self.stems[rows.indices]]
        latents = np.concatenate([self.read("features", stem, (1, *self.latent_shape)) for stem in stems])
        labels = np.concatenate([self.read("labels", stem, (1,)) for stem in stems]).astype(np.int64)
        for stem, latent, label in zip(stems, latents, labels):
            if not 0 <= label < len(self.classes):
                raise UserError(f"`num_classes` {len(self.classes)}: {self.folder} has the label {label}, of {stem}.npy")
            if not np.isfinite(latent).all():
                raise OSError(f"{self.folder}: imagenet256_features/{stem}.npy is not finite")
        return torch.from_numpy(latents).float(), torch.from_numpy(labels)

    def read(self, part: str, stem: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        path = self.folder / f"imagenet256_{part}" / f"{stem}.npy"
        array = read_array(path)
        if shape not in (None, array.shape):
            raise OSError(f"{path} has the shape {array.shape}; expected {shape}")
        return array


class EDM2Features(Dataset):
    """EDM2's and REPA's: one `.npy` a sample, float32 (2C, h, w), mean and standard deviation of Stable Diffusion's posterior;
    `dataset.json`, beside them or in `vae-sd`, lists their names and labels. There are no mirror images.
    """

    kind = "moments"
    flip, one_sided = False, True
    channels = 3
    made_by, statistics = FastDiTFeatures.made_by, None

    def __init__(self, folder: Path, names: list[str], labels: np.ndarray, image_size: int | None, num_classes: int | None):
        self.folder, self.labels = folder, labels
        self.names = np.array([os.fsencode(name) for name in names])
        moments = self.read(self.names[0])
        self.latent_shape = (moments.shape[0] // 2, *moments.shape[1:])
        self.image_size = checked(folder, tuple(FastDiTFeatures.FACTOR * side for side in moments.shape[1:]), image_size)
        self.classes = classes_of(folder, labels, num_classes)

    def __len__(self) -> int:
        return len(self.names)

    def __getitems__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        arrays = [self.read(name) for name in self.names[rows.indices]]
        mean, std = torch.from_numpy(np.stack(arrays)).float().chunk(2, dim=1)
        return torch.cat([mean, 2 * std.log()], dim=1), torch.from_numpy(self.labels[rows.indices])

    def read(self, name: bytes) -> np.ndarray:
        array = read_array(path := self.folder / os.fsdecode(name))
        shape = getattr(self, "latent_shape", None)
        if array.ndim != 3 or array.shape[0] % 2 or (shape and array.shape != (2 * shape[0], *shape[1:])):
            raise OSError(f"{path} has the shape {array.shape}; expected (2C, h, w), the same for all")
        if not (np.isfinite(array).all() and (array[len(array) // 2 :] >= 0).all()):
            raise OSError(f"{path} is not finite, or holds a negative standard deviation")
        return array


class LightningDiTFeatures(Dataset):
    """LightningDiT's: `*.safetensors`, each with `latents` and `latents_flip` (N, C, h, w), raw, and `labels` (N,); and
    `latents_stats.pt`, their mean and standard deviation. A latent has no variance.
    """

    kind = "moments"
    flip = True
    channels = 3
    made_by = {}
    FACTOR = 16  # image size / latent size of VA-VAE

    def __init__(self, folder: Path, image_size: int | None, num_classes: int | None):
        self.folder, self.files = folder, sorted(folder.glob("*.safetensors"))
        labels = [self.read(file, "labels") for file in self.files]
        self.labels = torch.cat(labels).long()
        self.ends = np.cumsum([len(part) for part in labels])  # of each file's rows
        self.latent_shape = self.shape(self.files[0], "latents")[1:]
        for file, part in zip(self.files, labels):
            expected = (len(part), *self.latent_shape)
            for name in ("latents", "latents_flip"):
                if (shape := self.shape(file, name)) != expected:
                    raise UserError(f"`data_path`: {name} of {file} has the shape {shape}; expected {expected}")
        self.image_size = checked(folder, tuple(self.FACTOR * side for side in self.latent_shape[1:]), image_size)
        self.classes = classes_of(folder, self.labels.numpy(), num_classes)
        with prefix_errors("`data_path`"):
            self.statistics = checkpoint.read_latent_statistics(folder)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        latents = torch.empty(len(rows.indices), *self.latent_shape)
        which = np.searchsorted(self.ends, rows.indices, side="right")
        for file in np.unique(which):
            start = self.ends[file - 1] if file else 0
            for name, mirrored in (("latents", False), ("latents_flip", True)):
                places = np.flatnonzero((which == file) & (rows.mirrored == mirrored))
                if len(places):
                    latents[places] = self.read(self.files[file], name, rows.indices[places] - start).float()
        if not latents.sum().isfinite():
            row = rows.indices[~latents.flatten(1).isfinite().all(dim=1).numpy()][0]
            raise UserError(f"`data_path` {self.folder}: the latent of row {row} is not finite")
        return without_variance(latents), self.labels[rows.indices]

    def read(self, file: Path, name: str, lines: np.ndarray | list[int] | None = None) -> Tensor:
        """A tensor of a file, or some of its lines."""
        with opened(file, name) as part:
            return part[:] if lines is None else torch.cat([part[int(line) : int(line) + 1] for line in lines])

    def shape(self, file: Path, name: str) -> tuple[int, ...]:
        with opened(file, name) as part:
            return tuple(part.get_shape())


def listed_rows(file: Path) -> tuple[list[str], np.ndarray] | None:
    """Names and labels in a dataset.json, which EDM writes beside pictures and EDM2 beside latents; None if it is missing."""
    if not file.is_file():
        return None
    with prefix_errors(f"`data_path` {file.parent}: dataset.json is damaged:", TypeError, ValueError, KeyError, AttributeError):
        rows = json.loads(file.read_text())["labels"]
        if rows is None:
            raise UserError("it has no labels (null); for one class, move all files into one folder, and delete dataset.json")
        if not rows:
            raise UserError("it lists no files")
        names, labels = map(list, zip(*rows))
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise UserError(f"it lists {wrong[0]!r}, which is not the name of a file")
        if not all(type(label) is int for label in labels):
            raise UserError(f"the label of {names[0]} is {labels[0]}; expected one integer for each file")
        return names, np.array(labels, dtype=np.int64)


@contextmanager
def opened(file: Path, name: str):
    """A tensor in a safetensors file, to be sliced. Raises OSError that names a damaged file."""
    try:
        with safe_open(file, "pt") as content:
            yield content.get_slice(name)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise OSError(f"cannot read {name} of {file}: {error}") from None


def checked(folder: Path, size: tuple[int, int], given: int | None) -> tuple[int, int]:
    """The size of the images that features were made of. Raises UserError if `given` is another one."""
    if given not in (None, size[0]):
        raise UserError(f"`image_size` {given}: the features in {folder} are of images of {size[0]}")
    return size


def classes_of(folder: Path, labels: np.ndarray, num_classes: int | None) -> list[str]:
    """Names for labels 0..num_classes-1, by default 0 to the highest that occurs.

    Raises:
        UserError: labels are not among these; or the highest is taken for an error, as it has more classes than rows.
    """
    if num_classes is None and labels.max() >= max(1000, len(labels)):
        raise UserError(f"{folder} has the label {labels.max()} in {len(labels):,} rows; if it is right, say `num_classes`")
    count = num_classes or int(labels.max()) + 1
    if not (0 <= labels.min() and labels.max() < count):
        raise UserError(f"`num_classes` {count}: {folder} has labels from {labels.min()} to {labels.max()}")
    return default_class_names(count)


def read_array(path: Path, **options: str) -> np.ndarray:
    """The array in a `.npy`. Raises OSError that names a damaged file."""
    try:
        return np.load(path, allow_pickle=False, **options)
    except (OSError, ValueError, EOFError) as error:
        raise OSError(f"cannot read {path}: {error}") from None
