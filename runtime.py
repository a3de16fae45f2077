"""What every script stands on: processes, signals, addressed randomness, one-line errors, the log of a run and trackers."""

import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import jsonargparse
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# --- processes -----------------------------------------------------------------------------------

TIMEOUT = timedelta(hours=2)  # of the other processes, while the main one downloads or counts a folder's images


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, and the device it computes on."""

    rank: int
    size: int
    device: torch.device
    counts: Counter = field(default_factory=Counter, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def add(self, name: str, amount: int) -> int:
        """Add to a count that all processes share; its new value."""
        if self.size > 1:
            return dist.distributed_c10d._get_default_store().add(name, amount)
        self.counts[name] += amount
        return self.counts[name]

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        total = value.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total / self.size

    def on_main(self, function: Callable):
        """The main process's result of a function, on every process; what it raises there ends them all."""
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
        """Every process's own result of a function that the main one calls first, to download what the others find."""
        results = []
        self.on_main(lambda: results.append(function()))
        return results[0] if results else function()

    def gather(self, part: object) -> list:
        """The part of each process, in the order of ranks; on the main process alone, empty on the others."""
        parts = [None] * self.size if self.is_main else None
        if self.size > 1:
            dist.gather_object(part, parts)
        return [part] if self.size == 1 else parts or []


def start_world(device: str | None) -> World:
    """Join the other processes that torchrun started, if it did; `device` None takes CUDA where there is one."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[kind]:
        raise ValueError(f"--device {kind}: this machine has none; available: "
                         f"{', '.join(name for name, there in available.items() if there)}")
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if kind == "cuda":
        if local_size > torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node {local_size} is more than this machine's {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local_rank)
    target = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if "RANK" not in os.environ:
        return World(0, 1, target)
    if not dist.is_initialized():
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=fresh_store(store, rank, size), rank=rank,
                                world_size=size, device_id=target if kind == "cuda" else None, timeout=TIMEOUT)
    return World(dist.get_rank(), dist.get_world_size(), target)


def fresh_store(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of torchrun's store that the processes of this start alone know.

    torchrun keeps one store over restarts, with the addresses of dead processes in it, to which the new ones would
    connect; nor do its restart counts agree between machines (pytorch issue 135712). So rank 0 invents a name, and tells
    it to every process that asks under a name of its own.
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
            elif store.check([f"asks/{other}"]):  # a dead process may have asked: then the living one will ask anew
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", name)
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def distribute(model: nn.Module, world: World) -> nn.Module:
    """A network `model(x, t, y)` under DDP, where there are processes to share the work with.

    DDP sorts its buckets after the first backward pass, by when gradients came, and so sums in another order from then
    on. That pass is made here, with gradients thrown away, for a continued run to sum as one that was never stopped.
    """
    if world.size == 1:
        return model
    network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    x, t = (torch.zeros(1, *shape, device=world.device) for shape in ((model.in_channels, *model.input_size), ()))
    for _ in range(2):  # they are sorted at the beginning of the second pass
        network(x, t, t.long()).sum().backward()
        model.zero_grad(set_to_none=True)
    return network


class Stopped(Exception):
    """All processes agreed to stop."""


class StopSignal:
    """SIGTERM and SIGINT, heard by any process and answered by all of them at the same moment.

    The processes agree over gloo, host to host: no process waits for its GPU.
    """

    def __init__(self, world: World):
        self.name = ""
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame) -> None:
        self.name = signal.Signals(number).name

    def check(self) -> None:
        """To be called by all processes together: raises Stopped on all if any of them heard a signal."""
        heard = torch.tensor(float(bool(self.name)))
        if self.group is not None:
            dist.all_reduce(heard, dist.ReduceOp.MAX, group=self.group)
        if heard:
            raise Stopped(self.name or "a signal to another process")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# --- addressed randomness ------------------------------------------------------------------------


def generator(*address: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers are a function of its address alone, such as ("noise", seed, image, step)."""
    digest = hashlib.blake2b(repr(address).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


# --- command line --------------------------------------------------------------------------------

class ArgumentParser(jsonargparse.ArgumentParser):
    """Flags over a YAML `--config`, whichever comes first on the command line; an error is one line and exit code 2."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)
        self.add_argument("--config", action="config", help="YAML file of flags, written with underscores; flags override it")

    def add_device_argument(self) -> None:
        self.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: cuda where there is one, else cpu")

    def add_shared_arguments(self) -> None:
        """The flags that every script with a network of ours has."""
        self.add_device_argument()
        self.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast, fp32 weights")
        self.add_argument("--compile", action="store_true", help="torch.compile the model")

    def add_data_arguments(self) -> None:
        """The flags of the scripts that read images."""
        self.add_argument("--data-path", required=True, help="digits, mnist, cifar10, a folder of classes, or cached features")
        self.add_argument("--data-root", default="data", help="where named data sets lie")
        self.add_argument("--vae", type=str | None, help="ema (default), mse, pixels, a folder, an own run, or a hub id")
        self.add_argument("--image-size", type=int | None, help="default: the data's own, 256 for a folder of classes")
        self.add_argument("--num-classes", type=int | None, help="default: the data's, with which it must agree")
        self.add_argument("--num-workers", type=int, default=min(4, os.cpu_count()), help="of each process, to read data")

    def parse_args(self, args=None, *rest, **options):
        args = list(sys.argv[1:] if args is None else args)
        configs = []
        for i in reversed(range(len(args))):
            if args[i] == "--config":
                configs = args[i : i + 2] + configs
                del args[i : i + 2]
            elif args[i].startswith("--config="):
                configs = [args.pop(i), *configs]
            elif re.match(r"--[\w-]+\.\w+\.", args[i]):
                self.error(f"{args[i]}: a dotted flag changes one entry of a dictionary, not an entry of an entry")
        return super().parse_args(configs + args, *rest, **options)

    def dump(self, *args, **options) -> str:
        """The flags as YAML, each below its help: what --print_config prints."""
        helps = {action.dest: action.help for action in self._actions}
        return re.sub(r"^(\w+):", lambda key: f"# {helps[key[1]]}\n{key[0]}", super().dump(*args, **options), flags=re.M)

    def error(self, message: str, ex: Exception | None = None) -> None:
        fail(plain_words(message))


def plain_words(message: object, is_flag: bool = True) -> str:
    """jsonargparse's message, shortened to the flag (or key), what it takes and what it got."""
    def name(key: re.Match) -> str:
        return f"--{key[1].replace('_', '-')}:" if is_flag else f"{key[1]}:"

    text = re.sub(r'Parser key "([\w.]+)"(?: element \d+)?:', name, one_line(message))
    text = re.sub(r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .* Given value: (.*)",
                  r"Expected one of \1. Got value: \2", text)
    return re.sub(r"<class '(\w+)'>", r"\1", text).replace("NoneType", "null")


def check_arguments(function: Callable, arguments: dict, flag: str, skip: set[str] = frozenset(),
                    beside: tuple[str, ...] = ()) -> dict:
    """`arguments`, with names and types as the signature of `function` has them; ValueError that names the flag.

    `skip` are parameters that the flag does not take, `beside` keys that it takes for others than `function`.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(function) else parser.add_function_arguments
    add(function, as_group=False, skip=set(skip))
    allowed = [action.dest for action in parser._actions if action.dest != "help"]
    for name in arguments:
        if name not in allowed:
            raise ValueError(f"{flag}: unknown key {name!r}; allowed: {', '.join([*allowed, *beside])}")
    try:
        checked = parser.parse_object(dict(arguments)).as_dict()
    except jsonargparse.ArgumentError as error:
        raise ValueError(f"{flag}: {plain_words(error, is_flag=False)}") from None
    return {name: checked[name] for name in arguments}


def check_numbers(args, names: list[str], allowed: str, fine: Callable[[float], bool]) -> None:
    """ValueError that names the first flag whose number (or one of whose numbers) is not fine; None is left alone."""
    for name in names:
        given = getattr(args, name)
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and not fine(value):
                raise ValueError(f"--{name.replace('_', '-')} {value} is not {allowed}")


def check_data_arguments(args) -> None:
    check_numbers(args, ["image_size", "num_classes"], "at least 1", lambda n: n >= 1)
    check_numbers(args, ["num_workers"], "at least 0", lambda n: n >= 0)


def naming(flag: str, function: Callable):
    """The function's result; a ValueError, or what a wrong number breaks inside a library, names the flag it came from."""
    try:
        return function()
    except (ValueError, TypeError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{flag}: {error}") from None


def run(main: Callable, parser: ArgumentParser) -> None:
    """Run a script's main on the command line's flags. What a user can mend is one line on stderr and exit code 2.

    That is an OSError, a ValueError raised in this project's own code (one from inside a library is a bug here, and keeps
    its traceback), and the loss of another process. After a failure the process group is not destroyed, which would wait
    for the others.
    """
    args = parser.parse_args()
    try:
        main(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, CommonError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = raised_in.is_relative_to(Path(__file__).parent) and ".venv" not in raised_in.parts
        if not isinstance(error, ValueError) or ours:
            fail(error, common=isinstance(error, CommonError))
        raise
    except RuntimeError as error:
        if dist.is_initialized() and re.search("gloo|NCCL|[Cc]onnection", str(error)):
            reason = str(error).split(". ")[0]
            fail(f"lost another process of this run; the same command continues it from its last checkpoint ({reason})")
        raise


class CommonError(Exception):
    """What is wrong for all processes at once; the main one says it."""


def fail(message: object, common: bool = False) -> None:
    """Say it in one line and exit with code 2: the main process what is common to all, else the first one to fail."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" if common else first_to_fail():
        where = "" if rank == "0" else f" (rank {rank})"
        print(f"{Path(sys.argv[0]).name}: error: {one_line(message)}{where}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(2)  # the collectives under way never end, nor would an orderly exit
    sys.exit(2)


def first_to_fail() -> bool:
    """Whether no other process has told a failure yet: a lost process is missed by all the others at once."""
    if not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("failures", 1) == 1
    except RuntimeError:  # the store is gone with the machine that held it
        return True


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def check_writable(folder: str | Path, size: int = 0) -> Path:
    """Create a folder if need be; OSError that names it where nothing can be written to it, or not `size` bytes."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to the folder {folder}: {error.strerror}") from None
    if (free := shutil.disk_usage(folder).free) < size:
        raise OSError(f"no space in the folder {folder}: {size / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free")
    return folder


def check_output(flag: str, path: str | None, suffix: str, size: int = 0) -> None:
    """ValueError or OSError that names the flag where it is not the name of such a file, or cannot be written."""
    if path is not None:
        if Path(path).suffix != suffix:
            raise ValueError(f"{flag} {path} is not the name of a {suffix}")
        check_writable(Path(path).parent, size)


# --- log and tracker -----------------------------------------------------------------------------


class LossMeter(nn.Module):
    """The training loss and how many steps were skipped, counted on the device and read only where a line is logged.

    A step whose loss or gradient norm is not finite on any process is skipped by all. The buffers belong to a checkpoint.
    """

    HORIZON = 100  # steps of the moving mean

    def __init__(self):
        super().__init__()
        for name in ("total", "count", "seen", "moving_mean", "skipped", "row", "longest_row"):
            self.register_buffer(name, torch.zeros(()))

    def update(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Count a step; 1.0 if it must be skipped, else 0.0, as AdamW's `found_inf` takes it. The loss is all processes'."""
        skip = (~(loss.isfinite() & grad_norm.isfinite())).float()
        loss = torch.where(skip > 0, 0.0, loss)
        self.total += loss
        self.count += 1 - skip
        self.seen += 1 - skip
        self.moving_mean += (1 - skip) * (loss - self.moving_mean) / self.seen.clamp(1, self.HORIZON)
        self.skipped += skip
        self.row.add_(skip).mul_(skip)
        self.longest_row.copy_(torch.maximum(self.longest_row, self.row))
        return skip

    def forgive(self) -> None:
        """Begin a new row: what was skipped before a restart shall not end the run after it."""
        self.row.zero_()
        self.longest_row.zero_()

    def read(self, max_skipped: int) -> dict[str, float]:
        """The mean loss since the last reading (nan if every step was skipped), its moving mean, all steps ever skipped.

        Raises:
            CommonError: so many steps in a row were skipped that the run has gone wrong.
        """
        if (row := int(self.longest_row)) >= max_skipped:
            raise CommonError(f"{row} steps in a row had a loss or gradient norm that is not finite. They were skipped: the "
                              "last checkpoint is good. Try a lower --lr, or clip_norm in --optimizer-args")
        values = {"loss": (self.total / self.count).item(), "loss_moving_mean": self.moving_mean.item(),
                  "skipped_steps": int(self.skipped)}
        for buffer in (self.total, self.count, self.longest_row):
            buffer.zero_()
        return values


class Stopwatch:
    """The time that steps took since the last reading, from each `start` to its `stop`."""

    def __init__(self):
        self.seconds, self.steps = 0.0, 0

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self.started
        self.steps += 1

    def read(self, batch_size: int, waited: float) -> dict[str, float]:
        """Images a second, and the share of the time that was `waited` for data."""
        values = {"images_per_second": self.steps * batch_size / self.seconds, "data_wait_share": waited / self.seconds}
        self.seconds, self.steps = 0.0, 0
        return values


def peak_memory(device: torch.device) -> float:
    """The most memory in use so far, in GiB: of tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on a Mac
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class Log:
    """A run's `log.txt`, `metrics.jsonl` and `config.yaml`, mirrored to a tracker. Silent but on the main process."""

    def __init__(self, folder: Path, world: World, step: int, tracker: str, config: dict):
        self.folder, self.active = folder, world.is_main
        if not self.active:
            return
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        self.metrics = folder / "metrics.jsonl"
        if self.metrics.exists():  # what an interrupted run logged after its last checkpoint will be logged again
            lines = self.metrics.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            temporary = self.metrics.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            temporary.replace(self.metrics)
        try:
            self.tracker = TRACKERS[tracker](folder, config, step)
        except Exception as error:  # whatever its server answers
            raise ValueError(f"--tracker {tracker} does not start: {error}") from None

    def say(self, text: str) -> None:
        if self.active:
            tqdm.write(text)
            sys.stdout.flush()
            with open(self.folder / "log.txt", "a") as file:
                file.write(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}\n")

    def record(self, step: int, **scalars: float) -> None:
        """One line of metrics.jsonl; what is not finite is null there."""
        if self.active:
            finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
            line = {"step": step, "time": round(time.time(), 1)} | finite
            with open(self.metrics, "a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())  # a checkpoint that survives a power cut shall find its log
            self.say(", ".join(f"{name} {value:.5g}" for name, value in ({"step": step} | scalars).items()))
            self._track("scalars", step, scalars)

    def image(self, step: int, path: Path) -> None:
        if self.active:
            self._track("image", step, path)

    def close(self) -> None:
        if self.active:
            self._track("close")

    def _track(self, method: str, *values) -> None:
        """Tell the tracker. A run is worth more than its mirror: when that fails, the run goes on without it."""
        try:
            getattr(self.tracker, method)(*values)
        except Exception as error:
            self.tracker = NoTracker(self.folder, {}, 0)
            self.say(f"The tracker failed, and is told no more: {one_line(error)}")


class NoTracker:
    """What a tracker is asked; this one does nothing. `step`: of the checkpoint that is continued."""

    def __init__(self, folder: Path, config: dict, step: int): ...
    def scalars(self, step: int, values: dict[str, float]) -> None: ...
    def image(self, step: int, path: Path) -> None: ...
    def close(self) -> None: ...


class TensorBoardTracker(NoTracker):
    """Event files under the run's folder."""

    def __init__(self, folder: Path, config: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=2, default=str)}\n```")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, path: Path) -> None:
        import numpy as np
        from PIL import Image
        self.writer.add_image("preview", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class MLflowTracker(NoTracker):
    """A run named as its folder, on the server of MLFLOW_TRACKING_URI; the run's id lies in the folder, to continue it."""

    def __init__(self, folder: Path, config: dict, step: int):
        import mlflow
        self.mlflow, id_file = mlflow, folder / "mlflow_run_id"
        run = mlflow.start_run(run_id=id_file.read_text() if id_file.exists() else None, run_name=folder.name)
        if not id_file.exists():
            id_file.write_text(run.info.run_id)
            mlflow.log_params(config)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.mlflow.log_metrics(values, step=step)

    def image(self, step: int, path: Path) -> None:
        self.mlflow.log_artifact(str(path), "previews")

    def close(self) -> None:
        self.mlflow.end_run()


def check_tracker(name: str) -> None:
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f"--tracker {name} needs the package {name}: pip install '.[track]'")


TRACKERS = {"none": NoTracker, "tensorboard": TensorBoardTracker, "mlflow": MLflowTracker}
