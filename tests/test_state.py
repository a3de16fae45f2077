import math

import pytest
import torch
from conftest import GOLDEN, TINY_RUN, read_metrics, train_here

import train
from diffusion import create_diffusion
from runtime.pictures import to_unit_range
from runtime.processes import start_world
from training.initial import init_from, read_initial
from training.state import LossMeter, OptimizerArgs, Training


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


def test_gradients_are_clipped_only_if_asked():
    """With infinity, the default, no gradient is touched: one pass over 675 million numbers less."""
    for clip_norm, norm in ((math.inf, 5.0), (10.0, 5.0), (1.0, 1.0)):
        network = torch.nn.Linear(2, 1)  # its bias has no gradient
        training = Training.begin(network, 1.0, OptimizerArgs())
        network.weight.grad = torch.tensor([[3.0, 4.0]])
        version = network.weight.grad._version
        assert training.clip_gradients(clip_norm) == 5
        assert network.weight.grad.norm().item() == pytest.approx(norm)
        assert (network.weight.grad._version == version) == (clip_norm == math.inf)


# --- losses that are logged ----------------------------------------------------------------------


def count(meter, loss, **terms):
    return meter.update({name: torch.tensor(value) for name, value in (terms | {"loss": loss}).items()}, torch.tensor(1.0))


def test_every_loss_is_a_mean_over_the_steps_that_were_not_skipped():
    meter = LossMeter()
    skips = [count(meter, loss, mse=loss + 1, vb=vb) for loss, vb in ((1.0, 5.0), (math.nan, 7.0), (2.0, 6.0))]
    assert skips == [0, 1, 0]
    assert meter.read() == {"loss": 1.5, "mse": 2.5, "vb": 5.5, "loss_moving_mean": 1.5, "skipped_steps": 1}
    count(meter, 4.0, mse=8.0, vb=math.inf)  # a loss that is finite is not skipped
    assert (meter.read()["mse"], meter.streak) == (8, 0)


def test_a_meter_is_continued_between_two_lines_of_the_log():
    whole, first, rest = LossMeter(), LossMeter(), LossMeter()
    for meter in (whole, first):
        count(meter, 1.0, mse=3.0)
    rest.load_state_dict(first.state_dict())
    old = LossMeter()  # from a checkpoint that has no terms: their mean is over later steps
    old.load_state_dict({name: value for name, value in first.state_dict().items() if name != "term_mse"})
    for meter in (whole, rest, old):
        count(meter, 2.0, mse=5.0)
    expected = {"loss": 1.5, "mse": 4, "loss_moving_mean": 1.5, "skipped_steps": 0}
    assert whole.read() == rest.read() == expected
    assert old.read() == expected | {"mse": 5}


def test_logged_losses_are_means_over_steps_and_micro_batches(tmp_path):
    """Two steps of two micro-batches, against the global batches in one piece, with constant weights."""
    weights = GOLDEN / "b884e54" / "gaussian.pt"
    flags = [*TINY_RUN, "--model", "DiT-S/2", "--model-args", '{"hidden_size": 8, "depth": 2, "num_heads": 2}', "--lr", "1e-30",
             "--diffusion-args", '{"sampling": {"num_sampling_steps": "2"}}', "--max-steps", 2, "--log-every", 2,
             "--init-from", weights]
    train_here(tmp_path, *flags, "--grad-accum", 2, "--run-name", "r")
    (logged,) = [line for line in read_metrics(tmp_path / "results" / "r") if "loss" in line]

    trainer = train.Trainer(train.build_parser().parse_args(list(map(str, flags))), start_world("cpu"))
    init_from(trainer.state, read_initial(str(weights)), trainer.spec.classes)
    model, means = trainer.state.model, []
    for step in range(2):
        images, labels = trainer.data.__getitems__(trainer.order.batch(step))
        draws = trainer.objective.draw(("train", 0, step), 12, model, torch.device("cpu"))
        y = torch.where(draws.drop_uniform < 0.1, 10, labels)
        losses = create_diffusion().training_losses(model, to_unit_range(images), draws.t, dict(y=y), draws.noise)
        means.append({name: value.mean().item() for name, value in losses.items()})
    assert set(means[0]) == {"loss", "mse", "vb"}
    assert abs(means[0]["vb"] / means[1]["vb"] - 1) > 1e-3  # a mean of two different numbers
    for name in means[0]:
        assert logged[name] == pytest.approx((means[0][name] + means[1][name]) / 2, rel=1e-5), name


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


def test_a_skipped_step_leaves_the_ema_and_all_buffers_as_they_were():
    """The forward pass that gave the loss has already put what is not finite into BatchNorm's statistics."""
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
    training = Training.begin(network, 1.0, OptimizerArgs())

    def step(values):
        training.begin_step()
        loss = training.model(torch.tensor(values)).square().mean()
        loss.backward()
        training.opt.found_inf = training.meter.update({"loss": loss.detach()}, training.clip_gradients(math.inf))
        training.opt.step()
        training.opt.zero_grad()
        training.update_ema(0.9)
        return {name: value.clone() for part in (training.model, training.ema) for name, value in
                [*((f"{id(part)}{name}", value) for name, value in part.state_dict().items())]}

    good = step([[1.0, 5.0], [3.0, 8.0]])
    skipped = step([[math.inf, 5.0], [3.0, 9.0]])
    after = step([[1.0, 5.0], [3.0, 9.0]])
    assert all(torch.equal(value, skipped[name]) for name, value in good.items())
    assert not any(torch.equal(value, after[name]) for name, value in good.items())
    assert all(value.isfinite().all() for value in after.values())


def test_a_validation_is_the_best_only_below_all_before():
    training = Training.begin(torch.nn.Linear(1, 1), 1.0, OptimizerArgs())
    assert [training.validated_at(loss) for loss in (3.0, 5.0, 4.0, 2.0, 2.0)] == [True, False, False, True, False]
    assert (training.best, training.validations_since_best) == (2, 1)
