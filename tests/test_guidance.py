import numpy as np
import pytest
import torch
from test_models import inputs, tiny

from diffusion.guidance import check_interval, dynamic_threshold, guide, in_interval


def label_model(x, t, y):
    """Answers the label in each channel of the prediction, and 10 times the label in the variance's."""
    return torch.cat([y.view(-1, 1, 1, 1).expand_as(x), 10.0 * y.view(-1, 1, 1, 1).expand_as(x)], dim=1).float()


def recording(sizes):
    """label_model, with the batch size of each call in `sizes`."""
    return lambda x, t, y: sizes.append(len(x)) or label_model(x, t, y)


def test_guidance_acts_on_the_named_channels_only():
    x, t, y = torch.zeros(2, 4, 1, 1), torch.zeros(2), torch.tensor([1, 2])
    out = guide(label_model, y, null_label=5, scale=4.0, channels=3)(x, t).flatten(1)
    assert out.tolist() == [[5 + 4.0 * (1 - 5)] * 3 + [1] + [10] * 4, [5 + 4.0 * (2 - 5)] * 3 + [2] + [20] * 4]


def test_guidance_of_1_is_the_conditional_model_in_one_call():
    sizes, (x, t, y) = [], (torch.zeros(2, 4, 1, 1), torch.zeros(2), torch.tensor([1, 2]))
    assert torch.equal(guide(recording(sizes), y, 5, 1.0, 4)(x, t), label_model(x, t, y))
    guide(recording(sizes), y, 5, 1.5, 4)(x, t)
    assert sizes == [2, 4]
    assert in_interval((999.0, 0.0), 1.0, None) == (False, False)
    assert in_interval((999.0, 0.0), 0.0, None) == (True, True)


# --- autoguidance --------------------------------------------------------------------------------


def test_the_guides_answer_for_the_same_label_takes_the_place_of_the_unconditional_one():
    """Guided channels: 7 y + 4 (y - 7 y); the others and the variance are the main network's. r reaches both."""
    x, t, y, ends = torch.zeros(2, 4, 1, 1), torch.zeros(2), torch.tensor([1, 2]), []

    def main(x, t, y, r):
        ends.append(r.tolist())
        return label_model(x, t, y)

    predict = guide(main, y, 5, 4.0, 3, guiding=lambda x, t, y, r: 7 * main(x, t, y, r))
    assert predict(x, t, r=t + 3).flatten(1).tolist() == [[-17] * 3 + [1] + [10] * 4, [-34] * 3 + [2] + [20] * 4]
    assert ends == [[3, 3]] * 2


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.5])
def test_autoguidance_of_two_networks(scale):
    """Written out, for a DiT and a smaller DiNext; a network that guides itself is the network alone, at any scale."""
    model, weaker = tiny("DiT-S/2", in_channels=2), tiny("DiNext-S/2", in_channels=2, depth=1)
    x, t, _ = inputs(model)
    y = torch.tensor([0, 1, 4])
    with torch.no_grad():
        out, alone = guide(model, y, 5, scale, 2, guiding=weaker)(x, t), model(x, t, y)
        low = weaker(x, t, y)
        assert torch.equal(guide(model, y, 5, scale, 2, guiding=model)(x, t), alone)
    assert (low[:, :2] - alone[:, :2]).abs().max() > 0.1
    assert (out[:, :2] - (low + scale * (alone - low))[:, :2]).abs().max() < 1e-4
    assert torch.equal(out[:, 2:], alone[:, 2:])


def test_a_guide_that_is_told_the_null_label_is_classifier_free_guidance_bit_for_bit():
    def model(x, t, y):
        return torch.cat([torch.sin(x * (y + 1).view(-1, 1, 1, 1)) + t.view(-1, 1, 1, 1) / 1000, x.cos()], dim=1)

    x, t, y = torch.linspace(-3, 3, 72).view(2, 4, 3, 3), torch.tensor([9.0, 700]), torch.tensor([1, 2])
    for scale, channels in ((0.0, 4), (0.3, 4), (1.7, 3), (4.0, 1)):
        expected = guide(model, y, 5, scale, channels)(x, t)
        found = guide(model, y, 5, scale, channels, guiding=lambda x, t, y: model(x, t, torch.full_like(y, 5)))(x, t)
        assert torch.equal(found, expected)


def test_outside_the_interval_the_guide_is_not_called():
    x, y, sizes = torch.zeros(2, 4, 1, 1), torch.tensor([1, 2]), []
    predict = guide(label_model, y, 5, 4.0, 4, [False, True, False], guiding=recording(sizes))
    for _ in range(3):
        predict(x, torch.zeros(2))
    assert sizes == [2]


# --- limits --------------------------------------------------------------------------------------


def test_wrong_scales_and_intervals_are_refused():
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"`cfg_scale` {scale} "):
            guide(label_model, torch.zeros(1, dtype=torch.long), 1, scale, 4)
    for interval in ((700, 100), (-1, 5), (0, 1001), (float("nan"), 5), (100,), (1, 2, 3), "ab"):
        with pytest.raises(ValueError, match=r"`guidance_interval` .* 0 <= LO <= HI <= 1000"):
            check_interval(interval)


def test_outside_its_interval_the_unconditional_half_is_not_computed():
    x, y, sizes = torch.zeros(2, 4, 1, 1), torch.tensor([1, 2]), []
    times = (999.0, 700.0, 500.0, 100.0, 50.0)
    predict = guide(recording(sizes), y, 5, 4.0, 4, in_interval(times, 4.0, (100, 700)))
    outs = [predict(x, torch.full((2,), t)) for t in times]
    assert sizes == [2, 4, 4, 4, 2]
    assert [torch.equal(out, label_model(x, None, y)) for out in outs] == [True, False, False, False, True]


def test_dynamic_thresholding_is_imagens():
    """Against numpy's percentile, a sample at a time: below 1 nothing is divided, above 1.7 it is clipped."""
    x = torch.randn(3, 1, 20, 20, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.2, 0.5, 3]).view(3, 1, 1, 1)
    out = dynamic_threshold(x).numpy()
    limits = [min(max(np.percentile(np.abs(sample), 99), 1), 1.7) for sample in x.numpy()]
    assert limits[0] == 1 < limits[1] < limits[2] == 1.7
    for sample, expected, limit in zip(out, x.numpy(), limits):
        assert np.abs(sample - np.clip(expected, -limit, limit) / limit).max() < 1e-6
