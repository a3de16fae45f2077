import pytest
import torch
from conftest import assert_one_line, save_random_checkpoint
from torch import nn

import sample
import train
from pipeline import checkpoint
from pipeline.autoencoders import load_autoencoder
from pipeline.spec import BareWeights
from pipeline.weights import check_values, find_weights, fitted, load_weights, stripped
from runtime import UserError

W, OTHER = {"a.weight": torch.ones(2)}, {"a.weight": torch.zeros(2)}
ADAM = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}


@pytest.mark.parametrize(("state", "said"), [
    (W, ()), ({"ema": W, "model": OTHER, "opt": ADAM, "step": 3}, ()), ({"ema": 0.999, "model": W}, ()),
    ({"model_ema1": OTHER, "model": W}, ("'model'", "model_ema1")), ({"ema": W, "ema_slow": OTHER}, ("'ema'", "ema_slow")),
    ({"state_dict": OTHER, "state_dict_ema": W}, ("'state_dict_ema'", "not state_dict beside")),
    ({"state_dict": W, "hyper": {"lr": 1}}, ("'state_dict'",)), ({"anything": W, "optimizer": {"a": W}}, ("'anything'",)),
    ({"ema": {"module": W}, "model": OTHER}, ("'ema.module'", "model")), ({"train": {"net": W}}, ("'train.net'",))])
def test_what_was_taken_and_what_lies_beside_it_is_said(state, said):
    weights, remark = find_weights(state, "x.pt")
    assert weights is W
    assert all(words in remark for words in said)
    assert bool(remark) == bool(said)


def test_several_containers_that_nobody_knows_are_named():
    torch_ema = {"decay": 0.99, "shadow_params": [torch.ones(2)]}
    for state, words in (({"g": W, "d": OTHER}, "several state dicts, .* has g, d"), ({"epoch": 3}, "no state dict.* epoch"),
                         ({"ema": torch_ema, "model": W}, "its 'ema' is no state dict"),
                         ({"ema": {**W, "updates": 5}, "model": OTHER}, "its 'ema' is no state dict")):
        with pytest.raises(UserError, match=words):
            find_weights(state, "x.pt")


def test_what_all_names_share_is_stripped():
    value = torch.ones(2)
    for given in ("module.{}", "module._orig_mod.{}", "model.net.{}", "_orig_mod.{}"):
        weights = {given.format(name): value for name in ("x.0.weight", "y.bias")}
        assert set(stripped(weights)) == {"x.0.weight", "y.bias"}
    averaged = {"module.x.weight": value, "module.y.bias": value, "n_averaged": torch.tensor(3)}  # PyTorch's AveragedModel
    assert set(stripped(averaged)) == {"x.weight", "y.bias"}
    assert set(stripped({"x._orig_mod.weight": value, "scale": value})) == {"x.weight", "scale"}
    own = {"net.0.weight": value, "net.1.weight": value}  # a network whose own names share something
    assert set(fitted(stripped(own), own)) == set(own)
    assert fitted(own, {"other": value}) is own


def test_published_weights_behind_a_wrapper_load_and_start_a_training(tmp_path, tiny_preset, gaussian_run, run_here):
    torch.save({"state_dict": {f"module.{name}": value for name, value in tiny_preset.items()}}, tmp_path / "x.pt")
    restored = checkpoint.restore(tmp_path / "x.pt", BareWeights("DiT-tiny", 64, 10))
    assert all(torch.equal(value, tiny_preset[name]) for name, value in restored.model.state_dict().items())
    assert "took the weights 'state_dict' of" in restored.remark


def test_names_that_do_not_fit_are_shown():
    network = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"none of its 2 tensors .* begin with ema_model, online, the model's with 0; `model`"):
        load_weights(network, {"ema_model.w": torch.ones(1), "online.w": torch.ones(1)}, "x.pt")


def test_values_that_are_no_weights_are_refused():
    network = nn.BatchNorm1d(2)
    state = network.state_dict()
    for bad, words in ((torch.ones(2, dtype=torch.int8), r"bias is torch\.int8, not floating-point"),
                       (torch.tensor([1, float("nan")]), "1 of 2 values of bias are not finite"),
                       (torch.tensor([1e5, 1]).half(), "1 of 2 values of bias are not finite")):
        with pytest.raises(UserError, match=words):
            load_weights(network, state | {"bias": bad}, "x.pt")
    for good in (torch.tensor([6e4, 6e4]).half(), torch.tensor([1.0, -torch.inf])):  # the sum overflows; a mask
        check_values({"bias": good, "unknown": torch.ones(1, dtype=torch.int8)}, state, "x.pt")


def test_weights_that_are_not_finite_are_refused_at_the_source(tmp_path, tiny_vae, monkeypatch, run_here):
    """By sampling, by --init-from, and those of an autoencoder."""
    monkeypatch.chdir(tmp_path)
    path = save_random_checkpoint(tmp_path / "good.pt", 1, [str(i) for i in range(10)])
    state = checkpoint.load(path)
    state["ema"]["pos_embed"] = state["ema"]["pos_embed"] * torch.nan
    checkpoint.save(tmp_path / "bad.pt", state)
    assert_one_line(run_here(sample, "--ckpt", "bad.pt", "--device", "cpu"), "bad.pt: ", "pos_embed are not finite", "earlier")
    assert not (tmp_path / "sample.png").exists()
    assert_one_line(run_here(train, "--data-path", "digits", "--vae", "pixels", "--init-from", "bad.pt", "--device", "cpu"),
                    "--init-from bad.pt: ", "pos_embed are not finite")
    vae = load_autoencoder(str(tiny_vae)).vae
    vae.decoder.conv_in.bias.data[0] = torch.nan
    vae.save_pretrained("vae")
    with pytest.raises(UserError, match=r"vae: .*its weights: 1 of 8 values of decoder\.conv_in\.bias are not finite"):
        load_autoencoder("vae")
