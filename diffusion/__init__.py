"""Diffusion processes, their losses and samplers. `create_diffusion` builds a process from DiT's arguments."""

from collections.abc import Callable
from typing import Any

from runtime import UserError

from .flow import FlowMatching
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
    time_sampling: str = "uniform",
    flow_loss: str = "velocity",
    input_scale: float = 1.0,
) -> Process:
    """Build a process. All but the last four arguments, and all defaults, are DiT's.

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
        objective: what the network predicts: "epsilon", "x0", "v", or "flow", the velocity of the straight path. A flow
            has no schedule and no variance, so arguments about these do not apply.
        time_sampling: of training timesteps: "uniform", or "logit-normal" (flow only).
        flow_loss: "velocity", or "velocity+epsilon+x0", the sum of the squared errors of all three (flow only).
        input_scale: the factor by which the data is scaled to x_0 (Chen, arXiv:2301.10972, without its normalisation of
            x_t). A factor below 1 means less signal at every t. Not for flow.
    """
    arguments = dict(locals())
    if objective not in OBJECTIVES:
        raise UserError(f"objective {objective!r} is unknown; allowed: {', '.join(OBJECTIVES)}")
    if not isinstance(diffusion_steps, int) or diffusion_steps < 1:
        raise UserError(f"diffusion_steps {diffusion_steps!r} is not a whole number of at least 1")
    if predict_xstart and objective not in ("epsilon", "x0"):
        raise UserError(f"predict_xstart contradicts objective {objective!r}")
    timesteps = space_timesteps(diffusion_steps, "" if timestep_respacing is None else timestep_respacing)
    return OBJECTIVES[objective](timesteps, arguments)


def gaussian(timesteps: list[int], arguments: dict[str, Any]) -> GaussianDiffusion:
    """DDPM's process. `arguments` are those of create_diffusion."""
    for name, default in (("time_sampling", "uniform"), ("flow_loss", "velocity")):
        if arguments[name] != default:
            raise UserError(f"{name} {arguments[name]!r} needs objective 'flow'")
    learn_sigma, sigma_small = arguments["learn_sigma"], arguments["sigma_small"]
    use_kl, rescaled = arguments["use_kl"], arguments["rescale_learned_sigmas"]
    return GaussianDiffusion(
        named_betas(arguments["noise_schedule"], arguments["diffusion_steps"]),
        timesteps,
        prediction="x0" if arguments["predict_xstart"] else arguments["objective"],
        variance="learned_range" if learn_sigma else "fixed_small" if sigma_small else "fixed_large",
        loss="rescaled_kl" if use_kl else "rescaled_mse" if rescaled else "mse",
        input_scale=arguments["input_scale"],
    )


def flow(timesteps: list[int], arguments: dict[str, Any]) -> FlowMatching:
    """The straight path. `arguments` are those of create_diffusion. Those that do not apply must keep their defaults."""
    defaults = dict(noise_schedule="linear", use_kl=False, sigma_small=False, rescale_learned_sigmas=False, input_scale=1)
    if given := [name for name, default in defaults.items() if arguments[name] != default]:
        raise UserError(f"{', '.join(given)}: without meaning for flow")
    return FlowMatching(len(timesteps), arguments["time_sampling"], arguments["flow_loss"])


# objective -> (kept timesteps, arguments of create_diffusion) -> process; add your own here (docs/extending.md)
OBJECTIVES: dict[str, Callable[[list[int], dict[str, Any]], Process]] = {
    "epsilon": gaussian, "x0": gaussian, "v": gaussian, "flow": flow}
