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
    flip: bool                   # whether training may use mirror images: half of the samples are then mirrored
    made_by: dict[str, Any]      # description of the autoencoder of cached features; {} for images

    def __len__(self) -> int: ...

    def __getitems__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The batch (B, ...), and its labels (B,) int64."""


def mirror(images: Tensor, mirrored: np.ndarray) -> Tensor:
    """Mirror the images (B, C, H, W) for which `mirrored` (B,) is true."""
    if not mirrored.any():
        return images
    return torch.where(torch.from_numpy(mirrored).view(-1, 1, 1, 1), images.flip(-1), images)
