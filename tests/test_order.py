import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN, run_script

from training.datasets import load_dataset
from training.order import Batches, GlobalOrder, MicroBatches


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
    batches = list(Batches(dataset, order, range(3, 6), num_workers, torch.device("cpu")))
    assert len(batches) == 3
    for step, (images, labels) in zip(range(3, 6), batches):
        indices = order.batch(step).indices[3:]
        assert torch.equal(images, dataset.images[indices])
        assert torch.equal(labels, dataset.labels[indices])
    assert len(MicroBatches(order, range(3, 6))) == 3


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
data = load_dataset({folder!r})
order = GlobalOrder(len(data), 256, 0, flip=data.flip)
batches = Batches(data, order, range({steps}), {workers}, torch.device("cpu"))
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


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_an_unreadable_picture_ends_a_run_at_once(photographs, tmp_path, workers):
    """Without waiting for data workers, which ignore the signal that Python would end them with."""
    folder = tmp_path / "photos"
    shutil.copytree(photographs / "train", folder)
    damaged = folder / "tabby cat" / "0.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    flags = ["--data-path", folder, "--image-size", 16, *TINY_RUN[2:], "--num-workers", workers, "--max-steps", 50]
    start = time.monotonic()
    result = run_script("train.py", *flags, cwd=tmp_path, check=False)
    assert time.monotonic() - start < 60  # it used to wait for ever
    assert result.returncode == 2
    assert "train.py: error: cannot read the image" in result.stderr
    assert "Traceback" not in result.stderr
