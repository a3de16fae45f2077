from types import SimpleNamespace

import pytest
import torch

from diffusion import create_diffusion
from pipeline.autoencoders import Pixels
from training.objective import Objective, Reconstruction, ssim

# --- the draws of a step -------------------------------------------------------------------------


def draws(process, shape, count, step, stochastic=True, kind="images"):
    model = SimpleNamespace(in_channels=shape[0], input_size=shape[1:])
    objective = Objective(process, SimpleNamespace(stochastic=stochastic), SimpleNamespace(kind=kind), 0.1, "fp32")
    return objective.draw(("train", 0, step), count, model, torch.device("cpu"))


def test_draws_are_divided_among_the_parts_of_a_batch_depend_on_the_step_and_not_on_the_posterior():
    process = create_diffusion("")
    whole, again, other = (draws(process, (1, 2, 2), 6, step) for step in (3, 3, 4))
    for a, b, c, part in zip(whole, again, other, whole.rows(slice(2, 4))):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert torch.equal(a[2:4], part)
    assert not torch.equal(whole.noise, whole.posterior)
    for stochastic, kind, drawn in ((True, "moments", True), (True, "latents", False), (False, "images", False)):
        found = draws(process, (1, 2, 2), 6, 3, stochastic, kind)
        assert (found.posterior is not None) == (found.rows(slice(2)).posterior is not None) == drawn
        for a, b in zip(found[:3], whole):
            assert torch.equal(a, b)


def test_labels_are_dropped_at_their_rate():
    seen = {}

    class Process:
        def training_losses(self, model, x, t, model_kwargs, noise):
            seen.update(x=x, y=model_kwargs["y"])
            return {"loss": t}

    n, images = 4000, torch.tensor([[[[0, 255]]]], dtype=torch.uint8).expand(4000, 1, 1, 2)
    drawn = draws(create_diffusion(""), (1, 1, 2), n, 0)
    data = SimpleNamespace(kind="images", classes=range(10))
    objective = Objective(Process(), Pixels(), data, label_drop=0.2, precision="fp32")
    objective.losses(None, images, torch.full((n,), 7), drawn)
    assert set(seen["y"].tolist()) == {7, 10}
    assert (seen["y"] == 10).float().mean().item() == pytest.approx(0.2, abs=0.03)
    objective._replace(label_drop=0.0).losses(None, images, torch.full((n,), 7), drawn)
    assert set(seen["y"].tolist()) == {7}
    assert torch.equal(seen["x"][:, 0, 0], torch.tensor([[-1.0, 1.0]]).expand(n, 2))


# --- reconstruction ------------------------------------------------------------------------------


def test_ssim_is_wangs_formula_window_by_window():
    torch.manual_seed(0)
    a, b = torch.rand(2, 2, 9, 10) * 2 - 1, torch.rand(2, 2, 9, 10) * 2 - 1
    b[1] = a[1] * 0.9
    expected = torch.zeros(2)
    for n in range(2):
        values = []
        for channel in range(2):
            for i in range(3):
                for j in range(4):
                    x, y = (image[n, channel, i : i + 7, j : j + 7].double() for image in (a, b))
                    covariance = ((x - x.mean()) * (y - y.mean())).mean()
                    values.append((2 * x.mean() * y.mean() + 0.0004) * (2 * covariance + 0.0036)
                                  / ((x.mean() ** 2 + y.mean() ** 2 + 0.0004)
                                     * (x.var(unbiased=False) + y.var(unbiased=False) + 0.0036)))
        expected[n] = sum(values) / len(values)
    assert torch.allclose(ssim(a, b), expected, atol=1e-5)
    assert torch.allclose(ssim(a, a), torch.ones(2))


def test_reconstruction_is_mse_and_ssim_and_reports_psnr():
    torch.manual_seed(0)
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    terms = Reconstruction().training_losses(lambda x, t, y: 0.5 * x, images, torch.zeros(3), dict(y=None))
    mse = (0.25 * images**2).mean(dim=(1, 2, 3))
    assert torch.allclose(terms["loss"], mse + 1 - ssim(0.5 * images, images))
    assert torch.allclose(terms["psnr"], 20 * torch.log10(2 / mse.sqrt()))
