import math

import pytest
import torch

from training.state import OptimizerArgs, Training


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    args = OptimizerArgs(warmup_steps=4, schedule="cosine")
    assert [args.factor(step, 10_000) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1], abs=1e-5)
    assert args.factor(5_000, 10_000) == pytest.approx(0.5)
    assert args.factor(10_000, 10_000) == pytest.approx(0)
    assert OptimizerArgs().factor(123, 1000) == 1


def test_the_ema_warms_up_to_its_decay():
    training = Training.begin(torch.nn.Linear(1, 1, bias=False), 1.0, OptimizerArgs())
    for training.step, decay in ((0, 0.1), (90, 0.91), (10**6, 0.95)):
        torch.nn.init.constant_(training.model.weight, 3.0)
        torch.nn.init.constant_(training.ema.weight, 1.0)
        training.update_ema(0.95)
        assert training.ema.weight.item() == pytest.approx(decay * 1 + (1 - decay) * 3, rel=1e-6)


@pytest.mark.parametrize(("clip_norm", "norm"), [(math.inf, 5.0), (10.0, 5.0), (1.0, 1.0)])
def test_gradients_are_clipped_only_if_asked(clip_norm, norm):
    """With infinity, the default, no gradient is touched: one pass over 675 million numbers less."""
    network = torch.nn.Linear(2, 1)  # its bias has no gradient
    training = Training.begin(network, 1.0, OptimizerArgs())
    network.weight.grad = torch.tensor([[3.0, 4.0]])
    version = network.weight.grad._version
    assert training.clip_gradients(clip_norm) == 5
    assert network.weight.grad.norm().item() == pytest.approx(norm)
    assert (network.weight.grad._version == version) == (clip_norm == math.inf)


def test_the_ema_has_the_buffers_of_the_model():
    """A BatchNorm that samples with its initial statistics would draw noise."""
    training = Training.begin(torch.nn.BatchNorm1d(2), 1.0, OptimizerArgs())
    training.model.train()(torch.tensor([[1.0, 5.0], [3.0, 9.0]]))
    training.update_ema(0.9)
    assert training.model.running_mean.tolist() == pytest.approx([0.2, 0.7])
    for averaged, buffer in zip(training.ema.buffers(), training.model.buffers()):
        assert torch.equal(averaged, buffer)
    training.model(torch.tensor([[1.0, 5.0], [3.0, 9.0]]))
    assert not torch.equal(training.ema.running_mean, training.model.running_mean)  # a copy, not the same tensor


def test_a_validation_is_the_best_only_below_all_before():
    training = Training.begin(torch.nn.Linear(1, 1), 1.0, OptimizerArgs())
    assert [training.validated_at(loss) for loss in (3.0, 5.0, 4.0, 2.0, 2.0)] == [True, False, False, True, False]
    assert (training.best, training.validations_since_best) == (2, 1)
