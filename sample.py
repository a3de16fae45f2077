"""Draw pictures from a checkpoint: labels -> one PNG grid, one column per label.

    python sample.py --ckpt results/digits --class-labels "3 seven"
    python sample.py --image-size 512 --seed 1            # the published DiT-XL/2

The way from noise to images is `generate` in pipeline/generation.py.
"""

import difflib
import re
import time
from pathlib import Path

import torch
from jsonargparse import Namespace
from torch import Tensor, nn
from tqdm import tqdm

from pipeline import generation
from pipeline.generation import Sampling, decode, generate
from pipeline.settings import SamplingSettings, add_sampling_arguments
from pipeline.spec import BareWeights, normal_name
from runtime import UserError, cli
from runtime.files import printable, write_text
from runtime.pictures import MAX_COLUMNS, grid, save_gif, save_grid
from runtime.processes import start_world, synchronize

TRAJECTORY_FRAMES = 10  # states that a trajectory shows


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Draw a grid of pictures from a checkpoint.")
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="image i depends only on (seed, i) and its label")
    parser.add_argument("--class-labels", type=str | int, nargs="+", help="ids and names, mixed; default: ten classes")
    parser.add_argument("--num-samples", type=int, default=1, help="pictures per label, one below the other")
    parser.add_argument("--trajectory", action="store_true", help="also write OUT-trajectory.png, .gif: states, predicted x_0")
    parser.add_argument("--out", default="sample.png", help="the PNG to write")
    return parser


def main(args: Namespace) -> None:
    torch.set_grad_enabled(False)
    world = start_world(args.device)
    out = Path(args.out)
    cli.check_numbers(args, ["num_samples"], "at least 1", lambda n: n >= 1)
    given = SamplingSettings.given(vars(args))
    bare = BareWeights(args.model, args.image_size, args.num_classes, "mse", 4.0, args.objective)  # as DiT's sample.py

    restored = generation.restore_checkpoint(world, args.ckpt, bare, args.vae)
    guide = generation.restore_guide(world, args.guide_ckpt, bare, args.vae)
    sampling = Sampling.of(restored.spec, given, restored.model, guide)
    autoencoder = generation.restore_autoencoder(world, restored, sampling, same=args.vae is None)
    labels = parse_labels(args.class_labels, restored.spec.classes)
    cli.check_output_flag(args, "out", ".png")
    generation.prepare(restored, sampling, args.compile)
    if sampling.plan:
        print(sampling.plan)

    order = torch.tensor(labels * args.num_samples)  # row by row: more rows leave the first ones as they are
    batches = torch.arange(len(order)).split(generation.BATCH)
    watch, images = Watch(sampling, len(batches), world.device, args.trajectory), []
    for batch in batches:
        images.append(generate(restored.model, autoencoder, order[batch].tolist(), batch.tolist(), args.seed, sampling,
                               watch.step).cpu())
        watch.end_batch()
    watch.bar.close()
    images = torch.cat(images)

    names = [restored.spec.classes[label] for label in labels]
    columns = len(labels) if args.num_samples > 1 else min(len(labels), MAX_COLUMNS)  # several rows: one label per column
    description = {"checkpoint": restored.path, "seed": args.seed, "labels": labels, "classes": names} | sampling.record()
    save_grid(images, out, columns, description)
    written = [out]
    if args.class_labels:
        written.append(out.with_name(f"{out.stem}-labels.txt"))
        write_text(written[-1], "".join(f"{label} {name}\n" for label, name in zip(labels, names)))
    if args.trajectory:
        written += save_trajectory(watch.states, autoencoder, sampling, out, description)
    blocks = sampling.block_calls(restored.model)
    print(f"{watch.sampling_seconds / len(images):.3g} s per image, for {sampling.model_calls} calls of the model"
          f"{'' if blocks is None else f' and {blocks} of its blocks'}; decoding "
          f"{watch.decoding_seconds / len(images):.3g} s per image")
    print(f"Wrote {', '.join(map(str, written))}: {len(images)} images of {', '.join(names)} in "
          f"{watch.sampling_seconds + watch.decoding_seconds:.1f} s")


# --- labels and pictures -------------------------------------------------------------------------


def parse_labels(arguments: list[str | int] | None, classes: list[str]) -> list[int]:
    """Class ids from a mix of ids and names. An argument that is not the whole name of a class is split at spaces and commas.

    A whole name takes precedence over a synonym (one of the parts of a name between commas), and both over an id.
    """
    if arguments is None:
        return generation.default_labels(len(classes))
    names, synonyms = {}, {}  # normal name -> ids
    for i, name in enumerate(classes):
        names.setdefault(normal_name(name), []).append(i)
        for synonym in {normal_name(part) for part in name.split(",") if not part.strip().isdecimal()}:
            synonyms.setdefault(synonym, []).append(i)
    ids = synonyms | names
    labels = []
    for argument in map(printable, map(str, arguments)):  # a class is named as `printable` names its folder
        words = [argument] if normal_name(argument) in ids else re.split(r"[\s,]+", argument)
        labels += [parse_label(word, ids, len(classes)) for word in words if word]
    if not labels:
        raise UserError("--class-labels is empty; expected ids or names")
    return labels


def parse_label(word: str, ids: dict[str, list[int]], count: int) -> int:
    found = ids.get(normal_name(word), [])
    if len(found) > 1:
        raise UserError(f"--class-labels {word} is the name of several classes; their ids are {', '.join(map(str, found))}")
    if found:
        return found[0]
    if re.fullmatch(r"-?\d+", word):
        if 0 <= int(word) < count:
            return int(word)
        raise UserError(f"--class-labels {word} is not in 0..{count - 1}, the classes of this checkpoint")
    near = difflib.get_close_matches(normal_name(word), ids, n=3, cutoff=0.4)
    raise UserError(f"--class-labels {word} is not a class of this checkpoint"
                     + (f"; nearest: {', '.join(near)}" if near else f"; its ids are 0..{count - 1}"))


# --- watching ------------------------------------------------------------------------------------


class Watch:
    """Watches `generate`: a progress bar, the times of sampling and of decoding, and states of the first pictures."""

    def __init__(self, sampling: Sampling, batches: int, device: torch.device, keep_states: bool):
        self.steps, self.device = sampling.process.num_timesteps, device
        frames = [round(i * (self.steps - 1) / (TRAJECTORY_FRAMES - 1)) for i in range(TRAJECTORY_FRAMES)]
        self.frames = set(frames) if keep_states else set()
        self.states: list[dict[str, Tensor]] = []  # {"sample", "pred_xstart"}, (up to MAX_COLUMNS, C, H, W) each
        self.sampling_seconds = self.decoding_seconds = 0.0
        self.done = 0  # steps
        self.bar = tqdm(total=self.steps * batches, desc="sampling")
        self.mark = time.perf_counter()

    def step(self, state: dict[str, Tensor]) -> None:
        if self.done in self.frames:  # of the first batch
            self.states.append({name: tensor[:MAX_COLUMNS].clone() for name, tensor in state.items()})
        self.done += 1
        self.bar.update()
        if self.done % self.steps == 0:
            self.sampling_seconds += self.lap()
            generation.check_samples(state["sample"])

    def end_batch(self) -> None:
        self.decoding_seconds += self.lap()

    def lap(self) -> float:
        synchronize(self.device)
        previous, self.mark = self.mark, time.perf_counter()
        return self.mark - previous


def save_trajectory(states: list[dict[str, Tensor]], autoencoder: nn.Module, sampling: Sampling, out: Path,
                    description: dict) -> list[Path]:
    """Write the states of the first pictures as a PNG (x_t above the x_0 predicted from it) and a GIF (side by side)."""
    x_t, x_0 = (torch.stack([decode(autoencoder, state[name], sampling).cpu() for state in states])
                for name in ("sample", "pred_xstart"))
    rows = torch.stack([x_t, x_0]).permute(2, 0, 1, 3, 4, 5)  # (pictures, 2, frames, H, W, C)
    png, gif = (out.with_name(f"{out.stem}-trajectory.{kind}") for kind in ("png", "gif"))
    save_grid(rows.flatten(0, 2), png, len(states), description)
    save_gif([grid(rows[:, :, frame].flatten(0, 1), 2) for frame in range(len(states))], gif)
    return [png, gif]


if __name__ == "__main__":
    cli.run(main, build_parser())
