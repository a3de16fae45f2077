"""Draw pictures from a checkpoint: labels -> one PNG grid, one column a label.

    python sample.py --ckpt results/digits --class-labels "3 seven"
    python sample.py --image-size 512 --seed 1            # the published DiT-XL/2

`generate` is the one way from noise to images: training's previews and sample_ddp.py call it too.
"""

import contextlib
import difflib
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn
from torchvision.utils import make_grid
from tqdm import tqdm

import checkpoint
import runtime
from autoencoders import load_autoencoder
from diffusion import create_diffusion
from diffusion.guidance import check_scale, guide
from diffusion.samplers import SAMPLERS, get_sampler
from models import DiT_models

DIT_LABELS = [207, 360, 387, 974, 88, 979, 417, 279]  # the eight classes of DiT's figures
MAX_COLUMNS = 10
PREVIEW_ROWS = 4
LEGIBLE = 64  # pixels: smaller pictures are enlarged by a whole factor
BATCH = 64  # images drawn at once
DECODE_BATCH = 16  # a VAE's decoder takes far more memory an image than the network


def build_parser() -> runtime.ArgumentParser:
    parser = runtime.ArgumentParser("Draw a grid of pictures from a checkpoint.")
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) and its label alone")
    parser.add_argument("--class-labels", type=str | int, nargs="+", help="ids and names, mixed; default: all classes")
    parser.add_argument("--num-samples", type=int, default=1, help="pictures of each label, one below the other")
    parser.add_argument("--out", default="sample.png", help="the PNG to write")
    return parser


def add_sampling_arguments(parser: runtime.ArgumentParser) -> None:
    """The flags that sample.py and sample_ddp.py share."""
    parser.add_shared_arguments()
    parser.add_argument("--ckpt", type=str | None, help="checkpoint, run folder or published name; default: DiT-XL/2's")
    parser.add_argument("--model", choices=list(DiT_models), help="for bare weights (DiT-XL/2)")
    parser.add_argument("--image-size", type=int | None, help="for bare weights (256)")
    parser.add_argument("--num-classes", type=int | None, help="for bare weights (1000)")
    parser.add_argument("--vae", type=str | None, help="ema, mse, pixels, a folder or a hub id; default: the checkpoint's")
    parser.add_argument("--cfg-scale", type=float | None, help="guidance, 1 = none; default: the checkpoint's")
    parser.add_argument("--cfg-channels", type=int | None, help="guided channels; default: the checkpoint's")
    parser.add_argument("--num-sampling-steps", type=str | int | None,
                        help="steps, or a respacing string such as ddim50; default: the checkpoint's")
    parser.add_argument("--sampler", choices=list(SAMPLERS), help="default: the checkpoint's")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of ddim, 0..1")


def main(args) -> None:
    torch.set_grad_enabled(False)
    world = runtime.start_world(args.device)
    out = Path(args.out)
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name the PNG to write")
    runtime.check_numbers(args, ["num_samples"], "at least 1", lambda n: n >= 1)
    restored, autoencoder, settings = prepare(args, world)
    labels = parse_labels(args.class_labels, restored.spec["classes"])
    runtime.check_writable(out.parent)

    start = time.perf_counter()
    order = torch.tensor(labels * args.num_samples)  # row by row: more rows leave the first ones as they are
    batches = torch.arange(len(order)).split(BATCH)
    with tqdm(total=settings["process"].num_timesteps * len(batches), desc="sampling") as bar:
        images = torch.cat([
            generate(restored.model, autoencoder, order[batch].tolist(), batch.tolist(), args.seed, **settings,
                     progress=bar.update)
            for batch in batches])
    seconds = time.perf_counter() - start

    names = [restored.spec["classes"][label] for label in labels]
    save_grid(images, out, columns=min(len(labels), MAX_COLUMNS), description={
        "checkpoint": restored.path, "seed": args.seed, "labels": labels, "classes": names,
        "cfg_scale": settings["cfg_scale"], "cfg_channels": settings["cfg_channels"],
        "sampler": settings["sampler"], "eta": settings["eta"], "steps": restored.spec["sampling"]["num_sampling_steps"]})
    print(f"Wrote {out}: {len(images)} images of {', '.join(names)} in {seconds:.1f} s")


def prepare(args, world: runtime.World, bare_vae: str = "mse",
            bare_cfg_scale: float = 4.0) -> tuple[checkpoint.Restored, nn.Module, dict]:
    """Network, autoencoder and settings of `generate`, from a checkpoint and the flags that override it.

    `bare_vae` and `bare_cfg_scale` are the defaults for bare weights, those of DiT's sample.py.
    """
    if args.cfg_scale is not None:
        check_scale(args.cfg_scale)
    restored = world.main_first(lambda: checkpoint.restore(
        args.ckpt, args.model, args.image_size, args.num_classes, args.vae, bare_vae, bare_cfg_scale))
    given = {"sampler": args.sampler, "num_sampling_steps": args.num_sampling_steps, "cfg_scale": args.cfg_scale,
             "cfg_channels": args.cfg_channels}
    restored.spec["sampling"] = restored.spec["sampling"] | {key: value for key, value in given.items() if value is not None}
    settings = settings_for(restored.spec, args.eta)
    autoencoder = world.main_first(lambda: load_autoencoder(restored.spec["vae"], world.device))
    latent_shape = autoencoder.latent_shape(tuple(restored.spec["image_size"]), restored.spec["channels"])
    model = restored.model.to(world.device)
    if latent_shape != (model.in_channels, *model.input_size):
        raise ValueError(f"--vae {restored.spec['vae']} has latents of shape {latent_shape}, the model takes "
                         f"{(model.in_channels, *model.input_size)}")
    if args.compile:
        model.compile()
    return restored, autoencoder, settings | {"precision": args.precision}


def settings_for(spec: dict, eta: float = 0.0) -> dict:
    """The keyword arguments of `generate`, as the spec's "sampling" has them, checked."""
    sampling = spec["sampling"]
    process = runtime.naming(f"--num-sampling-steps {sampling['num_sampling_steps']}",
                             lambda: create_diffusion(sampling["num_sampling_steps"], **spec["diffusion"]))
    get_sampler(sampling["sampler"], process, eta)
    check_scale(sampling["cfg_scale"])
    channels = spec["model"]["args"].get("in_channels", 4)
    guided = channels if sampling["cfg_channels"] is None else sampling["cfg_channels"]
    if not isinstance(guided, int) or not 1 <= guided <= channels:
        raise ValueError(f"--cfg-channels {guided} is not in 1..{channels}, the channels of this model")
    return {"process": process, "sampler": sampling["sampler"], "eta": eta, "cfg_scale": sampling["cfg_scale"],
            "cfg_channels": guided}


# --- noise -> image ------------------------------------------------------------------------------


def generate(model: nn.Module, autoencoder: nn.Module, labels: list[int], indices: range | list[int], seed: int, *,
             process, sampler: str, cfg_scale: float, cfg_channels: int, eta: float = 0.0, precision: str = "fp32",
             progress: Callable[[], object] = lambda: None) -> Tensor:
    """Images (B, H, W, C) uint8 on the CPU, one for each label and index: (seed, index, label) -> image.

    Start noise is addressed by (seed, index), later noise by (seed, index, step): an image does not depend on the batch
    that it is drawn in, nor on the device. `process` has the sampler's steps; `progress` is called after each.
    """
    device = next(model.parameters()).device
    y = torch.tensor(labels, device=device)
    with torch.no_grad(), autocast(device, precision):
        network = guide(model, y, model.num_classes, cfg_scale, cfg_channels)
        x = addressed_noise(model, seed, indices).to(device)
        denoised_fn = (lambda x_0: x_0.clamp(-1, 1)) if autoencoder.bounded else None
        steps = get_sampler(sampler, process, eta)(
            process, network, x, lambda step: addressed_noise(model, seed, indices, step).to(device), denoised_fn)
        for step in steps:
            x = step["sample"]
            progress()
    with torch.no_grad():
        return torch.cat([to_uint8(autoencoder.decode(latents)) for latents in x.split(DECODE_BATCH)])


def addressed_noise(model: nn.Module, seed: int, indices: range | list[int], *step: int) -> Tensor:
    """N(0, 1), (B, C, H, W): one draw for each image index, drawn on the CPU to be the same everywhere."""
    shape = (model.in_channels, *model.input_size)
    return torch.stack([torch.randn(shape, generator=runtime.generator("sample", seed, i, *step)) for i in indices])


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8 on the CPU, rounded to the nearest level."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


# --- for train.py: what a checkpoint will say of itself, and pictures of a run -------------------


def describe(args, data, autoencoder: nn.Module) -> tuple[dict, float]:
    """The `spec` of train.py's flags (see checkpoint.py), every one of them checked, and the share of labels to drop."""
    given = {"label_drop": 0.1, "sampling": {}} | args.diffusion_args
    label_drop, sampling = given.pop("label_drop"), given.pop("sampling")
    if not isinstance(label_drop, int | float) or not 0 <= label_drop <= 1:
        raise ValueError(f"--diffusion-args: label_drop {label_drop} is not a share, 0..1")
    diffusion = runtime.check_arguments(create_diffusion, given, "--diffusion-args", {"timestep_respacing"})
    process = runtime.naming("--diffusion-args", lambda: create_diffusion("", **diffusion))
    channels, *size = autoencoder.latent_shape(data.image_size, data.channels)
    from_data = dict(input_size=tuple(size), in_channels=channels, num_classes=len(data.classes),
                     learn_sigma=process.learn_sigma)
    chosen = runtime.check_arguments(DiT_models[args.model].func, args.model_args, "--model-args", set(from_data))
    spec = {
        "model": {"name": args.model, "args": from_data | chosen},
        "diffusion": diffusion,
        "vae": autoencoder.spec["vae"],
        "image_size": tuple(data.image_size),
        "channels": data.channels,
        "classes": list(data.classes),
        "sampling": recommend(process, label_drop, sampling),
    }
    runtime.naming("--diffusion-args: sampling", lambda: settings_for(spec))
    with torch.device("meta"):
        runtime.naming("--image-size, --model-args", lambda: checkpoint.build_model(spec["model"]))
    return spec, label_drop


def recommend(process, label_drop: float, given: dict) -> dict:
    """The spec's "sampling": what its process recommends, with what was given to --diffusion-args as `sampling` above it."""
    sampling = process.recommended | {"cfg_channels": None}
    sampling["num_sampling_steps"] = min(sampling["num_sampling_steps"], process.num_timesteps)
    if label_drop == 0:  # there is no unconditional half to guide by
        sampling["cfg_scale"] = 1.0
    if not isinstance(given, dict) or set(given) - set(sampling):
        raise ValueError(f"--diffusion-args: sampling {given} is not a dictionary with the keys {', '.join(sampling)}")
    return sampling | given


def preview(ema: nn.Module, autoencoder: nn.Module, spec: dict, path: Path, world: runtime.World, seed: int, precision: str,
            progress: Callable[[], object]) -> None:
    """Write a grid of samples, a class a column, always from the same noise; the processes share the work."""
    count = len(spec["classes"])
    labels = (DIT_LABELS if count == 1000 else list(range(min(count, MAX_COLUMNS)))) * PREVIEW_ROWS
    mine = range(world.rank, len(labels), world.size) or range(1)  # all take part, for `progress` waits for all
    drawn = generate(ema, autoencoder, [labels[i] for i in mine], mine, seed, **settings_for(spec), precision=precision,
                     progress=progress)
    if parts := world.gather(drawn):
        images = drawn.new_empty(len(labels), *drawn.shape[1:])
        for rank, part in enumerate(parts[: len(labels)]):
            images[rank :: world.size] = part
        save_grid(images, path, columns=len(labels) // PREVIEW_ROWS)


def save_gif(folder: Path) -> None:
    """`previews.gif`, of all `previews/*.png` of a run's folder, in the order of their steps."""
    first, *rest = [Image.open(path) for path in sorted((folder / "previews").glob("*.png"))]
    first.save(folder / "previews.gif", save_all=True, append_images=rest, duration=400, loop=0)


# --- labels and pictures -------------------------------------------------------------------------


def parse_labels(words: list[str | int] | None, classes: list[str]) -> list[int]:
    """Class ids from ids and names, mixed; without words, DiT's eight of 1,000 classes, else all of them."""
    if words is None:
        return DIT_LABELS if len(classes) == 1000 else list(range(len(classes)))
    ids = {}
    for i, name in enumerate(classes):
        for synonym in {normalise(name), *map(normalise, name.split(","))}:
            ids.setdefault(synonym, []).append(i)
    labels = [parse_label(word, ids, len(classes)) for word in re.split(r"[\s,]+", " ".join(map(str, words))) if word]
    if not labels:
        raise ValueError("--class-labels is empty; give ids or names, or leave the flag out")
    return labels


def parse_label(word: str, ids: dict[str, list[int]], count: int) -> int:
    found = [] if word.isdecimal() else ids.get(normalise(word), [])
    if len(found) > 1:
        raise ValueError(f"--class-labels {word} names several classes; their ids are {', '.join(map(str, found))}")
    if found:
        return found[0]
    if re.fullmatch(r"-?\d+", word):
        if 0 <= int(word) < count:
            return int(word)
        raise ValueError(f"--class-labels {word} is not in 0..{count - 1}, the classes of this checkpoint")
    near = difflib.get_close_matches(normalise(word), ids, n=3, cutoff=0.4)
    raise ValueError(f"--class-labels {word} is not a class of this checkpoint"
                     + (f"; nearest: {', '.join(near)}" if near else f"; its ids are 0..{count - 1}"))


def normalise(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def save_grid(images: Tensor, path: Path, columns: int, description: dict | None = None) -> None:
    """Write images (B, H, W, C) uint8 as one PNG, small ones enlarged, with the description as its text chunks."""
    factor = max(1, math.ceil(LEGIBLE / min(images.shape[1:3])))
    grid = make_grid(images.permute(0, 3, 1, 2), nrow=columns, padding=max(1, 2 // factor), pad_value=255)
    grid = grid.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    info = PngImagePlugin.PngInfo()
    for key, value in (description or {}).items():
        info.add_text(key, str(value))
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(temporary, format="PNG", pnginfo=info)
    temporary.replace(path)


if __name__ == "__main__":
    runtime.run(main, build_parser())
