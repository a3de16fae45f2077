import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN

import train
from pipeline import checkpoint
from runtime import UserError
from training.datasets import load_dataset
from training.order import Batches, GlobalOrder, end_workers, read_ahead
from training.rows import Readable, Rows


def test_every_epoch_is_another_permutation_across_batches():
    order = GlobalOrder(length=10, batch_size=4, seed=0)
    stream = np.concatenate([order.batch(step).indices for step in range(5)])
    first, second = stream[:10].tolist(), stream[10:].tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert GlobalOrder(10, 4, seed=1).batch(0).indices.tolist() != order.batch(0).indices.tolist()
    assert GlobalOrder(10, 4, seed=0).batch(3).indices.tolist() == stream[12:16].tolist()  # addressed, not carried
    assert np.bincount(GlobalOrder(length=3, batch_size=9, seed=0).batch(2).indices).tolist() == [3, 3, 3]


def test_processes_and_micro_batches_share_a_batch_out():
    rows = [row for rank in range(2) for row in GlobalOrder(50, 12, 0, rank, world_size=2, grad_accum=3).rows]
    assert sorted(index for row in rows for index in range(12)[row]) == list(range(12))
    with pytest.raises(UserError, match=r"`global_batch_size` 12 is not divisible by 5 processes \* `grad_accum` 1"):
        GlobalOrder(50, 12, 0, 0, 5, 1)


def test_batches_come_in_order_from_any_step():
    dataset, order = load_dataset("digits"), GlobalOrder(1347, 6, 0, 1, 2, 1)
    batches = list(Batches(Readable(dataset, 0), order, range(3, 6), 2, torch.device("cpu")))
    assert len(batches) == 3
    for step, (images, labels) in zip(range(3, 6), batches):
        indices = order.batch(step).indices[3:]
        assert torch.equal(images, dataset.images[indices])
        assert torch.equal(labels, dataset.labels[indices])


def test_half_of_the_samples_are_mirrored():
    """Of 40,000 draws, four standard deviations are 0.01."""
    shares = [GlobalOrder(1000, 400, seed, flip=True).batch(step).mirrored.mean() for seed in range(10) for step in range(10)]
    assert abs(np.mean(shares) - 0.5) < 0.01
    assert not GlobalOrder(1000, 400, 0).batch(0).mirrored.any()


# --- memory and speed ----------------------------------------------------------------------------


def write_features(folder, rows):
    """Features of 32x32x4 latents, sparse on disk."""
    folder.mkdir()
    np.lib.format.open_memmap(folder / "moments.npy", "w+", np.float16, (rows, 2, 8, 32, 32))
    np.save(folder / "labels.npy", np.arange(rows) % 10)
    (folder / "meta.json").write_text(json.dumps({
        "autoencoder": {}, "latent_shape": [4, 32, 32], "image_size": [256, 256], "channels": 3, "rows": rows, "skipped": [],
        "flip": True, "classes": [str(i) for i in range(10)]}))


def load_rate_and_memory(folder, steps):
    """Samples per second of CPU time, and the bytes of this process that are not mapped from files."""
    data = load_dataset(str(folder))
    order = GlobalOrder(len(data), 256, 0, flip=data.flip)
    batches = Batches(Readable(data, 0), order, range(steps), 0, torch.device("cpu"))
    for _ in range(20):
        next(batches)
    start = time.process_time()
    rate = 256 * len(list(map(type, batches))) / (time.process_time() - start)
    anonymous = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return rate, int(anonymous.split()[1]) * 1024


@pytest.mark.slow
def test_anonymous_memory_does_not_grow_with_the_data_set(tmp_path):
    """500 MB and 5 GB of moments: a copy would show, and so would 40 bytes a sample beside the permutation's 8."""
    memory = []
    for name, rows in (("small", 15_000), ("large", 150_000)):
        write_features(tmp_path / name, rows)
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            memory.append(fresh.apply(load_rate_and_memory, (tmp_path / name, 120))[1])
    assert memory[1] - memory[0] < 135_000 * 48


def test_loading_alone_exceeds_20000_samples_a_second(tmp_path):
    write_features(tmp_path / "f", 20_000)
    assert load_rate_and_memory(tmp_path / "f", 120)[0] > 20_000


# --- unreadable pictures, and the ends of a run --------------------------------------------------

PHOTOS = ["--image-size", 16, *TINY_RUN[2:], "--global-batch-size", 4]


@pytest.fixture
def damaged_photographs(photographs, tmp_path):
    """Six photographs, of which one is truncated."""
    folder = tmp_path / "photos"
    shutil.copytree(photographs / "train", folder)
    damaged = folder / "tabby cat" / "0.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_no_data_worker_outlives_a_run_with_an_unreadable_picture(damaged_photographs, tmp_path, stopped):
    """One that ends at once, and one that a signal stops. Workers ignore the signal by which Python would end them."""
    command = [sys.executable, str(ROOT / "train.py"), "--data-path", str(damaged_photographs), *map(str, PHOTOS),
               "--num-workers", "2", "--max-steps", "100000", "--run-name", "x", *([] if stopped else ["--max-skipped", "0"])]
    log = tmp_path / "results" / "x" / "log.txt"
    with subprocess.Popen(command, cwd=tmp_path, text=True, stderr=subprocess.PIPE, start_new_session=True) as process:
        while stopped and not (log.exists() and "Skipped" in log.read_text() and "step 5," in log.read_text()):
            assert process.poll() is None
            time.sleep(0.1)
        if stopped:
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == (0 if stopped else 2)
    assert stopped or "train.py: error: cannot read the image" in err
    assert "Traceback" not in err
    left = subprocess.run(["pgrep", "--session", str(process.pid)], capture_output=True, text=True, check=False).stdout
    assert not left


def train_on(folder, run_here, *flags):
    return run_here(train, "--data-path", folder, *PHOTOS, *flags)


def test_a_continued_run_skips_the_same_unreadable_picture(damaged_photographs, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    for name, steps in (("whole", 6), ("parts", 3), ("parts", 6)):
        assert train_on(damaged_photographs, run_here, "--max-steps", steps, "--run-name", name).returncode == 0
        (line,) = Path(f"results/{name}/skipped.txt").read_text().splitlines()
        assert "tabby cat/0.jpg" in line
    whole, parts = (checkpoint.load(checkpoint.latest(Path("results", name)))["model"] for name in ("whole", "parts"))
    assert all(torch.equal(weight, parts[key]) for key, weight in whole.items())


def test_the_next_readable_sample_stands_in_for_an_unreadable_one(damaged_photographs):
    data = load_dataset(str(damaged_photographs), 16)
    images, labels, unreadable = Readable(data, 1).__getitems__(Rows(np.array([5, 3, 0]), np.array([True, True, False])))
    expected, _ = data.__getitems__(Rows(np.array([5, 4, 0]), np.array([True, True, False])))
    assert torch.equal(images, expected)
    assert labels.tolist() == [1, 1, 0]
    assert list(unreadable) == [3]
    with pytest.raises(ValueError, match="1 or more of 6 samples cannot be read, and `max_skipped` allows 0"):
        Readable(data, 0).__getitems__(Rows.plain(np.array([3])))
    for path in data.files:
        Path(os.fsdecode(path)).write_bytes(b"no picture")
    with pytest.raises(ValueError, match="6 or more of 6 samples cannot be read"):  # it must not search for ever
        Readable(data, 6).__getitems__(Rows.plain(np.array([3])))


def test_too_many_unreadable_pictures_end_a_run_that_is_saved(damaged_photographs, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    for name in ("n02099601/0.jpg", "tabby cat/2.jpg"):
        (damaged_photographs / name).write_bytes(b"\xff\xd8 no picture")
    result = train_on(damaged_photographs, run_here, "--global-batch-size", 1, "--max-steps", 60, "--max-skipped", 0.3,
                      "--log-every", 10, "--run-name", "x")
    assert result.returncode == 2
    assert "train.py: error: 3 samples cannot be read, more than --max-skipped allows" in result.stderr
    assert checkpoint.latest(tmp_path / "results" / "x")


def test_full_shared_memory_is_one_line(monkeypatch):
    """torch's error; `unshare -m` and a tmpfs of 64 MB show it too, but need rights."""
    def fail(*_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_7>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with pytest.raises(OSError, match=r"^/dev/shm, .* is full; its size is [\d,]+ MiB\..*--shm-size .* `num_workers`"):
        list(read_ahead(Readable(load_dataset("digits"), 0), [Rows.plain(np.arange(3))], num_workers=1))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs Linux's unshare")
def test_a_batch_larger_than_docker_s_shared_memory_ends_a_run_at_once(photographs, tmp_path):
    flags = [*TINY_RUN, "--data-path", photographs / "train", "--image-size", 256, "--global-batch-size", 512,
             "--num-workers", 1, "--max-steps", 2]
    words = " ".join(map(shlex.quote, map(str, [sys.executable, ROOT / "train.py", *flags])))
    result = subprocess.run(["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size=64m tmpfs /dev/shm && exec {words}"],
                            cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    if result.stderr.startswith(("unshare:", "mount:")):
        pytest.skip("no right to mount a file system")
    assert result.returncode == 2
    assert "error: /dev/shm, where data workers put what they have read, is full; its size is 64 MiB" in result.stderr


class Broken:
    """A data set of which each batch raises an error; None: a bug of ours."""

    def __init__(self, error=None):
        self.error = error

    def __getitems__(self, rows):
        raise self.error or RuntimeError("sizes of tensors")


def test_a_bug_in_a_data_set_keeps_the_worker_s_traceback_and_an_error_of_a_user_does_not():
    with pytest.raises(RuntimeError, match=r"(?s)in __getitems__.*sizes of tensors"):
        list(read_ahead(Broken(), [torch.arange(3)], num_workers=1))
    with pytest.raises(UserError, match=r"^row 3: no label$"):
        list(read_ahead(Broken(UserError("row 3: no label")), [torch.arange(3)], num_workers=1))
    end_workers()  # or else the collection of the loader waits for them
