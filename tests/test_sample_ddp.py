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


@pytest.fixture
def draw(tiny_run, tmp_path, monkeypatch, run_here):
    """sample_ddp.py in this process and in tmp_path: (finished process, number of images it drew)."""
    monkeypatch.chdir(tmp_path)
    drawn, original = [], sample_ddp.generate

    def counting(model, autoencoder, labels, indices, *rest):
        drawn.extend(indices)
        return original(model, autoencoder, labels, indices, *rest)

    def run(*flags, ckpt=tiny_run):
        monkeypatch.setattr(sample_ddp, "generate", counting)
        drawn.clear()
        return run_here(sample_ddp, "--ckpt", ckpt, *FLAGS, *flags), sorted(drawn)
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
    run_script("sample_ddp.py", "--ckpt", tiny_run, *FLAGS, "--per-proc-batch-size", 11, cwd=cwd)
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


@pytest.mark.parametrize(("nproc", "batch"), [(2, 3), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_images_do_not_depend_on_processes_nor_batches(one_process, tiny_run, tmp_path, nproc, batch):
    run_script("sample_ddp.py", "--ckpt", tiny_run, *FLAGS, "--per-proc-batch-size", batch, cwd=tmp_path, nproc=nproc)
    assert_same(arrays(one_process), arrays(tmp_path))


def test_labels_are_uniform_and_addressed_or_all_in_turn():
    rule = sample_ddp.label_rule(0, False, 4)
    labels = [rule(i) for i in range(2000)]
    assert np.abs(np.bincount(labels) / 500 - 1).max() < 0.2
    assert rule(1234) == labels[1234]
    other = sample_ddp.label_rule(1, False, 4)
    assert [other(i) for i in range(50)] != labels[:50]
    balanced = sample_ddp.label_rule(0, True, 4)
    assert [balanced(i) for i in range(6)] == [0, 1, 2, 3, 0, 1]


def test_balanced_labels_and_pngs(draw, tmp_path):
    result, drawn = draw("--balanced", "--per-proc-batch-size", 4)
    assert result.returncode == 0
    images, labels = arrays(tmp_path)
    assert labels.tolist() == [*range(10), 0]
    result, drawn = draw("--balanced", "--per-proc-batch-size", 4, "--png")  # of what is finished, drawing nothing
    assert (result.returncode, drawn) == (0, [])
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


def test_a_finished_output_is_left_alone(draw, tmp_path):
    assert draw()[1] == list(range(11))
    before = output(tmp_path).stat().st_mtime_ns
    result, drawn = draw("--per-proc-batch-size", 5)
    assert (result.returncode, drawn, output(tmp_path).stat().st_mtime_ns) == (0, [], before)
    assert "there already" in result.stdout


def test_every_switch_has_its_own_name(draw, tmp_path):
    for flags in ([], ["--guidance-interval", 100, 900], ["--reuse", "encoder"], ["--sampler", "dpm++"], ["--balanced"],
                  ["--sampler", "ddim", "--eta", 0.5], ["--precision", "bf16"], ["--dynamic-thresholding", "true"],
                  ["--cfg-scale", 2], ["--balanced", "--global-seed", 1], ["--sampler", "ddim"]):
        assert draw(*flags, "--num-fid-samples", 2)[0].returncode == 0
    outputs = list((tmp_path / "samples").glob("*.npz"))
    assert len(outputs) == 11
    images = {path.name.split("cfg-")[1]: np.load(path)["arr_0"].tobytes() for path in outputs}
    plain = "1.0-1-heun-3-fp32-seed-0-balanced-2.npz"
    for other in ("1.0-1-heun-3-fp32-seed-1-balanced-2.npz", "2.0-1-heun-3-fp32-seed-0-2.npz",
                  "1.0-1-thresholded-heun-3-fp32-seed-0-2.npz", "1.0-1-ddim-3-fp32-seed-0-2.npz"):
        assert images[other] != images[plain], other  # the other switches change little in a network of six steps
    assert images["1.0-1-ddim-3-eta-0.5-fp32-seed-0-2.npz"] != images["1.0-1-ddim-3-fp32-seed-0-2.npz"]


def test_tf32_is_the_flags(draw, monkeypatch):
    asked, start_world = [], sample_ddp.start_world
    monkeypatch.setattr(sample_ddp, "start_world", lambda device, tf32: asked.append(tf32) or start_world(device, tf32))
    for flags in ([], ["--no-tf32", "--sample-dir", "other"]):
        assert draw(*flags, "--num-fid-samples", 2)[0].returncode == 0
    assert asked == [True, False]


# --- killed and started again --------------------------------------------------------------------


def stop_after(monkeypatch, batches, error):
    """Let `generate` fail after so many batches."""
    original, left = sample_ddp.generate, [batches]

    def generate(*args):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return original(*args)
    monkeypatch.setattr(sample_ddp, "generate", generate)


def test_a_stopped_output_is_continued_with_other_batches_no_image_lost_or_twice(
        draw, one_process, tiny_run, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    for batches, size in ((2, 2), (1, 3)):
        stop_after(monkeypatch, batches, KeyboardInterrupt())
        assert run_here(sample_ddp, "--ckpt", tiny_run, *FLAGS, "--per-proc-batch-size", size).returncode == 130
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    parts = output_parts(tmp_path)
    assert [path.name for path in parts] == ["00000000-00000002.npy", "00000002-00000004.npy", "00000004-00000007.npy"]
    parts[1].unlink()  # as if another process had been drawing it
    result, drawn = draw("--per-proc-batch-size", 3)
    assert (result.returncode, drawn) == (0, [2, 3, 7, 8, 9, 10])
    assert_same(arrays(one_process), arrays(tmp_path))
    assert not list((tmp_path / "samples").glob("*.parts"))


def test_strangers_among_the_parts_are_left_alone(draw, tmp_path):
    draw("--num-fid-samples", 4)
    expected, parts = arrays(tmp_path), sample_ddp.parts_of(output(tmp_path))
    shutil.rmtree(tmp_path / "samples")
    parts.mkdir(parents=True)
    for name in ("notes.npy", "00000000-00000002-good.npy", "0000000_0-00000002.npy"):
        (parts / name).write_bytes(b"not a part")
    draw("--num-fid-samples", 4)
    assert_same(arrays(tmp_path), expected)
    assert len(list(parts.iterdir())) == 3


def test_random_labels_are_uniform():
    """A chi-square test with 9 degrees of freedom; 33.7 is its quantile of 0.9999."""
    label = sample_ddp.label_rule(0, False, 10)
    counts = np.bincount([label(i) for i in range(5000)], minlength=10)
    assert len(counts) == 10
    assert ((counts - 500) ** 2 / 500).sum() < 33.7
    assert [label(i) for i in range(20)] != [sample_ddp.label_rule(1, False, 10)(i) for i in range(20)]


def output_parts(cwd):
    return sorted((cwd / "samples").glob("*.parts/*.npy"))


@pytest.mark.parametrize(("owner", "name"), [(np.lib.format, "write_array_header_1_0"), (os, "replace")])
def test_stopped_while_it_joins_the_parts_it_draws_nothing_again(draw, tmp_path, monkeypatch, owner, name):
    original = getattr(owner, name)

    def fail(*args):
        if name == "replace" and args[1].suffix != ".npz":  # of a part
            return original(*args)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        result, drawn = draw()
        assert (result.returncode, drawn) == (130, list(range(11)))
    assert not list((tmp_path / "samples").glob("*.npz"))
    result, drawn = draw()
    assert (result.returncode, drawn) == (0, [])
    assert arrays(tmp_path)[0].shape == (11, 8, 8, 3)


def test_a_full_disk_is_one_line(draw, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(sample_ddp.np, "save", fail)
    assert_one_line_last(draw()[0], "No space left on device")
    assert output_parts(tmp_path) == []


def assert_one_line_last(result, words):
    """Exit 2, and one line after the progress bar's."""
    assert result.returncode == 2
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_other_settings_are_refused_unless_overwritten(draw, tiny_run, tmp_path):
    state = checkpoint.load(checkpoint.resolve(tiny_run))
    (tmp_path / "a").mkdir()
    checkpoint.save(tmp_path / "a" / "c.pt", state)
    assert draw(ckpt="a/c.pt")[1] == list(range(11))
    before = arrays(tmp_path)
    state["ema"] = {name: 1.1 * weight for name, weight in state["ema"].items()}
    checkpoint.save(tmp_path / "a" / "c.pt", state)
    result, drawn = draw(ckpt="a/c.pt")
    assert_one_line(result, "exists from other settings (checkpoint_sha256 was", "--overwrite")
    assert np.array_equal(arrays(tmp_path)[0], before[0])
    result, drawn = draw("--overwrite", ckpt="a/c.pt")
    assert (result.returncode, drawn) == (0, list(range(11)))
    assert not np.array_equal(arrays(tmp_path)[0], before[0])
    assert draw("--overwrite", ckpt="a/c.pt")[1] == []  # from these settings: the same command would draw the same
    output(tmp_path).with_suffix(".json").write_text("{")
    assert_one_line(draw(ckpt="a/c.pt")[0], "exists from other settings", "does not tell them")


@pytest.mark.parametrize(("first", "second", "words"), [
    (["--reuse-args", '{"prior_noise": 0.0}'], ["--reuse-args", '{"prior_noise": 0.003}'], "prior noise 0.0"),
    (["--reuse-args", '{"split": 1}'], ["--reuse-args", '{"split": 2}'], "the first 1 of 2 blocks"),
    (["--key-steps", "0,1,2"], ["--key-steps", "0,2,3"], "0 1 2"),
    (["--tf32"], ["--no-tf32"], "tf32 was True"),
])
def test_settings_that_the_name_does_not_tell_are_not_mixed(draw, first, second, words):
    assert draw("--reuse", "encoder", *first)[0].returncode == 0
    assert_one_line(draw("--reuse", "encoder", *second)[0], "exists from other settings", words)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("owner", "name"), [
    (os, "replace"), (Path, "unlink"), (shutil, "rmtree"), (np, "save"), (sample_ddp, "write_json"), (os, "fsync")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_stopped_at_any_write_the_same_command_ends_the_same(draw, tiny_run, tmp_path, monkeypatch, owner, name, when):
    """An output of older weights is overwritten, with pictures, and stopped at each call in turn until there is none left."""
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

    original = getattr(owner, name)
    for stop in range(1, 100):
        shutil.rmtree(tmp_path / "samples")
        shutil.copytree(tmp_path / "older", tmp_path / "samples")
        calls = []

        def stopping(*args, **kwargs):
            calls.append(1)  # noqa: B023
            if len(calls) == stop and when == "before":  # noqa: B023
                raise KeyboardInterrupt
            result = original(*args, **kwargs)
            if len(calls) == stop:  # noqa: B023
                raise KeyboardInterrupt
            return result
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stopping)
            code = draw(*flags, ckpt="c.pt")[0].returncode
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
    code = f"import pathlib, sys, time; sys.path.insert(0, {str(ROOT)!r}); from runtime.files import lock_folder\n" \
           f"lock_folder(pathlib.Path({str(parts)!r}), False, ''); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert_one_line(draw()[0], "another process is at work in", "wait for it to end")
    finally:
        holder.kill()
        holder.communicate()
    assert draw()[1] == list(range(11))


PATCHED = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import sample_ddp
from runtime import cli
rank, original, turns = os.environ["RANK"], sample_ddp.generate, []
def generate(*args):
    turns.append(1)
    {action}
    return original(*args)
sample_ddp.generate = generate
if __name__ == "__main__":
    sys.argv[0] = "sample_ddp.py"
    cli.run(sample_ddp.main, sample_ddp.build_parser())
    open(f"drew-{{rank}}", "w").write(str(len(turns)))
"""


@pytest.mark.slow
def test_a_slow_process_draws_less_and_delays_none(one_process, tiny_run, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(PATCHED.format(root=str(ROOT), action="time.sleep(2.0 if rank == '1' else 0.1)"))
    run_script(script, "--ckpt", tiny_run, *FLAGS, "--per-proc-batch-size", 1, cwd=tmp_path, nproc=2)
    drew = {path.name[-1]: int(path.read_text()) for path in tmp_path.glob("drew-*")}
    assert sum(drew.values()) == 11
    assert drew["1"] < drew["0"]
    assert_same(arrays(one_process), arrays(tmp_path))


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_ends_the_same(one_process, tiny_run, tmp_path):
    """SIGKILL to one process of two, then to the launcher and all, then an unbroken end on one."""
    script = tmp_path / "killed.py"
    script.write_text(PATCHED.format(root=str(ROOT), action="time.sleep(0.3); "
                                     "rank == '1' and len(turns) == 2 and os.kill(os.getpid(), signal.SIGKILL)"))
    flags = ["--ckpt", tiny_run, *FLAGS, "--per-proc-batch-size", 1]
    assert run_script(script, *flags, cwd=tmp_path, nproc=2, check=False).returncode != 0
    done = len(output_parts(tmp_path))
    assert 1 <= done < 11
    script.write_text(PATCHED.format(root=str(ROOT), action="time.sleep(0.5)"))
    launched = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                                 str(script), *map(str, flags)], cwd=tmp_path, start_new_session=True,
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


@pytest.mark.parametrize(("found", "done", "todo"), [
    ([], [], [(0, 4), (4, 8), (8, 10)]), ([(0, 10)], [(0, 10)], []), ([(4, 6)], [(4, 6)], [(0, 4), (6, 10)]),
    ([(8, 10), (0, 3)], [(0, 3), (8, 10)], [(3, 7), (7, 8)]),
    ([(0, 4), (2, 6), (3, 5), (6, 10)], [(0, 4), (6, 10)], [(4, 6)]),  # two launches with other batch sizes
])
def test_what_is_there_and_what_is_missing(found, done, todo):
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


def test_space_is_asked_for_what_is_still_to_be_written(draw, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sample_ddp, "check_writable", lambda folder, size=0: asked.append(size) or folder.mkdir(
        exist_ok=True))
    assert draw()[0].returncode == 0
    assert asked == [0, 2 * 11 * 8 * 8 * 3]
    assert draw()[0].returncode == 0
    assert asked[2:] == [0]


def test_a_full_disk_is_told_before_anything_is_written(draw, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2000))
    assert_one_line(draw()[0], "no space in the folder samples")
    assert list((tmp_path / "samples").iterdir()) == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    kwargs = dict(input_size=64, in_channels=3, num_classes=3, hidden_size=8, depth=1, num_heads=1)
    spec = {"model": {"name": "DiT-S/8", "class": "DiT",
              "args": kwargs}, "diffusion": {}, "vae": "pixels", "image_size": (64, 64),
            "channels": 3, "classes": ["a", "b", "c"],
            "sampling": {"sampler": "ddim", "num_sampling_steps": "1", "cfg_scale": 1.0, "cfg_channels": None}}
    checkpoint.save(tmp_path / "c.pt", {"ema": DiT_models["DiT-S/8"](**kwargs).state_dict(), "spec": spec})
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport sample_ddp, torch\n" \
           "from runtime import cli\nfrom runtime.log import peak_memory\n" \
           "cli.run(sample_ddp.main, sample_ddp.build_parser())\nprint('GiB', peak_memory(torch.device('cpu')))"
    peaks = []
    for count in (2000, 20_000):
        out = subprocess.run([sys.executable, "-c", code, "--ckpt", "c.pt", "--num-fid-samples", str(count), "--device", "cpu",
                              "--per-proc-batch-size", "100"], cwd=tmp_path, check=True, text=True, capture_output=True).stdout
        peaks.append(float(out.split("GiB ")[1]))
    print("peak GiB of 2,000 and 20,000 images:", peaks)
    assert peaks[1] - peaks[0] < 0.05  # 20,000 images are 0.23 GiB


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


def test_what_bare_weights_do_not_tell_is_a_setting(tiny_run):
    """The objective that was given for them, and statistics of latents from a file beside them."""
    restored = checkpoint.restore(tiny_run)
    sampling, autoencoder = Sampling.of(restored.spec, {}), SimpleNamespace(identity=dict)

    def record(objective, **changes):
        args = sample_ddp.build_parser().parse_args(["--objective", objective] if objective else [])
        return sample_ddp.record_of(replace(restored, spec=replace(restored.spec, **changes)), autoencoder, sampling, args)

    assert record("epsilon") == record(None)  # what is assumed
    assert {**record("sit")} == record(None) | {"objective": "sit"}
    changed = record(None, latents_mean=[0.5], latents_std=[2.0])
    assert changed == record(None) | {"statistics": [[0.5], [2.0]]}
