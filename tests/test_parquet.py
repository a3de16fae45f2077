import io
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, assert_one_line
from PIL import Image

import train
from extract_features import describe_files
from pipeline import checkpoint
from pipeline.spec import default_class_names
from runtime import UserError
from training import parquet
from training.datasets import load_dataset, load_held_out
from training.parquet import ParquetImages
from training.rows import Readable, Rows

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(file, pictures, labels, names=None, plain=False, row_group_size=2):
    """A parquet file as the hub's `datasets` writes it, of the bytes of pictures; `plain`: without the struct."""
    file.parent.mkdir(parents=True, exist_ok=True)
    column = pa.array(pictures, pa.binary()) if plain else pa.array([{"bytes": b, "path": "x.jpg"} for b in pictures], STRUCT)
    table = pa.table({"image": column, "label": pa.array(labels, pa.int64())})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file, row_group_size=row_group_size)
    return file


def grey(level):
    """A PNG of one grey."""
    file = io.BytesIO()
    Image.new("L", (8, 8), level).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def hub(photographs, tmp_path):
    """The six photographs in two files of 5 and 1 rows, in row groups of 2, with the hub's names of files and classes."""
    files = sorted((photographs / "train").glob("*/*.jpg"))
    pictures, labels = [file.read_bytes() for file in files], [0, 0, 0, 1, 1, 1]
    folder = tmp_path / "hub"
    for i, part in enumerate((slice(0, 5), slice(5, 6))):
        write(folder / "data" / f"train-0000{i}-of-00002.parquet", pictures[part], labels[part], ["n02099601", "tabby cat"])
    return folder


# --- what is read --------------------------------------------------------------------------------


def test_pixels_and_labels_are_those_of_a_folder_of_the_same_pictures(hub, photographs):
    data, folder = load_dataset(str(hub), 24), load_dataset(str(photographs / "train"), 24)
    rows = Rows(np.array([5, 0, 4, 4, 2, 3, 1]), np.array([True, False, True, False, True, False, False]))
    for found, expected in zip(data.__getitems__(rows), folder.__getitems__(rows)):
        assert torch.equal(found, expected)
    assert data.classes == folder.classes == ["golden retriever", "tabby cat"]
    for member in ("kind", "image_size", "channels", "flip", "made_by"):
        assert getattr(data, member) == getattr(folder, member)
    assert (len(data), load_dataset(str(hub)).image_size) == (6, (256, 256))


def test_a_plain_column_of_bytes_is_read_too_and_names_of_classes_are_the_hubs_imagenets_or_numbers(tmp_path):
    write(tmp_path / "plain" / "a.parquet", [grey(10), grey(20), grey(30)], [2, 0, 1], plain=True)
    data = load_dataset(str(tmp_path / "plain"), 8)
    images, labels = data.__getitems__(Rows.plain([2, 0]))
    assert images[:, 0, 0, 0].tolist() == [30, 10]
    assert labels.tolist() == [1, 2]
    assert data.classes == ["0", "1", "2"]
    write(tmp_path / "named" / "a.parquet", [grey(0)], [0], ["tench, Tinca tinca", "goldfish"])
    assert load_dataset(str(tmp_path / "named")).classes == ["tench, Tinca tinca", "goldfish"]
    write(tmp_path / "thousand" / "a.parquet", [grey(0)] * 2, [999, 0])
    assert load_dataset(str(tmp_path / "thousand")).classes == default_class_names(1000)


def test_the_part_is_told_by_the_names_of_files_or_folders_else_by_the_folder_beside(tmp_path):
    for case, names in enumerate((
            ["train-00000-of-00001.parquet", "val-0.parquet", "test-0.parquet"],
            ["data/train-0.parquet", "data/test-0.parquet"],
            ["train/0000.parquet", "validation/0000.parquet"],
            ["default/partial-train/0000.parquet", "default/partial-validation/0000.parquet"],
            ["cifar-train.parquet", "cifar-test.parquet"],
            ["training-0.parquet", "Test-0.parquet"])):
        for i, name in enumerate(names):
            write(tmp_path / str(case) / name, [grey(i)], [0], plain=True)
        assert greys(tmp_path / str(case), "train") == [0]
        assert greys(tmp_path / str(case), "val") == [1]
    for i, name in enumerate(("train/0.parquet", "train/training-1.parquet", "val/validation-0.parquet")):
        write(tmp_path / "beside" / name, [grey(i)], [0])
    assert greys(tmp_path / "beside" / "train", "train") == [0, 1]
    assert greys(tmp_path / "beside" / "train", "val") == [2]
    with pytest.raises(FileNotFoundError, match="no held-out images"):
        load_dataset(str(tmp_path / "beside" / "val"), 8, split="val")


def test_held_out_files_without_training_files_are_not_trained_on(tmp_path):
    for case, names in enumerate((["0000.parquet", "cifar-test.parquet"], ["partial-validation/0.parquet"])):
        folder = tmp_path / f"set {case}"
        for name in names:
            write(folder / name, [grey(0)], [0])
        with pytest.raises(UserError, match=rf"`data_path` .*{case} has parquet files .*such as .*{names[-1]}, and none of"):
            load_dataset(str(folder), 8)
    for name in ("latest.parquet", "value-0.parquet", "contest.parquet"):  # no words of parts
        write(tmp_path / "plain" / name, [grey(0)], [0])
    assert len(greys(tmp_path / "plain", "train")) == 3
    write(tmp_path / "val" / "validation-0.parquet", [grey(3)], [0])
    assert greys(tmp_path / "val", "train") == [3]  # asked for by name


def greys(folder, split):
    """The greys of all pictures of a part."""
    data = load_dataset(str(folder), 8, split=split)
    return data.__getitems__(Rows.plain(range(len(data))))[0][:, 0, 0, 0].tolist()


# --- how it is read ------------------------------------------------------------------------------


def test_a_batch_reads_each_of_its_row_groups_once_and_keeps_the_last_ones(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", [np.random.default_rng(i).bytes(500) for i in range(8)], [0] * 8, plain=True)
    monkeypatch.setattr(parquet, "open_rgb", lambda file, name: Image.new("RGB", (8, 8)))
    data, read = ParquetImages(tmp_path, "train", 8), []
    monkeypatch.setattr(parquet, "opened", lambda *args, original=parquet.opened: read.append(1) or original(*args))
    monkeypatch.setattr(parquet, "CACHE_BYTES", 2100)  # of four row groups of 2 * 500, and their offsets, two
    data.__getitems__(Rows.plain([0, 5, 7, 1, 4, 6, 0]))
    assert len(read) == 3
    data.__getitems__(Rows.plain([6, 4]))
    assert len(read) == 3
    data.__getitems__(Rows.plain([2]))
    assert (len(read), list(data.cache)) == (4, [3, 1])
    assert pickle.loads(pickle.dumps(data)).cache == {}


def test_an_extraction_notices_a_changed_file(tmp_path):
    files = [write(tmp_path / f"{name}.parquet", [grey(1)] * rows, [0] * rows) for name, rows in (("a", 2), ("b", 3))]
    before = describe_files(load_dataset(str(tmp_path), 8))
    os.utime(files[1], ns=(0, 0))
    after = describe_files(load_dataset(str(tmp_path), 8))
    assert (before != after).any(axis=1).tolist() == [False] * 2 + [True] * 3
    assert (before[:, 0] == after[:, 0]).all()


def test_classes_without_names_are_those_of_the_training_part(tmp_path):
    write(tmp_path / "train-0.parquet", [grey(1)] * 2, [0, 999])
    write(tmp_path / "val-0.parquet", [grey(1)] * 2, [997, 0])
    data = load_dataset(str(tmp_path), 8)
    part = load_held_out(str(tmp_path), data, 8)
    assert part.classes == data.classes
    assert part.__getitems__(Rows.plain([0, 1]))[1].tolist() == [997, 0]


def test_hidden_files_are_no_parquet(tmp_path):
    write(tmp_path / "a.parquet", [grey(1)], [0])
    (tmp_path / "._a.parquet").write_bytes(b"AppleDouble")
    (tmp_path / "cats" / "cat").mkdir(parents=True)
    (tmp_path / "cats" / "._x.parquet").write_bytes(b"AppleDouble")
    Image.new("L", (8, 8)).save(tmp_path / "cats" / "cat" / "1.png")
    (tmp_path / "__MACOSX").mkdir()
    assert len(load_dataset(str(tmp_path), 8)) == 1
    assert load_dataset(str(tmp_path / "cats"), 8).classes == ["cat"]


# --- wrong input ---------------------------------------------------------------------------------


def test_a_damaged_picture_is_named_by_file_and_row(tmp_path):
    write(tmp_path / "a.parquet", [grey(1)], [0])
    write(tmp_path / "b.parquet", [grey(1), b"\xff\xd8 no picture", b"", None], [0] * 4)
    data = load_dataset(str(tmp_path), 8)
    for row, reason in ((1, "no picture of a known format"), (2, "no picture of a known format"), (3, "`image` has no bytes")):
        with pytest.raises(OSError, match=rf"^cannot read the image \S+b\.parquet row {row}: .*{reason}.*$") as error:
            data.__getitems__(Rows.plain([1, 1 + row, 0]))
        assert "BytesIO" not in str(error.value)
    images, _, unreadable = Readable(data, 1).__getitems__(Rows.plain(np.array([4])))
    assert images.unique().tolist() == [1]  # the next one, which is the first
    assert list(unreadable) == [4]


def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path):
    for columns, words in (
            ({"img": [b""], "label": [0]}, r"`image` of bytes, .* it has img \(binary\), label \(int64\)"),
            ({"image": [b""], "label": ["cat"]}, "`label` of integers"),
            ({"image": [b"", b""], "label": [0, None]}, "row 1: the label None")):
        pq.write_table(pa.table(columns), tmp_path / "x.parquet")
        with pytest.raises(UserError, match=rf"^\S+x\.parquet .*{words}.*$"):
            load_dataset(str(tmp_path))
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no rows"):
        load_dataset(str(tmp_path))
    write(tmp_path / "x.parquet", [grey(0)] * 2, [1, 2], ["cat", "dog"])
    with pytest.raises(UserError, match=r"x\.parquet row 1: the label 2 .* 2 classes"):
        load_dataset(str(tmp_path))
    write(tmp_path / "x.parquet", [grey(0)], [1], ["cat", "dog"])
    write(tmp_path / "y.parquet", [grey(0)], [1], ["dog", "cat"])
    with pytest.raises(UserError, match=r"y\.parquet names other classes than \S+x\.parquet"):
        load_dataset(str(tmp_path))


def test_a_parquet_run_with_validation_trains_if_the_files_are_sound_and_pyarrow_is_there(
        hub, run_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(hub / "data" / "validation-00000-of-00001.parquet", [grey(9), grey(99)], [0, 1], ["n02099601", "tabby cat"])
    flags = ["--data-path", hub, "--image-size", 16, *TINY_RUN[2:], "--global-batch-size", 4, "--val-every", 2,
             "--max-steps", 2, "--run-name", "r", "--num-workers", 2]
    result = run_here(train, *flags)
    assert result.returncode == 0, result.stderr
    assert checkpoint.restore("results/r").spec.classes == ["golden retriever", "tabby cat"]
    shutil.copy(__file__, hub / "data" / "train-00002-of-00002.parquet")
    assert_one_line(run_here(train, *flags), "cannot read", "train-00002-of-00002.parquet")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    assert_one_line(run_here(train, *flags), "pip install '.[parquet]'")
