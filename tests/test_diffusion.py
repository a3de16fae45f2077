import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusion import create_diffusion
from diffusion.guidance import guide
from diffusion.samplers import SAMPLERS, get_sampler
from diffusion.schedules import named_betas, space_timesteps

GOLDEN = Path(__file__).parent / "golden"
golden = np.load(GOLDEN / "diffusion.npz")
VARIANTS = {
    "learned": {},
    "fixed_large": dict(learn_sigma=False),
    "fixed_small": dict(learn_sigma=False, sigma_small=True),
    "xstart": dict(learn_sigma=False, predict_xstart=True),
    "kl": dict(use_kl=True),
    "rescaled": dict(rescale_learned_sigmas=True),
}


def analytic_model(x, t, learned=True):
    """The model of tests/golden/README.md."""
    u = t.view(-1, 1, 1, 1) / 1000
    out = 0.8 * x + 0.1 * torch.sin(3 * x) + 0.05 * u
    return torch.cat([out, torch.tanh(0.5 * x - u)], dim=1) if learned else out


def model_of(diffusion):
    return partial(analytic_model, learned=diffusion.learn_sigma)


def tensors(*keys):
    return [torch.from_numpy(golden[key]) for key in keys]


def assert_close(a, b, tolerance=1e-5):
    b = torch.as_tensor(b)
    error = (a - b).abs() / (1 + b.abs())
    assert error.max() <= tolerance, f"off by {error.max():.2e}"


def matches(prefix):
    return {key.removeprefix(prefix): golden[key] for key in golden.files if key.startswith(prefix)}


# --- golden figures ------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_schedules_are_the_original_ones(schedule):
    diffusion = create_diffusion("", noise_schedule=schedule)
    expected = matches(schedule + "/")
    assert set(expected) == {"betas", "alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
                             "posterior_mean_coef1", "posterior_mean_coef2"}
    for name, values in expected.items():
        assert np.abs(getattr(diffusion, name) - values).max() < 1e-12, name


@pytest.mark.parametrize("respacing", json.loads((GOLDEN / "respacing.json").read_text()))
def test_respacing_keeps_the_original_timesteps(respacing):
    kept = json.loads((GOLDEN / "respacing.json").read_text())[respacing]
    assert create_diffusion(respacing).timestep_map == kept
    assert create_diffusion(respacing).num_timesteps == len(kept)


def test_q_sample_is_the_original_one():
    x0, noise, t = tensors("x0", "noise", "t")
    assert_close(create_diffusion("").q_sample(x0, t, noise), golden["q_sample"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_the_original_ones(variant):
    diffusion = create_diffusion("", **VARIANTS[variant])
    x0, noise, t = tensors("x0", "noise", "t")
    losses = diffusion.training_losses(model_of(diffusion), x0, t, noise=noise)
    expected = matches(f"losses/{variant}/")
    assert set(losses) == set(expected)
    for term, values in expected.items():
        assert_close(losses[term], values)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_p_mean_variance_is_the_original_one(variant, clip):
    diffusion = create_diffusion("", **VARIANTS[variant])
    x0, noise, t = tensors("x0", "noise", "t")
    x_t = diffusion.q_sample(x0, t, noise)
    out = diffusion.p_mean_variance(model_of(diffusion), x_t, t, clip_denoised=clip)
    expected = matches(f"p_mean_variance/{variant}/clip{int(clip)}/")
    assert set(out) == set(expected)
    for term, values in expected.items():
        assert_close(out[term], values)


@pytest.mark.parametrize("respacing", ["ddim50", "ddim10", "20"])
def test_sampling_loops_are_the_original_ones(respacing):
    diffusion = create_diffusion(respacing)
    (noise,) = tensors("noise")

    def source():
        generator = torch.Generator().manual_seed(11)
        return lambda step: torch.randn(noise.shape, generator=generator)

    loop = dict(model=analytic_model, shape=noise.shape, noise=noise, clip_denoised=False)
    assert_close(diffusion.ddim_sample_loop(**loop), golden[f"ddim_sample_loop/{respacing}"])
    assert_close(diffusion.ddim_sample_loop(**loop, eta=1.0, noise_source=source()), golden[f"ddim_eta1/{respacing}"])
    assert_close(diffusion.p_sample_loop(**loop, noise_source=source()), golden[f"p_sample_loop/{respacing}"])


def test_progressive_loops_yield_every_state_and_end_as_the_loop():
    diffusion = create_diffusion("ddim10")
    (noise,) = tensors("noise")
    steps = list(diffusion.ddim_sample_loop_progressive(analytic_model, noise.shape, noise))
    assert len(steps) == 10
    assert set(steps[0]) == {"sample", "pred_xstart"}
    assert torch.equal(steps[-1]["sample"], diffusion.ddim_sample_loop(analytic_model, noise.shape, noise))
    assert torch.equal(steps[-1]["sample"], steps[-1]["pred_xstart"])
    assert steps[-1]["pred_xstart"].abs().max() <= 1  # clipped by default, as in DiT


# --- against diffusers ---------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["epsilon", "v", "x0"])
def test_ddim_equals_diffusers(objective):
    kind = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[objective]
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(20)
    (x,) = tensors("noise")
    diffusion = create_diffusion("ddim20", objective=objective, learn_sigma=False)
    ours = diffusion.ddim_sample_loop(partial(analytic_model, learned=False), x.shape, x, clip_denoised=False)
    for t in scheduler.timesteps:
        x = scheduler.step(analytic_model(x, t.expand(len(x)), learned=False), t, x).prev_sample
    assert_close(ours, x)


def test_v_prediction_mean_equals_diffusers_ddpm():
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction", clip_sample=False)
    scheduler.alphas_cumprod = torch.from_numpy(golden["linear/alphas_cumprod"])  # its own are summed in fp32
    x0, noise, t = tensors("x0", "noise", "t")
    diffusion = create_diffusion("", objective="v", learn_sigma=False, sigma_small=True)
    assert_close(diffusion._target(x0, noise, t), scheduler.get_velocity(x0, noise, t))
    model = partial(analytic_model, learned=False)
    out = diffusion.p_mean_variance(model, x0, t, clip_denoised=False)
    for i, step in enumerate(t):
        x = x0[i : i + 1]
        expected = scheduler.step(model(x, step[None]), step, x, generator=torch.Generator().manual_seed(0))
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) if step > 0 else 0
        assert_close(out["mean"][i : i + 1] + out["variance"][i : i + 1].sqrt() * z, expected.prev_sample)


# --- closed forms --------------------------------------------------------------------------------


def gaussian_model(process, mean, std, objective):
    """The exact prediction for data N(mean, std^2): E[x_0 | x_t] is linear in x_t."""
    def model(x, t):
        time = t[0].item() / 1000 if objective == "flow" else process.timestep_map.index(int(t[0]))
        alpha, sigma = process.alpha_sigma(time)
        x_0 = mean + std**2 * alpha / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
        eps = (x - alpha * x_0) / sigma if sigma else torch.zeros_like(x)
        return {"flow": eps - x_0, "epsilon": eps, "v": alpha * eps - sigma * x_0, "x0": x_0}[objective]
    return model


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("objective", ["flow", "v"])
def test_solvers_have_their_order_on_gaussian_data(sampler, order, objective):
    """Exactly, (x_t - alpha_t mean) / sqrt(alpha_t^2 std^2 + sigma_t^2) is constant along the ODE.

    Read before the last step, whose length the discrete process fixes (from sigma 0.01 to 0).
    """
    mean, std, errors = 0.3, 0.5, []
    for steps in (40, 80, 160):
        process = create_diffusion(steps, objective=objective, learn_sigma=False)
        x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
        *_, before_last, _ = SAMPLERS[sampler](process, gaussian_model(process, mean, std, objective), x, None)
        z = [(state - alpha * mean) / (alpha**2 * std**2 + sigma**2) ** 0.5 for state, (alpha, sigma) in (
            (x, process.alpha_sigma(process.grid[0])),
            (before_last["sample"], process.alpha_sigma(process.grid[-2])))]
        errors.append((z[1] - z[0]).abs().max().item())
    slope = np.polyfit(np.log([40, 80, 160]), np.log(errors), 1)[0]
    assert -slope == pytest.approx(order, abs=0.25), errors


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_stochastic_samplers_reach_the_data_distribution(sampler, eta):
    process = create_diffusion("250", objective="epsilon", learn_sigma=False, sigma_small=True)
    x = torch.randn(40_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    model = gaussian_model(process, 0.3, 0.5, "epsilon")
    *_, final = get_sampler(sampler, process, eta)(process, model, x, lambda step: torch.randn(x.shape, generator=generator))
    assert final["sample"].mean().item() == pytest.approx(0.3, abs=4 * 0.5 / 200 + 0.005)
    assert final["sample"].std().item() == pytest.approx(0.5, rel=0.02)


def test_ddim_eta_1_is_ddpm_with_the_posterior_variance():
    (noise,) = tensors("noise")
    process = create_diffusion("50", learn_sigma=False, sigma_small=True)
    finals = []
    for sampler, eta in (("ddpm", 0.0), ("ddim", 1.0)):
        generator = torch.Generator().manual_seed(1)
        source = lambda step: torch.randn(noise.shape, generator=generator)  # noqa: E731, B023
        model = partial(analytic_model, learned=False)
        finals.append([step["sample"] for step in get_sampler(sampler, process, eta)(process, model, noise, source)][-1])
    assert_close(*finals, tolerance=1e-4)


def test_euler_equals_ddim_on_the_flow_and_takes_the_velocity():
    (noise,) = tensors("noise")
    process = create_diffusion("8", objective="flow")
    model = partial(analytic_model, learned=False)
    x = noise
    for step in range(8):
        t = 1 - step / 8
        x = x - model(x, torch.full((len(x),), 1000 * t)) / 8
    for name in ("euler", "ddim"):
        *_, final = SAMPLERS[name](process, model, noise, None)
        assert_close(final["sample"], x)


@pytest.mark.parametrize("objective", ["epsilon", "x0", "v", "flow"])
def test_the_exact_model_has_no_loss_on_data_of_one_point(objective):
    process = create_diffusion("", objective=objective, learn_sigma=False)
    x0 = torch.full((5, 1, 4, 4), 0.3)
    generator = torch.Generator().manual_seed(0)
    t = process.sample_times(5, generator)
    noise = torch.randn(x0.shape, generator=generator)

    def model(x, times):
        alpha, sigma = (torch.stack(v) for v in zip(*[
            [torch.tensor(a) for a in process.alpha_sigma(time.item())] for time in t]))
        alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        eps = (x - alpha * 0.3) / sigma
        full = torch.full_like(x, 0.3)
        return {"flow": eps - full, "epsilon": eps, "v": alpha * eps - sigma * full, "x0": full}[objective]

    assert process.training_losses(model, x0, t, noise=noise)["loss"].max() < 1e-6


def test_the_flow_gives_the_model_a_time_of_0_to_1000():
    process, seen = create_diffusion("4", objective="flow"), []
    model = lambda x, t: seen.append(t[0].item()) or torch.zeros_like(x)  # noqa: E731
    list(SAMPLERS["euler"](process, model, torch.zeros(1, 1, 1, 1), None))
    process.training_losses(model, torch.zeros(1, 1, 1, 1), torch.tensor([0.3]))
    assert seen == pytest.approx([1000, 750, 500, 250, 300])


def test_training_times_have_their_distributions():
    generator = torch.Generator().manual_seed(0)
    n = 100_000
    t = create_diffusion("").sample_times(n, generator)
    assert t.min() == 0
    assert t.max() == 999
    assert t.float().mean().item() == pytest.approx(499.5, abs=5)
    t = create_diffusion("", objective="flow").sample_times(n, generator)
    assert t.std().item() == pytest.approx(12**-0.5, abs=0.005)
    t = create_diffusion("", objective="flow", time_sampling="logit-normal").sample_times(n, generator)
    assert t.logit().mean().item() == pytest.approx(0, abs=0.02)
    assert t.logit().std().item() == pytest.approx(1, abs=0.02)


def test_one_step_respacing_is_finite():
    diffusion = create_diffusion("1")
    (noise,) = tensors("noise")
    assert diffusion.p_sample_loop(analytic_model, noise.shape, noise, noise_source=torch.zeros).isfinite().all()


# --- guidance ------------------------------------------------------------------------------------


def label_model(x, t, y):
    """Answers the label in each channel of the prediction, and 10 times the label in the variance's."""
    return torch.cat([y.view(-1, 1, 1, 1).expand_as(x), 10.0 * y.view(-1, 1, 1, 1).expand_as(x)], dim=1).float()


@pytest.mark.parametrize("channels", [3, 4])
def test_guidance_acts_on_the_named_channels_only(channels):
    x, t, y = torch.zeros(2, 4, 1, 1), torch.zeros(2), torch.tensor([1, 2])
    out = guide(label_model, y, null_label=5, scale=4.0, channels=channels)(x, t).flatten(1)
    expected = torch.tensor([[5 + 4.0 * (1 - 5)] * channels + [1.0] * (4 - channels) + [10.0] * 4,
                             [5 + 4.0 * (2 - 5)] * channels + [2.0] * (4 - channels) + [20.0] * 4])
    assert torch.equal(out, expected)


def test_guidance_of_1_is_the_conditional_model_in_one_call():
    sizes = []
    model = lambda x, t, y: sizes.append(len(x)) or label_model(x, t, y)  # noqa: E731
    x, t, y = torch.zeros(2, 4, 1, 1), torch.zeros(2), torch.tensor([1, 2])
    assert torch.equal(guide(model, y, 5, 1.0, 4)(x, t), label_model(x, t, y))
    guide(model, y, 5, 1.5, 4)(x, t)
    assert sizes == [2, 4]


# --- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "words"), [
    (dict(timestep_respacing="ddim37"), "nearest that exist are ddim36 and ddim38"),
    (dict(timestep_respacing="fast"), "not understood"),
    (dict(timestep_respacing="0"), "counts from 1"),
    (dict(timestep_respacing="-5"), "not understood"),
    (dict(timestep_respacing="1001"), "only 1000 timesteps"),
    (dict(timestep_respacing="10,600"), "only 500 timesteps"),
    (dict(noise_schedule="cosine"), "allowed: linear, squaredcos_cap_v2"),
    (dict(objective="velocity"), "allowed: epsilon, x0, v, flow"),
    (dict(objective="flow", use_kl=True), "use_kl"),
    (dict(objective="flow", predict_xstart=True), "contradicts"),
    (dict(time_sampling="logit-normal"), "needs objective 'flow'"),
    (dict(objective="flow", time_sampling="lognormal"), "allowed: uniform, logit-normal"),
    (dict(diffusion_steps=0), "at least 1"),
])
def test_wrong_arguments_of_create_diffusion_say_what_is_allowed(arguments, words):
    with pytest.raises(ValueError, match=words):
        create_diffusion(**arguments)


def test_create_diffusion_takes_a_number_of_steps():
    assert create_diffusion(250).timestep_map == create_diffusion("250").timestep_map
    assert create_diffusion(None).num_timesteps == 1000


def test_a_model_without_variance_channels_is_named():
    with pytest.raises(ValueError, match="learn_sigma"):
        create_diffusion("2").p_sample_loop(partial(analytic_model, learned=False), (1, 1, 2, 2), torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize(("name", "eta", "words"), [
    ("ddpm", 0.0, "Gaussian"), ("plms", 0.0, "allowed: ddpm"), ("euler", 0.5, "--eta"), ("ddim", 1.5, "0..1"),
    ("ddim", float("nan"), "0..1"),
])
def test_samplers_that_cannot_serve_say_so(name, eta, words):
    with pytest.raises(ValueError, match=words):
        get_sampler(name, create_diffusion("2", objective="flow"), eta)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_guidance_scales_that_mean_nothing_are_refused(scale):
    with pytest.raises(ValueError, match="cfg-scale"):
        guide(label_model, torch.zeros(1, dtype=torch.long), 1, scale, 4)


def test_linear_schedule_of_few_steps_is_refused():
    with pytest.raises(ValueError, match="needs more than 10 diffusion_steps"):
        named_betas("linear", 10)


def test_every_ddim_stride_is_exact():
    for count in {len(range(0, 1000, n)) for n in range(1, 1001)}:
        assert len(space_timesteps(1000, f"ddim{count}")) == count
