"""Heads: what a network learns besides its prediction, from its features at the seam.

    network = with_heads(backbone, spec)     # WithHeads
    prediction, outputs = network(x, t, y)   # outputs[name] = heads[name](features, c)

A run has them by `heads`, a dictionary: {"internal": {…}, "align": {…}, "split": 8}. They share one seam, after `split` blocks.
A checkpoint keeps their weights apart from the backbone's, which loads without them. Your own is an entry of HEADS
(docs/extending.md).

Sources: internal guidance: arXiv:2512.24176; alignment: REPA (Yu et al., arXiv:2410.06940), its convolution: iREPA (Singh et
al., arXiv:2512.10794), its early end: HASTE.

Legend: B batch, C channels, H W size, h w grid of the features, D their width, Z width of an encoder's tokens.
"""

import math
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.process import Process, Seam, check
from models import ChannelsLastConv2d, DiNextU, FinalLayer, RMSNorm, channels_first, zeros
from pipeline.checkpoint import Restored
from pipeline.encoders import CLASSIFIER, load_encoder
from pipeline.spec import Config, Spec, Weights, defaults_of
from pipeline.weights import load_weights
from runtime import UserError
from runtime.cli import check_arguments, nearest, prefix_errors
from runtime.files import sha256

SPLIT = 8 / 28  # the share of blocks before the heads' seam; of a DiNext-U it is after the middle stage


class Place(NamedTuple):
    """The shapes where heads sit."""

    width: int                    # D of the features
    condition_width: int          # of c
    grid: tuple[int, int]         # (h, w)
    patch: tuple[int, int]        # (H / h, W / w)
    channels: int                 # C of a prediction, without a variance
    rms_norm: bool                # whether the network's last norm is one, as LightningDiT's
    images: tuple[int, int, int]  # (C, H, W) of the pictures


class Step(NamedTuple):
    """What a loss of a head may look at: a batch."""

    process: Process
    x_start: Tensor               # (B, C, H, W), and so on: the arguments of the process's training_losses
    t: Tensor                     # (B,)
    model_kwargs: dict[str, Any]
    noise: Tensor                 # (B, C, H, W)
    images: Tensor | None         # (B, 1 or 3, …) uint8; None if the data set holds latents


# --- heads -----------------------------------------------------------------------------------------


class Head(nn.Module):
    """forward(features (B, h, w, D), c (B, condition_width)) -> its output, and the loss of that output.

    Args:
        weight: of its loss, beside the process's.
        stop_step: from this step on the weight is 0; None: never.
    """

    needs_images = False

    def __init__(self, weight: float, stop_step: int | None = None):
        super().__init__()
        for name, value in {"weight": weight, "stop_step": stop_step or 0}.items():
            if not 0 <= value < math.inf:
                raise UserError(f"{name} {value} is not a finite number of at least 0")
        self.weight, self.stop_step = weight, stop_step

    def loss(self, out: Tensor, step: Step) -> Tensor:
        """(B,)"""
        raise NotImplementedError

    def weight_at(self, step: int) -> float:
        return self.weight if self.stop_step is None or step < self.stop_step else 0.0


class Internal(Head):
    """A second, weaker prediction, by DiT's final layer. Its loss is the process's `mse`, with its output for the network's."""

    def __init__(self, place: Place, weight: float = 0.5):
        super().__init__(weight)
        self.patch, self.channels = place.patch, place.channels
        self.final_layer = FinalLayer(place.width, 1, place.channels * math.prod(place.patch))
        self.final_layer.adaLN_modulation[-1] = zeros(nn.Linear(place.condition_width, 2 * place.width))
        if place.rms_norm:
            self.final_layer.norm_final = RMSNorm(place.width)
        zeros(self.final_layer.linear)

    def forward(self, features: Tensor, c: Tensor) -> Tensor:
        x = self.final_layer(features, c).unflatten(-1, (*self.patch, self.channels))  # (B, h, w, H/h, W/w, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)                    # (B, C, H, W)

    def loss(self, out: Tensor, step: Step) -> Tensor:
        if step.process.learn_sigma:
            out = torch.cat([out, torch.zeros_like(out)], dim=1)
        losses = step.process.training_losses(lambda x, t, **kwargs: out, *step[1:5])
        if "mse" not in losses:
            raise UserError("`heads`: internal needs a loss with an mse, which this process does not have")
        return losses["mse"]


class Align(Head):
    """REPA: a projection of the features resembles a frozen encoder's tokens of the picture. The negative mean cosine.

    Where the grids differ, both are averaged to the coarser one.

    Args:
        encoder: of pipeline/encoders.py: "dinov2", a ViT of timm by its name, or "classifier:FILE".
        kind: "mlp": three linear layers; "conv": one 3x3 convolution (iREPA's, without its normalisation of the tokens).
        hidden_size: of the MLP.
        sha256: of an encoder's file, which check_heads fills in.
    """

    needs_images = True

    def __init__(self, place: Place, encoder: str = "dinov2", kind: str = "mlp", weight: float = 0.5,
                 stop_step: int | None = None, hidden_size: int = 2048, sha256: str | None = None):
        super().__init__(weight, stop_step)
        if kind not in ("mlp", "conv"):
            raise UserError(f"kind {kind!r} must be mlp or conv")
        if hidden_size < 1:
            raise UserError(f"hidden_size {hidden_size} is not at least 1")
        self.encoder = Frozen(load_encoder(encoder, torch.device("cpu")))
        channels, *size = place.images
        *grid, width = self.encoder.module.token_shape(tuple(size), channels)
        self.grid = tuple(map(min, grid, place.grid))
        self.projector = ChannelsLastConv2d(place.width, width, 3, padding=1) if kind == "conv" else nn.Sequential(
            nn.Linear(place.width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size), nn.SiLU(),
            nn.Linear(hidden_size, width))
        for module in self.projector.modules() if kind == "mlp" else ():
            if isinstance(module, nn.Linear):  # as REPA's
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor, c: Tensor) -> Tensor:
        return self.projector(features)  # (B, h, w, Z)

    def loss(self, out: Tensor, step: Step) -> Tensor:
        tokens = self.encoder.module.to(out.device)(step.images)                                # (B, h', w', Z)
        ours, theirs = (F.adaptive_avg_pool2d(channels_first(x.float()), self.grid) for x in (out, tokens))
        return -F.cosine_similarity(ours, theirs, dim=1).flatten(1).mean(dim=1)


class Frozen:
    """A module that is used, but not trained, saved or copied with the head that holds it."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __deepcopy__(self, memo: dict) -> "Frozen":
        return self


# A head takes a Place and arguments of its own with defaults, which are the entries of its dictionary in `heads`.
HEADS: dict[str, Callable[..., Head]] = {"internal": Internal, "align": Align}


# --- a network with heads --------------------------------------------------------------------------


class WithHeads(nn.Module):
    """A backbone and its heads, in one forward pass: what a trainer wraps and compiles.

    Args:
        split: blocks before the heads' seam.
    """

    def __init__(self, network: nn.Module, heads: dict[str, Head], split: int):
        super().__init__()
        self.network, self.heads, self.split = network, nn.ModuleDict(heads), split
        self.in_channels, self.input_size, self.num_classes = network.in_channels, network.input_size, network.num_classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The backbone's prediction, and each head's output."""
        c = self.network.condition(t, y)
        state = self.network.encode(x, c, self.split)
        features = as_grid(state[0], self.network)
        outputs = {name: head(features, fitting(c, features.shape[-1])) for name, head in self.heads.items()}
        return self.network.decode(state, c, self.split), outputs


def backbone(model: nn.Module) -> nn.Module:
    """The network without its heads."""
    return model.network if isinstance(model, WithHeads) else model


def as_grid(features: Tensor, network: nn.Module) -> Tensor:
    """(B, h, w, D), (B, N, D) or (B, D), the features at a seam -> (B, h, w, D). N tokens have the proportions of the input."""
    if features.dim() == 3:
        height, width = network.input_size
        rows = round(math.sqrt(features.shape[1] * height / width))
        return features.unflatten(1, (rows, -1))
    return features if features.dim() == 4 else features[:, None, None]


def fitting(c: Tensor | tuple[Tensor, ...], width: int) -> Tensor:
    """The condition of features of that width: of several, one a resolution, that of the same width."""
    return next(part for part in c if part.shape[1] == width) if isinstance(c, tuple) else c


def split_of(network: nn.Module, heads: Config) -> int:
    """How many blocks are before the seam of `heads`."""
    usual = network.default_split if isinstance(network, DiNextU) else max(1, round(SPLIT * len(network.blocks)))
    split, most = heads.get("split", usual), max(1, len(network.blocks) - 1)
    if type(split) is not int or not 1 <= split <= most:
        raise UserError(f"`heads`: split {split!r} is not in 1..{most}, the blocks before the heads")
    return split


def place_of(outline: nn.Module, split: int, images: tuple[int, int, int]) -> Place:
    """Where heads sit in a network for `images` (C, H, W). `outline` may be on the meta device."""
    device = next(outline.parameters()).device
    channels, (height, width) = outline.in_channels, outline.input_size
    c = outline.condition(torch.zeros(1, device=device), torch.zeros(1, dtype=torch.long, device=device))
    state = outline.encode(torch.zeros(1, channels, height, width, device=device), c, split)
    features = as_grid(state[0], outline)
    h, w, features_width = features.shape[1:]
    rms_norm = isinstance(getattr(getattr(outline, "final_layer", None), "norm_final", None), RMSNorm)
    return Place(features_width, fitting(c, features_width).shape[1], (h, w), (height // h, width // w), channels, rms_norm,
                 images)


def check_heads(heads: Config, outline: nn.Module) -> Config:
    """Check the flag `heads` against a network. Returns it, with every argument.

    Raises:
        UserError: a name or an argument is unknown, or the network has no seam.
    """
    check(outline, Seam, "heads need")
    checked, names = {"split": split_of(outline, heads)}, [name for name in heads if name != "split"]
    if not names:
        raise UserError(f"`heads` names none; allowed: {', '.join(HEADS)}")
    for name in names:
        if name not in HEADS:
            raise UserError(f"`heads`: {name!r} is unknown; allowed: split, {', '.join(HEADS)}{nearest(name, HEADS)}")
        if not isinstance(heads[name], dict):
            raise UserError(f"`heads`: {name} is {heads[name]!r}, not a dictionary of arguments")
        with prefix_errors(f"`heads`: {name}:"):
            checked[name] = defaults_of(HEADS[name]) | check_arguments(HEADS[name], heads[name], {"place"})
            file = str(checked[name].get("encoder", "")).removeprefix(CLASSIFIER)
            if checked[name].get("encoder") != file and Path(file).is_file():
                checked[name]["sha256"] = sha256(Path(file))  # another file of this name is another encoder
    return checked


def identity_of(heads: Config) -> Config:
    """What must stay when a run is continued: an encoder from a file is known by its sha256, not by its path."""
    return {name: {key: value for key, value in arguments.items() if key != "encoder" or not arguments.get("sha256")}
            if isinstance(arguments, dict) else arguments for name, arguments in heads.items()}


def with_heads(network: nn.Module, spec: Spec, names: Iterable[str] | None = None) -> WithHeads:
    """The network with the heads of its spec, or those of these names, freshly initialised."""
    place = place_of(spec.model.outline().eval(), spec.heads["split"], (spec.channels, *spec.image_size))
    heads = {}
    for name in spec.heads if names is None else names:
        if name != "split":
            with prefix_errors(f"`heads`: {name}:"):
                heads[name] = HEADS[name](place, **spec.heads[name])
    return WithHeads(network, heads, spec.heads["split"])


def weights_of(heads: Weights, names: Container[str]) -> Weights:
    """Of the weights of heads those of these names. A key begins with its head's name."""
    return {key: value for key, value in heads.items() if key.partition(".")[0] in names}


def restore_heads(restored: Restored, names: Iterable[str] = ("internal",)) -> WithHeads:
    """A checkpoint's network with its heads of these names, on the network's device."""
    model = with_heads(restored.model, restored.spec, names)
    own = weights_of(restored.heads, model.heads)
    if not own:
        raise UserError(f"`ckpt` {restored.path} has no weights of its heads; of a folder they are in heads.safetensors")
    load_weights(model.heads, own, restored.path)
    device = next(restored.model.parameters()).device
    return model.to(device).eval().requires_grad_(False)


def guided_inside(model: WithHeads, scale: float, guided: Iterable[bool]) -> Callable:
    """Internal guidance: (x, t, y) -> middle + scale (final - middle), where "internal" gives the middle; one forward pass.

    Args:
        guided: for each call, whether it is guided; the others run the backbone alone. A learned variance is the final one's.
    """
    calls = iter(guided)

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if not next(calls):
            return model.network(x, t, y)
        final, outputs = model(x, t, y)
        middle, channels = outputs["internal"].float(), x.shape[1]
        return torch.cat([torch.lerp(middle, final[:, :channels].float(), scale), final[:, channels:].float()], dim=1)

    return predict


class Tap:
    """A network with heads as a process calls it, x, t, y -> prediction. It keeps the heads' outputs of the last call."""

    def __init__(self, model: Callable):
        self.model, self.outputs = model, {}

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        prediction, self.outputs = self.model(x, t, **kwargs)
        return prediction
