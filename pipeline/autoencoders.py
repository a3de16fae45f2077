"""Image <-> latent. Only this file handles scale factors of latents.

Every autoencoder has
    spec                           plain dict; `load_autoencoder(spec["vae"])` builds the autoencoder again
    bounded                        whether latents lie in [-1, 1], as pixels do: a sampler may then clip its predictions
    latent_shape(image_size, C)    (C, H, W) of the latent of an image of `image_size` (H, W) and C channels
    stochastic                     whether an image has a posterior of latents to draw from, and not one latent
    encode(images, noise)          (B, C, H, W) in [-1, 1] -> latents; `noise` (of their shape) draws from the posterior
    decode(latents)                -> images (B, C, H, W) in [-1, 1]
    identity()                     what cached features must have been made with to fit it

Autoencoders whose latents can be cached split `encode` in two: `sample(moments(images), noise)`.
"""

import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline import checkpoint
from pipeline.spec import Spec
from runtime import UserError
from runtime.cli import one_line
from runtime.pictures import to_unit_range

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
    """Stable Diffusion's autoencoder, or any diffusers `AutoencoderKL`; scale and shift come from its config."""

    bounded, stochastic = False, True

    def __init__(self, source: str):
        super().__init__()
        self.spec = {"vae": source}
        self.vae = load_autoencoder_kl(source).to(memory_format=torch.channels_last)
        config = self.vae.config
        self.scale, self.shift = config.scaling_factor, config.get("shift_factor") or 0.0
        self.factor = 2 ** (len(config.block_out_channels) - 1)  # image size / latent size
        self.requires_grad_(False)

    def latent_shape(self, image_size: tuple[int, int], channels: int) -> tuple[int, int, int]:
        config = self.vae.config
        return shrunk(image_size, channels, self.spec["vae"], config.in_channels, config.latent_channels, self.factor)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.sample(self.moments(images), noise)

    def moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance of the posterior, unscaled: (B, 2C, h, w)."""
        return self.vae.encode(images).latent_dist.parameters

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (B, C, h, w) from their moments (B, 2C, h, w)."""
        mean, log_variance = moments.chunk(2, dim=1)
        latents = mean if noise is None else mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise
        return (latents - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.scale + self.shift).sample.clamp(-1, 1)

    def identity(self) -> dict:
        """The scale, and the sha256 of the weights. It does not depend on the file that holds them."""
        return {"sha256": weights_sha256(self.vae), "scaling_factor": self.scale, "shift_factor": self.shift}


class TrainedAutoencoder(nn.Module):
    """An autoencoder that train.py trained (small_models.Autoencoder). It is deterministic; its latents are standardised."""

    bounded, stochastic = False, False

    def __init__(self, source: str, network: nn.Module):
        super().__init__()
        self.spec, self.network = {"vae": source, "vae_sha256": weights_sha256(network)}, network

    def latent_shape(self, image_size: tuple[int, int], channels: int) -> tuple[int, int, int]:
        network = self.network
        return shrunk(image_size, channels, self.spec["vae"], network.in_channels, network.LATENT_CHANNELS, network.FACTOR)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.network.encode(images)

    def moments(self, images: Tensor) -> Tensor:
        """The latent, and a log-variance that means no variance: (B, 2C, h, w)."""
        latents = self.encode(images)
        return torch.cat([latents, torch.full_like(latents, -30)], dim=1)

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return moments.chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        return self.network.decode(latents).clamp(-1, 1)

    def identity(self) -> dict:
        return {"vae_sha256": self.spec["vae_sha256"]}


def shrunk(image_size: tuple[int, int], channels: int, vae: str, in_channels: int, latent_channels: int,
           factor: int) -> tuple[int, int, int]:
    """The shape of latents `factor` times smaller than the images. Raises UserError if the autoencoder cannot take these."""
    if channels != in_channels:
        raise UserError(f"{vae} takes images of {in_channels} channels, not of {channels}; pixels takes any")
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
    """The latents (B, C, h, w) of a batch. `kind` says what the data set holds (see training/rows.py)."""
    match kind:
        case "images":
            return autoencoder.encode(to_unit_range(batch), noise)
        case "moments":
            return autoencoder.sample(batch.float(), noise)
        case "latents":
            return batch


def check_features(autoencoder: nn.Module, *datasets) -> None:
    """Raises UserError if one of the data sets holds features of another autoencoder. None is skipped."""
    features = [data for data in datasets if data is not None and data.kind != "images"]
    if features and isinstance(autoencoder, Pixels):
        raise UserError("pixels: `data_path` holds features, which only the autoencoder that made them can decode")
    identity = autoencoder.identity() if features else {}
    for data in features:
        own = identity | {"latent_shape": autoencoder.latent_shape(data.image_size, data.channels)}
        for key, value in (data.made_by | {"latent_shape": data.latent_shape}).items():
            if key != "vae" and own.get(key) != value:  # the name may differ: a folder may have moved
                raise UserError(f"{autoencoder.spec['vae']} is not the autoencoder of the features in `data_path`: "
                                f"their {key} is {value}, its is {own.get(key)}")


def check_autoencoder(autoencoder: nn.Module, spec: Spec) -> None:
    """Raises UserError if the checkpoint's spec names other weights: the autoencoder's run may have continued since."""
    expected, found = spec.vae_sha256, autoencoder.spec.get("vae_sha256")
    if expected != found:
        raise UserError(f"{spec.vae} has other weights than the model was trained with: their sha256 is {found}, "
                        f"expected {expected}; `vae` may name where the right ones lie")


def load_autoencoder_kl(source: str) -> nn.Module:
    """A diffusers AutoencoderKL from a local folder or the hub."""
    from diffusers import AutoencoderKL  # slow to import
    from huggingface_hub import try_to_load_from_cache

    hub_id = HUB_IDS.get(source, source)
    is_path = hub_id.startswith((".", "/", "~")) or hub_id.count("/") != 1 or Path(hub_id).parent.is_dir()
    if is_path and not Path(hub_id).is_dir():
        raise FileNotFoundError(f"{source}: no such folder; allowed: ema, mse, pixels, a folder that "
                                "AutoencoderKL.save_pretrained wrote, the run or checkpoint of an autoencoder, or a hub id "
                                "owner/name")
    try:
        with warnings.catch_warnings(action="ignore"):  # the hub's client warns of its own deprecations
            kind = AutoencoderKL.load_config(hub_id).get("_class_name", "AutoencoderKL")
            if kind == "AutoencoderKL":
                return AutoencoderKL.from_pretrained(hub_id, low_cpu_mem_usage=False).eval()
        reason = f"it holds an {kind}; expected an AutoencoderKL"
    except (OSError, ValueError) as error:
        reason = one_line(error)[:200]
    if not is_path and not isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
        reason = "it is not in the cache of the hub's files, and the hub did not give it; a folder with it can be named instead"
    raise UserError(f"{source}: cannot load an AutoencoderKL from {hub_id}: {reason}")


def load_autoencoder(vae: str, device: torch.device | str = "cpu") -> nn.Module:
    """Load an autoencoder: "pixels", "ema" or "mse" (Stable Diffusion's), a local folder, a hub id, or a checkpoint or
    run of an autoencoder that train.py trained."""
    if vae == "pixels":
        return Pixels()
    path = Path(vae)
    source = str(path.resolve()) if path.exists() else vae
    if path.suffix == ".pt" or (path / "checkpoints").is_dir() or (path / "model.safetensors").is_file():  # export.py's
        return TrainedAutoencoder(source, checkpoint.restore_autoencoder(source)).to(device)
    return SDVAE(source).to(device)
