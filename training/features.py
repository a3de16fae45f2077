"""Features cached from images: those of extract_features.py, and fast-DiT's."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.spec import imagenet_classes
from runtime import UserError
from training.rows import Rows


class Features(Dataset):
    """The output of extract_features.py: `moments.npy` (N, 2, 2C, h, w) fp16, of each image and of its mirror image;
    `labels.npy` (N,); and `meta.json`, written last. The files are memory-mapped: memory does not grow with N.
    """

    kind = "moments"

    def __init__(self, folder: Path, image_size: int | None):
        if not (folder / "meta.json").is_file():
            raise FileNotFoundError(f"`data_path` {folder}: the extraction of its features is not finished; the same "
                                    "extract_features.py command goes on with it")
        self.folder, meta = folder, json.loads((folder / "meta.json").read_text())
        self.classes, self.channels, self.flip = meta["classes"], meta["channels"], meta["flip"]
        self.image_size, self.latent_shape = tuple(meta["image_size"]), tuple(meta["latent_shape"])
        self.made_by = meta["autoencoder"]
        self.map_files()
        if image_size not in (None, self.image_size[0]):
            raise UserError(f"`image_size` {image_size}: the features in {folder} are of images of {self.image_size[0]}")
        if len(self.moments) != meta["rows"] or self.moments.shape[2:] != (2 * self.latent_shape[0], *self.latent_shape[1:]):
            raise UserError(f"`data_path` {folder}: moments.npy has the shape {self.moments.shape}, meta.json tells otherwise")
        self.skipped = np.array(meta["skipped"], dtype=np.int64)  # ascending rows that hold no image

    def map_files(self) -> None:
        try:
            self.moments, self.labels = (np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("moments", "labels"))
        except ValueError as error:
            raise OSError(f"`data_path` {self.folder}: a file of features is damaged: {error}") from None

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
        return (torch.from_numpy(self.moments[lines, rows.mirrored.astype(np.int64)]),
                torch.from_numpy(self.labels[lines].astype(np.int64)))


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
        latents = np.concatenate([self.read("features", stem) for stem in stems])
        labels = np.concatenate([self.read("labels", stem) for stem in stems]).astype(np.int64)
        if labels.min() < 0 or labels.max() >= len(self.classes):
            raise UserError(f"`num_classes` {len(self.classes)}: {self.folder} has the label {labels.max()}")
        return torch.from_numpy(latents).float(), torch.from_numpy(labels)

    def read(self, part: str, stem: str) -> np.ndarray:
        path = self.folder / f"imagenet256_{part}" / f"{stem}.npy"
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise OSError(f"cannot read {path}: {error}") from None
