import numpy as np
import pytest
import torch
from conftest import assert_one_line, run_script

import sample_ddp

FLAGS = ["--num-fid-samples", "11", "--num-sampling-steps", "3", "--device", "cpu"]


def draw(cwd, ckpt, *flags, nproc=None):
    run_script("sample_ddp.py", "--ckpt", ckpt, *FLAGS, *flags, cwd=cwd, nproc=nproc)
    (file,) = (cwd / "samples").iterdir()
    return np.load(file, allow_pickle=False)


@pytest.fixture(scope="module")
def one_process(tiny_run, tmp_path_factory):
    return draw(tmp_path_factory.mktemp("one"), tiny_run, "--per-proc-batch-size", 11)


def test_the_npz_is_adms(one_process):
    assert sorted(one_process.files) == ["arr_0", "arr_1"]
    images, labels = one_process["arr_0"], one_process["arr_1"]
    assert (images.shape, images.dtype) == ((11, 8, 8, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((11,), np.int64)
    assert len(set(labels)) > 3
    assert images.std() > 10
    assert np.array_equal(images[..., 0], images[..., 2])


@pytest.mark.parametrize(("nproc", "batch"), [(2, 3), (3, 2)])
def test_images_do_not_depend_on_processes_nor_batches(one_process, tiny_run, tmp_path, nproc, batch):
    other = draw(tmp_path, tiny_run, "--per-proc-batch-size", batch, nproc=nproc)
    assert np.array_equal(one_process["arr_1"], other["arr_1"])
    difference = np.abs(one_process["arr_0"].astype(int) - other["arr_0"])
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.001


def test_labels_are_uniform_and_addressed():
    labels = [sample_ddp.random_label(0, i, 4) for i in range(2000)]
    assert np.abs(np.bincount(labels) / 500 - 1).max() < 0.2
    assert sample_ddp.random_label(0, 1234, 4) == labels[1234]
    assert [sample_ddp.random_label(1, i, 4) for i in range(50)] != labels[:50]


def test_npz_members_are_moved_and_read_back(tmp_path):
    for name, array in (("a", np.arange(6).reshape(2, 3)), ("b", np.zeros(0, np.uint8))):
        np.save(tmp_path / f"{name}.npy", array)
    sample_ddp.write_npz(tmp_path / "x.npz", arr_0=tmp_path / "a.npy", arr_1=tmp_path / "b.npy")
    with np.load(tmp_path / "x.npz") as file:
        assert file["arr_0"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert file["arr_1"].dtype == np.uint8
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_grey_becomes_three_channels():
    grey = torch.arange(4, dtype=torch.uint8).view(1, 2, 2, 1)
    assert np.array_equal(sample_ddp.three_channels(grey), np.repeat(grey.numpy(), 3, axis=-1))


@pytest.mark.parametrize(("flags", "words"), [
    (["--num-fid-samples", "0"], ["--num-fid-samples 0"]),
    (["--per-proc-batch-size", "-1"], ["--per-proc-batch-size -1"]),
    (["--sample-dir", "/proc/x"], ["/proc/x"]),
    (["--cfg-scale", "-2"], ["--cfg-scale -2"]),
    (["--ckpt", "nowhere.pt"], ["nowhere.pt"]),
])
def test_wrong_input_is_one_line_and_leaves_nothing(tiny_run, tmp_path, monkeypatch, run_here, flags, words):
    monkeypatch.chdir(tmp_path)
    assert_one_line(run_here(sample_ddp, "--ckpt", tiny_run, *FLAGS, *flags), *words)
    assert list(tmp_path.iterdir()) == []
