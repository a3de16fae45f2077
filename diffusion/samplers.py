"""Samplers: noise -> data. Each solver is one generator, and all have one signature.

    sampler(process, model, x, noise_source, denoised_fn=None) -> yields {"sample", "pred_xstart"} after each step

- process: GaussianDiffusion, FlowMatching or another Process. Its `grid` holds the times to visit, from noise to data. At
  each of them x_t = alpha x_0 + sigma eps, with (alpha, sigma) = process.alpha_sigma(t). process.predict gives x_0 and eps.
- model: (x (B, C, H, W), t (B,) in 0..1000) -> prediction; that of a flow map also takes r=(B,). It already contains labels,
  guidance and reuse.
- x: the start noise (B, C, H, W), fp32. So is the state, whatever dtype the model computes in under autocast.
- noise_source: number of the step, from 0 -> fresh noise (B, C, H, W). Only ddpm, sde, and ddim and map with eta > 0, use it.
- denoised_fn: applied to every predicted x_0, to clip or threshold it.
- The yielded "sample" is the state itself. If a caller changes it in place, the next step starts from the changed state.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from runtime import UserError

from .process import Process

NoiseSource = Callable[[int], Tensor]
DenoisedFn = Callable[[Tensor], Tensor] | None
Steps = Iterator[dict[str, Tensor]]


def ddpm(process: Process, model: Callable, x: Tensor, noise_source: NoiseSource, denoised_fn: DenoisedFn = None) -> Steps:
    """Ancestral sampling from p(x_{t-1} | x_t) with the process's own variance (DDPM, arXiv:2006.11239, Algorithm 2).

    The process must offer p_mean_variance, as GaussianDiffusion does.
    """
    for step, (t, t_next) in enumerate(pairwise(process.grid)):
        times = torch.full((len(x),), t, device=x.device)
        p = process.p_mean_variance(model, x, times, clip_denoised=False, denoised_fn=denoised_fn)
        x = p["mean"]
        if t_next != process.grid[-1]:  # the last step adds no noise
            x = x + torch.exp(0.5 * p["log_variance"]) * noise_source(step)
        yield {"sample": x, "pred_xstart": p["pred_xstart"]}


def ddim(process: Process, model: Callable, x: Tensor, noise_source: NoiseSource, denoised_fn: DenoisedFn = None,
         eta: float = 0.0) -> Steps:
    """DDIM (Song et al., arXiv:2010.02502, Eq. 12 and 16), in terms of (alpha, sigma), for any process.

    eta 0 is deterministic, and equals Euler's method along the straight path (see `straighten`). eta 1 adds as much noise as
    DDPM with the posterior's variance.
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


def heun(process: Process, model: Callable, x: Tensor, noise_source: NoiseSource, denoised_fn: DenoisedFn = None) -> Steps:
    """Second-order steps along the straight path: Euler, then the mean of the slopes at both ends.

    Each step evaluates the model twice, the last one once, as in EDM (Karras et al., arXiv:2206.00364, Algorithm 1).
    """
    for t, t_next in pairwise(process.grid):
        (scale, s), (scale_next, s_next) = straighten(process, t), straighten(process, t_next)
        x_0, eps = process.predict(model, x, t, denoised_fn)
        straight, slope = x / scale, eps - x_0
        x = scale_next * (straight + (s_next - s) * slope)
        if s_next > 0:
            x_0, eps = process.predict(model, x, t_next, denoised_fn)
            x = scale_next * (straight + (s_next - s) * (slope + eps - x_0) / 2)
        yield {"sample": x, "pred_xstart": x_0}


def dpmpp(process: Process, model: Callable, x: Tensor, noise_source: NoiseSource, denoised_fn: DenoisedFn = None) -> Steps:
    """DPM-Solver++(2M) (Lu et al., arXiv:2211.01095, Algorithm 2): second order, one evaluation of the model per step.

    x_0 is extrapolated linearly in lambda = log(alpha / sigma) from the last two predictions, and is constant over the step.
    Some steps are of first order: the first; the last, if it ends at sigma 0; the second, if the first began at alpha 0. The
    order is 2 where lambda is bounded, and 2 up to a logarithm on the whole flow.
    """
    x_0_last, h_last = None, math.inf
    for t, t_next in pairwise(process.grid):
        (alpha, sigma), (alpha_next, sigma_next) = process.alpha_sigma(t), process.alpha_sigma(t_next)
        h = half_log_snr(alpha_next, sigma_next) - half_log_snr(alpha, sigma)
        x_0, _ = process.predict(model, x, t, denoised_fn)
        second_order = math.isfinite(h) and math.isfinite(h_last)
        x_0_step = x_0 + h / (2 * h_last) * (x_0 - x_0_last) if second_order else x_0
        ratio = sigma_next / sigma
        x = ratio * x + (alpha_next - ratio * alpha) * x_0_step  # alpha_next (1 - e^-h) = alpha_next - ratio alpha
        x_0_last, h_last = x_0, h
        yield {"sample": x, "pred_xstart": x_0}


def flow_map(process: Process, model: Callable, x: Tensor, noise_source: NoiseSource, denoised_fn: DenoisedFn = None,
             eta: float = 0.0) -> Steps:
    """Whole steps of a flow map. eta 1 jumps to x_0 each time and adds fresh noise (Lee et al., arXiv:2510.24474).

    The process must offer jump, as FlowMap does. Only an x_0 goes through denoised_fn.
    """
    for step, (t, t_next) in enumerate(pairwise(process.grid)):
        to = 0.0 if eta else t_next
        x_next, velocity = process.jump(model, x, t, to)
        x_0 = x_next if to == 0 else x - t * velocity
        x_0 = denoised_fn(x_0) if denoised_fn else x_0
        alpha, sigma = process.alpha_sigma(t_next)
        x = x_0 if t_next == 0 else alpha * x_0 + sigma * noise_source(step) if eta else x_next
        yield {"sample": x, "pred_xstart": x_0}


def sde(process: Process, model: Callable, x: Tensor, noise_source: NoiseSource, denoised_fn: DenoisedFn = None) -> Steps:
    """SiT's SDE on the straight path, by Euler and Maruyama (Ma et al., arXiv:2401.08740).

    dx = (v - w s / 2) dt + sqrt(w) dW, with w = 2t and the score s = -(x + (1 - t) v) / t. The times run from 1 to 0.04,
    shifted as the grid is; from there the last step goes to 0 without noise.
    """
    count = len(process.grid) - 1
    times = [process.shifted(1 - (1 - SDE_LAST) * step / max(count - 1, 1)) for step in range(count)] + [0.0]
    for step, (t, t_next) in enumerate(pairwise(times)):
        x_0, eps = process.predict(model, x, t, denoised_fn)
        velocity, dt = eps - x_0, t_next - t
        score = -(x + (1 - t) * velocity) / t
        x = x + (velocity - t * score) * dt
        if t_next > 0:
            x = x + math.sqrt(2 * t * -dt) * noise_source(step)
        yield {"sample": x, "pred_xstart": x_0}


def half_log_snr(alpha: float, sigma: float) -> float:
    """lambda = log(alpha / sigma); infinite at the ends of a path."""
    return math.inf if sigma == 0 else -math.inf if alpha == 0 else math.log(alpha / sigma)


def straighten(process: Process, t: float) -> tuple[float, float]:
    """(scale, s) that turn any path into the straight one: x_t / scale = (1 - s) x_0 + s eps, with slope eps - x_0.

    For FlowMatching they are (1, t).
    """
    alpha, sigma = process.alpha_sigma(t)
    return alpha + sigma, sigma / (alpha + sigma)


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpmpp, "euler": ddim, "heun": heun, "sde": sde, "map": flow_map}
SDE_LAST = 0.04  # the last time of SiT's SDE before 0
# What a sampler needs of a process besides what process.py lists, and what has it.
NEEDS = {"ddpm": ("p_mean_variance", "a Gaussian process"), "sde": ("shifted", "a flow"), "map": ("jump", "a flow map")}


def samplers_of(process: Process) -> list[str]:
    """The names of the samplers that support a process."""
    return [name for name in SAMPLERS if name not in NEEDS or hasattr(process, NEEDS[name][0])]


def get_sampler(name: str, process: Process, eta: float = 0.0) -> Callable[..., Steps]:
    """The sampler `name`. Raises UserError if it does not support the process, or eta."""
    if name not in SAMPLERS:
        raise UserError(f"`sampler` {name!r} is unknown; allowed: {', '.join(SAMPLERS)}")
    if name not in (allowed := samplers_of(process)):
        raise UserError(f"`sampler` {name} needs {NEEDS[name][1]}, not {type(process).__name__}; allowed: {', '.join(allowed)}")
    if not 0 <= eta <= 1:
        raise UserError(f"`eta` {eta} is not in 0..1")
    if eta and name not in ("ddim", "map"):
        raise UserError(f"`eta` applies only to `sampler` ddim and map, not to {name} (`eta` is {eta})")
    if name == "map" and eta not in (0, 1):
        raise UserError(f"`eta` {eta} is neither 0 nor 1, as `sampler` map needs")
    return partial(SAMPLERS[name], eta=eta) if eta else SAMPLERS[name]


def evaluation_times(sampler: Callable[..., Steps], process: Process) -> tuple[float, ...]:
    """The t (0..1000) of each call that a sampler makes to its model, in order, recorded on one pixel."""
    times = []

    def record(x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        times.append(t.item())
        return torch.zeros(1, 2 if process.learn_sigma else 1, 1, 1)

    last(sampler(process, record, torch.zeros(1, 1, 1, 1), lambda step: torch.zeros(1, 1, 1, 1)))
    return tuple(times)


# --- loops, by the names that DiT's users know -----------------------------------------------------


class SamplingLoops:
    """DiT's entry points, for any process that inherits them. The generators above do the work."""

    def p_sample_loop(self, model: Callable, shape: tuple[int, ...], noise: Tensor | None = None, **options) -> Tensor:
        """The last sample of p_sample_loop_progressive, whose options it takes: (B, C, H, W)."""
        return last(self.p_sample_loop_progressive(model, shape, noise, **options))

    def ddim_sample_loop(self, model: Callable, shape: tuple[int, ...], noise: Tensor | None = None, **options) -> Tensor:
        """p_sample_loop with DDIM's steps."""
        return last(self.ddim_sample_loop_progressive(model, shape, noise, **options))

    def ddim_sample_loop_progressive(self, model: Callable, shape: tuple[int, ...], noise: Tensor | None = None,
                                     **options) -> Steps:
        """p_sample_loop_progressive with DDIM's steps. `eta` 0 is deterministic, 1 as noisy as DDPM."""
        return self.p_sample_loop_progressive(model, shape, noise, sampler="ddim", **options)

    @torch.no_grad()
    def p_sample_loop_progressive(
            self, model: Callable, shape: tuple[int, ...], noise: Tensor | None = None, clip_denoised: bool = True,
            denoised_fn: DenoisedFn = None, model_kwargs: dict | None = None, device: torch.device | str | None = None,
            progress: bool = False, noise_source: NoiseSource | None = None, sampler: str = "ddpm", eta: float = 0.0) -> Steps:
        """Yield {"sample", "pred_xstart"}, (B, C, H, W) each, after each step.

        Sampling starts from `noise`, or from a fresh draw, on `device` (by default that of the noise, else the model's). Later
        noise is `noise_source(step)`, with steps counted from 0, or fresh draws. `progress` shows a bar.
        """
        if noise is None:
            device = device or next(getattr(model, "__self__", model).parameters()).device
            noise = torch.randn(shape, device=device)
        noise = noise.to(device)

        def denoised(x_start: Tensor) -> Tensor:
            x_start = denoised_fn(x_start) if denoised_fn else x_start
            return x_start.clamp(-self.input_scale, self.input_scale) if clip_denoised else x_start

        noise_source = noise_source or (lambda step: torch.randn_like(noise))
        steps = get_sampler(sampler, self, eta)(self, partial(model, **(model_kwargs or {})), noise, noise_source, denoised)
        yield from tqdm(steps, total=self.num_timesteps, disable=not progress)


def last(steps: Steps) -> Tensor:
    """The sample of the last step."""
    for step in steps:
        sample = step["sample"]
    return sample
