"""Every config trains two steps, small, and what it draws can be drawn; those of full size are built without memory."""

import json

import pytest
import torch
import yaml
from conftest import ROOT

import checkpoint
import train
from diffusion import create_diffusion
from models import Autoencoder_models, DiT_models

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
SMALL = {  # arguments of the network
    "DiT": dict(depth=1, hidden_size=24, num_heads=2), "PixArt": dict(depth=1, hidden_size=24, num_heads=2),
    "DiNext": dict(depth=1, hidden_size=16), "DiNext-U": dict(depths=[1, 1, 1, 1, 1], hidden_size=16),
    "MLP": dict(hidden_size=32), "ConvAdaLN": dict(hidden_size=16, depth=1), "Autoencoder": dict(hidden_size=8),
}


def load(name):
    return yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())


def family(model):
    return model if model in SMALL else model.split("/")[0].rsplit("-", 1)[0]


def small(name, photographs, tiny_vae):
    """The config on small data, with a small network: greyscale digits for digits, photographs for the rest."""
    config = load(name)
    grey = config["data_path"] in ("digits", "mnist")
    size = config.get("image_size", 8 if config["data_path"] == "digits" else 28 if grey else 32)
    config |= dict(data_path="digits" if grey else str(photographs / "train"), image_size=size, max_steps=2,
                   global_batch_size=4, num_workers=0, log_every=1, ckpt_every=2, device="cpu",
                   model_args=config.get("model_args", {}) | SMALL[family(config["model"])])
    if config.get("vae", "ema") == "ema":
        config |= dict(vae=str(tiny_vae), precision="fp32", compile=False)
    if config.get("diffusion_args"):
        steps = dict(config["diffusion_args"].get("sampling", {}), num_sampling_steps="2")
        config["diffusion_args"] = config["diffusion_args"] | {"sampling": steps}
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains_two_steps(name, photographs, tiny_vae, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    config = small(name, photographs, tiny_vae)
    if config["vae"].startswith("./results/"):
        own = small("cifar_autoencoder", photographs, tiny_vae) | dict(max_steps=1, run_name="cifar-autoencoder")
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
        assert run_here(train, "--config", "own.yaml").returncode == 0
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    result = run_here(train, "--config", "config.yaml", "--run-name", "run")
    assert result.returncode == 0, result.stderr
    losses = [line["loss"] for line in map(json.loads, (tmp_path / "results/run/metrics.jsonl").read_text().splitlines())
              if "loss" in line]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)
    assert (tmp_path / "results/run/previews/0000002.png").exists()
    spec = checkpoint.restore(tmp_path / "results" / "run").spec
    assert spec["model"]["name"] == load(name)["model"]
    assert (spec["sampling"] is None) == ("Autoencoder" in load(name)["model"])


def test_the_first_sampling_step_of_nano_does_not_amplify():
    """What an error of the predicted epsilon is multiplied by: sigma (alpha' / alpha) - sigma'."""
    config = load("cifar_nano")["diffusion_args"]
    steps, schedule = config["sampling"]["num_sampling_steps"], config["noise_schedule"]

    def amplified(steps):
        process = create_diffusion(steps, noise_schedule=schedule)
        (alpha, sigma), (alpha_next, sigma_next) = (process.alpha_sigma(t) for t in process.grid[:2])
        return sigma * alpha_next / alpha - sigma_next

    assert amplified(steps) < 1
    assert amplified("50") > 100  # which visits t = 999


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_at_full_size_and_opens_with_its_command(name):
    config = load(name)
    with torch.device("meta"):
        (DiT_models | Autoencoder_models)[config["model"]](**config.get("model_args", {}))
    comment = (ROOT / "configs" / f"{name}.yaml").read_text().split("data_path:")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert f"train.py --config configs/{name}.yaml" in comment
