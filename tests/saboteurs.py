"""Ways to break a run of train.py at a chosen point, one function each. A test calls the function, or starts it by name:

    python tests/saboteurs.py NAME [flags of train.py]          # also under torchrun
    python tests/saboteurs.py NAME:1,3,4 [flags of train.py]    # with the function's numbers

`patch` replaces attributes: it is pytest's monkeypatch, or the module `builtins` in a process that ends with the run.
"""

import builtins
import os
import re
import resource
import signal
import sys
import time
from functools import partialmethod
from pathlib import Path

import torch
from torch.utils.data import get_worker_info

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from pipeline import checkpoint, drawing
from runtime import UserError, cli, files
from training import datasets, objective, order, state

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
FIRST_LAUNCH = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def before(patch, owner, name, action):
    """From now on `action` is called with the arguments of owner.name before that is."""
    original = getattr(owner, name)

    def function(*args, **kwargs):
        action(*args)
        return original(*args, **kwargs)

    patch.setattr(owner, name, function)


def kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def nothing(patch):
    """The run stays whole."""


def data_missing_on_rank_1(patch):
    """Only the second machine lacks the data."""
    def fail(*args, **kwargs):
        raise FileNotFoundError("only machine 2 lacks the data")

    if RANK == 1:
        patch.setattr(train, "load_dataset", fail)


# --- signals and kills ---------------------------------------------------------------------------


def signal_in_step(patch, rank=0):
    """SIGTERM in the middle of the fifth step."""
    before(patch, state.Training, "clip_gradients",
           lambda training, *_: training.step == 4 and rank == RANK and kill(signal.SIGTERM))


def signal_in_validation(patch, rank=0):
    """SIGTERM when the validation after step 6 begins."""
    before(patch, train.Trainer, "validate", lambda run: run.state.step == 6 and rank == RANK and kill(signal.SIGTERM))


def signal_in_preview(patch, rank=0, step=3):
    """Ctrl-C when the preview of a step begins."""
    before(patch, train, "preview", lambda *args: int(args[3].stem) == step and rank == RANK and kill(signal.SIGINT))


def signal_in_figures(patch, rank=0):
    """SIGTERM in the middle of the first batch that this process draws for figures; another process waits for it."""
    calls = []
    before(patch, drawing, "generate", lambda *_: (calls.append(1), time.sleep(0.5), len(calls) == 1 and rank == RANK
                                                   and kill(signal.SIGTERM)))


def signal_in_checkpoint(patch):
    """SIGTERM when the checkpoint of step 4 is written."""
    before(patch, checkpoint, "save", lambda path, *_: path.stem == "0000004" and kill(signal.SIGTERM))


def killed_in_write(patch, nth):
    """Killed before the nth write to a file of a checkpoint."""
    writes = []
    before(patch, files.HashingFile, "write", lambda *_: writes.append(1) or (len(writes) == nth and kill()))


def rank_1_killed(patch):
    """Rank 1 is killed in its seventh step, unless torchrun has restarted it."""
    before(patch, state.Training, "clip_gradients",
           lambda training, *_: training.step == 6 and RANK == 1 and FIRST_LAUNCH and kill())


def data_worker_killed(patch):
    """The first data worker of the last process is killed at its first batch."""
    before(patch, datasets.ArrayImages, "__getitems__", lambda *_: get_worker_info() and RANK == WORLD_SIZE - 1 and kill())


# --- time ----------------------------------------------------------------------------------------


def slow_steps(patch):
    before(patch, train.Trainer, "finish_step", lambda run: time.sleep(0.05))


def slow_steps_noted(patch):
    """Each process also writes which step it reads, in a world of which size, to `rows-PID.txt`."""
    def note(global_order, step):
        with open(f"rows-{os.getpid()}.txt", "a") as file:
            print(step, WORLD_SIZE, RANK, file=file)

    before(patch, train.Trainer, "finish_step", lambda run: time.sleep(0.1))
    before(patch, order.GlobalOrder, "batch", note)


def aot_eager(patch):
    """--compile takes seconds: the graphs of inductor without its kernels."""
    patch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))


# --- files ---------------------------------------------------------------------------------------


def disk_that_cannot_be_read(patch):
    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    patch.setattr(torch, "load", fail)


def disk_full_at_step_8(patch):
    """From the checkpoint of step 8 on, this process may write no file larger than 50 kB."""
    limits = 50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    before(patch, checkpoint, "save",
           lambda path, *_: path.stem == "0000008" and resource.setrlimit(resource.RLIMIT_FSIZE, limits))


# --- failures ------------------------------------------------------------------------------------


def fail(error):
    raise error


def data_gone(patch, rank=0):
    """No sample of the sixth global batch, or of a later one, can be read on one process."""
    before(patch, datasets.ArrayImages, "__getitems__", lambda data, rows: rank == RANK and len(read) >= 5 and fail(
        UserError("the data's drive is gone")))
    before(patch, state.Training, "begin_step", lambda training: read.append(1))
    read = []


def data_that_never_comes(patch):
    """From the sixth global batch on, the last process waits for its data; it has no end."""
    read = []

    def wait(*_):
        read.append(1)
        if len(read) >= 6 and RANK == WORLD_SIZE - 1:
            print("waits", flush=True)
            time.sleep(600)

    before(patch, datasets.ArrayImages, "__getitems__", wait)


def rank_1_silent(patch):
    """Rank 1 stops answering in its fourth step, and is not lost."""
    before(patch, state.Training, "begin_step", lambda training: training.step == 3 and RANK == 1 and time.sleep(600))


def bug_in_step(patch, step=4, error=TypeError):
    """A bug of ours in the last backward pass of a step."""
    before(patch, state.Training, "clip_gradients",
           lambda training, *_: training.step == step and fail(error("a bug")))


def bug_in_preview(patch):
    before(patch, train, "preview", lambda *_: fail(TypeError("a bug")))


def bug_in_optimizer(patch):
    """Between the optimizer's fifth step and the count of it."""
    before(patch, state.Training, "update_ema", lambda training, *_: training.step == 4 and fail(TypeError("a bug")))


# --- numbers -------------------------------------------------------------------------------------


def nan_loss(patch, rank, *calls):
    """The losses of these calls, counted from 1 and without validation, are not a number on one process."""
    losses, counted = objective.Objective.losses, []

    def poisoned(*args):
        terms = losses(*args)
        if not args[1].training:
            return terms
        counted.append(1)
        return terms | {"loss": terms["loss"] * float("nan")} if rank == RANK and len(counted) in calls else terms

    patch.setattr(objective.Objective, "losses", poisoned)


def worse_validations(patch):
    """The validation losses of the EMA are 3, 2, 2.5, 2 and 1."""
    losses, validated_at = iter([3.0, 2.0, 2.5, 2.0, 1.0]), state.Training.validated_at
    patch.setattr(state.Training, "validated_at", lambda training, loss: validated_at(training, next(losses)))


if __name__ == "__main__":
    name, *numbers = re.split("[:,]", sys.argv.pop(1))
    globals()[name](builtins, *map(int, numbers))
    sys.argv[0] = "train.py"
    cli.run(train.main, train.build_parser())
