"""A run that is stopped, killed or starved ends with a clear line, loses nothing, and goes on as if nothing had happened."""

import contextlib
import fcntl
import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from functools import partial

import pytest
import saboteurs
import torch
from conftest import ROOT, TINY_RUN, assert_one_line, free_port, read_metrics, run_script, train_here
from PIL import Image

import sample
import train
from pipeline import checkpoint
from pipeline.spec import ModelSpec
from training.state import OptimizerArgs, Training

FLAGS = [*TINY_RUN, "--diffusion-args", '{"objective": "flow", "sampling": {"num_sampling_steps": "2"}}', "--run-name", "r"]
LOGGED = ("step", "loss", "loss_moving_mean", "lr", "grad_norm", "val_loss", "val_loss_ema")
SABOTEURS = ROOT / "tests" / "saboteurs.py"


def start(cwd, saboteur, *flags, **options):
    return run_script(SABOTEURS, saboteur, *FLAGS, *flags, cwd=cwd, **options)


def folder(cwd):
    return cwd / "results" / "r"


def checkpoints(cwd):
    return [int(path.stem) for path in checkpoint.steps_of(folder(cwd))]


def newest(cwd):
    return checkpoint.load(checkpoint.latest(folder(cwd)))


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
    a, b = newest(cwd), newest(unbroken)
    for key in ("model", "ema", "opt", "meter", "step", "best", "validated"):
        assert same(a[key], b[key]), key
    assert log(cwd) == log(unbroken)


def errors(result):
    return [line for line in result.stderr.splitlines() if "train.py: error" in line]


# --- asked to stop -------------------------------------------------------------------------------

STOPPABLE = ["--max-steps", 9, "--ckpt-every", 4, "--val-every", 3, "--preview-every", 3, "--log-every", 2,
             "--num-workers", 1]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("unbroken")
    train_here(cwd, *FLAGS, *STOPPABLE)
    return cwd


def test_a_signal_saves_exits_0_and_the_same_command_goes_on_exactly(unbroken, tmp_path, run_sabotaged):
    """Five signals, one after the other. After the fourth one step 6 is validated, after the fifth not again."""
    for saboteur, step in ((saboteurs.signal_in_preview, 3), (saboteurs.signal_in_checkpoint, 4),
                           (saboteurs.signal_in_step, 5), (saboteurs.signal_in_validation, 6),
                           (partial(saboteurs.signal_in_preview, step=6), 6)):
        result = run_sabotaged(saboteur, *FLAGS, *STOPPABLE)
        assert result.returncode == 0, result.stderr
        assert f"the same command with --run-name r goes on. Step {step} of 9" in result.stdout
        assert checkpoints(tmp_path)[-1] == step
    assert run_sabotaged(saboteurs.nothing, *FLAGS, *STOPPABLE).returncode == 0
    assert_as_unbroken(tmp_path, unbroken)
    assert {path.name for path in (folder(tmp_path) / "previews").iterdir()} == {"0000003.png", "0000006.png", "0000009.png"}
    with Image.open(folder(tmp_path) / "previews.gif") as gif:
        assert gif.n_frames == 3


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]])
def test_a_closed_terminal_stops_a_run_that_is_saved(tmp_path, launcher):
    """As when ssh ends: the kernel sends SIGHUP, and then nothing can be written to the terminal."""
    terminal, end = pty.openpty()
    command = [sys.executable, *launcher, ROOT / "train.py", *FLAGS, "--max-steps", 100000, "--num-workers", 1]
    with subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdin=end, stdout=end, stderr=end, start_new_session=True,
                          preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) as process:
        os.close(end)
        reader = threading.Thread(target=drain, args=[terminal], daemon=True)
        reader.start()
        wait_until(lambda: newest_step(tmp_path) > 3, process)
        os.kill(process.pid, signal.SIGSTOP)  # the terminal is gone before the run hears of it
        os.close(terminal)
        os.kill(process.pid, signal.SIGCONT)
        process.wait(60)
    assert checkpoints(tmp_path)
    assert newest(tmp_path)["step"] > 3


def drain(terminal):
    with contextlib.suppress(OSError):
        while os.read(terminal, 1000):
            pass


def test_a_signal_that_was_ignored_at_start_does_not_stop_a_run(tmp_path, run_sabotaged):
    def hung_up(patch):
        saboteurs.before(patch, train.Trainer, "finish_step", lambda run: run.state.step == 2 and saboteurs.kill(signal.SIGHUP))

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert "Finished" in run_sabotaged(hung_up, *FLAGS, "--max-steps", 3).stdout
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert "Stopped by SIGHUP" in run_sabotaged(hung_up, *FLAGS[:-1], "s", "--max-steps", 3).stdout
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_is_heard_while_a_process_waits_for_data(tmp_path, workers):
    command = [sys.executable, SABOTEURS, "data_that_never_comes", *FLAGS[:-2], "--num-workers", workers, "--run-name", "r"]
    with subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        wait_until(lambda: process.stdout.readline() == "waits\n", process)
        if workers:
            wait_until(lambda: newest_step(tmp_path) == 4, process)  # two batches are read ahead
        process.terminate()
        out, err = process.communicate(timeout=30)
    assert (process.returncode, "Stopped by SIGTERM" in out) == (0, True), err
    assert checkpoints(tmp_path) == [4]


@pytest.mark.slow
def test_a_signal_is_heard_by_all_while_one_of_them_waits_for_data(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SABOTEURS,
               "data_that_never_comes", *FLAGS]
    with subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as agent:
        wait_until(lambda: agent.stdout.readline() == "waits\n", agent)
        agent.terminate()
        _, err = agent.communicate(timeout=60)
    assert "stopped by SIGTERM while no data came" in err
    assert checkpoints(tmp_path) == [4]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    for saboteur, step in (("signal_in_preview:1", 3), ("signal_in_step:1", 5), ("signal_in_validation:1", 6)):
        result = start(tmp_path, saboteur, *STOPPABLE, "--grad-accum", 2, nproc=2)
        found = int(re.search(r"Stopped by .*Step (\d+) of 9", result.stdout)[1])
        assert step <= found <= step + 2  # in training they ask each other at steps 1, 3, 7, … only
        assert checkpoints(tmp_path)[-1] == found


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


def wait_until(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.01)


# --- killed --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_change_nothing(tmp_path):
    """Each at a random moment after a run logged a new step, or within the writing of a checkpoint."""
    chance, count, steps = random.Random(1), 20, 160
    flags = ["--max-steps", steps, "--ckpt-every", 3, "--keep-last", "[2, 5]", "--val-every", 8, "--log-every", 2,
             "--num-workers", 1, "--grad-accum", 2]
    for launch in range(count):
        writing, seen = launch % 3 == 0, newest_step(tmp_path)
        saboteur = f"killed_in_write:{chance.randrange(1, 40)}" if writing else "slow_steps"
        process = subprocess.Popen([sys.executable, SABOTEURS, saboteur, *map(str, FLAGS + flags)], cwd=tmp_path,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if not writing:
            wait_until(lambda seen=seen: newest_step(tmp_path) > seen, process)
            time.sleep(chance.uniform(0, 0.4))
            assert process.poll() is None, "the run was over before the kill"
            process.kill()
        assert process.wait(60) == -signal.SIGKILL
        assert newest_step(tmp_path) < steps
    train_here(tmp_path, *FLAGS, *flags)
    (tmp_path / "unbroken").mkdir()
    train_here(tmp_path / "unbroken", *FLAGS, *flags)
    assert_as_unbroken(tmp_path, tmp_path / "unbroken")
    assert checkpoints(tmp_path) == checkpoints(tmp_path / "unbroken")


def newest_step(cwd):
    """Of a log that may be in the middle of being rewritten."""
    path = folder(cwd) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@pytest.mark.slow
def test_a_killed_rank_is_one_line_and_torchrun_restarts_the_run(tmp_path):
    """Also without --run-name: the restart finds the folder of its launch."""
    flags = ["--max-steps", 9, "--ckpt-every", 4, "--log-every", 3, "--num-workers", 1]
    (tmp_path / "unbroken").mkdir()
    start(tmp_path / "unbroken", "nothing", *flags, nproc=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1",
               SABOTEURS, "rank_1_killed", *map(str, FLAGS[:-2]), *map(str, flags)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = errors(result)
    assert "lost another process" in line
    assert "the same command continues it" in line
    (run,) = (tmp_path / "results").iterdir()
    assert run.name == "000-DiNext-S-2"
    assert "Continuing" in (run / "log.txt").read_text()
    run.rename(folder(tmp_path))
    assert_as_unbroken(tmp_path, tmp_path / "unbroken")


@pytest.mark.slow
def test_three_processes_with_all_switches_resume_bit_for_bit_and_train_to_the_losses_of_one(tmp_path):
    """Of three, sums depend on their order: DDP must keep the same over an interruption."""
    steps = ["--max-steps", 6, "--ckpt-every", 3]
    flags = [*steps, "--grad-accum", 2, "--compile", "--precision", "bf16", "--num-workers", 1,
             "--model-args", '{"hidden_size": 32, "depth": 2, "gradient_checkpointing": true}']
    for name in ("unbroken", "plain"):
        (tmp_path / name).mkdir()
    start(tmp_path / "unbroken", "aot_eager", *flags, nproc=3)
    shutil.copytree(tmp_path / "unbroken" / "results", tmp_path / "results")
    checkpoint.latest(folder(tmp_path)).unlink()
    start(tmp_path, "aot_eager", *flags, nproc=3)
    assert_as_unbroken(tmp_path, tmp_path / "unbroken")
    train_here(tmp_path / "plain", *FLAGS, *steps)
    assert [line["loss"] for line in log(tmp_path)] == pytest.approx(
        [line["loss"] for line in log(tmp_path / "plain")], rel=2**-8)


@pytest.mark.slow
def test_a_failure_on_one_process_alone_is_reported(tmp_path):
    result = start(tmp_path, "data_missing_on_rank_1", "--max-steps", 2, nproc=2, check=False)
    assert errors(result) == ["train.py: error: only machine 2 lacks the data (rank 1)"]


def test_a_dead_data_worker_ends_the_run_with_one_line(run_sabotaged):
    result = run_sabotaged(saboteurs.data_worker_killed, *FLAGS, "--max-steps", 9, "--num-workers", 1)
    assert result.returncode == 2
    (line,) = errors(result)
    assert "a data worker died" in line
    assert "--num-workers" in line


# --- damaged files, full disks -------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["bit-flipped", "empty"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
        unbroken, tmp_path, run_sabotaged, run_here, damage):
    shutil.copytree(unbroken / "results", tmp_path / "results")
    path = checkpoint.latest(folder(tmp_path))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content if damage == "bit-flipped" else b"")
    assert_one_line(run_here(sample, "--ckpt", folder(tmp_path)), "0000009.pt is damaged", "sha256")
    assert run_sabotaged(saboteurs.nothing, *FLAGS, *STOPPABLE).returncode == 0
    written = (folder(tmp_path) / "log.txt").read_text()
    assert "0000009.pt is damaged" in written
    assert "Continuing results/r/checkpoints/0000008.pt" in written
    assert_as_unbroken(tmp_path, unbroken)

    # A run of which no checkpoint can be used does not begin anew.
    kept = checkpoints(tmp_path)
    assert_one_line(run_sabotaged(saboteurs.disk_that_cannot_be_read, *FLAGS, *STOPPABLE), "Input/output error")
    assert checkpoints(tmp_path) == kept  # none is called damaged
    for path in checkpoint.steps_of(folder(tmp_path)):
        path.write_bytes(b"no checkpoint")
    for _ in range(2):
        assert_one_line(run_sabotaged(saboteurs.nothing, *FLAGS, *STOPPABLE), "only damaged checkpoints")
    assert log(tmp_path) == log(unbroken)


def test_a_checkpoint_carries_the_sha256_that_sha256sum_checks(unbroken):
    names = [f"{path.name}.sha256" for path in (folder(unbroken) / "checkpoints").glob("*.pt")]
    assert "best.pt.sha256" in names
    subprocess.run(["sha256sum", "--check", "--status", *names], cwd=folder(unbroken) / "checkpoints", check=True)


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_the_last_checkpoint(tmp_path, run_sabotaged):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        result = run_sabotaged(saboteurs.disk_full_at_step_8, *FLAGS, "--max-steps", 9, "--ckpt-every", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = errors(result)
    assert "cannot write the checkpoint results/r/checkpoints/0000008.pt: File too large" in line
    assert checkpoints(tmp_path) == [4]
    assert list((folder(tmp_path) / "checkpoints").glob(".*")) == []


def test_space_for_a_checkpoint_is_asked_for_before_training(unbroken, tmp_path, monkeypatch, run_here):
    state = newest(unbroken)
    size = Training.begin(ModelSpec.from_dict(state["spec"]["model"]).build(), 1e-3, OptimizerArgs()).size
    moments = sum(value.nbytes for moments in state["opt"]["state"].values() for value in moments.values() if value.dim())
    assert size == moments + sum(value.nbytes for part in ("model", "ema") for value in state[part].values())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 600_000, 400_000))
    assert_one_line(run_here(train, *FLAGS, "--max-steps", 1), "the folder results", f"{size / 1e9:.6f} GB")
    assert list(tmp_path.glob("results/*")) == []


# --- several machines ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_machine_that_is_lost_and_comes_back(tmp_path):
    """Two torchrun agents as two machines; one is killed with its worker, and started again."""
    flags = ["--max-steps", 150, "--ckpt-every", 10, "--keep-last", 3]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=5",
               "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=two",
               "--rdzv-conf=last_call_timeout=5", "--local-addr=127.0.0.1", SABOTEURS, "slow_steps_noted",
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
    state = newest(tmp_path)
    assert state["step"] == 150
    assert [line["step"] for line in log(tmp_path)] == list(range(1, 151))
    (tmp_path / "unbroken").mkdir()
    train_here(tmp_path / "unbroken", *FLAGS, *flags)
    expected = newest(tmp_path / "unbroken")
    for a, b in zip(log(tmp_path), log(tmp_path / "unbroken")):  # the same samples, noise and rates, up to rounding
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
