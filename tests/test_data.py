import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from runtime.pictures import center_crop
from training.datasets import Rows, load_dataset
from training.order import Batches, GlobalOrder, MicroBatches


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


def test_a_folder_of_photographs_becomes_rgb_of_one_size_with_english_names(photographs):
    dataset = load_dataset(str(photographs / "train"), 32)
    images, labels = dataset.__getitems__(Rows.plain(range(len(dataset))))
    assert images.shape == (6, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.classes == ["golden retriever", "tabby cat"]
    assert torch.equal(images[1, 0], images[1, 2])  # the greyscale file
    assert (images[2, 0, :, -1].float() - images[2, 0, :, 0].float()).mean() > 100  # CMYK: red still grows to the right
    assert load_dataset(str(photographs / "train"), 32, split="val").paths[0].startswith(str(photographs / "val"))


def test_the_crop_is_the_middle_of_the_shorter_side_resized():
    ramp = np.broadcast_to(np.linspace(0, 255, 400).astype(np.uint8), (100, 400))
    cropped = center_crop(Image.fromarray(ramp.copy()), 25).astype(float)  # columns 150..250, by two halvings
    assert cropped.shape == (25, 25)
    expected = ramp[0, 150:250].reshape(25, 4).mean(axis=1)
    assert np.abs(cropped - expected).max() < 1.5
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(center_crop(Image.fromarray(image), 32), image)


# --- order ---------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"--global-batch-size 12 is not divisible by 5 processes \* --grad-accum 1"):
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


# --- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imagenet", "/nowhere/train"])
def test_an_unknown_data_path_names_what_is_allowed(name):
    with pytest.raises(FileNotFoundError, match="neither a folder nor one of digits, mnist, cifar10"):
        load_dataset(name)


def test_a_folder_without_images_or_classes_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder of classes"):
        load_dataset(str(tmp_path))
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match="cat"):
        load_dataset(str(tmp_path))


def test_an_unreadable_picture_is_named(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(OSError, match=r"broken\.jpg"):
        load_dataset(str(tmp_path), 8).__getitems__(Rows.plain([0]))


def test_validation_without_a_held_out_folder_is_refused(photographs):
    with pytest.raises(FileNotFoundError, match="--val-every"):
        load_dataset(str(photographs / "val"), 32, split="val")
