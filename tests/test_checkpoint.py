import argparse
import contextlib
import hashlib
import multiprocessing
import os
import pickle
import signal

import pytest
import torch
from foreign import ForeignNet

from models import DiT_models
from pipeline import checkpoint
from pipeline.settings import SamplingSettings
from pipeline.spec import BareWeights, ModelSpec, Spec
from runtime import UserError


def test_a_checkpoint_is_whole_or_absent_when_the_writer_dies(tmp_path, monkeypatch):
    """Killed in the middle of writing, the writer leaves the old file readable and nothing under a checkpoint's name."""
    def die_half_way(state, file):
        file.write(b"PK half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save(tmp_path / "0000001.pt", {"step": 1})
    monkeypatch.setattr(torch, "save", die_half_way)
    writer = multiprocessing.get_context("fork").Process(target=checkpoint.save, args=(tmp_path / "0000002.pt", {"step": 2}))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert any(b"half" in path.read_bytes() for path in tmp_path.iterdir())  # it died where it was meant to
    assert [path.name for path in tmp_path.glob("[0-9]*.pt")] == ["0000001.pt"]
    assert checkpoint.load(tmp_path / "0000001.pt") == {"step": 1}


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path):
    path, trace = tmp_path / "evil.pt", tmp_path / "executed"
    for write in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))):
        write({"ema": Exploit(trace)}, path)
        with pytest.raises(ValueError, match=r"evil\.pt holds objects other than weights"):
            checkpoint.load(path)
        assert not trace.exists()
    with contextlib.suppress(RuntimeError):  # a legacy file is executed before its magic number is missed
        torch.load(path, weights_only=False)
    assert trace.exists()  # the exploit is a real one


def test_a_truncated_file_and_a_changed_one_are_named(tmp_path):
    path = tmp_path / "cut.pt"
    checkpoint.save(path, {"w": torch.randn(1000)})
    whole = path.read_bytes()
    path.write_bytes(whole[:2000] + b"x" + whole[2001:])
    with pytest.raises(checkpoint.DamagedError, match=r"cut\.pt is damaged: its sha256"):
        checkpoint.load(path)
    path.with_name("cut.pt.sha256").unlink()
    for share in (0.0, 0.1, 0.5, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(checkpoint.DamagedError, match=r"cut\.pt is truncated or not a checkpoint"):
            checkpoint.load(path)


def test_only_another_sha256_makes_a_checkpoint_damaged(tmp_path):
    path, beside = tmp_path / "x.pt", tmp_path / "x.pt.sha256"
    checkpoint.save(path, {"w": torch.ones(3)})
    right = beside.read_text()
    assert right.split() == [hashlib.sha256(path.read_bytes()).hexdigest(), "x.pt"]
    for content in (b"", b"\n", b"not one", right.upper().encode(), b"\xff" + right.encode(), f"*{right}".encode("utf-16")):
        beside.write_bytes(content)
        checkpoint.load(path)
    for content in (b"AB" * 32, b"\xff " + b"0" * 64, b"a" * 64 + b"  x.pt"):
        beside.write_bytes(content)
        with pytest.raises(checkpoint.DamagedError):
            checkpoint.load(path)


def test_a_file_is_hashed_once_and_by_one_process_of_a_machine(tmp_path, monkeypatch):
    hashed, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: hashed.append(1) or digest(*args))
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"w": torch.ones(1000)})
    for _ in range(2):
        checkpoint.load(path)
    assert len(hashed) == 1
    checkpoint.save(path, {"w": torch.zeros(1000)})
    checkpoint.load(path)
    assert len(hashed) == 2
    (tmp_path / "y.pt").write_bytes(path.read_bytes())
    (tmp_path / "y.pt.sha256").write_text("0" * 64)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    checkpoint.load(tmp_path / "y.pt")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(checkpoint.DamagedError):
        checkpoint.load(tmp_path / "y.pt")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("RANK")  # this process is alone
    with pytest.raises(checkpoint.DamagedError):
        checkpoint.load(tmp_path / "y.pt")
    assert len(hashed) == 3


def test_a_missing_file_and_one_without_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt does not exist"):
        checkpoint.find_model(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match="holds no checkpoints"):
        checkpoint.find_model(tmp_path)
    for content, words in (({"epoch": 3}, r"x\.pt holds no state dict"), ([1, 2], "holds a list")):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=words):
            checkpoint.find_model(tmp_path / "x.pt")


def test_bare_published_weights_load_strictly_with_dits_defaults(tmp_path, tiny_preset):
    torch.save(tiny_preset, tmp_path / "bare.pt")
    restored = checkpoint.restore(tmp_path / "bare.pt", BareWeights(model="DiT-tiny", image_size=64, num_classes=10))
    assert restored.spec.sampling.cfg_channels == 3
    assert (restored.spec.vae, restored.spec.sampling.cfg_scale) == ("mse", 4.0)
    assert all(torch.equal(value, tiny_preset[key]) for key, value in restored.model.state_dict().items())
    assert not restored.model.training


def test_a_file_of_dits_own_trainer_loads_with_its_flags(tmp_path, tiny_preset):
    """Its `args` is an argparse.Namespace, and its ema is what is sampled from."""
    raw = {key: torch.zeros_like(value) for key, value in tiny_preset.items()}
    args = argparse.Namespace(model="DiT-tiny", image_size=64, num_classes=10, vae="ema")
    torch.save({"model": raw, "ema": tiny_preset, "opt": {}, "args": args}, tmp_path / "0000001.pt")
    restored = checkpoint.restore(tmp_path / "0000001.pt")
    assert restored.spec.vae == "ema"
    assert torch.equal(restored.model.state_dict()["pos_embed"], tiny_preset["pos_embed"])


def test_other_weights_and_flags_are_refused(tmp_path, tiny_preset, gaussian_run):
    path = tmp_path / "bare.pt"
    torch.save(tiny_preset, path)
    assert checkpoint.restore(gaussian_run, BareWeights("DiT-S/2", 8, 5)).name == "g"
    for ckpt, bare, words in (
            (path, BareWeights("DiNext-S/2", 64, 10), r"another architecture \(143 differences"),
            (path, BareWeights("DiT-tiny", 64, 7), r"y_embedder\.embedding_table\.weight"),
            (gaussian_run, BareWeights(model="DiT-B/2"), "`model` DiT-B/2 contradicts"),
            (gaussian_run, BareWeights(image_size=256), "`image_size` 256 contradicts"),
            (gaussian_run, BareWeights(num_classes=1000), "`num_classes` 1000 contradicts"),
            (None, BareWeights(image_size=64), "`ckpt` is needed"),  # only DiT-XL/2 at the published sizes needs no file
            (None, BareWeights(model="DiNext-S/2"), "`ckpt` is needed")):
        with pytest.raises(UserError, match=words):
            checkpoint.restore(ckpt, bare)


def test_published_names_are_downloaded_once_to_the_cache(tmp_path, monkeypatch, capsys):
    source, cache, name = tmp_path / "server.pt", tmp_path / "cache", "DiT-XL-2-256x256.pt"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(cache))
    monkeypatch.setitem(checkpoint.PUBLISHED, name, f"file://{source}")
    source.write_bytes(b"PK half")
    with pytest.raises(OSError, match="cannot download"):
        checkpoint.find_model(name)
    assert list((cache / "checkpoints").iterdir()) == []
    torch.save({"w": torch.ones(2)}, source)
    assert checkpoint.find_model(name)["w"].tolist() == [1, 1]
    source.unlink()
    assert checkpoint.find_model(name)["w"].tolist() == [1, 1]
    assert "licensed" in capsys.readouterr().out


def test_wrong_sizes_and_arguments_of_bare_weights_are_a_user_s_errors(tmp_path, tiny_preset):
    """models.py knows no UserError; whoever builds a network from a file makes one of its ValueError."""
    torch.save(tiny_preset, tmp_path / "bare.pt")
    with pytest.raises(UserError, match=r"bare\.pt: input_size \(9, 9\) .*multiples of 8"):
        checkpoint.restore(tmp_path / "bare.pt", BareWeights("DiT-S/8", image_size=72, num_classes=4))
    spec = BareWeights("DiT-S/2", 64, 4).spec({}).to_dict()
    for change, words in ((dict(model=spec["model"] | {"args": {"gone": 3}}), "gone"), (dict(model="DiT"), "lacks args, class"),
                          (dict(image_size=None), "NoneType"),
                          (dict(sampling=spec["sampling"] | {"churn": 1}), "unknown settings of sampling: churn")):
        torch.save({"ema": tiny_preset, "spec": spec | change}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=f"x.pt: .*{words}"):
            checkpoint.restore(tmp_path / "x.pt")


def test_strangers_beside_numbered_checkpoints_are_left_alone(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("0000001", "0000002-copy", "0000020_2", "best"):
        checkpoint.save(tmp_path / "checkpoints" / f"{name}.pt", {})
    assert [path.name for path in checkpoint.steps_of(tmp_path)] == ["0000001.pt"]


def save_foreign(path, network, **args):
    """A checkpoint of a class of one's own, registered as Foreign."""
    spec = Spec(ModelSpec.of_preset("Foreign", args), {"objective": "flow"}, "pixels", (8, 8), 1, list(map(str, range(10))),
                SamplingSettings(sampler="euler"))
    checkpoint.save(path, {"ema": network.state_dict(), "spec": spec.to_dict()})


class Tabled(ForeignNet):
    """Besides the buffer that is not stored, it has a tensor in a list."""

    def __init__(self, **args):
        super().__init__(**args)
        self.tables = [torch.full((1,), 3.0)]

    def forward(self, x, t, y):
        return super().forward(x, t, y) * self.tables[0]


def test_what_a_checkpoint_does_not_store_is_what_the_constructor_computes(tmp_path, monkeypatch):
    """Buffers with persistent=False and other tensors; `.item()` in the constructor. The weights are not drawn first."""
    monkeypatch.setitem(DiT_models, "Foreign", Tabled)
    torch.manual_seed(0)
    network = Tabled(drop_path=0.1).eval()
    save_foreign(tmp_path / "x.pt", network, drop_path=0.1)
    state = torch.get_rng_state()
    restored = checkpoint.restore(tmp_path / "x.pt").model
    assert torch.equal(torch.get_rng_state(), state)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 10])
    assert torch.equal(restored(x, t, y), network(x, t, y))
    assert restored.blocks[1].drop_path == network.blocks[1].drop_path > 0


def test_a_bug_in_a_constructor_keeps_its_traceback_and_a_wrong_argument_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(DiT_models, "Foreign", ForeignNet)
    save_foreign(tmp_path / "x.pt", ForeignNet())
    state = checkpoint.load(tmp_path / "x.pt")
    for bug in (RuntimeError, TypeError, ValueError):
        def broken(self, *args, error=bug("a bug"), **kwargs):
            raise error
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Embedding, "__init__", broken)
            with pytest.raises(bug, match="a bug") as caught:
                checkpoint.restore(tmp_path / "x.pt")
        assert isinstance(caught.value, UserError) == (bug is ValueError)  # ValueError: a wrong value
    state["spec"]["model"]["args"]["gone"] = 3
    checkpoint.save(tmp_path / "x.pt", state)
    with pytest.raises(UserError, match=r"x\.pt: ForeignNet: got an unexpected keyword argument 'gone'"):
        checkpoint.restore(tmp_path / "x.pt")
