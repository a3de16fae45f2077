"""Features cached by extract_features.py (tests/test_extract_features.py has what it writes) and by fast-DiT."""

import json

import numpy as np
import pytest
import torch
from conftest import assert_one_line
from PIL import Image
from safetensors.torch import save_file

import train
from pipeline.autoencoders import check_features, latents_of, load_autoencoder
from runtime import UserError
from training.datasets import load_dataset
from training.objective import Draws, Objective
from training.rows import Rows

# --- those of fast-DiT -----------------------------------------------------------------------------


@pytest.fixture
def fast_dit(tmp_path):
    """As fast-DiT's extract_features.py leaves them; written out of order."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((12, 1, 4, 32, 32)).astype(np.float32)
    for name in ("imagenet256_features", "imagenet256_labels"):
        (tmp_path / "fast" / name).mkdir(parents=True)
    for i in (3, 11, 0, 7, 1, 2, 4, 5, 6, 8, 9, 10):
        np.save(tmp_path / "fast" / "imagenet256_features" / f"{i}.npy", latents[i])
        np.save(tmp_path / "fast" / "imagenet256_labels" / f"{i}.npy", np.array([i * 90]))
    return tmp_path / "fast", latents


def test_fast_dit_features_are_read_with_their_labels_and_never_scaled_again(fast_dit, tiny_vae):
    folder, latents = fast_dit
    data = load_dataset(str(folder))
    x, y = data.__getitems__(Rows.plain(range(12)))
    order = (y // 90).tolist()
    assert sorted(order) == list(range(12))
    assert np.array_equal(x.numpy(), latents[order, 0])
    assert (data.classes[207], data.image_size, data.kind) == ("golden retriever", (256, 256), "latents")
    objective = Objective(Capture(), load_autoencoder(str(tiny_vae)), data, 0.0, "fp32")
    draws = Draws(*(torch.zeros(12, *shape) for shape in ((4, 32, 32), (), (), (4, 32, 32))))
    objective.losses(None, x, y, draws)
    assert torch.equal(objective.process.x, x)


class Capture:
    def training_losses(self, model, x, t, model_kwargs, noise):
        self.x = x
        return {"loss": t}


def test_fast_dit_features_train_and_wrong_ones_are_refused(fast_dit, tiny_vae, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    folder, latents = fast_dit
    tiny = ["--data-path", folder, "--model", "DiT-S/8", "--model-args", '{"hidden_size": 16, "depth": 1, "num_heads": 2}',
            "--global-batch-size", 4, "--max-steps", 2, "--num-workers", 0, "--device", "cpu", "--vae", tiny_vae,
            "--diffusion-args", '{"sampling": {"num_sampling_steps": "1"}}']
    assert run_here(train, *tiny).returncode == 0
    assert_one_line(run_here(train, *tiny, "--image-size", 512), "--image-size 512", "256")
    vae = load_autoencoder(str(tiny_vae)).vae
    vae.register_to_config(scaling_factor=0.13025)  # SDXL's
    vae.save_pretrained("sdxl")
    assert_one_line(run_here(train, *tiny, "--vae", "sdxl"), "scaling_factor", "0.13025")
    assert_damaged(folder, "imagenet256_labels/5.npy", np.array([1000]), "has the label 1000, of 5.npy")
    assert_damaged(folder, "imagenet256_features/5.npy", np.full_like(latents[5], np.nan), "features/5.npy is not finite")
    assert_damaged(folder, "imagenet256_features/5.npy", latents[5, :, :3],
                   r"features/5.npy has the shape \(1, 3, 32, 32\); expected \(1, 4, 32, 32\)")


def assert_damaged(folder, name, content, words):
    """Features one file of which has another content are refused, at the latest where all rows are read."""
    path = folder / name
    sound = path.read_bytes()
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, dict):
        save_file(content, path)
    else:
        path.write_bytes(content)
    with pytest.raises((UserError, OSError), match=words):
        read_mirrored(folder)
    path.write_bytes(sound)


def read_mirrored(folder):
    data = load_dataset(str(folder))
    return data.__getitems__(Rows(np.arange(len(data)), np.ones(len(data), dtype=bool)))


# --- our own, damaged --------------------------------------------------------------------------------


@pytest.fixture
def features(tmp_path):
    """Sound features of five pictures of three classes; the row 3 was skipped."""
    folder = tmp_path / "sound"
    folder.mkdir()
    rng = np.random.default_rng(0)
    np.save(folder / "moments.npy", rng.standard_normal((6, 2, 8, 4, 4)).astype(np.float16))
    np.save(folder / "labels.npy", np.array([0, 0, 1, -1, 2, 2]))
    (folder / "meta.json").write_text(json.dumps({
        "autoencoder": {}, "latent_shape": [4, 4, 4], "image_size": [32, 32], "channels": 3, "rows": 6, "skipped": [3],
        "flip": True, "classes": ["a", "b", "c"]}))
    assert load_dataset(str(folder)).__getitems__(Rows.plain(range(5)))[1].tolist() == [0, 0, 1, 2, 2]
    return folder


def test_damaged_features_are_refused(features):
    moments, labels = (np.load(features / f"{name}.npy") for name in ("moments", "labels"))
    moments[4, 1, 2, 0, 0] = np.inf
    for name in ("moments.npy", "labels.npy"):
        assert_damaged(features, name, (features / name).read_bytes()[:-20], f"cannot read .*{name}")
    for name, content, words in (
            ("meta.json", b"", "damaged: Expecting value"),
            ("meta.json", b'{"rows": 6}', "meta.json lacks autoencoder, channels, .*, skipped"),
            ("labels.npy", np.array([*labels[:5], 3]), "the label 3; .* 3 classes"),
            ("labels.npy", np.array([*labels[:5], -2]), "the label -2"),
            ("labels.npy", np.zeros(5, int), r"labels.npy has the shape \(5,\); .* \(6,\)"),
            ("moments.npy", np.zeros((6, 2, 8, 4), np.float16), r"moments.npy has the shape"),
            ("moments.npy", moments, r"row 4 of moments\.npy is not finite")):
        assert_damaged(features, name, content, words)


# --- those of EDM2 and REPA ------------------------------------------------------------------------


@pytest.fixture
def edm2(tmp_path):
    """As EDM2's dataset_tool.py encode, and REPA's, leave them."""
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((6, 8, 4, 4)).astype(np.float32)
    moments[:, 4:] = np.abs(moments[:, 4:])  # standard deviations
    labels = []
    for i, sample in enumerate(moments):
        name = f"{i // 4:05d}/img-mean-std-{i:08d}.npy"
        (tmp_path / "edm2" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "edm2" / name, sample)
        labels.append([name, i % 3])
    (tmp_path / "edm2" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return tmp_path / "edm2", moments


def test_edm2s_moments_are_read_as_mean_and_standard_deviation(edm2, tiny_vae):
    folder, moments = edm2
    data = load_dataset(str(folder))
    x, y = data.__getitems__(Rows.plain([5, 0]))
    autoencoder = load_autoencoder(str(tiny_vae))
    noise = torch.randn(2, 4, 4, 4)
    mean, std = torch.from_numpy(moments[[5, 0]]).chunk(2, dim=1)
    expected = ((mean + std * noise) - autoencoder.shift) * autoencoder.scale
    torch.testing.assert_close(autoencoder.sample(x, noise), expected)
    assert y.tolist() == [2, 0]
    assert (data.classes, data.image_size, data.latent_shape, data.kind) == (["0", "1", "2"], (32, 32), (4, 4, 4), "moments")
    inner = folder.parent / "repa"
    inner.mkdir()
    folder.rename(inner / "vae-sd")
    assert torch.equal(load_dataset(str(inner)).__getitems__(Rows.plain([5]))[0], x[:1])  # REPA's folder


def test_damaged_features_of_edm2_are_named(edm2):
    folder, moments = edm2
    with pytest.raises(ValueError, match=r"`num_classes` 2: .* has labels from 0 to 2"):
        load_dataset(str(folder), num_classes=2)
    file = "00001/img-mean-std-00000004.npy"
    assert_damaged(folder, file, moments[4, :, :2], r"00000004\.npy has the shape \(8, 2, 4\); expected \(2C, h, w\)")
    assert_damaged(folder, file, -np.abs(moments[4]), r"00000004\.npy is not finite, or holds a negative")
    assert_damaged(folder, "dataset.json", b'{"labels": null}', r"dataset\.json is damaged")


def test_a_json_or_safetensors_beside_pictures_makes_no_features_of_them(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "x.png")
    (tmp_path / "dataset.json").write_text('{"labels": [["cat/x.png", 0]]}')  # as EDM's dataset_tool writes it
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert load_dataset(str(tmp_path), 8).kind == "images"


# --- those of LightningDiT -------------------------------------------------------------------------


@pytest.fixture
def lightning(tmp_path):
    """As LightningDiT's extract_features.py leaves them: two shards of different length, and statistics."""
    torch.manual_seed(0)
    folder = tmp_path / "lightning"
    folder.mkdir()
    latents, flipped, labels = 3 * torch.randn(7, 32, 4, 4) + 1, torch.randn(7, 32, 4, 4), torch.arange(7) % 5
    for shard, rows in enumerate((slice(0, 4), slice(4, 7))):
        save_file({"latents": latents[rows].clone(), "latents_flip": flipped[rows].clone(), "labels": labels[rows].clone()},
                  folder / f"latents_rank00_shard{shard:03d}.safetensors", metadata={"total_size": str(len(labels[rows]))})
    statistics = {"mean": latents.mean(dim=(0, 2, 3), keepdim=True), "std": latents.std(dim=(0, 2, 3), keepdim=True)}
    torch.save(statistics, folder / "latents_stats.pt")
    return folder, latents, flipped, labels, statistics


def test_lightnings_latents_are_read_and_normalised_as_there(lightning, tmp_path):
    folder, latents, flipped, labels, statistics = lightning
    data = load_dataset(str(folder))
    rows = Rows(np.array([6, 1, 4, 3]), np.array([True, False, False, True]))
    x, y = data.__getitems__(rows)
    expected = torch.stack([flipped[6], latents[1], latents[4], flipped[3]])
    assert torch.equal(x.chunk(2, dim=1)[0], expected)
    assert torch.equal(y, labels[[6, 1, 4, 3]])
    assert (len(data), data.image_size, data.latent_shape, data.flip) == (7, (64, 64), (32, 4, 4), True)
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=5 * [8], norm_num_groups=8, latent_channels=32,
                        down_block_types=5 * ["DownEncoderBlock2D"], up_block_types=5 * ["UpDecoderBlock2D"])
    vae.save_pretrained(tmp_path)
    autoencoder = load_autoencoder(str(tmp_path), statistics=data.statistics)
    check_features(autoencoder, data)
    found = latents_of(autoencoder, x, data.kind, torch.randn(4, 32, 4, 4))
    torch.testing.assert_close(found, (expected - statistics["mean"]) / statistics["std"], rtol=1e-4, atol=1e-5)


def test_damaged_shards_are_named(lightning):
    tensors = {"latents": torch.zeros(3, 32, 4, 4), "labels": torch.zeros(3)}
    for content, words in (
            (tensors, r"cannot read latents_flip of .*shard001"), (b"no tensors", r"cannot read labels of .*shard001"),
            (tensors | {"latents_flip": torch.zeros(2, 32, 4, 4)}, r"latents_flip of \S+ .*\(2, 32, 4, 4\); expected \(3, "),
            (tensors | {"latents_flip": torch.full((3, 32, 4, 4), torch.nan)}, "the latent of row 4 is not finite")):
        assert_damaged(lightning[0], "latents_rank00_shard001.safetensors", content, words)
    torch.save({"mean": 1}, lightning[0] / "latents_stats.pt")
    with pytest.raises(ValueError, match=r"latents_stats\.pt is damaged"):
        load_dataset(str(lightning[0]))
