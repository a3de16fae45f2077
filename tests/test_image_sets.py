import numpy as np
import pytest
from conftest import all_features, draw_images, value
from PIL import Image

import evaluate
from evaluation import image_sets
from evaluation.image_sets import open_set
from training.datasets import load_dataset
from training.rows import Rows


def open_images(source, **options):
    return open_set(str(source), "REF", **options).images


def test_an_npz_a_compressed_one_and_folders_hold_the_same_images(tmp_path):
    images = draw_images(11, 0)
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=np.arange(11, dtype=np.int32))
    np.savez_compressed(tmp_path / "b.npz", arr_0=images)
    for i, image in enumerate(images):
        path = tmp_path / "folder" / f"class {i // 6}" / f"{i:02d}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    sets = [open_images(tmp_path / name) for name in ("a.npz", "b.npz", "folder")]
    for image_set in sets:
        assert (len(image_set), image_set.size) == (11, (8, 8))
        batches = [np.array(rows) for rows in ([0, 1, 5], [10], [3, 2])]
        for rows, found in zip(batches, image_set.read(batches)):
            assert np.array_equal(found, images[rows])
    assert sets[0].labels.tolist() == list(range(11))
    assert sets[1].labels is sets[2].labels is None


def test_a_folder_of_the_parts_of_a_data_set_is_refused(tmp_path):
    for i, image in enumerate(draw_images(8, 0)):
        path = tmp_path / ("train", "val")[i % 2] / "cat" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    with pytest.raises(ValueError, match=r"^REF \S+ holds the parts train, val of a data set; .* \S+/val$"):
        open_images(tmp_path)
    assert len(open_images(tmp_path / "val")) == 4


def test_a_named_set_is_its_held_out_part_in_colour_and_of_the_size_asked_for():
    digits, held_out = open_images("digits"), load_dataset("digits", split="val")
    assert (len(digits), digits.size) == (450, (8, 8))
    (found,) = digits.read([np.array([4, 2])])
    assert np.array_equal(found[..., 1], held_out.images[[4, 2], 0].numpy())
    assert digits.labels.tolist() == held_out.labels.tolist()
    assert len(open_images("digits", split="train")) == 1347
    assert open_images("digits", size=(16, 16)).size == (16, 16)


def test_saved_statistics_give_the_same_figures_and_hold_images_evenly_spaced(sets, figures, run_here, monkeypatch):
    monkeypatch.setattr(image_sets, "REFERENCE_IMAGES", 50)
    result = run_here(evaluate, "ref.npz", "--save-stats", "stats.npz", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    with np.load("stats.npz") as stats:
        pool = all_features(sets[0])["pool"]
        assert stats["mu"] == pytest.approx(pool.mean(axis=0), rel=1e-6, abs=1e-7)
        assert stats["sigma"] == pytest.approx(np.cov(pool, rowvar=False), rel=1e-5, abs=1e-7)
        assert {key: stats[key].shape for key in stats} == {
            "arr_0": (50, 8, 8, 3), "mu": (20,), "sigma": (20, 20), "mu_s": (15,), "sigma_s": (15, 15), "n": ()}
        assert np.array_equal(stats["arr_0"], sets[0][::3])
    plain, from_stats = figures("ref.npz", "samples.npz"), figures("stats.npz", "samples.npz")
    for name in ("FID-70", "sFID-70", "Inception Score"):
        assert value(from_stats, name) == pytest.approx(value(plain, name), rel=1e-9)
    assert "REF stats.npz: N = 50 of 8x8 (height x width), statistics of 150 images" in from_stats[1]["said"]
    assert from_stats[0]["Precision"]["remark"].startswith("of 50 real images and 70 samples")
    turned = figures("samples.npz", "stats.npz")[0]
    assert turned["FID-150"]["value"] == pytest.approx(value(plain, "FID-70"), rel=1e-9)


def test_a_folder_of_several_sizes_is_cropped_as_training_does(photographs, tmp_path):
    folder = photographs / "val"
    found = open_images(folder, size=(24, 24))
    assert (found.size, found.cropped) == ((24, 24), True)
    (images,) = found.read([np.arange(len(found))])
    trained = load_dataset(str(folder), 24).__getitems__(Rows.plain(range(6)))[0].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images, trained)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    same = open_images(tmp_path, size=(24, 24))
    assert not same.cropped
    assert np.array_equal(next(same.read([np.arange(6)])), images)
    for size, expected in ((None, "36x40"), ((24, 16), "16x24")):
        with pytest.raises(ValueError, match=f"of one size, or be cropped to a square by `image_size`; expected {expected}"):
            open_images(folder, size=size)
