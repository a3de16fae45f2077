"""Flow maps: closed forms of Gaussian data, networks, and runs."""

import argparse
import math
import shutil
from functools import partial

import pytest
import test_interchange as interchange
import torch
from conftest import TINY_RUN, assert_one_line, randomised, run_script, train_here
from foreign import ForeignNet
from PIL import Image
from test_train import assert_same, final, metrics
from torch import nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion import create_diffusion
from diffusion.flow import FlowMatching
from diffusion.flow_map import FlowMap, derivative, guidance
from diffusion.samplers import evaluation_times, get_sampler
from models import DiNext, DiNextU, DiNextV3, DiT, DiT_models
from pipeline import checkpoint
from runtime import UserError
from runtime.randomness import generator

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # of torch.func.jvp
MU, S = 0.7, 0.4  # of Gaussian data
TINY = dict(input_size=8, in_channels=2, num_classes=3, learn_sigma=False, time_scale=1e-3)


def sigma(t):
    return ((1 - t) ** 2 * S**2 + t**2).sqrt()


def exact_map(x, t, y=None, r=None):
    """The mean velocity of Gaussian data from t to r, or the velocity: times in 0..1000."""
    t = (t.double() / 1000).view(-1, 1, 1, 1)
    if r is None:
        return -MU + (t - (1 - t) * S**2) / sigma(t) ** 2 * (x - MU * (1 - t))
    r = (r.double() / 1000).view(-1, 1, 1, 1)
    return (x - MU * (1 - r) - sigma(r) / sigma(t) * (x - MU * (1 - t))) / (t - r)


def instants(*values):
    return torch.tensor(values, dtype=torch.float64)


def networks():
    torch.manual_seed(0)
    return [randomised(network) for network in (
        DiT(hidden_size=16, depth=3, num_heads=2, patch_size=2, **TINY), DiNext(hidden_size=16, depth=3, patch_size=2, **TINY),
        DiNextU(hidden_size=8, depths=(1, 1, 1, 1, 1), **TINY),
        DiNextV3(hidden_size=16, depth=2, num_heads=2, attention_every=1, patch_size=2, **TINY))]


# --- closed forms --------------------------------------------------------------------------------


def test_the_identity_of_mean_velocities_holds_on_a_gaussian():
    """u = v - (t - r) du/dt: to 1e-9 with the analytic derivative, to 1e-3 with differences, a quarter if h is halved."""
    t, r = instants(0.9, 0.6, 0.3), instants(0.5, 0.1, 0.05)
    x = torch.randn(3, 1, 2, 2, generator=generator("gaussian")).double()
    v = exact_map(x, 1000 * t)
    gap = (t - r).view(-1, 1, 1, 1)
    u = exact_map(x, 1000 * t, r=1000 * r)
    _, exact = jvp(lambda x, t: exact_map(x, 1000 * t, r=1000 * r), (x, t), (v, torch.ones_like(t)))
    assert (u - (v - gap * exact)).abs().max() < 1e-9

    errors = []
    for step in (5e-3, 2.5e-3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusion.flow_map.STEP", step)
            patch.setattr(torch.Tensor, "float", lambda self: self)  # fp64 here
            errors.append((derivative(exact_map, x, t, r, v, {}) - exact).abs().max().item())
    assert errors[0] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_any_number_of_jumps_is_exact_on_a_gaussian(steps):
    process = FlowMap(steps)
    noise = torch.randn(4, 1, 2, 2, generator=generator("jumps")).double()
    *_, last = get_sampler("map", process)(process, exact_map, noise, None)
    assert (last["sample"] - (MU + S * noise)).abs().max() < 1e-9


def test_a_restart_jumps_to_data_and_adds_fresh_noise():
    process, noise, fresh = FlowMap(2), torch.ones(1, 1, 2, 2).double(), torch.full((1, 1, 2, 2), 3.0).double()
    states = [step["sample"] for step in get_sampler("map", process, 1.0)(process, exact_map, noise, lambda step: fresh)]
    x_0 = MU + S * noise
    middle = 0.5 * x_0 + 0.5 * fresh
    assert torch.allclose(states[0], middle, atol=1e-9)
    half = torch.tensor(0.5).double()
    assert torch.allclose(states[1], MU + S / sigma(half) * (middle - MU * 0.5), atol=1e-9)
    with pytest.raises(UserError, match=r"`eta` 0\.5 is neither 0 nor 1"):
        get_sampler("map", process, 0.5)
    with pytest.raises(UserError, match=r"`sampler` map needs a flow map, not FlowMatching; allowed: ddim, dpm"):
        get_sampler("map", FlowMatching(2))


def test_an_interval_of_a_denoiser_sees_only_data():
    process, limits = FlowMap(2), []
    x = torch.randn(2, 1, 2, 2).double()
    for step in get_sampler("map", process)(process, exact_map, x, None, lambda x_0: limits.append(x_0) or x_0.clamp(0, 1)):
        assert step["pred_xstart"].min() >= 0
        assert step["pred_xstart"].max() <= 1
    assert len(limits) == 2
    assert torch.equal(step["sample"], limits[1].clamp(0, 1))


# --- options of the straight path ----------------------------------------------------------------


def test_a_network_that_predicts_x_0_has_the_velocity_s_loss_and_solvers():
    """The same function in both forms: at t >= 0.05 the same loss, and the same path of Heun's method."""
    x, noise = torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2)
    t = torch.tensor([0.05, 0.2, 0.5, 0.9, 1.0])
    velocity, x_0 = FlowMatching(8), FlowMatching(8, prediction="x0")

    def v(x, t):
        return 0.3 * x - 0.1

    def data(x, t):
        return x - (t / 1000).view(-1, 1, 1, 1) * v(x, t)

    losses = [process.training_losses(model, x, t, {}, noise)["loss"] for process, model in ((x_0, data), (velocity, v))]
    assert torch.allclose(*losses, rtol=1e-4)
    early = torch.full((5,), 0.01)
    expected = (0.01 / 0.05) ** 2 * velocity.training_losses(v, x, early, {}, noise)["loss"]
    assert torch.allclose(x_0.training_losses(data, x, early, {}, noise)["loss"], expected, rtol=1e-2)
    ends = [list(get_sampler("heun", process)(process, model, noise, None))[-1]["sample"]
            for process, model in ((velocity, v), (x_0, data))]
    assert torch.allclose(*ends, atol=1e-5)


def test_the_shift_moves_the_grid_and_training_if_asked():
    """SD3's Equation 23; LightningDiT's 0.3 is 10/3 here: its time runs from noise."""
    assert FlowMatching(4, shift=3).grid == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    theirs = [0.3 * u / (1 + (0.3 - 1) * u) for u in (0, 0.25, 0.5, 0.75, 1)]  # 1 = data
    assert FlowMatching(4, shift=10 / 3).grid == pytest.approx([1 - u for u in theirs])
    plain, grid, both = (FlowMatching(4, **given).sample_times(64, generator("t"))
                         for given in ({}, dict(shift=3), dict(shift=3, shift_training=True)))
    assert torch.equal(plain, grid)
    assert all(FlowMatching(3, shift=shift).grid[::3] == (1, 0) for shift in (0.1, 0.2, 0.3, 10 / 3))  # exactly
    assert FlowMap(4, shift=3).grid == FlowMatching(4, shift=3).grid
    assert torch.allclose(both, 3 * plain / (1 + 2 * plain))


def test_mean_and_deviation_of_the_logit_normal():
    t = FlowMatching(4, "logit-normal", time_mean=-0.8, time_std=0.5).sample_times(20_000, generator("t")).logit()
    assert [t.mean().item(), t.std().item()] == pytest.approx([-0.8, 0.5], abs=0.02)


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(prediction="v"), "prediction 'v'"), (dict(prediction="x0", flow_loss="velocity+epsilon+x0"), "needs prediction"),
    (dict(time_mean=1.0), "apply only to time_sampling"), (dict(shift=0.0), "shift 0.0 is not a positive number"),
    (dict(time_sampling="logit-normal", time_std=-1.0), "time_std -1.0")])
def test_options_that_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        create_diffusion("4", objective="flow", **arguments)


def test_the_sde_keeps_the_moments_of_a_gaussian():
    """With the exact velocity and many steps it ends with the data's mean and deviation, whatever it adds on the way."""
    process = FlowMatching(400)
    noise = torch.randn(4000, 1, 1, 1, generator=generator("start")).double()
    fresh = [torch.randn(4000, 1, 1, 1, generator=generator("sde", step)).double() for step in range(400)]
    states = list(get_sampler("sde", process)(process, exact_map, noise, fresh.__getitem__))
    found = states[-1]["sample"]
    assert [found.mean().item(), found.std().item()] == pytest.approx([MU, S], abs=0.015)
    assert (found - (MU + S * noise)).abs().mean() > 0.1  # not the ODE's
    shifted = FlowMatching(3, shift=3)
    assert evaluation_times(get_sampler("sde", shifted), shifted) == pytest.approx(
        [1000 * shifted.shifted(t) for t in (1, 0.52, 0.04)])
    with pytest.raises(UserError, match="`sampler` sde needs a flow, not GaussianDiffusion"):
        get_sampler("sde", create_diffusion("4"))


# --- training ------------------------------------------------------------------------------------


def times(process, count=4000):
    return process.sample_times(count, generator("times"))


def test_times_of_flow_rows_and_of_map_rows():
    t, r = times(FlowMap()).unbind(1)
    assert torch.equal(t[0::2], r[0::2])
    assert (t[1::2] > r[1::2]).all()
    assert t[0::2].logit().mean().abs() < 0.08
    assert t[0::2].logit().std() == pytest.approx(1, abs=0.05)
    both = torch.cat([t[1::2], r[1::2]]).logit()
    assert both.mean() == pytest.approx((0.4 - 1.2) / 2, abs=0.08)
    assert (times(FlowMap(share=1))[:, 0] > times(FlowMap(share=1))[:, 1]).all()
    assert torch.equal(*times(FlowMap(share=0)).unbind(1))


def test_without_map_rows_the_error_is_flow_matching_s():
    """At the same t and noise; and r = t is the plain forward pass."""
    x, noise, y = torch.randn(4, 2, 8, 8), torch.randn(4, 2, 8, 8), torch.tensor([0, 1, 2, 3])
    t = times(FlowMap(share=0), 4)
    for network in networks():
        losses = FlowMap(share=0).training_losses(network, x, t, dict(y=y), noise)
        expected = FlowMatching().training_losses(network, x, t[:, 0], dict(y=y), noise)
        assert torch.equal(losses["mse"], expected["mse"].detach())
        assert torch.equal(losses["loss"], (expected["mse"] + 0.01).log())
        assert losses["map_mse"].isnan().all()
        assert torch.equal(network(x, 1000 * t[:, 0], y, 1000 * t[:, 0]), network(x, 1000 * t[:, 0], y))


def test_the_loss_is_zero_on_a_point_mass_and_only_there():
    """The exact map of one point: u = v = eps - x_0, constant along the path. log(0 + 0.01)."""
    point, noise = torch.full((4, 1, 2, 2), 0.5).double(), torch.randn(4, 1, 2, 2).double()
    process = FlowMap()
    t = times(process, 4).double()

    def exact(x, t, r):
        return (x - 0.5) / (t / 1000).view(-1, 1, 1, 1)

    losses = process.training_losses(exact, point, t, {}, noise)
    assert losses["loss"].sub(math.log(0.01)).abs().max() < 1e-6
    assert losses["mse"].isnan().tolist() == [False, True, False, True]
    assert losses["map_mse"].isnan().tolist() == [True, False, True, False]
    wrong = process.training_losses(lambda x, t, r: 1.1 * exact(x, t, r), point, t, {}, noise)
    assert (wrong["loss"] > losses["loss"] + 0.1).all()


@pytest.mark.parametrize("network", networks(), ids=lambda network: type(network).__name__)
def test_differences_are_the_derivative_of_a_network(network):
    """torch.func.jvp as the oracle; r and du/dt change the output."""
    x, v, y = torch.randn(3, 2, 8, 8), torch.randn(3, 2, 8, 8), torch.tensor([0, 2, 3])
    t, r = torch.tensor([0.9, 0.5, 0.4]), torch.tensor([0.2, 0.4, 0.01])
    found = derivative(network, x, t, r, v, dict(y=y))
    with sdpa_kernel(SDPBackend.MATH):
        out, expected = jvp(lambda x, t: network(x, 1000 * t, y, 1000 * r), (x, t), (v, torch.ones_like(t)))
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    assert expected.abs().max() > 0.1
    assert (out - network(x, 1000 * t, y, 1000 * r / 2)).abs().max() > 1e-3


def test_near_the_ends_both_sides_lie_inside():
    seen = []
    derivative(lambda x, t, r: seen.append(t / 1000) or x, torch.zeros(2, 1, 1, 1), torch.tensor([0.999, 0.001]),
               torch.zeros(2), torch.zeros(2, 1, 1, 1), {})
    assert torch.allclose(seen[0], torch.tensor([1, 0.01, 0.99, 0]), atol=1e-6)

    def straight(x, t, r):  # the velocity to the point 0.5, constant along its path
        return (x - 0.5) / (t / 1000).view(-1, 1, 1, 1)

    t, noise = instants(0.999, 0.002), torch.randn(2, 1, 2, 2).double()
    x = 0.5 + t.view(-1, 1, 1, 1) * (noise - 0.5)
    assert derivative(straight, x, t[:1].repeat(2), 0 * t, noise - 0.5, {})[0].abs().max() < 1e-3  # in fp32


class Fickle(nn.Module):
    """A network with dropout and BatchNorm."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(1), nn.Dropout(0.5)

    def forward(self, x, t, y, r):
        return self.dropout(self.norm(x)) * (1 + t.view(-1, 1, 1, 1) / 1000)


def test_dropout_and_batch_norm_do_not_disturb_the_differences():
    network, process = Fickle().train(), FlowMap(omega=0.6)
    x, y = torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 2, 3])
    t, r = torch.full((4,), 0.5), torch.zeros(4)
    before = network.norm.running_mean.clone()
    slope = derivative(network, x, t, r, torch.zeros_like(x), dict(y=y))
    assert torch.allclose(slope, x / math.sqrt(1 + network.norm.eps), atol=1e-3)
    guidance(network, x, t, y)
    assert torch.equal(network.norm.running_mean, before)
    assert network.training
    process.training_losses(network, x, process.sample_times(4, generator("f")), dict(y=y))
    assert not torch.equal(network.norm.running_mean, before)  # of the one call with a gradient


def test_guidance_in_training_is_for_kept_labels_and_small_t():
    """A network that answers its label: v becomes v + omega (y - null) where it counts."""
    class Label(nn.Module):
        num_classes = 3

        def forward(self, x, t, y, r=None):
            return torch.zeros_like(x) + y.view(-1, 1, 1, 1)

    x, y = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 3, 2])
    t = torch.tensor([0.5, 0.71, 0.5, 0.7])
    added = guidance(Label(), x, t, y)[:, 0, 0, 0]
    assert added.tolist() == [-3, 0, 0, -1]
    process = FlowMap(share=0, omega=0.5)
    losses = process.training_losses(Label(), x, torch.stack([t, t], dim=1), dict(y=y), torch.zeros_like(x))
    assert torch.allclose(losses["mse"], (y + torch.tensor([1.5, 0, 0, 0.5])) ** 2)


def test_a_batch_of_one_row_has_no_map_row():
    """As the last one of a validation may have."""
    x, y, t = torch.randn(1, 2, 8, 8), torch.tensor([1]), times(FlowMap(), 1)
    for network in networks():
        losses = FlowMap().training_losses(network, x, t, dict(y=y))
        assert losses["mse"].isfinite()
        assert losses["map_mse"].isnan()


def test_gradients_in_bf16_are_those_in_fp32_to_its_rounding():
    """Calls without a gradient come first, under the same autocast: they must leave nothing behind."""
    x, y, process = torch.randn(8, 2, 8, 8), torch.randint(0, 3, (8,)), FlowMap(omega=0.5)
    t, noise, gradients = times(process, 8), torch.randn(8, 2, 8, 8), []
    network = networks()[0]
    for enabled in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            process.training_losses(network, x, t, dict(y=y), noise)["loss"].mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad]))
    exact, rounded = gradients
    assert 0 < (exact - rounded).norm() < 0.05 * exact.norm()


def test_what_is_refused():
    for arguments, message in ((dict(map_share=0.3), "map_share 0.3"), (dict(map_guidance=-1.0), r"map_guidance -1.0")):
        with pytest.raises(UserError, match=message):
            create_diffusion("4", objective="flow-map", **arguments)
    assert evaluation_times(get_sampler("map", process := create_diffusion("4", objective="flow-map")), process) == (
        1000, 750, 500, 250)
    assert len(evaluation_times(get_sampler("heun", process), process)) == 7  # as a flow


# --- runs ----------------------------------------------------------------------------------------

RUN = [*TINY_RUN, "--global-batch-size", "16", "--model-args", '{"hidden_size": 32, "depth": 2, "time_scale": 0.01}',
       "--diffusion-args", '{"objective": "flow-map", "map_guidance": 0.5, "label_drop": 0.3}', "--max-steps", "6"]


@pytest.fixture(scope="module")
def map_run(tmp_path_factory):
    """The folder of a run of six steps on digits, with validation."""
    cwd = tmp_path_factory.mktemp("map")
    train_here(cwd, *RUN, "--run-name", "r", "--val-every", "3", "--ckpt-every", "3")
    return cwd / "results" / "r"


def test_a_run_reports_both_errors_and_recommends_the_map(map_run):
    for name in ("loss", "mse", "map_mse"):
        assert len(metrics(map_run, name)) == 6
        assert all(math.isfinite(value) for value in metrics(map_run, name))
    for name in ("val_loss", "val_mse_ema", "val_map_mse_ema"):
        assert all(math.isfinite(value) for value in metrics(map_run, name)), name
        assert len(metrics(map_run, name)) == 2
    settings = checkpoint.restore(map_run).spec.sampling
    assert (settings.sampler, settings.num_sampling_steps, settings.cfg_scale) == ("map", 4, 1.0)
    with Image.open(map_run / "previews" / "0000006.png") as preview:
        assert preview.text["sampler"] == "map"


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(map_run, tmp_path):
    broken = tmp_path / "results" / "r"
    shutil.copytree(map_run, broken)
    for path in (broken / "checkpoints").glob("0000006*"):
        path.unlink()
    train_here(tmp_path, *RUN, "--run-name", "r", "--val-every", "3", "--ckpt-every", "3")
    assert_same(final(map_run), final(broken))
    assert metrics(map_run, "map_mse") == metrics(broken, "map_mse")


def test_two_processes_with_accumulation_agree_with_one_to_rounding(map_run, tmp_path):
    run_script("train.py", *RUN, "--run-name", "r", "--val-every", "3", "--grad-accum", "2", cwd=tmp_path, nproc=2)
    two = tmp_path / "results" / "r"
    assert_same(final(map_run), final(two), tolerance=2e-4)
    for name in ("loss", "mse", "map_mse", "val_loss", "val_map_mse_ema"):
        assert metrics(two, name) == pytest.approx(metrics(map_run, name), rel=1e-3), name


def test_compile_keeps_the_losses(map_run, tmp_path, monkeypatch):
    calls, original = [], nn.Module.compile

    def backend(module, inputs):
        return lambda *values: calls.append(0) or module.forward(*values)

    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: original(self, backend=backend, **options))
    torch._dynamo.reset()
    train_here(tmp_path, *RUN, "--run-name", "r", "--compile")
    assert metrics(tmp_path / "results" / "r", "loss") == pytest.approx(metrics(map_run, "loss"), rel=1e-4)
    assert len(calls) == 6 * 3  # guidance, derivative and the call with a gradient


def test_a_map_begins_from_repas_weights(tmp_path, monkeypatch, run_here):
    """Their t is on 0..1 already. (Names of classes are not digits': their embeddings begin anew.)"""
    import train

    monkeypatch.setitem(DiT_models, "DiT-tiny", partial(DiT, **interchange.TINY))
    weights = interchange.random_weights(learn_sigma=False, in_channels=1)
    flags = argparse.Namespace(model="SiT-tiny", resolution=64, num_classes=10, path_type="linear", prediction="v")
    torch.save({"ema": weights, "args": flags}, tmp_path / "repa.pt")
    monkeypatch.chdir(tmp_path)
    begin = ["--data-path", "digits", "--vae", "pixels", "--image-size", 8, "--init-from", "repa.pt", "--global-batch-size", 8,
             "--num-workers", 0, "--max-steps", 1, "--run-name", "r"]
    done = run_here(train, *begin, "--diffusion-args", '{"objective": "flow-map", "map_guidance": 0.6}')
    assert done.returncode == 0, done.stderr[-500:]
    spec = checkpoint.restore("results/r").spec
    assert (spec.model.name, spec.model.args["time_scale"], spec.sampling.sampler) == ("DiT-tiny", 1e-3, "map")
    assert f"Initialised {len(weights)} of {len(weights)} tensors from repa.pt" in (tmp_path / "results/r/log.txt").read_text()
    refused = run_here(train, *begin, "--results-dir", "other", "--model", "DiT-tiny", "--model-args", '{"time_scale": 0.01}',
                       "--diffusion-args", '{"objective": "flow-map"}')
    assert_one_line(refused, "--init-from: its time_scale is 0.001, that of --model-args 0.01")


def test_what_a_run_refuses(tmp_path, run_here, monkeypatch):
    import train

    def refused(*words, **changes):
        flags = {"diffusion_args": '{"objective": "flow-map"}', "model_args": '{"time_scale": 0.01}'} | changes
        given = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), value)]
        assert_one_line(run_here(train, *TINY_RUN, "--max-steps", 1, *given, "--results-dir", tmp_path), *words)

    refused("map_guidance 0.6 needs a label_drop above 0",
            diffusion_args='{"objective": "flow-map", "map_guidance": 0.6, "label_drop": 0}')
    refused("--model-args: time_scale 1.0 is too large for a flow map", model_args="{}")
    refused("--model-args: MLP has one block; a flow map needs at least two", model="MLP", model_args="{}")
    refused("--global-batch-size leaves 3 samples", global_batch_size="6", grad_accum="2")
    refused("--model-args: time_scale 1.0 is too large", model="ConvAdaLN", model_args="{}")
    monkeypatch.setitem(DiT_models, "ForeignNet", ForeignNet)
    refused("--model-args: ForeignNet has no argument r", model="ForeignNet", model_args="{}")
