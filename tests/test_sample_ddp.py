import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, assert_same_images, run_script
from PIL import Image

import sample_ddp
from models import DiT_models
from pipeline import checkpoint
from pipeline.generation import Sampling
from runtime.processes import World

FLAGS = ["--num-fid-samples", "11", "--num-sampling-steps", "3", "--device", "cpu"]
OTHER = ROOT / "tests" / "other_process.py"


@pytest.fixture
def draw(tiny_run, tmp_path, monkeypatch, run_here):
    """sample_ddp.py in this process and in tmp_path: (finished process, number of images it drew)."""
    monkeypatch.chdir(tmp_path)
    drawn, original = [], sample_ddp.generate

    def counting(model, autoencoder, labels, indices, *rest):
        drawn.extend(indices)
        return original(model, autoencoder, labels, indices, *rest)

    def run(*flags, ckpt=tiny_run):
        drawn.clear()
        return run_here(sample_ddp, "--ckpt", ckpt, *FLAGS, *flags), sorted(drawn)
    monkeypatch.setattr(sample_ddp, "generate", counting)
    return run


def output(cwd):
    (path,) = (cwd / "samples").glob("*.npz")
    return path


def arrays(cwd):
    with np.load(output(cwd), allow_pickle=False) as file:
        return file["arr_0"], file["arr_1"]


def assert_same(a, b):
    """(images, labels): labels the same, images but for rounding."""
    assert np.array_equal(a[1], b[1])
    assert_same_images(a[0], b[0])


@pytest.fixture(scope="module")
def one_process(tiny_run, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("one")
    flags = ["--ckpt", str(tiny_run), *FLAGS, "--per-proc-batch-size", "11"]
    with contextlib.chdir(cwd), torch.enable_grad():  # main sets it for its process
        sample_ddp.main(sample_ddp.build_parser().parse_args(flags))
    return cwd


# --- what it writes ------------------------------------------------------------------------------


def test_the_npz_is_adms_and_the_json_beside_it_tells_the_settings(one_process):
    images, labels = arrays(one_process)
    assert (images.shape, images.dtype) == ((11, 8, 8, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((11,), np.int64)
    assert len(set(labels)) > 3
    assert images.std() > 10
    assert np.array_equal(images[..., 0], images[..., 2])
    assert sorted(path.suffix for path in (one_process / "samples").iterdir()) == [".json", ".npz"]
    settings = json.loads(output(one_process).with_suffix(".json").read_text())
    assert {key: settings[key] for key in ("cfg_scale", "cfg_channels", "sampler", "steps", "labels", "seed", "images", "reuse")
            } == {"cfg_scale": 1.0, "cfg_channels": 1, "sampler": "heun", "steps": "3", "labels": "random", "seed": 0,
                  "images": 11, "reuse": "none"}


def test_images_do_not_depend_on_processes_nor_batches(one_process, tiny_run, tmp_path):
    run_script("sample_ddp.py", "--ckpt", tiny_run, *FLAGS, "--per-proc-batch-size", 3, cwd=tmp_path, nproc=2)
    assert_same(arrays(one_process), arrays(tmp_path))


def test_labels_are_uniform_and_addressed_or_all_in_turn():
    """A chi-square test with 9 degrees of freedom; 33.7 is its quantile of 0.9999."""
    rule, other, balanced = (sample_ddp.label_rule(*key, 10) for key in ((0, False), (1, False), (0, True)))
    labels = [rule(i) for i in range(5000)]
    assert ((np.bincount(labels, minlength=10) - 500) ** 2 / 500).sum() < 33.7
    assert rule(1234) == labels[1234]
    assert [other(i) for i in range(20)] != labels[:20]
    assert [balanced(i) for i in range(12)] == [*range(10), 0, 1]


def test_a_finished_output_is_left_alone_and_pngs_are_made_of_it(draw, tmp_path):
    assert draw("--balanced", "--per-proc-batch-size", 4)[1] == list(range(11))
    images, labels = arrays(tmp_path)
    assert labels.tolist() == [*range(10), 0]
    before = output(tmp_path).stat().st_mtime_ns
    result, drawn = draw("--balanced", "--per-proc-batch-size", 5, "--png")
    assert (result.returncode, drawn, output(tmp_path).stat().st_mtime_ns) == (0, [], before)
    assert "already drawn" in result.stdout
    pictures = sorted(output(tmp_path).with_suffix("").iterdir())
    assert [path.name for path in pictures] == [f"{i:06d}.png" for i in range(11)]
    for path, image in zip(pictures, images):
        with Image.open(path) as picture:
            assert np.array_equal(np.asarray(picture), image)


def test_pngs_beyond_one_block(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (sample_ddp.PNG_BLOCK + 3, 2, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images)
    sample_ddp.write_pngs(tmp_path / "x.npz")
    for i in (0, sample_ddp.PNG_BLOCK - 1, sample_ddp.PNG_BLOCK, sample_ddp.PNG_BLOCK + 2):
        with Image.open(tmp_path / "x" / f"{i:06d}.png") as picture:
            assert np.array_equal(np.asarray(picture), images[i])


def test_names_tell_the_settings_apart_and_settings_change_the_images(draw, tmp_path):
    names = {"1.0-1-heun-3-fp32-seed-0-balanced-2": ["--balanced"],
             "1.0-1-heun-3-fp32-seed-1-balanced-2": ["--balanced", "--global-seed", 1],
             "2.0-1-heun-3-fp32-seed-0-2": ["--cfg-scale", 2],
             "1.0-1-thresholded-heun-3-fp32-seed-0-2": ["--dynamic-thresholding", "true"],
             "1.0-1-ddim-3-fp32-seed-0-2": ["--sampler", "ddim"],
             "1.0-1-ddim-3-eta-0.5-fp32-seed-0-2": ["--sampler", "ddim", "--eta", 0.5]}
    for flags in names.values():
        assert draw(*flags, "--num-fid-samples", 2)[0].returncode == 0
    images = {path.stem.split("cfg-")[1]: np.load(path)["arr_0"].tobytes() for path in (tmp_path / "samples").glob("*.npz")}
    assert images.keys() == names.keys()
    assert len(set(images.values())) == len(images)


def test_tf32_is_the_flags(draw, monkeypatch):
    asked, start_world = [], sample_ddp.start_world
    monkeypatch.setattr(sample_ddp, "start_world", lambda device, tf32: asked.append(tf32) or start_world(device, tf32))
    for flags in ([], ["--no-tf32", "--sample-dir", "other"]):
        assert draw(*flags, "--num-fid-samples", 2)[0].returncode == 0
    assert asked == [True, False]


# --- killed and started again --------------------------------------------------------------------


@pytest.fixture
def draw_failing(draw, monkeypatch):
    """(owner, name, call, error, flags) -> what `draw` returns, when that call of owner.name raises the error instead."""
    def run(owner, name, call, error, *flags, **options):
        original, calls = getattr(owner, name), []

        def function(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise error
            return original(*args, **kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, function)
            return draw(*flags, **options)
    return run


def test_a_stopped_output_is_continued_with_other_batches_no_image_lost_or_twice(draw, draw_failing, one_process, tmp_path):
    for call, size in ((3, 2), (2, 3)):
        result, _ = draw_failing(sample_ddp, "generate", call, KeyboardInterrupt, "--per-proc-batch-size", size)
        assert result.returncode == 130
    parts = output_parts(tmp_path)
    assert [path.name for path in parts] == ["00000000-00000002.npy", "00000002-00000004.npy", "00000004-00000007.npy"]
    parts[1].unlink()  # as if another process had been drawing it
    result, drawn = draw("--per-proc-batch-size", 3)
    assert (result.returncode, drawn) == (0, [2, 3, 7, 8, 9, 10])
    assert_same(arrays(one_process), arrays(tmp_path))
    assert not list((tmp_path / "samples").glob("*.parts"))


def test_strangers_among_the_parts_are_left_alone(draw, one_process, tmp_path):
    parts = tmp_path / "samples" / f"{output(one_process).stem}.parts"
    parts.mkdir(parents=True)
    for name in ("notes.npy", "00000000-00000002-good.npy", "0000000_0-00000002.npy"):
        (parts / name).write_bytes(b"not a part")
    draw()
    assert_same(arrays(tmp_path), arrays(one_process))
    assert len(list(parts.iterdir())) == 3


def output_parts(cwd):
    return sorted((cwd / "samples").glob("*.parts/*.npy"))


def test_stopped_while_it_joins_the_parts_it_draws_nothing_again(draw, draw_failing, tmp_path):
    result, drawn = draw_failing(np.lib.format, "write_array_header_1_0", 1, KeyboardInterrupt)
    assert (result.returncode, drawn) == (130, list(range(11)))
    assert not list((tmp_path / "samples").glob("*.npz"))
    result, drawn = draw()
    assert (result.returncode, drawn) == (0, [])
    assert arrays(tmp_path)[0].shape == (11, 8, 8, 3)


def test_a_full_disk_is_one_line(draw_failing, tmp_path):
    result, _ = draw_failing(np, "save", 1, OSError(28, "No space left on device"))
    assert result.returncode == 2
    assert "No space left on device" in result.stderr.splitlines()[-1]  # one line after the progress bar's
    assert "Traceback" not in result.stderr
    assert output_parts(tmp_path) == []


def test_other_settings_are_refused_unless_overwritten(draw, tiny_run, tmp_path):
    state = checkpoint.load(checkpoint.resolve(tiny_run))
    (tmp_path / "a").mkdir()
    checkpoint.save(tmp_path / "a" / "c.pt", state)
    assert draw(ckpt="a/c.pt")[1] == list(range(11))
    before = arrays(tmp_path)
    state["ema"] = {name: 1.1 * weight for name, weight in state["ema"].items()}
    checkpoint.save(tmp_path / "a" / "c.pt", state)
    result, drawn = draw(ckpt="a/c.pt")
    assert_one_line(result, "other settings (checkpoint_sha256 was", "--overwrite")
    assert np.array_equal(arrays(tmp_path)[0], before[0])
    result, drawn = draw("--overwrite", ckpt="a/c.pt")
    assert (result.returncode, drawn) == (0, list(range(11)))
    assert not np.array_equal(arrays(tmp_path)[0], before[0])
    assert draw("--overwrite", ckpt="a/c.pt")[1] == []  # from these settings: the same command would draw the same
    output(tmp_path).with_suffix(".json").write_text("{")
    assert_one_line(draw(ckpt="a/c.pt")[0], "other settings", ".json cannot be read")


def test_what_a_name_does_not_tell_is_in_the_record(tiny_run):
    """Details of reuse, TF32, the objective given for bare weights, statistics of latents from a file beside them."""
    restored, autoencoder = checkpoint.restore(tiny_run), SimpleNamespace(identity=dict)

    def describe(*flags, reuse="encoder", **changes):
        args = sample_ddp.build_parser().parse_args(flags)
        changed, given = replace(restored, spec=replace(restored.spec, **changes)), dict(vars(args), reuse=reuse)
        sampling = Sampling.of(changed.spec, sample_ddp.SamplingSettings.given(given), restored.model)
        return sample_ddp.name_of(changed, sampling, args), sample_ddp.record_of(changed, autoencoder, sampling, args)

    for first, second, words in (
            (["--reuse-args", '{"prior_noise": 0.0}'], ["--reuse-args", '{"prior_noise": 0.003}'], "prior noise 0.0)"),
            (["--reuse-args", '{"split": 1}'], ["--reuse-args", '{"split": 2}'], "the first 1 of 2 blocks"),
            (["--key-steps", "0,1,2"], ["--key-steps", "0,2,3"], ": 0 1 2"), (["--tf32"], ["--no-tf32"], True)):
        (name, record), (other_name, other) = describe(*first), describe(*second)
        assert name == other_name
        (changed,) = (record[key] for key in record if record[key] != other[key])
        assert words in changed if isinstance(words, str) else changed is words
    record = describe(reuse="none")[1]
    assert describe("--objective", "epsilon", reuse="none")[1] == record  # what is assumed
    assert describe("--objective", "sit", reuse="none")[1] == record | {"objective": "sit"}
    assert describe(reuse="none", latents_mean=[0.5], latents_std=[2.0])[1] == record | {"statistics": [[0.5], [2.0]]}


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "name"), [
    (os, "replace"), (Path, "unlink"), (shutil, "rmtree"), (np, "save"), (sample_ddp, "write_json"), (os, "fsync")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_stopped_at_any_write_the_same_command_ends_the_same(draw, draw_failing, tiny_run, tmp_path, owner, name):
    """An output of older weights is overwritten, with pictures, and stopped before each call in turn until none is left."""
    state = checkpoint.load(checkpoint.resolve(tiny_run))
    older = state | {"ema": {key: 1.1 * weight for key, weight in state["ema"].items()}}
    flags = ["--overwrite", "--png", "--per-proc-batch-size", 4]
    checkpoint.save(tmp_path / "c.pt", state)
    assert draw(*flags, ckpt="c.pt")[0].returncode == 0
    expected = arrays(tmp_path)
    shutil.rmtree(tmp_path / "samples")
    checkpoint.save(tmp_path / "c.pt", older)
    assert draw(*flags, ckpt="c.pt")[0].returncode == 0
    shutil.copytree(tmp_path / "samples", tmp_path / "older")
    checkpoint.save(tmp_path / "c.pt", state)

    for stop in range(1, 100):
        shutil.rmtree(tmp_path / "samples")
        shutil.copytree(tmp_path / "older", tmp_path / "samples")
        code = draw_failing(owner, name, stop, KeyboardInterrupt, *flags, ckpt="c.pt")[0].returncode
        assert draw(*flags, ckpt="c.pt")[0].returncode == 0
        images, labels = arrays(tmp_path)
        assert np.array_equal(images, expected[0])
        assert np.array_equal(labels, expected[1])
        for i, image in enumerate(images):
            with Image.open(output(tmp_path).with_suffix("") / f"{i:06d}.png") as picture:
                assert np.array_equal(np.asarray(picture), image)
        assert len(list((tmp_path / "samples").iterdir())) == 3  # .npz, .json and the pictures
        if code == 0:
            break
    assert code == 0
    assert stop > 1


def test_a_second_writer_is_refused(draw, tmp_path):
    assert draw()[0].returncode == 0
    parts = sample_ddp.parts_of(output(tmp_path))
    output(tmp_path).unlink()
    parts.mkdir()
    holder = subprocess.Popen([sys.executable, OTHER, "hold_lock", parts], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert_one_line(draw()[0], "another process", parts.name, "wait for it to end")
    finally:
        holder.kill()
        holder.communicate()
    assert draw()[1] == list(range(11))


@pytest.mark.slow
def test_a_slow_process_draws_less_and_delays_none(one_process, tiny_run, tmp_path):
    run_script(OTHER, "sample_slowly_on_rank_1", "--ckpt", tiny_run, *FLAGS, "--per-proc-batch-size", 1, cwd=tmp_path, nproc=2)
    drew = {path.name[-1]: int(path.read_text()) for path in tmp_path.glob("drew-*")}
    assert sum(drew.values()) == 11
    assert drew["1"] < drew["0"]
    assert_same(arrays(one_process), arrays(tmp_path))


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_ends_the_same(one_process, tiny_run, tmp_path):
    """SIGKILL to one process of two, then to the launcher and all, then an unbroken end on one."""
    flags = ["--ckpt", tiny_run, *FLAGS, "--per-proc-batch-size", 1]
    assert run_script(OTHER, "sample_and_lose_rank_1", *flags, cwd=tmp_path, nproc=2, check=False).returncode != 0
    done = len(output_parts(tmp_path))
    assert 1 <= done < 11
    launched = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                                 OTHER, "sample_slowly", *map(str, flags)], cwd=tmp_path, start_new_session=True,
                                stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(output_parts(tmp_path)) <= done and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(launched.pid, signal.SIGKILL)
    launched.wait()
    assert done < len(output_parts(tmp_path)) < 11
    run_script("sample_ddp.py", *flags, cwd=tmp_path)
    assert_same(arrays(one_process), arrays(tmp_path))


# --- time and memory -----------------------------------------------------------------------------


def test_the_time_that_the_device_waits(monkeypatch):
    clock = iter([0.0, 3.0, 4.0, 8.0, 8.0, 10.0])  # busy 3, idle 1, busy 4, idle 0, busy 2
    monkeypatch.setattr(sample_ddp.time, "perf_counter", lambda: next(clock))
    idle = sample_ddp.IdleTime(World(0, 1, torch.device("cpu")))
    for _ in range(6):
        idle.mark()
    assert idle.share() == pytest.approx(0.1)


def test_what_is_there_and_what_is_missing():
    for found, done, todo in (
            ([], [], [(0, 4), (4, 8), (8, 10)]), ([(0, 10)], [(0, 10)], []),
            ([(8, 10), (0, 3)], [(0, 3), (8, 10)], [(3, 7), (7, 8)]),
            ([(0, 4), (2, 6), (3, 5), (6, 10)], [(0, 4), (6, 10)], [(4, 6)])):  # two launches with other batch sizes
        expected = [range(*part) for part in done], [range(*part) for part in todo]
        assert sample_ddp.share_out([range(*part) for part in found], 10, 4) == expected


def test_images_of_a_process_that_outlived_its_launch_are_not_joined_twice(draw, one_process, tmp_path, monkeypatch):
    """It writes its part just before the parts are joined, when all others are known."""
    original = sample_ddp.finish

    def finish(out, *rest):
        np.save(sample_ddp.part_path(sample_ddp.parts_of(out), range(1, 3)), np.zeros((2, 8, 8, 3), np.uint8))
        original(out, *rest)
    monkeypatch.setattr(sample_ddp, "finish", finish)
    assert draw("--per-proc-batch-size", 4)[0].returncode == 0
    assert_same(arrays(one_process), arrays(tmp_path))


def test_space_is_asked_for_what_is_still_to_be_written_and_before_anything_is(draw, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2000))
        assert_one_line(draw()[0], "no space", "samples")
    assert list((tmp_path / "samples").iterdir()) == []
    asked = []
    monkeypatch.setattr(sample_ddp, "check_writable", lambda folder, size=0: asked.append(size) or folder.mkdir(
        exist_ok=True))
    assert draw()[0].returncode == 0
    assert asked == [0, 2 * 11 * 8 * 8 * 3]
    assert draw()[0].returncode == 0
    assert asked[2:] == [0]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    kwargs = dict(input_size=64, in_channels=3, num_classes=3, patch_size=8, hidden_size=8, depth=1, num_heads=1)
    spec = {"model": {"name": "DiT-S/8", "class": "DiT", "args": kwargs}, "diffusion": {}, "vae": "pixels",
            "image_size": (64, 64), "channels": 3, "classes": ["a", "b", "c"],
            "sampling": {"sampler": "ddim", "num_sampling_steps": "1"}}
    checkpoint.save(tmp_path / "c.pt", {"ema": DiT_models["DiT-S/8"](**kwargs).state_dict(), "spec": spec})
    peaks = []
    for count in (2000, 20_000):
        out = run_script(OTHER, "sample_and_measure_memory", "--ckpt", "c.pt", "--num-fid-samples", count, "--device", "cpu",
                         "--per-proc-batch-size", 100, cwd=tmp_path).stdout
        peaks.append(float(out.split("GiB ")[1]))
    print("peak GiB of 2,000 and 20,000 images:", peaks)
    assert peaks[1] - peaks[0] < 0.05  # 20,000 images are 0.23 GiB


@pytest.mark.parametrize(("flags", "words"), [
    (["--num-fid-samples", "0"], "--num-fid-samples 0"), (["--per-proc-batch-size", "-1"], "--per-proc-batch-size -1"),
    (["--sample-dir", "/proc/x"], "/proc/x")])
def test_wrong_input_is_one_line_and_leaves_nothing(tiny_run, tmp_path, monkeypatch, run_here, flags, words):
    monkeypatch.chdir(tmp_path)
    assert_one_line(run_here(sample_ddp, "--ckpt", tiny_run, *FLAGS, *flags), words)
    assert list(tmp_path.iterdir()) == []
