"""Classifier-free guidance (Ho & Salimans, arXiv:2207.12598), autoguidance, and two limits: interval and thresholding."""

import itertools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from runtime import UserError

from .schedules import MODEL_TIME


def guide(model: Callable, y: Tensor, null_label: int, scale: float, channels: int,
          guided: Iterable[bool] | None = None, guiding: Callable | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """Bind labels and guidance to a model. Returns a function (x, t) -> prediction; r=r (B,) goes on to the model.

    Args:
        model: (x, t, y) -> (B, C or 2C, H, W); its batch is [conditional, unconditional] for a guided call.
        y: labels (B,).
        null_label: the label that means "no class".
        scale: unconditional + scale * (conditional - unconditional). A scale of 1 evaluates only the conditional model.
        channels: only the first `channels` are guided (DiT's published figures guide 3 of 4). The others, and a learned
            variance, are the conditional model's.
        guided: for each call, whether it is guided (see `in_interval`). A call that is not guided does not compute the
            unconditional half. All by default.
        guiding: a weaker network, called as `model`. Its prediction for y takes the place of the unconditional one:
            autoguidance (Karras et al., arXiv:2406.02507).
    """
    check_scale(scale)
    calls = iter([] if scale == 1 else itertools.repeat(True) if guided is None else guided)
    both = torch.cat([y, torch.full_like(y, null_label)])

    def predict(x: Tensor, t: Tensor, **times: Tensor) -> Tensor:
        if scale == 1 or not next(calls):
            return model(x, t, y, **times)
        if guiding is not None:
            conditional, weaker = model(x, t, y, **times), guiding(x, t, y, **times)
        else:
            doubled = {name: torch.cat([time, time]) for name, time in times.items()}
            conditional, weaker = model(torch.cat([x, x]), torch.cat([t, t]), both, **doubled).chunk(2)
        eps = torch.lerp(weaker[:, :channels].float(), conditional[:, :channels].float(), scale)
        return torch.cat([eps, conditional[:, channels:].float()], dim=1)

    return predict


def in_interval(times: Iterable[float], scale: float, interval: tuple[float, float] | None) -> tuple[bool, ...]:
    """For each t, whether it is guided: LO <= t <= HI (Kynkäänniemi et al., arXiv:2404.07724). None: all are."""
    low, high = interval or (0, MODEL_TIME)
    return tuple(scale != 1 and low <= t <= high for t in times)


def dynamic_threshold(x_start: Tensor, percentile: float = 0.99, maximum: float = 1.7) -> Tensor:
    """Imagen's dynamic thresholding of predicted pixels (B, C, H, W) to [-1, 1] (Saharia et al., arXiv:2205.11487, 2.3).

    A sample is clipped to a limit and divided by it: the percentile of its |x_0|, clamped to 1..maximum.
    """
    limit = torch.quantile(x_start.flatten(1).abs(), percentile, dim=1).clamp(1, maximum).view(-1, 1, 1, 1)
    return x_start.clamp(-limit, limit) / limit


def check_scale(scale: float, name: str = "cfg_scale") -> None:
    if not (isinstance(scale, int | float) and math.isfinite(scale) and scale >= 0):
        raise UserError(f"`{name}` {scale} is not a finite number of at least 0 (1 = no guidance)")


def check_interval(interval: tuple[float, float] | None, name: str = "guidance_interval") -> None:
    if interval is None:
        return
    numbers = [value for value in interval if isinstance(value, int | float)]
    if not (len(interval) == len(numbers) == 2 and 0 <= numbers[0] <= numbers[1] <= MODEL_TIME):
        given = " ".join(f"{value:g}" if value in numbers else str(value) for value in interval)
        raise UserError(f"`{name}` {given} is not LO HI with 0 <= LO <= HI <= {MODEL_TIME}")
