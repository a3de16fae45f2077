"""Draw many images on any number of processes: batches as files in NAME.parts, joined into NAME.npz when all are there.

Image i and its label depend only on (seed, i): not on the number of processes nor, up to rounding, on the batch size. After a
kill the missing batches are drawn, on any number of processes. NAME.json has what the images depend on.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from pipeline import checkpoint
from pipeline.generation import Sampling, check_samples, generate
from runtime import UserError
from runtime.files import atomic, check_writable, in_batches, is_restart, lock_folder, read_json, write_json
from runtime.log import IdleTime
from runtime.npz import NpzImages, save_npz
from runtime.processes import World
from runtime.randomness import generator

BATCH = 32  # images that a process draws at once, by default
WAITING = 2  # batches of a process that may wait to be written
PNG_BLOCK = 256  # images in memory at once while PNGs are written
TOLD = {"weights", "versions"}  # entries of NAME.json by which an output is not told from another one


@dataclass(frozen=True)
class Task:
    """What is drawn: by which network and settings, how many images, of which seed and labels."""

    restored: checkpoint.Restored
    autoencoder: nn.Module
    sampling: Sampling
    count: int
    seed: int = 0
    balanced: bool = False  # all classes in turn instead of random labels

    @property
    def name(self) -> str:
        """The file name, made of the settings. Less common ones appear only if they are not the default."""
        spec = self.restored.spec
        return "-".join([
            spec.model.name.replace("/", "-"), self.restored.name, f"size-{spec.image_size[0]}", f"vae-{Path(spec.vae).name}",
            *self.sampling.file_name_parts(), f"seed-{self.seed}", *(["balanced"] if self.balanced else []), str(self.count)])

    def record(self, tf32: bool, compiled: bool, objective: str | None = None) -> dict[str, Any]:
        """All that the images depend on, as in NAME.json. `objective`: what the user says of bare weights."""
        spec = self.restored.spec
        record = {"checkpoint": self.restored.name, "checkpoint_sha256": self.restored.sha256(), "model": spec.model.name,
                  "image_size": spec.image_size, "vae": spec.vae, "vae_identity": self.autoencoder.identity(),
                  "images": self.count, "seed": self.seed, "labels": "balanced" if self.balanced else "random",
                  "tf32": tf32, "compile": compiled}
        if objective not in (None, "epsilon"):  # which the weights do not state
            record["objective"] = objective
        if spec.statistics:  # of the latents; not always from the file of the weights
            record["statistics"] = spec.statistics
        weights = "ema" if "spec" in self.restored.facts else self.restored.remark or "the file's"  # train.py's have an EMA
        told = {"weights": weights, "versions": versions()}
        return json.loads(json.dumps(record | self.sampling.record() | told))  # as JSON will return it

    @property
    def label(self) -> Callable[[int], int]:
        """The function i -> label of image i."""
        return label_rule(self.seed, self.balanced, self.restored.model.num_classes)


def label_rule(seed: int, balanced: bool, num_classes: int) -> Callable[[int], int]:
    """The function i -> label of image i: the classes in turn, or drawn uniformly by (seed, i)."""
    if balanced:
        return lambda i: i % num_classes
    return lambda i: int(torch.randint(num_classes, (), generator=generator("label", seed, i)))


@cache
def versions() -> dict[str, str]:
    """Of what computes images: torch, numpy, diffusers, and this code as git describes it, "unknown" without git."""
    code, root = "", Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        with suppress(OSError):  # git is not installed
            code = subprocess.run(["git", "--no-optional-locks", "describe", "--always", "--dirty", "--tags"], cwd=root,
                                  capture_output=True, text=True).stdout.strip()
    return {"torch": str(torch.__version__), "numpy": np.__version__, "diffusers": version("diffusers"),
            "code": code or "unknown"}


class Left(Exception):
    """A process leaves a batch unfinished."""


class Work(NamedTuple):
    """What was done now: images, seconds, and the share of the time that devices waited between batches."""

    drawn: int
    seconds: float
    waited: float


def draw_images(task: Task, out: Path, record: dict[str, Any], world: World, batch_size: int = BATCH, overwrite: bool = False,
                png: bool = False, locked: bool = False, leaving: Callable[[], bool] = lambda: False,
                check: Callable[[Tensor], object] = check_samples) -> Work | None:
    """Draw the missing images of an output, and write `out`.

    Args:
        record: of the task.
        locked: whether the folder is the caller's already.
        leaving: asked after each step of the sampler; True: this process draws no more. The others should soon hear the same.
        check: called with the samples of a batch. It may raise Left, to leave too.

    Returns: what was done; on all processes None if one of them left: the same call goes on from the batches that are there.

    Raises:
        UserError: the output exists with other settings, or samples are not finite.
    """
    (height, width), label = task.restored.spec.image_size, task.label
    done, todo = world.on_main(lambda: open_output(out, record, overwrite, task.count, batch_size, height * width * 3, locked))

    def draw_batch(indices: range) -> Tensor:
        last: dict[str, Tensor] = {}  # state of the sampler

        def on_step(state: dict[str, Tensor]) -> None:
            last.update(state)
            if leaving():
                raise Left

        images = generate(task.restored.model, task.autoencoder, [label(i) for i in indices], indices, task.seed,
                          task.sampling, on_step)
        check(last["sample"])
        return images

    start = time.perf_counter()
    waited = draw(todo, draw_batch, parts_of(out), task.count, world)
    seconds = time.perf_counter() - start
    if waited is None:
        return None
    world.on_main(lambda: finish(out, sorted(done + todo, key=lambda part: part.start), (height, width), label, png))
    return Work(sum(map(len, todo)), seconds, waited)


# --- the output: parts -> .npz --------------------------------------------------------------------


def parts_of(out: Path) -> Path:
    return out.with_suffix(".parts")


def open_output(out: Path, settings: dict[str, Any], overwrite: bool, count: int, batch_size: int,
                image_bytes: int, locked: bool) -> tuple[list[range], list[range]]:
    """Start or continue an output, and lock it for this process. Returns the finished batches and the missing ones.

    Raises:
        UserError: it exists with other settings or is damaged, or another process is writing it.
        OSError: there is no space for it. Nothing was written.
    """
    record, parts, pictures = out.with_suffix(".json"), parts_of(out), out.with_suffix("")
    try:
        found = read_json(record)
    except (FileNotFoundError, UserError):  # missing or damaged
        found = {}
    differ = [key for key in settings | found if key not in TOLD and found.get(key) != settings.get(key)]
    stale = bool(differ) and (record.exists() or out.exists() or pictures.exists() or found_parts(parts))
    if stale and not overwrite:
        were = ", ".join(f"{key} was {found.get(key)!r}" for key in differ)
        raise UserError(f"`sample_dir`: {out.with_suffix('')} exists with other settings "
                        f"({were if found else f'{record.name} cannot be read'}); `overwrite` deletes it")
    if not stale and out.exists() and (damage := damage_of(out, count)):
        if not overwrite:
            raise UserError(f"`sample_dir`: {damage}; `overwrite` deletes it and draws its images again")
        stale = True
    if stale or not out.exists():  # space for the missing parts and the .npz
        drawn = 0 if stale else sum(map(len, share_out(whole_parts(parts, image_bytes), count, batch_size)[0]))
        check_writable(out.parent, (2 * count - drawn) * image_bytes)
    parts.mkdir(exist_ok=True)
    if not locked:
        lock_folder(parts, is_restart(), "wait for it to end")
    if stale:
        shutil.rmtree(pictures, ignore_errors=True)
        for file in (*found_parts(parts).values(), out, record):  # the record last, so that a kill does not mix two outputs
            file.unlink(missing_ok=True)
    if out.exists():
        return [], []
    if found and not stale:  # perhaps begun by another version
        settings = settings | {"versions": joined(found.get("versions", {}), settings["versions"])}
    write_json(record, settings)
    return share_out(whole_parts(parts, image_bytes), count, batch_size)


def joined(before: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """The versions that an output was begun with, and after a comma the others that went on."""
    earlier = {name: before.get(name, "unknown") for name in now}
    return {name: old if now[name] in old.split(", ") else f"{old}, {now[name]}" for name, old in earlier.items()}


def part_path(parts: Path, indices: range) -> Path:
    return parts / f"{indices.start:08d}-{indices.stop:08d}.npy"


def found_parts(parts: Path) -> dict[range, Path]:
    """The parts in a folder, by the indices of their images. Files with other names are ignored."""
    names = ((path, re.fullmatch(r"(\d{8})-(\d{8})\.npy", path.name)) for path in parts.glob("*.npy"))
    return {range(int(name[1]), int(name[2])): path for path, name in names if name}


def whole_parts(parts: Path, image_bytes: int) -> list[range]:
    """The parts in a folder that hold all of their images. Others, which something else than this script cut, are ignored."""
    def is_whole(indices: range, path: Path) -> bool:
        try:
            images = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        return (images.dtype, images.nbytes) == (np.uint8, len(indices) * image_bytes)

    return [indices for indices, path in found_parts(parts).items() if is_whole(indices, path)]


def damage_of(out: Path, count: int) -> str:
    """What is wrong with a finished `.npz` of `count` images, "" if nothing is. The images are not read."""
    try:
        images = NpzImages(out)
        complete = len(images) == count and images.labels is not None
    except (OSError, UserError) as error:
        return str(error)
    return "" if complete else f"{out} does not hold {count} images and their labels"


def share_out(found: Iterable[range], count: int, batch_size: int) -> tuple[list[range], list[range]]:
    """Divide 0..count-1 into the existing parts, of any size, and the missing batches between them.

    A part that overlaps an earlier one, as a process that outlived its launch may write, is ignored.
    """
    done, todo, start = [], [], 0
    for part in [*sorted(found, key=lambda part: part.start), range(count, count)]:
        if part.start >= start:
            todo += [range(i, min(i + batch_size, part.start)) for i in range(start, part.start, batch_size)]
            done += [part] if part else []
            start = part.stop
    return done, todo


def finish(out: Path, batches: list[range], size: tuple[int, int], label: Callable[[int], int], png: bool) -> None:
    """Join the parts into the `.npz` (written completely or not at all), write missing PNGs, and delete the parts."""
    parts = parts_of(out)
    if not out.exists():
        count = batches[-1].stop
        images = (np.load(part_path(parts, batch), allow_pickle=False) for batch in batches)
        save_npz(out, (count, *size, 3), images, arr_1=np.array([label(i) for i in range(count)], dtype=np.int64))
    if png:
        write_pngs(out)
    for file in (*found_parts(parts).values(), *parts.glob(".*.tmp"), parts / "lock"):
        file.unlink(missing_ok=True)
    if not any(parts.iterdir()):
        parts.rmdir()


def write_pngs(out: Path) -> None:
    """Write the missing and the empty ones of NAME/000000.png, …"""
    folder = out.with_suffix("")
    folder.mkdir(exist_ok=True)

    def write(i: int, image: np.ndarray) -> None:
        path = folder / f"{i:06d}.png"
        if not path.exists() or not path.stat().st_size:
            with atomic(path) as file:
                Image.fromarray(image).save(file, format="PNG")

    images = NpzImages(out)
    blocks = in_batches(len(images), PNG_BLOCK)
    with ThreadPoolExecutor() as threads:
        for block, pictures in zip(blocks, images.read(blocks)):
            list(threads.map(write, block, pictures))


# --- drawing ---------------------------------------------------------------------------------------


def draw(todo: list[range], draw_batch: Callable[[range], Tensor], parts: Path, count: int, world: World) -> float | None:
    """Draw the batches of `todo`, each on the next free process, until `draw_batch` raises Left.

    While a batch is drawn, another thread copies earlier ones to the host and writes them.

    Returns: the share of time that devices waited between batches; None if a process left.
    """
    idle, waiting, before = IdleTime(world), deque(), count - sum(map(len, todo))
    counts = world.on_main(lambda: uuid.uuid4().hex)  # names of what the processes count in this call
    with ThreadPoolExecutor(1) as writer, tqdm(total=count, initial=before, desc="sampling", unit="image",
                                               disable=not world.is_main) as bar:
        def written() -> None:
            bar.update(before + world.add(f"{counts} written", waiting.popleft().result()) - bar.n)

        while (turn := world.add(f"{counts} turns", 1) - 1) < len(todo):
            idle.mark()
            try:
                arrived = fetch(draw_batch(todo[turn]))
            except Left:
                world.add(f"{counts} left", 1)
                break
            idle.mark()
            waiting.append(writer.submit(write_part, parts, todo[turn], arrived))
            if len(waiting) > WAITING:
                written()
        while waiting:
            written()
        world.barrier()  # until all processes have written their batches
        if world.add(f"{counts} left", 0):
            return None
        bar.update(count - bar.n)
    return idle.share()


def fetch(images: Tensor) -> Callable[[], Tensor]:
    """Start copying images to the host. Returns a function that waits for the copy and returns it."""
    if images.device.type != "cuda":
        images = images.cpu()
        return lambda: images
    host, done = images.to("cpu", non_blocking=True), torch.cuda.Event(blocking=True)
    done.record()

    def arrived() -> Tensor:
        done.synchronize()
        return host

    return arrived


def write_part(parts: Path, indices: range, arrived: Callable[[], Tensor]) -> int:
    """Write a batch, (B, H, W, 1 or 3) -> (B, H, W, 3), completely or not at all. Returns its number of images."""
    images = arrived()
    suffix = f".{socket.gethostname()}.{os.getpid()}"  # a lost process may still be writing the same batch
    with atomic(part_path(parts, indices), suffix) as file:
        np.save(file, images.expand(*images.shape[:3], 3).numpy())
    return len(indices)
