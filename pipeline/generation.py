"""(seed, index, label) -> image: the only way from noise to pictures."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion import FlowMatching, GaussianDiffusion, create_diffusion
from diffusion.guidance import check_interval, check_scale, dynamic_threshold, guide, in_interval
from diffusion.reuse import DEFAULTS, Plan, Reuse, add_prior_noise, plan
from diffusion.samplers import SAMPLERS, evaluation_times, get_sampler
from pipeline import checkpoint
from pipeline.autoencoders import check_autoencoder, load_autoencoder
from pipeline.spec import RECOMMENDED
from runtime import cli
from runtime.pictures import to_uint8
from runtime.processes import World, autocast, to_device
from runtime.randomness import generator
from small_models import DIFFUSION_NETWORKS

DIT_LABELS = [207, 360, 387, 974, 88, 979, 417, 279]  # the eight classes of DiT's figures
BATCH = 64  # images drawn at once
DECODE_BATCH = 16  # a VAE's decoder takes far more memory an image than the network
FIXED = {"kind", "times", "guided", "depth", "default_split", "key_steps"}  # of reuse.plan: not for --reuse-args


def add_sampling_arguments(parser: cli.ArgumentParser) -> None:
    """The flags that sample.py and sample_ddp.py share."""
    parser.add_shared_arguments()
    parser.add_argument("--ckpt", type=str | None, help="checkpoint, run folder or published name; default: DiT-XL/2's")
    parser.add_argument("--model", choices=list(DIFFUSION_NETWORKS), help="for bare weights (DiT-XL/2)")
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


def prepare(args, world: World, bare_vae: str = "mse",
            bare_cfg_scale: float = 4.0) -> tuple[checkpoint.Restored, nn.Module, "Sampling"]:
    """Network, autoencoder and settings of `generate`, from a checkpoint and the flags that override it.

    `bare_vae` and `bare_cfg_scale` are the defaults for bare weights, those of DiT's sample.py.
    """
    if args.cfg_scale is not None:
        check_scale(args.cfg_scale)
    if args.reuse == "none" and (args.key_steps is not None or args.reuse_args):
        raise ValueError("--key-steps and --reuse-args have a meaning beside --reuse encoder or forecast only")
    reuse_args = cli.check_arguments(plan, args.reuse_args, "--reuse-args", skip=FIXED)
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
    autoencoder = world.main_first(lambda: load_autoencoder(restored.spec["vae"], world.device))
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


# --- noise -> image --------------------------------------------------------------------------------


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
    process = cli.naming(f"--num-sampling-steps {given['num_sampling_steps']}",
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
    noise = torch.stack([torch.randn(shape, generator=generator("sample", seed, i, *step)) for i in indices])
    return to_device(noise, next(model.parameters()).device)
