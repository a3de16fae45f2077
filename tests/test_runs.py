import subprocess
import sys

import pytest
import torch
from conftest import ROOT, golden_dit

from models import DiT
from pipeline import checkpoint
from training.runs import init_from, new_folder, open_run, save_step
from training.state import LossMeter, OptimizerArgs, Training


def test_runs_are_numbered_named_locked_and_found_again_by_a_restart(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch-a")
    first = open_run(tmp_path, None, "DiT-XL/2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch-b")
    assert [first.name, open_run(tmp_path, None, "DiT-XL/2").name] == ["000-DiT-XL-2", "001-DiT-XL-2"]
    with monkeypatch.context() as restart:
        restart.setenv("TORCHELASTIC_RUN_ID", "launch-a")
        restart.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert open_run(tmp_path, None, "DiT-XL/2") == first
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path; from training.runs import open_run; open_run(Path({str(tmp_path)!r}), "mine", "DiT-XL/2")"""
    open_run(tmp_path, "mine", "DiT-XL/2")
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UserError: another process is at work in" in second.stderr


def test_the_newest_and_every_mth_checkpoint_are_kept(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    def names():
        return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())

    checkpoint.save(tmp_path / "checkpoints" / "best.pt", {"step": 5})
    for step in (5, 10, 13, 15, 20, 25):  # 13: a run that was stopped there
        save_step(tmp_path, {"step": step}, keep_last=2, every=10)
    kept = [f"{name}.pt" for name in ("0000010", "0000020", "0000025", "best")]
    assert names() == sorted(kept + [f"{name}.sha256" for name in kept])
    assert checkpoint.latest(tmp_path).name == "0000025.pt"
    save_step(tmp_path, {"step": 30}, keep_last=0, every=0)
    assert len(names()) == 10


def begun(network):
    return Training.begin(network, LossMeter(), 1e-3, OptimizerArgs())


def test_init_from_takes_what_fits_and_says_so(tmp_path, tiny_preset):
    torch.save(tiny_preset, tmp_path / "w.pt")
    kwargs, _ = golden_dit()
    training = begun(DiT(**{**kwargs, "num_classes": 3}))
    fresh = training.model.y_embedder.embedding_table.weight.clone()
    message = init_from(training, tmp_path / "w.pt")
    assert "41 of 42 tensors" in message
    assert "fresh: y_embedder.embedding_table.weight" in message
    for network in (training.model, training.ema):
        assert torch.equal(network.y_embedder.embedding_table.weight, fresh)
        assert torch.equal(network.blocks[0].attn.qkv.weight, tiny_preset["blocks.0.attn.qkv.weight"])
    with pytest.raises(ValueError, match="none of its"):
        init_from(begun(torch.nn.Linear(2, 2)), tmp_path / "w.pt")


def test_folders_of_other_names_do_not_count(tmp_path):
    for name in ("2024run-foo", "2026-11-23", "007-notes", "003-DiT-S-2", "x"):
        (tmp_path / name).mkdir()
    assert new_folder(tmp_path, "DiNext-S-2").name == "004-DiNext-S-2"
    assert new_folder(tmp_path, "DiNext-S-2").name == "005-DiNext-S-2"
