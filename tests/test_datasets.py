import gzip
import struct

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from runtime import UserError
from training.datasets import load_dataset
from training.rows import Rows

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
