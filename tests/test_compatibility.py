"""Checkpoints of commit ff27331, from before a checkpoint held every argument of its network (tests/golden/ff27331).

They load, sample to the pixels and continue to the weights that ff27331 gave; on another processor, up to rounding.
"""

import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import sample
import train
from pipeline import checkpoint
from runtime.pictures import to_unit_range
from runtime.randomness import generator
from training.datasets import load_dataset
from training.objective import Draws, Objective
from training.rows import Rows

GOLDEN = ROOT / "tests" / "golden" / "ff27331"
FLAGS = {
    "gaussian": ["--model", "DiT-S/2", "--model-args", '{"hidden_size": 8, "depth": 2, "num_heads": 2}', "--diffusion-args",
                 '{"sampling": {"sampler": "ddpm", "num_sampling_steps": "8", "cfg_scale": 1.5}}'],
    "flow": ["--model", "DiNext-U-S", "--model-args", '{"hidden_size": 4, "depths": [1, 1, 1, 1, 1]}', "--diffusion-args",
             '{"objective": "flow", "time_sampling": "logit-normal", "sampling": {"sampler": "heun", '
             '"num_sampling_steps": 4}}'],
    "autoencoder": ["--model", "Autoencoder-F4C8", "--model-args", '{"hidden_size": 8}'],
    "small": ["--model", "MLP", "--model-args", '{"hidden_size": 16, "label_features": 8}', "--diffusion-args",
              '{"objective": "flow", "flow_loss": "velocity+epsilon+x0"}'],
}


def old_draws(self, address, batch_size, model, device):
    """The draws of a step at ff27331: one for the posterior stood before that of t, also where there was no posterior."""
    source, shape = generator(*address, device=device), (batch_size, model.in_channels, *model.input_size)
    noise, unused = (torch.randn(shape, generator=source) for _ in range(2))
    return Draws(noise, self.process.sample_times(batch_size, source), torch.rand(batch_size, generator=source), unused)


@pytest.mark.parametrize("name", FLAGS)
def test_it_continues_to_the_same_weights(name, tmp_path, monkeypatch, run_here):
    monkeypatch.setattr(Objective, "draw", old_draws)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "results" / name / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / f"{name}.pt", folder / "0000004.pt")
    result = run_here(train, "--data-path", "digits", "--vae", "pixels", "--global-batch-size", 12, "--lr", 0.002,
                      "--ema-decay", 0.5, "--preview-every", 0, "--log-every", 1, "--num-workers", 0, "--device", "cpu",
                      "--run-name", name, "--max-steps", 6, *FLAGS[name])
    assert result.returncode == 0, result.stderr
    assert f"Continuing results/{name}/checkpoints/0000004.pt; --max-steps was 4, is now 6; 4 of 6" in result.stdout
    state, expected = checkpoint.load(folder / "0000006.pt"), np.load(GOLDEN / f"{name}.npz")
    before = checkpoint.load(folder / "0000004.pt")
    for part in ("model", "ema"):
        for key, value in state[part].items():
            assert np.abs(value.numpy() - expected[f"{part}/{key}"]).max() < 1e-5, key
        assert any((value - before[part][key]).abs().max() > 1e-3 for key, value in state[part].items())
    assert state["spec"]["model"]["class"] in ("DiT", "DiNextU", "Autoencoder", "MLP")
    assert set(state["spec"]["model"]["args"]) >= set(before["spec"]["model"]["args"])


@pytest.mark.parametrize("name", ["gaussian", "flow", "small"])
def test_it_samples_to_the_same_pixels(name, tmp_path, run_here):
    result = run_here(sample, "--ckpt", GOLDEN / f"{name}.pt", "--seed", 0, "--class-labels", "0 3 7", "--num-samples", 2,
                      "--device", "cpu", "--out", tmp_path / "x.png")
    assert result.returncode == 0, result.stderr
    pixels = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
    assert np.abs(pixels - np.load(GOLDEN / f"{name}.npz")["pixels"]).max() <= 1


def test_an_autoencoder_reconstructs_the_same():
    network = checkpoint.restore_own_autoencoder(GOLDEN / "autoencoder.pt")
    images, _ = load_dataset("digits", split="val").__getitems__(Rows.plain(np.arange(4)))
    with torch.no_grad():
        found = network(to_unit_range(images))
    assert np.abs(found.numpy() - np.load(GOLDEN / "autoencoder.npz")["reconstruction"]).max() < 1e-5
