"""Classifier-free guidance (Ho & Salimans, arXiv:2207.12598), around a model and its labels."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def guide(model: Callable, y: Tensor, null_label: int, scale: float, channels: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Bind labels and guidance to a model: the result is called as (x, t) -> prediction.

    Args:
        model: (x, t, y) -> (B, C or 2C, H, W).
        y: labels (B,).
        null_label: the label that stands for "none".
        scale: unconditional + scale * (conditional - unconditional); 1 is the conditional model, one evaluation of it.
        channels: how many of the first channels are guided (DiT's published figures guide 3 of 4); the others, and a
            learned variance, are the conditional model's.
    """
    check_scale(scale)
    if scale == 1:
        return lambda x, t: model(x, t, y)
    both = torch.cat([y, torch.full_like(y, null_label)])

    def guided(x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        eps = torch.lerp(unconditional[:, :channels].float(), conditional[:, :channels].float(), scale)
        return torch.cat([eps, conditional[:, channels:].float()], dim=1)

    return guided


def check_scale(scale: float) -> None:
    if not (isinstance(scale, int | float) and math.isfinite(scale) and scale >= 0):
        raise ValueError(f"--cfg-scale {scale} is not a finite number of at least 0 (1 = no guidance)")
