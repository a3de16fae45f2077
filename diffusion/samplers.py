"""Samplers: noise -> data, one generator a solver, all with one signature.

    sampler(process, model, x, noise_source, denoised_fn=None) -> yields {"sample", "pred_xstart"} after each step

- process: GaussianDiffusion or FlowMatching. Its `grid` holds the times to visit, from noise to data; at each of them
  x_t = alpha x_0 + sigma eps, with (alpha, sigma) = process.alpha_sigma(t), and process.predict gives x_0 and eps.
- model: (x (B, C, H, W), t (B,) in 0..1000) -> prediction; labels, guidance and reuse are already in it.
- x: the start noise (B, C, H, W). The state keeps its dtype, fp32, whatever the model computes in.
- noise_source: step number, from 0 -> fresh noise (B, C, H, W), for the samplers that need some.
- denoised_fn: applied to every predicted x_0, to clip or threshold it.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

NoiseSource = Callable[[int], Tensor]
DenoisedFn = Callable[[Tensor], Tensor] | None
Steps = Iterator[dict[str, Tensor]]


def ddpm(process, model: Callable, x: Tensor, noise_source: NoiseSource, denoised_fn: DenoisedFn = None) -> Steps:
    """Ancestral sampling from p(x_{t-1} | x_t) with the process's own variance (DDPM, arXiv:2006.11239, Algorithm 2)."""
    for step, (t, t_next) in enumerate(pairwise(process.grid)):
        times = torch.full((len(x),), t, device=x.device)
        p = process.p_mean_variance(model, x, times, clip_denoised=False, denoised_fn=denoised_fn)
        x = p["mean"]
        if t_next != process.grid[-1]:  # the last step is without noise
            x = x + torch.exp(0.5 * p["log_variance"]) * noise_source(step)
        yield {"sample": x, "pred_xstart": p["pred_xstart"]}


def ddim(process, model: Callable, x: Tensor, noise_source: NoiseSource, denoised_fn: DenoisedFn = None,
         eta: float = 0.0) -> Steps:
    """DDIM (Song et al., arXiv:2010.02502, Eq. 12 and 16), in terms of (alpha, sigma), for either process.

    eta 0 is deterministic, eta 1 has the noise of DDPM with the posterior's variance.
    """
    for step, (t, t_next) in enumerate(pairwise(process.grid)):
        x_0, eps = process.predict(model, x, t, denoised_fn)
        (alpha, sigma), (alpha_next, sigma_next) = process.alpha_sigma(t), process.alpha_sigma(t_next)
        std = 0.0
        if eta and sigma_next:
            std = eta * sigma_next * math.sqrt(1 - (alpha * sigma_next / (alpha_next * sigma)) ** 2)
        x = alpha_next * x_0 + math.sqrt(sigma_next**2 - std**2) * eps
        if std:
            x = x + std * noise_source(step)
        yield {"sample": x, "pred_xstart": x_0}


def euler(process, model: Callable, x: Tensor, noise_source: NoiseSource, denoised_fn: DenoisedFn = None) -> Steps:
    """First-order steps along the straight path (see `straighten`); one evaluation of the model a step."""
    for t, t_next in pairwise(process.grid):
        (scale, s), (scale_next, s_next) = straighten(process, t), straighten(process, t_next)
        x_0, eps = process.predict(model, x, t, denoised_fn)
        x = scale_next * (x / scale + (s_next - s) * (eps - x_0))
        yield {"sample": x, "pred_xstart": x_0}


def heun(process, model: Callable, x: Tensor, noise_source: NoiseSource, denoised_fn: DenoisedFn = None) -> Steps:
    """Second-order steps along the straight path: Euler, then the mean of the slopes at both ends.

    Two evaluations of the model a step, and one in the last, as in EDM (Karras et al., arXiv:2206.00364, Algorithm 1).
    """
    for t, t_next in pairwise(process.grid):
        (scale, s), (scale_next, s_next) = straighten(process, t), straighten(process, t_next)
        x_0, eps = process.predict(model, x, t, denoised_fn)
        straight, slope = x / scale, eps - x_0
        x = scale_next * (straight + (s_next - s) * slope)
        if t_next != process.grid[-1]:
            x_0, eps = process.predict(model, x, t_next, denoised_fn)
            x = scale_next * (straight + (s_next - s) * (slope + eps - x_0) / 2)
        yield {"sample": x, "pred_xstart": x_0}


def straighten(process, t: float) -> tuple[float, float]:
    """The scale and position that make any path the straight one: x_t / scale = (1 - s) x_0 + s eps, with slope eps - x_0.

    For FlowMatching, (1, t).
    """
    alpha, sigma = process.alpha_sigma(t)
    return alpha + sigma, sigma / (alpha + sigma)


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "euler": euler, "heun": heun}


def get_sampler(name: str, process, eta: float = 0.0) -> Callable[..., Steps]:
    """The sampler of that name; ValueError where it cannot serve the process, or has no use for eta."""
    if name not in SAMPLERS:
        raise ValueError(f"--sampler {name!r} is unknown; allowed: {', '.join(SAMPLERS)}")
    if name == "ddpm" and not hasattr(process, "p_mean_variance"):
        raise ValueError("--sampler ddpm needs a Gaussian process; for a flow checkpoint use ddim, euler or heun")
    if not 0 <= eta <= 1:
        raise ValueError(f"--eta {eta} is not in 0..1")
    if eta and name != "ddim":
        raise ValueError(f"--eta {eta} has a meaning for --sampler ddim only, not for {name}")
    return partial(ddim, eta=eta) if eta else SAMPLERS[name]
