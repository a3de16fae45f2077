import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN, run_script

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


def test_a_batch_larger_than_the_data_repeats_them_equally():
    assert np.bincount(GlobalOrder(length=3, batch_size=9, seed=0).batch(2).indices).tolist() == [3, 3, 3]


def test_order_is_addressed_not_carried():
    fresh, used = GlobalOrder(10, 4, 0), GlobalOrder(10, 4, 0)
    for step in range(30):
        used.batch(step)
    assert fresh.batch(7).indices.tolist() == used.batch(7).indices.tolist() == used.batch(7).indices.tolist()


@pytest.mark.parametrize(("world_size", "grad_accum"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_processes_and_micro_batches_share_a_batch_out(world_size, grad_accum):
    rows = [row for rank in range(world_size) for row in GlobalOrder(50, 12, 0, rank, world_size, grad_accum).rows]
    taken = sorted(index for row in rows for index in range(12)[row])
    assert taken == list(range(12))


def test_an_indivisible_batch_is_refused():
    with pytest.raises(ValueError, match=r"`global_batch_size` 12 is not divisible by 5 processes \* `grad_accum` 1"):
        GlobalOrder(50, 12, 0, 0, 5, 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_in_order_from_any_step(num_workers):
    dataset, order = load_dataset("digits"), GlobalOrder(1347, 6, 0, 1, 2, 1)
    batches = list(Batches(Readable(dataset, 0), order, range(3, 6), num_workers, torch.device("cpu")))
    assert len(batches) == 3
    for step, (images, labels) in zip(range(3, 6), batches):
        indices = order.batch(step).indices[3:]
        assert torch.equal(images, dataset.images[indices])
        assert torch.equal(labels, dataset.labels[indices])


# --- memory and speed ----------------------------------------------------------------------------


def write_features(folder, rows):
    """Features of 32x32x4 latents, sparse on disk."""
    folder.mkdir()
    np.lib.format.open_memmap(folder / "moments.npy", "w+", np.float16, (rows, 2, 8, 32, 32))
    np.save(folder / "labels.npy", np.arange(rows) % 10)
    (folder / "meta.json").write_text(json.dumps({
        "autoencoder": {}, "latent_shape": [4, 32, 32], "image_size": [256, 256], "channels": 3, "rows": rows, "skipped": [],
        "flip": True, "classes": [str(i) for i in range(10)]}))


LOAD = """
import sys, time; sys.path.insert(0, {root!r})
import torch
from training.order import Batches
from training.order import GlobalOrder
from training.datasets import load_dataset
from training.rows import Readable
data = load_dataset({folder!r})
order = GlobalOrder(len(data), 256, 0, flip=data.flip)
batches = Batches(Readable(data, 0), order, range({steps}), {workers}, torch.device("cpu"))
for _ in range(20):
    next(batches)
start = time.perf_counter()
for batch, labels in batches:
    pass
rate = 256 * ({steps} - 20) / (time.perf_counter() - start)
anonymous = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
print(rate, anonymous)
"""


def load_rate_and_memory(folder, steps, workers=0):
    code = LOAD.format(root=str(ROOT), folder=str(folder), steps=steps, workers=workers)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return float(out[0]), int(out[1]) * 1024


@pytest.mark.slow
def test_anonymous_memory_does_not_grow_with_the_data_set(tmp_path):
    """500 MB and 5 GB of moments: a copy would show, and so would 40 bytes a sample beside the permutation's 8."""
    for name, rows in (("small", 15_000), ("large", 150_000)):
        write_features(tmp_path / name, rows)
    _, small = load_rate_and_memory(tmp_path / "small", 120)
    _, large = load_rate_and_memory(tmp_path / "large", 120)
    assert large - small < 135_000 * 48


def test_loading_alone_exceeds_20000_samples_a_second(tmp_path):
    write_features(tmp_path / "f", 20_000)
    rate, _ = load_rate_and_memory(tmp_path / "f", 400)
    assert rate > 20_000


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


def start_training(folder, cwd, workers, nproc, *flags):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / "train.py"), "--data-path", str(folder), *map(str, PHOTOS),
                             "--num-workers", str(workers), *map(str, flags)], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)


def assert_all_ended(process):
    """No process of the session is left."""
    found = subprocess.run(["pgrep", "--session", str(process.pid)], capture_output=True, text=True).stdout
    assert not found, found


@pytest.mark.parametrize(("workers", "nproc"), [(0, 1), (2, 1), pytest.param(4, 1, marks=pytest.mark.slow), (2, 2)])
def test_an_unreadable_picture_ends_a_run_at_once(damaged_photographs, tmp_path, workers, nproc):
    """Without waiting for data workers, which ignore the signal that Python would end them with."""
    process = start_training(damaged_photographs, tmp_path, workers, nproc, "--max-steps", 500, "--max-skipped", 0)
    _, err = process.communicate(timeout=60)  # it used to wait for ever
    assert process.returncode == (2 if nproc == 1 else 1)  # torchrun has its own
    assert "train.py: error: cannot read the image" in err
    assert "--max-skipped allows 0" in err
    assert nproc > 1 or "Traceback" not in err
    assert_all_ended(process)


@pytest.mark.parametrize(("workers", "nproc", "number"), [
    (2, 1, signal.SIGINT), pytest.param(4, 1, signal.SIGTERM, marks=pytest.mark.slow), (2, 2, signal.SIGTERM)])
def test_a_signal_ends_a_run_with_an_unreadable_picture(damaged_photographs, tmp_path, workers, nproc, number):
    process = start_training(damaged_photographs, tmp_path, workers, nproc, "--max-steps", 100_000, "--run-name", "x")
    log = tmp_path / "results" / "x" / "log.txt"
    while not (log.exists() and "Skipped" in log.read_text() and "step 5," in log.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert f"Stopped by {number.name}" in log.read_text() or "Stopped by a signal" in log.read_text()
    assert_all_ended(process)


def test_a_run_skips_an_unreadable_picture_the_same_way_however_it_is_run(damaged_photographs, tmp_path):
    flags = ["--data-path", damaged_photographs, *PHOTOS]
    for name, steps, nproc in (("whole", 6, None), ("parts", 3, None), ("parts", 6, None), ("two", 6, 2)):
        run_script("train.py", *flags, "--max-steps", steps, "--run-name", name, cwd=tmp_path, nproc=nproc)
    whole, parts, two = (checkpoint.load(checkpoint.latest(tmp_path / "results" / name)) for name in ("whole", "parts", "two"))
    for key, weight in whole["model"].items():
        assert torch.equal(weight, parts["model"][key])
        assert torch.allclose(weight, two["model"][key], atol=2e-5)
    for name in ("whole", "parts", "two"):
        lines = (tmp_path / "results" / name / "skipped.txt").read_text().splitlines()
        assert len(lines) == 1
        assert "tabby cat/0.jpg" in lines[0]


def test_the_next_readable_sample_stands_in_for_an_unreadable_one(damaged_photographs):
    data = load_dataset(str(damaged_photographs), 16)
    images, labels, unreadable = Readable(data, 1).__getitems__(Rows(np.array([5, 3, 0]), np.array([True, True, False])))
    expected, _ = data.__getitems__(Rows(np.array([5, 4, 0]), np.array([True, True, False])))
    assert torch.equal(images, expected)
    assert labels.tolist() == [1, 1, 0]
    assert list(unreadable) == [3]
    with pytest.raises(ValueError, match="1 or more of 6 samples cannot be read, and `max_skipped` allows 0"):
        Readable(data, 0).__getitems__(Rows.plain(np.array([3])))
    for path in data.paths:
        Path(path).write_bytes(b"no picture")
    with pytest.raises(ValueError, match="6 or more of 6 samples cannot be read"):  # it must not search for ever
        Readable(data, 6).__getitems__(Rows.plain(np.array([3])))


def test_too_many_unreadable_pictures_end_a_run_that_is_saved(damaged_photographs, tmp_path):
    for name in ("n02099601/0.jpg", "tabby cat/2.jpg"):
        (damaged_photographs / name).write_bytes(b"\xff\xd8 no picture")
    result = run_script("train.py", "--data-path", damaged_photographs, *PHOTOS, "--global-batch-size", 1, "--max-steps", 60,
                        "--max-skipped", 0.3, "--log-every", 10, "--run-name", "x", cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert "train.py: error: 3 samples cannot be read, more than --max-skipped allows" in result.stderr
    assert "Traceback" not in result.stderr
    assert checkpoint.latest(tmp_path / "results" / "x")


def test_half_of_the_samples_are_mirrored():
    """Of 40,000 draws, four standard deviations are 0.01."""
    shares = [GlobalOrder(1000, 400, seed, flip=True).batch(step).mirrored.mean() for seed in range(10) for step in range(10)]
    assert abs(np.mean(shares) - 0.5) < 0.01
    assert not GlobalOrder(1000, 400, 0).batch(0).mirrored.any()


class Broken:
    """Data with a fault of ours."""

    def __getitems__(self, rows):
        return torch.cat([torch.zeros(1, 2), torch.zeros(1, 3)])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bug_in_a_data_set_keeps_its_traceback(num_workers):
    batches = read_ahead(Broken(), [torch.arange(3)], num_workers, pin_memory=False)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match") as caught:
        list(batches)
    assert num_workers == 0 or "in __getitems__" in str(caught.value)
    end_workers()  # or else the collection of the loader waits for them


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_user_can_mend_comes_without_a_workers_traceback(num_workers):
    class Unreadable:
        def __getitems__(self, rows):
            raise UserError("row 3: no label")

    with pytest.raises(UserError, match=r"^row 3: no label$"):
        list(read_ahead(Unreadable(), [torch.arange(3)], num_workers, pin_memory=False))
    end_workers()
