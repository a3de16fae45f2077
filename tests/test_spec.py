"""The Spec, and the one list of the settings of sampling."""

import json
from dataclasses import dataclass, fields, replace
from functools import partial

import pytest
import torch

from diffusion import create_diffusion
from models import DiT, DiT_models
from pipeline.spec import BareWeights, ModelSpec, SamplingSettings, Spec, setting
from runtime import UserError
from runtime.cli import ArgumentParser
from small_models import NETWORKS

SPEC = Spec(ModelSpec.of_preset("DiT-S/2", {"input_size": (8, 8)}), {"objective": "flow"}, "pixels", (8, 8), 1, ["a", "b"],
            SamplingSettings(sampler="heun", num_sampling_steps=4))


# --- settings of sampling --------------------------------------------------------------------------


@dataclass(frozen=True)
class Extended(SamplingSettings):
    """A copy of the list with a setting of one's own."""

    churn: float = setting(0.0, "noise that is added back", True, part=lambda churn: f"churn-{churn}" if churn else "",
                           type=float | None)


def test_a_new_setting_is_one_field():
    """Flag, recommendation (of --diffusion-args and of a checkpoint), record, file name: all follow."""
    parser = ArgumentParser("A test.")
    Extended.add_flags(parser)
    flags = vars(parser.parse_args(["--churn", "0.5", "--cfg-scale", "2"]))
    assert Extended.given(flags)["churn"] == 0.5
    assert "churn" not in Extended.given(vars(parser.parse_args([])))  # then the checkpoint's
    recommended = Extended.recommend(create_diffusion(""), 0.1, {"churn": 0.25})
    assert recommended.to_dict()["churn"] == 0.25
    assert Extended.from_dict(recommended.to_dict()) == recommended
    assert replace(recommended, churn=0.5).record()["churn"] == 0.5
    assert "churn-0.5" in replace(recommended, churn=0.5).file_name_parts()
    assert "churn" not in "".join(Extended().file_name_parts())


def test_every_setting_is_recorded_and_named_or_says_why_not():
    settings = SamplingSettings(cfg_scale=2.0, cfg_channels=3, guidance_interval=(100, 600.5), dynamic_thresholding=True,
                                sampler="ddim", num_sampling_steps="ddim50", eta=0.5, reuse="encoder", precision="bf16")
    assert "-".join(settings.file_name_parts(reuse="encoder-9-keys")) == (
        "cfg-2.0-3-interval-100-600.5-thresholded-ddim-ddim50-eta-0.5-encoder-9-keys-bf16")
    assert "-".join(SamplingSettings(cfg_channels=4).file_name_parts()) == "cfg-1.0-4-ddpm-250-fp32"
    elsewhere = {"key_steps", "reuse_args", "num_sampling_steps"}  # the first two are told by the record of reuse
    assert set(settings.record()) == {one.name for one in fields(settings)} - elsewhere | {"steps"}
    assert set(settings.to_dict()) == {"sampler", "num_sampling_steps", "cfg_scale", "cfg_channels", "guidance_interval",
                                       "dynamic_thresholding"}


@pytest.mark.parametrize(("wrong", "words"), [
    (dict(cfg_scale=-1), "`cfg_scale` -1"), (dict(cfg_scale="x"), "`cfg_scale` x"),
    (dict(guidance_interval=(5, 1)), "`guidance_interval` 5 1"), (dict(dynamic_thresholding="yes"), "`dynamic_thresholding`"),
    (dict(key_steps="paper"), "`key_steps`"), (dict(reuse_args={"order": 1}), "`reuse_args`")])
def test_what_no_network_allows_is_refused_at_once(wrong, words):
    with pytest.raises(UserError, match=words):
        SamplingSettings(**wrong)


def test_a_recommendation_of_another_key_is_refused():
    with pytest.raises(UserError, match="unknown key 'smapler'; allowed: cfg_scale, cfg_channels"):
        SamplingSettings.recommend(create_diffusion(""), 0.1, {"smapler": "ddim"})
    assert SamplingSettings.recommend(create_diffusion("10"), 0.1, {}).num_sampling_steps == 10
    assert SamplingSettings.recommend(create_diffusion(""), 0.0, {}).cfg_scale == 1.0  # nothing to guide by


# --- the plain dict --------------------------------------------------------------------------------


def test_a_spec_survives_its_plain_dict():
    assert Spec.from_dict(SPEC.to_dict()) == SPEC
    assert Spec.from_dict(json.loads(json.dumps(SPEC.to_dict()))).sampling == SPEC.sampling
    autoencoder = replace(SPEC, sampling=None, vae_sha256="ab")
    assert Spec.from_dict(autoencoder.to_dict()) == autoencoder
    assert (autoencoder.is_autoencoder, SPEC.is_autoencoder) == (True, False)
    assert "vae_sha256" not in SPEC.to_dict()


@pytest.mark.parametrize(("stored", "words"), [
    ({}, "its description lacks channels, classes, diffusion, image_size, model, sampling, vae"),
    (SPEC.to_dict() | {"colour": 3}, "has colour, which this version does not know"), (None, "lacks")])
def test_other_dicts_are_refused(stored, words):
    with pytest.raises(UserError, match=words):
        Spec.from_dict(stored)


def test_a_checkpoint_holds_every_argument_and_is_deaf_to_a_changed_preset(monkeypatch):
    stored = SPEC.to_dict()["model"]
    assert (stored["class"], stored["args"]["depth"], stored["args"]["mlp_ratio"]) == ("DiT", 12, 4.0)
    monkeypatch.setitem(DiT_models, "DiT-S/2", partial(DiT, depth=1, hidden_size=24, num_heads=2))
    assert ModelSpec.of_preset("DiT-S/2", {}).args["depth"] == 1
    assert ModelSpec.from_dict(stored) == SPEC.model
    monkeypatch.delitem(DiT_models, "DiT-S/2")  # even the name may go
    with torch.device("meta"):
        assert len(ModelSpec.from_dict(stored).build().blocks) == 12


def test_an_argument_that_came_later_takes_its_default(monkeypatch):
    class Later(DiT):
        def __init__(self, *args, novelty=False, **kwargs):
            super().__init__(*args, **kwargs)

    Later.__name__ = "DiT"
    monkeypatch.setitem(DiT_models, "DiT-S/2", Later)
    assert ModelSpec.from_dict(SPEC.to_dict()["model"]).args["novelty"] is False


@pytest.mark.parametrize("entry", [DiT, partial(DiT, depth=2), lambda **kwargs: DiT(depth=2, **kwargs)])
def test_an_entry_of_a_registry_may_be_any_callable(monkeypatch, entry):
    monkeypatch.setitem(DiT_models, "mine", entry)
    assert "mine" in NETWORKS
    spec = ModelSpec.of_preset("mine", dict(hidden_size=24, num_heads=2))
    again = ModelSpec.from_dict(spec.to_dict())
    assert again == spec
    with torch.device("meta"):
        assert again.build().blocks[0].norm1.normalized_shape == (24,)


def test_a_class_that_is_not_registered_is_named():
    with pytest.raises(UserError, match="its network is of class Mine"):
        ModelSpec.from_dict({"name": "mine", "class": "Mine", "args": {}})


# --- bare weights ----------------------------------------------------------------------------------


def test_1000_classes_get_imagenets_names():
    spec = BareWeights(vae="ema", cfg_scale=1.5).spec({})
    assert spec.classes[207] == "golden retriever"
    assert (spec.model.name, spec.model.class_name) == ("DiT-XL/2", "DiT")
    assert (spec.model.args["input_size"], spec.model.args["num_classes"], spec.model.args["depth"]) == (32, 1000, 28)
