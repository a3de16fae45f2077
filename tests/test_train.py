import json
import math
import shutil
import signal

import pytest
import saboteurs
import torch
import yaml
from conftest import TINY_RUN, assert_one_line, read_metrics, run_script, train_here
from foreign import ForeignNet
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import sample
import train
from models import DiT_models
from pipeline import checkpoint
from runtime import UserError
from runtime.processes import start_world
from training.order import GlobalOrder

FLOW = ["--diffusion-args", '{"objective": "flow", "sampling": {"num_sampling_steps": "2"}}']
PLAIN = [*TINY_RUN, *FLOW, "--run-name", "r"]


def parse(*flags):
    return train.build_parser().parse_args([*TINY_RUN, *FLOW, *map(str, flags)])


def run(cwd, name, *flags):
    """A run in this process; its folder."""
    train_here(cwd, *TINY_RUN, *FLOW, "--run-name", name, *flags)
    return cwd / "results" / name


def final(folder):
    return checkpoint.load(checkpoint.latest(folder))


def metrics(folder, name):
    """The values of one name in metrics.jsonl, in order."""
    return [line[name] for line in read_metrics(folder) if name in line]


def assert_same(a, b, tolerance=0.0):
    """Weights, EMA and optimizer moments are equal: bit for bit, or to a tolerance."""
    for part in ("model", "ema"):
        for key in a[part]:
            assert (a[part][key] - b[part][key]).abs().max() <= tolerance, (part, key)
    for key, moments in a["opt"]["state"].items():
        for name, value in moments.items():
            assert (value - b["opt"]["state"][key][name]).abs().max() <= tolerance, (key, name)


# --- a run and what it leaves --------------------------------------------------------------------


def test_a_run_leaves_log_metrics_config_previews_and_checkpoints_that_describe_themselves(tiny_run):
    assert "Finished" in (tiny_run / "log.txt").read_text()
    assert metrics(tiny_run, "step") == [1, 2, 3, 4, 5, 6]
    with Image.open(tiny_run / "previews" / "0000006.png") as picture:
        assert picture.size == (10 * (64 + 8) + 8, 4 * (64 + 8) + 8)
    assert yaml.safe_load((tiny_run / "config.yaml").read_text())["global_batch_size"] == 12
    state = final(tiny_run)
    assert set(state) == {"model", "ema", "opt", "args", "step", "meter", "validated", "best",
                          "validations_since_best", "spec"}
    restored = checkpoint.restore(tiny_run)
    assert restored.spec.classes[3] == "three"
    model = restored.spec.model
    assert (model.name, model.class_name) == ("DiNext-S/2", "DiNext")
    assert model.args == {"input_size": (8, 8), "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 2,
                          "mlp_ratio": 3.0, "num_classes": 10, "learn_sigma": False, "gradient_checkpointing": False,
                          "adaln": "zero", "grn": True, "label_std": 1.0, "time_scale": 1.0, "map_split": None}
    assert all(torch.equal(value, state["ema"][key]) for key, value in restored.model.state_dict().items())
    assert not torch.equal(state["ema"]["final_layer.linear.weight"], state["model"]["final_layer.linear.weight"])


def test_the_config_of_a_run_repeats_it(tiny_run, tmp_path, run_here):
    again = ["--results-dir", tmp_path, "--run-name", "again"]
    assert run_here(train, "--config", tiny_run / "config.yaml", *again).returncode == 0
    assert_same(final(tiny_run), final(tmp_path / "again"))


def test_a_finished_run_says_so_and_another_model_batch_or_seed_is_refused(tiny_run, monkeypatch, run_here):
    monkeypatch.chdir(tiny_run.parent.parent)
    before = {path: path.stat().st_mtime_ns for path in (tiny_run / "checkpoints").iterdir()}
    same = ["--config", tiny_run / "config.yaml"]
    assert "Finished" in run_here(train, *same).stdout
    for flags, word in ((["--model", "DiNext-S/4"], "model DiNext-S/2, not DiNext-S/4"),
                        (["--global-batch-size", "24"], "--global-batch-size 12, not 24"),
                        (["--global-seed", "1"], "--global-seed 0, not 1"),
                        (["--diffusion-args", '{"objective": "flow", "label_drop": 0.2}'], "--diffusion-args {'objective'")):
        assert_one_line(run_here(train, *same, "--max-steps", 9, *flags), word, "--run-name")
    assert before == {path: path.stat().st_mtime_ns for path in (tiny_run / "checkpoints").iterdir()}


# --- exactness -----------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path):
    """As after a kill between steps 5 and 6, with the last checkpoint after step 2 and the log further on."""
    flags = ["--num-workers", 1, "--log-every", 3, "--ckpt-every", 2, "--max-steps", 7]
    unbroken = run(tmp_path, "unbroken", *flags)
    broken = tmp_path / "results" / "broken"
    shutil.copytree(unbroken, broken)
    for path in sorted((broken / "checkpoints").iterdir())[1:]:
        path.unlink()
    run(tmp_path, "broken", *flags)
    assert_same(final(unbroken), final(broken))
    for name in ("loss", "grad_norm", "lr"):
        assert metrics(unbroken, name) == metrics(broken, name)
    assert metrics(broken, "step") == [3, 6, 7]


def test_an_extended_run_logs_means_over_the_steps_since_the_last_line(tiny_run, tmp_path):
    """tiny_run logged every loss; a run stopped after step 2 and extended logs (1, 2), then 3 alone, then (4, 5, 6)."""
    for stop in (2, 6):
        folder = run(tmp_path, "extended", "--log-every", 3, "--max-steps", stop)
    single = metrics(tiny_run, "loss")
    expected = [sum(single[:2]) / 2, single[2], sum(single[3:]) / 3]
    assert metrics(folder, "loss") == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder of a run of two processes. On rank 1 the loss of the first micro-batch of steps 3 and 4 is nan."""
    cwd = tmp_path_factory.mktemp("two")
    result = run_script("tests/saboteurs.py", "nan_loss:1,5,7", *PLAIN, "--max-steps", 5, "--val-every", 5, "--ckpt-every", 1,
                        "--grad-accum", 2, cwd=cwd, nproc=2)
    assert "warn" not in result.stderr.lower()
    return cwd / "results" / "r"


def test_one_process_and_two_with_accumulation_agree_to_rounding(two_processes, tmp_path, run_sabotaged):
    def nan_loss(patch):
        saboteurs.nan_loss(patch, 0, 3, 4)

    assert run_sabotaged(nan_loss, *PLAIN, "--max-steps", 5, "--val-every", 5).returncode == 0
    one = tmp_path / "results" / "r"
    assert_same(final(one), final(two_processes), tolerance=2e-5)
    for name, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3), ("val_loss", 1e-4), ("val_loss_ema", 1e-4)):
        found, expected = ([x for x in metrics(folder, name) if x is not None] for folder in (two_processes, one))
        assert found == pytest.approx(expected, rel=tolerance)


def test_nan_on_one_process_skips_the_step_on_all_and_is_counted(two_processes):
    states = [checkpoint.load(path) for path in checkpoint.steps_of(two_processes)]
    assert [state["step"] for state in states] == [1, 2, 5]  # no file within the streak
    for state, taken in zip(states, (1, 2, 3)):
        assert {moments["step"].item() for moments in state["opt"]["state"].values()} == {taken}
        assert all(value.isfinite().all() for part in ("model", "ema") for value in state[part].values())
    assert metrics(two_processes, "skipped_steps") == [0, 0, 1, 2, 2]
    assert [loss is None for loss in metrics(two_processes, "loss")] == [False, False, True, True, False]


def test_init_from_takes_weights_alone_and_resume_everything(tiny_run, tmp_path):
    source = checkpoint.latest(tiny_run)
    resumed = final(run(tmp_path, "resumed", "--resume", source, "--max-steps", 8))
    assert resumed["opt"]["state"][0]["step"] == 8
    assert_same(resumed, final(run(tmp_path, "unbroken", "--max-steps", 8)))
    begun = final(run(tmp_path, "begun", "--init-from", source, "--max-steps", 1, "--lr", 1e-9))
    assert begun["opt"]["state"][0]["step"] == 1
    assert torch.allclose(begun["model"]["x_embedder.proj.weight"], final(tiny_run)["ema"]["x_embedder.proj.weight"], atol=1e-6)


def test_photographs_train_through_a_vae_with_flips_and_validation(photographs, tiny_vae, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    result = run_here(train, "--data-path", photographs / "train", "--vae", tiny_vae, "--image-size", 32, "--model",
                      "DiT-S/2", "--model-args", '{"hidden_size": 32, "depth": 1, "num_heads": 2}', "--global-batch-size", 4,
                      "--max-steps", 2, "--log-every", 1, "--val-every", 1, "--num-workers", 1, "--run-name", "p",
                      "--diffusion-args", '{"sampling": {"num_sampling_steps": "4"}}')
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "results" / "p"
    spec = final(folder)["spec"]
    assert spec["classes"] == ["golden retriever", "tabby cat"]
    given = {"input_size": (4, 4), "in_channels": 4, "num_classes": 2, "learn_sigma": True, "hidden_size": 32, "depth": 1,
             "num_heads": 2}
    assert spec["model"]["args"] | given == spec["model"]["args"]
    assert len(metrics(folder, "val_loss")) == len(metrics(folder, "val_loss_ema")) == 2
    out = run_here(sample, "--ckpt", folder, "--class-labels", "golden_retriever 1", "--out", "p.png")
    assert "golden retriever, tabby cat" in out.stdout


# --- flags, trackers -----------------------------------------------------------------------------


def test_settings_of_the_optimizer_and_the_ema_are_the_flags(tmp_path):
    """With betas of 0, AdamW's first moment is the clipped gradient."""
    flags = ["--optimizer-args", '{"clip_norm": 0.001, "betas": [0.0, 0.0], "warmup_steps": 2, "schedule": "cosine"}',
             "--ema-decay", 0.2, "--ckpt-every", 1, "--max-steps", 4]
    folder = run(tmp_path, "r", *flags)
    norms = [moments["exp_avg"].norm() for moments in final(folder)["opt"]["state"].values()]
    assert torch.stack(norms).norm().item() == pytest.approx(0.001, rel=1e-3)
    assert metrics(folder, "lr") == pytest.approx(
        [0.002 * min(1, (k + 1) / 3) * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])
    states = [checkpoint.load(path) for path in checkpoint.steps_of(folder)]
    for before, after, decay in zip(states, states[1:], (2 / 11, 0.2, 0.2)):  # of steps 2, 3, 4; (1 + k) / (10 + k) at first
        for key, weight in after["model"].items():
            expected = decay * before["ema"][key] + (1 - decay) * weight
            torch.testing.assert_close(after["ema"][key], expected, rtol=1e-6, atol=1e-7)


def test_the_seed_is_that_of_weights_order_and_draws_and_what_a_network_draws_differs_each_micro_batch(
        tmp_path, monkeypatch):
    seeds, addresses, draw = [], [], train.Objective.draw
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed))
    monkeypatch.setattr(train.Objective, "draw", lambda self, *args: addresses.append((args[0], self.label_drop)) or draw(
        self, *args))
    monkeypatch.setattr(train, "GlobalOrder", lambda *args: addresses.append(args[2]) or GlobalOrder(*args))
    run(tmp_path, "r", "--global-seed", 5, "--max-steps", 3, "--grad-accum", 2, "--diffusion-args",
        '{"objective": "flow", "label_drop": 0.25}')
    assert addresses == [5, *((("train", 5, step), 0.25) for step in range(3))]
    assert seeds[0] == 5
    assert len(seeds) == len(set(seeds)) == 7


def losses_by_step(folder):
    return [(step, pytest.approx(loss)) for step, loss in zip(metrics(folder, "step"), metrics(folder, "loss"))]


def test_tensorboard_mirrors_scalars_config_and_previews_also_of_a_continued_run(tmp_path):
    pytest.importorskip("tensorboard")
    flags = ["--tracker", "tensorboard", "--preview-every", 2]
    folder = run(tmp_path, "t", "--max-steps", 4, "--ckpt-every", 2, *flags)
    checkpoint.latest(folder).unlink()  # as after a kill: steps 3 and 4 are done again
    run(tmp_path, "t", "--max-steps", 4, *flags)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == losses_by_step(folder)
    assert [e.step for e in events.Images("preview")] == [2, 4]
    assert events.Images("preview")[0].width == 728
    assert b"global_batch_size" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # mlflow's own
def test_mlflow_mirrors_scalars_config_and_previews_in_its_store(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for stop in (2, 4):
        run_script("train.py", *TINY_RUN, *FLOW, "--run-name", "m", "--max-steps", stop, "--tracker", "mlflow", cwd=tmp_path,
                   MLFLOW_TRACKING_URI=uri)
    client, folder = mlflow.MlflowClient(uri), tmp_path / "results" / "m"
    stored = client.get_run((folder / "mlflow_run_id").read_text())
    assert stored.info.run_name == "m"
    assert stored.data.params["global_batch_size"] == "12"
    losses = client.get_metric_history(stored.info.run_id, "loss")
    assert [(loss.step, loss.value) for loss in losses] == losses_by_step(folder)
    previews = client.list_artifacts(stored.info.run_id, "previews")
    assert [file.path for file in previews] == ["previews/0000002.png", "previews/0000004.png"]


# --- speed: combinations train to the same losses ------------------------------------------------


def test_bf16_accumulation_and_gradient_checkpointing_train_to_the_same_losses(tiny_run, tmp_path):
    """To rounding of bf16, whose unit is 2^-8."""
    folder = run(tmp_path, "r", "--max-steps", 6, "--precision", "bf16", "--grad-accum", 2, "--model-args",
                 '{"hidden_size": 32, "depth": 2, "gradient_checkpointing": true}')
    losses = metrics(folder, "loss")
    assert losses == pytest.approx(metrics(tiny_run, "loss"), rel=2**-8)
    assert losses != pytest.approx(metrics(tiny_run, "loss"), rel=1e-5)


def test_compile_keeps_the_losses_and_the_shapes_static_after_a_validation_owed_before_the_first_step(
        tiny_run, tmp_path, monkeypatch):
    """Three graphs: validation, which is evaluation without gradients, of a whole batch and of the last one; and a step."""
    shapes = []

    def backend(module, inputs):
        shapes.append([value for value in inputs if not isinstance(value, torch.Tensor)])
        shapes[-1] += [size for value in inputs if isinstance(value, torch.Tensor) for size in value.shape]
        return module.forward

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: original(self, backend=backend, **options))
    run(tmp_path, "r", "--max-steps", 2)
    assert not shapes
    torch._dynamo.reset()
    folder = run(tmp_path, "r", "--val-every", 2, "--max-steps", 6, "--compile")
    assert metrics(folder, "loss") == pytest.approx(metrics(tiny_run, "loss"), rel=1e-5)
    assert len(metrics(folder, "val_loss")) == 3
    assert len(shapes) == 3
    assert all(isinstance(size, int) for sizes in shapes for size in sizes)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_trains_to_the_same_losses(tiny_run, tmp_path):
    run_script("train.py", *PLAIN, "--max-steps", 6, "--compile", cwd=tmp_path)
    assert metrics(tmp_path / "results" / "r", "loss") == pytest.approx(metrics(tiny_run, "loss"), rel=1e-5)


class NoSynchronisation(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a number, or a shape that depends on numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "unique"), func
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = parse("--log-every", 3, "--max-steps", 9, "--grad-accum", 2, "--optimizer-args", '{"clip_norm": 1.0}')
    trainer = train.Trainer(args, start_world("cpu"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    trainer.begin()
    trainer.step()  # starts to read
    with NoSynchronisation():
        trainer.step()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):  # the third one logs
            trainer.step()


# --- wrong input: one line, exit code 2, nothing written -----------------------------------------


def assert_refused(check, flags, *words):
    """The check of these flags raises an error with these words."""
    with pytest.raises((UserError, OSError)) as error:
        check(parse(*flags))
    for word in words:
        assert word in str(error.value), (flags, error.value)


def test_wrong_flags_are_refused(tmp_path):
    for name, value, allowed in (
            ("image_size", 100_000, "1..8192"), ("num_workers", -1, "at least 0"), ("keep_last", -1, "at least 0"),
            ("max_steps", -1, "at least 1"), ("global_seed", 10**20, "0..2^63 - 1"), ("lr", 0, "positive"),
            ("ema_decay", 1, "[0, 1)"), ("max_skipped", 2, "0..1")):
        assert_refused(train.check_flags, [f"--{name.replace('_', '-')}", value], f"`{name}` {value}", allowed)
    for argument in ('{"betas": [2, 3]}', '{"clip_norm": -1}', '{"schedule": "linear"}'):
        assert_refused(train.check_flags, ["--optimizer-args", argument], "--optimizer-args", *json.loads(argument))

    def begin(args):
        train.Trainer(args, start_world("cpu")).begin()

    for flags, *words in (  # what fits neither data nor network
            (["--data-path", "/nowhere"], "`data_path` /nowhere", "digits"),
            (["--num-classes", "1000"], "`num_classes` 1000", "10 classes"),
            (["--grad-accum", "5"], "`global_batch_size` 12", "`grad_accum` 5"),
            (["--image-size", "9"], "`image_size`", "(9, 9)", "multiples of 2"),
            (["--model-args", '{"dept": 3}'], "`model_args`", "'dept'", "depth"),
            (["--model-args", '{"hidden_size": -4}'], "`model_args`"),
            (["--diffusion-args", '{"objective": "flaw"}'], "`diffusion_args`", "flaw", "flow"),
            (["--diffusion-args", '{"label_drop": 2}'], "`diffusion_args`", "label_drop 2"),
            (["--diffusion-args", '{"sampling": {"cfg_scale": -1}}'], "`diffusion_args`: sampling", "-1"),
            (["--diffusion-args", '{"sampling": {"sampler": "ddpm"}, "objective": "flow"}'], "ddpm", "allowed: ddim"),
            (["--run-name", "a/b"], "`run_name` 'a/b'"), (["--resume", "nowhere.pt"], "`resume`", "nowhere.pt"),
            (["--results-dir", "/proc/results"], "/proc/results")):
        assert_refused(begin, ["--results-dir", tmp_path, *flags], *words)
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    for flag, value in (("--model", "DiT-XXL/2"), ("--init-from", "nowhere.pt")):
        assert_one_line(run_here(train, *PLAIN, flag, value), flag, value)
    assert list(tmp_path.glob("results/*")) == []


@pytest.mark.slow
def test_an_indivisible_global_batch_is_told_once_under_torchrun(tmp_path):
    result = run_script("train.py", *TINY_RUN, *FLOW, "--global-batch-size", 7, cwd=tmp_path, nproc=2, check=False)
    assert result.returncode != 0
    assert result.stderr.count("train.py: error: --global-batch-size 7 is not divisible by 2 processes") == 1


def test_other_recommended_settings_of_sampling_are_taken_and_told(tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    assert run_here(train, *PLAIN, "--max-steps", 1).returncode == 0
    result = run_here(train, *PLAIN, "--max-steps", 2, "--diffusion-args.sampling", '{"cfg_scale": 3.0}')
    assert "--diffusion-args was {'objective': 'flow', 'sampling': {'num_sampling_steps': '2'}}, is now" in result.stdout
    assert checkpoint.restore("results/r").spec.sampling.cfg_scale == 3
    assert run_here(train, *PLAIN, "--max-steps", 2, "--diffusion-args.sampling", '{"cfg_scale": 4.0}').returncode == 0
    assert checkpoint.restore("results/r").spec.sampling.cfg_scale == 4  # no step was left


# --- someone else's network ----------------------------------------------------------------------


def test_a_foreign_network_with_dropout_is_continued_exactly_and_validation_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setitem(DiT_models, "Foreign", ForeignNet)
    foreign = ["--model", "Foreign", "--model-args", "{}"]
    flags = [*foreign, "--grad-accum", 2, "--max-steps"]
    whole = final(run(tmp_path, "whole", *flags, 6))
    run(tmp_path, "parts", *flags, 3)
    torch.rand(7)  # the process that continues has drawn other numbers
    assert_same(whole, final(run(tmp_path, "parts", *flags, 6, "--val-every", 1)))
    for key in ("blocks.0.layers.0.running_mean", "blocks.0.layers.0.running_var"):
        assert torch.equal(whole["ema"][key], whole["model"][key])
    calls_item = ["--model-args", '{"drop_path": 0.1}']  # which the meta device refuses
    trainer = train.Trainer(parse(*foreign, *calls_item, "--max-steps", 1), start_world("cpu"))
    assert trainer.state.model.blocks[1].drop_path == pytest.approx(0.1)
