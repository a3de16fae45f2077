import numpy as np
import torch
from PIL import Image

from runtime.pictures import center_crop, to_uint8, to_unit_range


def test_unit_range_reaches_both_ends():
    assert to_unit_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_uint8_rounds_to_the_nearest_level():
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
