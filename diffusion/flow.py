"""Flow matching on the straight path, also known as rectified flow and as alpha-blending.

x_t = (1 - t) x_0 + t eps for t in [0, 1], 1 = noise; the network predicts the velocity eps - x_0. Sources: Lipman et al.
(arXiv:2210.02747), Liu et al. (arXiv:2209.03003), Heitz et al. (arXiv:2305.03486); logit-normal t: Esser et al.
(arXiv:2403.03206).

Legend: B batch, C channels, H W size. A model receives 1000 t.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from runtime import UserError

from .process import check_channels
from .samplers import SamplingLoops
from .schedules import MODEL_TIME

TIME_SAMPLING = ("uniform", "logit-normal")
LOSSES = ("velocity", "velocity+epsilon+x0")


class FlowMatching(SamplingLoops):
    """The straight path, sampled in `num_timesteps` equal steps: a Process (see process.py).

    Args:
        num_timesteps: steps of a sampler. Training does not use it.
        time_sampling: how training draws t. "uniform": uniform on [0, 1]; "logit-normal": sigmoid(N(0, 1)).
        loss: "velocity": the squared error of the velocity; "velocity+epsilon+x0" (MinDiff's): plus the squared errors of
            the epsilon and x_0 that follow from it. These are (1 - t)^2 and t^2 times the first.
    """

    validation_terms = ("loss",)
    input_scale = 1.0  # x_0 is the data, unscaled
    learn_sigma = False
    recommended = {"sampler": "heun", "num_sampling_steps": 50, "cfg_scale": 1.0}

    def __init__(self, num_timesteps: int = 1000, time_sampling: str = "uniform", loss: str = "velocity"):
        if time_sampling not in TIME_SAMPLING:
            raise UserError(f"time_sampling {time_sampling!r} is unknown; allowed: {', '.join(TIME_SAMPLING)}")
        if loss not in LOSSES:
            raise UserError(f"flow_loss {loss!r} is unknown; allowed: {', '.join(LOSSES)}")
        self.loss = loss
        self.num_timesteps = num_timesteps
        self.time_sampling = time_sampling
        self.grid = tuple(1 - step / num_timesteps for step in range(num_timesteps + 1))  # from noise, 1, to data, 0

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = (1 - t) x_0 + t eps at t (B,): (B, C, H, W)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        t = t.view(-1, *[1] * (x_start.dim() - 1))
        return (1 - t) * x_start + t * noise

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        return 1 - t, t

    def predict(self, model: Callable, x: Tensor, t: float,
                denoised_fn: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        velocity = model(x, torch.full((len(x),), MODEL_TIME * t, device=x.device)).to(x.dtype)  # (B, C, H, W)
        check_channels(velocity, x, learn_sigma=False)
        x_start = x - t * velocity
        if denoised_fn is None:
            return x_start, x_start + velocity
        x_start = denoised_fn(x_start)
        return x_start, (x - (1 - t) * x_start) / t

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor:
        """In [0, 1], by `time_sampling`."""
        if self.time_sampling == "logit-normal":
            return torch.randn(count, generator=generator, device=generator.device).sigmoid()
        return torch.rand(count, generator=generator, device=generator.device)

    def training_losses(self, model: Callable, x_start: Tensor, t: Tensor, model_kwargs: dict | None = None,
                        noise: Tensor | None = None) -> dict[str, Tensor]:
        """"mse" is the squared error of the velocity, the mean over C, H and W, and "loss" a multiple of it."""
        noise = torch.randn_like(x_start) if noise is None else noise
        velocity = model(self.q_sample(x_start, t, noise), MODEL_TIME * t, **(model_kwargs or {})).float()
        check_channels(velocity, x_start, learn_sigma=False)
        mse = ((velocity - (noise - x_start)) ** 2).flatten(1).mean(dim=1)
        weight = 1 if self.loss == "velocity" else 1 + (1 - t) ** 2 + t**2
        return {"loss": weight * mse, "mse": mse}
