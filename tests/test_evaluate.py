import zipfile

import classifier as classifier_script
import numpy as np
import pytest
import torch
from conftest import all_features, assert_one_line, draw_images, numpys_distance, value
from PIL import Image

import evaluate
from evaluation import extractors
from evaluation.extractors import INCEPTION, INCEPTION_SHA256, Classifier
from pipeline import checkpoint
from runtime.files import sha256
from training.datasets import load_dataset
from training.rows import Rows

# --- whole runs on digits ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def digits_classifier(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "digits.pt"
    args = classifier_script.build_parser().parse_args(
        ["--data-path", "digits", "--epochs", "5", "--out", str(path), "--device", "cpu"])
    classifier_script.main(args)
    return path


def save_digits(name, split, change=lambda images, labels: (images, labels)):
    digits = load_dataset("digits", split=split)
    images, labels = change(digits.images.permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy(), digits.labels.numpy())
    np.savez(name, arr_0=images, arr_1=labels)


def load_network(path):
    network = Classifier(num_classes=10)
    network.load_state_dict(checkpoint.load(path)["classifier"])
    return network.eval()


def test_the_classifier_reads_real_digits_and_tells_wrong_labels(digits_classifier, figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--weights", "none", "--classifier", digits_classifier]
    save_digits("right.npz", "val")
    save_digits("wrong.npz", "val", lambda images, labels: (images, (labels + (np.arange(len(labels)) < 90)) % 10))
    found = figures("digits", "right.npz", *flags)
    accuracy = value(found, "Label accuracy")
    assert 0.9 < accuracy < 1
    assert found[0]["Label accuracy"]["floor"] == pytest.approx(accuracy)  # measured by the script that trained it
    assert (found[0]["FD-classifier"]["value"], found[0]["FD-pixel32"]["value"]) == pytest.approx((0, 0), abs=1e-6)
    for name in ("FD-classifier", "Label accuracy"):
        assert sha256(digits_classifier) in found[0][name]["remark"]
        assert f"test accuracy {accuracy:.4f}" in found[0][name]["remark"]
    with torch.no_grad(), np.load("wrong.npz") as file:
        logits = load_network(digits_classifier)(torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1)
        expected = (logits.argmax(dim=1).numpy() == file["arr_1"]).mean()
    assert value(figures("digits", "wrong.npz", *flags), "Label accuracy") == expected
    assert expected < accuracy - 0.1
    noise = draw_images(450, 0)
    np.savez("noise.npz", arr_0=noise)
    found = figures("digits", "noise.npz", *flags)
    assert found[0]["FD-classifier"]["value"] > 10 * found[0]["FD-classifier"]["floor"]
    assert found[0]["Label accuracy"] | {"floor": 0} == {
        "name": "Label accuracy", "value": None, "remark": "skipped: no labels (arr_1) in SAMPLES", "floor": 0,
        "floor_of": "the classifier's test part, N = 450"}


def test_fd_classifier_is_of_its_features(digits_classifier, figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_digits("samples.npz", "train", lambda images, labels: (images[:300] // 2, labels[:300]))
    found = figures("digits", "samples.npz", "--weights", "none", "--classifier", digits_classifier)
    network = load_network(digits_classifier)
    real = load_dataset("digits", split="val").images.expand(-1, 3, -1, -1)
    fake = torch.from_numpy(np.load("samples.npz")["arr_0"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = [network.features(images / 127.5 - 1).double().numpy() for images in (real, fake)]
    assert value(found, "FD-classifier") == pytest.approx(numpys_distance(*features), rel=1e-4)


def test_copies_of_training_images_are_found(figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_digits("copies.npz", "train", lambda images, labels: (images[5::7], labels[5::7]))
    found = figures("digits", "copies.npz", "--weights", "none", "--training-images", "digits")[0]
    train, held_out = (load_dataset("digits", split=split).images.flatten(1).double() / 127.5 - 1 for split in ("train", "val"))
    brute = (torch.cdist(held_out, train).amin(dim=1) / 8).median()
    median = found["Nearest training image, median"]
    assert median["value"] == pytest.approx(0, abs=1e-6)
    assert median["floor"] == pytest.approx(brute.item(), rel=1e-5)
    assert found["Nearer than 99 % of held-out"]["value"] == 1
    assert found["Nearer than 99 % of held-out"]["floor"] == pytest.approx(0.01, abs=0.005)
    save_digits("fair.npz", "val")
    fair = figures("digits", "fair.npz", "--weights", "none", "--training-images", "digits")[0]
    assert fair["Nearer than 99 % of held-out"]["value"] == pytest.approx(0.01, abs=0.005)
    save_digits("train.npz", "train")
    unfair = figures("train.npz", "fair.npz", "--weights", "none", "--training-images", "digits")[0]
    assert unfair["Nearer than 99 % of held-out"]["value"] is None
    assert "not held out" in unfair["Nearer than 99 % of held-out"]["remark"]


# --- wrong input ---------------------------------------------------------------------------------


def bad_files():
    """(name, contents)"""
    images = draw_images(9, 0)
    eye = np.eye(20)
    return {
        "no_images": dict(images=images, labels=np.arange(9)),
        "float": dict(arr_0=images / 255),
        "nchw": dict(arr_0=images.transpose(0, 3, 1, 2).copy()),
        "fortran": dict(arr_0=np.asfortranarray(images)),
        "objects": dict(arr_0=np.array([images, None], dtype=object)),
        "few": dict(arr_0=images[:3]),
        "large": dict(arr_0=draw_images(9, 0, size=16)),
        "sigma": dict(mu=np.zeros(20), sigma=np.eye(19), mu_s=np.zeros(15), sigma_s=np.eye(15)),
        "mu_only": dict(mu=np.zeros(20)),
        "nan": dict(mu=np.zeros(20), sigma=eye * np.nan),
        "crooked": dict(mu=np.zeros(20), sigma=np.triu(np.ones((20, 20)))),
        "object_n": dict(mu=np.zeros(20), sigma=eye, n=np.array([None])),
        "empty": {},
        "object_sigma": dict(mu=np.zeros(20), sigma=np.array([eye, None], dtype=object)),
        "bare": dict(mu=np.zeros(20), sigma=eye, mu_s=np.zeros(15), sigma_s=np.eye(15)),
    }


@pytest.mark.parametrize(("name", "words"), [
    ("no_images", ["no arr_0 among its arrays (images, labels)", "(N, H, W, 3) uint8"]),
    ("float", ["arr_0 is float64 (9, 8, 8, 3)", "expected uint8 (N, H, W, 3)"]),
    ("nchw", ["arr_0 is uint8 (9, 3, 8, 8)", "expected uint8 (N, H, W, 3)"]),
    ("fortran", ["Fortran order", "ascontiguousarray"]),
    ("objects", ["arr_0 is object (2,)"]),
    ("few", ["has 3 images", "at least 4"]),
    ("large", ["8x8", "16x16", "one size"]),
    ("sigma", ["mu is (20,) and sigma (19, 19)", "expected (20,) and (20, 20)"]),
    ("mu_only", ["mu, sigma and n cannot be read"]),
    ("nan", ["not finite"]),
    ("crooked", ["sigma is not symmetric"]),
    ("object_sigma", ["mu, sigma and n cannot be read"]),
    ("object_n", ["mu, sigma and n cannot be read"]),
    ("empty", ["no arr_0 among its arrays (none)"]),
])
@pytest.mark.parametrize("side", ["REF", "SAMPLES"])
def test_a_wrong_npz_is_one_line(sets, run_here, name, words, side):
    np.savez("bad.npz", **bad_files()[name])
    pair = ["bad.npz", "samples.npz"] if side == "REF" else ["ref.npz", "bad.npz"]
    where = [] if name == "large" else [f"{side} bad.npz"]
    assert_one_line(run_here(evaluate, *pair, "--device", "cpu"), *where, *words)


def test_a_damaged_npz_is_one_line(sets, run_here, tmp_path):
    content = (tmp_path / "samples.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
    assert_one_line(run_here(evaluate, "ref.npz", "half.npz"), "SAMPLES half.npz", "truncated")
    with zipfile.ZipFile("short.npz", "w") as file:  # a header that promises more than there is
        np.save("whole.npy", sets[1])
        file.writestr("arr_0.npy", (tmp_path / "whole.npy").read_bytes()[:-50])
    result = run_here(evaluate, "ref.npz", "short.npz", "--device", "cpu")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "evaluate.py: error: SAMPLES short.npz is truncated or no .npz: arr_0 ends early"
    locked = bytearray(content)
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # of each array: here, and in the list of contents
        start = -1
        while (start := locked.find(signature, start + 1)) >= 0:
            locked[start + flags] |= 1
    (tmp_path / "locked.npz").write_bytes(locked)
    assert_one_line(run_here(evaluate, "ref.npz", "locked.npz"), "SAMPLES locked.npz", "encrypted")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(flipped)
    result = run_here(evaluate, "ref.npz", "flipped.npz", "--device", "cpu")
    assert result.returncode == 2
    assert "Bad CRC-32" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(("flags", "words"), [
    (["ref.npz"], ["SAMPLES is missing", "--save-stats"]),
    (["ref.npz", "--save-stats", "s.npz", "--classifier", "c.pt"], ["SAMPLES is missing", "nothing else"]),
    (["ref.npz", "samples.npz", "--save-stats", "./samples.npz"], ["--save-stats", "overwrite"]),
    (["ref.npz", "samples.npz", "--training-images", "./ref.npz"], ["--training-images", "is REF", "held-out"]),
    (["nowhere.npz", "samples.npz"], ["REF nowhere.npz", "digits"]),
    (["ref.npz", "samples.npz", "--json", "figures.txt"], ["--json figures.txt", ".json"]),
    (["ref.npz", "samples.npz", "--json", "/proc/x/figures.json"], ["/proc/x"]),
    (["ref.npz", "samples.npz", "--json", "./samples.json"], ["--json ./samples.json", "keeps the settings of these images"]),
    (["ref.npz", "--save-stats", "stats.npy"], ["--save-stats stats.npy", ".npz"]),
    (["ref.npz", "--save-stats", "s.npz", "--weights", "none"], ["--save-stats", "--weights none"]),
    (["bare.npz", "--save-stats", "s.npz"], ["--save-stats", "statistics already"]),
    (["bare.npz", "samples.npz", "--weights", "none"], ["REF bare.npz", "--weights none needs images"]),
    (["bare.npz", "samples.npz", "--training-images", "ref.npz"], ["REF bare.npz", "--training-images needs images"]),
    (["ref.npz", "samples.npz", "--pr-precision", "fp8"], ["--pr-precision"]),
    (["ref.npz", "samples.npz", "--classifier", "nowhere.pt"], ["--classifier nowhere.pt does not exist"]),
    (["ref.npz", "samples.npz", "--training-images", "elsewhere"], ["--training-images elsewhere"]),
    (["empty", "samples.npz"], ["REF empty", "no images"]),
    (["ref.npz", "mixed"], ["SAMPLES mixed", "one size", "--image-size", "expected 8x8, b.png is 9x8"]),
])
def test_wrong_flags_are_one_line(sets, run_here, tmp_path, flags, words):
    np.savez("bare.npz", **bad_files()["bare"])
    for folder in ("empty", "mixed"):
        (tmp_path / folder).mkdir()
    for name, width in (("a", 8), ("b", 9)):
        Image.new("RGB", (width, 8)).save(tmp_path / "mixed" / f"{name}.png")
    assert_one_line(run_here(evaluate, *flags, "--device", "cpu"), *words)
    assert not (tmp_path / "s.npz").exists()


def test_other_weights_are_one_line(tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", arr_0=draw_images(5, 0))
    (tmp_path / "w.pth").write_bytes(b"other")
    assert_one_line(run_here(evaluate, "x.npz", "x.npz", "--weights", "w.pth"), "--weights w.pth", INCEPTION,
                    INCEPTION_SHA256, sha256(tmp_path / "w.pth"))
    assert_one_line(run_here(evaluate, "x.npz", "x.npz", "--weights", "v.pth"), "--weights v.pth is no file")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(extractors, "INCEPTION_URL", f"file://{tmp_path}/nowhere.pth")
    result = run_here(evaluate, "x.npz", "x.npz")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "cannot download" in result.stderr


@pytest.mark.parametrize(("labels", "words"), [
    (np.array([None] * 9), ["arr_1 is object (9,)"]),
    (np.arange(8), ["arr_1 is int64 (8,)", "(9,)"]),
    (np.arange(9) / 2, ["arr_1 is float64 (9,)"]),
    (np.arange(2, 11), ["labels from 2 to 10", "0..9"]),
    (np.arange(-1, 8), ["labels from -1 to 7", "0..9"]),
])
def test_wrong_labels_are_one_line(digits_classifier, tmp_path, monkeypatch, run_here, labels, words):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", arr_0=draw_images(9, 0), arr_1=labels)
    flags = ["digits", "x.npz", "--weights", "none", "--device", "cpu"]
    assert_one_line(run_here(evaluate, *flags, "--classifier", digits_classifier), "SAMPLES x.npz", *words)
    assert run_here(evaluate, *flags).returncode == 0  # nothing there asks for labels


def test_other_classifiers_are_one_line(digits_classifier, tiny_run, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", arr_0=draw_images(5, 0, size=16))
    flags = ["x.npz", "x.npz", "--weights", "none", "--device", "cpu", "--classifier"]
    assert_one_line(run_here(evaluate, *flags, digits_classifier), "--classifier", "8x8", "16x16")
    assert_one_line(run_here(evaluate, *flags, checkpoint.latest(tiny_run)), "--classifier", "benchmarks/classifier.py")


def test_a_checkpoint_is_no_set_of_images(sets, tiny_run, run_here):
    path = checkpoint.latest(tiny_run)
    for side, pair in (("SAMPLES", ["ref.npz", path]), ("REF", [path, "samples.npz"])):
        assert_one_line(run_here(evaluate, *pair, "--device", "cpu"), f"{side} {path} is no set of images", "arr_0")


def test_photographs_are_cropped_to_the_samples_size_which_is_said(sets, photographs, figures, run_here):
    np.savez("small.npz", arr_0=draw_images(20, 0, size=16))
    folder, flags = photographs / "val", ["--weights", "none", "--training-images", photographs / "train"]
    found, report = figures(folder, "small.npz", *flags)
    assert [report[side]["cropped"] for side in ("ref", "samples", "training_images")] == [True, False, True]
    assert report["ref"]["size"] == [16, 16]
    assert "N = 6 of 16x16 (height x width, cropped to it)" in report["said"]
    assert figures(folder, "small.npz", *flags, "--image-size", 16)[0]["FD-pixel32"] == found["FD-pixel32"]
    assert_one_line(run_here(evaluate, folder, "small.npz", *flags, "--image-size", 8), "--image-size 8: SAMPLES small.npz")


def test_statistics_of_photographs_are_of_the_size_that_is_asked_for(sets, photographs, run_here):
    folder, flags = photographs / "val", ["--save-stats", "r.npz", "--device", "cpu"]
    assert_one_line(run_here(evaluate, folder, *flags), "cropped to a square by --image-size")
    assert run_here(evaluate, folder, *flags, "--image-size", 8).returncode == 0
    with np.load("r.npz") as file:
        assert file["arr_0"].shape == (6, 8, 8, 3)
        expected = load_dataset(str(folder), 8).__getitems__(Rows.plain(range(6)))[0].permute(0, 2, 3, 1).numpy()
        assert np.array_equal(file["arr_0"], expected)
        assert np.allclose(file["mu"], all_features(expected)["pool"].mean(axis=0))
