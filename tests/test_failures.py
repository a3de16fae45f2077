"""A run that fails is saved first where its state is sound; steps whose numbers are not finite are skipped, and not saved."""

import contextlib
import signal
import time
from functools import partial

import pytest
import saboteurs
from conftest import train_here
from foreign import ForeignNet
from test_interruptions import FLAGS, assert_as_unbroken, checkpoints, errors, folder, newest, start

import train
from models import DiT_models
from pipeline import checkpoint

# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("saboteur", "ending", "step"), [
    (saboteurs.data_gone, 2, 4), (saboteurs.bug_in_step, TypeError, 4), (saboteurs.bug_in_preview, TypeError, 5),
    (partial(saboteurs.bug_in_step, error=KeyboardInterrupt), 130, 4)])
def test_what_ends_a_run_that_has_taken_a_step_saves_first_and_it_goes_on_exactly(
        saboteur, ending, step, tmp_path, monkeypatch, run_sabotaged):
    """In the second micro-batch: BatchNorm's statistics are those of the first one already."""
    monkeypatch.setitem(DiT_models, "Foreign", ForeignNet)
    flags = [*FLAGS, "--model", "Foreign", "--model-args", "{}", "--max-steps", 8, "--preview-every", 5, "--grad-accum", 2]
    with pytest.raises(TypeError, match="a bug") if ending is TypeError else contextlib.nullcontext():
        assert run_sabotaged(saboteur, *flags).returncode == ending
    assert checkpoints(tmp_path) == [step]
    assert f"Saved step {step}" in (folder(tmp_path) / "log.txt").read_text()
    assert run_sabotaged(saboteurs.nothing, *flags).returncode == 0
    (tmp_path / "unbroken").mkdir()
    train_here(tmp_path / "unbroken", *flags)
    assert_as_unbroken(tmp_path, tmp_path / "unbroken")


@pytest.mark.parametrize("saboteur", [saboteurs.bug_in_optimizer, partial(saboteurs.bug_in_step, step=0)])
def test_half_a_step_and_a_run_without_a_step_are_not_saved(saboteur, tmp_path, run_sabotaged):
    with pytest.raises(TypeError, match="a bug"):
        run_sabotaged(saboteur, *FLAGS, "--max-steps", 9)
    assert checkpoints(tmp_path) == []
    assert "Saved" not in (folder(tmp_path) / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_on_one_process_is_saved_by_the_main_one_alone(tmp_path, rank):
    result = start(tmp_path, f"data_gone:{rank}", "--max-steps", 100, nproc=2, check=False)
    assert len(errors(result)) >= 1
    assert "the data's drive is gone" in result.stderr
    assert checkpoints(tmp_path) == [4]
    assert start(tmp_path, "nothing", "--max-steps", 6, nproc=2).returncode == 0


@pytest.mark.slow
def test_a_silent_process_ends_the_run_after_a_time_that_can_be_set(tmp_path):
    began = time.monotonic()
    result = start(tmp_path, "rank_1_silent", "--max-steps", 9, nproc=2, check=False, DINEXT_TIMEOUT="3")
    assert time.monotonic() - began < 120
    (line,) = errors(result)
    assert "lost another process" in line
    assert checkpoints(tmp_path) == [3]


# --- numbers that are not finite -----------------------------------------------------------------


def test_a_run_whose_last_step_is_skipped_is_saved_and_deletes_nothing(tmp_path, run_sabotaged):
    """A streak below the limit is what the user allows, and the same command would meet it again for ever."""
    flags = [*FLAGS, "--max-steps", 6, "--ckpt-every", 2, "--keep-last", 1]
    assert run_sabotaged(lambda patch: saboteurs.nan_loss(patch, 0, 6), *flags).returncode == 0
    assert checkpoints(tmp_path) == [4, 6]
    assert run_sabotaged(saboteurs.nothing, *flags).returncode == 0


def test_too_many_skipped_steps_in_a_row_end_the_run_which_a_restart_continues(tmp_path, run_sabotaged):
    """A step after the last one that is allowed, between two lines of the log. No checkpoint is written or deleted."""
    flags = [*FLAGS, "--max-steps", 9, "--log-every", 9, "--ckpt-every", 2, "--keep-last", 1, "--val-every", 4,
             "--optimizer-args", '{"max_skipped_steps": 3}']
    (line,) = errors(run_sabotaged(lambda patch: saboteurs.nan_loss(patch, 0, 1, *range(3, 9)), *flags))
    assert "3 steps in a row" in line
    assert "results/r/checkpoints/0000002.pt" in line
    assert [path.name for path in sorted((folder(tmp_path) / "checkpoints").iterdir())] == ["0000002.pt", "0000002.pt.sha256"]
    assert run_sabotaged(saboteurs.nothing, *flags).returncode == 0
    assert checkpoints(tmp_path) == [9]


def test_within_a_streak_nothing_is_saved_and_what_was_due_is_saved_after_it(tmp_path, run_sabotaged):
    def poisoned(*steps, signal_at=0):
        def sabotage(patch):
            saboteurs.nan_loss(patch, 0, *steps)
            saboteurs.before(patch, train.Trainer, "finish_step",
                             lambda run: run.state.step == signal_at and saboteurs.kill(signal.SIGTERM))
        return sabotage

    flags = [*FLAGS, "--ckpt-every", 2, "--max-steps"]
    assert run_sabotaged(poisoned(2), *flags, 5).returncode == 0
    assert checkpoints(tmp_path) == [3, 4, 5]
    result = run_sabotaged(poisoned(2, 3, signal_at=7), *flags, 12)  # steps 7 and 8
    assert "Stopped by SIGTERM" in result.stdout
    assert checkpoints(tmp_path) == [3, 4, 5, 6, 9]
    limit = ["--optimizer-args", '{"max_skipped_steps": 1}']
    (line,) = errors(run_sabotaged(poisoned(2), *flags, 11, *limit))
    assert "1 steps in a row" in line
    assert "0000010.pt" in line
    assert checkpoints(tmp_path) == [3, 4, 5, 6, 9, 10]


def test_a_validation_within_a_streak_does_not_count(tmp_path, run_sabotaged):
    def sabotage(patch):
        saboteurs.nan_loss(patch, 0, 2)
        saboteurs.worse_validations(patch)

    assert run_sabotaged(sabotage, *FLAGS, "--max-steps", 3, "--val-every", 1).returncode == 0
    best = checkpoint.load(folder(tmp_path) / "checkpoints" / "best.pt")
    assert (best["step"], best["best"]) == (3, 2.0)


def test_patience_ends_a_run_that_no_longer_improves_and_best_is_its_best(tmp_path, run_sabotaged):
    flags = [*FLAGS, "--max-steps", 9, "--val-every", 1, "--optimizer-args", '{"patience": 2}']
    assert "Finished: results/r. Step 4 of 9" in run_sabotaged(saboteurs.worse_validations, *flags).stdout
    assert checkpoints(tmp_path) == [4]
    best = checkpoint.load(folder(tmp_path) / "checkpoints" / "best.pt")
    assert (best["step"], best["best"], newest(tmp_path)["best"]) == (2, 2.0, 2.0)
    assert "Step 4 of 9; 0 steps" in run_sabotaged(saboteurs.nothing, *flags).stdout
