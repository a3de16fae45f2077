import hashlib
import re
import zipfile

import classifier as classifier_script
import numpy as np
import pytest
import torch
from conftest import assert_one_line, draw_images, numpys_distance, value
from PIL import Image

import evaluate
from evaluation.extractors import open_extractors
from evaluation.image_sets import open_set
from pipeline import checkpoint
from runtime.files import sha256, write_json
from small_models import Classifier
from training.datasets import load_dataset

DIGITS = hashlib.sha256(load_dataset("digits", split="val").images.numpy().tobytes()).hexdigest()

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


def test_label_accuracy_and_fd_classifier_are_of_the_networks_answers(digits_classifier, figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--weights", "none", "--classifier", digits_classifier]
    save_digits("right.npz", "val")
    found = figures("digits", "right.npz", *flags)
    accuracy = value(found, "Label accuracy")
    assert 0.9 < accuracy < 1
    assert found[0]["Label accuracy"]["floor"] == pytest.approx(accuracy)  # measured by the script that trained it
    assert (value(found, "FD-classifier"), value(found, "FD-pixel32")) == pytest.approx((0, 0), abs=1e-6)
    for name in ("FD-classifier", "Label accuracy"):
        assert f"sha256 {sha256(digits_classifier)}, test accuracy {accuracy:.4f}" in found[0][name]["remark"]

    save_digits("wrong.npz", "train", lambda images, labels: (images[:300] // 2, (labels[:300] + (np.arange(300) < 90)) % 10))
    found = figures("digits", "wrong.npz", *flags)
    network = Classifier(num_classes=10)
    network.load_state_dict(checkpoint.load(digits_classifier)["classifier"])
    real = load_dataset("digits", split="val").images.expand(-1, 3, -1, -1)
    with torch.no_grad(), np.load("wrong.npz") as file:
        fake, labels = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2), file["arr_1"]
        real, fake = (network.eval().features(images / 127.5 - 1) for images in (real, fake))
        expected = (network.head(fake).argmax(dim=1).numpy() == labels).mean()
        distance = numpys_distance(real.double().numpy(), fake.double().numpy())
    assert value(found, "Label accuracy") == expected < accuracy - 0.1
    assert value(found, "FD-classifier") == pytest.approx(distance, rel=1e-4)
    assert value(found, "FD-classifier") > 10 * found[0]["FD-classifier"]["floor"]

    np.savez("unlabelled.npz", arr_0=draw_images(20, 0))
    found = figures("digits", "unlabelled.npz", *flags)[0]["Label accuracy"]
    assert (found["value"], found["remark"]) == (None, "skipped: no labels (arr_1) in SAMPLES")


def test_copies_of_training_images_are_found(figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_digits("copies.npz", "train", lambda images, labels: (images[5::7], labels[5::7]))
    flags = ["--weights", "none", "--training-images", "digits"]
    found = figures("digits", "copies.npz", *flags)[0]
    train, held_out = (load_dataset("digits", split=split).images.flatten(1).double() / 127.5 - 1 for split in ("train", "val"))
    brute = (torch.cdist(held_out, train).amin(dim=1) / 8).median()
    median, share = found["Nearest training image, median"], found["Nearer than 99 % of held-out"]
    assert median["value"] == pytest.approx(0, abs=1e-6)
    assert median["floor"] == pytest.approx(brute.item(), rel=1e-5)
    assert (share["value"], share["floor"]) == (1, pytest.approx(0.01, abs=0.005))
    save_digits("fair.npz", "val")
    save_digits("train.npz", "train")
    unfair = figures("train.npz", "fair.npz", *flags)[0]["Nearer than 99 % of held-out"]
    assert unfair["value"] is None
    assert "not held out" in unfair["remark"]


def test_photographs_are_cropped_to_the_samples_size_which_is_reported(sets, photographs, figures):
    np.savez("small.npz", arr_0=draw_images(20, 0, size=16))
    folder, flags = photographs / "val", ["--weights", "none", "--training-images", photographs / "train"]
    found, report = figures(folder, "small.npz", *flags)
    assert [report[side]["cropped"] for side in ("ref", "samples", "training_images")] == [True, False, True]
    assert report["ref"]["size"] == [16, 16]
    assert "N = 6 of 16x16 (height x width, cropped to it)" in report["said"]
    assert figures(folder, "small.npz", *flags, "--image-size", 16)[0]["FD-pixel32"] == found["FD-pixel32"]
    with pytest.raises(ValueError, match=r"--image-size 8: SAMPLES small.npz"):
        sets_of(folder, "small.npz", *flags, "--image-size", 8)
    assert sets_of(folder, "--save-stats", "r.npz", "--image-size", 8)[0].images.size == (8, 8)


MADE = {"checkpoint": "r-0000007", "checkpoint_sha256": "12" * 32, "model": "DiT-S/2", "image_size": [8, 8], "vae": "ema",
        "vae_identity": {"sha256": "ab" * 32}, "images": 70, "seed": 3, "labels": "balanced", "tf32": True, "compile": False,
        "cfg_scale": 1.5, "cfg_channels": 3, "guidance_interval": [0, 600.0], "dynamic_thresholding": False, "sampler": "heun",
        "steps": "25", "eta": 0.0, "reuse": "none", "precision": "bf16", "internal_scale": 1.4, "weights": "ema",
        "versions": {"torch": "2.11", "code": "v1-2-gabc"}}


def test_what_decides_a_figure_is_one_line(sets, figures, tmp_path):
    """Of an .npz and of a folder of its pictures; also by an older version; none of another's JSON."""
    def line(ref, samples):
        _, report = figures(ref, samples, "--weights", "none")
        return report["protocol"], report

    (tmp_path / "samples").mkdir()
    for i, image in enumerate(sets[1][:9]):
        Image.fromarray(image).save(tmp_path / "samples" / f"{i}.png")
    write_json(tmp_path / "samples.json", MADE)
    found, report = line("ref.npz", "samples.npz")
    file = sha256(tmp_path / "ref.npz")
    assert found == (
        f"N = 70, reference ref.npz (sha256 {file[:16]}), r-0000007 (sha256 1212121212121212, EMA), sampler heun, 25 steps, "
        "guidance 1.5 of 3 channels at t 0..600, balanced labels, seed 3, bf16 (TF32 allowed), decoder ema (sha256 "
        "abababababababab), internal_scale 1.4, torch 2.11, code v1-2-gabc")
    assert (report["made"], report["ref"]["sha256"]) == (MADE, file)
    assert f"Protocol: {found}\n" in report["said"]
    assert line("digits", "samples/")[0] == found.replace(f"ref.npz (sha256 {file[:16]}", f"digits (sha256 {DIGITS[:16]}")
    names = sorted((tmp_path / "samples").iterdir())
    of_files = hashlib.sha256("".join(f"{sha256(path)}\n" for path in names).encode()).hexdigest()
    assert line("samples", "samples.npz")[1]["ref"]["sha256"] == of_files

    write_json(tmp_path / "samples.json", {key: MADE[key] for key in MADE if key not in ("weights", "versions")})
    older = line("ref.npz", "samples.npz")[0]
    assert "(sha256 1212121212121212), sampler" in older
    assert "torch" not in older
    write_json(tmp_path / "samples.json", {"checkpoint": "x"})
    found, report = line("ref.npz", "samples.npz")
    assert found is None
    assert "Protocol" not in report["said"]


# --- wrong input: the checks -----------------------------------------------------------------------


def sets_of(*flags):
    return evaluate.open_sets(evaluate.build_parser().parse_args(list(map(str, flags))))


EYE, IMAGES = np.eye(20), draw_images(9, 0)
BARE = dict(mu=np.zeros(20), sigma=EYE, mu_s=np.zeros(15), sigma_s=np.eye(15))


def test_a_wrong_npz_is_refused_on_either_side(sets):
    for arrays, words in (
            (dict(images=IMAGES, labels=np.arange(9)), r"no arr_0 among its arrays \(images, labels\)"),
            (dict(arr_0=IMAGES / 255), r"arr_0 is float64 \(9, 8, 8, 3\); expected uint8 \(N, H, W, 3\)"),
            (dict(arr_0=np.asfortranarray(IMAGES)), "Fortran order.*ascontiguousarray"),
            (dict(arr_0=np.array([IMAGES, None], dtype=object)), r"arr_0 is object \(2,\)"),
            (dict(arr_0=IMAGES[:3]), "has 3 images; expected at least 4"),
            (BARE | dict(sigma=np.eye(19)), r"sigma \(19, 19\); .*\(20, 20\)"),
            (dict(mu=np.zeros(20)), "mu, sigma and n cannot be read"),
            (dict(mu=np.zeros(20), sigma=EYE * np.nan), "not finite"),
            (dict(mu=np.zeros(20), sigma=np.triu(np.ones((20, 20)))), "sigma is not symmetric"),
            (dict(mu=np.zeros(20), sigma=np.array([EYE, None], dtype=object)), "mu, sigma and n cannot be read")):
        np.savez("bad.npz", **arrays)
        for side, pair in (("REF", ["bad.npz", "samples.npz"]), ("SAMPLES", ["ref.npz", "bad.npz"])):
            with pytest.raises(ValueError, match=f"^{side} bad.npz.*{words}"):
                sets_of(*pair)


def test_a_damaged_npz_is_refused(sets, tmp_path):
    content = bytearray((tmp_path / "samples.npz").read_bytes())
    (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
    with zipfile.ZipFile("short.npz", "w") as file:  # a header that promises more than there is
        np.save("whole.npy", sets[1])
        file.writestr("arr_0.npy", (tmp_path / "whole.npy").read_bytes()[:-50])
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(content)
    for name, words in (("half", "truncated"), ("short", "arr_0 ends early"), ("flipped", "Bad CRC-32")):
        with pytest.raises(OSError, match=f"SAMPLES {name}.npz.*{words}"):
            list(open_set(f"{name}.npz", "SAMPLES").images.read([np.arange(70)]))


def test_wrong_flags_are_refused(sets, tmp_path):
    np.savez("bare.npz", **BARE)
    np.savez("large.npz", arr_0=draw_images(9, 0, size=16))
    for folder in ("empty", "mixed"):
        (tmp_path / folder).mkdir()
    for name, width in (("a", 8), ("b", 9)):
        Image.new("RGB", (width, 8)).save(tmp_path / "mixed" / f"{name}.png")
    for flags, words in (
            ("ref.npz", "SAMPLES is missing.*--save-stats"),
            ("ref.npz samples.npz --save-stats ./samples.npz", "--save-stats ./samples.npz would overwrite"),
            ("ref.npz samples.npz --training-images ./ref.npz", "--training-images ./ref.npz is REF.*held-out"),
            ("nowhere.npz samples.npz", "REF nowhere.npz does not exist.*digits"),
            ("ref.npz samples.npz --json ./samples.json", "--json ./samples.json is where sample_ddp.py"),
            ("ref.npz --save-stats stats.npy", "`save_stats`:? stats.npy"),
            ("ref.npz --save-stats s.npz --weights none", "--save-stats.*--weights none"),
            ("bare.npz --save-stats s.npz", "REF bare.npz already holds statistics"),
            ("bare.npz samples.npz --weights none", "REF bare.npz.*--weights none needs images"),
            ("bare.npz samples.npz --training-images ref.npz", "REF bare.npz.*--training-images needs images"),
            ("ref.npz large.npz", "SAMPLES are 16x16.*REF 8x8; expected one size"),
            ("empty samples.npz", "REF empty.*no images"),
            ("ref.npz mixed", "SAMPLES mixed.*expected 8x8, b.png is 9x8")):
        with pytest.raises((ValueError, OSError)) as error:
            sets_of(*flags.split())
        assert re.search(words, str(error.value)), flags
    assert not (tmp_path / "s.npz").exists()


def test_a_wrong_input_of_the_script_is_one_line(sets, tiny_run, run_here):
    assert_one_line(run_here(evaluate, "ref.npz", "samples.npz", "--json", "figures.txt"), "--json", "figures.txt", ".json")
    path = checkpoint.latest(tiny_run)
    assert_one_line(run_here(evaluate, path, "samples.npz"), f"REF {path} is not a set of images", "arr_0")


def test_wrong_labels_and_other_classifiers_are_refused(digits_classifier, tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def extractors(classifier, **arrays):
        np.savez("x.npz", **arrays)
        sides = [open_set("x.npz", title) for title in ("REF", "SAMPLES")]
        return open_extractors(*sides, torch.device("cpu"), "none", classifier and str(classifier), False)

    for labels, words in ((np.array([None] * 9), r"arr_1 is object \(9,\)"), (np.arange(8), r"arr_1 is int64 \(8,\)"),
                          (np.arange(9) / 2, r"arr_1 is float64 \(9,\)"), (np.arange(2, 11), r"labels from 2 to 10.*0\.\.9"),
                          (np.arange(-1, 8), "labels from -1 to 7")):
        with pytest.raises(ValueError, match=f"SAMPLES x.npz.*{words}"):
            extractors(digits_classifier, arr_0=IMAGES, arr_1=labels)
        assert list(extractors(None, arr_0=IMAGES, arr_1=labels)) == ["pixels"]  # nothing else reads labels
    other = checkpoint.latest(tiny_run)
    for path, size, words in ((digits_classifier, 16, "8x8.*16x16"), (other, 8, "benchmarks/classifier.py"),
                              ("nowhere.pt", 8, "nowhere.pt does not exist")):
        with pytest.raises((ValueError, OSError), match=f"`classifier`.*{words}"):
            extractors(path, arr_0=draw_images(5, 0, size=size))
