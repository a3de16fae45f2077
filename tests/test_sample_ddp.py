import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, assert_same_images, free_port, run_script, save_random_checkpoint
from PIL import Image

import sample_ddp
from pipeline import checkpoint, drawing
from pipeline.generation import Sampling
from runtime import UserError, log
from runtime.processes import World

FLAGS = ["--num-fid-samples", "11", "--num-sampling-steps", "3", "--device", "cpu"]
OTHER = ROOT / "tests" / "other_process.py"


@pytest.fixture
def draw(tiny_run, tmp_path, monkeypatch, run_here):
    """sample_ddp.py in this process and in tmp_path: (finished process, number of images it drew)."""
    monkeypatch.chdir(tmp_path)
    drawn, original = [], drawing.generate

    def counting(model, autoencoder, labels, indices, *rest):
        drawn.extend(indices)
        return original(model, autoencoder, labels, indices, *rest)

    def run(*flags, ckpt=tiny_run):
        drawn.clear()
        return run_here(sample_ddp, "--ckpt", ckpt, *FLAGS, *flags), sorted(drawn)
    monkeypatch.setattr(drawing, "generate", counting)
    return run


def output(cwd):
    (path,) = (cwd / "samples").glob("*.npz")
    return path


def output_parts(cwd):
    return sorted((cwd / "samples").glob("*.parts/*.npy"))


def arrays(cwd):
    with np.load(output(cwd), allow_pickle=False) as file:
        return file["arr_0"], file["arr_1"]


def assert_same(cwd, other):
    """The same labels, and the same images up to rounding."""
    (images, labels), (other_images, other_labels) = arrays(cwd), arrays(other)
    assert np.array_equal(labels, other_labels)
    assert_same_images(images, other_images)


@pytest.fixture(scope="module")
def one_process(tiny_run, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("one")
    flags = ["--ckpt", str(tiny_run), *FLAGS, "--per-proc-batch-size", "11"]
    with contextlib.chdir(cwd), torch.enable_grad():  # main sets it for its process
        sample_ddp.main(sample_ddp.build_parser().parse_args(flags))
    return cwd


def test_the_npz_is_adms_and_the_json_beside_it_tells_the_settings(one_process):
    images, labels = arrays(one_process)
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == ((11, 8, 8, 3), np.uint8, (11,), np.int64)
    assert images.std() > 10
    assert np.array_equal(images[..., 0], images[..., 2])
    expected = {"cfg_scale": 1.0, "cfg_channels": 1, "sampler": "heun", "steps": "3", "labels": "random", "seed": 0,
                "images": 11, "reuse": "none"}
    (settings,) = (one_process / "samples").glob("*.json")
    assert settings.stem == output(one_process).stem
    assert expected.items() <= json.loads(settings.read_text()).items()


def test_images_do_not_depend_on_processes_nor_batches(one_process, tiny_run, tmp_path, monkeypatch):
    """Two forks of this process are faster than torchrun, which the slow tests below use."""
    monkeypatch.chdir(tmp_path)
    for name, value in dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    args = sample_ddp.build_parser().parse_args(["--ckpt", str(tiny_run), *FLAGS, "--per-proc-batch-size", "3"])

    def work(rank):
        os.environ["RANK"] = str(rank)
        sample_ddp.main(args)

    forks = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(2)]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join(100)
    assert [fork.exitcode for fork in forks] == [0, 0]
    assert_same(one_process, tmp_path)


def test_labels_are_uniform_and_addressed_or_all_in_turn():
    """A chi-square test with 9 degrees of freedom; 33.7 is its quantile of 0.9999."""
    rule, other, balanced = (drawing.label_rule(*key, 10) for key in ((0, False), (1, False), (0, True)))
    labels = [rule(i) for i in range(5000)]
    assert ((np.bincount(labels, minlength=10) - 500) ** 2 / 500).sum() < 33.7
    assert rule(1234) == labels[1234]
    assert [other(i) for i in range(20)] != labels[:20]
    assert [balanced(i) for i in range(12)] == [*range(10), 0, 1]


def test_a_finished_output_is_left_alone_and_pngs_are_made_of_it(draw, tmp_path, monkeypatch):
    assert draw("--balanced", "--per-proc-batch-size", 4)[1] == list(range(11))
    images, labels = arrays(tmp_path)
    assert labels.tolist() == [*range(10), 0]
    before = output(tmp_path).stat().st_mtime_ns
    monkeypatch.setattr(drawing, "PNG_BLOCK", 4)
    result, drawn = draw("--balanced", "--per-proc-batch-size", 5, "--png")
    assert (result.returncode, drawn, output(tmp_path).stat().st_mtime_ns) == (0, [], before)
    assert "already drawn" in result.stdout
    assert_pictures(tmp_path, images)
    (output(tmp_path).with_suffix("") / "000003.png").write_bytes(b"")  # as a lost power supply leaves it
    draw("--balanced", "--png")
    assert_pictures(tmp_path, images)


def assert_pictures(cwd, images):
    """The PNGs hold these images."""
    pictures = sorted(output(cwd).with_suffix("").iterdir())
    assert [path.name for path in pictures] == [f"{i:06d}.png" for i in range(len(images))]
    for path, image in zip(pictures, images):
        with Image.open(path) as picture:
            assert np.array_equal(np.asarray(picture), image)


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


@pytest.fixture
def two_weights(tiny_run, tmp_path):
    """Two functions that write c.pt: with the weights of the run, and with others."""
    state = checkpoint.load(checkpoint.resolve(tiny_run))
    other = state | {"ema": {name: 1.1 * weight for name, weight in state["ema"].items()}}
    return [partial(checkpoint.save, tmp_path / "c.pt", content) for content in (state, other)]


def test_a_stopped_output_is_continued_with_other_batches_no_image_lost_or_twice(draw, draw_failing, one_process, tmp_path):
    for call, size in ((3, 2), (2, 3)):
        result, _ = draw_failing(drawing, "generate", call, KeyboardInterrupt, "--per-proc-batch-size", size)
        assert result.returncode == 130
    parts = output_parts(tmp_path)
    assert [path.name for path in parts] == ["00000000-00000002.npy", "00000002-00000004.npy", "00000004-00000007.npy"]
    parts[1].unlink()  # as if another process had been drawing it
    result, drawn = draw("--per-proc-batch-size", 3)
    assert (result.returncode, drawn) == (0, [2, 3, 7, 8, 9, 10])
    assert_same(one_process, tmp_path)
    assert not list((tmp_path / "samples").glob("*.parts"))


def test_a_full_disk_is_one_line(draw_failing, tmp_path):
    result, _ = draw_failing(np, "save", 1, OSError(28, "No space left on device"))
    assert result.returncode == 2
    assert "No space left on device" in result.stderr.splitlines()[-1]  # one line after the progress bar's
    assert output_parts(tmp_path) == []


def test_other_settings_are_refused_unless_overwritten(draw, tmp_path, two_weights):
    two_weights[0]()
    assert draw(ckpt="c.pt")[1] == list(range(11))
    before = arrays(tmp_path)[0]
    two_weights[1]()
    assert_one_line(draw(ckpt="c.pt")[0], "other settings (checkpoint_sha256 was", "--overwrite")
    assert np.array_equal(arrays(tmp_path)[0], before)
    result, drawn = draw("--overwrite", ckpt="c.pt")
    assert (result.returncode, drawn) == (0, list(range(11)))
    assert not np.array_equal(arrays(tmp_path)[0], before)
    assert draw("--overwrite", ckpt="c.pt")[1] == []  # from these settings: the same command would draw the same
    output(tmp_path).with_suffix(".json").write_text("{")
    assert_one_line(draw(ckpt="c.pt")[0], "other settings", ".json cannot be read")


def test_a_cut_output_is_not_taken_for_a_finished_one_nor_a_cut_part(draw, draw_failing, one_process, tmp_path):
    assert draw()[1] == list(range(11))
    whole = output(tmp_path).read_bytes()
    for damaged, words in ((whole[:1000], "truncated or not an .npz"), (b"", "truncated"), (whole[:-1], "truncated")):
        output(tmp_path).write_bytes(damaged)
        result, drawn = draw()
        assert_one_line(result, f"--sample-dir: the file {output(tmp_path).relative_to(tmp_path)} is", words, "--overwrite")
        assert drawn == []
    np.savez(output(tmp_path), arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    assert_one_line(draw()[0], "does not hold 11 images and their labels")
    assert draw("--overwrite")[1] == list(range(11))
    assert_same(one_process, tmp_path)

    output(tmp_path).unlink()
    assert draw_failing(drawing, "generate", 3, KeyboardInterrupt, "--per-proc-batch-size", 4)[0].returncode == 130
    cut, other = output_parts(tmp_path)
    cut.write_bytes(cut.read_bytes()[:-1])
    np.save(other, np.zeros((3, 8, 8, 3), np.uint8))
    assert draw("--per-proc-batch-size", 4)[1] == list(range(11))
    assert_same(one_process, tmp_path)


def test_what_a_name_does_not_tell_is_in_the_record(tiny_run):
    """Details of reuse, TF32, the objective given for bare weights, statistics of latents from a file beside them."""
    restored, autoencoder = checkpoint.restore(tiny_run), SimpleNamespace(identity=dict)

    def describe(*flags, reuse="none", **changes):
        args = sample_ddp.build_parser().parse_args(flags)
        changed, given = replace(restored, spec=replace(restored.spec, **changes)), dict(vars(args), reuse=reuse)
        sampling = Sampling.of(changed.spec, sample_ddp.SamplingSettings.given(given), restored.model)
        task = drawing.Task(changed, autoencoder, sampling, args.num_fid_samples, args.global_seed, args.balanced)
        return task.name, task.record(args.tf32, args.compile, args.objective)

    name, record = describe()
    assert name.endswith("vae-pixels-cfg-1.0-1-heun-50-fp32-seed-0-50000")
    assert describe("--balanced", "--global-seed", "3")[0].endswith("fp32-seed-3-balanced-50000")
    assert describe("--objective", "epsilon") == (name, record)  # what is assumed
    assert describe("--no-tf32") == (name, record | {"tf32": False})
    assert describe("--objective", "sit") == (name, record | {"objective": "sit"})
    assert describe(latents_mean=[0.5], latents_std=[2.0]) == (name, record | {"statistics": [[0.5], [2.0]]})
    for flag, values, words in (("--reuse-args", ('{"prior_noise": 0.0}', '{"prior_noise": 0.003}'), "prior noise 0.0)"),
                                ("--reuse-args", ('{"split": 1}', '{"split": 2}'), "the first 1 of 2 blocks"),
                                ("--key-steps", ("0,1,2", "0,2,3"), ": 0 1 2")):
        (name, record), (other_name, other) = (describe(flag, value, reuse="encoder") for value in values)
        assert name == other_name
        assert [key for key in record if record[key] != other[key]] == ["reuse"]
        assert words in record["reuse"]


def test_versions_are_told_and_neither_they_nor_an_older_record_refuse_an_output(draw, draw_failing, tmp_path, monkeypatch):
    assert draw_failing(drawing, "generate", 2, KeyboardInterrupt, "--per-proc-batch-size", 4)[0].returncode == 130
    (path,) = (tmp_path / "samples").glob("*.json")
    record = json.loads(path.read_text())
    assert record["weights"] == "ema"
    assert record["versions"] == drawing.versions()
    assert record["versions"]["torch"] == torch.__version__
    monkeypatch.setattr(drawing, "versions", lambda: record["versions"] | {"torch": "9.9"})
    result, drawn = draw("--per-proc-batch-size", 4)
    assert (result.returncode, drawn) == (0, [*range(4, 11)])
    assert json.loads(path.read_text())["versions"] == record["versions"] | {"torch": f"{torch.__version__}, 9.9"}
    path.write_text(json.dumps({key: value for key, value in record.items() if key not in ("weights", "versions")}))
    result, drawn = draw()
    assert (result.returncode, drawn) == (0, [])
    assert "versions" not in json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "name"), [
    (os, "replace"), (Path, "unlink"), (shutil, "rmtree"), (np, "save"), (drawing, "write_json"), (os, "fsync")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_stopped_at_any_write_the_same_command_ends_the_same(draw, draw_failing, two_weights, tmp_path, owner, name):
    """An output of older weights is overwritten, with pictures, and stopped before each call in turn until none is left."""
    flags, samples = ["--overwrite", "--png", "--per-proc-batch-size", 4], tmp_path / "samples"
    two_weights[0]()
    assert draw(*flags, ckpt="c.pt")[0].returncode == 0
    expected = arrays(tmp_path)
    shutil.rmtree(samples)
    two_weights[1]()
    assert draw(*flags, ckpt="c.pt")[0].returncode == 0
    shutil.copytree(samples, tmp_path / "older")
    two_weights[0]()

    for stop in range(1, 100):
        shutil.rmtree(samples)
        shutil.copytree(tmp_path / "older", samples)
        code = draw_failing(owner, name, stop, KeyboardInterrupt, *flags, ckpt="c.pt")[0].returncode
        assert draw(*flags, ckpt="c.pt")[0].returncode == 0
        images, labels = arrays(tmp_path)
        assert np.array_equal(images, expected[0])
        assert np.array_equal(labels, expected[1])
        assert_pictures(tmp_path, images)
        assert len(list(samples.iterdir())) == 3  # .npz, .json and the pictures
        if code == 0:
            break
    assert code == 0
    assert stop > 1


def test_an_output_that_another_process_writes_is_left_alone(draw, tmp_path, monkeypatch, two_weights):
    two_weights[0]()
    assert draw(ckpt="c.pt")[0].returncode == 0
    before = sorted((tmp_path / "samples").iterdir())
    two_weights[1]()
    monkeypatch.setattr(drawing, "lock_folder", Mock(side_effect=UserError("locked")))
    result, drawn = draw("--overwrite", ckpt="c.pt")
    assert_one_line(result, "locked")
    assert drawn == []
    assert set(before) <= set((tmp_path / "samples").iterdir())


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_ends_the_same(one_process, tiny_run, tmp_path):
    """SIGKILL to one process of two, then to the launcher and both, then an unbroken end on one."""
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
    assert_same(one_process, tmp_path)


def test_the_time_that_the_device_waits(monkeypatch):
    clock = iter([0.0, 3.0, 4.0, 8.0, 8.0, 10.0])  # busy 3, idle 1, busy 4, idle 0, busy 2
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(clock))
    idle = log.IdleTime(World(0, 1, torch.device("cpu")))
    for _ in range(6):
        idle.mark()
    assert idle.share() == pytest.approx(0.1)


def test_what_is_there_and_what_is_missing(tmp_path):
    for found, done, todo in (
            ([], [], [(0, 4), (4, 8), (8, 10)]), ([(8, 10), (0, 3)], [(0, 3), (8, 10)], [(3, 7), (7, 8)]),
            ([(0, 4), (2, 6), (3, 5), (6, 10)], [(0, 4), (6, 10)], [(4, 6)])):  # two launches with other batch sizes
        expected = [range(*part) for part in done], [range(*part) for part in todo]
        assert drawing.share_out([range(*part) for part in found], 10, 4) == expected
    for name in ("notes.npy", "00000000-00000002-good.npy", "0000000_0-00000002.npy", "00000002-00000004.npy"):
        (tmp_path / name).touch()
    assert list(drawing.found_parts(tmp_path)) == [range(2, 4)]  # others' files are left alone


def test_images_of_a_process_that_outlived_its_launch_are_not_joined_twice(draw, one_process, tmp_path, monkeypatch):
    """It writes its part just before the parts are joined, when all others are known."""
    original = drawing.finish

    def finish(out, *rest):
        np.save(drawing.part_path(drawing.parts_of(out), range(1, 3)), np.zeros((2, 8, 8, 3), np.uint8))
        original(out, *rest)
    monkeypatch.setattr(drawing, "finish", finish)
    assert draw("--per-proc-batch-size", 4)[0].returncode == 0
    assert_same(one_process, tmp_path)


def test_space_is_checked_before_anything_is_written(draw, tmp_path, monkeypatch):
    """For the missing parts and the .npz."""
    size = 2 * 11 * 8 * 8 * 3
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=size - 1))
    assert_one_line(draw()[0], "no space", "samples")
    assert list((tmp_path / "samples").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=size))
    assert draw()[0].returncode == 0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    path = save_random_checkpoint(tmp_path / "c.pt", 3, ["a", "b"], size=64, patch_size=8)
    flags = ["--ckpt", path, "--device", "cpu", "--per-proc-batch-size", 100, "--sampler", "ddim", "--num-sampling-steps", 1]
    few, many = (float(run_script(OTHER, "sample_and_measure_memory", *flags, "--num-fid-samples", count, cwd=tmp_path)
                       .stdout.split("GiB ")[1]) for count in (2000, 20_000))
    assert many - few < 0.05  # 20,000 images are 0.23 GiB


def test_wrong_input_is_one_line_and_leaves_nothing(draw, tmp_path):
    for flag, value in (("--num-fid-samples", 0), ("--per-proc-batch-size", -1), ("--sample-dir", "/proc/x")):
        assert_one_line(draw(flag, value)[0], str(value))
    assert list(tmp_path.iterdir()) == []
