"""Encoder reuse and forecasts: what is computed, from what, and that batching and switches change no result."""

import itertools
from collections import Counter

import pytest
import torch
from conftest import random_network

from diffusion import create_diffusion
from diffusion.guidance import guide, in_interval
from diffusion.reuse import Reuse, add_prior_noise, extrapolate, key_evaluations, plan
from diffusion.samplers import SAMPLERS, evaluation_times
from small_models import DIFFUSION_NETWORKS

MODELS = {"DiT-S/2": dict(hidden_size=24, depth=4, num_heads=2), "DiNext-S/2": dict(hidden_size=24, depth=4),
          "DiNextV3-S/2": dict(hidden_size=16, depth=3, num_heads=2),
          "DiNext-U-S": dict(hidden_size=8, depths=(1, 1, 1, 1, 1)), "PixArt-B/2": dict(hidden_size=24, depth=4, num_heads=2),
          "ConvAdaLN": dict(hidden_size=8, depth=4, learn_sigma=True)}
LABELS = torch.tensor([3, 0, 2])


def tiny(name="DiT-S/2", dtype=torch.float64, seed=0, **kwargs):
    """A network of random weights, the last layer's too."""
    kwargs = dict(input_size=8, in_channels=2, num_classes=5) | MODELS[name] | kwargs
    return random_network(DIFFUSION_NETWORKS[name], 0.15, seed, dtype, **kwargs).requires_grad_(False)


def start_noise(rows=3, dtype=torch.float64):
    return torch.randn(rows, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


def plan_for(model, process, sampler="ddim", scale=1.5, interval=None, kind="encoder", **options):
    times = evaluation_times(SAMPLERS[sampler], process)
    return plan(kind, times, in_interval(times, scale, interval), len(model.blocks), model.default_split, **options)


def sample(model, process, chosen=None, sampler="ddim", scale=1.5, interval=None, y=LABELS, x=None):
    """The finished sample, as sample.py's generate composes it."""
    x = start_noise(len(y), next(model.parameters()).dtype) if x is None else x
    guided = in_interval(evaluation_times(SAMPLERS[sampler], process), scale, interval)
    network = guide(Reuse(model, chosen, len(y)) if chosen else model, y, 5, scale, 2, guided)
    *_, last = SAMPLERS[sampler](process, network, x, lambda step: 0.1 * step + torch.zeros_like(x))
    return last["sample"]


# --- which evaluations are keys ------------------------------------------------------------------


def test_the_papers_rule():
    """28 blocks on 113 evaluations, the last 10 of them on the other 137. Other numbers of steps have about its share."""
    keys = key_evaluations("paper", 250)
    assert [k for k, key in enumerate(keys) if key][:10] == [0, 6, 7, 8, 9, 16, 17, 18, 19, 26]
    assert all(keys[230:])
    made = plan("encoder", range(250, 0, -1), [False] * 250, 28, default_split=18)
    assert made.block_calls() == 28 * 113 + 10 * 137 == 4534
    assert [sum(key_evaluations("paper", count)) for count in (250, 100, 50, 37, 10)] == [113, 45, 21, 16, 5]


def test_other_rules():
    assert key_evaluations("every:3", 7) == [True, False, False, True, False, False, True]
    assert key_evaluations("0,2 5", 6) == [True, False, True, False, False, True]


def test_warm_up_and_a_branch_that_comes_back_make_keys():
    guided = [False, True, True, False, False, True]
    made = plan("forecast", range(1000, 994, -1), guided, 4, 2, "0", order=1, warm_up=2)
    assert made.keys == (True, True, False, False, False, True)
    assert made.branches == (1, 2, 2, 1, 1, 2)
    assert made.split == 4


def test_wrong_key_steps_and_plans_are_refused():
    for rule, words in (("papers", "paper, every:N"), ("every:0", "every:N"), ("", "every:N"), ("0,-3", "every:N"),
                        ("1,2", "include 0"), ("0,50", "below 50")):
        with pytest.raises(ValueError, match=f"`key_steps` .*{rule}.*{words}"):
            key_evaluations(rule, 50)
    good = dict(kind="encoder", times=(999.0, 0.0), guided=(True, True), depth=4, default_split=2)
    for options, words in ((dict(split=5), r"split 5 is not in 0\.\.4"), (dict(order=3, warm_up=2), "order 3 and warm_up 2"),
                           (dict(parallel=0), "parallel 0"), (dict(prior_noise=-1), "prior_noise -1"),
                           (dict(kind="other"), "allowed: none, encoder, forecast")):
        with pytest.raises(ValueError, match=words):
            plan(**good | options)


# --- what is computed ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sampler", "kind"), [("DiT-S/2", "heun", "encoder"), ("DiNext-U-S", "dpm++", "forecast")])
def test_block_calls_are_counted_under_guidance_in_an_interval(name, sampler, kind):
    model, process, calls = tiny(name), create_diffusion("20"), Counter()
    chosen = plan_for(model, process, sampler, interval=(200, 700), kind=kind)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, inputs: calls.update(rows=len(inputs[0])))
    sample(model, process, chosen, sampler, interval=(200, 700))
    assert calls["rows"] == 3 * chosen.block_calls()
    assert chosen.block_calls() < len(model.blocks) * sum(chosen.branches)


@pytest.mark.parametrize("name", MODELS)
def test_with_all_keys_it_is_the_plain_path_bit_for_bit(name):
    model, process = tiny(name, torch.float32), create_diffusion("4")
    for kind in ("encoder", "forecast"):
        chosen = plan_for(model, process, kind=kind, key_steps="every:1")
        assert torch.equal(sample(model, process, chosen), sample(model, process))


def test_between_keys_nothing_depends_on_x():
    model, process = tiny("DiNext-U-S"), create_diffusion("10")
    outs = []
    for elsewhere in (0.0, float("nan")):
        chosen = plan_for(model, process, scale=1.0, kind="forecast", key_steps="every:4")
        network = Reuse(model, chosen, 3)
        outs.append([network(start_noise() if key else torch.full((3, 2, 8, 8), elsewhere), torch.full((3,), t), LABELS)
                     for t, key in zip(chosen.times, chosen.keys)])
    for a, b in zip(*outs):
        assert torch.equal(a, b)
        assert a.isfinite().all()


@pytest.mark.parametrize(("name", "group"), [("DiT-S/2", 2), ("PixArt-B/2", 3), ("DiNext-U-S", 7)])
def test_a_group_decoded_at_once_is_each_image_alone(name, group):
    """Against the definition, an image and a branch at a time: the last key's features, and the step's own t and label."""
    model, process, x = tiny(name), create_diffusion("16"), start_noise()
    chosen = plan_for(model, process, key_steps="every:8", parallel=6 * group)
    assert len(chosen.group(1, 6)) == group
    network, both = Reuse(model, chosen, 3), torch.cat([LABELS, torch.full_like(LABELS, 5)])
    for k, time in enumerate(chosen.times):
        x_k = x + k
        out = network(torch.cat([x_k, x_k]), torch.full((6,), time, dtype=torch.float64), both)
        if chosen.keys[k]:
            key_x, key_t = x_k, time
        for row, label in enumerate(both.tolist()):
            y, source = torch.tensor([label]), key_x[row % 3 : row % 3 + 1]
            state = model.encode(source, model.condition(torch.tensor([key_t]), y), model.default_split)
            expected = model.decode(state, model.condition(torch.tensor([time]), y), model.default_split)
            assert (out[row : row + 1] - expected).abs().max() < 1e-12


class Recorder:
    """A network whose features are the mean of x, and whose answer is that and the label."""

    blocks = [None] * 4

    def condition(self, t, y):
        return y.double()

    def encode(self, x, c, split):
        return (x.mean(dim=(1, 2, 3)),)

    def decode(self, state, c, split):
        return torch.stack([state[0], c], dim=1)


def test_each_branch_has_a_history_and_both_are_extrapolated_alike():
    """Features k^2 of the conditional, 100 k^2 of the unconditional; a line through the last two, where both have two."""
    guided = [True, True, True, False, False, True, True, True]
    times = tuple(float(t) for t in range(1000, 992, -1))
    chosen = plan("forecast", times, guided, 4, 2, "0,1,4,5", order=1, warm_up=1)
    network, seen = Reuse(Recorder(), chosen, 1), []
    for k, t in enumerate(times):
        rows = torch.tensor([1.0 * k**2, 100.0 * k**2])[: chosen.branches[k]]
        x = rows.view(-1, 1, 1, 1) if chosen.keys[k] else torch.full((len(rows), 1, 1, 1), torch.nan)
        seen.append(network(x, torch.full((len(rows),), t), torch.arange(len(rows)))[:, 0].tolist())
    assert seen == [[0, 0], [1, 100], [2, 200], [3], [16], [25, 2500], [25, 2500], [25, 2500]]


def test_heun_counts_its_evaluations_and_may_ask_twice_at_one_t():
    process = create_diffusion("4", objective="flow")
    times = evaluation_times(SAMPLERS["heun"], process)
    assert times == (1000, 750, 750, 500, 500, 250, 250)
    network = Reuse(Recorder(), plan("forecast", times, [False] * 7, 4, 2, "0,1,2,5", order=1, warm_up=1), 1)
    xs = [1000.0, -1.0, 750.0, None, None, 250.0, None]  # the second at 750 replaces the first; then features are t itself
    outs = [network(torch.full((1, 1, 1, 1), torch.nan if x is None else x), torch.tensor([t]), torch.zeros(1))[0, 0].item()
            for t, x in zip(times, xs)]
    assert outs == [1000, -1, 750, 500, 500, 250, 250]


def test_forecasts_are_exact_on_polynomials_also_at_unequal_spacing():
    coefficients, times = torch.tensor([2.0, -1.5, 0.7, 3.0], dtype=torch.float64), (3.0, 4.0, 6.5, 7.0)

    def polynomial(t, degree):
        return sum(c * t**i for i, c in enumerate(coefficients[: degree + 1])).view(1)

    for degree, order in itertools.product(range(4), repeat=2):
        values = [polynomial(t, degree) for t in times[: order + 1]]
        error = (extrapolate(times[: order + 1], values, 1.0) - polynomial(1.0, degree)).abs().item()
        assert (error < 1e-10) == (order >= degree)


def test_forecasts_of_bf16_are_computed_in_fp32():
    values = [torch.tensor([v], dtype=torch.bfloat16) for v in (256.0, 258.0, 262.0)]
    out = extrapolate((1.0, 2.0, 3.0), values, 0.0)  # second difference 2: 256 - 2 + 2
    assert out.dtype == torch.bfloat16
    assert out.item() == 256


# --- on the way to an image ----------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["heun", "ddpm"])
def test_prior_noise_is_added_at_every_step_below_300_and_never_to_the_end(sampler):
    """Against steps made one at a time, each on a process of two times, with the noise added by hand between them."""
    process = create_diffusion("10", learn_sigma=False, objective="x0")
    x_t, drawn = start_noise(), []
    noise_source = lambda step: drawn.append(step) or torch.ones_like(x_t)  # noqa: E731
    model, solver = lambda x, t: 0.5 * x, SAMPLERS[sampler]
    chosen = plan("encoder", evaluation_times(solver, process), [False] * 19, 4, 2, prior_noise=0.003)
    steps = [(step["sample"], step["sample"].clone())
             for step in add_prior_noise(solver(process, model, x_t, noise_source), x_t, chosen)]
    states = [state for _, state in steps]
    assert torch.equal(*steps[-1])  # the finished sample is not touched any more
    assert len(drawn) == (9 if sampler == "ddpm" else 0)  # none in the last step

    x, added, grid = x_t, 0, process.grid
    for i, state in enumerate(states):
        process.grid = grid[i : i + 2] if i == 9 else (*grid[i : i + 2], None)  # ddpm draws no noise before the grid's end
        x = next(solver(process, model, x, lambda step: torch.ones_like(x_t)))["sample"]
        assert (state - x).abs().max() < 1e-12
        if i < 9 and process.timestep_map[grid[i + 1]] < 300:
            x, added = x + 0.003 * x_t, added + 1
    assert added == 3


@pytest.mark.parametrize(("name", "sampler", "objective", "kind"), [
    ("DiT-S/2", "ddpm", "epsilon", "encoder"), ("DiNext-S/2", "ddim", "flow", "forecast"),
    ("DiNext-U-S", "dpm++", "epsilon", "encoder"), ("PixArt-B/2", "euler", "flow", "forecast"),
    ("ConvAdaLN", "heun", "epsilon", "encoder")])
def test_all_parts_work_together(name, sampler, objective, kind):
    """On is another picture than off; bf16 is near fp32; a batch is its images alone."""
    model = tiny(name, torch.float32, learn_sigma=objective != "flow")
    process, interval = create_diffusion("12", objective=objective), (150, 850)
    plain = sample(model, process, None, sampler, interval=interval)
    on = plan_for(model, process, sampler, interval=interval, kind=kind)
    out = sample(model, process, on, sampler, interval=interval)
    assert out.isfinite().all()
    assert not torch.equal(out, plain)
    alone = sample(model, process, on, sampler, interval=interval, y=LABELS[:1], x=start_noise(dtype=torch.float32)[:1])
    assert torch.allclose(out[:1], alone, atol=1e-3, rtol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sample(model, process, on, sampler, interval=interval)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - out).norm() / out.norm() < 0.2
