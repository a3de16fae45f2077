"""Which samples a step reads, and how they are loaded."""

import atexit
import multiprocessing
import re
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from runtime import UserError
from runtime.processes import SIGNALS
from training.rows import Readable, Rows


class GlobalOrder:
    """Which samples step k reads: a new permutation each epoch, which depends only on (seed, epoch, position).

    A batch may cross the end of an epoch, so every sample is read equally often.

    Args:
        length: number of samples in the data set.
        batch_size: size of the global batch, over all processes.
        rank, world_size, grad_accum: these select `rows`, the rows of a global batch in this process's micro-batches.
        flip: whether half of the samples, drawn from (seed, step), are read as mirror images.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, grad_accum: int = 1,
                 flip: bool = False):
        if batch_size % (world_size * grad_accum):
            raise UserError(f"`global_batch_size` {batch_size} is not divisible by {world_size} processes * "
                            f"`grad_accum` {grad_accum}")
        self.length, self.batch_size, self.seed, self.flip = length, batch_size, seed, flip
        size = batch_size // (world_size * grad_accum)
        starts = [(micro * world_size + rank) * size for micro in range(grad_accum)]
        self.rows = [slice(start, start + size) for start in starts]

    def batch(self, step: int) -> Rows:
        """The global batch of step `step`, counted from 0."""
        epochs, positions = np.divmod(np.arange(step * self.batch_size, (step + 1) * self.batch_size), self.length)
        indices = [permutation(self.seed, int(epoch), self.length)[positions[epochs == epoch]] for epoch in np.unique(epochs)]
        mirrored = np.random.default_rng((self.seed, step, 1)).random(self.batch_size) < (0.5 if self.flip else 0.0)
        return Rows(np.concatenate(indices), mirrored)

    def micro_batches(self, steps: range) -> Iterator[Rows]:
        """What this process reads: its micro-batches, step after step."""
        for step in steps:
            batch = self.batch(step)
            for rows in self.rows:
                yield Rows(*(part[rows] for part in batch))


@lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """An epoch's order of the samples."""
    return np.random.default_rng((seed, epoch)).permutation(length)


class Batches:
    """Iterator over this process's micro-batches, on `device`. The next one is copied while one is in use.

    `waited` counts the seconds spent waiting for data; `unreadable` maps rows that could not be read to the reasons.
    """

    def __init__(self, dataset: Readable, order: GlobalOrder, steps: range, num_workers: int, device: torch.device):
        self.device, self.waited, self.unreadable = device, 0.0, {}
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # parallel to the computing stream
        self.loader = read_ahead(dataset, order.micro_batches(steps), num_workers, pin_memory=device.type == "cuda")
        self.upcoming = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        ready = self.upcoming or self._fetch()
        if self.copies and ready:
            torch.cuda.current_stream().wait_stream(self.copies)
            for part in ready:
                part.record_stream(torch.cuda.current_stream())
        self.upcoming = self._fetch()
        self.waited += time.perf_counter() - start
        if ready is None:
            raise StopIteration
        return ready

    def read_waited(self) -> float:
        """The seconds waited since the last reading."""
        waited, self.waited = self.waited, 0.0
        return waited

    def _fetch(self) -> tuple[Tensor, Tensor] | None:
        if (batch := next(self.loader, None)) is None:
            return None
        *parts, unreadable = batch
        self.unreadable |= unreadable
        with torch.cuda.stream(self.copies):  # stream None: keep the current one
            return tuple(part.to(self.device, non_blocking=True) for part in parts)


def read_ahead(dataset: Dataset, batches: Iterable, num_workers: int, pin_memory: bool = False) -> Iterator:
    """The data set's batch for each element of `batches`, in order, read by worker processes.

    Raises:
        OSError, UserError: a file cannot be read, or a worker died. The message has no worker's traceback.
    """
    atexit.register(end_workers)
    try:
        yield from DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=hand_over,
                              pin_memory=pin_memory, worker_init_fn=leave_signals_to_the_parent)
    except (OSError, UserError) as error:
        raise type(error)(re.sub(r"^[\w.]+: ", "", str(error).strip().splitlines()[-1])) from None
    except RuntimeError as error:
        if re.search("(allocate|out of) shared memory", str(error)):
            size = shutil.disk_usage("/dev/shm").total / 2**20
            raise OSError(f"/dev/shm, where data workers put what they have read, is full; its size is {size:,.0f} MiB. Make "
                          "it larger (docker run --shm-size 16g), or try fewer `num_workers`") from None
        if not str(error).startswith("DataLoader worker (pid"):  # torch's message if a worker died
            raise
        raise OSError(f"a data worker died ({error}), perhaps for lack of memory; try fewer `num_workers`") from None


def hand_over(batch: Iterable) -> tuple:
    """Put the tensors of a batch into shared memory. The queue would do it, but if that fails it loses the batch in silence."""
    if get_worker_info():
        for part in batch:
            if isinstance(part, Tensor):
                part.share_memory_()
    return tuple(batch)


def end_workers() -> None:
    """Kill the remaining data workers when this process ends. Python would wait for ever, because they ignore SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's handler reports a killed worker as an error
    for child in multiprocessing.active_children():
        child.kill()


def leave_signals_to_the_parent(worker: int) -> None:
    """Ignore Ctrl-C, torchrun's SIGTERM and the like. They reach the whole process group, but the parent needs its batches."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
