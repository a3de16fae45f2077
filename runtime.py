"""What every script stands on: processes, addressed randomness, the command line with one-line errors, log and tracker."""

import hashlib
import importlib.util
import inspect
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import jsonargparse
import torch
import torch.distributed as dist
import yaml

# --- processes -----------------------------------------------------------------------------------

PATIENCE = timedelta(hours=2)  # of the other processes, while the main one downloads, or draws previews


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes."""
        total = value.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total / self.size

    def on_main(self, function: Callable):
        """The main process's result of a function, on every process; what it raises is raised on all."""
        outcome = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def main_first(self, function: Callable):
        """Every process's own result of a function that the main one calls first, to download what the others find."""
        results = []
        self.on_main(lambda: results.append(function()))
        return results[0] if results else function()


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
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=target if kind == "cuda" else None,
                                timeout=PATIENCE)
    return World(dist.get_rank(), dist.get_world_size(), target)


# --- addressed randomness ------------------------------------------------------------------------


def generator(*address: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers are a function of its address alone, such as ("noise", seed, image, step)."""
    digest = hashlib.blake2b(repr(address).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


# --- command line --------------------------------------------------------------------------------

_checked = False  # see checks_are_done

class ArgumentParser(jsonargparse.ArgumentParser):
    """Flags over a YAML `--config`, whichever comes first on the command line; an error is one line and exit code 2."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)
        self.add_argument("--config", action="config", help="YAML file of flags, written with underscores; flags override it")

    def add_shared_arguments(self) -> None:
        """The flags that every script has."""
        self.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: cuda where there is one, else cpu")
        self.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast, fp32 weights")
        self.add_argument("--compile", action="store_true", help="torch.compile the model")

    def parse_args(self, args=None, *rest, **options):
        args = list(sys.argv[1:] if args is None else args)
        configs = []
        for i in reversed(range(len(args))):
            if args[i] == "--config":
                configs = args[i : i + 2] + configs
                del args[i : i + 2]
            elif args[i].startswith("--config="):
                configs = [args.pop(i), *configs]
        return super().parse_args(configs + args, *rest, **options)

    def error(self, message: str, ex: Exception | None = None) -> None:
        fail(plain_words(message))


def plain_words(message: object, is_flag: bool = True) -> str:
    """jsonargparse's message, shortened to the flag (or key), what it takes and what it got."""
    def name(key: re.Match) -> str:
        return f"--{key[1].replace('_', '-')}:" if is_flag else f"{key[1]}:"

    text = re.sub(r'Parser key "([\w.]+)":', name, one_line(message))
    text = re.sub(r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .* Given value: (.*)",
                  r"Expected one of \1. Got value: \2", text)
    return re.sub(r"<class '(\w+)'>", r"\1", text).replace("NoneType", "null")


def check_arguments(function: Callable, arguments: dict, flag: str, skip: set[str] = frozenset()) -> dict:
    """`arguments`, with names and types as the signature of `function` has them; ValueError that names the flag."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(function) else parser.add_function_arguments
    add(function, as_group=False, skip=set(skip))
    allowed = [action.dest for action in parser._actions if action.dest != "help"]
    for name in arguments:
        if name not in allowed:
            raise ValueError(f"{flag}: unknown key {name!r}; allowed: {', '.join(allowed)}")
    try:
        checked = parser.parse_object(dict(arguments)).as_dict()
    except jsonargparse.ArgumentError as error:
        raise ValueError(f"{flag}: {plain_words(error, is_flag=False)}") from None
    return {name: checked[name] for name in arguments}


def naming(flag: str, function: Callable):
    """The function's result; a ValueError, or what a wrong number breaks inside a library, names the flag it came from."""
    try:
        return function()
    except (ValueError, TypeError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{flag}: {error}") from None


def run(main: Callable, parser: ArgumentParser) -> None:
    """Run a script's main on the command line's flags. A wrong input is one line on stderr and exit code 2.

    Wrong input means an OSError, or a ValueError raised in this project's own code: one from inside a library is a bug
    here, and keeps its traceback. After a failure the process group is not destroyed, which would wait for the others.
    """
    args = parser.parse_args()
    try:
        main(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (ValueError, OSError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = raised_in.is_relative_to(Path(__file__).parent) and ".venv" not in raised_in.parts
        if isinstance(error, OSError) or ours:
            fail(error)
        raise


def fail(message: object) -> None:
    """Say it in one line and exit with code 2. What is wrong for all processes is said by the main one alone."""
    rank = int(os.environ.get("RANK", 0))
    if rank == 0:
        print(f"{Path(sys.argv[0]).name}: error: {one_line(message)}", file=sys.stderr)
    elif _checked:
        print(f"{Path(sys.argv[0]).name}: error on rank {rank}: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def checks_are_done() -> None:
    """Said once all processes have checked the same input: from here on each one reports what fails on it."""
    global _checked
    _checked = True


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def check_writable(folder: str | Path) -> Path:
    """Create a folder if need be; OSError that names it where nothing can be written to it."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to the folder {folder}: {error.strerror}") from None
    return folder


# --- log and tracker -----------------------------------------------------------------------------


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
        self.tracker = TRACKERS[tracker](folder, config)

    def say(self, text: str) -> None:
        if self.active:
            print(text, flush=True)
            with open(self.folder / "log.txt", "a") as file:
                file.write(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}\n")

    def record(self, step: int, **scalars: float) -> None:
        """One line of metrics.jsonl."""
        if self.active:
            with open(self.metrics, "a") as file:
                file.write(json.dumps({"step": step, **scalars}) + "\n")
            self.tracker.scalars(step, scalars)

    def image(self, step: int, path: Path) -> None:
        if self.active:
            self.tracker.image(step, path)

    def close(self) -> None:
        if self.active:
            self.tracker.close()


class NoTracker:
    """What a tracker is asked; this one does nothing."""

    def __init__(self, folder: Path, config: dict): ...
    def scalars(self, step: int, values: dict[str, float]) -> None: ...
    def image(self, step: int, path: Path) -> None: ...
    def close(self) -> None: ...


class TensorBoardTracker(NoTracker):
    """Event files under the run's folder."""

    def __init__(self, folder: Path, config: dict):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(folder / "tensorboard")
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

    def __init__(self, folder: Path, config: dict):
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
