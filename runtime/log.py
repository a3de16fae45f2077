"""The log of a run, trackers that mirror it, what measures time, and peak memory."""

import importlib.util
import json
import math
import os
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from tqdm import tqdm

from runtime import UserError, cli
from runtime.files import write_text
from runtime.processes import World, synchronize


class Stopwatch:
    """The total time of steps since the last reading, each from `start` to `stop`."""

    def __init__(self):
        self.seconds, self.steps = 0.0, 0

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self.started
        self.steps += 1

    def read(self, batch_size: int, waited: float) -> dict[str, float]:
        """Images per second, and the share of the time spent waiting for data (`waited`, in seconds)."""
        values = {"images_per_second": self.steps * batch_size / self.seconds, "data_wait_share": waited / self.seconds}
        self.seconds, self.steps = 0.0, 0
        return values


class IdleTime:
    """The share of time that the device is idle between batches. Call `mark` at the start and at the end of each.

    Not counted: the delay before the first kernel of a batch, and gaps between its kernels, as with a network so small that
    it runs faster than it is launched. A profiler sees these.
    """

    def __init__(self, world: World):
        self.world, self.marks = world, []

    def mark(self) -> None:
        if self.world.device.type == "cuda":  # by the device's clock, as it runs asynchronously
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def share(self) -> float:
        """The mean share over all processes."""
        synchronize(self.world.device)
        cuda = self.world.device.type == "cuda"
        spans = [a.elapsed_time(b) if cuda else b - a for a, b in pairwise(self.marks)]  # busy, idle, busy, …, busy
        share = sum(spans[1::2]) / sum(spans) if spans else 0.0
        return self.world.mean(torch.tensor(share, device=self.world.device)).item()


def peak_memory(device: torch.device) -> float:
    """The peak memory so far, in GiB: of tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on a Mac
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class Log:
    """A run's `log.txt`, `metrics.jsonl` and `config.yaml`, mirrored to a tracker. Only the main process writes."""

    def __init__(self, folder: Path, world: World, step: int, tracker: str, config: dict):
        self.folder, self.active, self.tracker = folder, world.is_main, NoTracker(folder, {}, 0)
        if not self.active:
            return
        write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        self.metrics = folder / "metrics.jsonl"
        if self.metrics.exists():  # steps after the last checkpoint will be logged again
            lines = self.metrics.read_text(errors="replace").splitlines(keepends=True)
            steps = [step_of(line) for line in lines if line.endswith("\n")]  # the last one may have been cut by a kill
            write_text(self.metrics, "".join(line for line, of in zip(lines, steps) if of is not None and of <= step))
            if spoilt := steps.count(None):
                self.say(f"{self.metrics}: {spoilt} lines are damaged and were dropped")
        try:
            self.tracker = TRACKERS[tracker](folder, config, step)
        except Exception as error:  # a tracker's server can fail in any way
            raise UserError(f"`tracker` {tracker} does not start: {error}") from None

    def say(self, text: str) -> None:
        if self.active:
            self._append("log.txt", f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}\n")
            tqdm.write(text)
            sys.stdout.flush()

    def record(self, step: int, **scalars: float) -> None:
        """Write one line of metrics.jsonl. Values that are not finite become null."""
        if self.active:
            finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
            line = {"step": step, "time": round(time.time(), 1)} | finite
            self._append("metrics.jsonl", json.dumps(line) + "\n", sync=True)
            self.say(", ".join(f"{name} {value:.5g}" for name, value in ({"step": step} | scalars).items()))
            self._track("scalars", step, scalars)

    def image(self, step: int, path: Path) -> None:
        self._track("image", step, path)

    def close(self) -> None:
        self._track("close")

    def _append(self, name: str, line: str, sync: bool = False) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)  # it may have been removed during the run
        with open(self.folder / name, "a", errors="backslashreplace") as file:
            file.write(line)
            if sync:  # the log must survive a power cut if the checkpoint does
                file.flush()
                os.fsync(file.fileno())

    def _track(self, method: str, *values) -> None:
        """Call a method of the tracker. If the tracker fails, the run continues without it."""
        try:
            getattr(self.tracker, method)(*values)
        except Exception as error:
            self.tracker = NoTracker(self.folder, {}, 0)
            self.say(f"tracker disabled after an error: {cli.one_line(error)}")


def step_of(line: str) -> float | None:
    """The step of a line of metrics.jsonl; None if the line is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


class NoTracker:
    """The methods of a tracker; this one does nothing. `step`: the step of the checkpoint that the run continues."""

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
        self.writer.add_image("preview", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class MLflowTracker(NoTracker):
    """A run named like its folder, on the server of MLFLOW_TRACKING_URI. The folder stores the run's id, to continue it."""

    def __init__(self, folder: Path, config: dict, step: int):
        import mlflow
        self.mlflow, id_file = mlflow, folder / "mlflow_run_id"
        run = mlflow.start_run(run_id=id_file.read_text() if id_file.exists() else None, run_name=folder.name)
        if not id_file.exists():
            write_text(id_file, run.info.run_id)
            mlflow.log_params(config)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.mlflow.log_metrics(values, step=step)

    def image(self, step: int, path: Path) -> None:
        self.mlflow.log_artifact(str(path), "previews")

    def close(self) -> None:
        self.mlflow.end_run()


class WandbTracker(NoTracker):
    """A run of Weights & Biases named like its folder. The folder stores the run's id, to continue it, and wandb's files."""

    def __init__(self, folder: Path, config: dict, step: int):
        import wandb
        self.wandb, id_file = wandb, folder / "wandb_run_id"
        run_id = id_file.read_text() if id_file.exists() else None
        self.run = wandb.init(id=run_id, resume="allow", name=folder.name, dir=folder, config=config)
        write_text(id_file, self.run.id)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def image(self, step: int, path: Path) -> None:
        self.run.log({"preview": self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


def check_tracker(name: str) -> None:
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"`tracker` {name} needs the package {name}: pip install '.[track]'")


TRACKERS = {"none": NoTracker, "tensorboard": TensorBoardTracker, "mlflow": MLflowTracker, "wandb": WandbTracker}
