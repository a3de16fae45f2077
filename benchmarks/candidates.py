"""Networks on trial, which compare.py compares with those of models.py: ConvAdaLN in parts, and new blocks.

    python benchmarks/candidates.py train --model ConvAdaLN-gelu …    # also sample_ddp; a checkpoint needs this file to load

Legend: B batch, C channels, H W size, D width.
"""

import importlib
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import (
    AdaLN,
    AttentionBlock,
    DiNextV3,
    LabelEmbedder,
    ResidualBlock,
    TimestepEmbedder,
    channels_first,
    channels_last,
    zeros,
)
from runtime import cli
from small_models import ConvAdaLN, Small_models

PARTS = {  # of ConvAdaLN, that DiNextV2's replace; stem, head and initial kernels stay ConvAdaLN's
    "depthwise": "the first 3x3 of a block by a depthwise 7x7, the second by a 1x1 MLP of three times the width, with GELU",
    "layer-norm": "a block's GroupNorms by LayerNorms over the channels, without weights",
    "gelu": "a block's Mish by GELU",
    "adaln-zero": "the modulation after the first 3x3 by one before it, and a gate of 0 at the end in place of kernels of 0",
    "embedders": "the sum of an MLP of the time and a label, both of DiT, in place of one layer of both",
}


class Parts(ConvAdaLN):
    """ConvAdaLN with one of PARTS replaced. For the other arguments see ConvAdaLN."""

    def __init__(self, part: str = "gelu", input_size: int | tuple[int, int] = 8, in_channels: int = 8, hidden_size: int = 96,
                 depth: int = 4, num_classes: int = 10, learn_sigma: bool = False):
        if part not in PARTS:
            raise ValueError(f"part {part!r} must be {', '.join(PARTS)}")
        super().__init__(input_size, in_channels, hidden_size, depth, num_classes, learn_sigma)
        self.blocks = nn.ModuleList(PartsBlock(hidden_size, part) for _ in range(depth))
        if part == "embedders":
            self.embedders = nn.ModuleList([TimestepEmbedder(hidden_size), LabelEmbedder(self.num_classes, hidden_size)])
            del self.embedding_table, self.embedder
            for linear in (self.embedders[0].mlp[0], self.embedders[0].mlp[2]):
                nn.init.normal_(zeros(linear).weight, std=0.02)
        self.to(memory_format=torch.channels_last)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        if hasattr(self, "embedders"):
            return self.embedders[0](t) + self.embedders[1](y)  # (B, D)
        return super().condition(t, y)


class PartsBlock(nn.Module):
    """ConvAdaLNBlock with one of PARTS replaced: x (B, D, H, W), c (B, D) -> (B, D, H, W)."""

    def __init__(self, width: int, part: str):
        super().__init__()
        self.zero, deep = part == "adaln-zero", part == "depthwise"
        self.norm, self.norm0 = (LayerNorm2d(width) if part == "layer-norm" else nn.GroupNorm(8, width) for _ in range(2))
        self.conv = nn.Conv2d(width, width, 7, padding=3, groups=width) if deep else nn.Conv2d(width, width, 3, padding=1)
        self.conv0 = Mlp2d(width) if deep else nn.Conv2d(width, width, 3, padding=1)
        self.activation = nn.GELU() if part == "gelu" else nn.Mish()
        self.modulation = nn.Sequential(nn.SiLU() if part == "embedders" else nn.Identity(),  # after Mish, or as adaLN has it
                                        nn.Linear(width, (3 if self.zero else 2) * width))
        last = self.modulation[-1]
        nn.init.zeros_(last.bias)
        if self.zero:
            nn.init.zeros_(last.weight)
        else:
            nn.init.ones_(last.bias[:width])  # of scale
            zeros(self.conv0.fc2 if deep else self.conv0)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        vectors = self.modulation(c)[..., None, None]  # (B, 2D or 3D, 1, 1)
        if self.zero:
            scale, shift, gate = vectors.chunk(3, dim=1)
            return x + gate * self.conv0(self.norm0(self.activation(self.conv((1 + scale) * self.norm(x) + shift))))
        scale, shift = vectors.chunk(2, dim=1)
        return x + self.conv0(self.norm0(self.activation(scale * self.conv(self.norm(x)) + shift)))


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of x (B, D, H, W)."""

    def __init__(self, width: int):
        super().__init__(width, elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return channels_first(super().forward(channels_last(x)))


class Mlp2d(nn.Module):
    """DiNextV2's MLP, of x (B, D, H, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return channels_first(self.fc2(F.gelu(self.fc1(channels_last(x)))))


class MacroBlock(nn.Module):
    """ConvNeXt's one residual, with a dense kernel: GroupNorm, modulated -> 3x3 -> GELU -> 1x1 -> gate, which is 0 at first."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.linear = nn.Linear(width, width)
        self.adaLN_modulation = AdaLN(width, 3)
        zeros(self.adaLN_modulation[-1])

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, D, h, w), c (B, D) -> (B, D, h, w)."""
        scale, shift, gate = self.adaLN_modulation(c)[..., None, None].chunk(3, dim=1)
        h = F.gelu(self.conv(torch.addcmul(shift, self.norm(x), 1 + scale)))
        return x + gate * channels_first(self.linear(channels_last(h)))


class Dense(DiNextV3):
    """MacroBlocks in place of DiNextV3's blocks of both kinds. For the arguments see DiNextV3."""

    def __init__(self, input_size: int | tuple[int, int] = 8, in_channels: int = 8, hidden_size: int = 96, depth: int = 6,
                 num_classes: int = 10, learn_sigma: bool = False):
        super().__init__(input_size, patch_size=1, in_channels=in_channels, hidden_size=hidden_size, depth=depth, num_heads=1,
                         attention_every=depth, num_classes=num_classes, learn_sigma=learn_sigma)
        self.blocks = nn.ModuleList(MacroBlock(hidden_size) for _ in range(depth))
        self.to(memory_format=torch.channels_last)


class SiluBlock(ResidualBlock):
    """ResidualBlock with SiLU, which is nearly ConvAdaLN's Mish and as fast as GELU."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.adaLN_modulation(c)[..., None, None].chunk(2, dim=1)
        return x + self.conv2(self.norm2(F.silu(torch.addcmul(shift, self.conv1(self.norm1(x)), 1 + scale))))


class Silu(DiNextV3):
    """DiNextV3 with SiLU in place of GELU, its heads of 32 channels. For the arguments see DiNextV3."""

    def __init__(self, input_size: int | tuple[int, int] = 8, in_channels: int = 8, hidden_size: int = 96, depth: int = 4,
                 num_classes: int = 10, learn_sigma: bool = False):
        super().__init__(input_size, patch_size=1, in_channels=in_channels, hidden_size=hidden_size, depth=depth,
                         num_heads=max(1, hidden_size // 32), num_classes=num_classes, learn_sigma=learn_sigma)
        for place, block in enumerate(self.blocks):
            if isinstance(block, ResidualBlock):
                self.blocks[place] = SiluBlock(hidden_size)
        self.head[0] = nn.SiLU()
        self.to(memory_format=torch.channels_last)


class Hybrid(ConvAdaLN):
    """ConvAdaLN with GELU, and attention between its blocks. For the arguments see ConvAdaLN."""

    def __init__(self, input_size: int | tuple[int, int] = 8, in_channels: int = 8, hidden_size: int = 96, depth: int = 3,
                 num_classes: int = 10, learn_sigma: bool = False):
        super().__init__(input_size, in_channels, hidden_size, depth, num_classes, learn_sigma)
        blocks = [block for _ in range(depth) for block in (PartsBlock(hidden_size, "gelu"), HybridAttention(hidden_size))]
        self.blocks, self.head[0] = nn.ModuleList(blocks[:-1]), nn.GELU()
        self.default_split = round(len(self.blocks) * 18 / 28)
        self.to(memory_format=torch.channels_last)


class HybridAttention(AttentionBlock):
    """AttentionBlock with heads of 32 channels. Its gate sees c without SiLU, as c comes from Mish."""

    def __init__(self, width: int):
        super().__init__(width, max(1, width // 32))
        self.adaLN_modulation[0] = nn.Identity()


CANDIDATES = {f"ConvAdaLN-{part}": partial(Parts, part=part) for part in PARTS} | {
    "Dense": partial(Dense), "Silu": partial(Silu), "Hybrid": partial(Hybrid)}

if __name__ == "__main__":
    if not set(sys.argv[1:2]) & {"train", "sample_ddp"}:
        cli.fail("the first word must be train or sample_ddp")
    script = importlib.import_module(sys.argv[1])
    sys.argv[:2] = [" ".join(sys.argv[:2])]
    Small_models.update(CANDIDATES)
    parser = script.build_parser()
    cli.run(script.main, parser)
