"""The networks of small systems: MLP, ConvAdaLN, Autoencoder, Classifier. NETWORKS joins all registries.

Legend: B batch, C channels of the image or latent, H W its size, D width, L number of classes.
"""

from collections import ChainMap
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import Backbone, DiT_models, TimestepEmbedder, channels_first, channels_last, check_size, zeros


class MLP(Backbone):
    """MinDiff's network for digits, on flat pixels: [x | t | label] -> Linear -> Mish -> LayerNorm -> Linear.

    The null label's embedding is zero before its LayerNorm. (No flow map: the head does not see the end of a step.)

    Args: the defaults are those for MNIST's digits.
        hidden_size: width of the hidden layer.
        label_features: width of the label's embedding.
        input_size, in_channels, num_classes, learn_sigma, gradient_checkpointing: see DiT.
    """

    def __init__(self, input_size: int | tuple[int, int] = 28, in_channels: int = 1, hidden_size: int = 4096,
                 label_features: int = 239, num_classes: int = 10, learn_sigma: bool = False,
                 gradient_checkpointing: bool = False):
        super().__init__(input_size, in_channels, num_classes, learn_sigma, gradient_checkpointing, size_multiple=1)
        if label_features < 1 or hidden_size < 1:
            raise ValueError(f"label_features ({label_features}) and hidden_size ({hidden_size}) must be at least 1")
        h, w = self.input_size
        pixels = in_channels * h * w
        self.embedding_table = nn.Embedding(num_classes, label_features)
        self.norm = nn.LayerNorm(label_features)
        self.blocks = nn.ModuleList([MLPBlock(pixels + 1 + label_features, hidden_size)])
        self.head = zeros(nn.Linear(hidden_size, pixels * (2 if learn_sigma else 1)))
        self.default_split = 1

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """t (B,) in 0..1000, y (B,) in 0..L -> c (B, 1 + label_features)."""
        label = self.embedding_table(y.clamp(max=self.num_classes - 1)) * (y < self.num_classes)[:, None]
        return torch.cat([t[:, None].to(label.dtype) / 1000, self.norm(label)], dim=1)

    def encode(self, x: Tensor, c: Tensor, split: int | None = None) -> tuple[Tensor]:
        """x (B, C, H, W) -> flat pixels (B, C*H*W) for split 0, the hidden layer (B, hidden_size) for split 1."""
        return (self.run_blocks(self.blocks[: self.resolve_split(split)], x.flatten(1), c),)

    def decode(self, state: tuple[Tensor], c: Tensor, split: int | None = None) -> Tensor:
        """What encode returned for the same split -> (B, C or 2C, H, W)."""
        x = self.run_blocks(self.blocks[self.resolve_split(split) :], state[0], c)  # (B, hidden_size)
        return self.head(x).view(x.shape[0], self.out_channels, *self.input_size)


class MLPBlock(nn.Module):
    """[x | c] -> Linear -> Mish -> LayerNorm: (B, features of x and of c) -> (B, hidden_size)."""

    def __init__(self, in_features: int, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(in_features, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.norm(F.mish(self.linear(torch.cat([x, c], dim=1))))


class ConvAdaLN(Backbone):
    """MinDiff's denoiser of small latents: 3x3 convolutions at one resolution, modulated by t and label.

    Args: the defaults are those for the latents of Autoencoder on 32 x 32 images.
        hidden_size: D, the width of the blocks; a multiple of 8.
        input_size: H = W, or (H, W), of latents to be drawn; any size can pass through the network.
        in_channels, depth, num_classes, learn_sigma, gradient_checkpointing, time_scale: see DiT.
    """

    def __init__(self, input_size: int | tuple[int, int] = 8, in_channels: int = 8, hidden_size: int = 256, depth: int = 8,
                 num_classes: int = 10, learn_sigma: bool = False, gradient_checkpointing: bool = False,
                 time_scale: float = 1.0):
        super().__init__(input_size, in_channels, num_classes, learn_sigma, gradient_checkpointing, size_multiple=1)
        if depth < 1 or hidden_size < 8 or hidden_size % 8 or time_scale <= 0:
            raise ValueError(f"depth ({depth}) must be at least 1, hidden_size ({hidden_size}) a multiple of 8, "
                             f"time_scale ({time_scale}) positive")
        self.time_scale = time_scale
        self.stem = nn.Conv2d(in_channels, hidden_size, kernel_size=3, padding=1)
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size // 2)
        self.embedder = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.Mish())
        self.blocks = nn.ModuleList(ConvAdaLNBlock(hidden_size) for _ in range(depth))
        self.head = nn.Sequential(nn.Mish(), nn.GroupNorm(8, hidden_size),
                                  zeros(nn.Conv2d(hidden_size, self.out_channels, kernel_size=3, padding=1)))
        self.default_split = min(depth - 1, round(depth * 18 / 28))  # the share of Isotropic; the head has no condition
        self.to(memory_format=torch.channels_last)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """t (B,) in 0..1000, y (B,) in 0..L -> c (B, D)."""
        label = self.embedding_table(y)                                                  # (B, D/2)
        time = TimestepEmbedder.timestep_embedding(self.time_scale * t, label.shape[1])  # (B, D/2)
        return self.embedder(torch.cat([time.to(label.dtype), label], dim=1))

    def encode(self, x: Tensor, c: Tensor, split: int | None = None) -> tuple[Tensor]:
        """x (B, C, H, W) -> (B, H, W, D) after the first `split` blocks."""
        x = self.stem(x).to(x.dtype)  # (B, D, H, W)
        return (channels_last(self.run_blocks(self.blocks[: self.resolve_split(split)], x, c)),)

    def decode(self, state: tuple[Tensor], c: Tensor, split: int | None = None) -> Tensor:
        """What encode returned for the same split -> (B, C or 2C, H, W)."""
        x = self.run_blocks(self.blocks[self.resolve_split(split) :], channels_first(state[0]), c)  # (B, D, H, W)
        return self.head(x).contiguous()


class ConvAdaLNBlock(nn.Module):
    """x + conv0(GroupNorm(Mish(scale * conv(GroupNorm(x)) + shift))). At first the bias of scale is 1, and conv0 is 0."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, hidden_size)
        self.conv = nn.Conv2d(hidden_size, hidden_size, kernel_size=3, padding=1)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.norm0 = nn.GroupNorm(8, hidden_size)
        self.conv0 = zeros(nn.Conv2d(hidden_size, hidden_size, kernel_size=3, padding=1))
        nn.init.zeros_(self.modulation.bias)
        nn.init.ones_(self.modulation.bias[:hidden_size])

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.modulation(c)[..., None, None].chunk(2, dim=1)  # (B, D, 1, 1) each
        return x + self.conv0(self.norm0(F.mish(scale * self.conv(self.norm(x)) + shift)))  # (B, D, H, W)


class Autoencoder(nn.Module):
    """MinDiff's convolutional autoencoder: images (B, C, H, W) <-> latents (B, latent_channels, H/factor, W/factor).

    Each latent is standardised: it has mean 0 and variance 1 over its channels and positions. There is no noise and no KL
    term.

    Args: the defaults are those for CIFAR-10's images, F4-C8.
        input_size: H = W, or (H, W), of the image; multiples of factor.
        in_channels: C of the image.
        hidden_size: width at full resolution, a multiple of 8. Each halving of the resolution doubles it.
        factor: image size / latent size, a power of 2.
        latent_channels: channels of a latent.
    """

    def __init__(self, input_size: int | tuple[int, int] = 32, in_channels: int = 3, hidden_size: int = 32, factor: int = 4,
                 latent_channels: int = 8):
        super().__init__()
        if factor < 2 or factor & (factor - 1) or latent_channels < 1:
            raise ValueError(f"factor ({factor}) must be 2, 4, 8 …, latent_channels ({latent_channels}) at least 1")
        self.input_size, self.in_channels = check_size(input_size, factor), in_channels
        self.factor, self.latent_channels = factor, latent_channels
        if hidden_size < 8 or hidden_size % 8:
            raise ValueError(f"hidden_size {hidden_size} is not a positive multiple of 8")
        widths = [hidden_size * 2**level for level in range(factor.bit_length())]
        levels = list(pairwise(widths))  # the widths on both sides of each halving

        def conv(channels: int, out_channels: int) -> nn.Conv2d:
            return nn.Conv2d(channels, out_channels, kernel_size=3, padding=1)

        def stage(narrow: int, wide: int, resample: nn.Module, down: bool) -> list[nn.Module]:
            first, second = ((narrow, wide), (wide, wide)) if down else ((wide, wide), (wide, narrow))
            return [nn.GroupNorm(8, first[0]), conv(*first), nn.Mish(), resample,
                    nn.GroupNorm(8, second[0]), conv(*second), nn.Mish()]

        self.encoder = nn.Sequential(
            conv(in_channels, widths[0]), nn.Mish(),
            *(layer for level in levels for layer in stage(*level, nn.AvgPool2d(2), down=True)),
            nn.GroupNorm(8, widths[-1]), conv(widths[-1], latent_channels))
        self.decoder = nn.Sequential(
            conv(latent_channels, widths[-1]), nn.Mish(),
            *(layer for level in reversed(levels) for layer in stage(*level, nn.Upsample(scale_factor=2), down=False)),
            nn.GroupNorm(8, widths[0]), conv(widths[0], in_channels))
        self.to(memory_format=torch.channels_last)

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> latents (B, latent_channels, H/factor, W/factor)."""
        latents = self.encoder(images)
        return F.layer_norm(latents, latents.shape[1:]).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, latent_channels, H/factor, W/factor) -> images (B, C, H, W), near [-1, 1]."""
        return self.decoder(latents)

    def forward(self, x: Tensor, t: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """The reconstruction of x (B, C, H, W). t and y are ignored."""
        return self.decode(self.encode(x))


class Classifier(nn.Module):
    """A small convolutional classifier of (B, 3, h, w) pixels, as pipeline/encoders.py's `pixel_features` gives them.

    benchmarks/classifier.py trains it.

    Its features stand in for Inception's (evaluation/extractors.py), and for DINOv2's (pipeline/encoders.py).
    """

    FACTOR = 4  # the size of x over that of feature_map

    def __init__(self, num_classes: int, width: int = 32):
        def conv(channels: int, out_channels: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]

        super().__init__()
        self.features = nn.Sequential(  # (B, 3, h, w) -> (B, 4 width)
            *conv(3, width),
            nn.MaxPool2d(2), *conv(width, 2 * width), *conv(2 * width, 2 * width),
            nn.MaxPool2d(2), *conv(2 * width, 4 * width), *conv(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4 * width, num_classes)

    def feature_map(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, 4 width, h // 4, w // 4), whose mean over positions is `features`."""
        return self.features[:-2](x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


# -------------------------------------------------------------------------------------------------
# Registries
# -------------------------------------------------------------------------------------------------

Small_models = {"MLP": partial(MLP), "ConvAdaLN": partial(ConvAdaLN)}
Autoencoder_models = {"Autoencoder-F4C8": partial(Autoencoder),
                      "Autoencoder-F2C4": partial(Autoencoder, factor=2, latent_channels=4)}

DIFFUSION_NETWORKS = ChainMap(Small_models, DiT_models)  # a view: later additions to a registry appear in it
NETWORKS = ChainMap(Autoencoder_models, Small_models, DiT_models)
