"""Pictures of a run: samples of the EMA weights, or reconstructions where the network is an autoencoder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from pipeline.generation import Sampling, default_labels, generate
from pipeline.spec import Spec
from runtime.pictures import MAX_COLUMNS, save_gif, save_grid, to_uint8, to_unit_range
from runtime.processes import World, autocast
from training.rows import Readable, Rows

MAX_FRAMES = 200  # of previews.gif
PREVIEW_ROWS = 4


def preview(ema: nn.Module, autoencoder: nn.Module, spec: Spec, path: Path, world: World, seed: int, precision: str,
            progress: Callable[[], object], data: Readable) -> list[str]:
    """Write a grid of samples, one column per class, always from the same noise. The processes share the work.

    To keep previews fast, ddpm is replaced by 20 steps of dpm++. For an autoencoder the grid shows reconstructions of `data`.

    Args:
        progress: called after each step, by all processes together. It may raise an exception, to stop.

    Returns: the names of the classes, column by column.
    """
    if spec.is_autoencoder:
        world.on_main(lambda: preview_reconstructions(ema, data, path, precision))
        return []
    shown = default_labels(len(spec.classes))
    labels, names = shown * PREVIEW_ROWS, [spec.classes[label] for label in shown]
    mine = range(world.rank, len(labels), world.size) or range(1)  # every process samples: `progress` waits for all
    sampling = Sampling.of(spec, {"precision": precision})
    if sampling.settings.sampler == "ddpm":
        steps = min(20, sampling.process.num_timesteps)
        sampling = Sampling.of(spec, {"precision": precision, "sampler": "dpm++", "num_sampling_steps": steps})
    with tqdm(total=sampling.process.num_timesteps, desc="preview", leave=False, disable=not world.is_main) as bar:
        drawn = generate(ema, autoencoder, [labels[i] for i in mine], mine, seed, sampling,
                         lambda step: (progress(), bar.update())).cpu()
    if parts := world.gather(drawn):
        images = drawn.new_empty(len(labels), *drawn.shape[1:])
        for rank, part in enumerate(parts[: len(labels)]):
            images[rank :: world.size] = part
        path.parent.mkdir(parents=True, exist_ok=True)  # it may have been removed during the run
        save_grid(images, path, len(shown), {"classes": names} | sampling.record())
    return names


def preview_reconstructions(ema: nn.Module, data: Readable, path: Path, precision: str) -> None:
    """Write a grid of images spread over a data set, each row above the row of its reconstructions."""
    rows = np.linspace(0, len(data) - 1, PREVIEW_ROWS // 2 * MAX_COLUMNS).round().astype(int)
    images, device = data.__getitems__(Rows.plain(rows))[0], next(ema.parameters()).device
    with autocast(device, precision), torch.no_grad():
        reconstructed = to_uint8(ema(to_unit_range(images.to(device)))).cpu()
    rows_of = [part.split(MAX_COLUMNS) for part in (images.permute(0, 2, 3, 1), reconstructed)]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_grid(torch.cat([row for pair in zip(*rows_of) for row in pair]), path, MAX_COLUMNS)


def save_previews_gif(folder: Path) -> None:
    """Write `previews.gif` from a run's `previews/*.png` in the order of steps; if there are many, from every k-th."""
    newest_first = sorted((folder / "previews").glob("*.png"), reverse=True)
    chosen = newest_first[:: len(newest_first) // MAX_FRAMES + 1]
    save_gif([Image.open(path) for path in reversed(chosen)], folder / "previews.gif")
