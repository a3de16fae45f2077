import pytest
import torch
from conftest import assert_same_images
from test_models import inputs, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion import create_diffusion
from diffusion.samplers import ddim
from models import GlobalResponseNorm
from pipeline import checkpoint, generation
from pipeline.autoencoders import Pixels
from pipeline.generation import Sampling, addressed_noise, generate, restore_autoencoder
from pipeline.settings import SamplingSettings
from runtime import UserError
from runtime.pictures import to_uint8
from runtime.processes import World


def draw(path, indices, labels=None, seed=0, **given):
    restored = checkpoint.restore(path)
    sampling = Sampling.of(restored.spec, given, restored.model)
    return generate(restored.model, Pixels(), labels or [i % 5 for i in indices], indices, seed, sampling)


def test_image_17_is_image_17_whatever_the_batch(gaussian_run):
    for overrides in (dict(), dict(sampler="heun", cfg_scale=1.0)):
        together = draw(gaussian_run, range(15, 20), **overrides)
        assert_same_images(together[2:3], draw(gaussian_run, [17], **overrides))
        assert (together.shape, together.dtype) == ((5, 8, 8, 3), torch.uint8)
        assert (together[2].int() - together[3].int()).abs().max() > 20


def test_seed_index_label_and_guidance_change_an_image(gaussian_run):
    base = draw(gaussian_run, [3])
    for indices, changes in (([4], dict(labels=[3])), ([3], dict(labels=[1])), ([3], dict(cfg_scale=1.0)),
                             ([3], dict(cfg_channels=1)), ([3], dict(seed=1))):
        assert not torch.equal(base, draw(gaussian_run, indices, **changes))


def test_later_noise_differs_from_step_to_step(gaussian_run):
    model = checkpoint.restore(gaussian_run).model
    draws = [addressed_noise(model, 0, [5], *step) for step in ((), (0,), (1,))]
    assert len({draw.sum().item() for draw in draws}) == 3
    assert torch.equal(draws[1], addressed_noise(model, 0, [4, 5], 0)[1:])


def test_generate_is_the_sampler_the_guidance_and_the_decoder(gaussian_run):
    """Against DiT's own way: forward_with_cfg on a doubled batch in p_sample_loop, all three channels guided."""
    model, indices = checkpoint.restore(gaussian_run).model, [0, 1]
    x = addressed_noise(model, 0, indices)
    y = torch.tensor([3, 4, 5, 5])
    noises = [addressed_noise(model, 0, indices, step) for step in range(4)]
    out = create_diffusion("4").p_sample_loop(
        model.forward_with_cfg, (4, 3, 8, 8), torch.cat([x, x]), model_kwargs=dict(y=y, cfg_scale=2.0),
        noise_source=lambda step: torch.cat([noises[step]] * 2))
    expected = to_uint8(out.chunk(2)[0])
    assert_same_images(draw(gaussian_run, indices, labels=[3, 4]), expected)


class Casts(TorchDispatchMode):
    """Records the size of each weight that is copied to another dtype."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
            self.sizes.append(args[0].numel())
        return function(*args, **(kwargs or {}))


def test_weights_are_cast_to_bf16_once_and_the_outputs_stay_the_same():
    """What is left to cast in a call: the bias of each GRN, which is a vector."""
    model = tiny("DiNext-U-S")
    x, t, y = inputs(model)

    def call():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Casts() as casts:
            return model(x, t, y), casts.sizes

    before, cast_before = call()
    generation.prepare_network(model, "fp32", compile=False)
    assert call()[1] == cast_before
    assert sum(cast_before) > 0.5 * sum(p.numel() for p in model.parameters())
    generation.prepare_network(model, "bf16", compile=False)
    after, cast_after = call()
    assert torch.equal(before, after)
    assert cast_after == [module.bias.numel() for module in model.modules() if isinstance(module, GlobalResponseNorm)]


def test_thresholding_replaces_clipping(gaussian_run, monkeypatch):
    plain, thresholded = (draw(gaussian_run, [1, 2], sampler="ddim", dynamic_thresholding=on) for on in (False, True))
    assert not torch.equal(plain, thresholded)
    monkeypatch.setattr(generation, "dynamic_threshold", lambda x_0: x_0.clamp(-1, 1))
    assert torch.equal(plain, draw(gaussian_run, [1, 2], sampler="ddim", dynamic_thresholding=True))


def test_input_scale_is_undone_before_decoding():
    class Knows(torch.nn.Module):
        """Predicts the x_0 of one picture, at the scale of the process."""
        in_channels, input_size, num_classes = 1, (2, 3), 1

        def __init__(self):
            super().__init__()
            self.picture = torch.nn.Parameter(torch.linspace(-0.9, 0.9, 6).view(1, 1, 2, 3))

        def forward(self, x, t, y):
            return 0.5 * self.picture.expand(len(x), -1, -1, -1)

    process = create_diffusion("10", objective="x0", learn_sigma=False, input_scale=0.5)
    sampling, model = Sampling(SamplingSettings(sampler="ddim", cfg_channels=1), process, ddim), Knows()
    images = generate(model, Pixels(), [0, 0], range(2), 0, sampling)
    assert torch.equal(images, to_uint8(model.picture.detach()).expand(2, -1, -1, -1))


def test_settings_that_a_network_does_not_allow_are_refused(gaussian_run, tiny_run):
    gaussian, flow = (checkpoint.restore(path) for path in (gaussian_run, tiny_run))
    for restored, given, words in (
            (gaussian, dict(num_sampling_steps="5000"), "`num_sampling_steps` 5000.* 1000"),
            (gaussian, dict(cfg_channels=4), r"`cfg_channels` 4 is not in 1\.\.3"),
            (flow, dict(sampler="ddpm"), "ddpm.*FlowMatching.*allowed: ddim"), (flow, dict(eta=0.5), "`eta`.*ddim"),
            (flow, dict(reuse="encoder", reuse_args={"split": 3}), r"split 3 is not in 0\.\.2"),
            (flow, dict(num_sampling_steps=12, reuse="encoder", key_steps="0,50"), "`key_steps` 0,50: .*below 23")):
        with pytest.raises(UserError, match=words):
            Sampling.of(restored.spec, given, restored.model)


def test_an_autoencoder_that_does_not_fit_is_refused(gaussian_run, tiny_vae):
    restored, world = checkpoint.restore(gaussian_run, vae=str(tiny_vae)), World(0, 1, torch.device("cpu"))
    with pytest.raises(UserError, match=r"`vae` .* \(4, 1, 1\), the model takes \(3, 8, 8\)"):
        restore_autoencoder(world, restored, Sampling.of(restored.spec))
    restored.model.in_channels, restored.model.input_size = 4, (1, 1)
    sampling = Sampling.of(restored.spec, {"dynamic_thresholding": True})
    with pytest.raises(UserError, match=r"`dynamic_thresholding` is for pixels.*latents"):
        restore_autoencoder(world, restored, sampling)
