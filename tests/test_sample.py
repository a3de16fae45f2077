from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSES, assert_one_line
from PIL import Image

import sample
import sample_ddp
from pipeline import generation
from runtime import UserError, cli


@pytest.fixture
def draw(tiny_run, tmp_path, monkeypatch, run_here):
    """sample.py in this process and in tmp_path: its output."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        result = run_here(sample, "--ckpt", tiny_run, *flags)
        assert result.returncode == 0, result.stderr
        return result.stdout
    return run


def pixels(name):
    with Image.open(name) as picture:
        return np.asarray(picture).astype(int)


def test_labels_are_ids_and_names_mixed():
    assert sample.parse_labels([1, "cat", "Tiger-Cat,0 golden_retriever Zero", "tench Tinca_tinca"], CLASSES) == [
        1, 4, 3, 0, 1, 2, 0, 0]


def test_a_whole_name_counts_before_its_parts_before_synonyms_and_before_ids():
    classes = ["golden retriever", "red, fox", "Mo\u0308we", "Stra\xdfe"]
    assert sample.parse_labels(["red,_fox", "red fox", 0, "GOLDEN-RETRIEVER 2"], classes) == [1, 1, 1, 0, 0, 2]
    assert sample.parse_labels(["M\xf6we", "STRASSE m\xd6we"], classes) == [2, 3, 2]
    assert sample.parse_labels(["harp"], ["lyre, harp", "harp", "bow"]) == [1]
    names = sorted(str(i) for i in range(12))  # 0, 1, 10, 11, 2, ...: the class called 10 has the id 2
    assert sample.parse_labels(["10 2"], names) == [2, 4]
    assert sample.parse_labels(["1"], ["cat", "dog", "plane, 1"]) == [1]


def test_without_labels_ten_classes_are_shown_and_dits_eight_of_a_thousand():
    assert sample.parse_labels(None, CLASSES) == [0, 1, 2, 3, 4]
    assert sample.parse_labels(None, [""] * 500) == [0, 55, 111, 166, 222, 277, 333, 388, 444, 499]
    assert sample.parse_labels(None, [str(i) for i in range(1000)]) == [207, 360, 387, 974, 88, 979, 417, 279]


def test_labels_that_name_no_class_or_several_are_refused():
    names = ["crane", "lemon", "crane", "jar, pot", "can, pot"]
    assert sample.parse_labels(["2", "lemon"], names) == [2, 1]
    for word, classes, message in (
            ("Crane", names, r"Crane .*several classes.* 0, 2$"), ("pot", names, r"pot .*several classes.* 3, 4$"),
            ("5", CLASSES, r"5 is not in 0\.\.4"), ("-1", CLASSES, r"-1 is not in 0\.\.4"), ("", CLASSES, "is empty"),
            ("golden_retreiver", CLASSES, "nearest: golden_retriever"), ("xyz", CLASSES, r"its ids are 0\.\.4")):
        with pytest.raises(UserError, match=message):
            sample.parse_labels([word], classes)


def test_the_picture_tells_how_it_was_made(draw, tiny_run):
    draw("--class-labels", "3 seven", "--num-samples", 2, "--seed", 5, "--out", "x.png", "--num-sampling-steps", 3)
    with Image.open("x.png") as picture:
        assert picture.size == (2 * (64 + 8) + 8, 2 * (64 + 8) + 8)
        assert picture.text == {"checkpoint": str(tiny_run / "checkpoints" / "0000006.pt"), "seed": "5", "labels": "[3, 7]",
                                "classes": "['three', 'seven']", "cfg_scale": "1.0", "cfg_channels": "1", "sampler": "heun",
                                "eta": "0.0", "steps": "3", "guidance_interval": "None",
                                "dynamic_thresholding": "False", "precision": "fp32", "reuse": "none"}


def test_each_column_is_one_label_and_more_rows_leave_the_first_as_they_are(draw):
    labels = ["--class-labels", " ".join(str(i % 10) for i in range(12)), "--num-sampling-steps", 2]
    for rows, labelled, size in ((2, labels, (2 * 72 + 8, 12 * 72 + 8, 3)), (1, labels, (2 * 72 + 8, 10 * 72 + 8, 3)),
                                 (3, labels[2:], (3 * 72 + 8, 10 * 72 + 8, 3))):  # only a single row may be broken
        draw(*labelled, "--num-samples", rows, "--out", f"{rows}.png")
        assert pixels(f"{rows}.png").shape == size
    assert np.abs(pixels("1.png")[:72] - pixels("3.png")[:72]).max() <= 1


def test_a_trajectory_is_a_strip_and_a_film_that_end_in_the_picture(draw):
    out = draw("--class-labels", "3 7", "--num-sampling-steps", 12, "--trajectory")
    files = "sample.png, sample-labels.txt, sample-trajectory.png, sample-trajectory.gif"
    assert f"Wrote {files}: 2 images of three, seven" in out
    with Image.open("sample.png") as file, Image.open("sample-trajectory.png") as strip:
        assert strip.text == file.text
    picture, cells = pixels("sample.png"), pixels("sample-trajectory.png")
    assert cells.shape == (4 * 72 + 8, 10 * 72 + 8, 3)  # states of the first, its x_0, states of the second, its x_0
    for row, column in ((0, 0), (1, 0), (2, 1), (3, 1)):  # at the end, the state is the x_0 predicted last
        last = cells[row * 72 : row * 72 + 72, -80:-8]
        assert np.array_equal(last, picture[:72, column * 72 : column * 72 + 72])
    assert not np.array_equal(cells[:72, :72], cells[72:144, :72])
    with Image.open("sample-trajectory.gif") as film:
        assert (film.n_frames, film.size) == (10, (2 * 72 + 8, 2 * 72 + 8))


@pytest.mark.parametrize(("flags", "backend"), [
    (["--reuse", "forecast", "--key-steps", "every:3"], "eager"), pytest.param([], "inductor", marks=pytest.mark.slow)])
def test_compiled_is_eager_but_for_rounding(draw, monkeypatch, flags, backend):
    compiled = []
    compile = partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function.__name__) or compile(function))
    for out, also in (("a.png", []), ("b.png", ["--compile"])):
        draw("--num-sampling-steps", 8, "--sampler", "ddim", *flags, *also, "--out", out)
    assert compiled == ["encode", "decode"]
    assert np.abs(pixels("a.png") - pixels("b.png")).max() <= 1


def test_samples_that_are_not_finite_are_not_written(tiny_run, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generation, "guide", lambda *rest: lambda x, t: x * torch.nan)
    for script in (sample, sample_ddp):
        result = run_here(script, "--ckpt", tiny_run, "--num-sampling-steps", 2)
        assert result.returncode == 2
        assert "error: the samples are not finite" in result.stderr
    assert not list(tmp_path.rglob("*.np[yz]")) + list(tmp_path.glob("*.png"))


def test_wrong_input_is_one_line_and_writes_nothing(tiny_run, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    for flags, words in ((["--num-samples", 0], "--num-samples 0"), (["--class-labels", "sevne"], "--class-labels sevne"),
                         (["--out", "new/x.png", "--reuse", "encoder", "--reuse-args", '{"split": 3}'], "split 3 is not")):
        assert_one_line(run_here(sample, "--ckpt", tiny_run, *flags), words)
    assert list(tmp_path.iterdir()) == []


def test_only_a_file_that_can_be_written_is_an_output(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/full")
    for out, words in (("x.jpg", "x.jpg is not the name of a .png"), ("folder.png", "is not a file"),
                       ("device.png", "is not a file"), ("/proc/nowhere/x.png", "/proc/nowhere")):
        with pytest.raises((UserError, OSError), match=f"`out` .*{words}"):
            cli.check_output_flag(SimpleNamespace(out=tmp_path / out), "out", ".png")
