"""A flow map: one network that also takes whole steps from t to r, by mean velocities. Decoupled MeanFlow.

u(x_t, t, r) = (x_t - x_r) / (t - r), the mean of the velocity v along the path from t down to r, obeys
u = v - (t - r) du/dt, with the derivative along the path, (v, 1, 0). Half of the rows of a batch learn it, the others plain
flow matching, r = t. Sources: MeanFlow (Geng et al., arXiv:2505.13447), Decoupled MeanFlow (Lee et al., arXiv:2510.24474).

Legend: B batch, C channels, H W size. A model receives 1000 t and 1000 r: model(x, t, y, r=r).
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from runtime import UserError
from runtime.processes import without_tf32

from .flow import FlowMatching
from .process import check_channels
from .schedules import MODEL_TIME

SHARES = (0, 0.5, 1)
LARGEST_SCALE = 0.01     # of t in a network's embedding: on 0..1000 a difference over STEP is useless
MEANS = (0.4, -1.2)      # of the two logit-normals of which a map row takes t, the larger, and r
STEP = 5e-3              # of the central differences, in t
GUIDED_UP_TO = 0.7       # the largest t with guidance in training
OFFSET = 0.01            # in the logarithm of the loss


class FlowMap(FlowMatching):
    """FlowMatching that also learns mean velocities, for the sampler `map`: a Process (see process.py).

    Args:
        num_timesteps: steps of a sampler. Training does not use it.
        share: of the rows of a batch that learn the map: 0, 1/2 (rows 1, 3, 5, ...) or 1.
        omega: guidance in training: v + omega (u(x, t, t, y) - u(x, t, t, null)) takes the place of v, where the label was not
            dropped and t is at most 0.7. A map with it needs no guidance when it is sampled.
        shift: of the grid of samplers.
    """

    validation_terms = ("loss", "mse", "map_mse")
    recommended = {"sampler": "map", "num_sampling_steps": 4, "cfg_scale": 1.0}

    def __init__(self, num_timesteps: int = 1000, share: float = 0.5, omega: float = 0.0, shift: float = 1.0):
        super().__init__(num_timesteps, "logit-normal", shift=shift)
        if share not in SHARES:
            raise UserError(f"map_share {share} is not 0, 0.5 or 1")
        if not 0 <= omega < float("inf"):
            raise UserError(f"map_guidance {omega} is not at least 0")
        self.share, self.omega = share, omega
        self.rows_multiple = 2 if share == 0.5 else 1  # a micro-batch begins with a flow row

    def map_rows(self, count: int) -> slice:
        """The rows of a batch that learn the map."""
        return {0: slice(0), 0.5: slice(1, None, 2), 1: slice(None)}[self.share]

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 2): t and r <= t. In flow rows r = t, logit-normal."""
        normal = torch.randn(count, 2, generator=generator, device=generator.device)
        times = normal[:, :1].sigmoid().repeat(1, 2)
        rows = self.map_rows(count)
        both = (normal[rows] + torch.tensor(MEANS, device=generator.device)).sigmoid()
        times[rows] = both.sort(dim=1, descending=True).values
        return times

    def training_losses(self, model: Callable, x_start: Tensor, t: Tensor, model_kwargs: dict | None = None,
                        noise: Tensor | None = None) -> dict[str, Tensor]:
        """"loss" is log(error + 0.01). "mse" and "map_mse" are the errors, the means over C, H and W, of flow rows and of map
        rows, and nan elsewhere.

        Args:
            t: (B, 2), from sample_times.
            model_kwargs: labels alone, {"y": (B,)}.
        """
        noise, kwargs = torch.randn_like(x_start) if noise is None else noise, model_kwargs or {}
        (t, r), rows, network = t.unbind(1), self.map_rows(len(x_start)), unwrapped(model)
        x, velocity = self.q_sample(x_start, t, noise), noise - x_start
        if self.omega:
            velocity = velocity + self.omega * guidance(network, x, t, kwargs["y"])
        out = model(x, MODEL_TIME * t, **kwargs, r=MODEL_TIME * r).float()
        check_channels(out, x_start, learn_sigma=False)
        target = velocity.clone()
        if len(t[rows]):
            of_rows = {name: value[rows] for name, value in kwargs.items()}
            target[rows] -= column(t - r, x)[rows] * derivative(network, x[rows], t[rows], r[rows], velocity[rows], of_rows)
        error = ((out - target) ** 2).flatten(1).mean(dim=1)
        mse, map_mse = error.detach().clone(), torch.full_like(error, torch.nan)
        map_mse[rows], mse[rows] = mse[rows].clone(), torch.nan
        return {"loss": (error + OFFSET).log(), "mse": mse, "map_mse": map_mse}

    def jump(self, model: Callable, x: Tensor, t: float, r: float) -> tuple[Tensor, Tensor]:
        """x_r = x_t - (t - r) u(x_t, t, r), and the mean velocity u."""
        times = torch.full((2, len(x)), MODEL_TIME, device=x.device) * torch.tensor([[t], [r]], device=x.device)
        velocity = model(x, times[0], r=times[1]).to(x.dtype)
        check_channels(velocity, x, learn_sigma=False)
        return x - (t - r) * velocity, velocity


def check_network(network: Callable, time_scale: float | None) -> None:
    """Raises UserError if a network cannot be a flow map. `time_scale` is its argument, None if it has none."""
    name = type(network).__name__
    if "r" not in inspect.signature(getattr(network, "forward", network)).parameters:
        raise UserError(f"{name} has no argument r, the time where a step ends, which a flow map needs")
    if len(getattr(network, "blocks", "two")) < 2:
        raise UserError(f"{name} has one block; a flow map needs at least two, of which the last see r")
    if time_scale is not None and time_scale > LARGEST_SCALE:
        raise UserError(f"time_scale {time_scale} is too large for a flow map, whose derivatives are differences: at most "
                        f"{LARGEST_SCALE} (SiT and REPA have 0.001)")


def derivative(network: Callable, x: Tensor, t: Tensor, r: Tensor, velocity: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """du/dt along (v, 1, 0) at x_t, by central differences, without gradient: (B, C, H, W). Both sides are one call.

    Near the ends of [0, 1] it is taken at a t whose two sides lie inside, on the line through x_t along v. Autocast and TF32
    are off: their rounding is larger than the difference.
    """
    centre = t.clamp(STEP, 1 - STEP)
    times = torch.cat([centre + STEP, centre - STEP])
    points = torch.cat([x, x]) + column(times - torch.cat([t, t]), x) * torch.cat([velocity, velocity])
    doubled = {name: torch.cat([value, value]) for name, value in kwargs.items()}
    with torch.no_grad(), evaluating(network), torch.autocast(x.device.type, enabled=False), without_tf32():
        out = network(points, MODEL_TIME * times, **doubled, r=MODEL_TIME * torch.cat([r, r])).float()
    after, before = out.chunk(2)
    return (after - before) / (2 * STEP)


def guidance(network: Callable, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """u(x, t, t, y) - u(x, t, t, null) where the label is not null and t <= 0.7, else 0: (B, C, H, W), without gradient."""
    null, times = torch.full_like(y, network.num_classes), MODEL_TIME * torch.cat([t, t])
    with torch.no_grad(), evaluating(network):
        out = network(torch.cat([x, x]), times, torch.cat([y, null]), r=times).float()
    conditional, unconditional = out.chunk(2)
    return torch.where(column((y != null) & (t <= GUIDED_UP_TO), x), conditional - unconditional, 0.0)


def unwrapped(model: Callable) -> Callable:
    """The network inside DDP. (Its wrapper is for calls with a gradient.)"""
    return getattr(model, "module", model)


@contextmanager
def evaluating(network: Callable) -> Iterator[None]:
    """The network in evaluation mode: dropout would swamp a difference, and a BatchNorm would move."""
    training = getattr(network, "training", False)
    if training:
        network.eval()
    try:
        yield
    finally:
        if training:
            network.train()


def column(values: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), as many dimensions as x."""
    return values.view(-1, *[1] * (x.dim() - 1))
