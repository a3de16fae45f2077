"""Diffusion processes, their losses and samplers. `create_diffusion` builds a process from DiT's arguments."""

import inspect
from collections.abc import Callable
from typing import Any

from runtime import UserError

from .flow import FlowMatching
from .flow_map import FlowMap
from .gaussian_diffusion import GaussianDiffusion
from .process import Process
from .schedules import named_betas, space_timesteps


def create_diffusion(
    timestep_respacing: str | int | None = "",
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
    objective: str = "epsilon",
    **objective_args: Any,
) -> Process:
    """Build a process. All arguments but the last two, and all defaults, are DiT's.

    Args:
        timestep_respacing: which timesteps sampling visits: "" all, "250" evenly spaced, "10,10,5" by section, "ddim50"
            with an integer stride. A flow takes only the number, in equal steps, at most diffusion_steps. A single step of
            a Gaussian process begins at t = 0, as DiT's does, and so returns the noise.
        noise_schedule: "linear", "squaredcos_cap_v2", or "gamma_linear", "gamma_cosine" or "gamma_sigmoid" (best sampled
            with an integer stride, see schedules.gamma_betas).
        use_kl: train on the variational bound only.
        sigma_small: a fixed variance is the posterior's instead of beta.
        predict_xstart: the same as objective="x0".
        learn_sigma: the network's second half of channels is the variance. Flow ignores it.
        rescale_learned_sigmas: multiply the bound by T/1000 when it is added to the MSE.
        diffusion_steps: T of the process before respacing.
        objective: what the network predicts, a key of OBJECTIVES: "epsilon", "x0", "v", "flow", the velocity of the
            straight path, or "flow-map", mean velocities too.
        objective_args: further parameters of the objective's factory, one of the functions below.

    Raises:
        UserError: a value is not allowed, or the objective's factory does not take an argument that is not at its default.
    """
    supported = supported_arguments(objective)
    if not isinstance(diffusion_steps, int) or diffusion_steps < 1:
        raise UserError(f"diffusion_steps {diffusion_steps!r} is not a whole number of at least 1")
    timesteps = space_timesteps(diffusion_steps, "" if timestep_respacing is None else timestep_respacing)
    arguments = dict(objective=objective, learn_sigma=learn_sigma, diffusion_steps=diffusion_steps,
                     noise_schedule=noise_schedule, use_kl=use_kl, sigma_small=sigma_small, predict_xstart=predict_xstart,
                     rescale_learned_sigmas=rescale_learned_sigmas, **objective_args)
    for name, value in arguments.items():
        if name not in supported and not is_default(name, value):
            raise UserError(f"`{name}` is not supported with objective {objective!r}; supported: {', '.join(supported)}")
    factory = OBJECTIVES[objective]
    named = inspect.signature(factory).parameters
    return factory(timesteps, **{name: value for name, value in arguments.items() if name in named})


def gaussian(timesteps: list[int], objective: str, diffusion_steps: int, noise_schedule: str, use_kl: bool,
             sigma_small: bool, predict_xstart: bool, learn_sigma: bool, rescale_learned_sigmas: bool,
             input_scale: float = 1.0) -> GaussianDiffusion:
    """DDPM's process.

    Args:
        input_scale: the factor by which the data is scaled to x_0 (Chen, arXiv:2301.10972, without its normalisation of
            x_t). A factor below 1 means less signal at every t.
    """
    if predict_xstart and objective == "v":
        raise UserError("predict_xstart contradicts objective 'v'")
    return GaussianDiffusion(
        named_betas(noise_schedule, diffusion_steps),
        timesteps,
        prediction="x0" if predict_xstart else objective,
        variance="learned_range" if learn_sigma else "fixed_small" if sigma_small else "fixed_large",
        loss="rescaled_kl" if use_kl else "rescaled_mse" if rescale_learned_sigmas else "mse",
        input_scale=input_scale,
    )


def straight_path(timesteps: list[int], time_sampling: str = "uniform", flow_loss: str = "velocity",
                  prediction: str = "velocity", time_mean: float = 0.0, time_std: float = 1.0, shift: float = 1.0,
                  shift_training: bool = False) -> FlowMatching:
    """Flow matching; see FlowMatching for the arguments.

    Args:
        flow_loss: its `loss`.
    """
    return FlowMatching(len(timesteps), time_sampling, flow_loss, prediction, time_mean, time_std, shift, shift_training)


def mean_velocities(timesteps: list[int], map_share: float = 0.5, map_guidance: float = 0.0, shift: float = 1.0) -> FlowMap:
    """Flow matching and its map; see FlowMap.

    Args:
        map_share: 0, 0.5 or 1: of the rows of a batch, how many learn the map.
        map_guidance: omega of guidance in training; 0: none.
    """
    return FlowMap(len(timesteps), map_share, map_guidance, shift)


# A factory takes the kept `timesteps` and builds a process. Its signature says what else it takes: arguments of
# create_diffusion by their names, and parameters of its own, with defaults. Add your own here (docs/extending.md).
OBJECTIVES: dict[str, Callable[..., Process]] = {"epsilon": gaussian, "x0": gaussian, "v": gaussian, "flow": straight_path,
                                                 "flow-map": mean_velocities}


def supported_arguments(objective: str) -> list[str]:
    """The names that create_diffusion accepts with an objective: three with any, and those in its factory's signature."""
    if objective not in OBJECTIVES:
        raise UserError(f"objective {objective!r} is unknown; allowed: {', '.join(OBJECTIVES)}. Register your own first, as "
                        "docs/extending.md shows")
    names = dict.fromkeys(["objective", "diffusion_steps", "learn_sigma", *inspect.signature(OBJECTIVES[objective]).parameters])
    return [name for name in names if name != "timesteps"]


def is_default(name: str, value: Any) -> bool:
    """Whether `value` is the default of the argument `name`, in create_diffusion or in any objective's factory."""
    signatures = (inspect.signature(function).parameters for function in (create_diffusion, *OBJECTIVES.values()))
    return any(name in parameters and parameters[name].default == value for parameters in signatures)
