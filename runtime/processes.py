"""The processes of a run, their signals, and copies to their devices."""

import contextlib
import ctypes
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime import UserError

TIMEOUT = timedelta(hours=2)  # how long processes wait while the main one downloads or counts a folder's images
STEP_TIMEOUT = 1800.0  # seconds, from the first step on; DINEXT_TIMEOUT in the environment changes it
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP,  # SIGHUP: the terminal, or ssh, was closed
           signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)  # of submitit, PBS, SGE and `ulimit -t` before they kill
PATIENCE = 10  # seconds that a process which is to stop waits for its data, so that all can stop at the same step
MAX_CALLS = 20  # steps between two questions for signals, should the steps become slower at once
BUCKET_MB = 100  # of gradients in one message of DDP: its default, 25, suits one machine, where latency is lower


class CommonError(UserError):
    """An error that all processes raise at once. The main process reports it."""


@dataclass(frozen=True)
class World:
    """This process's `rank` among `size` processes, and the device it computes on."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store = field(default_factory=dist.HashStore, compare=False)  # what the processes share

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def add(self, name: str, amount: int) -> int:
        """Add to a count that all processes share. Returns the new value."""
        return self.store.add(name, amount)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        total = value.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total / self.size

    def on_main(self, function: Callable):
        """Call a function on the main process and return its result on every process. An exception there ends all processes."""
        outcome, failure = [None, None], None
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1], failure = str(error), error
        if self.size > 1:
            dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise failure or CommonError(outcome[1])
        return outcome[0]

    def main_first(self, function: Callable):
        """Call a function on every process, on the main one first: it downloads what the others then find."""
        results = []
        self.on_main(lambda: results.append(function()))
        return results[0] if results else function()

    def gather(self, part: object) -> list:
        """The parts of all processes, in the order of ranks, on the main process. The list is empty on the others."""
        if self.size == 1:
            return [part]
        parts = [None] * self.size if self.is_main else None
        dist.gather_object(part, parts)
        return parts or []


def start_world(device: str | None, tf32: bool = True) -> World:
    """Join the other processes if torchrun started any.

    Args:
        device: "cpu", "cuda" or "mps"; None takes CUDA if available, else the CPU.
        tf32: CUDA may round the factors of fp32 products and convolutions to TF32. Only this function sets it.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    backends = {"cpu": torch.cpu, "cuda": torch.cuda, "mps": torch.backends.mps}
    available = [name for name, backend in backends.items() if backend.is_available()]
    kind = device or ("cuda" if "cuda" in available else "cpu")
    if kind not in available:
        raise UserError(f"`device` {kind} is not available on this machine; available: {', '.join(available)}")
    if kind == "cpu":
        keep_freed_memory()
        torch.set_flush_denormal(True)  # numbers below 1e-38 are slow: with them a step of ConvAdaLN took 4 times as long
    local_rank, local_size = of_launch("LOCAL_RANK", 0), of_launch("LOCAL_WORLD_SIZE", 1)
    if kind == "cuda":
        if local_size > torch.cuda.device_count():
            raise UserError(f"--nproc_per_node {local_size} is more than this machine's {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local_rank)
    target = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    check_launch(os.environ)
    if "RANK" not in os.environ:
        return World(0, 1, target)
    step_timeout()
    torchrun_store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = fresh_store(torchrun_store, rank, size)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=size,
                            device_id=target if kind == "cuda" else None, timeout=TIMEOUT)
    return World(rank, size, target, store)


def of_launch(name: str, alone: int) -> int:
    """LOCAL_RANK or LOCAL_WORLD_SIZE. Without RANK this process is `alone`, and another program has left them there."""
    return int(os.environ.get(name, alone)) if "RANK" in os.environ else alone


def check_launch(env: Mapping[str, str]) -> None:
    """Raises UserError if this is one of several processes that would not find each other."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not env.get(name)]
    if missing and ("RANK" in env or env.get("WORLD_SIZE", "1") != "1"):
        given = [name for name in names if name not in missing]
        raise UserError(f"{', '.join(given) or 'RANK'} is set in the environment, {', '.join(missing)} is not: start the "
                        f"processes with torchrun, or unset {' and '.join(given) or 'RANK'}")
    tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
    if missing and tasks.isdecimal() and int(tasks) > 1:
        advice = f"{tasks} tasks of SLURM would each do the whole work alone: start torchrun with srun, one task a machine"
        if "SLURM_STEP_NUM_TASKS" in env:  # srun has started this process
            raise UserError(advice)
        print(f"If srun started this: {advice}", file=sys.stderr)  # or it is a script's only process


def step_timeout() -> timedelta:
    given, seconds = os.environ.get("DINEXT_TIMEOUT", str(STEP_TIMEOUT)), 0.0
    with contextlib.suppress(ValueError):
        seconds = float(given)
    if not 1 <= seconds < 1e6:
        raise UserError(f"DINEXT_TIMEOUT={given} in the environment is not a number of seconds, at least 1")
    return timedelta(seconds=seconds)


def set_timeouts(*groups: dist.ProcessGroup | None) -> None:
    """From now on processes wait `step_timeout` for each other: nobody prepares data any more, so a silent one is lost."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # the second before torch 2.14
    for group in groups:
        set_timeout(step_timeout(), group)


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones. Peak memory does not change.

    By default it returns large blocks to Linux, and each page of a new block costs a page fault: 15 % of a training step of
    DiNext/1 128x3, 9 % of DiT/1 96x3 (benchmarks/compare.py's `training_step`).
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, each at its maximum
        mallopt(-3, 2**25)


def fresh_store(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of torchrun's store that only the processes of this start use.

    torchrun keeps one store over restarts, with addresses of dead processes. Restart counts can differ between machines
    (pytorch issue 135712), so they do not identify a start. Instead rank 0 draws a random name and sends it to every process
    that asks; each asks under its own random name.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", name)
        answer = store.get(f"answer/{name}").decode()
        store.set(f"{answer}/{rank}", "knows")
        return dist.PrefixStore(answer, store)
    asking = set(range(1, size))
    while asking:
        for other in asking.copy():
            if store.check([f"{name}/{other}"]):
                asking.remove(other)
            elif store.check([f"asks/{other}"]):  # perhaps of a dead process; the live one will ask again
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", name)
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def distribute(model: nn.Module, world: World) -> nn.Module:
    """Wrap a network `model(x, t, y)` in DDP if there are several processes.

    DDP reorders its buckets after the first backward pass, which changes the order of sums. That pass is made here and its
    gradients are discarded, and what it changes in buffers, such as BatchNorm's statistics, so a continued run sums in the same
    order as an uninterrupted one.
    """
    if world.size == 1:
        return model
    network = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MB)
    before = [buffer.clone() for buffer in model.buffers()]
    x, t = (torch.zeros(2, *shape, device=world.device) for shape in ((model.in_channels, *model.input_size), ()))
    for _ in range(2):  # buckets are sorted at the start of the second pass
        total(network(x, t, t.long())).backward()
        model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before):
            buffer.copy_(value)
    return network


def total(output: Any) -> Tensor:
    """The sum of all numbers in a network's output: a tensor, or tuples and dicts of them."""
    if isinstance(output, Tensor):
        return output.sum()
    return sum(map(total, output.values() if isinstance(output, dict) else output))


class Stopped(BaseException):
    """Raised on all processes when they agree to stop. Not an Exception, all of which decoders of pictures may raise."""


class NoData(BaseException):
    """Raised in the middle of reading, on a process that is to stop."""


class StopSignal:
    """Stops all processes at the same step after one of SIGNALS to any of them. They agree over gloo, without the GPU."""

    def __init__(self, world: World):
        self.name, self.waits, self.failed = "", False, False  # failed: the data cannot be read on
        self.calls, self.every, self.asked = 0, 1, time.monotonic()
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT) if world.size > 1 else None
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        if self.waits and not self.name:
            self._limit_wait()
        self.name = signal.Signals(number).name

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The process waits for data in this block. If a signal has come, the wait ends after PATIENCE seconds.

        Raises:
            Stopped: there is only this process.
            UserError: there are others, which wait for this one: they cannot be asked, and fail after it.
        """
        self.waits, self.failed = True, True
        if self.name:
            self._limit_wait()
        try:
            yield
            self.failed = False
        except NoData:
            raise UserError(f"stopped by {self.name} while no data came for {PATIENCE} s; the same command goes on") from None
        finally:
            self.waits = False
            if self.name:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _limit_wait(self) -> None:
        signal.signal(signal.SIGALRM, self._end_wait)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE if self.group else 1)

    def _end_wait(self, number: int, frame) -> None:
        raise NoData if self.group else Stopped(self.name)

    def check(self, paced: bool = False) -> None:
        """All processes must call this together. Raises Stopped on all of them if any received a signal.

        With `paced`, which is for frequent calls, they ask each other about once a second. In the same message in which they
        tell of signals they agree after how many such calls that is, so all of them ask at the same call.
        """
        self.calls += paced
        if self.group is None:
            received = bool(self.name)
        elif paced and self.calls < self.every:
            return
        else:
            now = time.monotonic()
            wanted = min(self.calls / max(now - self.asked, 1e-9), 2 * self.every, MAX_CALLS)  # no leap after one quick call
            message = torch.tensor([float(bool(self.name)), -wanted])
            dist.all_reduce(message, dist.ReduceOp.MAX, group=self.group)
            received, self.every = message[0] > 0, max(1, int(-message[1]))
            self.calls, self.asked = 0, time.monotonic()
        if received:
            raise Stopped(self.name or "a signal to another process")


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Exact fp32 products on CUDA in this block."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = allowed


class Delayed:
    """A number of a device, as it is now, to be read later. On CUDA it is copied without waiting for pending work."""

    def __init__(self, value: Tensor):
        self.value = value.to("cpu", copy=True, non_blocking=value.is_cuda)
        self.copied = torch.cuda.current_stream().record_event() if value.is_cuda else None

    def read(self) -> float:
        if self.copied:
            self.copied.synchronize()
        return float(self.value.numpy())


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor without waiting for pending work of the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def cast_weights(model: nn.Module, precision: str) -> None:
    """For "bf16": cast the weights of linear layers and convolutions once, in place. The outputs remain the same.

    Autocast would cast them in every call, because it caches only weights that need a gradient.
    """
    if precision == "bf16":
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                module.to(torch.bfloat16)
