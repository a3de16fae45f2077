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
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn
from torchvision.utils import make_grid
from tqdm import tqdm

import checkpoint
import runtime
from autoencoders import SSIM_WINDOW, Pixels, Reconstruction, check_autoencoder, load_autoencoder, to_unit_range
from data import Rows
from diffusion import FlowMatching, GaussianDiffusion, create_diffusion
from diffusion.guidance import check_interval, check_scale, dynamic_threshold, guide, in_interval
from diffusion.reuse import DEFAULTS, Plan, Reuse, add_prior_noise, plan
from diffusion.samplers import SAMPLERS, evaluation_times, get_sampler
from models import Autoencoder_models, DiT_models

DIT_LABELS = [207, 360, 387, 974, 88, 979, 417, 279]  # the eight classes of DiT's figures
MAX_COLUMNS = 10
PREVIEW_ROWS = 4
LEGIBLE = 64  # pixels: smaller pictures are enlarged by a whole factor
BATCH = 64  # images drawn at once
DECODE_BATCH = 16  # a VAE's decoder takes far more memory an image than the network
MOMENTS = 10  # of a trajectory

FIXED = {"kind", "times", "guided", "depth", "default_split", "key_steps"}  # of reuse.plan: not for --reuse-args
RECOMMENDED = ("sampler", "num_sampling_steps", "cfg_scale", "cfg_channels", "guidance_interval", "dynamic_thresholding")


def build_parser() -> runtime.ArgumentParser:
    parser = runtime.ArgumentParser("Draw a grid of pictures from a checkpoint.")
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) and its label alone")
    parser.add_argument("--class-labels", type=str | int, nargs="+", help="ids and names, mixed; default: all classes")
    parser.add_argument("--num-samples", type=int, default=1, help="pictures of each label, one below the other")
    parser.add_argument("--trajectory", action="store_true", help="also OUT-trajectory.png and .gif: states, predicted x_0")
    parser.add_argument("--out", default="sample.png", help="the PNG to write")
    return parser


def add_sampling_arguments(parser: runtime.ArgumentParser) -> None:
    """The flags that sample.py and sample_ddp.py share."""
    parser.add_shared_arguments()
    parser.add_argument("--ckpt", type=str | None, help="checkpoint, run folder or published name; default: DiT-XL/2's")
    parser.add_argument("--model", choices=list(DiT_models), help="for bare weights (DiT-XL/2)")
    parser.add_argument("--image-size", type=int | None, help="for bare weights (256)")
    parser.add_argument("--num-classes", type=int | None, help="for bare weights (1000)")
    parser.add_argument("--vae", type=str | None, help="ema, mse, pixels, a folder, own run, hub id; default: the checkpoint's")
    parser.add_argument("--cfg-scale", type=float | None, help="guidance, 1 = none; default: the checkpoint's")
    parser.add_argument("--cfg-channels", type=int | None, help="guided channels; default: the checkpoint's")
    parser.add_argument("--num-sampling-steps", type=str | int | None,
                        help="steps, or a respacing string such as ddim50; default: the checkpoint's")
    parser.add_argument("--sampler", choices=list(SAMPLERS), help="default: the checkpoint's")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of ddim, 0..1")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LO", "HI"),
                        help="timesteps, 0..1000, with guidance; elsewhere the unconditional half is not computed")
    parser.add_argument("--dynamic-thresholding", type=bool | None,
                        help="true, false: Imagen's bound of predicted pixels; default: the checkpoint's")
    parser.add_argument("--reuse", choices=["none", *DEFAULTS], default="none",
                        help="run most blocks on key steps only, and reuse or forecast their features elsewhere")
    parser.add_argument("--key-steps", type=str | None, help="paper (for encoder), every:N (every:4 for forecast), or 0,3,6")
    parser.add_argument("--reuse-args", type=dict, default={}, help="split, order, warm_up, parallel, prior_noise")


def main(args) -> None:
    torch.set_grad_enabled(False)
    world = runtime.start_world(args.device)
    out = Path(args.out)
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name the PNG to write")
    if out.suffix == ".txt":
        raise ValueError(f"--out {out}: name the PNG; the labels go to a .txt beside it")
    runtime.check_numbers(args, ["num_samples"], "at least 1", lambda n: n >= 1)
    restored, autoencoder, sampling = prepare(args, world)
    labels = parse_labels(args.class_labels, restored.spec["classes"])
    runtime.check_writable(out.parent)
    if sampling.reuse:
        print(sampling.reuse)

    order = torch.tensor(labels * args.num_samples)  # row by row: more rows leave the first ones as they are
    batches = torch.arange(len(order)).split(BATCH)
    watch, images = Watch(sampling, len(batches), world.device, args.trajectory), []
    for batch in batches:
        watch.begin()
        images.append(generate(restored.model, autoencoder, order[batch].tolist(), batch.tolist(), args.seed, sampling,
                               watch.step).cpu())
        watch.end()
    images = torch.cat(images)

    names = [restored.spec["classes"][label] for label in labels]
    columns = min(len(labels), MAX_COLUMNS)
    description = {"checkpoint": restored.path, "seed": args.seed, "labels": labels, "classes": names} | sampling.describe()
    save_grid(images, out, columns, description)
    written = [out]
    if args.class_labels:
        written.append(out.with_suffix(".txt"))
        checkpoint.replace_text(written[-1], "".join(f"{label} {name}\n" for label, name in zip(labels, names)))
    if args.trajectory:
        written += save_trajectory(watch.states, autoencoder, sampling, out, description)
    model_calls, block_calls = sampling.calls(len(restored.model.blocks))
    print(f"{watch.sampling_seconds / len(images):.3g} s an image, for {model_calls} calls of the model and {block_calls} of "
          f"its blocks; decoding {watch.decoding_seconds / len(images):.3g} s an image")
    print(f"Wrote {', '.join(map(str, written))}: {len(images)} images of {', '.join(names)} in "
          f"{watch.sampling_seconds + watch.decoding_seconds:.1f} s")


def prepare(args, world: runtime.World, bare_vae: str = "mse",
            bare_cfg_scale: float = 4.0) -> tuple[checkpoint.Restored, nn.Module, "Sampling"]:
    """Network, autoencoder and settings of `generate`, from a checkpoint and the flags that override it.

    `bare_vae` and `bare_cfg_scale` are the defaults for bare weights, those of DiT's sample.py.
    """
    if args.cfg_scale is not None:
        check_scale(args.cfg_scale)
    if args.reuse == "none" and (args.key_steps is not None or args.reuse_args):
        raise ValueError("--key-steps and --reuse-args have a meaning beside --reuse encoder or forecast only")
    reuse_args = runtime.check_arguments(plan, args.reuse_args, "--reuse-args", skip=FIXED)
    ckpt = world.on_main(lambda: newest(args.ckpt))
    restored = world.main_first(lambda: checkpoint.restore(
        ckpt, args.model, args.image_size, args.num_classes, args.vae, bare_vae, bare_cfg_scale))
    if restored.spec["sampling"] is None:
        raise ValueError(f"--ckpt {restored.path} is an autoencoder, which has nothing to sample from; pass it as --vae")
    given = {name: getattr(args, name) for name in RECOMMENDED if getattr(args, name) is not None}
    restored.spec["sampling"] = restored.spec["sampling"] | given
    sampling = settings_for(restored.spec, args.eta, args.precision)
    model = restored.model.to(world.device)
    if args.reuse != "none":
        sampling = sampling.with_reuse(model, args.reuse, args.key_steps, **reuse_args)
    autoencoder = world.main_first(lambda: load_autoencoder(restored.spec["vae"], world.device, checkpoint.restore_network))
    if args.vae is None:
        check_autoencoder(autoencoder, restored.spec)
    latent_shape = autoencoder.latent_shape(tuple(restored.spec["image_size"]), restored.spec["channels"])
    if latent_shape != (model.in_channels, *model.input_size):
        raise ValueError(f"--vae {restored.spec['vae']} has latents of shape {latent_shape}, the model takes "
                         f"{(model.in_channels, *model.input_size)}")
    check_thresholding(sampling, autoencoder)
    if args.compile:  # the two that a plain call consists of, as one with reuse does
        model.encode, model.decode = torch.compile(model.encode), torch.compile(model.decode)
    return restored, autoencoder, sampling


def newest(ckpt: str | None) -> str | None:
    """A run's folder as its newest checkpoint, which for a run under way is another one a moment later."""
    return str(checkpoint.resolve(ckpt)) if ckpt is not None and Path(ckpt).is_dir() else ckpt


# --- noise -> image ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How `generate` samples. Checked when made, with the flags' names in the errors."""

    process: GaussianDiffusion | FlowMatching
    num_sampling_steps: str | int  # the respacing that the process has
    sampler: str
    cfg_scale: float
    cfg_channels: int
    guidance_interval: tuple[float, float] | None = None
    dynamic_thresholding: bool = False
    eta: float = 0.0
    reuse: Plan | None = None
    precision: str = "fp32"

    def __post_init__(self):
        self.solver()
        check_scale(self.cfg_scale)
        check_interval(self.guidance_interval)
        if not isinstance(self.dynamic_thresholding, bool):
            raise ValueError(f"--dynamic-thresholding {self.dynamic_thresholding!r} is neither true nor false")

    def solver(self) -> Callable:
        return get_sampler(self.sampler, self.process, self.eta)

    @cached_property
    def times(self) -> tuple[float, ...]:
        """t, 0..1000, at each evaluation of the model."""
        return evaluation_times(self.solver(), self.process)

    @property
    def guided(self) -> tuple[bool, ...]:
        """Whether there is guidance, at each evaluation of the model."""
        return in_interval(self.times, self.cfg_scale, self.guidance_interval)

    def with_reuse(self, model: nn.Module, kind: str, key_steps: str | None = None, **reuse_args) -> "Sampling":
        """The same with features reused; arguments are those of reuse.plan."""
        return replace(self, reuse=plan(kind, self.times, self.guided, len(model.blocks), model.default_split, key_steps,
                                        **reuse_args))

    def calls(self, depth: int) -> tuple[int, int]:
        """How often an image goes through a model of so many blocks, and through one of its blocks."""
        model_calls = len(self.times) + sum(self.guided)
        return model_calls, self.reuse.block_calls() if self.reuse else depth * model_calls

    def describe(self) -> dict:
        """What every output records."""
        named = ("sampler", "eta", "cfg_scale", "cfg_channels", "guidance_interval", "dynamic_thresholding", "precision")
        return {"steps": self.num_sampling_steps} | {name: getattr(self, name) for name in named} | {
            "reuse": str(self.reuse or "none")}


def settings_for(spec: dict, eta: float = 0.0, precision: str = "fp32") -> Sampling:
    """The settings that the spec's "sampling" has, checked."""
    given = spec["sampling"]
    process = runtime.naming(f"--num-sampling-steps {given['num_sampling_steps']}",
                             lambda: create_diffusion(given["num_sampling_steps"], **spec["diffusion"]))
    channels = spec["model"]["args"].get("in_channels", 4)
    guided = channels if given["cfg_channels"] is None else given["cfg_channels"]
    if not isinstance(guided, int) or not 1 <= guided <= channels:
        raise ValueError(f"--cfg-channels {guided} is not in 1..{channels}, the channels of this model")
    return Sampling(process, **given | {"cfg_channels": guided}, eta=eta, precision=precision)


def check_thresholding(sampling: Sampling, autoencoder: nn.Module) -> None:
    if sampling.dynamic_thresholding and not autoencoder.bounded:
        raise ValueError(f"--dynamic-thresholding is for pixels in [-1, 1]; --vae {autoencoder.spec['vae']} has latents")


def generate(model: nn.Module, autoencoder: nn.Module, labels: list[int], indices: range | list[int], seed: int,
             sampling: Sampling, on_step: Callable[[dict[str, Tensor]], object] = lambda step: None) -> Tensor:
    """Images (B, H, W, C) uint8 on the model's device, one for each label and index: (seed, index, label) -> image.

    Start noise is addressed by (seed, index), later noise by (seed, index, step): an image does not depend on the batch
    that it is drawn in, nor on the device. `on_step` is called with {"sample", "pred_xstart"} after each step.
    """
    device = next(model.parameters()).device
    y = to_device(torch.tensor(labels), device)
    with torch.no_grad(), autocast(device, sampling.precision):
        network = Reuse(model, sampling.reuse, len(labels)) if sampling.reuse else model
        network = guide(network, y, model.num_classes, sampling.cfg_scale, sampling.cfg_channels, sampling.guided)
        noise = addressed_noise(model, seed, indices)
        steps = sampling.solver()(sampling.process, network, noise, lambda step: addressed_noise(model, seed, indices, step),
                                  bound(sampling, autoencoder))
        for step in add_prior_noise(steps, noise, sampling.reuse) if sampling.reuse else steps:
            x = step["sample"]
            on_step(step)
    return decode(autoencoder, x, sampling)


def bound(sampling: Sampling, autoencoder: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What keeps predicted pixels in [-1, 1]; latents have no such bound."""
    scale = sampling.process.input_scale
    if sampling.dynamic_thresholding:
        return lambda x_0: scale * dynamic_threshold(x_0 / scale)
    return (lambda x_0: x_0.clamp(-scale, scale)) if autoencoder.bounded else None


def decode(autoencoder: nn.Module, x_0: Tensor, sampling: Sampling) -> Tensor:
    """A sampler's x_0 (B, C, H, W) -> images (B, H, W, C) uint8, in fp32."""
    with torch.no_grad():
        latents = x_0 / sampling.process.input_scale
        return torch.cat([to_uint8(autoencoder.decode(part)) for part in latents.split(DECODE_BATCH)])


def addressed_noise(model: nn.Module, seed: int, indices: range | list[int], *step: int) -> Tensor:
    """N(0, 1), (B, C, H, W): one draw for each image index, drawn on the CPU to be the same everywhere."""
    shape = (model.in_channels, *model.input_size)
    noise = torch.stack([torch.randn(shape, generator=runtime.generator("sample", seed, i, *step)) for i in indices])
    return to_device(noise, next(model.parameters()).device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copied without waiting for what the GPU has still to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8, rounded to the nearest level."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


# --- for train.py: what a checkpoint will say of itself, and pictures of a run -------------------


def describe(args, data, autoencoder: nn.Module) -> tuple[dict, float]:
    """The `spec` of train.py's flags (see checkpoint.py), every one of them checked, and the share of labels to drop."""
    if args.model in Autoencoder_models:
        return describe_autoencoder(args, data, autoencoder), 0.0
    given = {"label_drop": 0.1, "sampling": {}} | args.diffusion_args
    label_drop, sampling = given.pop("label_drop"), given.pop("sampling")
    if not isinstance(label_drop, int | float) or not 0 <= label_drop <= 1:
        raise ValueError(f"--diffusion-args: label_drop {label_drop} is not a share, 0..1")
    diffusion = runtime.check_arguments(create_diffusion, given, "--diffusion-args", {"timestep_respacing"},
                                        ("label_drop", "sampling"))
    process = runtime.naming("--diffusion-args", lambda: create_diffusion("", **diffusion))
    channels, *size = autoencoder.latent_shape(data.image_size, data.channels)
    from_data = dict(input_size=tuple(size), in_channels=channels, num_classes=len(data.classes),
                     learn_sigma=process.learn_sigma)
    spec = spec_of(args, from_data, diffusion, data, autoencoder, recommend(process, label_drop, sampling))
    runtime.naming("--diffusion-args: sampling", lambda: check_thresholding(settings_for(spec), autoencoder))
    return spec, label_drop


def describe_autoencoder(args, data, autoencoder: nn.Module) -> dict:
    """The spec of an autoencoder to be trained: nothing of it is sampled."""
    if args.diffusion_args or not isinstance(autoencoder, Pixels) or data.kind != "images":
        raise ValueError(f"--model {args.model} is trained on images by their reconstruction: with --vae pixels, and without "
                         "--diffusion-args")
    if min(data.image_size) < SSIM_WINDOW:
        raise ValueError(f"--image-size {data.image_size} is less than the {SSIM_WINDOW} pixels of SSIM's window")
    from_data = dict(input_size=tuple(data.image_size), in_channels=data.channels)
    return spec_of(args, from_data, {}, data, autoencoder, None)


def spec_of(args, from_data: dict, diffusion: dict, data, autoencoder: nn.Module, sampling: dict | None) -> dict:
    network = (DiT_models | Autoencoder_models)[args.model].func
    chosen = runtime.check_arguments(network, args.model_args, "--model-args", set(from_data))
    spec = {
        "model": {"name": args.model, "args": from_data | chosen},
        "diffusion": diffusion,
        **autoencoder.spec,
        "image_size": tuple(data.image_size),
        "channels": data.channels,
        "classes": list(data.classes),
        "sampling": sampling,
    }
    with torch.device("meta"):
        runtime.naming("--image-size, --model-args", lambda: checkpoint.build_model(spec["model"]))
    return spec


def recommend(process, label_drop: float, given: dict) -> dict:
    """The spec's "sampling": what its process recommends, with what was given to --diffusion-args as `sampling` above it."""
    sampling = process.recommended | {"cfg_channels": None, "guidance_interval": None, "dynamic_thresholding": False}
    sampling["num_sampling_steps"] = min(sampling["num_sampling_steps"], process.num_timesteps)
    if label_drop == 0:  # there is no unconditional half to guide by
        sampling["cfg_scale"] = 1.0
    if not isinstance(given, dict) or set(given) - set(sampling):
        raise ValueError(f"--diffusion-args: sampling {given} is not a dictionary with the keys {', '.join(sampling)}")
    return sampling | given


def process_of(spec: dict) -> object:
    """What a spec's network is trained by."""
    return Reconstruction() if spec["sampling"] is None else create_diffusion("", **spec["diffusion"])


def preview(ema: nn.Module, autoencoder: nn.Module, spec: dict, path: Path, world: runtime.World, args,
            progress: Callable[[], object], data) -> None:
    """Write a grid of samples, a class a column, always from the same noise; the processes share the work. Of an
    autoencoder, its reconstructions of some of the data."""
    if spec["sampling"] is None:
        world.on_main(lambda: preview_reconstructions(ema, data, path, args.precision))
        return
    count = len(spec["classes"])
    labels = (DIT_LABELS if count == 1000 else list(range(min(count, MAX_COLUMNS)))) * PREVIEW_ROWS
    mine = range(world.rank, len(labels), world.size) or range(1)  # all take part, for `progress` waits for all
    sampling = settings_for(spec, precision=args.precision)
    with tqdm(total=sampling.process.num_timesteps, desc="preview", leave=False, disable=not world.is_main) as bar:
        drawn = generate(ema, autoencoder, [labels[i] for i in mine], mine, args.global_seed, sampling,
                         lambda step: (progress(), bar.update())).cpu()
    if parts := world.gather(drawn):
        images = drawn.new_empty(len(labels), *drawn.shape[1:])
        for rank, part in enumerate(parts[: len(labels)]):
            images[rank :: world.size] = part
        save_grid(images, path, columns=len(labels) // PREVIEW_ROWS)


def preview_reconstructions(ema: nn.Module, data, path: Path, precision: str) -> None:
    """Write a grid of images from all over a data set, each row above a row of their reconstructions."""
    rows = np.linspace(0, len(data) - 1, PREVIEW_ROWS // 2 * MAX_COLUMNS).round().astype(int)
    images, device = data.__getitems__(Rows.plain(rows))[0], next(ema.parameters()).device
    with autocast(device, precision), torch.no_grad():
        reconstructed = to_uint8(ema(to_unit_range(images.to(device)))).cpu()
    rows_of = [part.split(MAX_COLUMNS) for part in (images.permute(0, 2, 3, 1), reconstructed)]
    save_grid(torch.cat([row for pair in zip(*rows_of) for row in pair]), path, MAX_COLUMNS)


def save_previews_gif(folder: Path) -> None:
    """`previews.gif`, of all `previews/*.png` of a run's folder, in the order of their steps."""
    save_gif([Image.open(path) for path in sorted((folder / "previews").glob("*.png"))], folder / "previews.gif")


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
    """Write images (B, H, W, C) uint8 as one PNG, with the description as its text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, value in (description or {}).items():
        info.add_text(key, str(value))
    temporary = path.with_name(f".{path.name}.tmp")
    grid(images, columns).save(temporary, format="PNG", pnginfo=info)
    temporary.replace(path)


def grid(images: Tensor, columns: int) -> Image.Image:
    """Images (B, H, W, C) uint8 beside and below each other, small ones enlarged."""
    factor = max(1, math.ceil(LEGIBLE / min(images.shape[1:3])))
    pixels = make_grid(images.permute(0, 3, 1, 2), nrow=columns, padding=max(1, 2 // factor), pad_value=255)
    return Image.fromarray(pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2).permute(1, 2, 0).numpy())


def save_gif(frames: list[Image.Image], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    frames[0].save(temporary, format="GIF", save_all=True, append_images=frames[1:], duration=400, loop=0)
    temporary.replace(path)


# --- watching ------------------------------------------------------------------------------------


class Watch:
    """Listens to `generate`: shows progress, times sampling and decoding apart, keeps states of the first pictures."""

    def __init__(self, sampling: Sampling, batches: int, device: torch.device, keep_states: bool):
        self.steps, self.device = sampling.process.num_timesteps, device
        self.moments = {round(i * (self.steps - 1) / (MOMENTS - 1)) for i in range(MOMENTS)} if keep_states else set()
        self.states: list[dict[str, Tensor]] = []  # {"sample", "pred_xstart"}, (up to MAX_COLUMNS, C, H, W) each
        self.sampling_seconds = self.decoding_seconds = 0.0
        self.done = 0  # steps
        self.bar = tqdm(total=self.steps * batches, desc="sampling")

    def begin(self) -> None:
        self.mark = time.perf_counter()

    def step(self, state: dict[str, Tensor]) -> None:
        if self.done in self.moments:  # of the first batch
            self.states.append({name: tensor[:MAX_COLUMNS].clone() for name, tensor in state.items()})
        self.done += 1
        self.bar.update()
        if self.done % self.steps == 0:
            self.sampling_seconds += self.lap()

    def end(self) -> None:
        self.decoding_seconds += self.lap()
        if self.done == self.bar.total:
            self.bar.close()

    def lap(self) -> float:
        runtime.synchronize(self.device)
        previous, self.mark = self.mark, time.perf_counter()
        return self.mark - previous


def save_trajectory(states: list[dict[str, Tensor]], autoencoder: nn.Module, sampling: Sampling, out: Path,
                    description: dict) -> list[Path]:
    """A strip (PNG) and a film (GIF) of the first pictures on their way: x_t above, or left of, the x_0 predicted from it."""
    x_t, x_0 = (torch.stack([decode(autoencoder, state[name], sampling).cpu() for state in states])
                for name in ("sample", "pred_xstart"))
    rows = torch.stack([x_t, x_0]).permute(2, 0, 1, 3, 4, 5)  # (pictures, 2, moments, H, W, C)
    strip, film = (out.with_name(f"{out.stem}-trajectory.{kind}") for kind in ("png", "gif"))
    save_grid(rows.flatten(0, 2), strip, len(states), description)
    save_gif([grid(rows[:, :, moment].flatten(0, 1), 2) for moment in range(len(states))], film)
    return [strip, film]


if __name__ == "__main__":
    runtime.run(main, build_parser())
