import contextlib
import gzip
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, assert_one_line, read_metrics, run_script
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import sample
import train
from pipeline import checkpoint
from runtime import UserError
from runtime.processes import start_world
from training.datasets import load_dataset, load_held_out
from training.rows import Rows, choose_flip, describe

# --- images --------------------------------------------------------------------------------------


def test_digits_are_sklearns_with_its_split():
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    for split, x, y in (("train", parts[0], parts[2]), ("val", parts[1], parts[3])):
        dataset = load_dataset("digits", split=split)
        assert len(dataset) == len(x)
        assert torch.equal(dataset.labels, torch.from_numpy(y))
        assert np.abs(dataset.images.flatten(1).numpy() / 255 * 16 - x).max() < 0.04
    assert dataset.classes[7] == "seven"
    assert (dataset.image_size, dataset.channels, dataset.flip) == ((8, 8), 1, False)


def test_mnist_reads_the_original_files_and_resizes(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        for name, magic, content in (("images-idx3", 0x803, struct.pack(">3I", 3, 28, 28) + pixels.tobytes()),
                                     ("labels-idx1", 0x801, struct.pack(">I", 3) + bytes([5, 0, 9]))):
            file = raw / f"{part}-{name}-ubyte"
            file.write_bytes(struct.pack(">I", magic) + content)
            with gzip.open(f"{file}.gz", "wb") as zipped:
                zipped.write(file.read_bytes())
    dataset = load_dataset("mnist", data_root=str(tmp_path))
    images, labels = dataset.__getitems__(Rows.plain([2, 0]))
    assert torch.equal(images[:, 0], torch.from_numpy(pixels[[2, 0]]))
    assert labels.tolist() == [9, 5]
    assert load_dataset("mnist", 32, str(tmp_path)).images.shape == (3, 1, 32, 32)
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        content = (raw / name).read_bytes()
        for length in (0, 3, 6, 8, len(content) - 1):
            (raw / name).write_bytes(content[:length])
            with pytest.raises(OSError, match=r"^`data_root` .*MNIST/raw is damaged: delete it.*$"):
                load_dataset("mnist", data_root=str(tmp_path))
        (raw / name).write_bytes(content)


def test_a_folder_of_photographs_becomes_rgb_of_one_size_with_english_names(photographs):
    dataset = load_dataset(str(photographs / "train"), 32)
    images, labels = dataset.__getitems__(Rows.plain(range(len(dataset))))
    assert images.shape == (6, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.classes == ["golden retriever", "tabby cat"]
    assert torch.equal(images[1, 0], images[1, 2])  # the greyscale file
    assert (images[2, 0, :, -1].float() - images[2, 0, :, 0].float()).mean() > 100  # CMYK: red still grows to the right
    assert load_dataset(str(photographs / "train"), 32, split="val").files[0].startswith(bytes(photographs / "val"))


# --- wrong input ---------------------------------------------------------------------------------


def test_a_path_without_data_is_refused(photographs, tmp_path):
    for name in ("imagenet", "/nowhere/train"):
        with pytest.raises(FileNotFoundError, match="neither a folder nor one of digits, mnist, cifar10"):
            load_dataset(name)
    with pytest.raises(FileNotFoundError, match="no held-out images: `data_path`"):
        load_dataset(str(photographs / "val"), 32, split="val")
    with pytest.raises(FileNotFoundError, match="not a folder of classes"):
        load_dataset(str(tmp_path))
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match="cat"):
        load_dataset(str(tmp_path))


def test_images_that_memory_cannot_hold_are_refused():
    with pytest.raises(UserError, match=r"`image_size` 8000: these 1,347 images .* 86 GB"):
        load_dataset("digits", 8000)


def test_an_unreadable_picture_is_named(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(OSError, match=r"broken\.jpg"):
        load_dataset(str(tmp_path), 8).__getitems__(Rows.plain([0]))


# --- folders that hold something else ------------------------------------------------------------


def pictures(root, *names):
    """Small pictures, the i-th of the grey 10 i."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * i).save(root / name, "PNG")
    return root


def test_the_parts_of_a_data_set_are_no_classes(tmp_path):
    pictures(tmp_path / "a", "train/cat/1.png", "val/cat/1.png", "notes/1.png")
    pictures(tmp_path / "b", "Train/cat/1.png")
    (tmp_path / "features" / "train").mkdir(parents=True)
    (tmp_path / "features" / "val").mkdir()
    for name, likely in (("a", "a/train"), ("b", "b/Train"), ("features", "features/train")):
        with pytest.raises(UserError, match=rf"`data_path` .*{name} holds the parts .*; did you mean \S*{likely}\?$"):
            load_dataset(str(tmp_path / name))
    pictures(tmp_path / "c", "train/1.png", "bus/1.png")  # vehicles
    assert load_dataset(str(tmp_path / "c")).classes == ["bus", "train"]


def test_parts_within_the_classes_are_refused(tmp_path):
    pictures(tmp_path / "a", "cat/train/1.png", "cat/test/1.png", "dog/test/1.png", "dog/train/1.png")
    with pytest.raises(UserError, match=r"`data_path` .*a: each class holds the parts test, train .*a/test/cat in place of"):
        load_dataset(str(tmp_path / "a"))
    pictures(tmp_path / "b", "cat/train/1.png", "cat/test/1.png", "dog/1.png")
    assert len(load_dataset(str(tmp_path / "b"))) == 3


def test_edms_labels_of_pictures_are_read(tmp_path):
    folder = pictures(tmp_path / "edm", "00000/img0.png", "00000/img1.png", "00001/img2.png", "00001/img3.png")
    rows = [["00001/img2.png", 4], ["00000/img0.png", 0], ["00000/img1.png", 4]]
    (folder / "dataset.json").write_text(json.dumps({"labels": rows}))
    data = load_dataset(str(folder), 8)
    images, labels = data.__getitems__(Rows.plain(range(3)))
    assert images[:, 0, 0, 0].tolist() == [20, 0, 10]
    assert labels.tolist() == [4, 0, 4]
    assert data.classes == ["0", "1", "2", "3", "4"]
    assert data.remarks == [f"1 pictures are left out because dataset.json does not list them, such as {folder}/00001/img3.png"]
    for labels, words in ((None, "has no labels"), ([["00000/img0.png", [0, 1]]], r"label of 00000/img0.png is \[0, 1\]"),
                          ([], "dataset.json is damaged: it lists no files"), ([[7, 0]], "it lists 7, which is not the name"),
                          ([["00000/img0.png", 10**12]], r"edm has the label 1000000000000 in 1 rows; .* `num_classes`"),
                          ([["00000/img9.png", 0]], "1 files of .*dataset.json are missing, such as .*img9")):
        (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
        with pytest.raises((UserError, FileNotFoundError), match=words):
            load_dataset(str(folder), 8)


def test_what_is_left_out_of_a_folder_is_told(tmp_path):
    folder = pictures(tmp_path / "d", "cat/1.png", "cat/._1.png", "cat/.x/2.png", "cat/@eaDir/1.png", "cat/2.HEIC",
                      "cat/3.jfif", "cat/4.heic", "__MACOSX/cat/._1.png", ".trash/1.png", "5.png", ".6.png", "cat/notes.txt")
    data = load_dataset(str(folder), 8)
    assert (data.classes, len(data)) == (["cat"], 1)
    assert data.remarks == [
        "1 pictures are left out because they lie beside the classes, such as 5.png",
        "pictures are left out because these endings are not read: 2 .heic, 1 .jfif (read are .jpg .jpeg .png .ppm .bmp .pgm "
        ".tif .tiff .webp .gif)"]
    pictures(tmp_path / "e", "cat/1.avif")
    with pytest.raises(FileNotFoundError, match=r"class cat has no pictures \(.*these endings are not read: 1 \.avif"):
        load_dataset(str(tmp_path / "e"))


def test_names_need_not_be_utf8(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    Image.new("L", (8, 8), 7).save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", folder + b"/\xff.png")
    data = load_dataset(str(tmp_path), 8)
    assert data.classes == [r"caf\udce9"]
    assert data.__getitems__(Rows.plain([0]))[0].unique().tolist() == [7]


def test_a_name_that_is_a_folder_too_is_told_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path, "digits/cat/1.png")
    assert load_dataset("digits").remarks == ["digits is the data set of this name; for the folder say ./digits"]
    assert load_dataset("./digits").classes == ["cat"]


def test_listing_a_folder_asks_for_no_file_and_takes_a_byte_a_character(tmp_path, monkeypatch):
    pictures(tmp_path, *(f"class {c}/{i}.png" for c in "ab" for i in range(5)))
    asked, stat, scandir = [], os.stat, os.scandir

    class Entry:
        def __init__(self, entry):
            self.entry = entry

        def __getattr__(self, name):
            asked.extend([self.path] if name == "stat" else [])
            return getattr(self.entry, name)

    class Watched(contextlib.ExitStack):
        def __init__(self, path):
            super().__init__()
            self.entries = self.enter_context(scandir(path))

        def __iter__(self):
            return self

        def __next__(self):
            return Entry(next(self.entries))

    monkeypatch.setattr(os, "stat", lambda path, **options: asked.append(str(path)) or stat(path, **options))
    monkeypatch.setattr(Path, "stat", lambda path, **options: asked.append(str(path)) or stat(path, **options))
    monkeypatch.setattr(os, "scandir", Watched)
    data = load_dataset(str(tmp_path), 8)
    assert len(data) == 10
    assert f"{tmp_path}/class a" in asked
    assert not [path for path in asked if path.endswith(".png")]
    assert data.files.nbytes == 10 * len(f"{tmp_path}/class a/0.png")


# --- the held-out part -----------------------------------------------------------------------------


def held_out(root, train, val):
    """(Greys of the held-out part, labels, remarks) for these classes, of two pictures each."""
    for part, classes in (("train", train), ("val", val)):
        pictures(root / part, *(f"{name}/{i}.png" for name in classes for i in range(2)))
    data = load_dataset(str(root / "train"), 8)
    part = load_held_out(str(root / "train"), data, 8)
    images, labels = part.__getitems__(Rows.plain(range(len(part))))
    assert part.classes == data.classes
    return (images[:, 0, 0, 0] // 10).tolist(), labels.tolist(), getattr(part, "remarks", [])


def test_of_a_held_out_part_with_other_classes_the_common_ones_are_measured(tmp_path):
    assert held_out(tmp_path / "same", "abc", "abc") == ([0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2], [])
    assert held_out(tmp_path / "lacks", "abc", "ac") == ([0, 1, 2, 3], [0, 0, 2, 2], ["the held-out part lacks the classes b"])
    assert held_out(tmp_path / "adds", "bc", "abc") == ([2, 3, 4, 5], [0, 0, 1, 1], [
        "of the held-out part the classes a are left out: the training part lacks them"])
    with pytest.raises(UserError, match=r"the held-out part of `data_path` \S+ has the classes c, d; .* has a, b"):
        held_out(tmp_path / "other", "ab", "cd")
    cranes = ["n02012849", "n03126707", "n02099601"]  # two classes of one name
    assert held_out(tmp_path / "cranes", cranes, cranes[1:])[1] == [1, 1]  # golden retriever: which crane it is cannot be told


def test_features_of_a_held_out_part_are_relabelled_without_the_rows_of_unreadable_images(tmp_path):
    for part, classes, labels, skipped in (("train", ["a", "b"], [0, 1], []), ("val", ["0", "a", "b"], [1, -1, 0, 2, 1], [1])):
        (tmp_path / part).mkdir()
        moments = np.arange(len(labels), dtype=np.float16)[:, None, None, None, None] * np.ones((2, 8, 1, 1), np.float16)
        np.save(tmp_path / part / "moments.npy", moments)
        np.save(tmp_path / part / "labels.npy", np.array(labels))
        (tmp_path / part / "meta.json").write_text(json.dumps({
            "autoencoder": {}, "latent_shape": [4, 1, 1], "image_size": [8, 8], "channels": 3, "rows": len(labels),
            "skipped": skipped, "flip": True, "classes": classes}))
    data = load_dataset(str(tmp_path / "train"))
    part = load_held_out(str(tmp_path / "train"), data)
    moments, labels = part.__getitems__(Rows.plain(range(3)))
    assert moments[:, 0, 0, 0].tolist() == [0, 3, 4]
    assert labels.tolist() == [0, 1, 0]
    assert part.latent_shape == (4, 1, 1)


# --- a run -----------------------------------------------------------------------------------------


def begun(*flags):
    args = train.build_parser().parse_args(list(map(str, [*TINY_RUN, *flags])))
    return train.Trainer(args, start_world("cpu"))


def test_mirror_images_are_a_flag_which_is_told_stored_and_fixed(photographs, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    assert not begun().order.flip
    assert begun("--flip").order.flip
    folder = ["--data-path", photographs / "train", "--image-size", 8]
    assert begun(*folder).order.flip
    assert not begun(*folder, "--no-flip").order.flip
    run = begun(*folder)
    assert describe(run.data, run.args.flip) == "6 samples of 2 classes (golden retriever, tabby cat), half of them mirrored"
    flags = [*TINY_RUN, "--run-name", "r", "--max-steps"]
    said = "r: 1,347 samples of 10 classes (zero, one, two, three, four and 5 more), none of them mirrored, 1 x cpu; "
    assert said in run_here(train, *flags, 1).stdout
    for older in (False, True):
        newest = checkpoint.latest(tmp_path / "results" / "r")
        if older:
            state = checkpoint.load(newest)
            del state["args"]["flip"]
            checkpoint.save(newest, state)
        assert_one_line(run_here(train, *flags, 3, "--flip"), "was trained with --flip False, not True")
        assert run_here(train, *flags, 2 + older, "--no-flip").returncode == 0


def test_features_without_mirror_images_cannot_be_flipped(tmp_path):
    for name, content in (("features", np.zeros((1, 4, 2, 2))), ("labels", np.zeros(1))):
        (tmp_path / f"imagenet256_{name}").mkdir()
        np.save(tmp_path / f"imagenet256_{name}" / "0.npy", content)
    data = load_dataset(str(tmp_path))
    assert not choose_flip(data, None)
    with pytest.raises(UserError, match="`flip`: these features have no mirror images"):
        choose_flip(data, True)


def test_a_run_on_names_that_are_not_utf8_goes_through(tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    for part in (b"photos/train", b"photos/val"):
        for name in (b"caf\xe9", b"dog"):
            os.makedirs(part + b"/" + name)
            for i in range(3):
                Image.new("L", (8, 8), i).save("x.png")
                os.rename("x.png", part + b"/" + name + b"/\xff%d.png" % i)
    Path(os.fsdecode(b"photos/train/caf\xe9/\xff1.png")).write_bytes(b"broken")
    flags = ["--data-path", "photos/train", "--image-size", 8, *TINY_RUN[2:], "--max-skipped", 0.5, "--val-every", 1,
             "--run-name", "r", "--max-steps"]
    for steps in (1, 2):
        result = run_here(train, *flags, steps)
        assert result.returncode == 0, result.stderr
        assert r"2 classes (caf\udce9, dog)" in result.stdout
    assert r"photos/train/caf\udce9/\udcff1.png" in Path("results/r/skipped.txt").read_text()
    sampled = run_here(sample, "--ckpt", "results/r", "--class-labels", os.fsdecode(b"caf\xe9"), "--num-sampling-steps", 1,
                       "--out", os.fsdecode(b"\xe9.png"))
    assert sampled.returncode == 0, sampled.stderr
    assert Path(os.fsdecode(b"\xe9-labels.txt")).read_text() == "0 caf\\udce9\n"


def test_a_held_out_part_that_lacks_a_class_is_measured_and_told(photographs, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photographs, "p")
    shutil.rmtree("p/val/n02099601")
    flags = ["--data-path", "p/train", "--image-size", 8, *TINY_RUN[2:], "--max-steps", 1, "--run-name", "r", "--val-every", 1]
    result = run_here(train, *flags)
    assert result.returncode == 0, result.stderr
    assert "--data-path p/train: the held-out part lacks the classes golden retriever\n" in result.stdout
    assert "val_loss" in result.stdout
    shutil.move("p/val/tabby cat", "p/val/dog")
    assert_one_line(run_here(train, *flags), "--val-every: the held-out part of --data-path p/train has the classes dog; ")


@pytest.mark.slow
def test_the_main_process_sends_the_list_of_files_to_the_others(photographs, tmp_path):
    flags = ["--data-path", photographs / "train", "--image-size", 8, *TINY_RUN[2:], "--global-batch-size", 4, "--val-every", 1]
    for nproc in (None, 2):
        run_script("train.py", *flags, "--max-steps", 2, "--run-name", f"r{nproc}", cwd=tmp_path, nproc=nproc)
    one, two = (read_metrics(tmp_path / "results" / name) for name in ("rNone", "r2"))
    assert [line["val_loss"] for line in one if "val_loss" in line] == pytest.approx(
        [line["val_loss"] for line in two if "val_loss" in line], rel=1e-4)
