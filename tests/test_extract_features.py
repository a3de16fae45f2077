import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, assert_one_line, run_script

import extract_features
import sample
import train
from extract_features import RowFile
from pipeline import checkpoint
from pipeline.autoencoders import load_autoencoder
from pipeline.generation import Sampling, restore_autoencoder
from runtime.pictures import to_unit_range
from runtime.processes import World
from training.datasets import load_dataset
from training.rows import Rows

TINY_DIT = ["--model", "DiT-S/2", "--model-args", '{"hidden_size": 32, "depth": 1, "num_heads": 2}', "--device", "cpu",
            "--diffusion-args", '{"sampling": {"num_sampling_steps": "2"}}']


def flags(photographs, tiny_vae, features, *more):
    return ["--data-path", photographs / "train", "--vae", tiny_vae, "--image-size", 32, "--features-path", features,
            "--num-workers", 1, "--per-proc-batch-size", 2, "--device", "cpu", *more]


@pytest.fixture(scope="module")
def features(photographs, tiny_vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "train"
    args = extract_features.build_parser().parse_args(list(map(str, flags(photographs, tiny_vae, folder))))
    extract_features.main(args)
    torch.set_grad_enabled(True)
    return folder


@pytest.mark.slow
def test_two_processes_write_what_one_writes(features, photographs, tiny_vae, tmp_path):
    run_script("extract_features.py", *flags(photographs, tiny_vae, tmp_path / "two"), cwd=tmp_path, nproc=2)
    for name in ("moments.npy", "labels.npy"):
        assert np.allclose(np.load(features / name), np.load(tmp_path / "two" / name), atol=2e-3)
    assert (features / "meta.json").read_text() == (tmp_path / "two" / "meta.json").read_text()


def test_features_are_the_moments_of_each_image_and_its_mirror_image(features, photographs, tiny_vae):
    meta = json.loads((features / "meta.json").read_text())
    assert (meta["rows"], meta["images"], meta["skipped"], meta["image_size"]) == (6, 6, [], [32, 32])
    assert (meta["autoencoder"]["scaling_factor"], meta["dtype"]) == (0.18215, "float16")
    images, labels = load_dataset(str(photographs / "train"), 32).__getitems__(Rows.plain(range(6)))
    mirrored = np.array([False, True, False, True, True, False])
    moments, cached_labels = load_dataset(str(features)).__getitems__(Rows(np.arange(6), mirrored))
    assert torch.equal(cached_labels, labels)
    vae, noise = load_autoencoder(str(tiny_vae)), torch.randn(6, 4, 4, 4)
    x = torch.stack([image.flip(-1) if flip else image for image, flip in zip(to_unit_range(images), mirrored)])
    posterior = vae.vae.encode(x).latent_dist
    assert torch.allclose(moments.float(), torch.cat([posterior.mean, posterior.logvar], 1), atol=2e-3, rtol=2e-3)
    assert torch.allclose(vae.sample(moments.float(), noise), vae.encode(x, noise), atol=2e-3)


def test_training_finds_features_by_itself_and_samples_of_it_decode(features, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    result = run_here(train, "--data-path", features, *TINY_DIT, "--global-batch-size", 4, "--max-steps", 3,
                      "--run-name", "f", "--num-workers", 1)
    assert result.returncode == 0, result.stderr
    spec = checkpoint.load(checkpoint.latest(tmp_path / "results" / "f"))["spec"]
    assert spec["image_size"] == (32, 32)
    assert spec["classes"] == ["golden retriever", "tabby cat"]
    assert run_here(sample, "--ckpt", "results/f", "--out", "f.png").returncode == 0


def test_an_interrupted_extraction_is_refused_by_training_and_goes_on(
        features, photographs, tiny_vae, tmp_path, monkeypatch, run_here):
    """Stopped between the moments and the labels of a batch; what was complete is not encoded again."""
    out, write = tmp_path / "out", RowFile.write

    def stop_at_row_2(file, indices, rows):
        if file.path.name == "labels.npy" and 2 in indices:
            raise KeyboardInterrupt
        write(file, indices, rows)

    monkeypatch.setattr(RowFile, "write", stop_at_row_2)
    assert run_here(extract_features, *flags(photographs, tiny_vae, out, "--num-workers", 0)).returncode == 130
    monkeypatch.setattr(RowFile, "write", write)
    with pytest.raises(FileNotFoundError, match="not finished"):
        load_dataset(str(out))
    with pytest.raises(ValueError, match="lacks 4 images"):
        extract_features.finish(out, None, {}, 0)
    moments = np.load(out / "moments.npy", mmap_mode="r+")
    moments[:2] += 1  # shows whether these rows are left alone
    moments.flush()
    assert "4 of 6 images encoded now" in run_here(extract_features, *flags(photographs, tiny_vae, out)).stdout
    expected = np.load(features / "moments.npy").astype(np.float32)
    expected[:2] += 1
    assert np.abs(np.load(out / "moments.npy") - expected).max() < 5e-3


def test_unreadable_images_are_listed_left_out_and_too_many_are_an_error(photographs, tiny_vae, tmp_path, run_here):
    shutil.copytree(photographs, tmp_path / "p")
    bad = tmp_path / "p" / "train" / "n02099601" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:100])
    out = tmp_path / "out"
    result = run_here(extract_features, *flags(tmp_path / "p", tiny_vae, out))
    assert result.returncode == 2
    assert "error: 1 of 6 images cannot be read, more than --max-skipped allows; they are listed" in result.stderr
    bad.write_bytes(b"still bad")  # a repair that was none; those that are not encoded may change
    result = run_here(extract_features, *flags(tmp_path / "p", tiny_vae, out), "--max-skipped", 0.2)
    assert result.returncode == 0
    assert str(bad) in (out / "skipped.txt").read_text()
    data = load_dataset(str(out))
    assert len(data) == 5
    assert data.__getitems__(Rows.plain(range(5)))[1].tolist() == [0, 0, 1, 1, 1]
    whole = np.load(out / "moments.npy")
    assert np.array_equal(data.__getitems__(Rows.plain([1]))[0][0].numpy(), whole[2, 0])
    shutil.copy(photographs / "train" / "n02099601" / "1.jpg", bad)
    for _ in range(2):  # it is said each time
        result = run_here(extract_features, *flags(tmp_path / "p", tiny_vae, out), "--max-skipped", 0.2)
        assert f"1 images that were left out have changed since: delete {out} to encode them" in result.stdout


def test_images_whose_latents_overflow_are_left_out_and_named(photographs, tiny_vae, tmp_path, monkeypatch, run_here):
    """fp16 ends at 65,504."""
    original, out = extract_features.encode, tmp_path / "out"

    def overflowing(autoencoder, images, precision):
        encoded = original(autoencoder, images, precision)
        encoded[:, 0, 0, 0, 0] += 1e5 * (images.float().mean(dim=(1, 2, 3)) == mean)
        return encoded
    images = load_dataset(str(photographs / "train"), 32).__getitems__(Rows.plain(range(6)))[0]
    mean = images[4].float().mean()
    monkeypatch.setattr(extract_features, "encode", overflowing)
    result = run_here(extract_features, *flags(photographs, tiny_vae, out))
    assert "1 of 6 images cannot be read or encoded (the latents of 1 are not finite), more than --max-skipped" in result.stderr
    assert run_here(extract_features, *flags(photographs, tiny_vae, out), "--max-skipped", 0.2).returncode == 0
    assert (out / "skipped.txt").read_text().startswith(f"{photographs}/train/tabby cat/1.jpg: its latents are not finite")
    data = load_dataset(str(out))
    assert len(data) == 5
    assert data.__getitems__(Rows.plain(range(5)))[0].isfinite().all()


def test_features_of_another_autoencoder_size_or_scale_are_refused(features, tiny_vae, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    vae = load_autoencoder(str(tiny_vae)).vae
    vae.encoder.conv_in.bias.data += 1
    vae.save_pretrained("other")
    vae = load_autoencoder(str(tiny_vae)).vae
    vae.register_to_config(scaling_factor=0.3)
    vae.save_pretrained("scaled")
    for change, words in ((["--image-size", 64], ["--image-size 64", "32"]), (["--vae", "other"], ["--vae", "sha256"]),
                          (["--vae", "scaled"], ["scaling_factor", "0.18215", "0.3"]),
                          (["--vae", "pixels"], ["--vae pixels", "decode"]),
                          (["--num-classes", 3], ["--num-classes 3", "2 classes"])):
        assert_one_line(run_here(train, "--data-path", features, *TINY_RUN[4:], *change), *words)


def test_rows_of_a_file_are_written_where_they_belong(tmp_path):
    np.save(tmp_path / "x.npy", np.full((9, 2), 7, np.float16))
    rows = np.arange(10, dtype=np.float32).reshape(5, 2)
    RowFile(tmp_path / "x.npy").write(np.array([1, 2, 5, 7, 8]), rows)
    expected = np.full((9, 2), 7)
    expected[[1, 2, 5, 7, 8]] = rows
    assert np.array_equal(np.load(tmp_path / "x.npy"), expected)
    RowFile(tmp_path / "x.npy").write(np.array([], int), rows[:0])
    assert np.array_equal(np.load(tmp_path / "x.npy"), expected)


def test_features_sent_to_a_worker_process_are_mapped_there(features):
    data = load_dataset(str(features))
    sent = pickle.dumps(data)
    assert len(sent) < 2000
    assert torch.equal(pickle.loads(sent).__getitems__(Rows.plain([3]))[0], data.__getitems__(Rows.plain([3]))[0])


def test_wrong_input_is_one_line(features, photographs, tiny_vae, tmp_path, run_here):
    for more, *words in ((["--vae", "pixels"], "--vae pixels"), (["--data-path", features], "holds features already"),
                         (["--features-path", features, "--image-size", 64], "latent_shape", "[4, 4, 4]"),
                         (["--features-path", "/proc/x"], "/proc/x")):
        assert_one_line(run_here(extract_features, *flags(photographs, tiny_vae, tmp_path / "new", *more)), *words)


def test_measured_latents_are_normalised_in_training_and_decoded_by_what_the_checkpoint_says(
        photographs, tiny_vae, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    assert run_here(extract_features, *flags(photographs, tiny_vae, "f/train", "--normalise")).returncode == 0
    data = load_dataset("f/train")
    autoencoder = load_autoencoder(str(tiny_vae), statistics=data.statistics)
    both = torch.cat([data.__getitems__(Rows(np.arange(6), np.full(6, flip)))[0] for flip in (False, True)]).float()
    draws = torch.stack([autoencoder.sample(both, torch.randn(12, 4, 4, 4)) for _ in range(200)])
    assert draws.std(dim=(0, 1, 3, 4)).sub(1).abs().max() < 0.02
    assert draws.mean(dim=(0, 1, 3, 4)).abs().max() < 0.02

    shutil.copytree("f/train", "f/val")  # its own statistics do not count: those of the training features normalise it
    meta = json.loads((tmp_path / "f/val/meta.json").read_text())
    (tmp_path / "f/val/meta.json").write_text(json.dumps(meta | {"latents_std": [1.0] * 4}))
    tiny = [*TINY_DIT, "--global-batch-size", 4, "--max-steps", 2, "--run-name", "r", "--num-workers", 0, "--val-every", 1]
    assert run_here(train, "--data-path", "f/train", *tiny).returncode == 0
    spec = checkpoint.restore("results/r").spec
    assert (spec.latents_mean, spec.latents_std) == data.statistics
    restored = restore_autoencoder(World(0, 1, torch.device("cpu")), checkpoint.restore("results/r"), Sampling.of(spec))
    assert torch.equal(restored.encode(torch.ones(1, 3, 32, 32)), autoencoder.encode(torch.ones(1, 3, 32, 32)))
    assert_one_line(run_here(train, "--data-path", "f/val", *tiny, "--val-every", 0), "was trained with latents_std")

    again = run_here(extract_features, *flags(photographs, tiny_vae, "f/train", "--normalise"))
    assert "0 of 6 images encoded now" in again.stdout
    plain = run_here(extract_features, *flags(photographs, tiny_vae, "f/train"))
    assert_one_line(plain, "holds other features: their normalise is True, not False")


def test_pictures_that_changed_since_are_noticed(photographs, tiny_vae, tmp_path, run_here):
    copy, out = tmp_path / "p", tmp_path / "out"
    shutil.copytree(photographs, copy)
    command = flags(copy, tiny_vae, out)
    assert run_here(extract_features, *command).returncode == 0
    assert "0 of 6 images encoded now" in run_here(extract_features, *command).stdout
    dog, cat = copy / "train" / "n02099601" / "1.jpg", copy / "train" / "tabby cat"
    content, status = dog.read_bytes(), dog.stat()

    def replace():
        dog.write_bytes(content[:-1] + b"x")

    def grow():
        dog.write_bytes(content + b"x")
        os.utime(dog, ns=(status.st_atime_ns, status.st_mtime_ns))

    def move():
        dog.rename(cat / "9.jpg")

    for change, undo, words in (
            (replace, lambda: None, f"1 have changed since in time, such as {dog}."),
            (grow, lambda: None, f"1 have changed since in name, label or size, such as {dog}."),
            (move, lambda: (cat / "9.jpg").rename(dog), "5 have changed since in name, label or size, such as")):
        change()
        assert_one_line(run_here(extract_features, *command), f"{out} was made of other images: {words}")
        undo()
        dog.write_bytes(content)
        os.utime(dog, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "0 of 6 images encoded now" in run_here(extract_features, *command).stdout
    (out / "files.npy").unlink()  # an older version wrote none
    replace()
    said = run_here(extract_features, *command)
    assert said.returncode == 0
    assert f"{out} is of an older version and does not tell of which files it was made" in said.stdout
    assert "0 of 6 images encoded now" in said.stdout


def test_the_flag_flip_is_what_training_takes_from_the_features(photographs, tiny_vae, tmp_path, run_here):
    assert run_here(extract_features, *flags(photographs, tiny_vae, tmp_path / "f", "--no-flip")).returncode == 0
    assert load_dataset(str(tmp_path / "f")).flip is False
    again = run_here(extract_features, *flags(photographs, tiny_vae, tmp_path / "f"))
    assert_one_line(again, "holds other features: their flip is False, not True")


def test_skipped_images_whose_names_are_not_utf8_are_listed(photographs, tiny_vae, tmp_path, run_here):
    folder = os.fsencode(tmp_path) + b"/p/train/caf\xe9"
    os.makedirs(folder)
    shutil.copy(photographs / "train" / "n02099601" / "0.jpg", folder + b"/1.jpg")
    shutil.copy(__file__, folder + b"/2.jpg")
    shutil.copy(__file__, tmp_path / "p" / "train" / os.fsdecode(b"caf\xe9") / "3.heic")
    result = run_here(extract_features, *flags(tmp_path / "p", tiny_vae, tmp_path / "f", "--max-skipped", 0.5))
    assert result.returncode == 0, result.stderr
    assert r"caf\udce9/2.jpg" in (tmp_path / "f" / "skipped.txt").read_text()
    assert load_dataset(str(tmp_path / "f")).classes == [r"caf\udce9"]
    assert "pictures are left out because these endings are not read: 1 .heic" in result.stdout
