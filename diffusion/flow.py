"""Flow matching on the straight path, also known as rectified flow and as alpha-blending.

x_t = (1 - t) x_0 + t eps for t in [0, 1], 1 = noise; the network predicts the velocity eps - x_0, or x_0. Sources: Lipman et
al. (arXiv:2210.02747), Liu et al. (arXiv:2209.03003), Heitz et al. (arXiv:2305.03486); logit-normal t and shift: Esser et al.
(arXiv:2403.03206); prediction of x_0: Li & He (arXiv:2511.13720).

Legend: B batch, C channels, H W size. A model receives 1000 t.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from runtime import UserError

from .process import check_channels
from .samplers import SamplingLoops
from .schedules import MODEL_TIME

Time = TypeVar("Time", float, Tensor)
TIME_SAMPLING = ("uniform", "logit-normal")
LOSSES = ("velocity", "velocity+epsilon+x0")
PREDICTIONS = ("velocity", "x0")
SMALLEST_T = 0.05  # the loss of x_0 is divided by at least its square


class FlowMatching(SamplingLoops):
    """The straight path, sampled in `num_timesteps` equal steps: a Process (see process.py).

    Args:
        num_timesteps: steps of a sampler. Training does not use it.
        time_sampling: how training draws t. "uniform": uniform on [0, 1]; "logit-normal": sigmoid(N(time_mean, time_std^2)).
        loss: "velocity": the squared error of the velocity; "velocity+epsilon+x0" (MinDiff's): plus the squared errors of
            the epsilon and x_0 that follow from it. These are (1 - t)^2 and t^2 times the first.
        prediction: what the network gives. With "x0" the velocity follows from it, and t is at least 0.05 in the loss.
        shift: s; t becomes s t / (1 - t + s t), in the grid of samplers, and with `shift_training` where training draws t.
            Above 1 there are more steps, or draws, near noise.
    """

    validation_terms = ("loss",)
    input_scale = 1.0  # x_0 is the data, unscaled
    learn_sigma = False
    recommended = {"sampler": "heun", "num_sampling_steps": 50, "cfg_scale": 1.0}

    def __init__(self, num_timesteps: int = 1000, time_sampling: str = "uniform", loss: str = "velocity",
                 prediction: str = "velocity", time_mean: float = 0.0, time_std: float = 1.0, shift: float = 1.0,
                 shift_training: bool = False):
        for name, value in (("time_std", time_std), ("shift", shift)):
            if not 0 < value < math.inf:
                raise UserError(f"{name} {value} is not a positive number")
        if not math.isfinite(time_mean):
            raise UserError(f"time_mean {time_mean} is not a finite number")
        if time_sampling not in TIME_SAMPLING:
            raise UserError(f"time_sampling {time_sampling!r} is unknown; allowed: {', '.join(TIME_SAMPLING)}")
        if loss not in LOSSES:
            raise UserError(f"flow_loss {loss!r} is unknown; allowed: {', '.join(LOSSES)}")
        if prediction not in PREDICTIONS:
            raise UserError(f"prediction {prediction!r} is unknown; allowed: {', '.join(PREDICTIONS)}")
        if prediction == "x0" and loss != "velocity":
            raise UserError(f"flow_loss {loss!r} needs prediction 'velocity'")
        if time_sampling == "uniform" and (time_mean, time_std) != (0, 1):
            raise UserError("time_mean and time_std apply only to time_sampling 'logit-normal'")
        self.loss, self.prediction = loss, prediction
        self.num_timesteps = num_timesteps
        self.time_sampling, self.time_mean, self.time_std = time_sampling, time_mean, time_std
        self.shift, self.shift_training = shift, shift_training
        self.grid = tuple(self.shifted(1 - step / num_timesteps) for step in range(num_timesteps + 1))  # from noise to data

    def shifted(self, t: Time) -> Time:
        """SD3's shift of a time in [0, 1] (Esser et al., Eq. 23)."""
        return t if self.shift == 1 else self.shift * t / (1 - t + self.shift * t)  # exact at 0 and 1

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = (1 - t) x_0 + t eps at t (B,): (B, C, H, W)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        t = t.view(-1, *[1] * (x_start.dim() - 1))
        return (1 - t) * x_start + t * noise

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        return 1 - t, t

    def predict(self, model: Callable, x: Tensor, t: float,
                denoised_fn: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        out = model(x, torch.full((len(x),), MODEL_TIME * t, device=x.device)).to(x.dtype)  # (B, C, H, W)
        check_channels(out, x, learn_sigma=False)
        x_start = out if self.prediction == "x0" else x - t * out
        if denoised_fn is None and self.prediction == "velocity":
            return x_start, x_start + out
        x_start = denoised_fn(x_start) if denoised_fn else x_start
        return x_start, (x - (1 - t) * x_start) / t

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor:
        """In [0, 1], by `time_sampling`."""
        if self.time_sampling == "logit-normal":
            normal = torch.randn(count, generator=generator, device=generator.device)
            t = (self.time_mean + self.time_std * normal).sigmoid()
        else:
            t = torch.rand(count, generator=generator, device=generator.device)
        return self.shifted(t) if self.shift_training else t

    def training_losses(self, model: Callable, x_start: Tensor, t: Tensor, model_kwargs: dict | None = None,
                        noise: Tensor | None = None) -> dict[str, Tensor]:
        """"mse" is the squared error of the velocity, the mean over C, H and W, and "loss" a multiple of it.

        If the network predicts x_0, t is at least 0.05 in the velocity that follows, so that its error stays bounded.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        out = model(self.q_sample(x_start, t, noise), MODEL_TIME * t, **(model_kwargs or {})).float()
        check_channels(out, x_start, learn_sigma=False)
        mse = ((out - (x_start if self.prediction == "x0" else noise - x_start)) ** 2).flatten(1).mean(dim=1)
        if self.prediction == "x0":
            mse = mse / t.clamp(min=SMALLEST_T) ** 2
        weight = 1 if self.loss == "velocity" else 1 + (1 - t) ** 2 + t**2
        return {"loss": weight * mse, "mse": mse}
