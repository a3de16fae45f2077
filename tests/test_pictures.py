import io
import itertools
import struct
import zlib
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.utils import make_grid

from runtime.pictures import center_crop, grid, open_rgb, picture, to_uint8, to_unit_range, upright_size
from runtime.processes import Stopped


def test_unit_range_reaches_both_ends_and_uint8_rounds_to_the_nearest_level():
    assert to_unit_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    assert to_uint8(torch.tensor([-2, -1, 0.0, 1, 3, 127.4 / 127.5]).view(1, 1, 1, 6)).flatten().tolist() == [
        0, 0, 128, 255, 255, 255]


def test_the_crop_is_the_middle_of_the_shorter_side_resized():
    ramp = np.broadcast_to(np.linspace(0, 255, 400).astype(np.uint8), (100, 400))
    cropped = center_crop(Image.fromarray(ramp.copy()), 25).astype(float)  # columns 150..250, by two halvings
    assert cropped.shape == (25, 25)
    expected = ramp[0, 150:250].reshape(25, 4).mean(axis=1)
    assert np.abs(cropped - expected).max() < 1.5
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(center_crop(Image.fromarray(image), 32), image)
    resized = np.asarray(Image.fromarray(image).resize((20, 20), Image.Resampling.BICUBIC))  # too small to be halved
    assert np.array_equal(center_crop(Image.fromarray(image), 20), resized)


def test_a_very_long_picture_is_cut_before_it_is_enlarged(monkeypatch):
    pixels, sizes, resize = np.random.default_rng(0).integers(0, 256, (1, 3000, 3), dtype=np.uint8), [], Image.Image.resize
    whole = np.asarray(Image.fromarray(pixels).resize((24000, 8), Image.Resampling.BICUBIC))[:, 11996:12004]
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, **kwargs: sizes.append(size) or resize(self, size, **kwargs))
    assert np.array_equal(center_crop(Image.fromarray(pixels), 8), whole)
    upright = np.ascontiguousarray(pixels.swapaxes(0, 1))
    assert np.array_equal(center_crop(Image.fromarray(upright), 8), whole.swapaxes(0, 1))
    assert sizes == [(800, 8), (8, 800)]


def test_a_grid_is_torchvision_s_with_small_pictures_enlarged():
    draw = torch.Generator().manual_seed(0)
    for shape, columns, factor, padding in (((5, 70, 66, 3), 3, 1, 2), ((2, 9, 40, 1), 10, 8, 1), ((1, 32, 32, 3), 2, 2, 1)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
        expected = make_grid(images.permute(0, 3, 1, 2), nrow=columns, padding=padding, pad_value=255)
        expected = expected.repeat_interleave(factor, 1).repeat_interleave(factor, 2).permute(1, 2, 0)
        assert np.array_equal(grid(images, columns), expected)


# --- files -----------------------------------------------------------------------------------------


def grey_levels(tmp_path, image, name="x.png"):
    """The mean grey level of a picture that was saved and opened again."""
    image.save(tmp_path / name)
    opened = open_rgb(tmp_path / name)
    assert opened.mode == "RGB"
    return np.asarray(opened).astype(float)


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    for name in ("x.png", "x.tiff"):
        found = grey_levels(tmp_path, Image.fromarray(ramp), name)
        assert np.abs(found - ramp[..., None] / 257).max() <= 0.5 + 1e-9


def test_transparent_pixels_are_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (200, 200, 200, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    palette = image.convert("RGB").quantize(2)
    palette.info["transparency"] = palette.getpixel((1, 0))
    for saved in (image, image.convert("LA"), palette):
        assert np.abs(grey_levels(tmp_path, saved)[0, :, 0] - [200, 255]).max() <= 1


def test_numbers_without_a_white_are_refused_by_name(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(OSError, match=r"x\.tiff: its pixels are floating-point"):
        open_rgb(tmp_path / "x.tiff")
    Image.fromarray(np.ones((4, 4), dtype=np.int32)).save(tmp_path / "y.tiff")
    with pytest.raises(OSError, match=r"y\.tiff: its pixels are 32-bit"):
        open_rgb(tmp_path / "y.tiff")


def test_an_animation_is_refused_by_name(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for name in ("x.gif", "x.webp", "x.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(OSError, match=f"{name}: it has 3 frames"):
            open_rgb(tmp_path / name)
        frames[0].save(tmp_path / name)
        assert np.asarray(open_rgb(tmp_path / name)).shape == (8, 8, 3)


def test_a_cameras_jpeg_with_a_second_view_is_its_first(tmp_path):
    views = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    views[0].save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=views[1:])
    assert np.asarray(open_rgb(tmp_path / "x.jpg"))[0, 0, 0] > 200


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_turns_a_picture_upright_once(kind):
    """Pillow turns a TIFF itself."""
    pixels = np.zeros((24, 16, 3), dtype=np.uint8)
    pixels[:8, :8] = 255  # white at one corner: no two orientations look the same
    for orientation in range(1, 9):
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(file, kind, exif=exif)
        upright = np.asarray(open_rgb(file, "x")).astype(float)
        expected = Image.fromarray(pixels)
        expected.getexif()[0x0112] = orientation
        assert np.abs(upright - np.asarray(ImageOps.exif_transpose(expected))).mean() < 10
        with picture(file) as header:
            assert upright_size(header) == upright.shape[:2]


def test_damaged_exif_leaves_the_picture_as_it_is():
    for kind, exif in itertools.product(("JPEG", "PNG"), (b"Exif\0\0MM\0*", b"Exif\0\0" + b"\xff" * 20, b"x")):
        file = io.BytesIO()
        Image.new("RGB", (4, 2)).save(file, kind, exif=exif)
        assert open_rgb(file, "x").size == (4, 2)


def tiff(rows, bits, photometric):
    """A TIFF of one strip, as scanners and microscopes write it: `rows` packed, big bits first."""
    height, width, data = len(rows), len(rows[0]), b""
    for row in rows:
        line = "".join(f"{value:0{bits}b}" for value in row)
        line += "0" * (-len(line) % 8)
        data += int(line, 2).to_bytes(len(line) // 8, "big")
    if bits == 16:
        data = b"".join(struct.pack("<H", value) for row in rows for value in row)
    tags = ((256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height),
            (279, len(data)))
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return io.BytesIO(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4))


def test_the_tags_of_a_tiff_tell_its_white():
    for bits, photometric, black, white in ((12, 1, 0, 4095), (16, 1, 0, 65535), (16, 0, 65535, 0), (8, 0, 255, 0)):
        grey = black + (white - black) // 3
        found = np.asarray(open_rgb(tiff([[black, grey], [grey, white]], bits, photometric), "x"))[..., 0]
        assert found.tolist() == [[0, 85], [85, 255]], (bits, photometric)


def test_a_pgm_above_255_is_scaled_by_its_own_maximum():
    for maximum in (1023, 4095, 65535):
        data = b"".join(struct.pack(">H", value) for value in (0, maximum // 3, maximum))
        found = np.asarray(open_rgb(io.BytesIO(b"P5 3 1 %d\n" % maximum + data), "x"))[0, :, 0]
        assert found.tolist() == [0, 85, 255]


def png(width, bits, colour, row, transparent):
    """A PNG of one row, and a transparent colour."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)),
              (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks))


def test_a_transparent_colour_is_white_at_any_number_of_bits():
    grey, rgb = 0, 2
    for bits, colour, row, transparent, expected in (
            (1, grey, bytes([0b01000000]), [0], [255, 255]), (2, grey, bytes([0b01100000]), [1], [255, 170]),
            (4, grey, bytes([0x36]), [3], [255, 102]), (8, grey, bytes([3, 6]), [3], [255, 6]),
            (16, grey, struct.pack(">2H", 771, 514), [771], [255, 2]),
            (16, rgb, struct.pack(">6H", 1028, 1799, 9, 514, 514, 514), [1028, 1799, 9], [255, 2])):
        found = np.asarray(open_rgb(png(2, bits, colour, row, transparent), "x"))[0, :, 0]
        assert found.tolist() == expected, bits


def test_whatever_a_decoder_raises_is_a_picture_that_cannot_be_read(monkeypatch):
    frames = [Image.effect_noise((40, 40), 60 + i) for i in range(3)]
    for kind in ("GIF", "TIFF"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        content, reasons = file.getvalue(), []
        for end in range(8, len(content), 29):
            try:
                open_rgb(io.BytesIO(content[:end]), "cut")
            except OSError as error:
                reasons.append(str(error))
        assert len(reasons) > 50
        assert all(reason.startswith("cannot read the image cut: ") for reason in reasons)
    monkeypatch.setattr(Image.Image, "convert", lambda image, mode: [][0])
    with pytest.raises(OSError, match=r"^cannot read the image x: IndexError: list index out of range$"):
        open_rgb(png(2, 8, 0, bytes([3, 6]), [3]), "x")
    for error in (Stopped, MemoryError):  # a signal in the middle of a picture, and what is no fault of the picture
        monkeypatch.setattr(Image.Image, "convert", mock.Mock(side_effect=error))
        with pytest.raises(error):
            open_rgb(png(2, 8, 0, bytes([3, 6]), [3]), "x")
