"""The protocols: all members that an object lacks are named in one line."""

from types import SimpleNamespace

import pytest
import torch

from diffusion import create_diffusion
from diffusion.process import Network, Process, Seam, TrainingProcess, check, members, offers
from diffusion.reuse import Reuse, plan
from runtime import UserError
from small_models import Small_models
from training.objective import Reconstruction


def test_members_are_those_written_down_and_ours_offer_them():
    assert members(TrainingProcess) == ["validation_terms", "sample_times", "training_losses"]
    assert members(Process) == [*members(TrainingProcess), "num_timesteps", "grid", "input_scale", "learn_sigma", "recommended",
                                "alpha_sigma", "predict"]
    assert members(Network) == ["in_channels", "input_size", "num_classes", "__call__"]
    assert members(Seam) == ["blocks", "default_split", "condition", "encode", "decode"]
    with torch.device("meta"):
        network = Small_models["MLP"]()
    for thing, protocol in ((create_diffusion(""), Process), (create_diffusion("", objective="flow"), Process),
                            (Reconstruction(), TrainingProcess), (network, Network), (network, Seam)):
        check(thing, protocol, "needed")


def test_everything_that_is_missing_is_named_at_once():
    class Half:
        validation_terms, grid, num_timesteps, recommended = ("loss",), (1.0, 0.0), 1, {}

        def training_losses(self, *args): ...

    message = r"Half lacks sample_times, input_scale, learn_sigma, alpha_sigma, predict, which a process needs \(see Process in"
    with pytest.raises(UserError, match=message):
        check(Half(), Process, "a process needs")
    assert not offers(Reconstruction(), Process)


def test_what_encode_returns_is_checked_at_the_first_call():
    for state in (None, (), (torch.zeros(3),), (torch.zeros(2), None)):
        wrong = SimpleNamespace(condition=lambda t, y: None, encode=lambda x, c, split, state=state: state)
        reuse = Reuse(wrong, plan("encoder", (9.0, 5.0), (False, False), 4, 2, "every:2"), 2)
        with pytest.raises(UserError, match=r"a tuple of tensors with the batch \(2\)"):
            reuse(torch.zeros(2, 1, 1, 1), torch.zeros(2), torch.zeros(2))
