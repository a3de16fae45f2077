"""Features cached from images: those of extract_features.py, and fast-DiT's."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.spec import imagenet_classes
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
                                    "extract_features.py command goes on with it")
        self.folder = folder
        with prefix_errors(f"`data_path` {folder}: its features are damaged:", TypeError, ValueError):
            meta = json.loads((folder / "meta.json").read_text())
            if missing := META - set(meta):
                raise UserError(f"meta.json lacks {', '.join(sorted(missing))}")
            self.classes, self.channels, self.flip = meta["classes"], meta["channels"], meta["flip"]
            self.image_size, self.latent_shape = tuple(meta["image_size"]), tuple(meta["latent_shape"])
            self.made_by = meta["autoencoder"]
            self.skipped = np.array(meta["skipped"], dtype=np.int64)  # ascending rows that hold no image
            self.map_files()
            self.check(meta["rows"])
        if image_size not in (None, self.image_size[0]):
            raise UserError(f"`image_size` {image_size}: the features in {folder} are of images of {self.image_size[0]}")

    def map_files(self) -> None:
        self.moments, self.labels = (read_array(self.folder / f"{name}.npy", mmap_mode="r") for name in ("moments", "labels"))

    def check(self, rows: int) -> None:
        """Raises UserError if the arrays are not what meta.json tells."""
        channels, *size = self.latent_shape
        for name, array, shape in (("moments", self.moments, (rows, 2, 2 * channels, *size)), ("labels", self.labels, (rows,))):
            if array.shape != shape:
                raise UserError(f"{name}.npy has the shape {array.shape}; meta.json tells {shape}")
        labels = np.delete(self.labels, self.skipped)
        if wrong := [row for row in (labels.argmin(), labels.argmax()) if not 0 <= labels[row] < len(self.classes)]:
            raise UserError(f"labels.npy holds the label {labels[wrong[0]]}; meta.json tells {len(self.classes)} classes")

    def __getstate__(self) -> dict:  # pickling a map for a worker would copy all its data
        return {name: value for name, value in vars(self).items() if name not in ("moments", "labels")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.map_files()

    def __len__(self) -> int:
        return len(self.moments) - len(self.skipped)

    def __getitems__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        passed = np.searchsorted(self.skipped - np.arange(len(self.skipped)), rows.indices, side="right")
        lines = rows.indices + passed
        moments = torch.from_numpy(self.moments[lines, rows.mirrored.astype(np.int64)])
        if not moments.sum(dtype=torch.float32).isfinite():  # 70 times as fast as isfinite() of each number
            row = lines[~moments.flatten(1).isfinite().all(dim=1).numpy()][0]
            raise UserError(f"`data_path` {self.folder}: row {row} of moments.npy is not finite; extract the features again")
        return moments, torch.from_numpy(self.labels[lines].astype(np.int64))


class FastDiTFeatures(Dataset):
    """One file per sample, as fast-DiT's extract_features.py writes them: `imagenet256_features/{i}.npy` (1, C, h, w),
    already sampled and scaled, and `imagenet256_labels/{i}.npy` (1,). There are no mirror images.
    """

    kind = "latents"
    flip = False
    channels = 3
    made_by = {"scaling_factor": 0.18215, "shift_factor": 0.0}
    FACTOR = 8  # image size / latent size of Stable Diffusion's autoencoder

    def __init__(self, folder: Path, image_size: int | None, num_classes: int | None):
        self.folder = folder
        self.stems = np.array(sorted(path.stem for path in (folder / "imagenet256_features").glob("*.npy")))
        if not len(self.stems):
            raise FileNotFoundError(f"`data_path` {folder}: imagenet256_features holds no .npy files")
        self.latent_shape = self.read("features", self.stems[0]).shape[1:]
        self.image_size = tuple(self.FACTOR * size for size in self.latent_shape[1:])
        if image_size not in (None, self.image_size[0]):
            raise UserError(f"`image_size` {image_size}: the features in {folder} are of images of {self.image_size[0]}")
        self.classes = imagenet_classes() if num_classes in (None, 1000) else [str(i) for i in range(num_classes)]

    def __len__(self) -> int:
        return len(self.stems)

    def __getitems__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        stems = self.stems[rows.indices]
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


def read_array(path: Path, **options: str) -> np.ndarray:
    """The array in a `.npy`. Raises OSError that names a damaged file."""
    try:
        return np.load(path, allow_pickle=False, **options)
    except (OSError, ValueError, EOFError) as error:
        raise OSError(f"cannot read {path}: {error}") from None
