import argparse
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_one_line, golden_network, train_here

import extract_features
import train
from models import DiT
from pipeline import checkpoint
from pipeline.spec import ModelSpec
from runtime import UserError
from runtime.processes import start_world
from training.initial import check_fit, init_from, read_initial
from training.state import OptimizerArgs, Training

# --- weights -------------------------------------------------------------------------------------


def begun(network):
    return Training.begin(network, 1e-3, OptimizerArgs())


def table_of(network):
    return network.y_embedder.embedding_table.weight


@pytest.fixture
def named(tmp_path):
    """A checkpoint of the golden network: its file, the names of its classes, its network's arguments, its weights."""
    kwargs, weights = golden_network()
    classes = [f"animal {i}" for i in range(kwargs["num_classes"])]
    classes[2:4] = ["Mo\u0308we", "crane"]
    checkpoint.save(tmp_path / "w.pt", {"ema": weights, "spec": {
        "model": {"name": "DiT-S/2", "class": "DiT", "args": kwargs}, "diffusion": {}, "vae": "pixels", "image_size": (8, 8),
        "channels": 4, "classes": classes, "sampling": {}}})
    return tmp_path / "w.pt", classes, kwargs, weights


def test_init_from_matches_classes_by_name_and_keeps_the_null_row(named):
    source, classes, kwargs, weights = named
    source_table = weights["y_embedder.embedding_table.weight"]
    for more in ([], map(str, range(len(classes) - 3))):  # the second time as many classes as in the source
        other = ["crane", "dog", "M\xf6we", *more]
        training = begun(DiT(**{**kwargs, "num_classes": len(other)}))
        initial = table_of(training.model).clone()
        message = init_from(training, read_initial(source), other)
        assert "42 of 42 tensors" in message
        assert f"of 2 of {len(other)} classes" in message
        assert "fresh classes: dog" in message
        for network in (training.model, training.ema):
            found = table_of(network)
            assert torch.equal(found[[0, 2, -1]], source_table[[3, 2, -1]])
            assert torch.equal(found[1:-1][[0, *range(2, len(other) - 1)]], initial[1:-1][[0, *range(2, len(other) - 1)]])
            assert torch.equal(network.blocks[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])
    same = begun(DiT(**kwargs))
    init_from(same, read_initial(source), classes)
    assert torch.equal(table_of(same.model), source_table)


def test_init_from_takes_what_the_sampling_scripts_take(named, tmp_path):
    """A folder of export.py, and SiT's weights, with their time reversed."""
    source, _, kwargs, weights = named
    restored = checkpoint.restore(source)
    checkpoint.save_folder(tmp_path / "out", restored.spec, restored.model.state_dict())
    training = begun(DiT(**kwargs))
    init_from(training, read_initial(str(tmp_path / "out")), restored.spec.classes)
    assert all(torch.equal(value, weights[key]) for key, value in training.model.state_dict().items())
    flags = argparse.Namespace(model="SiT-S/2", num_classes=kwargs["num_classes"])
    torch.save({"ema": weights, "args": flags}, tmp_path / "sit.pt")
    training = begun(DiT(**kwargs | {"learn_sigma": False}))
    assert "(weights of sit's flow)" in init_from(training, read_initial(str(tmp_path / "sit.pt")), restored.spec.classes)
    key = "final_layer.linear.bias"
    expected = -weights[key].unflatten(0, (-1, 2 * kwargs["in_channels"]))[:, : kwargs["in_channels"]].flatten()
    assert torch.equal(training.model.state_dict()[key], expected)


def test_a_checkpoint_of_which_little_fits_is_refused_before_the_network_is_built(named):
    source, _, kwargs, _ = named
    initial = read_initial(source)
    with torch.device("meta"):
        larger = DiT(**{**kwargs, "hidden_size": 2 * kwargs["hidden_size"]})
        same = DiT(**kwargs)
    check_fit(same.state_dict(), initial, ["a", "b", "c"])
    with pytest.raises(UserError, match=r"`init_from` .*of its weights; pos_embed is .* where the model has .*`model_args`"):
        check_fit(larger.state_dict(), initial, ["a"])
    with pytest.raises(UserError, match="only 0 of 2 tensors"):
        check_fit(torch.nn.Linear(2, 2).state_dict(), initial, [])


# --- settings ------------------------------------------------------------------------------------

QUIET = ["--num-workers", "0", "--log-every", "1", "--preview-every", "0", "--device", "cpu", "--global-batch-size", "4"]
SOURCE = ["--data-path", "digits", "--vae", "pixels", "--image-size", "4", "--max-steps", "1",
          "--model", "DiNext-S/2", "--model-args", '{"hidden_size": 16, "depth": 1}',
          "--diffusion-args", '{"objective": "flow", "time_sampling": "logit-normal", "label_drop": 0.3, '
                              '"sampling": {"cfg_scale": 2.5, "num_sampling_steps": "2"}}']


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run whose settings are all different from the defaults."""
    folder = tmp_path_factory.mktemp("source")
    train_here(folder, *QUIET, *SOURCE, "--run-name", "a")
    return folder / "results" / "a"


def trainer(*flags):
    args = train.build_parser().parse_args([*QUIET, "--data-path", "digits", *map(str, flags)])
    return train.Trainer(args, start_world("cpu"))


def test_without_model_every_setting_is_the_checkpoint_s(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = trainer("--init-from", source)
    assert begun.spec == checkpoint.restore(source).spec
    assert begun.objective.label_drop == 0.3
    begun.begin()
    said = (begun.folder / "log.txt").read_text()
    assert f"settings of {source}; 0 of" in said  # nothing was changed
    weights = checkpoint.restore(source).model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in begun.state.model.state_dict().items())


def test_flags_override_entry_by_entry_and_the_log_names_each_change(source, tmp_path):
    train_here(tmp_path, *QUIET, "--data-path", "digits", "--init-from", source, "--image-size", 8, "--max-steps", 1,
               "--model-args.grn", "false", "--diffusion-args", '{"label_drop": 0.5, "sampling": {"num_sampling_steps": "3"}}',
               "--run-name", "b")
    spec = checkpoint.restore(tmp_path / "results" / "b").spec
    old = checkpoint.restore(source).spec
    assert spec.model.args == old.model.args | {"grn": False, "input_size": (8, 8)}
    assert spec.diffusion == old.diffusion
    assert (spec.sampling.cfg_scale, spec.sampling.num_sampling_steps) == (2.5, "3")
    said = (tmp_path / "results" / "b" / "log.txt").read_text()
    for change in ("grn was True, is now False", "image_size was (4, 4), is now (8, 8)", "num_sampling_steps was 2, is now 3"):
        assert change in said
    assert "label_drop was 0.3, is now 0.5" in said
    assert said.count("is now") == 4
    flags = checkpoint.load(checkpoint.latest(tmp_path / "results" / "b"))["args"]
    assert flags["model"] == "DiNext-S/2"  # config.yaml and checkpoint hold what was taken
    assert flags["diffusion_args"]["label_drop"] == 0.5
    other = trainer("--init-from", source, "--diffusion-args.objective", "v").spec
    assert other.diffusion == {"objective": "v"}  # another objective begins from its own defaults
    assert other.sampling.sampler == "ddpm"
    undropped = trainer("--init-from", source, "--diffusion-args.label_drop", 0)
    assert undropped.spec.sampling.cfg_scale == 1.0  # there is nothing to guide by
    assert "label_drop was 0.3, is now 0.0" in undropped.changes


def test_what_a_folder_does_not_tell_is_said_too(source, tmp_path):
    restored = checkpoint.restore(source)
    checkpoint.save_folder(tmp_path / "x", restored.spec, restored.model.state_dict())
    begun = trainer("--init-from", tmp_path / "x")
    assert begun.objective.label_drop == 0.1
    assert begun.changes[1:] == ["label_drop was unknown, is now 0.1"]


def test_the_same_command_continues_when_the_checkpoint_is_gone(source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "copy")
    same = [*QUIET, "--data-path", "digits", "--init-from", copy]
    train_here(tmp_path, *same, "--run-name", "unbroken", "--max-steps", 2)
    train_here(tmp_path, *same, "--run-name", "r", "--max-steps", 1)
    shutil.rmtree(copy)
    (tmp_path / "results" / "r" / "checkpoints" / "0000009.pt").write_bytes(b"damaged")
    train_here(tmp_path, *same, "--run-name", "r", "--max-steps", 2)
    a, b = (checkpoint.load(checkpoint.latest(tmp_path / "results" / name)) for name in ("r", "unbroken"))
    assert (a["step"], a["spec"]) == (2, b["spec"])
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in b["model"])


def test_nothing_large_is_built_before_the_fit_is_checked(source, run_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    devices, build = [], ModelSpec.build
    monkeypatch.setattr(ModelSpec, "build", lambda spec: devices.append(torch.get_default_device().type) or build(spec))
    flags = [*QUIET, "--data-path", "digits", "--vae", "pixels", "--image-size", 4, "--init-from", source]
    assert_one_line(run_here(train, *flags, "--model", "DiT-XL/2"), "--init-from", "Leave out --model,",
                    "(--model null over a config)", "DiNext-S/2")
    assert set(devices) == {"meta"}
    assert_one_line(run_here(train, *flags, "--resume", source), "--resume", "--init-from")


TINY_DIT = ["--model", "DiT-S/2", "--model-args", '{"hidden_size": 8, "depth": 1, "num_heads": 2}', "--max-steps", "1",
            "--diffusion-args", '{"sampling": {"num_sampling_steps": "2"}}']


@pytest.fixture
def latent_run(photographs, tiny_vae, tmp_path, monkeypatch):
    """A run on photographs through an autoencoder whose latents it normalises, in the current folder."""
    monkeypatch.chdir(tmp_path)
    train_here(tmp_path, *QUIET, "--data-path", photographs / "train", "--vae", tiny_vae, "--image-size", 32, *TINY_DIT,
               "--run-name", "a")
    state = checkpoint.load(path := checkpoint.latest(tmp_path / "results" / "a"))
    state["spec"] |= {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [2.0, 2.0, 3.0, 3.0]}
    checkpoint.save(path, state)
    return ["--data-path", photographs / "train"]


def test_the_autoencoder_and_its_statistics_are_the_checkpoint_s_too(latent_run, tiny_vae, tmp_path):
    expected = checkpoint.restore("results/a").spec
    begun = trainer(*latent_run, "--init-from", "results/a")
    assert begun.spec == expected
    assert begun.flags["vae"] == begun.spec.vae  # as the run's config.yaml says
    spelled = Path(os.path.relpath(tiny_vae))
    assert trainer(*latent_run, "--init-from", "results/a", "--vae", spelled).spec == expected
    train_here(tmp_path, *QUIET, *latent_run, "--init-from", "results/a", "--run-name", "b", "--max-steps", 1)
    same = ["--config", "results/b/config.yaml", "--max-steps", 2]
    assert trainer(*latent_run, *same, "--run-name", "c", "--init-from", "results/b").spec == expected
    train_here(tmp_path, *same)
    assert checkpoint.latest(Path("results/b")).name == "0000002.pt"


def test_features_keep_their_own_autoencoder_and_scale(latent_run, tiny_vae, tmp_path, run_here):
    """Latents of fast-DiT are scaled already; bare weights do not know an autoencoder."""
    folder = tmp_path / "features"
    for name, values in (("features", np.zeros((1, 4, 4, 4), np.float32)), ("labels", np.zeros(1, np.int64))):
        (folder / f"imagenet256_{name}").mkdir(parents=True)
        np.save(folder / f"imagenet256_{name}" / "0.npy", values)
    begun = trainer("--data-path", folder, "--num-classes", 2, "--init-from", "results/a", "--vae", tiny_vae)
    assert begun.spec.latents_mean is None
    assert "latents_mean was [1.0, 2.0, 3.0, 4.0], is now None" in begun.changes

    run_here(extract_features, *latent_run, "--vae", tiny_vae, "--image-size", 32, "--features-path", "f", "--num-workers", 0)
    weights = DiT(input_size=16, hidden_size=8, depth=1, num_heads=2, num_classes=2).state_dict()
    torch.save(weights, "bare.pt")
    begun = trainer("--data-path", "f", "--init-from", "bare.pt", "--model", "DiT-S/2", "--model-args", TINY_DIT[3])
    assert begun.spec.vae == str(tiny_vae)


def test_an_autoencoder_begins_from_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_here(tmp_path, *QUIET, "--data-path", "digits", "--image-size", 16, "--model", "Autoencoder-F4C8", "--run-name", "a",
               "--max-steps", 1)
    assert trainer("--init-from", "results/a").spec == checkpoint.restore("results/a").spec
