"""Checkpoints of commit b884e54 (tests/golden/b884e54) load, sample and continue; presets have its initial weights.

On another processor pixels and weights agree up to rounding.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, family
from PIL import Image
from test_models import TINY

import sample
import train
from pipeline import checkpoint
from runtime.pictures import to_unit_range
from small_models import NETWORKS
from training.datasets import load_dataset
from training.rows import Rows

GOLDEN = ROOT / "tests" / "golden" / "b884e54"
FLAGS = {
    "gaussian": ["--model", "DiT-S/2", "--model-args", '{"hidden_size": 8, "depth": 2, "num_heads": 2}', "--diffusion-args",
                 '{"sampling": {"sampler": "ddpm", "num_sampling_steps": "8", "cfg_scale": 1.5}}'],
    "flow": ["--model", "DiNext-U-S", "--model-args", '{"hidden_size": 4, "depths": [1, 1, 1, 1, 1]}', "--diffusion-args",
             '{"objective": "flow", "time_sampling": "logit-normal", "sampling": {"sampler": "heun", '
             '"num_sampling_steps": 4}}'],
    "autoencoder": ["--model", "Autoencoder-F4C8", "--model-args", '{"hidden_size": 8}'],
    "mlp": ["--model", "MLP", "--model-args", '{"hidden_size": 16, "label_features": 8}', "--diffusion-args",
            '{"objective": "flow", "flow_loss": "velocity+epsilon+x0"}'],
}


@pytest.mark.parametrize("name", FLAGS)
def test_it_continues_to_the_same_weights(name, tmp_path, monkeypatch, run_here):
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
    assert set(state["spec"]["model"]["args"]) >= set(before["spec"]["model"]["args"])
    assert state["spec"]["model"]["args"].get("label_std", 0.02) == 0.02  # as it began; the default has changed


@pytest.mark.parametrize("name", ["gaussian", "flow", "mlp"])
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


def test_presets_have_the_same_initial_weights():
    """Bit for bit, in a process with torch's plain kernels, which round the same on all processors."""
    golden = json.loads((GOLDEN / "state_dicts.json").read_text())
    settings = {name: dict(num_classes=5, **TINY[family(name)]) for name in golden if name != "Autoencoder-F4C8"}
    for name in settings:
        if family(name) in ("DiNext", "DiNext-U"):
            settings[name]["label_std"] = 0.02  # their default of then
    settings["Autoencoder-F4C8"] = dict(hidden_size=8)
    found = subprocess.run([sys.executable, ROOT / "tests" / "other_process.py", "print_digests", json.dumps(settings)],
                           capture_output=True, text=True, check=True, env=os.environ | {"ATEN_CPU_CAPABILITY": "default"})
    assert json.loads(found.stdout) == golden
    assert set(golden) <= set(NETWORKS)
