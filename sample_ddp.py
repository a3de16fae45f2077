"""Draw many images on any number of processes, into one `.npz` for evaluation.

    torchrun --nproc_per_node=8 sample_ddp.py --ckpt results/X --num-fid-samples 50000

Image i and its label depend only on (seed, i): not on the number of processes nor, up to rounding, on the batch size.
After a kill, the same command continues, on any number of processes: each batch is a file in NAME.parts until all are done.

- NAME.npz has ADM's format: `arr_0` images (N, H, W, 3) uint8, `arr_1` labels (N,) int64.
- NAME.json has the settings. An existing output with other settings is refused, or deleted with --overwrite.
"""

import json
import os
import re
import shutil
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ActionYesNo, Namespace
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from evaluation.image_sets import NpzImages, save_npz
from pipeline import checkpoint, generation
from pipeline.generation import Sampling, check_samples, generate, prepare_network, restore_autoencoder, restore_checkpoint
from pipeline.settings import SamplingSettings, add_sampling_arguments
from pipeline.spec import BareWeights
from runtime import UserError, cli
from runtime.files import atomic, check_writable, in_batches, is_restart, lock_folder, read_json, write_json
from runtime.processes import World, start_world, synchronize
from runtime.randomness import generator

WAITING = 2  # batches of a process that may wait to be written
PNG_BLOCK = 256  # images in memory at once while PNGs are written


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Draw many images, on any number of processes, into one .npz.")
    add_sampling_arguments(parser)
    parser.add_argument("--sample-dir", default="samples", help="folder of the .npz")
    parser.add_argument("--per-proc-batch-size", type=int, default=32, help="images that a process draws at once")
    parser.add_argument("--num-fid-samples", type=int, default=50_000, help="number of images")
    parser.add_argument("--global-seed", type=int, default=0, help="image i depends only on (seed, i) and its label")
    parser.add_argument("--balanced", action="store_true", help="all classes in turn instead of random labels")
    parser.add_argument("--png", action="store_true", help="also write NAME/000000.png, …")
    parser.add_argument("--overwrite", action="store_true", help="delete an existing output with other settings")
    parser.add_argument("--tf32", action=ActionYesNo(yes_prefix="", no_prefix="no-"), default=True,
                        help="TF32 matrix products on CUDA: faster, less exact")
    return parser


def main(args: Namespace) -> None:
    torch.set_grad_enabled(False)
    cli.check_numbers(args, ["num_fid_samples", "per_proc_batch_size"], "at least 1", lambda n: n >= 1)
    world = start_world(args.device, args.tf32)
    given = SamplingSettings.given(vars(args))
    bare = BareWeights(args.model, args.image_size, args.num_classes, "ema", 1.5, args.objective)  # as DiT's sample_ddp.py

    restored = restore_checkpoint(world, args.ckpt, bare, args.vae)
    guide = generation.restore_guide(world, args.guide_ckpt, bare, args.vae)
    sampling = Sampling.of(restored.spec, given, restored.model, guide)
    autoencoder = restore_autoencoder(world, restored, sampling, same=args.vae is None)
    for network in sampling.networks(restored.model):
        prepare_network(network, sampling.settings.precision, args.compile)
    count, (height, width) = args.num_fid_samples, restored.spec.image_size
    label = label_rule(args.global_seed, args.balanced, restored.model.num_classes)
    out = Path(args.sample_dir) / f"{name_of(restored, sampling, args)}.npz"
    world.on_main(lambda: check_writable(out.parent))
    record = world.on_main(lambda: record_of(restored, autoencoder, sampling, args))
    done, todo = world.on_main(lambda: open_output(out, record, args.overwrite, count, args.per_proc_batch_size,
                                                   height * width * 3))
    drawn = sum(map(len, todo))

    def draw_batch(indices: range) -> Tensor:
        last: dict[str, Tensor] = {}  # state of the sampler
        images = generate(restored.model, autoencoder, [label(i) for i in indices], indices, args.global_seed, sampling,
                          last.update)
        check_samples(last["sample"])
        return images

    start = time.perf_counter()
    waited = draw(todo, draw_batch, parts_of(out), count, world)
    seconds = time.perf_counter() - start
    world.on_main(lambda: finish(out, sorted(done + todo, key=lambda part: part.start), (height, width), label, args.png))
    if world.is_main:
        work = f"{drawn} drawn now, in {seconds:.1f} s ({drawn / seconds:.3g} images/s); between batches the device waited " \
               f"{waited:.2%} of the time" if drawn else "all of them already drawn"
        print(f"Wrote {out}: {count} images, {work}")


def name_of(restored: checkpoint.Restored, sampling: Sampling, args: Namespace) -> str:
    """The file name, made of the settings. Less common ones appear only if they are not the default."""
    spec = restored.spec
    return "-".join([
        spec.model.name.replace("/", "-"), restored.name, f"size-{spec.image_size[0]}", f"vae-{Path(spec.vae).name}",
        *sampling.file_name_parts(), f"seed-{args.global_seed}", *(["balanced"] if args.balanced else []),
        str(args.num_fid_samples)])


def record_of(restored: checkpoint.Restored, autoencoder: nn.Module, sampling: Sampling, args: Namespace) -> dict[str, Any]:
    """All settings that the images depend on, as in NAME.json."""
    spec = restored.spec
    record = {"checkpoint": restored.name, "checkpoint_sha256": restored.sha256(), "model": spec.model.name,
              "image_size": spec.image_size, "vae": spec.vae, "vae_identity": autoencoder.identity(),
              "images": args.num_fid_samples, "seed": args.global_seed, "labels": "balanced" if args.balanced else "random",
              "tf32": args.tf32, "compile": args.compile}
    if args.objective not in (None, "epsilon"):  # of bare weights, which do not state it
        record["objective"] = args.objective
    if spec.statistics:  # of the latents; not always from the file of the weights
        record["statistics"] = spec.statistics
    return json.loads(json.dumps(record | sampling.record()))  # as JSON will return it


def label_rule(seed: int, balanced: bool, num_classes: int) -> Callable[[int], int]:
    """The function i -> label of image i: the classes in turn, or drawn uniformly by (seed, i)."""
    if balanced:
        return lambda i: i % num_classes
    return lambda i: int(torch.randint(num_classes, (), generator=generator("label", seed, i)))


# --- the output: parts -> .npz --------------------------------------------------------------------


def parts_of(out: Path) -> Path:
    return out.with_suffix(".parts")


def open_output(out: Path, settings: dict[str, Any], overwrite: bool, count: int, batch_size: int,
                image_bytes: int) -> tuple[list[range], list[range]]:
    """Start or continue an output and lock it for this process. Returns the finished batches and the missing ones.

    Raises:
        UserError: it exists with other settings or is damaged, or another process is writing it.
        OSError: there is no space for it. Nothing was written.
    """
    record, parts, pictures = out.with_suffix(".json"), parts_of(out), out.with_suffix("")
    try:
        found = read_json(record)
    except (FileNotFoundError, UserError):  # missing or damaged
        found = {}
    stale = found != settings and (record.exists() or out.exists() or pictures.exists() or found_parts(parts))
    if stale and not overwrite:
        differ = [f"{key} was {found.get(key)!r}" for key in settings | found if found.get(key) != settings.get(key)]
        raise UserError(f"--sample-dir: {out.with_suffix('')} exists with other settings "
                        f"({', '.join(differ) if found else f'{record.name} cannot be read'}); --overwrite deletes it")
    if not stale and out.exists() and (damage := damage_of(out, count)):
        if not overwrite:
            raise UserError(f"--sample-dir: {damage}; --overwrite deletes it and draws its images again")
        stale = True
    if stale or not out.exists():  # space for the missing parts and the .npz
        drawn = 0 if stale else sum(map(len, share_out(whole_parts(parts, image_bytes), count, batch_size)[0]))
        check_writable(out.parent, (2 * count - drawn) * image_bytes)
    parts.mkdir(exist_ok=True)
    lock_folder(parts, is_restart(), "wait for it to end")
    if stale:
        shutil.rmtree(pictures, ignore_errors=True)
        for file in (*found_parts(parts).values(), out, record):  # the record last, so that a kill does not mix two outputs
            file.unlink(missing_ok=True)
    if out.exists():
        return [], []
    write_json(record, settings)
    return share_out(whole_parts(parts, image_bytes), count, batch_size)


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


def draw(todo: list[range], draw_batch: Callable[[range], Tensor], parts: Path, count: int, world: World) -> float:
    """Draw the batches of `todo`, each on the next free process. Returns the share of time that devices wait between batches.

    While a batch is drawn, another thread copies earlier ones to the host and writes them.
    """
    idle, waiting, before = IdleTime(world), deque(), count - sum(map(len, todo))
    with ThreadPoolExecutor(1) as writer, tqdm(total=count, initial=before, desc="sampling", unit="image",
                                               disable=not world.is_main) as bar:
        def written() -> None:
            bar.update(before + world.add("written", waiting.popleft().result()) - bar.n)

        while (turn := world.add("turns", 1) - 1) < len(todo):
            idle.mark()
            arrived = fetch(draw_batch(todo[turn]))
            idle.mark()
            waiting.append(writer.submit(write_part, parts, todo[turn], arrived))
            if len(waiting) > WAITING:
                written()
        while waiting:
            written()
        world.barrier()  # until all processes have written their batches
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


if __name__ == "__main__":
    cli.run(main, build_parser())
