"""Pictures: open, crop, uint8 <-> [-1, 1], grids, PNG and GIF."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from PIL.ExifTags import Base
from torch import Tensor

from runtime.files import atomic, printable

MAX_COLUMNS = 10
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # EXIF's orientation -> what turns a picture upright
SIDEWAYS = [TURNS[orientation] for orientation in (5, 6, 7, 8)]
MAX_ASPECT = 100  # long side / short side of a picture that is resized whole, as memory grows with it
LEGIBLE = 64  # pixels: smaller pictures are enlarged by an integer factor


@contextmanager
def picture(file: str | Path | BinaryIO, name: str | None = None) -> Iterator[Image.Image]:
    """An open image file, of which only the header is read. Raises OSError with its `name` or path if it is damaged."""
    try:
        with Image.open(file) as image:
            yield image
    except UnidentifiedImageError:
        raise OSError(f"cannot read the image {name or file}: it is no picture of a known format") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise anything: IndexError, KeyError, TypeError, struct.error, …
        kind = "" if isinstance(error, OSError | SyntaxError | ValueError) else f"{type(error).__name__}: "
        raise OSError(f"cannot read the image {name or file}: {kind}{error}") from None


def open_rgb(file: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Open a picture as RGB, upright. Greyscale of any bits and CMYK are converted; a transparent one is put on white.

    Raises OSError if it is damaged or animated, or if its white is not known, as in TIFFs of floating-point numbers.
    """
    with picture(file, name) as image:
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a camera's JPEG with a second, smaller view
            raise ValueError(f"it has {image.n_frames} frames; expected one picture")
        rgb, turn = to_rgb(image), turn_of(image)
        return rgb if turn is None else rgb.transpose(turn)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What turns a picture upright as its EXIF orientation says. Pillow turns a TIFF itself."""
    try:
        return None if image.format == "TIFF" else TURNS.get(image.getexif().get(Base.Orientation))
    except Exception:  # damaged EXIF beside sound pixels
        return None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(H, W) of a picture that `open_rgb` will return."""
    return image.size if turn_of(image) in SIDEWAYS else image.size[::-1]


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # PNG: older Pillow
        return Image.fromarray(eight_bits(image)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ValueError(f"its pixels are {kind} numbers, whose white is not known; save it with 8 or 16 bits")
    if image.format == "PNG" and "transparency" in image.info and image.tile:
        image.info["transparency"] = eight_bit_colour(image.info["transparency"], image.tile[0][3])
    if image.mode == "1":
        image = image.convert("L")  # which may have a transparent colour
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def eight_bits(image: Image.Image) -> np.ndarray:
    """Greyscale of 9 to 16 bits -> (H, W) uint8. The tags of a TIFF say how many bits, and whether 0 is white."""
    tags = getattr(image, "tag_v2", {})
    white = 2 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
    levels = np.asarray(image)
    grey = (levels / (white / 255)).round().astype(np.uint8)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        grey = 255 - grey
    if "transparency" in image.info:
        grey[levels == image.info["transparency"]] = 255
    return grey


def eight_bit_colour(colour: int | tuple[int, ...] | bytes, raw: str) -> int | tuple[int, ...] | bytes:
    """A PNG's transparent colour, which Pillow reads with the file's bits (`raw`), as its pixels are read, with 8."""
    if raw == "RGB;16B":
        return tuple(part >> 8 for part in colour)
    return colour * {"L;2": 85, "L;4": 17}.get(raw, 1)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop: halve by box averages while large enough, resize the shorter side to `size` (bicubic), cut out the center.

    Returns: (size, size, 3) uint8, or (size, size) for a greyscale image.
    """
    width, height = image.size
    if max(image.size) > (longest := MAX_ASPECT * min(image.size)):
        left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
        image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
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
        info.add_text(key, printable(str(value)))
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
