"""Pictures: open, crop, uint8 <-> [-1, 1], grids, PNG and GIF."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from runtime.files import atomic

MAX_COLUMNS = 10
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
LEGIBLE = 64  # pixels: smaller pictures are enlarged by an integer factor


@contextmanager
def picture(file: str | Path | BinaryIO, name: str | None = None) -> Iterator[Image.Image]:
    """An open image file, of which only the header is read. Raises OSError with its `name` or path if it is damaged."""
    try:
        with Image.open(file) as image:
            yield image
    except UnidentifiedImageError:
        raise OSError(f"cannot read the image {name or file}: it is no picture of a known format") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # a damaged file fails in many ways
        raise OSError(f"cannot read the image {name or file}: {error}") from None


def open_rgb(file: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Open a picture as RGB. Greyscale of 8 or 16 bits and CMYK are converted; a transparent one is put on white.

    Raises OSError if it is damaged or animated, or if its white is not known, as in TIFFs of floating-point numbers.
    """
    with picture(file, name) as image:
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a camera's JPEG with a second, smaller view
            raise ValueError(f"it has {image.n_frames} frames; expected one picture")
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # older Pillow: "I"
            return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            kind = "floating-point" if image.mode == "F" else "32-bit"
            raise ValueError(f"its pixels are {kind} numbers, whose white is not known; save it with 8 or 16 bits")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop: halve by box averages while large enough, resize the shorter side to `size` (bicubic), cut out the center.

    Returns: (size, size, 3) uint8, or (size, size) for a greyscale image.
    """
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8, rounded to the nearest level."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def save_grid(images: Tensor, path: Path, columns: int, description: dict | None = None) -> None:
    """Write images (B, H, W, C) uint8 as one PNG, with the description in its text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, value in (description or {}).items():
        info.add_text(key, str(value))
    with atomic(path) as file:
        grid(images, columns).save(file, format="PNG", pnginfo=info)


def grid(images: Tensor, columns: int) -> Image.Image:
    """Images (B, H, W, C) uint8 in one picture with this many columns. Small images are enlarged."""
    count, height, width, channels = images.shape
    factor = max(1, math.ceil(LEGIBLE / min(height, width)))
    gap = max(1, 2 // factor) if count > 1 else 0
    columns = min(columns, count)
    pixels = images.new_full((gap + math.ceil(count / columns) * (height + gap), gap + columns * (width + gap), channels), 255)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        pixels[top : top + height, left : left + width] = image
    pixels = pixels.expand(-1, -1, 3)  # greyscale
    return Image.fromarray(pixels.repeat_interleave(factor, 0).repeat_interleave(factor, 1).numpy())


def save_gif(frames: list[Image.Image], path: Path) -> None:
    with atomic(path) as file:
        frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], duration=400, loop=0)
