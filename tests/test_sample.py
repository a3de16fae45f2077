import pathlib

import numpy as np
import pytest
import torch
from conftest import CLASSES, assert_one_line, run_script
from PIL import Image

import sample
from models import DiT_models
from pipeline import checkpoint

# --- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "ids"), [
    (None, [0, 1, 2, 3, 4]), (["1 golden_retriever Zero"], [1, 1, 2]), ([1, "cat", "Tiger-Cat,0"], [1, 4, 3, 0]),
    (["tench Tinca_tinca"], [0, 0]),
])
def test_labels_are_ids_and_names_mixed(words, ids):
    assert sample.parse_labels(words, CLASSES) == ids


def test_an_argument_that_is_a_whole_name_is_that_class():
    classes = ["golden retriever", "red, fox", "Mo\u0308we", "Stra\xdfe"]
    assert sample.parse_labels(["golden retriever", "red, fox"], classes) == [0, 1]
    assert sample.parse_labels(["red,_fox", "red fox", 0, "GOLDEN-RETRIEVER 2"], classes) == [1, 1, 1, 0, 0, 2]
    assert sample.parse_labels(["M\xf6we", "STRASSE m\xd6we"], classes) == [2, 3, 2]


def test_without_labels_ten_classes_are_shown_from_first_to_last():
    assert sample.parse_labels(None, [f"class {i}" for i in range(500)]) == [0, 55, 111, 166, 222, 277, 333, 388, 444, 499]


def test_a_name_of_two_classes_is_not_guessed():
    classes = ["crane", "lemon", "crane", "jar, pot", "can, pot"]
    for word, ids in (("Crane", "0, 2"), ("pot", "3, 4")):
        with pytest.raises(ValueError, match=f"--class-labels {word} names several classes; their ids are {ids}"):
            sample.parse_labels([word], classes)
    assert sample.parse_labels(["2", "lemon"], classes) == [2, 1]


def test_a_whole_name_counts_before_synonyms_and_ids():
    assert sample.parse_labels(["harp"], ["lyre, harp", "harp", "bow"]) == [1]
    names = sorted(str(i) for i in range(12))  # 0, 1, 10, 11, 2, ...: the class called 10 has the id 2
    assert sample.parse_labels(["10 2"], names) == [2, 4]
    assert sample.parse_labels(["1"], ["cat", "dog", "plane, 1"]) == [1]


def test_a_thousand_classes_default_to_dits_eight():
    assert sample.parse_labels(None, [str(i) for i in range(1000)]) == [207, 360, 387, 974, 88, 979, 417, 279]


@pytest.mark.parametrize(("word", "message"), [
    ("5", r"5 is not in 0\.\.4"), ("-1", r"-1 is not in 0\.\.4"), ("golden_retreiver", "nearest: golden_retriever"),
    ("xyz", r"its ids are 0\.\.4"),
])
def test_unknown_labels_are_named_with_what_is_near(word, message):
    with pytest.raises(ValueError, match=message):
        sample.parse_labels([word], CLASSES)


# --- the script ----------------------------------------------------------------------------------


def test_the_picture_tells_how_it_was_made(tiny_run, tmp_path):
    run_script("sample.py", "--ckpt", tiny_run, "--class-labels", "3 seven", "--num-samples", 2, "--seed", 5, "--out",
               tmp_path / "x.png", "--num-sampling-steps", 3, cwd=tmp_path)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (2 * (64 + 8) + 8, 2 * (64 + 8) + 8)
        assert picture.text == {"checkpoint": str(tiny_run / "checkpoints" / "0000006.pt"), "seed": "5", "labels": "[3, 7]",
                                "classes": "['three', 'seven']", "cfg_scale": "1.0", "cfg_channels": "1", "sampler": "heun",
                                "eta": "0.0", "steps": "3", "guidance_interval": "None",
                                "dynamic_thresholding": "False", "precision": "fp32", "reuse": "none"}


def test_another_seed_draws_another_picture(tiny_run, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    pixels = []
    for seed in (1, 2, 1):
        run_here(sample, "--ckpt", tiny_run, "--class-labels", 3, "--num-sampling-steps", 2, "--seed", seed)
        with Image.open("sample.png") as picture:
            pixels.append(picture.tobytes())
    assert pixels[0] == pixels[2] != pixels[1]


def test_each_column_is_one_label_however_many_there_are(tiny_run, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", tiny_run, "--class-labels", " ".join(str(i % 10) for i in range(12)), "--num-sampling-steps", 2]
    for rows, size in ((2, (12 * 72 + 8, 2 * 72 + 8)), (1, (10 * 72 + 8, 2 * 72 + 8))):  # one row may be broken
        result = run_here(sample, *flags, "--num-samples", rows)
        assert result.returncode == 0, result.stderr
        with Image.open("sample.png") as picture:
            assert picture.size == size


def test_a_trajectory_is_a_strip_and_a_film_that_end_in_the_picture(tiny_run, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    result = run_here(sample, "--ckpt", tiny_run, "--class-labels", "3 7", "--num-sampling-steps", 12, "--trajectory")
    assert result.returncode == 0, result.stderr
    files = "sample.png, sample-labels.txt, sample-trajectory.png, sample-trajectory.gif"
    assert f"Wrote {files}: 2 images of three, seven" in result.stdout
    with Image.open("sample.png") as file, Image.open("sample-trajectory.png") as strip:
        picture, cells = np.asarray(file), np.asarray(strip)
        assert strip.text == file.text
    assert cells.shape == (4 * 72 + 8, 10 * 72 + 8, 3)  # states of the first, its x_0, states of the second, its x_0
    for row, column in ((0, 0), (1, 0), (2, 1), (3, 1)):  # at the end, the state is the x_0 predicted last
        last = cells[row * 72 : row * 72 + 72, -80:-8]
        assert np.array_equal(last, picture[:72, column * 72 : column * 72 + 72])
    assert not np.array_equal(cells[:72, :72], cells[72:144, :72])
    with Image.open("sample-trajectory.gif") as film:
        assert (film.n_frames, film.size) == (10, (2 * 72 + 8, 2 * 72 + 8))


def test_labels_and_switches_come_from_a_yaml_too(tiny_run, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(
        "class_labels: [3, seven]\nguidance_interval: [100, 850]\ncfg_scale: 2\nsampler: dpm++\nnum_sampling_steps: 20\n"
        "reuse: encoder\nkey_steps: every:2\nreuse_args: {split: 1}\n")
    result = run_here(sample, "--ckpt", tiny_run, "--config", "my.yaml")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(
        "the first 1 of 2 blocks run on 11 of 20 evaluations (every:2; order 0; prior noise 0.0): 0 2 3 4 6")
    with Image.open("sample.png") as picture:
        assert (picture.text["labels"], picture.text["guidance_interval"]) == ("[3, 7]", "[100.0, 850.0]")
        assert picture.text["reuse"].startswith("the first 1 of 2")


def test_it_says_how_often_the_model_was_called(tiny_run, tmp_path, monkeypatch, run_here):
    """dpm++ at t = 1000, 900, … 100, guided from 700 to 300: 15 calls. Evaluations 5 and 9 reuse one block in 2 + 1 of them."""
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", tiny_run, "--class-labels", 3, "--sampler", "dpm++", "--num-sampling-steps", 10, "--cfg-scale", 2,
             "--guidance-interval", 290, 710]
    assert "for 15 calls of the model and 30 of its blocks" in run_here(sample, *flags).stdout
    assert "for 15 calls of the model and 27 of its blocks" in run_here(
        sample, *flags, "--reuse", "encoder", "--key-steps", "0,1,2,3,4,6,7,8", "--reuse-args", '{"split": 1}').stdout


@pytest.mark.parametrize("flags", [
    ["--reuse", "forecast", "--key-steps", "every:3"], pytest.param([], marks=pytest.mark.slow)], ids=["reuse", "plain"])
def test_compiled_is_eager_but_for_rounding(tiny_run, tmp_path, monkeypatch, run_here, flags):
    monkeypatch.chdir(tmp_path)
    for out, compiled in (("a.png", []), ("b.png", ["--compile"])):
        assert run_here(sample, "--ckpt", tiny_run, "--num-sampling-steps", 8, "--sampler", "ddim", *flags, *compiled, "--out",
                        out).returncode == 0
    a, b = (np.asarray(Image.open(name)).astype(int) for name in ("a.png", "b.png"))
    assert np.abs(a - b).max() <= 1


def test_more_rows_leave_the_first_as_they_are(tiny_run, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    for rows in (1, 3):
        assert run_here(sample, "--ckpt", tiny_run, "--num-samples", rows, "--out", f"{rows}.png",
                        "--num-sampling-steps", 2).returncode == 0
    one, three = (np.asarray(Image.open(f"{rows}.png")).astype(int) for rows in (1, 3))
    assert np.abs(one - three[: len(one)]).max() <= 1


@pytest.mark.parametrize(("flags", "words"), [
    (["--ckpt", "nowhere.pt"], ["--ckpt nowhere.pt does not exist"]),
    (["--class-labels", ""], ["--class-labels is empty"]),
    (["--out", "folder.png"], ["--out folder.png is not a file"]),
    (["--out", "x.jpg"], ["--out x.jpg is not the name of a .png"]),
    (["--out", "device.png"], ["--out device.png is not a file"]),
    (["--out", "new/x.png", "--cfg-scale", "-1"], ["--cfg-scale -1"]),
    (["--model", "DiT-XXL/2"], ["--model", "DiT-XXL/2"]),
    (["--model", "DiT-S/2"], ["--model DiT-S/2 contradicts"]),
    (["--num-classes", "1000"], ["--num-classes 1000 contradicts"]),
    (["--image-size", "256"], ["--image-size 256 contradicts"]),
    (["--num-sampling-steps", "0"], ["--num-sampling-steps 0"]),
    (["--num-sampling-steps", "5000"], ["--num-sampling-steps 5000", "1000"]),
    (["--cfg-scale", "-1"], ["--cfg-scale -1"]),
    (["--cfg-scale", ".nan"], ["--cfg-scale nan"]),
    (["--cfg-channels", "2"], ["--cfg-channels 2", "1..1"]),
    (["--sampler", "ddpm"], ["--sampler ddpm", "flow"]),
    (["--eta", "0.5"], ["--eta 0.5", "ddim"]),
    (["--class-labels", "10"], ["--class-labels 10", "0..9"]),
    (["--class-labels", "sevne"], ["--class-labels sevne", "seven"]),
    (["--num-samples", "0"], ["--num-samples 0"]),
    (["--vae", "/nowhere"], ["--vae /nowhere"]),
    (["--guidance-interval", "700", "100"], ["--guidance-interval 700 100", "LO <= HI"]),
    (["--guidance-interval", "0", "1001"], ["--guidance-interval 0 1001", "<= 1000"]),
    (["--guidance-interval", "5"], ["--guidance-interval"]),
    (["--reuse", "some"], ["--reuse", "forecast"]),
    (["--reuse", "encoder", "--reuse-args", '{"prior_noise": .nan}'], ["prior_noise nan"]),
    (["--key-steps", "paper"], ["--key-steps", "--reuse encoder"]),
    (["--reuse", "encoder", "--key-steps", "0,50"], ["--key-steps 0,50", "below 23"]),
    (["--reuse", "encoder", "--key-steps", "often"], ["--key-steps 'often'", "every:N"]),
    (["--reuse", "encoder", "--reuse-args", '{"split": 3}'], ["--reuse-args: split 3", "0..2"]),
    (["--reuse", "encoder", "--reuse-args", '{"spilt": 3}'], ["--reuse-args: unknown key 'spilt'", "split"]),
    (["--reuse", "forecast", "--reuse-args", '{"order": 3, "warm_up": 2}'], ["order 3", "warm_up 2"]),
    (["--out", "/proc/nowhere/x.png"], ["/proc/nowhere"]),
    (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
])
def test_wrong_input_is_one_line_and_writes_nothing(tiny_run, tmp_path, monkeypatch, run_here, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/full")
    assert_one_line(run_here(sample, "--ckpt", tiny_run, "--num-sampling-steps", "12", *flags), *words)
    assert {path.name for path in tmp_path.iterdir()} == {"folder.png", "device.png"}


def test_damaged_foreign_and_malicious_checkpoints_are_one_line(tiny_run, gaussian_run, tmp_path, run_here):
    whole, state = gaussian_run.read_bytes(), torch.load(gaussian_run, weights_only=True)
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"ema": 3}, tmp_path / "three.pt")
    torch.save(state | {"spec": {}}, tmp_path / "spec.pt")
    other = {key: value for key, value in state["ema"].items() if "blocks.1" not in key}
    torch.save(state | {"ema": other}, tmp_path / "other.pt")
    torch.save({"ema": pathlib.PurePosixPath("x")}, tmp_path / "foreign.pt")
    for name, words in (("cut", "truncated"), ("three", "holds no state dict"), ("spec", "its description lacks"),
                        ("other", "another architecture"), ("foreign", "objects other than weights")):
        assert_one_line(run_here(sample, "--ckpt", tmp_path / f"{name}.pt", "--out", tmp_path / "x.png"), words)
    assert not (tmp_path / "x.png").exists()


def test_thresholding_latents_is_refused(tiny_vae, tmp_path, run_here):
    kwargs = dict(input_size=(1, 1), in_channels=4, num_classes=1, hidden_size=24, depth=1, num_heads=2)
    spec = {"model": {"name": "DiT-S/2", "class": "DiT",
              "args": kwargs | {"patch_size": 1}}, "diffusion": {}, "vae": str(tiny_vae),
            "image_size": (8, 8), "channels": 3, "classes": ["a"],
            "sampling": {"sampler": "ddpm", "num_sampling_steps": "4", "cfg_scale": 1.0, "cfg_channels": None}}
    checkpoint.save(tmp_path / "l.pt", {"ema": DiT_models["DiT-S/2"](**spec["model"]["args"]).state_dict(), "spec": spec})
    assert_one_line(run_here(sample, "--ckpt", tmp_path / "l.pt", "--dynamic-thresholding", "true", "--out",
                             tmp_path / "x.png"), "--dynamic-thresholding is for pixels in [-1, 1]", "latents")


def test_a_vae_of_other_latents_is_refused(gaussian_run, tiny_vae, run_here):
    assert_one_line(run_here(sample, "--ckpt", gaussian_run, "--vae", tiny_vae), "--vae", "latents of shape (4, 1, 1)")
