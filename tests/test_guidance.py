import numpy as np
import pytest
import torch

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
