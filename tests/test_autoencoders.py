import pytest
import torch

from autoencoders import load_autoencoder, to_unit_range


def test_pixels_are_the_image():
    pixels = load_autoencoder("pixels")
    x = torch.rand(2, 1, 8, 6) * 2 - 1
    assert pixels.latent_shape((8, 6), 1) == (1, 8, 6)
    assert torch.equal(pixels.decode(pixels.encode(x, torch.randn_like(x))), x)
    assert pixels.decode(torch.tensor([2.0])).item() == 1


def test_unit_range_reaches_both_ends():
    assert to_unit_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_sd_vae_scales_as_its_config_says(tiny_vae, capfd):
    autoencoder = load_autoencoder(str(tiny_vae))
    assert capfd.readouterr().err == ""
    x, noise = torch.rand(2, 3, 32, 16) * 2 - 1, torch.randn(2, 4, 4, 2)
    assert autoencoder.latent_shape((32, 16), 3) == noise.shape[1:]
    posterior = autoencoder.vae.encode(x).latent_dist
    assert torch.allclose(autoencoder.encode(x, noise), (posterior.mean + posterior.std * noise) * 0.18215)
    assert torch.allclose(autoencoder.encode(x), posterior.mean * 0.18215)
    latents = torch.randn(2, 4, 4, 2)
    assert torch.equal(autoencoder.decode(latents), autoencoder.vae.decode(latents / 0.18215).sample.clamp(-1, 1))


def test_a_shift_in_the_config_is_taken(tiny_vae, tmp_path):
    vae = load_autoencoder(str(tiny_vae)).vae
    vae.register_to_config(shift_factor=0.5, scaling_factor=2.0)
    vae.save_pretrained(tmp_path)
    autoencoder, x = load_autoencoder(str(tmp_path)), torch.zeros(1, 3, 8, 8)
    assert torch.allclose(autoencoder.encode(x), (vae.encode(x).latent_dist.mean - 0.5) * 2)
    z = torch.randn(1, 4, 1, 1)
    assert torch.allclose(autoencoder.decode(z), vae.decode(z / 2 + 0.5).sample.clamp(-1, 1))


def test_a_saved_spec_builds_it_again_from_anywhere(tiny_vae, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_vae.parent)
    spec = load_autoencoder(tiny_vae.name).spec
    monkeypatch.chdir(tmp_path)
    assert load_autoencoder(**spec).vae.config.latent_channels == 4


def test_wrong_autoencoders_and_sizes_are_refused(tiny_vae, tmp_path):
    with pytest.raises(FileNotFoundError, match="--vae /nowhere"):
        load_autoencoder("/nowhere/vae")
    with pytest.raises(ValueError, match="cannot load an AutoencoderKL"):
        load_autoencoder(str(tmp_path))
    autoencoder = load_autoencoder(str(tiny_vae))
    with pytest.raises(ValueError, match="divisible by 8"):
        autoencoder.latent_shape((32, 20), 3)
    with pytest.raises(ValueError, match="the data have 1"):
        autoencoder.latent_shape((32, 32), 1)
