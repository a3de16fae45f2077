"""Noise schedules, and the timesteps that a shorter process keeps of them. Plain numpy in float64."""

import math
from collections.abc import Callable
from functools import partial
from itertools import accumulate, repeat

import numpy as np

from runtime import UserError

MODEL_TIME = 1000  # models take t on the scale 0..1000, whatever the process


def linear_betas(num_timesteps: int) -> np.ndarray:
    """DDPM's linear schedule (Ho et al., arXiv:2006.11239), scaled so that any number of steps ends in about the same noise."""
    scale = 1000 / num_timesteps
    return np.linspace(scale * 0.0001, scale * 0.02, num_timesteps, dtype=np.float64)


def squaredcos_cap_v2_betas(num_timesteps: int) -> np.ndarray:
    """Improved DDPM's cosine schedule (Nichol & Dhariwal, arXiv:2102.09672, Eq. 17), betas at most 0.999."""
    u = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
    alpha_bar = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def gamma_betas(num_timesteps: int, gamma: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Betas, at most 0.999, with abar = gamma((t + 1) / T) at t = 0..T-1; gamma(0) = 1 and gamma(1) = 0.

    At t = T-1 almost nothing of x_0 is left. A first sampling step from there multiplies the error of epsilon by 62 or
    more. Sample with a whole stride such as "ddim50": it begins at an earlier t.
    """
    abar = gamma(np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps)
    return np.minimum(1 - abar[1:] / abar[:-1], 0.999)


def between(f: Callable[[np.ndarray], np.ndarray], start: float, end: float, t: np.ndarray) -> np.ndarray:
    """gamma(t) from f on start..end, rescaled to 1 at t = 0 and 0 at t = 1 (Chen, arXiv:2301.10972, Algorithm 1)."""
    return (f(end) - f(start + t * (end - start))) / (f(end) - f(start))


def cosine_gamma(t: np.ndarray, start: float = 0.2, end: float = 1.0, tau: float = 2.0) -> np.ndarray:
    """gamma(t) from a cosine (Chen, Algorithm 1)."""
    return between(lambda u: np.cos(u * math.pi / 2) ** (2 * tau), start, end, t)


def sigmoid_gamma(t: np.ndarray, start: float = 0.0, end: float = 3.0, tau: float = 0.7) -> np.ndarray:
    """gamma(t) from a sigmoid (Chen, Algorithm 1)."""
    return between(lambda u: 1 / (1 + np.exp(-u / tau)), start, end, t)


SCHEDULES = {
    "linear": linear_betas, "squaredcos_cap_v2": squaredcos_cap_v2_betas,
    "gamma_linear": partial(gamma_betas, gamma=lambda t: 1 - t),
    "gamma_cosine": partial(gamma_betas, gamma=cosine_gamma),
    "gamma_sigmoid": partial(gamma_betas, gamma=sigmoid_gamma),
}


def named_betas(name: str, num_timesteps: int) -> np.ndarray:
    """The betas of the schedule `name` in SCHEDULES: (num_timesteps,) float64."""
    if name not in SCHEDULES:
        raise UserError(f"noise_schedule {name!r} is unknown; allowed: {', '.join(SCHEDULES)}")
    betas = SCHEDULES[name](num_timesteps)
    if betas.max() >= 1:
        raise UserError(f"noise_schedule {name!r} needs more than {num_timesteps} diffusion_steps: a beta would reach 1")
    return betas


def space_timesteps(num_timesteps: int, respacing: str | int) -> list[int]:
    """The timesteps of 0..num_timesteps-1 that a respacing string keeps, ascending.

    "" keeps all; "250" spreads 250 evenly; "10,10,5" splits the process into three equal sections and spreads 10, 10 and 5
    over them; "ddim50" keeps every n-th timestep from 0, for a whole n that keeps exactly 50.
    """
    respacing = str(respacing).strip()
    if respacing.startswith("ddim"):
        return strided_timesteps(num_timesteps, parse_count(respacing[len("ddim") :], respacing))
    counts = [parse_count(part, respacing) for part in respacing.split(",")] if respacing else [num_timesteps]
    size, extra = divmod(num_timesteps, len(counts))
    timesteps, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise UserError(f"respacing {respacing!r}: a section has only {length} timesteps, fewer than {count}")
        stride = (length - 1) / (count - 1) if count > 1 else 1
        positions = accumulate(repeat(stride, count - 1), initial=0.0)  # added up as DiT does: products round otherwise
        timesteps += [start + round(position) for position in positions]
        start += length
    return timesteps


def parse_count(text: str, respacing: str) -> int:
    """Parse a count, at least 1, of a respacing string."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(f"respacing {respacing!r} is not understood; write '', '250', '10,10,5' or 'ddim50', counts from 1")
    return int(text)


def strided_timesteps(num_timesteps: int, count: int) -> list[int]:
    """Every n-th timestep from 0, for the smallest whole n that keeps exactly `count` (DDIM's spacing)."""
    kept = {len(range(0, num_timesteps, n)): n for n in range(num_timesteps, 0, -1)}
    if count not in kept:
        nearest = sorted(sorted(kept, key=lambda other: abs(other - count))[:2])
        raise UserError(f"respacing 'ddim{count}': no whole stride keeps {count} of {num_timesteps} timesteps; the nearest "
                        f"that exist are ddim{' and ddim'.join(map(str, nearest))}; '{count}' spreads {count} unevenly")
    return list(range(0, num_timesteps, kept[count]))
