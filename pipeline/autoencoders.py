"""Image <-> latent. Only this file handles scale factors of latents.

Every autoencoder has
    spec                           the entries of a checkpoint's Spec that describe it, for `load_autoencoder`
    bounded                        whether latents lie in [-1, 1], as pixels do: a sampler may then clip its predictions
    stochastic                     whether an image has a posterior to draw latents from, instead of one latent
    latent_shape(image_size, C)    (C, H, W) of the latent of an image of `image_size` (H, W) and C channels
    encode(images, noise)          (B, C, H, W) in [-1, 1] -> latents; `noise` (of their shape) draws from the posterior
    decode(latents)                -> images (B, C, H, W) in [-1, 1]
    identity()                     what cached features store, to be compared with it

If latents can be cached, `encode` has two halves: `sample(moments(images), noise)`.
"""

import hashlib
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline import checkpoint
from pipeline.interchange import from_ldm
from pipeline.spec import Spec, Statistics
from pipeline.weights import check_values, find_weights, load_weights, stripped
from runtime import UserError
from runtime.cli import WRONG_VALUE, one_line, prefix_errors
from runtime.files import quiet_hub
from runtime.pictures import to_unit_range

NO_VARIANCE = -30  # the log-variance of a latent without posterior
HUB_IDS = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


class Pixels(nn.Module):
    """No autoencoder: diffusion in pixels."""

    bounded, stochastic = True, False

    def __init__(self):
        super().__init__()
        self.spec = {"vae": "pixels"}

    def latent_shape(self, image_size: tuple[int, int], channels: int) -> tuple[int, int, int]:
        return (channels, *image_size)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)

    def identity(self) -> dict:
        return {}


class SDVAE(nn.Module):
    """Stable Diffusion's autoencoder, or any `AutoencoderKL` or `AutoencoderDC` of diffusers.

    Latents are (z - shift) * scale. In the config, scale is scaling_factor and shift is shift_factor; if it has latents_mean
    and latents_std per channel, scale is scaling_factor / latents_std and shift is latents_mean.

    Args:
        source: its name or path.
        vae: diffusers' network.
        statistics: mean and standard deviation of z per channel, which replace the config's: latents are (z - mean) / std.
    """

    bounded = False

    def __init__(self, source: str, vae: nn.Module, statistics: Statistics | None = None):
        super().__init__()
        self.vae = vae.to(memory_format=torch.channels_last)
        config = vae.config
        self.stochastic = hasattr(vae, "quant_conv")  # an AutoencoderDC has one latent per image
        self.factor = getattr(vae, "spatial_compression_ratio", 2 ** (len(config.get("block_out_channels") or [0]) - 1))
        self.spec = {"vae": source}
        self.of_config = {"scaling_factor": config.scaling_factor, "shift_factor": config.get("shift_factor") or 0.0}
        if config.get("latents_mean") and config.get("latents_std"):
            self.of_config |= {"latents_mean": list(config.latents_mean), "latents_std": list(config.latents_std)}
        if statistics:
            self.spec |= {"latents_mean": list(statistics[0]), "latents_std": list(statistics[1])}
            self.normalise(*statistics, scaling=1.0)
        elif "latents_mean" in self.of_config:
            self.normalise(config.latents_mean, config.latents_std, config.scaling_factor)
        else:
            self.shift, self.scale = self.of_config["shift_factor"], self.of_config["scaling_factor"]
        self.requires_grad_(False)

    def normalise(self, mean: list[float], std: list[float], scaling: float) -> None:
        """Set latents to (z - mean) * scaling / std. Raises UserError if these do not have one number per channel."""
        channels = self.vae.config.latent_channels
        with prefix_errors(f"{self.spec['vae']}: latents_mean and latents_std:", *WRONG_VALUE):
            shift, divisor = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
            finite = shift.isfinite().all() and divisor.isfinite().all()
            if len(shift) != channels or len(divisor) != channels or not finite or not (divisor > 0).all():
                raise UserError(f"they must be {channels} finite numbers each, one per channel, and latents_std positive")
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scaling / divisor, persistent=False)

    def latent_shape(self, image_size: tuple[int, int], channels: int) -> tuple[int, int, int]:
        config = self.vae.config
        return shrunk(image_size, channels, self.spec["vae"], config.in_channels, config.latent_channels, self.factor)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.sample(self.moments(images), noise)

    def moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance of the posterior, unscaled: (B, 2C, h, w)."""
        if self.stochastic:
            return self.vae.encode(images).latent_dist.parameters
        return without_variance(self.vae.encode(images).latent)

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (B, C, h, w) from their moments (B, 2C, h, w)."""
        latents, log_variance = moments.chunk(2, dim=1)
        if self.stochastic and noise is not None:
            latents = latents + torch.exp(0.5 * log_variance.clamp(NO_VARIANCE, 20)) * noise
        return (latents - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.scale + self.shift).sample.clamp(-1, 1)

    def identity(self) -> dict:
        """The scale in its config, and the sha256 of its weights, in whatever file they are."""
        return {"sha256": weights_sha256(self.vae), **self.of_config}


class TrainedAutoencoder(nn.Module):
    """An autoencoder trained by train.py (small_models.Autoencoder). It is deterministic and standardises its latents."""

    bounded, stochastic = False, False

    def __init__(self, source: str, network: nn.Module):
        super().__init__()
        self.spec, self.network = {"vae": source, "vae_sha256": weights_sha256(network)}, network

    def latent_shape(self, image_size: tuple[int, int], channels: int) -> tuple[int, int, int]:
        network = self.network
        return shrunk(image_size, channels, self.spec["vae"], network.in_channels, network.latent_channels, network.factor)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.network.encode(images)

    def moments(self, images: Tensor) -> Tensor:
        return without_variance(self.encode(images))

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return moments.chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        return self.network.decode(latents).clamp(-1, 1)

    def identity(self) -> dict:
        return {"vae_sha256": self.spec["vae_sha256"]}


def shrunk(image_size: tuple[int, int], channels: int, vae: str, in_channels: int, latent_channels: int,
           factor: int) -> tuple[int, int, int]:
    """The shape of latents `factor` times smaller than the images. Raises UserError if the autoencoder cannot encode these."""
    if channels != in_channels:
        raise UserError(f"{vae} takes images of {in_channels} channels, not of {channels}; pixels takes any number")
    if any(size % factor for size in image_size):
        raise UserError(f"{vae}: `image_size` {image_size} is not divisible by {factor}, the factor of this autoencoder")
    return (latent_channels, *(size // factor for size in image_size))


def weights_sha256(network: nn.Module) -> str:
    """The sha256 of a network's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.cpu().flatten().view(torch.uint8).numpy())  # row by row, whatever the memory format
    return digest.hexdigest()


@torch.no_grad()
def latents_of(autoencoder: nn.Module, batch: Tensor, kind: str, noise: Tensor) -> Tensor:
    """The latents (B, C, h, w) of a batch. `kind` is what the data set has (see training/rows.py)."""
    match kind:
        case "images":
            return autoencoder.encode(to_unit_range(batch), noise)
        case "moments":
            return autoencoder.sample(batch.float(), noise)
        case "latents":
            return batch


def check_features(autoencoder: nn.Module, *datasets) -> None:
    """Raises UserError if one of the data sets has features of another autoencoder. None is skipped."""
    features = [data for data in datasets if data is not None and data.kind != "images"]
    if features and isinstance(autoencoder, Pixels):
        raise UserError("pixels: `data_path` has features, which only the autoencoder that made them can decode")
    identity = autoencoder.identity() if features else {}
    for data in features:
        expected = identity | {"latent_shape": autoencoder.latent_shape(data.image_size, data.channels)}
        for key, found in (data.made_by | {"latent_shape": data.latent_shape}).items():
            if key != "vae" and found != expected.get(key):  # its path may have changed
                raise UserError(f"{autoencoder.spec['vae']} is not the autoencoder of the features in `data_path`: "
                                f"their {key} is {found}, expected {expected.get(key)}")


def without_variance(latents: Tensor) -> Tensor:
    """Moments (B, 2C, h, w) of latents (B, C, h, w) without posterior."""
    return torch.cat([latents, torch.full_like(latents, NO_VARIANCE)], dim=1)


def check_autoencoder(autoencoder: nn.Module, spec: Spec) -> None:
    """Raises UserError if its weights are not those in the spec: the autoencoder's run may have continued since."""
    expected, found = spec.vae_sha256, autoencoder.spec.get("vae_sha256")
    if expected != found:
        raise UserError(f"{spec.vae} has other weights than the model was trained with: their sha256 is {found}, "
                        f"expected {expected}; pass the path of the right ones as `vae`")


def load_vae(source: str) -> nn.Module:
    """An AutoencoderKL or AutoencoderDC of diffusers, from a local folder or the hub."""
    from diffusers import AutoencoderDC, AutoencoderKL  # slow to import
    from huggingface_hub import try_to_load_from_cache

    kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderDC": AutoencoderDC}
    hub_id = HUB_IDS.get(source, source)
    is_path = hub_id.startswith((".", "/", "~")) or hub_id.count("/") != 1 or Path(hub_id).parent.is_dir()
    if is_path and not Path(hub_id).is_dir():
        raise FileNotFoundError(f"{source}: no such folder; allowed: ema, mse, pixels, a folder of diffusers' AutoencoderKL or "
                                "AutoencoderDC, a file of LDM's autoencoder, the run or checkpoint of an autoencoder, or a "
                                "hub id owner/name")
    try:
        with quiet_hub(None if is_path else hub_id):
            kind = AutoencoderKL.load_config(hub_id).get("_class_name", "AutoencoderKL")
            if kind not in kinds:
                raise UserError(f"it is an {kind}; expected an AutoencoderKL or AutoencoderDC")
            load = partial(kinds[kind].from_pretrained, hub_id, low_cpu_mem_usage=False, output_loading_info=True)
            file = checkpoint.component_file(Path(hub_id))
            if file or is_path:
                vae, found = load(variant=file and checkpoint.variant_of(file))
            else:
                try:
                    vae, found = load()
                except OSError:  # the hub may hold half precision only
                    vae, found = load(variant="fp16")
            if found["missing_keys"]:
                raise UserError(f"its weights lack {found['missing_keys'][0]}")
            weights = vae.float().state_dict()
            check_values(checkpoint.load_component(file) if file else weights, weights, "its weights")
            return vae.eval()
    except (OSError, ValueError, RuntimeError) as error:
        reason = one_line(error)[:200]
    if not is_path and not isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
        reason = "it is not in the hub's cache and cannot be downloaded; a local folder may be given instead"
    raise UserError(f"{source}: cannot load an autoencoder from {hub_id}: {reason}")


def load_ldm(path: Path) -> nn.Module:
    """The autoencoder in a file of LDM (for example VA-VAE), as diffusers' AutoencoderKL. The file does not state its scale."""
    from diffusers import AutoencoderKL

    state = checkpoint.load(path)
    with prefix_errors(f"{path} is not a supported autoencoder of LDM:", KeyError, AttributeError, *WRONG_VALUE):
        config, weights = from_ldm(stripped(find_weights(state, path.name)[0]))
        vae = AutoencoderKL(**config)
        load_weights(vae, weights, path)
    return vae.eval()


def load_autoencoder(vae: str, device: torch.device | str = "cpu", statistics: Statistics | None = None,
                     raw: bool = False) -> nn.Module:
    """An autoencoder by name.

    Args:
        vae: "pixels", "ema" or "mse" (Stable Diffusion's), a local folder, a hub id, a file of LDM's autoencoder, or a
            checkpoint, run or exported folder of an autoencoder trained by train.py.
        statistics: of its raw latents, to normalise them.
        raw: whether the scale of its latents may be unknown.

    Raises:
        UserError, OSError: it cannot be loaded, or the scale of its latents is unknown.
    """
    if vae == "pixels":
        return Pixels()
    path = Path(vae)
    source = str(path.resolve()) if path.exists() else vae
    is_file = path.suffix in (".pt", ".ckpt", ".safetensors")
    is_trained = (path / "checkpoints").is_dir() or (path / "model.safetensors").is_file()
    if is_trained or (is_file and "spec" in checkpoint.load(path)):
        return TrainedAutoencoder(source, checkpoint.restore_own_autoencoder(source)).to(device)
    if is_file and statistics is None and not raw:
        raise UserError(f"{vae} does not state the scale of its latents; extract_features.py measures it with `normalise`, for "
                        "training on these features")
    return SDVAE(source, load_ldm(path) if is_file else load_vae(source), statistics).to(device)
