"""A run that is stopped, killed or starved ends with a clear line, loses nothing, and goes on as if nothing had happened."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import AOT_EAGER, ROOT, TINY_RUN, assert_one_line, free_port, patched, read_metrics, run_script
from PIL import Image

import sample
import train
from pipeline import checkpoint
from pipeline.spec import ModelSpec
from training.state import OptimizerArgs, Training

FLAGS = [*TINY_RUN, "--diffusion-args", '{"objective": "flow", "sampling": {"num_sampling_steps": "2"}}', "--run-name", "r"]
LOGGED = ("step", "loss", "loss_moving_mean", "lr", "grad_norm", "val_loss", "val_loss_ema")


def start(cwd, code, *flags, **options):
    return run_script(patched(cwd, code), *FLAGS, *flags, cwd=cwd, **options)


def folder(cwd):
    return cwd / "results" / "r"


def checkpoints(cwd):
    return [int(path.stem) for path in checkpoint.steps_of(folder(cwd))]


def log(cwd):
    """What metrics.jsonl says of the training, without times and memory."""
    return [{key: line[key] for key in LOGGED if key in line} for line in read_metrics(folder(cwd))]


def same(a, b):
    """Equal bit for bit, tensors within dictionaries and lists too."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_as_unbroken(cwd, unbroken):
    """Weights, EMA, optimizer, counters and the log of losses."""
    a, b = (checkpoint.load(checkpoint.latest(folder(path))) for path in (cwd, unbroken))
    for key in ("model", "ema", "opt", "meter", "step", "best", "validated"):
        assert same(a[key], b[key]), key
    assert log(cwd) == log(unbroken)


def errors(result):
    return [line for line in result.stderr.splitlines() if "train.py: error" in line]


# --- asked to stop -------------------------------------------------------------------------------

STOPPABLE = ["--max-steps", 9, "--ckpt-every", 4, "--val-every", 3, "--preview-every", 3, "--log-every", 2,
             "--num-workers", 1]
POINTS = {  # where the signal arrives, and the step of the checkpoint that it makes
    "a step": ("before(state.LossMeter, 'update', lambda meter, *_: meter.seen == 4 and kill(signal.SIGTERM))", 5),
    "validation": ("before(train.Trainer, 'validate', lambda run: run.state.step == 6 and kill(signal.SIGTERM))", 6),
    "a preview": ("before(train, 'preview', lambda *a: a[3].stem == '0000006' and kill(signal.SIGINT))", 6),
    "a checkpoint": ("before(checkpoint, 'save', lambda path, *_: path.stem == '0000004' and kill(signal.SIGTERM))", 4),
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("unbroken")
    start(cwd, "", *STOPPABLE)
    return cwd


@pytest.mark.parametrize("point", POINTS)
def test_a_signal_saves_exits_0_and_the_same_command_goes_on_exactly(unbroken, tmp_path, run_patched, point):
    code, step = POINTS[point]
    result = run_patched(code, *FLAGS, *STOPPABLE)
    assert result.returncode == 0, result.stderr
    assert f"the same command with --run-name r goes on. Step {step} of 9" in result.stdout
    assert checkpoints(tmp_path)[-1] == step
    assert run_patched("", *FLAGS, *STOPPABLE).returncode == 0
    assert_as_unbroken(tmp_path, unbroken)
    assert {path.name for path in (folder(tmp_path) / "previews").iterdir()} == {"0000003.png", "0000006.png", "0000009.png"}
    with Image.open(folder(tmp_path) / "previews.gif") as gif:
        assert gif.n_frames == 3


@pytest.mark.slow
@pytest.mark.parametrize("point", ["a step", "validation", "a preview"])
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path, point):
    code, step = POINTS[point]
    result = start(tmp_path, f"if RANK == 1: {code}", *STOPPABLE, "--grad-accum", 2, nproc=2)
    assert f"Step {step} of 9" in result.stdout
    assert checkpoints(tmp_path)[-1] == step


@pytest.mark.slow
def test_torchrun_s_sigterm_reaches_the_whole_group_and_is_saved_in_time(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py"),
               *map(str, FLAGS), "--max-steps", "100000", "--num-workers", "1"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as agent:
        wait_until(lambda: (folder(tmp_path) / "metrics.jsonl").exists() and log(tmp_path), agent)
        began = time.monotonic()
        agent.send_signal(signal.SIGTERM)
        out = agent.communicate()[0]
    assert time.monotonic() - began < 25
    assert out.count("Stopped by SIGTERM") == 1
    assert checkpoints(tmp_path) == [log(tmp_path)[-1]["step"]]


def wait_until(condition, process=None, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None
        time.sleep(0.01)


# --- killed --------------------------------------------------------------------------------------


def survive_kills(cwd, count, seed):
    """Kill a run `count` times: at a random moment after it logged a new step, or within the writing of a checkpoint."""
    chance = random.Random(seed)
    flags = ["--max-steps", 8 * count, "--ckpt-every", 3, "--keep-last", "[2, 5]", "--val-every", 8, "--log-every", 2,
             "--num-workers", 1, "--grad-accum", 2]
    kinds = {"writing": 0, "running": 0}
    for launch in range(count):
        writing = launch % 3 == 0
        nth_write = chance.randrange(1, 40)
        dies = ("writes = []; before(files.HashingFile, 'write', lambda *_: "
                f"writes.append(1) or len(writes) == {nth_write} and kill())")
        slow = "before(train.Trainer, 'finish_step', lambda run: time.sleep(0.05))"
        script = patched(cwd, dies if writing else slow)
        seen = newest_step(cwd)
        process = subprocess.Popen([sys.executable, str(script), *map(str, FLAGS + flags)], cwd=cwd,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if not writing:
            wait_until(lambda seen=seen: newest_step(cwd) > seen, process)
            time.sleep(chance.uniform(0, 0.4))
            assert process.poll() is None, "the run was over before the kill"
            process.kill()
        assert process.wait(60) == -signal.SIGKILL
        assert newest_step(cwd) < 8 * count
        kinds["writing" if writing else "running"] += 1
    assert min(kinds.values()) > 0
    start(cwd, "", *flags)
    start(cwd / "unbroken", "", *flags)
    assert_as_unbroken(cwd, cwd / "unbroken")
    assert checkpoints(cwd) == checkpoints(cwd / "unbroken")


def newest_step(cwd):
    """Of a log that may be in the middle of being rewritten."""
    path = folder(cwd) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_change_nothing(tmp_path):
    (tmp_path / "unbroken").mkdir()
    survive_kills(tmp_path, 20, seed=1)


DIES = "if RANK == 1 and LAUNCH == 0: before(state.LossMeter, 'update', lambda meter, *_: meter.seen == 6 and kill())"
TWO = ["--max-steps", 9, "--ckpt-every", 4, "--log-every", 3, "--num-workers", 1]


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_one_line_and_the_last_checkpoint_intact(tmp_path):
    result = start(tmp_path, DIES, *TWO, nproc=2, check=False)
    assert result.returncode != 0
    (line,) = errors(result)
    assert "lost another process" in line
    assert "the same command continues it" in line
    assert checkpoints(tmp_path) == [4]
    assert checkpoint.load(checkpoint.latest(folder(tmp_path)))["step"] == 4


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_was_killed(tmp_path):
    """Also without --run-name: the restart finds the folder of its launch."""
    (tmp_path / "unbroken").mkdir()
    start(tmp_path / "unbroken", "", *TWO, nproc=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1",
               str(patched(tmp_path, DIES)), *map(str, FLAGS[:-2]), *map(str, TWO)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    (run,) = (tmp_path / "results").iterdir()
    assert run.name == "000-DiNext-S-2"
    run.rename(tmp_path / "results" / "r")
    assert_as_unbroken(tmp_path, tmp_path / "unbroken")


@pytest.mark.slow
def test_three_processes_with_all_switches_resume_bit_for_bit(tmp_path):
    """Of three, sums depend on their order: DDP must keep the same over an interruption."""
    flags = ["--max-steps", 6, "--ckpt-every", 3, "--grad-accum", 2, "--compile", "--precision", "bf16", "--num-workers", 1,
             "--model-args", '{"hidden_size": 32, "depth": 2, "gradient_checkpointing": true}']
    (tmp_path / "unbroken").mkdir()
    start(tmp_path / "unbroken", AOT_EAGER, *flags, nproc=3)
    shutil.copytree(tmp_path / "unbroken" / "results", tmp_path / "results")
    checkpoint.latest(folder(tmp_path)).unlink()
    start(tmp_path, AOT_EAGER, *flags, nproc=3)
    assert_as_unbroken(tmp_path, tmp_path / "unbroken")


@pytest.mark.slow
def test_what_fails_on_one_process_alone_is_told(tmp_path):
    code = """
def fails(*args, **kwargs):
    raise FileNotFoundError("only machine 2 lacks the data")
if RANK == 1: train.load_dataset = fails"""
    result = start(tmp_path, code, "--max-steps", 2, nproc=2, check=False)
    assert errors(result) == ["train.py: error: only machine 2 lacks the data (rank 1)"]


@pytest.mark.parametrize("nproc", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_dead_data_worker_ends_the_run_with_one_line(tmp_path, nproc):
    code = "before(datasets.ArrayImages, '__getitems__', lambda *_: RANK == (os.environ.get('WORLD_SIZE') == '2') and kill())"
    result = start(tmp_path, code, "--max-steps", 9, "--num-workers", 1, nproc=nproc, check=False)
    assert result.returncode != 0
    (line,) = errors(result)
    assert "a data worker died" in line
    assert "--num-workers" in line


# --- damaged files, full disks -------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "bit-flipped", "empty"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(unbroken, tmp_path, run_patched, run_here, damage):
    shutil.copytree(unbroken / "results", tmp_path / "results")
    newest = checkpoint.latest(folder(tmp_path))
    content = bytearray(newest.read_bytes())
    if damage == "bit-flipped":
        content[len(content) // 2] ^= 16
    newest.write_bytes(content[: {"truncated": len(content) // 2, "bit-flipped": None, "empty": 0}[damage]])
    assert_one_line(run_here(sample, "--ckpt", folder(tmp_path)), "0000009.pt is damaged", "sha256")
    assert run_patched("", *FLAGS, *STOPPABLE).returncode == 0
    said = (folder(tmp_path) / "log.txt").read_text()
    assert "0000009.pt is damaged" in said
    assert "Continuing results/r/checkpoints/0000008.pt" in said
    assert_as_unbroken(tmp_path, unbroken)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(unbroken, tmp_path, run_patched):
    shutil.copytree(unbroken / "results", tmp_path / "results")
    before = log(tmp_path)
    for path in checkpoint.steps_of(folder(tmp_path)):
        path.write_bytes(b"no checkpoint")
    for _ in range(2):
        assert_one_line(run_patched("", *FLAGS, *STOPPABLE), "has only damaged checkpoints")
    assert log(tmp_path) == before


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(unbroken, tmp_path, run_patched):
    shutil.copytree(unbroken / "results", tmp_path / "results")
    code = """
def fails(*args, **kwargs):
    raise OSError(5, "Input/output error")
patch.setattr(torch, "load", fails)"""
    assert_one_line(run_patched(code, *FLAGS, *STOPPABLE), "Input/output error")
    assert checkpoints(tmp_path) == checkpoints(unbroken)


def test_a_checkpoint_carries_the_sha256_that_sha256sum_checks(unbroken):
    names = [f"{path.name}.sha256" for path in (folder(unbroken) / "checkpoints").glob("*.pt")]
    assert "best.pt.sha256" in names
    subprocess.run(["sha256sum", "--check", "--status", *names], cwd=folder(unbroken) / "checkpoints", check=True)


def test_best_is_the_checkpoint_of_the_lowest_validation_loss(unbroken):
    losses = {line["step"]: line["val_loss_ema"] for line in log(unbroken) if "val_loss_ema" in line}
    best = checkpoint.load(folder(unbroken) / "checkpoints" / "best.pt")
    assert set(losses) == {3, 6, 9}
    assert best["step"] == min(losses, key=losses.get)
    assert best["best"] == min(losses.values())


@pytest.mark.parametrize("nproc", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_ends_the_run_with_one_line_and_keeps_the_last_checkpoint(tmp_path, nproc):
    """A limit on the size of files, from the second checkpoint on."""
    code = """
import resource
limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
before(checkpoint, 'save', lambda path, *_: path.stem == '0000008' and limit())"""
    result = start(tmp_path, code, *TWO, nproc=nproc, check=False)
    assert result.returncode != 0
    (line,) = errors(result)
    assert "cannot write the checkpoint results/r/checkpoints/0000008.pt: File too large" in line
    assert checkpoints(tmp_path) == [4]
    assert list((folder(tmp_path) / "checkpoints").glob(".*")) == []
    assert checkpoint.load(checkpoint.latest(folder(tmp_path)))["step"] == 4


def test_space_for_a_checkpoint_is_asked_for_before_training(tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    asked = {}

    def usage(path):
        asked["free"] = 400_000
        return shutil._ntuple_diskusage(10**6, 600_000, asked["free"])

    monkeypatch.setattr(shutil, "disk_usage", usage)
    result = run_here(train, *FLAGS, "--max-steps", 1)
    assert_one_line(result, "no space in the folder results", "0.000552 GB are needed")
    assert list(tmp_path.glob("results/*")) == []


def test_the_size_that_is_asked_for_is_that_of_a_checkpoint(unbroken):
    state = checkpoint.load(checkpoint.latest(folder(unbroken)))
    model = ModelSpec.from_dict(state["spec"]["model"]).build()
    size = Training.begin(model, 1e-3, OptimizerArgs()).size
    moments = sum(value.nbytes for moments in state["opt"]["state"].values() for value in moments.values() if value.dim())
    assert size == moments + sum(value.nbytes for part in ("model", "ema") for value in state[part].values())


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become nobody")
def test_a_read_only_folder_is_one_line(tmp_path):
    os.chmod(tmp_path, 0o755)
    code = """
import atexit
def become_nobody(run):
    os.seteuid(65534)
    atexit.register(os.seteuid, 0)  # wandb, which timm imports, removes its temporary folders at exit
before(train.Trainer, 'begin', become_nobody)"""
    result = start(tmp_path, code, "--max-steps", 1, check=False)
    assert_one_line(result, "cannot write to the folder results: Permission denied")


# --- numbers that are not finite -----------------------------------------------------------------

POISON = """
losses = objective.Objective.losses
def poisoned(self, model, batch, labels, draws):
    poisoned.calls += 1
    terms = losses(self, model, batch, labels, draws)
    if RANK == {rank} and poisoned.calls in {calls}:
        terms["loss"] = terms["loss"] * float("nan")
    return terms
poisoned.calls = 0
objective.Objective.losses = poisoned
"""


def test_nan_on_one_process_skips_the_step_on_all_and_is_counted(tmp_path):
    result = start(tmp_path, POISON.format(rank=1, calls=(3, 4, 6)), "--max-steps", 7, "--ckpt-every", 1, nproc=2)
    assert errors(result) == []
    states = {int(path.stem): checkpoint.load(path) for path in checkpoint.steps_of(folder(tmp_path))}
    for step in range(2, 8):
        skipped = step in (3, 4, 6)
        assert same(states[step]["model"], states[step - 1]["model"]) == skipped
        assert same(states[step]["opt"]["state"], states[step - 1]["opt"]["state"]) == skipped
        assert all(value.isfinite().all() for part in ("model", "ema") for value in states[step][part].values())
    lines = read_metrics(folder(tmp_path))
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 3, 3]
    assert [line["loss"] is None for line in lines] == [False, False, True, True, False, True, False]


@pytest.mark.slow
def test_too_many_skipped_steps_in_a_row_end_the_run_with_one_line(tmp_path):
    flags = ["--max-steps", 9, "--ckpt-every", 2, "--optimizer-args", '{"max_skipped_steps": 3}']
    result = start(tmp_path, POISON.format(rank=1, calls=(3, 5, 6, 7)), *flags, nproc=2, check=False)
    assert result.returncode != 0
    (line,) = errors(result)
    assert "3 steps in a row had a loss or gradient norm that is not finite" in line
    assert checkpoints(tmp_path) == [2, 4, 6]
    state = checkpoint.load(checkpoint.latest(folder(tmp_path)))
    assert all(value.isfinite().all() for part in ("model", "ema") for value in state[part].values())
    start(tmp_path, "", *flags, nproc=2)  # as after a lower --lr
    assert checkpoints(tmp_path)[-1] == 9


def test_after_too_many_skipped_steps_a_checkpoint_between_lines_of_the_log_goes_on(tmp_path, run_patched):
    flags = [*FLAGS, "--max-steps", 8, "--log-every", 6, "--ckpt-every", 5, "--optimizer-args", '{"max_skipped_steps": 3}']
    code = """
losses = objective.Objective.losses
patch.setattr(objective.Objective, "losses", lambda *args: {"loss": losses(*args)["loss"] * float("nan")})"""
    assert "steps in a row" in run_patched(code, *flags).stderr
    assert checkpoints(tmp_path) == [5]
    assert run_patched("", *flags).returncode == 0
    assert checkpoints(tmp_path) == [5, 8]


def test_patience_ends_a_run_that_no_longer_improves(tmp_path, run_patched):
    code = """
losses, at = iter([3.0, 2.0, 2.5, 2.0, 1.0]), state.Training.validated_at
patch.setattr(state.Training, "validated_at", lambda self, loss: at(self, next(losses)))"""
    flags = [*FLAGS, "--max-steps", 9, "--val-every", 1, "--optimizer-args", '{"patience": 2}']
    assert "Finished: results/r. Step 4 of 9" in run_patched(code, *flags).stdout
    assert checkpoints(tmp_path) == [4]
    assert checkpoint.load(folder(tmp_path) / "checkpoints" / "best.pt")["step"] == 2
    assert "Finished: results/r. Step 4 of 9; 0 steps" in run_patched(code, *flags).stdout


# --- several machines ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_machine_that_is_lost_and_comes_back(tmp_path):
    """Two torchrun agents as two machines; one is killed with its worker, and started again."""
    code = """
before(train.Trainer, 'finish_step', lambda run: time.sleep(0.1))
def note(order, step):
    with open(f"rows-{os.getpid()}.txt", "a") as file:
        print(step, os.environ["WORLD_SIZE"], RANK, file=file)
before(order.GlobalOrder, 'batch', note)"""
    flags = ["--max-steps", 150, "--ckpt-every", 10, "--keep-last", 3]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=5",
               "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=two",
               "--rdzv-conf=last_call_timeout=5", "--local-addr=127.0.0.1", str(patched(tmp_path, code)),
               *map(str, FLAGS + flags)]

    def worlds():
        """(step, world size) of what was read, over all processes."""
        text = "".join(path.read_text() for path in tmp_path.glob("rows-*.txt"))
        return [tuple(map(int, line.split()[:2])) for line in text.splitlines() if line.count(" ") == 2]

    env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see the README
    with contextlib.ExitStack() as stack:
        err = stack.enter_context(open(tmp_path / "err.txt", "a"))

        def machine():
            process = stack.enter_context(subprocess.Popen(command, cwd=tmp_path, env=env, stdout=err, stderr=err))
            stack.callback(destroy, process)
            return process

        first = machine()
        time.sleep(1)
        second = machine()
        wait_until(lambda: any(step > 20 and size == 2 for step, size in worlds()), first, 90)
        destroy(second)
        lost_at = newest_step(tmp_path)
        wait_until(lambda: any(size == 1 for _, size in worlds()), first, 120)
        second = machine()
        assert first.wait(180) == 0, (tmp_path / "err.txt").read_text()[-3000:]
        assert second.wait(60) == 0
    assert 20 <= lost_at < 150
    assert [size for _, size in worlds()][-1] == 2
    state = checkpoint.load(checkpoint.latest(folder(tmp_path)))
    assert state["step"] == 150
    assert [line["step"] for line in log(tmp_path)] == list(range(1, 151))
    (tmp_path / "unbroken").mkdir()
    start(tmp_path / "unbroken", "", *flags)
    expected = checkpoint.load(checkpoint.latest(folder(tmp_path / "unbroken")))
    for a, b in zip(log(tmp_path), log(tmp_path / "unbroken")):  # the same samples, noise and rates, but for rounding
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["lr"] == b["lr"]
    assert max((state["ema"][key] - expected["ema"][key]).abs().max() for key in expected["ema"]) < 1e-3


def destroy(agent):
    """Kill torchrun's agent and its workers at once."""
    if agent.poll() is None:
        with open(f"/proc/{agent.pid}/task/{agent.pid}/children") as file:
            workers = [int(child) for child in file.read().split()]
        agent.kill()
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        agent.wait()
