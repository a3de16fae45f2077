"""The random numbers of a training step, and the loss that it minimises."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion import create_diffusion
from diffusion.process import TrainingProcess
from pipeline.autoencoders import latents_of
from pipeline.heads import Step, Tap
from pipeline.spec import Spec
from runtime import UserError
from runtime.processes import autocast, total
from runtime.randomness import generator
from training.rows import TrainingData

SSIM_WINDOW = 7  # pixels


class Draws(NamedTuple):
    """All random numbers of one step, for the samples of a batch. They depend only on the address."""

    noise: Tensor             # (B, C, H, W) for the diffusion
    t: Tensor                 # (B,), or (B, K) for a process of K times
    drop_uniform: Tensor      # (B,) in [0, 1): where it is below label_drop, the label becomes the null class
    posterior: Tensor | None  # (B, C, H, W) for the autoencoder's posterior, if it has one

    def rows(self, rows: slice) -> "Draws":
        return Draws(*(None if draw is None else draw[rows] for draw in self))


class Objective(NamedTuple):
    """The function to minimise: a batch of the data set and its labels -> the loss of each sample."""

    process: TrainingProcess
    autoencoder: nn.Module
    data: TrainingData  # the data set of the batches
    label_drop: float   # the share of labels that become the null class
    precision: str
    heads: nn.ModuleDict | None = None  # of the network that is trained, see heads.py

    def draw(self, address: tuple, batch_size: int, model: nn.Module, device: torch.device) -> Draws:
        """The random numbers at an address that this process, autoencoder and data set need, on the device."""
        source = generator(*address, device=device)
        normal = partial(torch.randn, (batch_size, model.in_channels, *model.input_size), generator=source, device=device)
        noise, t = normal(), self.process.sample_times(batch_size, source)
        drop_uniform = torch.rand(batch_size, generator=source, device=device)
        has_posterior = self.autoencoder.stochastic and self.data.kind != "latents"
        return Draws(noise, t, drop_uniform, normal() if has_posterior else None)  # last: the others do not depend on it

    def losses(self, model: nn.Module, batch: Tensor, labels: Tensor, draws: Draws, step: int = 0) -> dict[str, Tensor]:
        """batch (B, ...), labels (B,) of a step -> "loss", its terms and related figures, and each head's loss: (B,) each."""
        latents = latents_of(self.autoencoder, batch, self.data.kind, draws.posterior)
        y = torch.where(draws.drop_uniform < self.label_drop, len(self.data.classes), labels)
        with autocast(batch.device, self.precision):
            if not self.heads:
                return self.process.training_losses(model, latents, draws.t, dict(y=y), draws.noise)
            tap = Tap(model)
            losses = self.process.training_losses(tap, latents, draws.t, dict(y=y), draws.noise)
            seen = Step(self.process, latents, draws.t, dict(y=y), draws.noise, batch if self.data.kind == "images" else None)
            loss, of_heads = losses["loss"], {}
            for name, head in self.heads.items():
                if weight := head.weight_at(step):
                    of_heads[name] = head.loss(tap.outputs[name], seen)
                    if of_heads[name].shape != loss.shape:
                        raise UserError(f"`heads`: {name}'s loss has the shape {tuple(of_heads[name].shape)}, not (B,)")
                    loss = loss + weight * of_heads[name]
                else:  # for DDP all parameters take part
                    loss = loss + 0 * total(tap.outputs[name])
        return losses | of_heads | {"loss": loss}


def means_of(losses: dict[str, Tensor]) -> list[Tensor]:
    """The mean of each loss (B,). Terms may be nan where they are undefined for a row; "loss" may not."""
    return [loss.detach().mean() if name == "loss" else loss.detach().nanmean() for name, loss in losses.items()]


def check_rows(process: TrainingProcess, micro_batches: list[slice]) -> None:
    """Raises UserError if a micro-batch has not a multiple of the rows that a process takes together, such as FlowMap's two."""
    multiple, rows = getattr(process, "rows_multiple", 1), micro_batches[0].stop - micro_batches[0].start
    if rows % multiple:
        raise UserError(f"`global_batch_size` leaves {rows} samples for each micro-batch of a process; this objective needs a "
                        f"multiple of {multiple}")


def process_of(spec: Spec) -> TrainingProcess:
    """The process that a spec's network is trained with."""
    return Reconstruction() if spec.is_autoencoder else create_diffusion("", **spec.diffusion)


class Reconstruction:
    """An autoencoder's objective, with the interface of a diffusion process: MSE + 1 - SSIM of images in [-1, 1]."""

    validation_terms = ("loss", "psnr", "ssim")

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor:
        """There is no time: (count,) zeros."""
        return torch.zeros(count, device=generator.device)

    def training_losses(self, model: Callable, x_start: Tensor, t: Tensor, model_kwargs: dict | None = None,
                        noise: Tensor | None = None) -> dict[str, Tensor]:
        """{"loss", "psnr" in dB, "ssim"} of the reconstruction of images (B, C, H, W): (B,) each."""
        images = model(x_start, t, **(model_kwargs or {})).float()
        mse = (images - x_start).square().flatten(1).mean(dim=1)
        similarity = ssim(images, x_start)
        seen = (images.detach().clamp(-1, 1) - x_start).square().flatten(1).mean(dim=1)
        return {"loss": mse + 1 - similarity, "psnr": 10 * torch.log10(4 / seen.clamp(min=1e-10)), "ssim": similarity}


def ssim(a: Tensor, b: Tensor, window: int = SSIM_WINDOW) -> Tensor:
    """Structural similarity (Wang et al., 2004) of images (B, C, H, W) in [-1, 1]: (B,), 1 where they are equal.

    Means, variances and covariance are over each `window` x `window` inside the image, with equal weights.
    """
    stabilise_mean, stabilise_variance = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mean_a, mean_b, aa, bb, ab = (F.avg_pool2d(x, window, stride=1) for x in (a, b, a * a, b * b, a * b))
    mean_product = mean_a * mean_b
    variances = aa - mean_a**2 + bb - mean_b**2
    similarity = ((2 * mean_product + stabilise_mean) * (2 * (ab - mean_product) + stabilise_variance)
                  / ((mean_a**2 + mean_b**2 + stabilise_mean) * (variances + stabilise_variance)))
    return similarity.flatten(1).mean(dim=1)
