"""Figures while a run trains: to every digit those of sample_ddp.py --balanced and evaluate.py for the same checkpoint."""

import importlib.util
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.extractors import INCEPTION, inception_weights, open_extractors
from evaluation.figures import Figure, kept_of, measure, protocol
from evaluation.image_sets import ImageSet, open_set
from evaluation.survey import Survey, survey
from pipeline.checkpoint import Restored
from pipeline.drawing import Left, Task, draw_images
from pipeline.generation import Sampling, check_samples
from pipeline.spec import Spec
from runtime import UserError
from runtime.cli import ArgumentParser, prefix_errors
from runtime.files import check_writable, read_json, write_json
from runtime.log import Log
from runtime.processes import StopSignal, World, without_tf32

PAUSE = 0.5  # seconds between two questions of a process whether another one was asked to stop


def add_figure_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--figures-every", type=int, default=0, help="steps between figures of the EMA; 0: only at the end")
    parser.add_argument("--figures-samples", type=int, default=10_000, help="images drawn for them")
    parser.add_argument("--figures-ref", type=tuple[str, str] | str | None,
                        help="REF of evaluate.py, or [REF, a file of benchmarks/classifier.py]; default: no figures")


def open_monitor(ref: tuple[str, str] | str | None, every: int, count: int, data_root: str, results: str, spec: Spec,
                 autoencoder: nn.Module, world: World) -> "Monitor | None":
    """What measures a run; None without `ref`. Inception takes part if its weights are in torch's cache, else pixels.

    Args:
        ref: real images, and perhaps a classifier.
        results: a folder on the disk where samples will lie.

    Raises:
        UserError, OSError: REF, the classifier, the run or the numbers do not fit; or there is no space.
    """
    for name, value, least in (("figures_every", every, 0), ("figures_samples", count, 4)):
        if value < least:
            raise UserError(f"`{name}` {value} is not at least {least}")
    if ref is None:
        if every:
            raise UserError("`figures_every` needs `figures_ref`, the real images")
        return None
    source, classifier = (ref, None) if isinstance(ref, str) else ref
    with prefix_errors("`figures_ref`:"), undisturbed(world.device):
        if spec.is_autoencoder:
            raise UserError(f"{spec.model.name} is an autoencoder, from which nothing is sampled")
        height, width = spec.image_size
        real = world.main_first(lambda: open_set(source, "REF", data_root, (height, width)))
        weights = world.on_main(cached_inception)
        if real.images is None and not weights:
            raise UserError(f"REF {source} holds statistics of Inception's features, without images, and torch's cache lacks "
                            f"{INCEPTION} (or torch-fidelity is not installed)")
        if real.images and real.images.size != (height, width):
            raise UserError("REF {} has images of {}x{} (height x width), the run of {}x{}".format(
                source, *real.images.size, height, width))
        coming = ImageSet("SAMPLES", "of the run", Coming((height, width), np.arange(min(count, len(spec.classes)))))
        extractors = world.main_first(lambda: open_extractors(
            real, coming, world.device, weights or "none", classifier, pixels=False))
    world.on_main(lambda: check_writable(results, 2 * count * height * width * 3))
    return Monitor(real, extractors, bool(weights), count, spec, Sampling.of(spec), autoencoder, world)


def cached_inception() -> str | None:
    """The file of FID's Inception, if it and the package of its network are there. UserError if it is a wrong one."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    there = path.is_file() and importlib.util.find_spec("torch_fidelity") is not None
    return str(inception_weights(str(path))) if there else None


class Coming(NamedTuple):
    """What is known of samples that are not drawn yet: their size and their labels."""

    size: tuple[int, int]
    labels: np.ndarray


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Without gradients; torch's generators are afterwards as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        yield


@dataclass
class Monitor:
    """Draws images of a run's EMA, by the recommended settings in fp32, and measures them."""

    ref: ImageSet
    extractors: dict[str, Callable]
    inception: bool
    count: int
    spec: Spec
    sampling: Sampling
    autoencoder: nn.Module
    world: World
    seen: Survey | None = field(default=None, init=False)  # of ref, from the first figures on: 8 kB an image with Inception

    @cached_property
    def ref_sha256(self) -> str:
        return self.ref.sha256()  # of a folder it reads all pictures

    def measure(self, ema: nn.Module, step: int, continued: bool, log: Log, stop: StopSignal) -> None:
        """Draw, measure and log, with `figures/STEP.json` in the run's folder. The step's checkpoint must be there.

        Args:
            continued: whether the run goes on from this step, so that an interruption may have left it done, or half done.

        Raises:
            Stopped: on a signal. The same call goes on from the batches that were finished.
        """
        world, report_file, start = self.world, log.folder / "figures" / f"{step:07d}.json", time.perf_counter()
        out = report_file.parent / "drawing" / f"{step:07d}.npz"
        classifier = getattr(self.extractors.get("classifier"), "about", {}).get("sha256")
        asked = world.on_main(lambda: {"images": self.count, "ref": self.ref_sha256, "classifier": classifier})
        if continued and world.on_main(lambda: is_done(report_file, out, asked)):
            return
        restored = Restored(ema, self.spec, log.folder / "checkpoints" / f"{step:07d}.pt", "", {"spec": self.spec.to_dict()})
        task = Task(restored, self.autoencoder, self.sampling, self.count, balanced=True)
        world.on_main(lambda: out.parent.mkdir(parents=True, exist_ok=True))
        with undisturbed(world.device):
            made = world.on_main(lambda: task.record(torch.backends.cuda.matmul.allow_tf32, compiled=False))
            figures = self.draw_and_measure(task, out, made, stop)
        report = {"step": step, "asked": asked, "protocol": protocol(made, self.ref.source, asked["ref"]),
                  "figures": [asdict(figure) for figure in figures], "made": made,
                  "seconds": round(time.perf_counter() - start, 1), "processes": world.size}
        world.on_main(lambda: finish(report_file, out, report, log, continued))

    def draw_and_measure(self, task: Task, out: Path, made: dict[str, Any], stop: StopSignal) -> list[Figure]:
        """The figures; none if samples are not finite, which must not end a run."""
        world, leaving = self.world, Leaving(self.world, stop)
        if not draw_images(task, out, made, world, overwrite=True, locked=True, leaving=leaving, check=leaving.check):
            stop.check()
            return []
        samples = open_set(str(out), "SAMPLES")
        with without_tf32():
            self.seen = self.seen or survey(self.ref, self.extractors, world, kept_of(None), progress=stop.check)
            return measure(self.ref, samples, None, self.seen, self.extractors, world, self.inception, progress=stop.check)


class Leaving:
    """Whether to leave the drawing: after a signal, or after samples that are not finite, on any process.

    Processes draw batches at their own pace. So they tell each other by a count that they share, not by a message to all.
    """

    def __init__(self, world: World, stop: StopSignal):
        self.world, self.stop, self.asked = world, stop, time.monotonic()
        self.name = world.on_main(lambda: uuid.uuid4().hex)

    def __call__(self) -> bool:
        if not self.stop.name and time.monotonic() - self.asked < PAUSE:
            return False
        self.asked = time.monotonic()
        return self.world.add(self.name, bool(self.stop.name)) > 0

    def check(self, samples: Tensor) -> None:
        try:
            check_samples(samples)
        except UserError:
            self.world.add(self.name, 1)
            raise Left from None


def is_done(report_file: Path, out: Path, asked: dict[str, Any]) -> bool:
    """Whether a step has the figures that are asked for. Its images may have outlived a kill: they are deleted then."""
    try:
        done = read_json(report_file).get("asked") == asked
    except (FileNotFoundError, UserError):
        return False
    if done:
        shutil.rmtree(out.parent, ignore_errors=True)
    return done


def lines_of(log: Log) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, all of which are whole after the start of a run."""
    return [json.loads(line) for line in log.metrics.read_text().splitlines()] if log.metrics.exists() else []


def finish(report_file: Path, out: Path, report: dict[str, Any], log: Log, continued: bool) -> None:
    """Log the figures of a step, keep them in its JSON, and delete its images."""
    step, count = report["step"], report["made"]["images"]
    values = {f"{figure['name'].removesuffix(f'-{count}').replace(' ', '_')}-{count}": figure["value"]
              for figure in report["figures"] if figure["value"] is not None}
    if not report["figures"]:
        log.say(f"No figures of step {step}: its samples are not finite")
    elif not (continued and any(line.get("step") == step and values.items() <= line.items() for line in lines_of(log))):
        log.record(step, **values)
    write_json(report_file, report)
    shutil.rmtree(out.parent, ignore_errors=True)
