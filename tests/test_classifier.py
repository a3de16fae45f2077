import classifier as classifier_script
import torch
from conftest import assert_one_line

from pipeline import checkpoint


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
    """Six pictures, a class of which is blue."""
    monkeypatch.chdir(tmp_path)
    flags = ["--data-path", photographs / "train", "--device", "cpu", "--out", "c.pt", "--image-size"]
    result = run_here(classifier_script, *flags, 40)
    assert "100.00% of 6 held-out images read right" in result.stdout, result.stderr
    assert "epoch 50 of 50" in result.stderr
    assert checkpoint.load("c.pt")["spec"]["size"] == [32, 32]
    assert_one_line(run_here(classifier_script, *flags, 3), "--image-size (3, 3) is less than the 4 pixels")
