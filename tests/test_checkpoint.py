import argparse
import contextlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from models import DiT, DiT_models
from pipeline import checkpoint
from pipeline.spec import describe_bare_weights
from training.runs import init_from, open_run, save_step
from training.state import LossMeter, OptimizerArgs, Training

GOLDEN = Path(__file__).parent / "golden"


def golden_dit():
    """DiT's own tiny network: its arguments and state dict."""
    golden = np.load(GOLDEN / "dit_tiny_latent.npz")
    weights = {key.removeprefix("param/"): torch.from_numpy(golden[key]) for key in golden.files if key.startswith("param/")}
    return json.loads(str(golden["kwargs"])), weights


@pytest.fixture
def tiny_preset(monkeypatch):
    """The golden network under a name of the registry."""
    kwargs, weights = golden_dit()
    monkeypatch.setitem(DiT_models, "DiT-tiny", lambda **rest: DiT(**{**kwargs, **rest}))
    return weights


# --- files ---------------------------------------------------------------------------------------


def test_a_checkpoint_is_whole_or_absent_when_the_writer_dies(tmp_path):
    """Killed in the middle of writing, the writer leaves the old file readable and nothing under a checkpoint's name."""
    checkpoint.save(tmp_path / "0000001.pt", {"step": 1})
    code = f"""
import io, os, signal, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from pipeline import checkpoint
def die_half_way(state, file):
    file.write(b"PK half a checkpoint"); file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = die_half_way
checkpoint.save(Path({str(tmp_path)!r}) / "0000002.pt", dict(step=2))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert any(b"half" in path.read_bytes() for path in tmp_path.iterdir())  # it died where it was meant to
    assert [path.name for path in tmp_path.glob("[0-9]*.pt")] == ["0000001.pt"]
    assert checkpoint.load(tmp_path / "0000001.pt") == {"step": 1}


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, legacy):
    path, trace = tmp_path / "evil.pt", tmp_path / "executed"
    if legacy:
        path.write_bytes(pickle.dumps({"ema": Exploit(trace)}, protocol=2))
    else:
        torch.save({"ema": Exploit(trace)}, path)
    with pytest.raises(ValueError, match=r"evil\.pt holds objects other than weights"):
        checkpoint.load(path)
    assert not trace.exists()
    with contextlib.suppress(RuntimeError):  # a legacy file is executed before its magic number is missed
        torch.load(path, weights_only=False)  # the exploit is a real one
    assert trace.exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, share):
    path = tmp_path / "cut.pt"
    torch.save({"w": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"cut\.pt is truncated or no checkpoint"):
        checkpoint.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt does not exist"):
        checkpoint.find_model(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match="holds no checkpoints"):
        checkpoint.find_model(tmp_path)


def test_safetensors_are_read(tmp_path):
    save_file({"w": torch.arange(3.0)}, tmp_path / "w.safetensors")
    assert checkpoint.find_model(tmp_path / "w.safetensors")["w"].tolist() == [0, 1, 2]


# --- DiT's files ---------------------------------------------------------------------------------


def test_bare_published_weights_load_strictly_with_dits_defaults(tmp_path, tiny_preset):
    torch.save(tiny_preset, tmp_path / "bare.pt")
    restored = checkpoint.restore(tmp_path / "bare.pt", model="DiT-tiny", image_size=64, num_classes=10)
    assert restored.spec["sampling"]["cfg_channels"] == 3
    assert (restored.spec["vae"], restored.spec["sampling"]["cfg_scale"]) == ("mse", 4.0)
    assert all(torch.equal(value, tiny_preset[key]) for key, value in restored.model.state_dict().items())
    assert not restored.model.training


def test_a_file_of_dits_own_trainer_loads_with_its_flags(tmp_path, tiny_preset):
    """Its `args` is an argparse.Namespace, and its ema is what is sampled from."""
    raw = {key: torch.zeros_like(value) for key, value in tiny_preset.items()}
    args = argparse.Namespace(model="DiT-tiny", image_size=64, num_classes=10, vae="ema")
    torch.save({"model": raw, "ema": tiny_preset, "opt": {}, "args": args}, tmp_path / "0000001.pt")
    restored = checkpoint.restore(tmp_path / "0000001.pt")
    assert restored.spec["vae"] == "ema"
    assert torch.equal(restored.model.state_dict()["pos_embed"], tiny_preset["pos_embed"])


def test_1000_classes_get_imagenets_names(tmp_path):
    spec = describe_bare_weights({}, None, None, None, "ema", 1.5)
    assert spec["classes"][207] == "golden retriever"
    assert spec["model"] == {"name": "DiT-XL/2", "args": {"input_size": 32, "num_classes": 1000}}


def test_weights_of_another_architecture_are_refused(tmp_path, tiny_preset):
    torch.save(tiny_preset, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=r"another architecture \(143 differences"):
        checkpoint.restore(tmp_path / "bare.pt", model="DiNext-S/2", image_size=64, num_classes=10)
    with pytest.raises(ValueError, match=r"y_embedder\.embedding_table\.weight"):
        checkpoint.restore(tmp_path / "bare.pt", model="DiT-tiny", image_size=64, num_classes=7)


def test_a_file_without_weights_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt holds no state dict"):
        checkpoint.find_model(tmp_path / "x.pt")
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds a list"):
        checkpoint.find_model(tmp_path / "x.pt")


def test_only_the_published_sizes_need_no_checkpoint():
    with pytest.raises(ValueError, match="--ckpt is needed"):
        checkpoint.restore(None, image_size=64)
    with pytest.raises(ValueError, match="--ckpt is needed"):
        checkpoint.restore(None, model="DiNext-S/2")


def test_published_names_are_downloaded_once_to_the_cache(tmp_path, monkeypatch, capsys):
    source, cache = tmp_path / "server.pt", tmp_path / "cache"
    torch.save({"w": torch.ones(2)}, source)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(cache))
    name = "DiT-XL-2-256x256.pt"
    monkeypatch.setitem(checkpoint.PUBLISHED, name, f"file://{source}")
    assert checkpoint.find_model(name)["w"].tolist() == [1, 1]
    source.unlink()
    assert checkpoint.find_model(name)["w"].tolist() == [1, 1]
    assert "licensed" in capsys.readouterr().out


def test_a_broken_download_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    for url, content in (("half.pt", b"PK half"), ("missing.pt", None)):
        if content:
            (tmp_path / url).write_bytes(content)
        monkeypatch.setitem(checkpoint.PUBLISHED, "DiT-XL-2-256x256.pt", f"file://{tmp_path / url}")
        with pytest.raises(OSError, match="cannot download"):
            checkpoint.find_model("DiT-XL-2-256x256.pt")
    assert list((tmp_path / "cache" / "checkpoints").iterdir()) == []


# --- runs ----------------------------------------------------------------------------------------


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
    assert "ValueError: another process is at work in" in second.stderr
