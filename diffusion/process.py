"""What a process and a network must offer. Training, sampling and a checkpoint's description use only these members.

A process turns data x_0 (B, C, H, W) into noise, and defines what a network learns. GaussianDiffusion, FlowMatching and FlowMap
are processes; so is any other class with these members. `check` names all missing members in one line.
"""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime import UserError


class TrainingProcess(Protocol):
    """What a training loop needs."""

    validation_terms: tuple[str, ...]  # which entries of training_losses a validation reports

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the times of `count` training samples on the generator's device: (count,), or (count, K) if a loss takes K."""

    def training_losses(self, model: Callable, x_start: Tensor, t: Tensor, model_kwargs: dict | None = None,
                        noise: Tensor | None = None) -> dict[str, Tensor]:
        """"loss" and its terms, (B,) each, for data x_start (B, C, H, W) at t (B,) or (B, K). The model receives t in 0..1000.

        A term may be nan for rows where it is not defined: means leave them out.
        """


class Process(TrainingProcess, Protocol):
    """What a training loop, the samplers and a checkpoint's description need."""

    num_timesteps: int           # steps of a sampler
    grid: tuple[float, ...]      # the num_timesteps + 1 times that a sampler visits, from noise to data
    input_scale: float           # the factor by which the data is scaled to x_0
    learn_sigma: bool            # whether the network's output has a second half of channels for the variance
    recommended: dict[str, Any]  # the sampler, num_sampling_steps and cfg_scale that a new checkpoint recommends

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """(alpha, sigma) of x_t = alpha x_0 + sigma eps at a time of `grid`."""

    def predict(self, model: Callable, x: Tensor, t: float, denoised_fn: Callable | None = None) -> tuple[Tensor, Tensor]:
        """The predicted x_0, after denoised_fn, and epsilon, (B, C, H, W) each, at any time t of `grid` except the last."""


class Network(Protocol):
    """What a network needs to be trained and sampled from."""

    in_channels: int             # C
    input_size: tuple[int, int]  # (H, W) of the image or latent
    num_classes: int             # L; label L is the null class

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, C, H, W), t (B,) in 0..1000, y (B,) in 0..L -> (B, C or 2C, H, W).

        That of a flow map also takes r (B,) in 0..1000, the time where a step ends.
        """


class Seam(Protocol):
    """What `reuse` also needs of a network: its forward pass in two parts, with features to reuse between them."""

    blocks: Any                  # a sequence; only its length is used
    default_split: int           # blocks before the seam by default

    def condition(self, t: Tensor, y: Tensor) -> Any:
        """The conditioning of the blocks."""

    def encode(self, x: Tensor, c: Any, split: int | None = None) -> tuple[Tensor, ...]:
        """The state after the first `split` blocks: tensors whose first dimension is the batch. The first one has the features
        in its last dimension: (B, h, w, D), (B, N, D) or (B, D).
        """

    def decode(self, state: tuple[Tensor, ...], c: Any, split: int | None = None) -> Tensor:
        """Run the other blocks. Returns what `forward` returns."""


def check_channels(out: Tensor, x: Tensor, learn_sigma: bool) -> None:
    """Raises UserError if a network's output for x (B, C, H, W) has not C channels, or 2C with a learned variance."""
    if out.shape[1] != (channels := x.shape[1] * (2 if learn_sigma else 1)):
        raise UserError(f"the model returned {out.shape[1]} channels, but the process takes {channels}: learn_sigma of the "
                        "model must be that of create_diffusion, and false for a flow")


def members(protocol: type) -> list[str]:
    """The names of the members that a protocol requires, those of its bases first."""
    bases = [base for base in reversed(protocol.__mro__) if getattr(base, "_is_protocol", False) and base is not Protocol]
    return list(dict.fromkeys(
        name for base in bases
        for name in [*inspect.get_annotations(base), *vars(base)]
        if name == "__call__" or not name.startswith("_")))


def offers(thing: object, protocol: type) -> bool:
    return all(hasattr(thing, name) for name in members(protocol))


def check(thing: object, protocol: type, needed_for: str) -> None:
    """Raises UserError that names all missing members."""
    if missing := [name for name in members(protocol) if not hasattr(thing, name)]:
        raise UserError(f"{type(thing).__name__} lacks {', '.join(missing)}, which {needed_for} (see {protocol.__name__} in "
                        "diffusion/process.py)")
