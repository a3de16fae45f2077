"""Solvers against diffusers' schedulers on one analytic model, and against data whose exact solutions are known."""

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
from diffusion.samplers import SAMPLERS, evaluation_times, get_sampler, straighten

PREDICTION = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
in_diffusers = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
fixed = partial(analytic_model, learned=False)


@pytest.fixture
def noise():
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def final(process, sampler, model, x, noise_source=None):
    *_, step = SAMPLERS[sampler](process, model, x, noise_source)
    return step["sample"]


def run_scheduler(scheduler, x, **options):
    for t in scheduler.timesteps:
        x = scheduler.step(fixed(x, t.expand(len(x))), t, x, **options).prev_sample
    return x


# --- against diffusers ---------------------------------------------------------------------------


@pytest.mark.parametrize("objective", PREDICTION)
def test_ddim_equals_diffusers(noise, objective):
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type=PREDICTION[objective], clip_sample=False)
    scheduler.set_timesteps(20)
    process = create_diffusion("ddim20", objective=objective, learn_sigma=False)
    assert_close(final(process, "ddim", fixed, noise), run_scheduler(scheduler, noise))


@pytest.mark.parametrize("objective", PREDICTION)
def test_ddpm_equals_diffusers(noise, objective):
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type=PREDICTION[objective], clip_sample=False)
    scheduler.set_timesteps(20)
    process = create_diffusion("ddim20", objective=objective, learn_sigma=False, sigma_small=True)
    generator = torch.Generator().manual_seed(1)
    ours = final(process, "ddpm", fixed, noise, lambda step: torch.randn(noise.shape, generator=generator))
    assert_close(ours, run_scheduler(scheduler, noise, generator=torch.Generator().manual_seed(1)))


@in_diffusers
@pytest.mark.parametrize("objective", PREDICTION)
def test_dpmpp_equals_diffusers(noise, objective):
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, prediction_type=PREDICTION[objective],
                                            final_sigmas_type="zero")
    process = create_diffusion("20", objective=objective, learn_sigma=False)
    scheduler.set_timesteps(timesteps=process.timestep_map[::-1])
    assert_close(final(process, "dpm++", fixed, noise), run_scheduler(scheduler, noise))


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


def test_euler_on_a_gaussian_process_is_diffusers_euler_on_the_straightened_path(noise):
    process = create_diffusion("20", objective="v", learn_sigma=False)
    times = [straighten(process, t) for t in process.grid]
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[s for _, s in times[:-1]])
    x = noise / times[0][0]
    for t, (scale, _), scheduled in zip(process.grid, times, scheduler.timesteps):
        alpha, sigma = process.alpha_sigma(t)
        x_t, time = scale * x, torch.full((len(x),), float(process.timestep_map[t]))
        v = fixed(x_t, time)
        x = scheduler.step((alpha * v + sigma * x_t) - (alpha * x_t - sigma * v), scheduled, x).prev_sample  # eps - x_0
    assert_close(final(process, "euler", fixed, noise), x)


def test_euler_follows_the_velocity_on_the_flow(noise):
    process, x = create_diffusion("8", objective="flow"), noise
    for step in range(8):
        t = 1 - step / 8
        x = x - fixed(x, torch.full((len(x),), 1000 * t)) / 8
    assert_close(final(process, "euler", fixed, noise), x)


def test_ddim_eta_1_is_ddpm_with_the_posterior_variance(noise):
    process, finals = create_diffusion("50", learn_sigma=False, sigma_small=True), []
    for sampler, eta in (("ddpm", 0.0), ("ddim", 1.0)):
        generator = torch.Generator().manual_seed(1)
        source = lambda step: torch.randn(noise.shape, generator=generator)  # noqa: E731, B023
        *_, last = get_sampler(sampler, process, eta)(process, fixed, noise, source)
        finals.append(last["sample"])
    assert_close(*finals, tolerance=1e-4)


# --- exact solutions -----------------------------------------------------------------------------

DATA = {"gaussian": ([1.0], [0.3], [0.5]), "mixture": ([0.3, 0.7], [-1.0, 0.8], [0.4, 0.3])}  # weights, means, stds


def marginal(process, data, t):
    """Weights, means and standard deviations of x_t, as arrays that broadcast with x[..., None]."""
    alpha, sigma = process.alpha_sigma(t)
    weights, means, stds = map(np.array, DATA[data])
    return weights, alpha * means, np.sqrt(alpha**2 * stds**2 + sigma**2)


def quantile_of(process, data, t, x):
    """The CDF of x_t at x. The ODE keeps order on a line, and so keeps this of every x exactly."""
    weights, means, stds = marginal(process, data, t)
    return (weights * norm.cdf(x.numpy()[..., None], means, stds)).sum(-1)


def exact_model(process, data, objective):
    """The optimal prediction: E[x_0 | x_t] is each component's, weighted by how likely x_t comes from it."""
    def model(x, time):
        t = time[0].item() / 1000 if objective == "flow" else process.timestep_map.index(int(time[0]))
        alpha, sigma = process.alpha_sigma(t)
        weights, means, stds = marginal(process, data, t)
        likely = weights * norm.pdf(x.numpy()[..., None], means, stds)
        component = np.array(DATA[data][1]) + alpha * np.array(DATA[data][2])**2 / stds**2 * (x.numpy()[..., None] - means)
        x_0 = torch.from_numpy((likely * component).sum(-1) / likely.sum(-1)).to(x.dtype)
        eps = (x - alpha * x_0) / sigma
        return {"flow": eps - x_0, "epsilon": eps, "v": alpha * eps - sigma * x_0, "x0": x_0}[objective]
    return model


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 2), ("dpm++", 2)])
@pytest.mark.parametrize(("data", "objective"), [("gaussian", "v"), ("mixture", "flow"), ("mixture", "v")])
def test_solvers_have_their_order(data, sampler, order, objective):
    """Where lambda is bounded: on the flow from t = 0.95 to 0.05, and to the last step but one of the discrete process."""
    def grid(process):
        return tuple(np.linspace(0.95, 0.05, process.num_timesteps + 1)) if objective == "flow" else process.grid[:-1]

    slope = convergence(data, sampler, objective, (125, 250, 500), grid)
    assert slope == pytest.approx(1, abs=0.1) if order == 1 else slope > 1.95, slope


def test_dpmpp_on_the_whole_flow_is_of_order_2_but_for_a_logarithm():
    assert convergence("gaussian", "dpm++", "flow", (125, 250, 500), lambda process: process.grid[:-1]) > 1.8


def convergence(data, sampler, objective, counts, grid):
    """By which power of the number of steps the error falls, in the CDF: the slope in a log-log plot."""
    errors = []
    for steps in counts:
        process = create_diffusion(steps, objective=objective, learn_sigma=False)
        process.grid = grid(process)
        x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
        end = final(process, sampler, exact_model(process, data, objective), x)
        errors.append(np.abs(quantile_of(process, data, process.grid[-1], end)
                             - quantile_of(process, data, process.grid[0], x)).max())
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_stochastic_samplers_reach_the_data_distribution(sampler, eta):
    process = create_diffusion("250", objective="epsilon", learn_sigma=False, sigma_small=True)
    x = torch.randn(40_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    model = exact_model(process, "gaussian", "epsilon")
    *_, last = get_sampler(sampler, process, eta)(process, model, x, lambda step: torch.randn(x.shape, generator=generator))
    assert last["sample"].mean().item() == pytest.approx(0.3, abs=4 * 0.5 / 200 + 0.005)
    assert last["sample"].std().item() == pytest.approx(0.5, rel=0.02)


# --- every sampler -------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("objective", ["epsilon", "x0", "v", "flow"])
def test_every_solver_ends_finite_in_fp32_also_with_a_model_in_bf16(noise, objective, steps):
    process = create_diffusion(steps, objective=objective, learn_sigma=False)
    for name in SAMPLERS:
        if (name, objective) != ("ddpm", "flow"):
            states = list(SAMPLERS[name](process, lambda x, t: fixed(x, t).bfloat16(), noise, lambda step: noise))
            assert len(states) == steps
            for state in states:
                assert state["sample"].dtype == state["pred_xstart"].dtype == torch.float32
                assert state["sample"].isfinite().all()


@pytest.mark.parametrize(("name", "objective"), [("ddpm", "epsilon"), ("ddim", "flow"), ("dpm++", "epsilon"), ("heun", "flow")])
def test_evaluation_times_are_those_of_the_calls(noise, name, objective):
    process, seen = create_diffusion("6", objective=objective), []
    list(SAMPLERS[name](process, lambda x, t: seen.append(t[0].item()) or analytic_model(x, t, process.learn_sigma), noise,
                        lambda step: noise))
    assert evaluation_times(SAMPLERS[name], process) == tuple(seen)
    assert len(seen) == (11 if name == "heun" else 6)


def test_dpmpp_extrapolates():
    """Constant predictions leave it where DDIM ends; changing ones do not, from the third step on."""
    process, x = create_diffusion("5", objective="x0", learn_sigma=False), torch.ones(1, 1, 1, 1)
    for model, same in ((lambda x, t: torch.full_like(x, 0.5), 5), (lambda x, t: t.view(1, 1, 1, 1) / 1000, 1)):
        a, b = (list(SAMPLERS[name](process, model, x, None)) for name in ("dpm++", "ddim"))
        assert [torch.allclose(p["sample"], q["sample"], atol=1e-5) for p, q in zip(a, b)] == [True] * same + [False] * (
            4 - same) + [True] * (same < 5)


# --- wrong arguments -----------------------------------------------------------------------------


def test_wrong_samplers_and_etas_are_refused():
    for name, eta, words in (("ddpm", 0.0, r"ddpm .*FlowMatching.*allowed: ddim, dpm\+\+, euler, heun"),
                             ("plms", 0.0, "'plms' .*allowed: ddpm"), ("euler", 0.5, "`eta` .*ddim.*euler.*0.5"),
                             ("ddim", 1.5, r"1.5 .*0\.\.1"), ("ddim", float("nan"), r"nan .*0\.\.1")):
        with pytest.raises(ValueError, match=words):
            get_sampler(name, create_diffusion("2", objective="flow"), eta)
