"""Backbones for class-conditional (latent) diffusion: DiT, DiNext, DiNextV3 and DiNext-U.

- DiT: Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv:2212.09748). State-dict keys and outputs are
  those of the published weights; the initialisation is DiT's.
- DiNext: ConvNeXt-V2 blocks (Woo et al., arXiv:2301.00808) with adaLN-Zero, at DiT's depths and widths. DiNextV2 has no GRN.
- DiNextV3: the residual blocks of ConvAdaLN (MinDiff), two dense 3x3 each, and attention between them.
- DiNext-U: DiNext's block at three resolutions, as in FCDM (arXiv:2603.09408).
- PixArt: DiT with adaLN-single; the label is one more key and value (Chen et al., arXiv:2310.00426; nano-diffusion).
- LightningDiT: DiT with RMSNorm, rotary positions and a gated MLP (Yao et al., arXiv:2501.01423).

Legend: B batch, C channels of the image or latent, H W its size, h w the size in tokens, N = h*w tokens, D width,
p patch size, L number of classes. Inside a block channels come last, (B, N, D) in DiT, (B, h, w, D) in DiNext, but in DiNextV3
they come second: (B, D, h, w).

The residual stream, to which the blocks add, keeps the dtype of an fp32 x under autocast, too, in all backbones. A bf16 stream
would move a tenth fewer bytes, and make DiT-S with random weights differ from fp32 by 1.1 % in place of 0.4 %.

Every backbone is called as `model(x, t, y)`. `forward` has two halves. Features can be reused at the seam between them:

    c = model.condition(t, y)               # the condition of the blocks
    state = model.encode(x, c, split)       # the first `split` blocks
    out = model.decode(state, c, split)     # the remaining blocks: (B, C or 2C, H, W)
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# -------------------------------------------------------------------------------------------------
# Embedders
# -------------------------------------------------------------------------------------------------


class TimestepEmbedder(nn.Module):
    """Embed timesteps on the scale 0..1000, whole or fractional: (B,) -> (B, D). t is multiplied by `scale` first."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256, scale: float = 1.0):
        super().__init__()
        if scale <= 0:
            raise ValueError(f"time_scale {scale} must be positive")
        self.scale, self.frequency_embedding_size = scale, frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    @staticmethod
    def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000) -> Tensor:
        """Cosines, then sines, of t * max_period**(-i / half), i < half = dim // 2: (B,) -> (B, dim), in fp32."""
        half = dim // 2
        frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
        angles = t[:, None].float() * frequencies
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return F.pad(embedding, (0, dim % 2))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = self.timestep_embedding(t * self.scale, self.frequency_embedding_size)  # (B, 256)
        return self.mlp(frequencies.to(self.mlp[0].weight.dtype))                             # (B, D)


class LabelEmbedder(nn.Module):
    """Embed class ids 0..L-1, and the null label L, which means "no label": (B,) -> (B, D)."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PatchEmbed(nn.Module):
    """Project each patch of p x p pixels, `overlap` more on each side, to a token: (B, C, H, W) -> (B, h, w, D), a view."""

    def __init__(self, input_size: tuple[int, int], patch_size: int, in_channels: int, hidden_size: int, overlap: int = 0):
        super().__init__()
        self.input_size = input_size
        self.grid_size = (input_size[0] // patch_size, input_size[1] // patch_size)  # (h, w)
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size + 2 * overlap, stride=patch_size, padding=overlap)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != self.input_size:
            raise ValueError(f"x has the size {tuple(x.shape[2:])} (H, W), but the model's input_size is {self.input_size}")
        return channels_last(self.proj(x))


def sincos_position_embedding(grid_size: tuple[int, int], dim: int) -> Tensor:
    """DiT's fixed position embedding, (1, h*w, dim): half of the channels for the column, then half for the row."""
    h, w = grid_size
    frequencies = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def embed(position: Tensor) -> Tensor:
        angles = position.flatten()[:, None].double() * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.cat([embed(columns), embed(rows)], dim=1).float()[None]


def rotary_tables(grid_size: tuple[int, int], dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sine and cosine of the rotary angles (arXiv:2104.09864), (N, dim) each, for heads of `dim` channels.

    The row turns the first half of the channels, the column the second. Both channels of a pair have the same angle.
    """
    frequencies = 1 / 10_000 ** (torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(size, device=device) for size in grid_size), indexing="ij")
    angles = torch.stack([rows, columns], dim=-1).view(-1, 2, 1) * frequencies  # (N, 2, dim/4)
    angles = angles.flatten(1).repeat_interleave(2, dim=1)                      # (N, dim)
    return angles.sin(), angles.cos()


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Turn each pair of channels (a, b) of x (..., N, dim) by its angle: (a cos - b sin, b cos + a sin)."""
    turned = x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) * sin  # (a, b) cos + (-b, a) sin
    return turned.to(x.dtype)


# -------------------------------------------------------------------------------------------------
# Layers
# -------------------------------------------------------------------------------------------------


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift: x is (B, ..., D); shift and scale are (B, D), one vector per sample."""
    return torch.addcmul(over_positions(shift, x), x, over_positions(1 + scale, x))  # one pass over x


def over_positions(vector: Tensor, x: Tensor) -> Tensor:
    """View a vector (B, D) as (B, 1, ..., 1, D): it then broadcasts over the positions of x (B, ..., D)."""
    return vector.view(vector.shape[0], *[1] * (x.dim() - 2), -1)


class AdaLN(nn.Sequential):
    """Project c (B, D) to `vectors` modulation vectors: (B, vectors * D)."""

    def __init__(self, hidden_size: int, vectors: int):
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, vectors * hidden_size))


class AdaLNSingle(nn.Module):
    """adaLN-single (PixArt-alpha, arXiv:2310.00426): modulation vectors that all blocks share, plus a table per layer.

    c (B, vectors * D or more) -> (B, vectors * D). c begins with the shared vectors. The final layer takes the first two as
    shift and scale, whatever their role in the blocks; PixArt's takes the timestep's vector for both.
    """

    def __init__(self, hidden_size: int, vectors: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vectors * hidden_size))

    def forward(self, c: Tensor) -> Tensor:
        return c[:, : len(self.table)] + self.table


ADALN = {"zero": AdaLN, "single": AdaLNSingle}


class RMSNorm(nn.RMSNorm):
    """x (..., D) -> the same. Under autocast the weight takes the dtype of x, as torch's fused kernel wants."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D). `rotary`: the tables of rotary_tables, for rotary positions."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = RMSNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, *rotary: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, D/heads) each
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N, D)


class Mlp(nn.Module):
    """Linear -> GELU (its tanh approximation) -> Linear: (B, N, D) -> (B, N, D)."""

    def __init__(self, hidden_size: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner)
        self.fc2 = nn.Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class GatedMlp(nn.Module):
    """SwiGLU (Shazeer, arXiv:2002.05202), both inner projections in one: (B, N, D) -> (B, N, D)."""

    def __init__(self, hidden_size: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 2 * inner)
        self.fc2 = nn.Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class GlobalResponseNorm(nn.Module):
    """GRN (ConvNeXt-V2, equations 1 to 3): x + weight * x * n + bias, in one pass over x (B, h, w, D).

    n (B, 1, 1, D) is a channel's L2 norm over the positions, divided by the mean norm of all channels, in fp32 or better.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.channel_norm(x, torch.promote_types(x.dtype, torch.float32))  # (B, 1, 1, D)
        n = norm / (norm.mean(dim=-1, keepdim=True) + self.eps)                   # (B, 1, 1, D)
        return torch.addcmul(self.bias.to(x.dtype), x, (1 + self.weight * n).to(x.dtype))

    @staticmethod
    def channel_norm(x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.device.type == "cpu":  # there vector_norm takes 9 to 100 times as long over dimensions that are not the last
            square = x.to(dtype).square().sum(dim=(1, 2), keepdim=True)
            return square.clamp_min(torch.finfo(dtype).tiny).sqrt()  # of a channel of zeros: a gradient of 0, not of nan
        return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=dtype)


class ChannelsLastConv2d(nn.Conv2d):
    """A convolution of (B, h, w, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(super().forward(channels_first(x)))


def zeros(layer: nn.Module) -> nn.Module:
    """The layer, with weights and biases of 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def channels_first(x: Tensor) -> Tensor:
    """(B, h, w, D) -> (B, D, h, w), a view. The view of a contiguous x is in the channels_last memory format."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, h, w, D), a view."""
    return x.permute(0, 2, 3, 1)


# -------------------------------------------------------------------------------------------------
# Blocks
# -------------------------------------------------------------------------------------------------


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: attention and MLP, each modulated before and gated after.

    With a class token, attention has one more key and value: the last D values of c. `rotary` is Attention's.
    """

    VECTORS = 6

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, adaln: str = "zero",
                 class_token: bool = False, qk_norm: bool = False):
        super().__init__()
        self.class_token = class_token
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = ADALN[adaln](hidden_size, self.VECTORS)

    def forward(self, x: Tensor, c: Tensor, *rotary: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)  # (B, D) each
        x = x + over_positions(gate_a, x) * self.attend(modulate(self.norm1(x), shift_a, scale_a), c, *rotary)
        return x + over_positions(gate_m, x) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))     # (B, N, D)

    def attend(self, x: Tensor, c: Tensor, *rotary: Tensor) -> Tensor:
        if not self.class_token:
            return self.attn(x, *rotary)                        # (B, N, D)
        token = c[:, None, -x.shape[-1] :]                      # (B, 1, D)
        return self.attn(torch.cat([x, token], dim=1))[:, :-1]  # (B, N, D), without the output at the token


class LightningDiTBlock(DiTBlock):
    """DiTBlock with RMSNorm and SwiGLU, whose width is 2/3 of the MLP's (LightningDiT), for rotary positions."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool):
        super().__init__(hidden_size, num_heads, mlp_ratio)
        self.norm1, self.norm2 = RMSNorm(hidden_size), RMSNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, qk_norm)  # drawn twice: a seed's weights stay those of before
        self.mlp = GatedMlp(hidden_size, int(2 / 3 * hidden_size * mlp_ratio))


class DiNextBlock(nn.Module):
    """ConvNeXt-V2 block with adaLN-Zero and one residual: depthwise 7x7 -> modulated LayerNorm -> MLP with GRN -> gate."""

    VECTORS = 3

    def __init__(self, hidden_size: int, mlp_ratio: float = 3.0, adaln: str = "zero", grn: bool = True):
        super().__init__()
        self.dwconv = ChannelsLastConv2d(hidden_size, hidden_size, kernel_size=7, padding=3, groups=hidden_size)
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        inner = int(hidden_size * mlp_ratio)
        norm = GlobalResponseNorm(inner) if grn else nn.Identity()  # without: the first ConvNeXt's block (arXiv:2201.03545)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(hidden_size, inner), act=nn.GELU(), grn=norm, fc2=nn.Linear(inner, hidden_size)))
        self.adaLN_modulation = ADALN[adaln](hidden_size, self.VECTORS)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift, gate = self.adaLN_modulation(c).chunk(3, dim=1)  # (B, D) each
        h = modulate(self.norm(self.dwconv(x)), shift, scale)          # (B, h, w, D)
        return x + over_positions(gate, x) * self.mlp(h)               # (B, h, w, D)


class ResidualBlock(nn.Module):
    """Two dense 3x3 in one residual: GroupNorm -> 3x3 -> modulation -> GELU -> GroupNorm -> 3x3, which is 0 at first.

    MinDiff's ConvAdaLN has these blocks, with Mish; ADM's (arXiv:2105.05233) modulate after the second norm. x is (B, D, h, w)
    throughout, as in AttentionBlock: inductor's CPU code of GroupNorm's gradient fails beside another order of dimensions.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, hidden_size)
        self.conv1 = nn.Conv2d(hidden_size, hidden_size, kernel_size=3, padding=1)
        self.norm2 = nn.GroupNorm(8, hidden_size)
        self.conv2 = zeros(nn.Conv2d(hidden_size, hidden_size, kernel_size=3, padding=1))
        self.adaLN_modulation = AdaLN(hidden_size, 2)
        nn.init.zeros_(self.adaLN_modulation[-1].bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.adaLN_modulation(c)[..., None, None].chunk(2, dim=1)    # (B, D, 1, 1) each
        h = torch.addcmul(shift, self.conv1(self.norm1(x)), 1 + scale)              # (B, D, h, w)
        return x + self.conv2(self.norm2(F.gelu(h)))                                # (B, D, h, w)


class AttentionBlock(nn.Module):
    """GroupNorm -> attention over all positions -> gate, which is 0 at first: x (B, D, h, w), c (B, D) -> (B, D, h, w)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.adaLN_modulation = AdaLN(hidden_size, 1)
        zeros(self.adaLN_modulation[-1])

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = channels_last(self.norm(x))                                             # (B, h, w, D)
        h = channels_first(self.attn(h.flatten(1, 2)).view(h.shape))                # (B, D, h, w)
        return x + self.adaLN_modulation(c)[..., None, None] * h


class FinalLayer(nn.Module):
    """Modulated LayerNorm, then `projection(D, p*p*C)` of each token to its p*p pixels: (B, ..., D) -> (B, ..., p*p*C)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, adaln: str = "zero",
                 projection: Callable[[int, int], nn.Module] = nn.Linear):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = projection(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = ADALN[adaln](hidden_size, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)         # (B, D) each
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (B, ..., p*p*C)


class Downsample(nn.Module):
    """(B, h, w, D) -> (B, h/2, w/2, 2D), by a 3x3 convolution to D/2 channels and a pixel unshuffle."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width // 2, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(F.pixel_unshuffle(self.conv(channels_first(x)), 2)).contiguous().to(x.dtype)


class Upsample(nn.Module):
    """x (B, h, w, D) and a skip (B, 2h, 2w, D/2) -> (B, 2h, 2w, D/2): x by a 3x3 to 2D and a pixel shuffle; both merged."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, kernel_size=3, padding=1)
        self.merge = nn.Linear(width, width // 2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = channels_last(F.pixel_shuffle(self.conv(channels_first(x)), 2))         # (B, 2h, 2w, D/2)
        return self.merge(torch.cat([x, skip.to(x.dtype)], dim=-1)).to(skip.dtype)  # (B, 2h, 2w, D/2)


# -------------------------------------------------------------------------------------------------
# Networks
# -------------------------------------------------------------------------------------------------


def check_size(input_size: int | tuple[int, int], multiple: int) -> tuple[int, int]:
    """(H, W) from H = W or (H, W). Raises ValueError unless both are positive multiples of `multiple`."""
    size = tuple(input_size) if isinstance(input_size, (tuple, list)) else (input_size, input_size)
    if len(size) != 2 or any(length < 1 or length % multiple for length in size):
        raise ValueError(f"input_size {size} (H, W) must be two positive multiples of {multiple}")
    return size


class Backbone(nn.Module):
    """What the networks here share: sizes, `forward` from its two halves, DiT's guidance, gradient checkpointing.

    A network need not be a Backbone: diffusion/process.py says what training, sampling and `reuse` need. Each subclass
    defines the seam: `blocks`, `default_split`, `condition`, `encode` and `decode`. For the arguments see DiT; H and W must
    be multiples of `size_multiple`.
    """

    def __init__(self, input_size: int | tuple[int, int], in_channels: int, num_classes: int, learn_sigma: bool,
                 gradient_checkpointing: bool, size_multiple: int, map_split: int | None = None):
        super().__init__()
        self.map_split = map_split
        self.input_size = check_size(input_size, size_multiple)
        if in_channels < 1 or num_classes < 1:
            raise ValueError(f"in_channels ({in_channels}) and num_classes ({num_classes}) must be at least 1")
        self.in_channels = in_channels
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, x: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None) -> Tensor:
        """Predict from noisy x (B, C, H, W), t (B,) in 0..1000 and y (B,) in 0..L: (B, C or 2C, H, W).

        With r (B,) in 0..1000 it is a flow map, for the step from t to r (Lee et al., arXiv:2510.24474): the blocks after
        `map_split` see r in place of t.
        """
        c = self.condition(t, y)
        if r is None:
            return self.decode(self.encode(x, c), c)
        return self.decode(self.encode(x, c, self.map_split), self.condition(r, y), self.map_split)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """DiT's classifier-free guidance on a doubled batch: the second half of y holds the null label.

        Both halves use the first half of x. The first three channels are guided, or all channels if there are fewer.
        """
        half = x[: x.shape[0] // 2]
        out = self(torch.cat([half, half]), t, y)  # (B, C or 2C, H, W), B the doubled batch
        guided = min(3, self.in_channels)
        conditional, unconditional = out[:, :guided].chunk(2)
        eps = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([eps, eps]), out[:, guided:]], dim=1)

    def run_blocks(self, blocks: nn.ModuleList, x: Tensor, c: Tensor, *rest: Tensor) -> Tensor:
        """Run `blocks` on x in order, each as `block(x, c, *rest)`."""
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, c, *rest, use_reentrant=False)
            else:
                x = block(x, c, *rest)
        return x

    def resolve_split(self, split: int | None) -> int:
        """The number of blocks before the seam. None stands for `default_split`."""
        split = self.default_split if split is None else split
        if not 0 <= split <= len(self.blocks):
            raise ValueError(f"split {split} is not in 0..{len(self.blocks)}, the number of blocks")
        return split


def initialize(network: nn.Module, label_std: float = 0.02) -> None:
    """As DiT, in place: matrices by Xavier, embedders with std 0.02, labels with label_std; biases, modulations, output are 0.

    A zero gate makes every block the identity at first (adaLN-Zero, adaLN-single). Depthwise kernels keep PyTorch's default.
    """
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            if getattr(module, "groups", 1) == 1:
                nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, TimestepEmbedder):
            nn.init.normal_(module.mlp[0].weight, std=0.02)
            nn.init.normal_(module.mlp[2].weight, std=0.02)
        elif isinstance(module, LabelEmbedder):
            nn.init.normal_(module.embedding_table.weight, std=label_std)
        elif isinstance(module, AdaLN):
            nn.init.zeros_(module[-1].weight)
        elif isinstance(module, FinalLayer):
            nn.init.zeros_(module.linear.weight)


class Isotropic(Backbone):
    """One resolution throughout: patches -> blocks -> pixels. DiT and DiNext add their blocks.

    With adaln="single" all blocks share one projection of the sum of the timestep's and the label's vectors. With a class
    token it is a projection of the timestep's vector alone, and the label reaches the blocks through attention.

    `blocks` run in their order, each as `block(x, c, *block_tables)`. For the other arguments see DiT.
    """

    def __init__(self, blocks: list[nn.Module], input_size: int | tuple[int, int], patch_size: int, in_channels: int,
                 hidden_size: int, num_classes: int, learn_sigma: bool, gradient_checkpointing: bool,
                 adaln: str = "zero", class_token: bool = False, time_scale: float = 1.0, map_split: int | None = None):
        if not blocks or hidden_size < 1 or patch_size < 1:
            raise ValueError(f"depth {len(blocks)}, hidden_size {hidden_size} and patch_size {patch_size} must be positive")
        super().__init__(input_size, in_channels, num_classes, learn_sigma, gradient_checkpointing, patch_size, map_split)
        self.patch_size = patch_size
        self.x_embedder = PatchEmbed(self.input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, scale=time_scale)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, adaln)
        self.class_token = class_token
        self.shared_modulation = AdaLN(hidden_size, blocks[0].VECTORS) if adaln == "single" else None
        self.default_split = round(len(blocks) * 18 / 28)  # Faster Diffusion cuts DiT-XL after 18 of 28
        self.resolve_split(map_split)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """t (B,) in 0..1000, y (B,) in 0..L -> c (B, D); for adaln="single" see AdaLNSingle and DiTBlock."""
        t, y = self.t_embedder(t), self.y_embedder(y)  # (B, D) each
        if self.shared_modulation is None:
            return t + y
        return torch.cat([self.shared_modulation(t), y], dim=1) if self.class_token else self.shared_modulation(t + y)

    def embed(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> tokens (B, N, D) or (B, h, w, D)."""
        return self.x_embedder(x).to(x.dtype)

    def block_tables(self, device: torch.device) -> tuple[Tensor, ...]:
        """What the blocks take after x and c: the same tensors for all of them."""
        return ()

    def encode(self, x: Tensor, c: Tensor, split: int | None = None) -> tuple[Tensor]:
        """x (B, C, H, W) -> the tokens after the first `split` blocks."""
        blocks = self.blocks[: self.resolve_split(split)]
        return (self.run_blocks(blocks, self.embed(x), c, *self.block_tables(x.device)),)

    def decode(self, state: tuple[Tensor], c: Tensor, split: int | None = None) -> Tensor:
        """What encode returned for the same split -> (B, C or 2C, H, W)."""
        x = self.run_blocks(self.blocks[self.resolve_split(split) :], *state, c, *self.block_tables(c.device))
        return self.unpatchify(self.final_layer(x, c))  # (B, C or 2C, H, W)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(B, N, p*p*C) or (B, h, w, p*p*C) -> (B, C, H, W); C counts the channels of the output."""
        h, w = self.x_embedder.grid_size
        p = self.patch_size
        x = x.reshape(x.shape[0], h, w, p, p, self.out_channels)
        return torch.einsum("bhwpqc->bchpwq", x).reshape(x.shape[0], self.out_channels, h * p, w * p)


class DiT(Isotropic):
    """Diffusion transformer. A published `.pt` loads with strict=True.

    Labels are dropped before the model, by the training loop (train.py's `label_drop`): the model draws no random numbers.
    DiT's own train.py, run on this class as it is, drops none, and so trains a model that cannot be guided.

    Args: the defaults are DiT-XL/2 on the latents of 256 x 256 ImageNet images.
        input_size: H = W, or (H, W), of the image or latent; multiples of patch_size.
        patch_size: p; a token stands for p x p pixels.
        in_channels: C, the channels of the image or latent.
        hidden_size: D, the width of the tokens; a multiple of num_heads and of 4.
        depth: number of blocks.
        num_heads: heads of attention in each block.
        mlp_ratio: hidden width of a block's MLP, divided by D.
        num_classes: L; label L is the null label.
        learn_sigma: the output has 2C channels; the second half is for the variance.
        gradient_checkpointing: recompute each block in the backward pass, which saves memory.
        adaln: "zero": each block projects c itself. "single": all blocks share one projection (AdaLNSingle).
        class_token: attention sees the label as one more key and value. Needs adaln="single".
        time_scale: t in 0..1000 is multiplied by it before it is embedded; 0.001 for SiT and REPA, which embed 0..1.
        qk_norm: RMSNorm of each head's queries and keys.
        lightning: LightningDiT's blocks and last norm. Needs adaln="zero", and heads of a multiple of 4 channels.
        label_std: initial standard deviation of the label embeddings. DiNext's networks have 1 (docs/history.md, "Labels").
        map_split: blocks before the seam of a flow map; None: default_split.
    """

    def __init__(self, input_size: int | tuple[int, int] = 32, patch_size: int = 2, in_channels: int = 4,
                 hidden_size: int = 1152, depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0,
                 num_classes: int = 1000, learn_sigma: bool = True, gradient_checkpointing: bool = False,
                 adaln: Literal["zero", "single"] = "zero", class_token: bool = False, time_scale: float = 1.0,
                 qk_norm: bool = False, lightning: bool = False, label_std: float = 0.02, map_split: int | None = None):
        if class_token and adaln != "single":
            raise ValueError("class_token needs adaln 'single'")
        if num_heads < 1 or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads ({num_heads}) and of 4")
        if lightning and (adaln != "zero" or hidden_size // num_heads % 4):
            raise ValueError("lightning needs adaln 'zero', and hidden_size / num_heads must be a multiple of 4")
        if lightning:
            blocks = [LightningDiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth)]
        else:
            blocks = [DiTBlock(hidden_size, num_heads, mlp_ratio, adaln, class_token, qk_norm) for _ in range(depth)]
        super().__init__(blocks, input_size, patch_size, in_channels, hidden_size, num_classes, learn_sigma,
                         gradient_checkpointing, adaln, class_token, time_scale, map_split)
        positions = sincos_position_embedding(self.x_embedder.grid_size, hidden_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)  # (1, N, D)
        self.rotary_dim = hidden_size // num_heads if lightning else None
        if lightning:
            self.final_layer.norm_final = RMSNorm(hidden_size)
        initialize(self, label_std)

    def embed(self, x: Tensor) -> Tensor:
        tokens = self.x_embedder(x).flatten(1, 2)  # (B, N, D), a transposed view
        return tokens.contiguous().to(x.dtype) + self.pos_embed  # without contiguous() all blocks would keep its strides

    def block_tables(self, device: torch.device) -> tuple[Tensor, ...]:
        return rotary_tables(self.x_embedder.grid_size, self.rotary_dim, device) if self.rotary_dim else ()


class DiNext(Isotropic):
    """DiT with ConvNeXt-V2 blocks. At equal depth and width it has half of DiT's parameters and multiply-accumulates.

    For its arguments see DiT; hidden_size may be any width, and grn is GRN in each block's MLP, which DiNextV2 does not have.
    The defaults are DiNext-XL/2 on ImageNet's latents at 256 x 256.
    """

    def __init__(self, input_size: int | tuple[int, int] = 32, patch_size: int = 2, in_channels: int = 4,
                 hidden_size: int = 1152, depth: int = 28, mlp_ratio: float = 3.0, num_classes: int = 1000,
                 learn_sigma: bool = True, gradient_checkpointing: bool = False,
                 adaln: Literal["zero", "single"] = "zero", grn: bool = True, label_std: float = 1.0,
                 time_scale: float = 1.0, map_split: int | None = None):
        blocks = [DiNextBlock(hidden_size, mlp_ratio, adaln, grn) for _ in range(depth)]
        super().__init__(blocks, input_size, patch_size, in_channels, hidden_size, num_classes, learn_sigma,
                         gradient_checkpointing, adaln, time_scale=time_scale, map_split=map_split)
        initialize(self, label_std)
        self.to(memory_format=torch.channels_last)  # kernels in the memory format of their inputs


class DiNextU(Backbone):
    """DiNext blocks in a U of three resolutions (1, 1/2, 1/4) and five stages, without patches, as in FCDM.

    Args: the defaults are DiNext-U-S on the latents of 256 x 256 ImageNet images.
        input_size: H = W, or (H, W), of images or latents to be drawn; any multiples of 4 can pass through the network.
        hidden_size: D, the width of the first stage, even. Each halving of the resolution doubles the width.
        depths: number of blocks of each stage.
        mlp_ratio: hidden width of a block's MLP, divided by the block's width.
        in_channels, num_classes, learn_sigma, gradient_checkpointing, label_std, time_scale, map_split: see DiT.
        grn: see DiNext.
    """

    LEVELS = (0, 1, 2, 1, 0)  # stage s runs at 1/2**LEVELS[s] of the resolution

    def __init__(self, input_size: int | tuple[int, int] = 32, in_channels: int = 4, hidden_size: int = 128,
                 depths: tuple[int, int, int, int, int] = (2, 4, 8, 4, 2), mlp_ratio: float = 3.0, num_classes: int = 1000,
                 learn_sigma: bool = True, gradient_checkpointing: bool = False, grn: bool = True, label_std: float = 1.0,
                 time_scale: float = 1.0, map_split: int | None = None):
        super().__init__(input_size, in_channels, num_classes, learn_sigma, gradient_checkpointing, 4, map_split)
        if len(depths) != 5 or min(depths) < 1 or hidden_size % 2:
            raise ValueError(f"depths {depths} must be five positive numbers, and hidden_size ({hidden_size}) even")
        widths = [hidden_size * 2**level for level in range(3)]
        self.depths = tuple(depths)
        self.stem = nn.Conv2d(in_channels, hidden_size, kernel_size=3, padding=1)
        self.t_embedders = nn.ModuleList(TimestepEmbedder(width, scale=time_scale) for width in widths)
        self.y_embedders = nn.ModuleList(LabelEmbedder(num_classes, width) for width in widths)
        self.blocks = nn.ModuleList(
            DiNextBlock(widths[level], mlp_ratio, grn=grn) for level, depth in zip(self.LEVELS, depths) for _ in range(depth))
        self.resamplers = nn.ModuleList(  # resamplers[s] runs before the first block of stage s + 1
            [Downsample(widths[0]), Downsample(widths[1]), Upsample(widths[2]), Upsample(widths[1])])
        self.head = FinalLayer(hidden_size, 1, self.out_channels,
                               projection=partial(ChannelsLastConv2d, kernel_size=3, padding=1))
        self.default_split = sum(depths[:3])  # the two stages down and the middle one
        self.resolve_split(map_split)
        initialize(self, label_std)
        self.to(memory_format=torch.channels_last)  # kernels in the memory format of their inputs

    def condition(self, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """t (B,) in 0..1000, y (B,) in 0..L -> one c per resolution: (B, D), (B, 2D), (B, 4D)."""
        return tuple(embed_t(t) + embed_y(y) for embed_t, embed_y in zip(self.t_embedders, self.y_embedders))

    def encode(self, x: Tensor, c: tuple[Tensor, ...], split: int | None = None) -> tuple[Tensor, ...]:
        """x (B, C, H, W) -> the features after the first `split` blocks, then the skips still open, outermost first."""
        x = channels_last(self.stem(x)).to(x.dtype)  # (B, H, W, D)
        return self.run_stages((x,), c, 0, self.resolve_split(split))

    def decode(self, state: tuple[Tensor, ...], c: tuple[Tensor, ...], split: int | None = None) -> Tensor:
        """What encode returned for the same split -> (B, C or 2C, H, W)."""
        (x,) = self.run_stages(state, c, self.resolve_split(split), len(self.blocks))
        return channels_first(self.head(x, c[0])).contiguous()

    def run_stages(self, state: tuple[Tensor, ...], c: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, ...]:
        """Run blocks start..stop-1. A resampler runs together with the block that follows it."""
        x, *skips = state
        first = 0  # the number of the stage's first block
        for stage, (level, depth) in enumerate(zip(self.LEVELS, self.depths)):
            if stage in (1, 2) and start <= first < stop:
                skips.append(x)
                x = self.resamplers[stage - 1](x)               # (B, h, w, D) -> (B, h/2, w/2, 2D)
            elif stage in (3, 4) and start <= first < stop:
                x = self.resamplers[stage - 1](x, skips.pop())  # (B, h, w, D) -> (B, 2h, 2w, D/2)
            blocks = self.blocks[max(first, start) : min(first + depth, stop)]
            x = self.run_blocks(blocks, x, c[level])
            first += depth
        return (x, *skips)


class DiNextV3(Backbone):
    """Residual blocks of dense 3x3 convolutions, and attention between them. The patches overlap, and the head is a 3x3.

    Args: the defaults are DiNextV3-XL/2 on the latents of 256 x 256 ImageNet images.
        hidden_size: D, the width of the blocks; a multiple of num_heads and of 16, as GroupNorm's 8 groups are of even width.
        depth: number of residual blocks. (A split counts the attention blocks, too.)
        attention_every: residual blocks between two attention blocks.
        num_heads: heads of attention.
        For the others see DiT.
    """

    def __init__(self, input_size: int | tuple[int, int] = 32, patch_size: int = 2, in_channels: int = 4,
                 hidden_size: int = 1152, depth: int = 17, num_heads: int = 16, attention_every: int = 2,
                 num_classes: int = 1000, learn_sigma: bool = True, gradient_checkpointing: bool = False,
                 label_std: float = 1.0, time_scale: float = 1.0, map_split: int | None = None):
        if min(depth, patch_size, attention_every) < 1:
            raise ValueError(f"depth {depth}, patch_size {patch_size} and attention_every {attention_every} must be positive")
        if min(hidden_size, num_heads) < 1 or hidden_size % num_heads or hidden_size % 16:
            raise ValueError(f"hidden_size {hidden_size} must be a positive multiple of num_heads ({num_heads}) and of 16")
        super().__init__(input_size, in_channels, num_classes, learn_sigma, gradient_checkpointing, patch_size, map_split)
        self.x_embedder = PatchEmbed(self.input_size, patch_size, in_channels, hidden_size, overlap=1)
        self.t_embedder = TimestepEmbedder(hidden_size, scale=time_scale)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        blocks = [ResidualBlock(hidden_size) for _ in range(depth)]
        for place in range(attention_every, depth, attention_every)[::-1]:
            blocks.insert(place, AttentionBlock(hidden_size, num_heads))
        self.blocks = nn.ModuleList(blocks)
        pixels = nn.Conv2d(hidden_size, patch_size**2 * self.out_channels, kernel_size=3, padding=1)
        self.head = nn.Sequential(nn.GELU(), nn.GroupNorm(8, hidden_size), zeros(pixels), nn.PixelShuffle(patch_size))
        self.default_split = min(len(self.blocks) - 1, round(len(self.blocks) * 18 / 28))  # the head does not see c
        if self.resolve_split(map_split) == len(self.blocks):
            raise ValueError(f"map_split {map_split} leaves no block that sees the end of a step; there are {len(self.blocks)}")
        for linear in self.t_embedder.mlp[::2]:  # embedders begin as DiT's, the other weights as PyTorch's
            nn.init.normal_(zeros(linear).weight, std=0.02)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=label_std)
        self.to(memory_format=torch.channels_last)  # kernels in the memory format of their inputs

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """t (B,) in 0..1000, y (B,) in 0..L -> c (B, D)."""
        return self.t_embedder(t) + self.y_embedder(y)

    def encode(self, x: Tensor, c: Tensor, split: int | None = None) -> tuple[Tensor]:
        """x (B, C, H, W) -> (B, h, w, D) after the first `split` blocks, of both kinds."""
        x = channels_first(self.x_embedder(x).to(x.dtype))  # (B, D, h, w)
        return (channels_last(self.run_blocks(self.blocks[: self.resolve_split(split)], x, c)),)

    def decode(self, state: tuple[Tensor], c: Tensor, split: int | None = None) -> Tensor:
        """What encode returned for the same split -> (B, C or 2C, H, W)."""
        x = self.run_blocks(self.blocks[self.resolve_split(split) :], channels_first(state[0]), c)  # (B, D, h, w)
        return self.head(x).contiguous()


# -------------------------------------------------------------------------------------------------
# Presets and registry
# -------------------------------------------------------------------------------------------------

ISOTROPIC = {
    "S": dict(depth=12, hidden_size=384),
    "B": dict(depth=12, hidden_size=768),
    "L": dict(depth=24, hidden_size=1024),
    "XL": dict(depth=28, hidden_size=1152),
}
NUM_HEADS = {"S": 6, "B": 12, "L": 16, "XL": 16}
DENSE = {  # DiT's widths, about its multiply-accumulates
    "S": dict(depth=8, hidden_size=384),
    "B": dict(depth=8, hidden_size=768),
    "L": dict(depth=15, hidden_size=1024),
    "XL": dict(depth=17, hidden_size=1152),
}
U = {
    "S": dict(hidden_size=128, depths=(2, 4, 8, 4, 2)),
    "B": dict(hidden_size=256, depths=(2, 4, 8, 4, 2)),
    "L": dict(hidden_size=384, depths=(3, 6, 12, 6, 3)),
    "XL": dict(hidden_size=512, depths=(3, 6, 12, 6, 3)),
}

DiT_models = {}
for _size, _preset in ISOTROPIC.items():
    for _patch in (2, 4, 8):
        DiT_models[f"DiT-{_size}/{_patch}"] = partial(DiT, patch_size=_patch, num_heads=NUM_HEADS[_size], **_preset)
        DiT_models[f"DiNext-{_size}/{_patch}"] = partial(DiNext, patch_size=_patch, **_preset)
for _size, _preset in U.items():
    DiT_models[f"DiNext-U-{_size}"] = partial(DiNextU, **_preset)
for _size, _preset in DENSE.items():
    DiT_models[f"DiNextV3-{_size}/2"] = partial(DiNextV3, num_heads=NUM_HEADS[_size], **_preset)
DiT_models["DiNextV2-S/2"] = partial(DiNext, patch_size=2, grn=False, **ISOTROPIC["S"])
DiT_models["PixArt-B/2"] = partial(DiT, patch_size=2, num_heads=12, adaln="single", class_token=True, **ISOTROPIC["B"])
DiT_models["LightningDiT-XL/1"] = partial(DiT, input_size=16, patch_size=1, in_channels=32, num_heads=16, learn_sigma=False,
                                          lightning=True, **ISOTROPIC["XL"])
