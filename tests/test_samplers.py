"""Solvers against diffusers' schedulers on one analytic model, and against data whose exact solutions are known."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from conftest import analytic_model, assert_close
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from scipy.stats import norm

from diffusion import create_diffusion
from diffusion.samplers import SAMPLERS, evaluation_times, get_sampler, samplers_of

PREDICTION = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
in_diffusers = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
fixed = partial(analytic_model, learned=False)


@pytest.fixture
def noise():
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def draws(x):
    """A source of noise like x."""
    generator = torch.Generator().manual_seed(1)
    return lambda step: torch.randn(x.shape, generator=generator)


def final(process, sampler, model, x, noise_source=None, eta=0.0):
    *_, step = get_sampler(sampler, process, eta)(process, model, x, noise_source)
    return step["sample"]


def run_scheduler(scheduler, x, **options):
    for t in scheduler.timesteps:
        x = scheduler.step(fixed(x, t.expand(len(x))), t, x, **options).prev_sample
    return x


# --- against diffusers ---------------------------------------------------------------------------


@in_diffusers
@pytest.mark.parametrize("objective", PREDICTION)
def test_samplers_of_a_gaussian_process_equal_diffusers(noise, objective):
    def scheduler(kind, timesteps, **options):
        found = kind(beta_start=1e-4, beta_end=0.02, prediction_type=PREDICTION[objective], **options)
        found.set_timesteps(**timesteps)
        return found

    process = create_diffusion("ddim20", objective=objective, learn_sigma=False, sigma_small=True)
    ddim = scheduler(DDIMScheduler, dict(num_inference_steps=20), clip_sample=False)
    assert_close(final(process, "ddim", fixed, noise), run_scheduler(ddim, noise))
    ddpm = scheduler(DDPMScheduler, dict(num_inference_steps=20), clip_sample=False)
    assert_close(final(process, "ddpm", fixed, noise, draws(noise)),
                 run_scheduler(ddpm, noise, generator=torch.Generator().manual_seed(1)))
    process = create_diffusion("20", objective=objective, learn_sigma=False)
    dpmpp = scheduler(DPMSolverMultistepScheduler, dict(timesteps=process.timestep_map[::-1]), final_sigmas_type="zero")
    assert_close(final(process, "dpm++", fixed, noise), run_scheduler(dpmpp, noise))


@in_diffusers
def test_dpmpp_equals_diffusers_on_the_flow(noise):
    """From t = 0.98: at 1, lambda is infinite, which diffusers' solver does not take."""
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", final_sigmas_type="zero")
    process = create_diffusion("10", objective="flow")
    process.grid = tuple(0.98 * t for t in process.grid)
    scheduler.set_timesteps(10)
    scheduler.sigmas = torch.tensor(process.grid)
    scheduler.timesteps = 1000 * scheduler.sigmas[:-1]
    assert_close(final(process, "dpm++", fixed, noise), run_scheduler(scheduler, noise))


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_euler_and_heun_equal_diffusers_on_the_flow(noise, sampler):
    scheduler = {"euler": FlowMatchEulerDiscreteScheduler, "heun": FlowMatchHeunDiscreteScheduler}[sampler]()
    scheduler.set_timesteps(10)
    process = create_diffusion("10", objective="flow")
    process.grid = (*np.linspace(1, scheduler.sigmas[-2].item(), 10).tolist(), 0)
    assert_close(final(process, sampler, fixed, noise), run_scheduler(scheduler, noise))


def test_ddim_eta_1_is_ddpm_with_the_posterior_variance(noise):
    process = create_diffusion("50", learn_sigma=False, sigma_small=True)
    expected = final(process, "ddpm", fixed, noise, draws(noise))
    assert_close(final(process, "ddim", fixed, noise, draws(noise), eta=1.0), expected, tolerance=1e-4)


# --- exact solutions -----------------------------------------------------------------------------

WEIGHTS, MEANS, STDS = np.array([0.3, 0.7]), np.array([-1.0, 0.8]), np.array([0.4, 0.3])  # of the data: two Gaussians


def marginal(process, t):
    """Means and standard deviations of the components of x_t, as arrays that broadcast with x[..., None]."""
    alpha, sigma = process.alpha_sigma(t)
    return alpha * MEANS, np.sqrt(alpha**2 * STDS**2 + sigma**2)


def quantile_of(process, t, x):
    """The CDF of x_t at x. The ODE keeps order on a line, and so keeps this of every x exactly."""
    return (WEIGHTS * norm.cdf(x.numpy()[..., None], *marginal(process, t))).sum(-1)


def exact_model(process, objective):
    """The optimal prediction: E[x_0 | x_t] is each component's, weighted by how likely x_t comes from it."""
    def model(x, time):
        t = time[0].item() / 1000 if objective == "flow" else process.timestep_map.index(int(time[0]))
        (alpha, sigma), (means, stds) = process.alpha_sigma(t), marginal(process, t)
        distance = x.numpy()[..., None] - means
        likely = WEIGHTS / stds * np.exp(-0.5 * (distance / stds) ** 2)
        component = MEANS + alpha * STDS**2 / stds**2 * distance
        x_0 = torch.from_numpy((likely * component).sum(-1) / likely.sum(-1)).to(x.dtype)
        eps = (x - alpha * x_0) / sigma
        return {"flow": eps - x_0, "epsilon": eps, "v": alpha * eps - sigma * x_0}[objective]
    return model


def bounded(process):
    """The part of the grid where lambda is bounded: 0.95 to 0.05 on the flow, all but the last step otherwise."""
    count = process.num_timesteps
    return process.grid[:-1] if hasattr(process, "timestep_map") else tuple(np.linspace(0.95, 0.05, count + 1))


@pytest.mark.parametrize(("sampler", "objective", "grid", "low", "high"), [
    ("ddim", "flow", bounded, 0.9, 1.1), ("heun", "flow", bounded, 1.95, 3), ("dpm++", "flow", bounded, 1.95, 3),
    ("ddim", "v", bounded, 0.9, 1.1), ("heun", "v", bounded, 1.95, 3), ("dpm++", "v", bounded, 1.95, 3),
    ("dpm++", "flow", lambda process: process.grid[:-1], 1.8, 3)])  # on the whole flow: of order 2 up to a logarithm
def test_solvers_have_their_order(sampler, objective, grid, low, high):
    """By which power of the number of steps the error falls, in the CDF."""
    errors = []
    for steps in (500, 1000):
        process = create_diffusion(steps, objective=objective, learn_sigma=False)
        process.grid = grid(process)
        x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
        end = final(process, sampler, exact_model(process, objective), x)
        errors.append(np.abs(quantile_of(process, process.grid[-1], end) - quantile_of(process, process.grid[0], x)).max())
    assert low < np.log2(errors[0] / errors[1]) < high


def test_a_stochastic_sampler_reaches_the_data_distribution():
    """The CDF of its samples is uniform."""
    process = create_diffusion("250", learn_sigma=False)
    x = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    end = final(process, "ddim", exact_model(process, "epsilon"), x, draws(x), eta=0.5)
    quantiles = quantile_of(process, process.grid[-1], end)
    assert [quantiles.mean(), quantiles.std()] == pytest.approx([0.5, 12**-0.5], abs=0.02)


# --- every sampler -------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["epsilon", "x0", "v", "flow", "flow-map"])
def test_every_solver_ends_finite_in_fp32_also_with_a_model_in_bf16(noise, objective):
    for steps, name in itertools.product((1, 2, 7), SAMPLERS):
        process, seen = create_diffusion(steps, objective=objective, learn_sigma=False), []
        if name not in samplers_of(process):
            continue
        model = lambda x, t, r=None: seen.append(t[0].item()) or fixed(x, t).bfloat16()  # noqa: E731, B023
        states = list(SAMPLERS[name](process, model, noise, lambda step: noise))
        assert len(states) == steps
        for state in states:
            assert state["sample"].dtype == state["pred_xstart"].dtype == torch.float32
            assert state["sample"].isfinite().all()
        assert evaluation_times(SAMPLERS[name], process) == tuple(seen)
        assert len(seen) == (2 * steps - 1 if name == "heun" else steps)


# --- wrong arguments -----------------------------------------------------------------------------


def test_wrong_samplers_and_etas_are_refused():
    for name, eta, words in (("ddpm", 0.0, r"ddpm .*FlowMatching.*allowed: ddim, dpm\+\+, euler, heun"),
                             ("plms", 0.0, "'plms' .*allowed: ddpm"), ("euler", 0.5, "`eta` .*ddim.*euler.*0.5"),
                             ("ddim", 1.5, r"1.5 .*0\.\.1"), ("ddim", float("nan"), r"nan .*0\.\.1")):
        with pytest.raises(ValueError, match=words):
            get_sampler(name, create_diffusion("2", objective="flow"), eta)
