"""Every config trains two steps, small, and what it draws can be drawn; those of full size are built without memory."""

import math
import re

import pytest
import torch
import yaml
from conftest import ROOT, family, read_metrics

import extract_features
import train
from diffusion import create_diffusion
from pipeline import checkpoint
from small_models import NETWORKS, Autoencoder_models

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
SMALL = {
    "DiT": dict(depth=1, hidden_size=24, num_heads=2), "PixArt": dict(depth=1, hidden_size=24, num_heads=2),
    "DiNext": dict(depth=1, hidden_size=16), "DiNextV3": dict(depth=1, hidden_size=16, num_heads=1),
    "DiNext-U": dict(depths=(1, 1, 1, 1, 1), hidden_size=16), "MLP": dict(hidden_size=32),
    "ConvAdaLN": dict(depth=1, hidden_size=16), "Autoencoder": dict(hidden_size=8)}


def load(name):
    return yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())


@pytest.fixture(scope="module")
def features(photographs, tiny_vae, tmp_path_factory):
    """Cached latents of six photographs, 32x32x4 as of ImageNet at 256 pixels."""
    folder = tmp_path_factory.mktemp("features") / "train"
    flags = ["--data-path", photographs / "train", "--vae", tiny_vae, "--image-size", 256, "--num-workers", 0,
             "--device", "cpu", "--features-path", folder]
    with torch.no_grad():  # main switches it off for good; this puts it back
        extract_features.main(extract_features.build_parser().parse_args(list(map(str, flags))))
    return folder


@pytest.fixture
def small(photographs, tiny_vae, features):
    """The config on small data, with a small network: digits for digits, cached features for such ones, else photographs."""
    def small(name):
        config = load(name)
        kind = family(config["model"])
        config |= dict(max_steps=2, global_batch_size=4, num_workers=0, log_every=1, ckpt_every=2, device="cpu",
                       precision="fp32", compile=False,  # a CPU may have to emulate bf16
                       model_args=config.get("model_args", {}) | SMALL[kind])
        if config["data_path"].startswith("features/"):
            config |= dict(data_path=str(features), vae=str(tiny_vae))
        elif config["data_path"] in ("digits", "mnist"):
            config |= dict(data_path="digits", image_size=config.get("image_size", 8))
        else:
            config |= dict(data_path=str(photographs / "train"), image_size=32)
        if config.get("diffusion_args"):
            sampling = config["diffusion_args"].get("sampling", {}) | dict(num_sampling_steps="2")
            config["diffusion_args"] |= dict(sampling=sampling)
        return config
    return small


@pytest.fixture
def trains(tmp_path, monkeypatch, run_here):
    """Train with a config; returns what the run's checkpoint says of itself."""
    def trains(name, config):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        result = run_here(train, "--config", "config.yaml", "--run-name", name)
        assert result.returncode == 0, result.stderr
        folder = tmp_path / "results" / name
        losses = [line["loss"] for line in read_metrics(folder) if "loss" in line]
        assert len(losses) == 2
        assert all(math.isfinite(loss) and loss > 0 for loss in losses)
        assert (folder / "previews" / "0000002.png").exists()
        return checkpoint.restore(folder).spec
    return trains


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains_two_steps(name, small, trains, tmp_path):
    config = small(name)
    if config["vae"].startswith("./results/"):
        trains("cifar-autoencoder", small("cifar_autoencoder"))
    if flow := config.get("init_from"):  # as the config's first command
        flags = dict(init_from=None, diffusion_args=dict(objective="flow", time_sampling="logit-normal"))
        trains(flow.removeprefix("./results/"), config | flags)
    spec = trains(name, config)
    assert spec.model.name == load(name)["model"]
    assert spec.model.args | config["model_args"] == spec.model.args
    given = {key: value for key, value in config.get("diffusion_args", {}).items() if key not in ("label_drop", "sampling")}
    assert spec.diffusion == given
    if spec.sampling is not None:
        assert vars(spec.sampling).items() >= config.get("diffusion_args", {}).get("sampling", {}).items()


def test_the_first_sampling_step_of_nano_does_not_amplify():
    """What an error of the predicted epsilon is multiplied by: sigma (alpha' / alpha) - sigma'."""
    def amplified(steps):
        process = create_diffusion(steps, noise_schedule=nano["noise_schedule"])
        (alpha, sigma), (alpha_next, sigma_next) = (process.alpha_sigma(t) for t in process.grid[:2])
        return sigma * alpha_next / alpha - sigma_next

    nano = load("cifar_nano")["diffusion_args"]
    assert amplified(nano["sampling"]["num_sampling_steps"]) < 0.5
    assert amplified("250") > 60  # which visits t = 999


def test_a_dotted_flag_changes_one_entry_of_a_config_s_dictionary():
    flags = ["--config", str(ROOT / "configs" / "cifar_nano.yaml"), "--diffusion-args.noise_schedule", "gamma_linear"]
    args = train.build_parser().parse_args(flags)
    assert args.diffusion_args == load("cifar_nano")["diffusion_args"] | {"noise_schedule": "gamma_linear"}


def test_every_config_builds_at_full_size_and_opens_with_its_command():
    for name in CONFIGS:
        config = load(name)
        with torch.device("meta"):
            (NETWORKS | Autoencoder_models)[config["model"]](**config.get("model_args", {}))
        comment = (ROOT / "configs" / f"{name}.yaml").read_text().split("data_path:")[0]
        assert all(line.startswith("#") for line in comment.splitlines()), name
        assert f"train.py --config configs/{name}.yaml" in comment
        assert re.search(r"2 CPU cores, 20\d\d-\d\d-\d\d: |Not run here", comment), name
        shown = re.findall(r"results/\w+\.png", comment)
        assert bool(shown) == ("Not run here" not in comment), name
        assert all((ROOT / "configs" / picture).is_file() for picture in shown), name
