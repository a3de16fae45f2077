"""What a data set offers: batches of rows.

`dataset.__getitems__(rows)` returns a whole batch and its labels; `TrainingData` lists all members of a data set.
Its `kind` says what the batch holds:
    "images"            (B, C, H, W) uint8
    "moments"           (B, 2C, h, w) fp16: mean and log-variance of an autoencoder's posterior
    "latents"           (B, C, h, w) fp32, ready to be noised
Cached features also have `latent_shape` (C, h, w).
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from runtime import UserError
from runtime.cli import one_line, shortened
from runtime.files import printable


class Rows(NamedTuple):
    """Which samples to read, (B,) int64, and which of them as mirror images, (B,) bool."""

    indices: np.ndarray
    mirrored: np.ndarray

    @classmethod
    def plain(cls, indices: np.ndarray) -> "Rows":
        return cls(np.asarray(indices), np.zeros(len(indices), dtype=bool))


class TrainingData(Protocol):
    """What a data set must offer. `rows` may have any order and number. An unreadable sample raises OSError."""

    kind: str                    # what __getitems__ returns, see the top of this file
    classes: list[str]           # names, in the order of the labels
    image_size: tuple[int, int]  # (H, W) of the images, cached or not
    channels: int                # C of the images, cached or not
    flip: bool                   # whether training uses mirror images if the user says nothing: half of the samples then
    made_by: dict[str, Any]      # description of the autoencoder of cached features; {} for images
    statistics: tuple[list[float], list[float]] | None  # mean and std by which these are normalised, if they are

    def __len__(self) -> int: ...

    def __getitems__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The batch (B, ...), and its labels (B,) int64."""


class Readable(Dataset):
    """A data set for training, in which the next readable sample stands in for an unreadable one; `limit` may be unreadable.

    Which one that is depends on the files alone, so it is the same after a restart and on any number of processes.
    """

    def __init__(self, data: TrainingData, limit: int):
        self.data, self.limit = data, limit

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, rows: Rows) -> tuple[Tensor, Tensor, dict[int, str]]:
        """The batch, its labels, and the reasons why samples could not be read, by row."""
        try:
            return *self.data.__getitems__(rows), {}
        except OSError:
            unreadable: dict[int, str] = {}
            batches, labels = zip(*(self.nearest(row, mirrored, unreadable) for row, mirrored in zip(*rows)))
            return torch.cat(batches), torch.cat(labels), unreadable

    def nearest(self, row: int, mirrored: bool, unreadable: dict[int, str]) -> tuple[Tensor, Tensor]:
        """The sample at `row`, or else the next readable one. Raises UserError if more than `limit` are unreadable."""
        while True:
            try:
                return self.data.__getitems__(Rows(np.array([row]), np.array([mirrored])))
            except OSError as error:
                unreadable[int(row)] = one_line(error)
            if len(unreadable) > min(self.limit, len(self) - 1):  # at least one must be readable
                raise UserError(f"{next(iter(unreadable.values()))}; {len(unreadable)} or more of {len(self):,} samples cannot "
                                f"be read, and `max_skipped` allows {self.limit}. Repair or remove them")
            row = (row + 1) % len(self)


def describe(data: TrainingData, flip: bool) -> str:
    """Size, classes and mirroring of a data set, for the log."""
    mirrored = "half of them mirrored" if flip else "none of them mirrored"
    return f"{len(data):,} samples of {len(data.classes):,} classes ({shortened(data.classes, 5)}), {mirrored}"


def choose_flip(data: TrainingData, flip: bool | None) -> bool:
    """Whether half of the samples are read as mirror images: as the user says, else as the data set does."""
    if flip and getattr(data, "one_sided", False):
        raise UserError("`flip`: these features have no mirror images")
    return data.flip if flip is None else flip


def mirror(images: Tensor, mirrored: np.ndarray) -> Tensor:
    """Mirror the images (B, C, H, W) for which `mirrored` (B,) is true."""
    if not mirrored.any():
        return images
    return torch.where(torch.from_numpy(mirrored).view(-1, 1, 1, 1), images.flip(-1), images)


def readable_names(folders: list[str]) -> list[str]:
    """English names for ImageNet's folders (n02099601 -> golden retriever). Other names stay, in UTF-8."""
    from timm.data import ImageNetInfo

    imagenet = ImageNetInfo()
    known = set(imagenet.label_names())
    return [imagenet.label_name_to_description(name) if name in known else printable(name) for name in folders]
