import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from runtime.pictures import center_crop, grid, open_rgb, to_uint8, to_unit_range


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
