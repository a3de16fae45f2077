"""(seed, index, label) -> image: the only way from noise to pictures.

    restored = restore_checkpoint(world, ckpt)                    # network and spec
    sampling = Sampling.of(restored.spec, given, restored.model)  # settings, made ready for that network
    autoencoder = restore_autoencoder(world, restored, sampling)  # latent -> image
    prepare(restored, sampling)                                   # heads for internal guidance, bf16, torch.compile
    images = generate(restored.model, autoencoder, labels, indices, seed, sampling)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import OBJECTIVES, create_diffusion
from diffusion.guidance import dynamic_threshold, guide, in_interval
from diffusion.process import Network, Process, Seam, check, offers
from diffusion.reuse import Plan, Reuse, add_prior_noise, plan
from diffusion.samplers import Steps, evaluation_times, get_sampler
from pipeline import checkpoint
from pipeline.autoencoders import check_autoencoder, load_autoencoder
from pipeline.heads import WithHeads, backbone, guided_inside, restore_heads
from pipeline.settings import SamplingSettings
from pipeline.spec import BareWeights, Spec, defaults_of
from runtime import UserError
from runtime.cli import WRONG_VALUE, prefix_errors
from runtime.pictures import MAX_COLUMNS, to_uint8
from runtime.processes import World, autocast, cast_weights, to_device
from runtime.randomness import generator

DIT_LABELS = [207, 360, 387, 974, 88, 979, 417, 279]  # the eight classes of DiT's figures
BATCH = 64  # images drawn at once
TRAINING_ONLY = {"learn_sigma", "use_kl", "rescale_learned_sigmas", "time_sampling", "time_mean", "time_std", "flow_loss",
                 "shift_training", "map_share", "map_guidance"}  # arguments of processes in which a guide may differ
DECODE_BATCH = 16  # a VAE's decoder takes far more memory an image than the network


def default_labels(count: int) -> list[int]:
    """The classes to show by default: DiT's eight of 1,000, else at most ten, evenly spaced."""
    return DIT_LABELS if count == 1000 else torch.linspace(0, count - 1, min(count, MAX_COLUMNS)).round().int().tolist()


# --- checkpoint -> network, settings, autoencoder ---------------------------------------------------


def restore_checkpoint(world: World, ckpt: str | None, bare: BareWeights = BareWeights(),
                       vae: str | None = None, name: str = "ckpt") -> checkpoint.Restored:
    """The network of a checkpoint on this process's device, and its spec.

    Args:
        ckpt, bare, vae, name: see checkpoint.restore. A run's folder stands for its newest checkpoint. All processes take the
            same one, even if the run writes another meanwhile.

    Raises:
        UserError: it is an autoencoder, or lacks what sampling needs.
    """
    def newest() -> str | None:
        with prefix_errors(f"`{name}`"):
            return str(checkpoint.resolve(ckpt)) if ckpt is not None and Path(ckpt).is_dir() else ckpt

    path = world.on_main(newest)
    restored = world.main_first(lambda: checkpoint.restore(path, bare, vae, name))
    if restored.spec.is_autoencoder:
        raise UserError(f"`{name}` {restored.path} is an autoencoder, from which nothing can be sampled; pass it as `vae`")
    check(restored.model, Network, "sampling needs")
    if restored.remark and world.is_main:
        print(restored.remark)
    restored.model.to(world.device)
    return restored


def restore_guide(world: World, ckpt: str | None, bare: BareWeights = BareWeights(),
                  vae: str | None = None) -> checkpoint.Restored | None:
    """The checkpoint that guides another one, see `restore_checkpoint`; None without `ckpt`. Its preset may be another."""
    return None if ckpt is None else restore_checkpoint(world, ckpt, replace(bare, model=None), vae, "guide_ckpt")


def check_guide(guide: checkpoint.Restored, spec: Spec, model: nn.Module) -> None:
    """Raises UserError that says what differs, if a guide has another process, other latents or classes than a network."""
    theirs, ours = facts_of(guide.spec, guide.model), facts_of(spec, model)
    for name in ours | theirs:
        if theirs.get(name) != ours.get(name):
            remedy = "; if their latents are the same, pass one `vae` for both" if name == "vae" else ""
            raise UserError(f"`guide_ckpt` {guide.path}: its {name} is {theirs.get(name)}, that of the checkpoint to be guided "
                            f"is {ours.get(name)}{remedy}")


def facts_of(spec: Spec, model: nn.Module) -> dict[str, Any]:
    """What a network and its guide must share, by names for an error. (Of the process what sampling depends on.)"""
    common = defaults_of(create_diffusion)
    objective = spec.diffusion.get("objective", common["objective"])
    own = defaults_of(OBJECTIVES[objective]) if objective in OBJECTIVES else {}
    process = {"objective": objective, **common, **own, **spec.diffusion}
    return {**{name: value for name, value in process.items() if name not in TRAINING_ONLY},
            "latent shape": (model.in_channels, *model.input_size), "vae_sha256": spec.vae_sha256,
            "vae": None if spec.vae_sha256 else spec.vae, "latents_mean and latents_std": spec.statistics,
            "number of classes": len(spec.classes), **{f"class {i}": name for i, name in enumerate(spec.classes)}}


@dataclass(frozen=True)
class Sampling:
    """Settings resolved for one network: the number of guided channels, the process, the sampler, plan of reuse, and guide."""

    settings: SamplingSettings
    process: Process
    solver: Callable[..., Steps]
    plan: Plan | None = None  # None without reuse
    guide: checkpoint.Restored | None = None  # of autoguidance, in place of the unconditional half

    @classmethod
    def of(cls, spec: Spec, given: dict[str, Any] | None = None, model: nn.Module | None = None,
           guide: checkpoint.Restored | None = None) -> "Sampling":
        """The settings that a spec recommends, overridden by `given`.

        Args:
            model: the network; needed for `reuse` and a guide only.
            guide: a weaker checkpoint, for autoguidance.

        Raises:
            UserError: a setting is not allowed for this network and process, the network has no seam for `reuse`, or the
                guide does not fit the network.
        """
        settings = replace(spec.sampling, **given or {})
        with prefix_errors("the checkpoint's process:", *WRONG_VALUE):
            create_diffusion("", **spec.diffusion)
        with prefix_errors(f"`num_sampling_steps` {settings.num_sampling_steps}:", *WRONG_VALUE):
            process = create_diffusion(settings.num_sampling_steps, **spec.diffusion)
        channels = spec.model.args.get("in_channels", 4)
        guided = channels if settings.cfg_channels is None else settings.cfg_channels
        if not isinstance(guided, int) or not 1 <= guided <= channels:
            raise UserError(f"`cfg_channels` {guided} is not in 1..{channels}, the channels of this model")
        solver = get_sampler(settings.sampler, process, settings.eta)
        if guide:
            check_guide(guide, spec, model)
            if settings.cfg_scale == 1:
                raise UserError("`guide_ckpt` needs a `cfg_scale` other than 1, which is no guidance")
            if settings.reuse != "none":
                raise UserError(f"`guide_ckpt` and `reuse` {settings.reuse} cannot be combined")
        if settings.internal_scale != 1:
            check_internal(settings, spec)
        sampling = cls(replace(settings, cfg_channels=guided), process, solver, guide=guide)
        if settings.reuse == "none":
            return sampling
        if settings.sampler == "map":
            raise UserError(f"`reuse` {settings.reuse} saves nothing with `sampler` map, whose steps are few and long")
        check(model, Seam, f"`reuse` {settings.reuse} needs")
        return replace(sampling, plan=plan(settings.reuse, sampling.times, sampling.guided, len(model.blocks),
                                           model.default_split, settings.key_steps, **settings.reuse_args))

    @cached_property
    def times(self) -> tuple[float, ...]:
        """t, 0..1000, at each evaluation of the model."""
        return evaluation_times(self.solver, self.process)

    @property
    def guided(self) -> tuple[bool, ...]:
        """Whether there is guidance, at each evaluation of the model."""
        return in_interval(self.times, self.settings.cfg_scale, self.settings.guidance_interval)

    @property
    def model_calls(self) -> int:
        """How often the model computes an image, both branches of guidance counted; the guide's calls too."""
        return len(self.times) + sum(self.guided)

    def block_calls(self, model: nn.Module) -> int | None:
        """How many blocks are computed for an image, the guide's too; None if a network has no `blocks`."""
        if self.plan:
            return self.plan.block_calls()
        model = backbone(model)
        weaker = self.guide.model if self.guide else model
        if not (hasattr(model, "blocks") and hasattr(weaker, "blocks")):
            return None
        return len(model.blocks) * len(self.times) + len(weaker.blocks) * sum(self.guided)

    def called(self, model: nn.Module, images: int) -> Callable:
        """What guidance calls, (x, t, y) -> prediction, for so many images: the network, its reuse or its internal guidance."""
        settings = self.settings
        if settings.internal_scale != 1:
            if not isinstance(model, WithHeads):
                raise UserError("internal guidance needs the network with its head: call prepare(restored, sampling) first")
            guided = in_interval(self.times, settings.internal_scale, settings.internal_interval)
            return guided_inside(model, settings.internal_scale, guided)
        return Reuse(backbone(model), self.plan, images) if self.plan else backbone(model)

    def record(self) -> dict[str, Any]:
        """The settings for NAME.json and the text chunks of a PNG."""
        guide = {"guide": self.guide.name, "guide_sha256": self.guide.sha256()} if self.guide else {}
        return self.settings.record(str(self.plan or "none")) | guide

    def file_name_parts(self) -> list[str]:
        parts = self.settings.file_name_parts(f"{self.settings.reuse}-{sum(self.plan.keys)}-keys" if self.plan else None)
        return [*parts, f"autoguided-by-{self.guide.name}"] if self.guide else parts


def check_internal(settings: SamplingSettings, spec: Spec) -> None:
    """Raises UserError if internal guidance does not go with a network, or with other settings."""
    if "internal" not in (spec.heads or {}):
        raise UserError(f"`internal_scale` {settings.internal_scale} needs a network that was trained with the head internal "
                        "(`heads` of train.py); `internal_scale` 1 switches it off")
    for name, value in {"sampler": settings.sampler == "map", "reuse": settings.reuse != "none"}.items():
        if value:
            raise UserError(f"`internal_scale` and `{name}` {getattr(settings, name)} cannot be combined; "
                            "`internal_scale` 1 switches the first off")


def restore_autoencoder(world: World, restored: checkpoint.Restored, sampling: Sampling, same: bool = True) -> nn.Module:
    """The autoencoder of a checkpoint's spec, on this process's device.

    Args:
        same: whether it must have the weights that the network was trained with. False if the user chose another one.

    Raises:
        UserError: its latents do not fit the network, or the settings.
    """
    spec, model = restored.spec, restored.model
    with prefix_errors("`vae`"):
        try:
            autoencoder = world.main_first(lambda: load_autoencoder(spec.vae, world.device, spec.statistics))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; the checkpoint names it: if it has moved, pass its new path as `vae`"
                                    if same else str(error)) from None
        if same:
            check_autoencoder(autoencoder, spec)
        latent_shape = autoencoder.latent_shape(spec.image_size, spec.channels)
    if latent_shape != (model.in_channels, *model.input_size):
        raise UserError(f"`vae` {spec.vae} has latents of shape {latent_shape}, the model takes "
                        f"{(model.in_channels, *model.input_size)}")
    check_thresholding(sampling.settings, autoencoder)
    return autoencoder


def check_thresholding(settings: SamplingSettings, autoencoder: nn.Module) -> None:
    if settings.dynamic_thresholding and not autoencoder.bounded:
        raise UserError(f"`dynamic_thresholding` is for pixels in [-1, 1]; {autoencoder.spec['vae']} has unbounded latents")


def prepare(restored: checkpoint.Restored, sampling: Sampling, compile: bool = False) -> None:
    """Make the network of a checkpoint ready, in place, and its guide: heads for internal guidance; see prepare_network."""
    if sampling.settings.cfg_scale != 1 and not sampling.guide and checkpoint.label_drop_of(restored.facts) == 0:
        raise UserError(f"`cfg_scale` {sampling.settings.cfg_scale:g} needs a network trained with label_drop: this one "
                        "does not know the null label (`guide_ckpt` guides without)")
    if sampling.guide and sampling.guide.path.resolve() == restored.path.resolve():
        raise UserError(f"`guide_ckpt` {restored.path} is the checkpoint itself: it must be a weaker one")
    if sampling.settings.internal_scale != 1:
        restored.model = restore_heads(restored)
    for network in [restored.model, sampling.guide.model] if sampling.guide else [restored.model]:
        prepare_network(network, sampling.settings.precision, compile)


def prepare_network(model: nn.Module, precision: str, compile: bool) -> None:
    """Make a restored network fast, in place: bf16 weights for precision "bf16", and torch.compile.

    If a network has a seam, its two halves are compiled one by one, because reuse calls them so.
    """
    cast_weights(model, precision)
    model = backbone(model)
    if not compile:
        return
    if offers(model, Seam):
        model.encode, model.decode = torch.compile(model.encode), torch.compile(model.decode)
    else:
        model.compile()


# --- noise -> image ------------------------------------------------------------------------------


def generate(model: nn.Module, autoencoder: nn.Module, labels: list[int], indices: range | list[int], seed: int,
             sampling: Sampling, on_step: Callable[[dict[str, Tensor]], object] = lambda step: None) -> Tensor:
    """Images (B, H, W, C) uint8 on the model's device, one for each label and index: (seed, index, label) -> image.

    Start noise is addressed by (seed, index), later noise by (seed, index, step): an image depends neither on the batch
    that it is drawn in nor on the device, up to rounding.

    >>> from pipeline import checkpoint
    >>> from pipeline.autoencoders import load_autoencoder
    >>> restored = checkpoint.restore("results/digits")
    >>> autoencoder = load_autoencoder(restored.spec.vae, statistics=restored.spec.statistics)
    >>> sampling = Sampling.of(restored.spec, {"num_sampling_steps": 8})
    >>> generate(restored.model, autoencoder, [3, 7], [0, 1], seed=0, sampling=sampling).shape
    torch.Size([2, 8, 8, 1])

    Args:
        labels: class ids, one an image.
        indices: the numbers of the images; a seed defines image 0, 1, 2 and so on without end.
        on_step: called with {"sample", "pred_xstart"} after each step.
    """
    settings, device = sampling.settings, next(model.parameters()).device
    y = to_device(torch.tensor(labels), device)
    with torch.no_grad(), autocast(device, settings.precision):
        network = sampling.called(model, len(labels))
        network = guide(network, y, model.num_classes, settings.cfg_scale, settings.cfg_channels, sampling.guided,
                        sampling.guide.model if sampling.guide else None)
        noise = addressed_noise(model, seed, indices)
        steps = sampling.solver(sampling.process, network, noise, partial(addressed_noise, model, seed, indices),
                                pixel_limit(sampling, autoencoder))
        for step in add_prior_noise(steps, noise, sampling.plan) if sampling.plan else steps:
            x = step["sample"]
            on_step(step)
    return decode(autoencoder, x, sampling)


def check_samples(samples: Tensor) -> None:
    """Raises UserError if samples are not finite: they would be black pictures."""
    if not samples.isfinite().all():
        raise UserError("the samples are not finite, and would be black pictures; a lower `cfg_scale`, more "
                        "`num_sampling_steps` or `precision` fp32 may help, or an earlier checkpoint")


def pixel_limit(sampling: Sampling, autoencoder: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The function that keeps predicted pixels in [-1, 1]; None for latents."""
    scale = sampling.process.input_scale
    if sampling.settings.dynamic_thresholding:
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
