import itertools
import shutil

import classifier as classifier_script
import numpy as np
import torch
from conftest import assert_one_line

from evaluation.extractors import ClassifierFeatures
from pipeline import checkpoint
from pipeline.encoders import pixel_features
from training.datasets import load_dataset
from training.rows import Rows


def test_a_classifier_repeats_itself_and_wrong_flags_are_one_line(tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    flags = ["--data-path", "digits", "--epochs", 1, "--device", "cpu", "--out"]
    for name in ("a.pt", "b.pt"):
        assert run_here(classifier_script, *flags, name).returncode == 0
    a, b = (checkpoint.load(tmp_path / name)["classifier"] for name in ("a.pt", "b.pt"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert_one_line(run_here(classifier_script, *flags, "c.pt", "--epochs", 0), "--epochs 0")
    assert_one_line(run_here(classifier_script, *flags, "c.pth"), "--out c.pth", ".pt")
    assert_one_line(run_here(classifier_script, *flags, "c.pt", "--data-path", "nowhere"), "--data-path nowhere")


def test_shifted_and_mirrored_images_keep_their_content():
    x = torch.arange(64.0).view(1, 1, 8, 8).repeat(40, 1, 1, 1)
    shifts = set()
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        shifted = classifier_script.augment(x, False, draw)
        assert torch.equal(shifted[0], shifted[7])
        shifts.add(int(shifted[0, 0, 4, 4] - x[0, 0, 4, 4]))
    assert shifts == {8 * y + x for y in (-1, 0, 1) for x in (-1, 0, 1)}
    both = classifier_script.augment(x, True, torch.Generator().manual_seed(0))
    mirrored = [bool((image[0, :, 0] > image[0, :, 7]).all()) for image in both]
    assert 5 < sum(mirrored) < 35


def test_a_folder_of_a_few_photographs_of_any_size_is_enough(photographs, tmp_path, monkeypatch, run_here):
    """Six pictures, a class of which is blue. Samples of that size are then read as their labels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(classifier_script, "STEPS", 60)
    flags = ["--data-path", photographs / "train", "--device", "cpu", "--out", "c.pt", "--image-size", 40]
    result = run_here(classifier_script, *flags)
    assert "100.00% of 6 held-out images classified correctly" in result.stdout, result.stderr
    assert "epoch 20 of 20" in result.stderr
    assert checkpoint.load("c.pt")["spec"]["size"] == [32, 32]
    images, labels = load_dataset(str(photographs / "val"), 40).__getitems__(Rows.plain(range(6)))
    classify = ClassifierFeatures("c.pt", (40, 40), torch.device("cpu"))
    assert torch.equal(classify(images.permute(0, 2, 3, 1))["predictions"], labels)


def test_few_small_pictures_are_enough_and_fewer_are_one_line(photographs, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photographs, "photos")
    flags = ["--data-path", "photos/train", "--device", "cpu", "--out", "c.pt", "--epochs", 1, "--image-size"]
    assert run_here(classifier_script, *flags, 4).returncode == 0  # features of 1x1, which BatchNorm refuses of one image
    assert_one_line(run_here(classifier_script, *flags, 3), "--image-size 3 is not in 4..8192")
    (tmp_path / "photos" / "val" / "tabby cat").rename(tmp_path / "photos" / "val" / "a dog")
    said = run_here(classifier_script, *flags, 8).stdout
    assert "held-out part lacks the classes tabby cat\n" in said
    assert "the classes a dog are left out" in said
    (tmp_path / "photos" / "val" / "n02099601").rename(tmp_path / "photos" / "val" / "a cat")
    assert_one_line(run_here(classifier_script, *flags, 8), "--data-path photos/train has the classes a cat, a dog; ")
    for split in ("train", "val"):
        shutil.rmtree(f"photos/{split}")
        (tmp_path / "photos" / split / "cat").mkdir(parents=True)
        shutil.copy(photographs / split / "tabby cat" / "0.jpg", f"photos/{split}/cat")
    assert_one_line(run_here(classifier_script, *flags, 8), "--data-path photos/train holds one image")


def test_pixel_features_are_means_of_blocks():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 64, 96), dtype=np.uint8))
    features = pixel_features(images)
    values = images / 127.5 - 1
    assert features.shape == (2, 3, 32, 32)
    for y, x in itertools.product((0, 7, 31), repeat=2):
        block = values[..., 2 * y : 2 * y + 2, 3 * x : 3 * x + 3]
        assert torch.allclose(features[..., y, x], block.mean(dim=(2, 3)), atol=1e-6)
    assert torch.equal(pixel_features(images[..., :20, :30]), values[..., :20, :30])
    assert pixel_features(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).tolist() == [[[[-1, 1]]]]
