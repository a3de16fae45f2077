import shutil

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, assert_close, assert_one_line, read_metrics, run_script, train_here
from PIL import Image
from safetensors.torch import load_file, save_file

import extract_features
import sample
import sample_ddp
import train
from pipeline import checkpoint
from pipeline.autoencoders import load_autoencoder
from runtime import UserError
from runtime.pictures import to_uint8, to_unit_range
from runtime.randomness import generator
from training.datasets import load_dataset
from training.rows import Rows


def test_sd_vae_scales_as_its_config_says(tiny_vae, tmp_path, monkeypatch):
    vae = load_autoencoder(str(tiny_vae)).vae
    vae.register_to_config(scaling_factor=2.0, shift_factor=0.5)
    vae.save_pretrained(tmp_path / "shifted")
    x, noise = torch.rand(2, 3, 32, 16) * 2 - 1, torch.randn(2, 4, 4, 2)
    for folder, scale, shift in ((tiny_vae, 0.18215, 0.0), (tmp_path / "shifted", 2.0, 0.5)):
        monkeypatch.chdir(folder.parent)
        spec = load_autoencoder(folder.name).spec
        monkeypatch.chdir(tmp_path)
        autoencoder = load_autoencoder(**spec)  # from anywhere
        assert autoencoder.latent_shape((32, 16), 3) == noise.shape[1:]
        posterior = autoencoder.vae.encode(x).latent_dist
        assert torch.allclose(autoencoder.encode(x, noise), (posterior.mean + posterior.std * noise - shift) * scale)
        assert torch.allclose(autoencoder.encode(x), (posterior.mean - shift) * scale)
        assert torch.allclose(autoencoder.decode(noise), autoencoder.vae.decode(noise / scale + shift).sample.clamp(-1, 1))
    identity = autoencoder.identity()
    autoencoder.vae.to(memory_format=torch.contiguous_format)
    assert autoencoder.identity() == identity  # of the weights, whatever their memory format


def test_wrong_autoencoders_and_sizes_are_refused(tiny_vae, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    for source, words in (("./nowhere.pt", "nowhere.pt does not exist"), ("ema", "ema: .*hub's cache"),
                          ("results/nowhere", "results/nowhere: no such folder"),
                          (str(tmp_path), "cannot load an autoencoder"),
                          (str(tmp_path / "tiny"), "AutoencoderTiny; expected an AutoencoderKL or AutoencoderDC")):
        with pytest.raises((UserError, FileNotFoundError), match=words):
            load_autoencoder(source)
    autoencoder = load_autoencoder(str(tiny_vae))
    for size, channels, words in (((32, 20), 3, "divisible by 8"), ((32, 32), 1, "3 channels, not of 1")):
        with pytest.raises(UserError, match=words):
            autoencoder.latent_shape(size, channels)


AUTOENCODER = ["--data-path", "digits", "--model", "Autoencoder-F4C8", "--model-args", '{"hidden_size": 8}',
               "--global-batch-size", "32", "--num-workers", "0", "--log-every", "5", "--preview-every", "0", "--lr", "0.003",
               "--ema-decay", "0.5", "--device", "cpu"]
LATENTS = [*TINY_RUN, "--model-args", '{"hidden_size": 32, "depth": 2}', "--run-name", "latents"]  # a run on its latents
STEPS_30 = [*AUTOENCODER, "--max-steps", "30", "--val-every", "15"]


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("trained")
    train_here(cwd, *STEPS_30, "--ckpt-every", 10, "--run-name", "ae")
    return cwd / "results"


@pytest.fixture
def trained(trained_once, tmp_path, monkeypatch):
    """The folder of a run of 30 steps in tmp_path/results, to be changed at will."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_once, "results")
    return tmp_path / "results" / "ae"


def test_an_autoencoder_trains_validates_and_shows_reconstructions(trained):
    first, last = (line for line in read_metrics(trained) if "val_loss" in line)
    assert last["val_loss_ema"] < first["val_loss_ema"]
    assert last["val_psnr_ema"] > first["val_psnr_ema"] > 0
    assert 0 < last["val_ssim_ema"] < 1
    model, held_out = checkpoint.restore(trained).model, load_dataset("digits", split="val")
    images = to_unit_range(held_out.images[torch.randperm(450, generator=generator("val", 450))])
    psnr = 10 * torch.log10(4 / (model(images).clamp(-1, 1) - images).square().mean(dim=(1, 2, 3)))
    assert psnr.mean().item() == pytest.approx(last["val_psnr_ema"], rel=1e-4)
    with Image.open(trained / "previews" / "0000030.png") as picture:
        pixels = np.asarray(picture)
    shown = to_unit_range(held_out.images[np.linspace(0, 449, 20).round()])
    for row in range(4):  # two rows of images, each above a row of their reconstructions
        chosen = shown[row // 2 * 10 :][:10]
        expected = to_uint8(model(chosen) if row % 2 else chosen)[..., 0].numpy()
        tiles = pixels[row * 72 + 8 : row * 72 + 72, :, 0]  # 8x8 enlarged eight times, framed by a pixel
        assert all(np.array_equal(tiles[::8, column * 72 + 8 : column * 72 + 72 : 8], image)
                   for column, image in enumerate(expected))


def test_it_is_resumed_exactly(trained, tmp_path, run_here):
    again = tmp_path / "results" / "again"
    shutil.copytree(trained, again)
    for step in (20, 30):
        (again / "checkpoints" / f"{step:07d}.pt").unlink()
    assert run_here(train, *STEPS_30, "--run-name", "again").returncode == 0
    a, b = (checkpoint.load(folder / "checkpoints" / "0000030.pt")["ema"] for folder in (trained, again))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert load_autoencoder(str(again)).identity() == load_autoencoder(str(trained)).identity()


def test_it_serves_as_vae_everywhere(trained, tmp_path, run_here):
    assert run_here(train, *LATENTS, "--max-steps", 3, "--image-size", 8, "--vae", trained).returncode == 0
    flags = ["--ckpt", "results/latents", "--num-sampling-steps", 3]
    assert run_here(sample, *flags, "--class-labels", "3 seven", "--out", "x.png").returncode == 0
    assert (tmp_path / "x-labels.txt").read_text() == "3 three\n7 seven\n"
    assert run_here(sample_ddp, *flags, "--num-fid-samples", 5, "--sample-dir", "drawn").returncode == 0
    (npz,) = (tmp_path / "drawn").glob("*.npz")
    assert np.load(npz)["arr_0"].shape == (5, 8, 8, 3)


@pytest.mark.slow
def test_two_processes_train_an_autoencoder_as_one_does(trained, tmp_path):
    run_script("train.py", *STEPS_30, "--run-name", "two", cwd=tmp_path, nproc=2)
    two = tmp_path / "results" / "two"
    for a, b in zip(read_metrics(trained), read_metrics(two), strict=True):
        for key in a.keys() & {"loss", "val_loss", "val_psnr_ema", "val_ssim_ema", "grad_norm"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3), (key, a, b)
    one, other = (np.asarray(Image.open(folder / "previews" / "0000030.png")).astype(int) for folder in (trained, two))
    assert np.abs(one - other).max() <= 2


def test_wrong_uses_of_an_autoencoder_are_one_line(trained, tiny_run, run_here):
    assert_one_line(run_here(sample, "--ckpt", trained), "is an autoencoder", "--vae")
    for flags, words in (([*TINY_RUN, "--vae", tiny_run], "holds a DiNext-S/2, not one of Autoencoder-F4C8"),
                         ([*AUTOENCODER, "--diffusion-args", '{"objective": "flow"}'], "--diffusion-args"),
                         ([*AUTOENCODER, "--vae", trained], "--vae pixels"),
                         ([*AUTOENCODER, "--image-size", 10], "multiples of 4"), ([*AUTOENCODER, "--image-size", 4], "SSIM")):
        assert_one_line(run_here(train, *flags), words)


def test_other_weights_of_the_autoencoder_are_noticed_and_another_place_is_not(trained, tmp_path, run_here):
    draw = [sample, "--ckpt", "results/latents", "--num-sampling-steps", 2]
    assert run_here(train, *LATENTS, "--max-steps", 2, "--vae", trained).returncode == 0
    moved = tmp_path / "moved"
    trained.rename(moved)
    assert_one_line(run_here(*draw), f"--vae {trained}", "pass its new path as --vae")
    assert run_here(*draw, "--vae", moved).returncode == 0
    assert run_here(train, *LATENTS, "--max-steps", 3, "--vae", moved).returncode == 0
    assert run_here(*draw).returncode == 0  # the checkpoint has the new path
    newest = checkpoint.latest(moved)
    state = checkpoint.load(newest)
    checkpoint.save(newest, state | {"ema": {name: 1.1 * weight for name, weight in state["ema"].items()}})
    assert_one_line(run_here(*draw), "other weights", "sha256")
    assert_one_line(run_here(train, *LATENTS, "--max-steps", 4, "--vae", moved), "vae_sha256")


def test_features_are_cached_with_it(trained, tmp_path, run_here, photographs):
    data = ["--data-path", photographs / "train", "--image-size", 16]
    assert run_here(train, *AUTOENCODER, *data, "--max-steps", 2, "--global-batch-size", 4, "--run-name", "a").returncode == 0
    assert run_here(extract_features, *data, "--vae", "results/a", "--features-path", "f", "--num-workers", 0, "--device",
                    "cpu").returncode == 0
    images = load_dataset(str(photographs / "train"), 16).__getitems__(Rows.plain(np.arange(6)))[0]
    latents = load_autoencoder("results/a").encode(to_unit_range(images))
    moments = torch.from_numpy(np.load("f/moments.npy"))
    assert torch.allclose(moments[:, 0].chunk(2, dim=1)[0].float(), latents, atol=2e-3)
    assert run_here(train, *LATENTS, "--data-path", "f", "--vae", "results/a", "--max-steps", 2, "--global-batch-size",
                    4).returncode == 0


def kl(folder, **config):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(**dict(block_out_channels=[32, 32], layers_per_block=1, latent_channels=4, norm_num_groups=32,
                               down_block_types=2 * ["DownEncoderBlock2D"], up_block_types=2 * ["UpDecoderBlock2D"]) | config)
    vae.eval().save_pretrained(folder)
    return vae


def test_statistics_in_a_config_are_honoured(tmp_path):
    """latents = (z - mean) * scaling_factor / std, as diffusers' pipelines do."""
    mean, std = [0.5, -1.0, 0.0, 2.0], [1.0, 2.0, 0.5, 4.0]
    vae = kl(tmp_path, latents_mean=mean, latents_std=std, scaling_factor=0.7)
    ours, x = load_autoencoder(str(tmp_path)), torch.rand(2, 3, 8, 8) * 2 - 1
    z = vae.encode(x).latent_dist.mean
    wide_mean, wide_std = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    assert_close(ours.encode(x), (z - wide_mean) * 0.7 / wide_std)
    assert_close(ours.decode(ours.encode(x)), vae.decode(z).sample.clamp(-1, 1))
    given = load_autoencoder(str(tmp_path), statistics=([1.0] * 4, [3.0] * 4))  # those of features go before
    assert_close(given.encode(x), (z - 1) / 3)
    assert given.spec == {"vae": str(tmp_path), "latents_mean": [1.0] * 4, "latents_std": [3.0] * 4}
    for statistics in (([1.0], [3.0]), ([float("nan")] * 4, [1.0] * 4), ([0.0] * 4, [float("inf")] * 4)):
        with pytest.raises(UserError, match="must be 4 finite numbers each"):
            load_autoencoder(str(tmp_path), statistics=statistics)


def test_an_autoencoder_dc_has_one_latent_an_image(tmp_path):
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    vae = AutoencoderDC(latent_channels=8, encoder_block_out_channels=(16, 16, 16), decoder_block_out_channels=(16, 16, 16),
                        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), attention_head_dim=8,
                        encoder_block_types="ResBlock", decoder_block_types="ResBlock", encoder_qkv_multiscales=((), (), ()),
                        decoder_qkv_multiscales=((), (), ()), scaling_factor=0.3, downsample_block_type="pixel_unshuffle",
                        upsample_block_type="pixel_shuffle").eval()
    vae.save_pretrained(tmp_path)
    ours, x, noise = load_autoencoder(str(tmp_path)), torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 8, 4, 4)
    assert ours.latent_shape((16, 16), 3) == noise.shape[1:]
    z = vae.encode(x).latent
    assert_close(ours.encode(x, noise), 0.3 * z)
    assert_close(ours.decode(0.3 * z), vae.decode(z).sample.clamp(-1, 1))
    assert not ours.stochastic


def ldm_names(state, levels):
    """diffusers' names -> LDM's, one by one, as LDM's modules are called."""
    parts = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
             "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k",
             "to_v": "v", "to_out.0": "proj_out", "downsamplers.0": "downsample", "upsamplers.0": "upsample"}
    renamed = {}
    for key, value in state.items():
        if "attentions" in key and key.endswith("weight") and "group_norm" not in key:
            value = value[:, :, None, None]
        for name, ldm in parts.items():
            key = key.replace(name, ldm)
        for level in range(levels):
            key = key.replace(f"down_blocks.{level}.", f"down.{level}.")
            key = key.replace(f"up_blocks.{level}.", f"UP.{levels - 1 - level}.")
        key = key.replace("UP.", "up.").replace(".resnets.", ".block.").replace(".attentions.", ".attn.")
        renamed[key] = value
    return renamed


def test_a_file_of_ldm_is_the_autoencoder_kl_in_it(tmp_path):
    """With attention at its lowest resolution, as VA-VAE has."""
    vae = kl(tmp_path / "kl", down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], block_out_channels=[32, 64],
             up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"])
    path = str(tmp_path / "vavae.pt")
    torch.save({"state_dict": ldm_names(vae.state_dict(), 2) | {"loss.logvar": torch.zeros(1)}}, path)
    ours, x = load_autoencoder(path, statistics=([0.5] * 4, [2.0] * 4)), torch.rand(2, 3, 8, 8) * 2 - 1
    z = vae.encode(x).latent_dist.mean
    assert_close(ours.encode(x), (z - 0.5) / 2)
    assert_close(ours.decode(ours.encode(x)), vae.decode(z).sample.clamp(-1, 1))
    assert ours.latent_shape((16, 16), 3) == (4, 8, 8)
    with pytest.raises(UserError, match=r"scale of its latents.*`normalise`"):
        load_autoencoder(path)


def test_other_files_and_folders_are_refused(tmp_path):
    folder = tmp_path / "kl"
    state = ldm_names(kl(folder).state_dict(), 2)
    del state["decoder.conv_in.bias"]
    for content, words in (({"unet.weight": torch.zeros(1)}, "autoencoder of LDM: it lacks encoder.conv_in.weight"),
                           (state, r"another architecture \(1 differences, first: decoder.conv_in.bias"),
                           ({"state_dict": [1]}, "autoencoder of LDM")):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=rf"x\.pt .*{words}"):
            load_autoencoder(str(tmp_path / "x.pt"), raw=True)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    del weights["decoder.conv_out.bias"]
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its weights lack decoder\.conv_out\.bias"):
        load_autoencoder(str(folder))
