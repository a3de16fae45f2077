from dataclasses import fields, replace

import pytest

from diffusion import create_diffusion
from pipeline.settings import RECOMMENDED, SamplingSettings, add_sampling_arguments
from runtime import UserError
from runtime.cli import ArgumentParser


def test_every_setting_has_a_flag_a_record_and_a_place_in_file_names():
    parser = ArgumentParser("A test.")
    add_sampling_arguments(parser)
    flags = vars(parser.parse_args(["--cfg-scale", "2"]))
    names = {setting.name for setting in fields(SamplingSettings)}
    assert names <= set(flags)
    assert not SamplingSettings.given(flags).keys() & set(RECOMMENDED) - {"cfg_scale"}  # the others are the checkpoint's
    settings = SamplingSettings(cfg_scale=2.0, cfg_channels=3, guidance_interval=(100, 600.5), internal_scale=1.4,
                                internal_interval=(0, 700), dynamic_thresholding=True, sampler="ddim",
                                num_sampling_steps="ddim50", eta=0.5, reuse="encoder", precision="bf16")
    assert settings.file_name_parts("encoder-9-keys") == [
        "cfg-2.0", "3", "interval-100-600.5", "internal-1.4-0-700", "thresholded", "ddim", "ddim50", "eta-0.5",
        "encoder-9-keys", "bf16"]
    assert "-".join(SamplingSettings(cfg_channels=4).file_name_parts(None)) == "cfg-1.0-4-ddpm-250-fp32"
    expected = {name: getattr(settings, name) for name in names - {"key_steps", "reuse_args", "num_sampling_steps"}}
    assert settings.record("a plan") == expected | {"steps": "ddim50", "reuse": "a plan"}
    assert settings.record("a plan").keys() - replace(settings, internal_scale=1.0).record("a plan").keys() == {
        "internal_scale", "internal_interval"}  # records of before had none
    assert SamplingSettings.from_dict(settings.to_dict()) == replace(settings, eta=0.0, reuse="none", precision="fp32")


def test_values_that_no_network_allows_are_refused():
    for wrong, words in (
            (dict(cfg_scale=-1), "`cfg_scale` -1"), (dict(guidance_interval=(5, 1)), "`guidance_interval` 5 1"),
            (dict(dynamic_thresholding="yes"), "`dynamic_thresholding`"), (dict(key_steps="paper"), "`key_steps`"),
            (dict(reuse="encoder", reuse_args={"spilt": 1}), "unknown key 'spilt'.*did you mean split")):
        with pytest.raises(UserError, match=words):
            SamplingSettings(**wrong)


def test_a_recommendation():
    with pytest.raises(UserError, match="unknown key 'smapler'; allowed: cfg_scale, cfg_channels"):
        SamplingSettings.recommend(create_diffusion(""), 0.1, {"smapler": "ddim"})
    assert SamplingSettings.recommend(create_diffusion("10"), 0.1, {}).num_sampling_steps == 10
    assert SamplingSettings.recommend(create_diffusion(""), 0.1, {}).cfg_scale == 4.0
    assert SamplingSettings.recommend(create_diffusion(""), 0.0, {}).cfg_scale == 1.0  # no unconditional half
