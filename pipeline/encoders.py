"""Frozen encoders: images -> a grid of tokens, with which the head `align` compares a network's features (REPA,
arXiv:2410.06940).

Legend: B batch, C channels (1 or 3), H W size of the images, h w size of the grid, Z width of a token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import checkpoint
from pipeline.weights import WithoutDraws, load_weights
from runtime import UserError
from runtime.cli import WRONG_VALUE, nearest, one_line, prefix_errors
from runtime.files import quiet_hub
from runtime.pictures import to_unit_range
from small_models import Classifier

SHORT_NAMES = {"dinov2": "vit_base_patch14_dinov2"}  # of timm's models; its weights: Meta AI, Apache 2.0
CLASSIFIER = "classifier:"  # how a name begins that is of a file
ALLOWED = "allowed: dinov2, a ViT of timm by its name, classifier:FILE"
PIXELS = 32  # images are averaged to at most this many pixels per side for a classifier and for FD-pixel32
TOKENS, TOKENS_OF = 16, 256  # tokens per side of an image of that many pixels per side


class Encoder(nn.Module):
    """Images (B, C, H, W) uint8 -> tokens (B, h, w, Z) fp32, without gradient. Grey images become RGB.

    The network runs under the caller's autocast, if any, as REPA's does; resizing and normalising do not. It draws no random
    numbers, and stays in evaluation mode.

    Args:
        name: of the encoder, for messages.
        width: Z.
    """

    def __init__(self, name: str, network: nn.Module, width: int):
        super().__init__()
        self.name, self.network, self.width = name, network, width
        self.eval().requires_grad_(False)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) for images of `image_size` (H, W). Raises UserError if it cannot encode them."""
        raise NotImplementedError

    def tokens(self, images: Tensor) -> Tensor:
        """RGB images (B, 3, H, W) uint8 -> (B, h, w, Z)."""
        raise NotImplementedError

    def token_shape(self, image_size: tuple[int, int], channels: int) -> tuple[int, int, int]:
        """(h, w, Z) for images of `image_size` (H, W) and C channels. Raises UserError if it cannot encode them."""
        if channels not in (1, 3):
            raise UserError(f"encoder {self.name} takes images of 1 or 3 channels, not of {channels}")
        return (*self.grid(image_size), self.width)

    def train(self, mode: bool = True) -> "Encoder":
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8, "not what a data set of images returns"
        return self.tokens(images.expand(-1, 3, -1, -1)).float()


class ViT(Encoder):
    """A ViT of timm. Its tokens are those of the patches after the last norm (before it, in models that normalise the average
    of patches), without class token and registers.

    Images are normalised and resized as timm's description of the weights says, to 16 tokens for each 256 pixels of a side,
    and to 16 below 512 pixels: the grid of a DiT-XL/2. For DINOv2's patches of 14 pixels that is REPA's size,
    224 * (H // 256) pixels.
    """

    def __init__(self, name: str, network: nn.Module):
        super().__init__(name, network, network.num_features)
        about = network.pretrained_cfg
        self.interpolation = about["interpolation"]
        for part in ("mean", "std"):
            self.register_buffer(part, torch.tensor(about[part]).view(1, 3, 1, 1), persistent=False)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        h, w = (TOKENS * max(1, side // TOKENS_OF) for side in image_size)
        return h, w

    def tokens(self, images: Tensor) -> Tensor:
        grid = self.grid(images.shape[2:])
        size = [count * side for count, side in zip(grid, self.network.patch_embed.patch_size)]
        x = F.interpolate((images / 255 - self.mean) / self.std, size, mode=self.interpolation)  # (B, 3, …)
        tokens = self.network.forward_features(x)[:, self.network.num_prefix_tokens :]          # (B, h * w, Z)
        return tokens.unflatten(1, grid)


class ClassifierGrid(Encoder):
    """A classifier of benchmarks/classifier.py, which sees images as evaluate.py does. Its tokens are its features before they
    are averaged over the image.
    """

    def __init__(self, name: str, path: str):
        with prefix_errors(f"encoder {name}:"):
            network, self.spec = load_classifier(path)
        super().__init__(name, network, network.head.in_features)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        check_size(self.spec, f"encoder {self.name}", image_size)
        h, w = (side // Classifier.FACTOR for side in self.spec["size"])
        return h, w

    def tokens(self, images: Tensor) -> Tensor:
        return self.network.feature_map(pixel_features(images)).permute(0, 2, 3, 1)


def pixel_size(image_size: tuple[int, int]) -> list[int]:
    """The size (h, w) to which images of `image_size` (H, W) are averaged: at most PIXELS per side."""
    return [min(PIXELS, side) for side in image_size]


def pixel_features(images: Tensor) -> Tensor:
    """(B, C, H, W) uint8 -> (B, C, h, w) in [-1, 1], area-averaged to `pixel_size`."""
    return F.adaptive_avg_pool2d(to_unit_range(images), pixel_size(images.shape[2:]))


def load_classifier(path: str) -> tuple[Classifier, dict[str, Any]]:
    """The network in a file of benchmarks/classifier.py, in evaluation mode, and what the file says of it."""
    state = checkpoint.load(path)
    if "classifier" not in state:
        raise UserError(f"{path} was not written by benchmarks/classifier.py")
    network = Classifier(**state["spec"]["network"])
    load_weights(network, state["classifier"], path)
    return network.eval(), state["spec"]


def check_size(spec: dict[str, Any], title: str, image_size: tuple[int, int]) -> None:
    """Raises UserError if a classifier was trained on images of another size than those of `image_size` (H, W) have for it."""
    if spec["size"] != (given := pixel_size(image_size)):
        raise UserError("{} was trained on images of {}x{}, not {}x{}".format(title, *spec["size"], *given))


def load_encoder(name: str, device: torch.device) -> Encoder:
    """A frozen encoder by name. What is wrong with a name is said before anything is downloaded.

    timm downloads weights that are not in the cache; of several processes one should load first (World.main_first).

    Args:
        name: "dinov2", the name of one of timm's ViTs, or "classifier:FILE" with a file of benchmarks/classifier.py.

    Raises:
        UserError, OSError: there is no such encoder, or it cannot be loaded.
    """
    path = name.removeprefix(CLASSIFIER)
    return (ClassifierGrid(name, path) if path != name else ViT(name, load_vit(name))).to(device)


def load_vit(name: str) -> nn.Module:
    """One of timm's ViTs with its pretrained weights, on the CPU."""
    import timm  # slow to import

    full = SHORT_NAMES.get(name, name)
    if not timm.is_model_pretrained(full):
        known = nearest(full, [*SHORT_NAMES, *timm.list_pretrained()])
        raise UserError(f"encoder {name} is not a model of timm with weights; {ALLOWED}{known}")

    def create(**options) -> nn.Module:
        with quiet_hub(about.hf_hub_id if options else None):
            return timm.create_model(full, dynamic_img_size=True, **options).eval()

    about = timm.get_pretrained_cfg(full)
    check_vit(name, create)
    try:
        with WithoutDraws():
            return create(pretrained=True)
    except Exception as error:  # of the network, the hub's client, or a damaged file
        source = f"hf download {about.hf_hub_id}" if about.hf_hub_id else about.url
        raise UserError(f"encoder {name}: cannot load its weights: {one_line(error).partition('. ')[0][:200]}; without a "
                        f"network, fetch them elsewhere ({source}) and copy that machine's cache here") from None


def check_vit(name: str, create: Callable[..., nn.Module]) -> None:
    """Raises UserError if a model of timm, built without memory for weights, has no token for each patch of an image."""
    with prefix_errors(f"encoder {name} is not a ViT with a token a patch; {ALLOWED};", AttributeError, *WRONG_VALUE), \
            torch.device("meta"):
        network = create()
        tokens = network.forward_features(torch.empty(1, 3, *(2 * side for side in network.patch_embed.patch_size)))
        if tokens.shape != (1, network.num_prefix_tokens + 4, network.num_features):
            raise UserError(f"its features are {tuple(tokens.shape)}")
