import shutil
from unittest import mock

import pytest
import torch
from conftest import read_metrics
from PIL import Image

from runtime.log import Log, NoTracker
from runtime.processes import World

MAIN = World(0, 1, torch.device("cpu"))


def test_a_continued_log_drops_steps_after_the_checkpoint(tmp_path):
    log = Log(tmp_path, MAIN, 0, "none", {})
    for step in (1, 2, 3):
        log.record(step, loss=step / 10)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "los')  # killed in the middle of a line
    Log(tmp_path, MAIN, 2, "none", {}).record(3, loss=0.5)
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 0.1), (2, 0.2), (3, 0.5)]


def test_damaged_lines_of_a_continued_log_are_dropped_and_counted(tmp_path):
    log = Log(tmp_path, MAIN, 0, "none", {})
    for step, spoilt in enumerate((b"\0\0\xff", b'{"step": 1, "lo', b'{"loss": 1}', b"[1]", b'{"step": null}', b"3")):
        log.record(step, loss=0.5)
        with open(tmp_path / "metrics.jsonl", "ab") as file:
            file.write(spoilt + b"\n")
    Log(tmp_path, MAIN, 4, "none", {})
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    assert "metrics.jsonl: 6 lines are damaged and were dropped\n" in (tmp_path / "log.txt").read_text()


def test_a_folder_removed_during_a_run_is_made_again(tmp_path):
    folder = tmp_path / "results" / "run"
    folder.mkdir(parents=True)
    log = Log(folder, MAIN, 0, "none", {})
    for step, write in enumerate((lambda: log.record(1, loss=0.5), lambda: log.say("still here"))):
        shutil.rmtree(folder.parent)
        write()
        assert (folder / ("metrics.jsonl", "log.txt")[step]).read_text()


def test_other_processes_log_nothing(tmp_path):
    log = Log(tmp_path, World(1, 2, torch.device("cpu")), 0, "none", {})
    log.say("x")
    log.record(1, loss=1)
    log.image(1, tmp_path / "p.png")
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_failing_tracker_is_disabled_and_the_run_goes_on(tmp_path):
    class Broken(NoTracker):
        def scalars(self, step, values):
            calls.append(step)
            raise RuntimeError("no server")

    calls, log = [], Log(tmp_path, MAIN, 0, "none", {})
    log.tracker = Broken(tmp_path, {}, 0)
    for step in (1, 2):
        log.record(step, loss=0.5)
    assert calls == [1]
    assert (tmp_path / "log.txt").read_text().count("tracker disabled after an error: no server") == 1
    assert len(read_metrics(tmp_path)) == 2


def test_wandb_mirrors_scalars_and_previews_and_a_continued_run_continues_its_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder, ids = tmp_path / "my-run", []
    folder.mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "p.png")
    for done in (0, 2):
        log = Log(folder, MAIN, done, "wandb", {"lr": 0.1})
        run = log.tracker.run
        with mock.patch.object(run, "log", wraps=run.log) as logged:
            log.record(done + 2, loss=done / 10)
        logged.assert_called_once_with({"loss": done / 10}, step=done + 2)
        log.image(done + 2, tmp_path / "p.png")
        assert (run.name, dict(run.config)) == ("my-run", {"lr": 0.1})
        assert len(list(folder.glob(f"wandb/latest-run/files/media/images/preview_{done + 2}_*.png"))) == 1
        ids.append(run.id)
        log.close()
        wandb.teardown()  # as at the end of a process: all is written
    assert ids == [(folder / "wandb_run_id").read_text()] * 2
    assert "tracker disabled" not in (folder / "log.txt").read_text()
