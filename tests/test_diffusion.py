import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import GOLDEN, analytic_model, assert_close

from diffusion import OBJECTIVES, create_diffusion
from diffusion.flow import FlowMatching
from diffusion.schedules import space_timesteps
from runtime import UserError

golden = np.load(GOLDEN / "diffusion.npz")
VARIANTS = {
    "learned": {},
    "fixed_large": dict(learn_sigma=False),
    "fixed_small": dict(learn_sigma=False, sigma_small=True),
    "xstart": dict(learn_sigma=False, predict_xstart=True),
    "kl": dict(use_kl=True),
    "rescaled": dict(rescale_learned_sigmas=True),
}


def tensors(*keys):
    return [torch.from_numpy(golden[key]) for key in keys]


def matches(prefix):
    return {key.removeprefix(prefix): golden[key] for key in golden.files if key.startswith(prefix)}


# --- golden figures ------------------------------------------------------------------------------


def test_schedules_are_the_original_ones():
    for schedule in ("linear", "squaredcos_cap_v2"):
        diffusion, expected = create_diffusion("", noise_schedule=schedule), matches(schedule + "/")
        assert len(expected) == 6
        for name, values in expected.items():
            assert np.abs((vars(diffusion) | diffusion._tables)[name] - values).max() < 1e-12, (schedule, name)


def test_every_count_is_respaced_as_dit_does():
    """DiT's rule, written out: the stride is added up, and each sum is rounded."""
    for count in range(1, 1001):
        position, kept = 0.0, []
        for _ in range(count):
            kept.append(round(position))
            position += 999 / (count - 1) if count > 1 else 1
        assert space_timesteps(1000, str(count)) == kept, count


def test_respacing_keeps_the_original_timesteps():
    for respacing, kept in json.loads((GOLDEN / "respacing.json").read_text()).items():
        assert create_diffusion(respacing).timestep_map == kept, respacing
    assert create_diffusion(250).timestep_map == create_diffusion("250").timestep_map


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_p_mean_variance_are_the_original_ones(variant):
    diffusion = create_diffusion("", **VARIANTS[variant])
    (x0, noise, t), model = tensors("x0", "noise", "t"), partial(analytic_model, learned=diffusion.learn_sigma)
    x_t = diffusion.q_sample(x0, t, noise)
    assert_close(x_t, golden["q_sample"])
    for prefix, found in ((f"losses/{variant}/", diffusion.training_losses(model, x0, t, noise=noise)),
                          *((f"p_mean_variance/{variant}/clip{int(clip)}/",
                             diffusion.p_mean_variance(model, x_t, t, clip_denoised=clip)) for clip in (False, True))):
        expected = matches(prefix)
        assert set(found) == set(expected)
        for term, values in expected.items():
            assert_close(found[term], values)


@pytest.mark.parametrize("respacing", ["ddim10", "20"])
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
    assert torch.equal(steps[-1]["sample"], diffusion.ddim_sample_loop(analytic_model, noise.shape, noise))
    assert torch.equal(steps[-1]["sample"], steps[-1]["pred_xstart"])
    assert steps[-1]["pred_xstart"].abs().max() <= 1  # clipped by default, as in DiT


# --- closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["epsilon", "x0", "v", "flow"])
def test_the_exact_model_has_no_loss_on_data_of_one_point(objective):
    process = create_diffusion("", objective=objective, learn_sigma=False)
    x0 = torch.full((5, 1, 4, 4), 0.3)
    generator = torch.Generator().manual_seed(0)
    t = process.sample_times(5, generator)
    noise = torch.randn(x0.shape, generator=generator)

    def model(x, times):
        alpha, sigma = torch.tensor([process.alpha_sigma(time.item()) for time in t]).T.view(2, -1, 1, 1, 1)
        eps = (x - alpha * 0.3) / sigma
        full = torch.full_like(x, 0.3)
        return {"flow": eps - full, "epsilon": eps, "v": alpha * eps - sigma * full, "x0": full}[objective]

    assert process.training_losses(model, x0, t, noise=noise)["loss"].max() < 1e-6


def test_training_times_have_their_distributions():
    generator = torch.Generator().manual_seed(0)
    n = 100_000
    t = create_diffusion("").sample_times(n, generator)
    assert (t.min(), t.max()) == (0, 999)
    assert t.float().mean().item() == pytest.approx(499.5, abs=5)
    t = create_diffusion("", objective="flow").sample_times(n, generator)
    assert t.std().item() == pytest.approx(12**-0.5, abs=0.005)
    t = create_diffusion("", objective="flow", time_sampling="logit-normal").sample_times(n, generator).logit()
    assert [t.mean().item(), t.std().item()] == pytest.approx([0, 1], abs=0.02)


def test_gamma_schedules_are_the_written_formulas():
    """abar_t = gamma(t / T), except where beta would exceed 0.999: the last beta, which would be 1."""
    for name, gamma in (
            ("gamma_linear", lambda t: 1 - t),
            ("gamma_cosine", lambda t: math.cos((0.2 + 0.8 * t) * math.pi / 2) ** 4 / math.cos(0.1 * math.pi) ** 4),
            ("gamma_sigmoid", lambda t: (1 / (1 + math.exp(-3 / 0.7)) - 1 / (1 + math.exp(-3 * t / 0.7)))
                                        / (1 / (1 + math.exp(-3 / 0.7)) - 0.5))):
        process = create_diffusion("", noise_schedule=name)
        expected = np.array([gamma((i + 1) / 1000) for i in range(999)])
        assert process.alphas_cumprod[:999] == pytest.approx(expected, rel=1e-9)
        assert process.betas[999] == pytest.approx(0.999)
        assert process.betas.min() > 0


def test_the_three_errors_of_flow_sum_to_a_weighted_velocity_error():
    """Each term computed by itself."""
    torch.manual_seed(0)
    x_0, noise, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0.0, 0.3, 0.8, 1.0])
    model = partial(analytic_model, learned=False)
    losses = create_diffusion(objective="flow", flow_loss="velocity+epsilon+x0").training_losses(model, x_0, t, noise=noise)
    s = t.view(-1, 1, 1, 1)
    x_t = (1 - s) * x_0 + s * noise
    velocity = model(x_t, 1000 * t)
    errors = [velocity - (noise - x_0), x_t + (1 - s) * velocity - noise, x_t - s * velocity - x_0]
    terms = [error.square().mean(dim=(1, 2, 3)) for error in errors]
    assert torch.allclose(losses["loss"], sum(terms), rtol=1e-5)
    assert torch.allclose(losses["mse"], terms[0], rtol=1e-6)


def test_input_scale_is_that_of_the_data():
    torch.manual_seed(0)
    x_0, noise, t = torch.randn(3, 2, 3, 3), torch.randn(3, 2, 3, 3), torch.tensor([0, 400, 999])
    model = partial(analytic_model, learned=False)
    plain, scaled = (create_diffusion(learn_sigma=False, input_scale=scale) for scale in (1.0, 0.5))
    found = scaled.training_losses(model, x_0, t, noise=noise)["loss"]
    assert torch.equal(found, plain.training_losses(model, x_0 / 2, t, noise=noise)["loss"])
    p = scaled.p_mean_variance(model, 5 * x_0, t)
    assert p["pred_xstart"].abs().max() == 0.5
    steps = list(scaled.p_sample_loop_progressive(model, noise.shape, 5 * noise, sampler="ddim"))
    assert steps[-1]["sample"].abs().max() <= 0.5


# --- arguments -----------------------------------------------------------------------------------


WRONG = [
    (dict(timestep_respacing="ddim37"), "nearest that exist are ddim36 and ddim38"),
    (dict(timestep_respacing="0"), "counts from 1"),
    (dict(timestep_respacing="10,600"), "only 500 timesteps"),
    (dict(noise_schedule="cosine"), "allowed: linear, squaredcos_cap_v2, gamma_linear, gamma_cosine, gamma_sigmoid"),
    (dict(diffusion_steps=10), "more than 10 diffusion_steps"),
    (dict(diffusion_steps=0), "at least 1"),
    (dict(input_scale=0), "input_scale 0 is not a positive"),
    (dict(input_scale=0.5), "input_scale 0.5 needs learn_sigma false"),
    (dict(objective="velocity"), "allowed: epsilon, x0, v, flow"),
    (dict(objective="v", predict_xstart=True), "predict_xstart contradicts objective 'v'"),
    (dict(objective="flow", flow_loss="x0"), "allowed: velocity, velocity.epsilon.x0"),
    (dict(objective="flow", use_kl=True), "`use_kl` is not supported with objective 'flow'.* shift, shift_training$"),
    (dict(time_sampling="logit-normal"), "`time_sampling` is not supported with objective 'epsilon'.* input_scale$"),
]


def test_wrong_arguments_of_create_diffusion_say_what_is_allowed():
    for arguments, words in WRONG:
        with pytest.raises(UserError, match=words):
            create_diffusion(**arguments)


def test_an_argument_that_an_objective_does_not_take_may_have_its_default():
    """Older checkpoints may store such arguments."""
    process = create_diffusion(objective="flow", noise_schedule="linear", use_kl=False, input_scale=1.0, learn_sigma=True)
    assert isinstance(process, FlowMatching)
    assert create_diffusion(objective="v", time_sampling="uniform", flow_loss="velocity").prediction == "v"


def test_a_factory_is_given_exactly_what_its_signature_names(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "mine", lambda timesteps, noise_schedule, learn_sigma, weight=1.0: (
        timesteps, noise_schedule, learn_sigma, weight))
    assert create_diffusion("2", "gamma_linear", objective="mine", weight=3) == ([0, 999], "gamma_linear", True, 3)
    assert create_diffusion(objective="mine", weight=1.0)[-1] == 1
    with pytest.raises(UserError, match=r"`weigth` is not supported with objective 'mine'.* noise_schedule, weight$"):
        create_diffusion(objective="mine", weigth=3)


@pytest.mark.parametrize(("objective", "channels"), [("flow", 2), ("epsilon", 1)])
def test_a_loss_of_other_channels_is_refused(objective, channels):
    """One channel against two would broadcast, and train without an error."""
    process, x = create_diffusion(objective=objective), torch.zeros(3, 1, 4, 4)
    t = process.sample_times(3, torch.Generator())
    with pytest.raises(UserError, match=f"returned {channels} channels, but the process takes {3 - channels}: learn_sigma"):
        process.training_losses(lambda x, t: torch.zeros(3, channels, 4, 4), x, t)
    with pytest.raises(UserError, match="learn_sigma"):
        process.predict(lambda x, t: torch.zeros(3, channels, 4, 4), x, process.grid[0])
