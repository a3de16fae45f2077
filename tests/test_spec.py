import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from foreign import ForeignNet

from models import DiT, DiT_models
from pipeline.settings import SamplingSettings
from pipeline.spec import BareWeights, ModelSpec, Spec
from runtime import UserError

SPEC = Spec(ModelSpec.of_preset("DiT-S/2", {"input_size": (8, 8)}), {"objective": "flow"}, "pixels", (8, 8), 1, ["a", "b"],
            SamplingSettings(sampler="heun", num_sampling_steps=4))


def test_a_spec_survives_its_plain_dict():
    assert Spec.from_dict(SPEC.to_dict()) == SPEC
    assert Spec.from_dict(json.loads(json.dumps(SPEC.to_dict()))).sampling == SPEC.sampling
    autoencoder = replace(SPEC, sampling=None, vae_sha256="ab")
    assert Spec.from_dict(autoencoder.to_dict()) == autoencoder
    assert (autoencoder.is_autoencoder, SPEC.is_autoencoder) == (True, False)
    assert "vae_sha256" not in SPEC.to_dict()


def test_other_dicts_are_refused():
    plain = SPEC.to_dict()
    for stored, words in (
            ({}, "its description lacks channels, classes, diffusion, image_size, model, sampling, vae"), (None, "lacks"),
            (plain | {"colour": 3}, "has colour, which this version does not know"),
            (plain | {"classes": 3}, "its classes are 3"), (plain | {"latents_mean": [0.0]}, "only one of latents_mean"),
            (plain | {"model": {"name": "mine", "class": "Mine", "args": {}}}, "its network is of class Mine")):
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


def test_an_argument_that_came_later_takes_its_default():
    stored = SPEC.to_dict()["model"]
    older = {name: value for name, value in stored["args"].items() if name != "mlp_ratio"}
    assert ModelSpec.from_dict(stored | {"args": older}) == SPEC.model


def test_an_entry_of_a_registry_may_be_any_callable(monkeypatch):
    for entry in (DiT, partial(DiT, depth=2), lambda **kwargs: DiT(depth=2, **kwargs)):
        monkeypatch.setitem(DiT_models, "mine", entry)
        spec = ModelSpec.of_preset("mine", dict(hidden_size=24, num_heads=2))
        again = ModelSpec.from_dict(spec.to_dict())
        assert again == spec
        with torch.device("meta"):
            assert again.build().blocks[0].norm1.normalized_shape == (24,)


def test_only_wrong_values_of_a_stranger_s_constructor_are_a_user_s_errors(monkeypatch):
    monkeypatch.setitem(DiT_models, "Foreign", ForeignNet)
    own, foreign = (ModelSpec.of_preset(name, {}).wrong_values for name in ("DiT-S/2", "Foreign"))
    assert {RuntimeError, TypeError} <= set(own)
    assert not {RuntimeError, TypeError} & set(foreign)
    assert ModelSpec.of_preset("Foreign", {}).outline().stem.weight.device.type == "meta"
    assert ModelSpec.of_preset("Foreign", {"drop_path": 0.1}).outline().stem.weight.device.type == "cpu"  # it calls .item()
    with pytest.raises(RuntimeError, match="inconsistent"):
        ModelSpec.of_preset("Foreign", {"width": -1}).outline()


def test_1000_classes_get_imagenets_names():
    spec = BareWeights(vae="ema", cfg_scale=1.5).spec({})
    assert spec.classes[207] == "golden retriever"
    assert (spec.model.name, spec.model.class_name) == ("DiT-XL/2", "DiT")
    assert (spec.model.args["input_size"], spec.model.args["num_classes"], spec.model.args["depth"]) == (32, 1000, 28)
