"""Checkpoints: written whole or not at all, read without trusting a pickle, and describing themselves.

A checkpoint is a dict with DiT's keys and more:
    model, ema      state dicts of the trained network and of its moving average
    opt             the optimizer's state
    args            the flags of the run
    step, …         how many optimizer steps were taken, and the rest of `Training`
    spec            plain dict of how to rebuild what sampling needs:
        model           {"name", "args"}: NETWORKS[name](**args)
        diffusion       arguments of create_diffusion
        vae             of load_autoencoder;  vae_sha256: of its weights, where train.py trained it
        image_size      (H, W);  channels: of an image
        classes         names, in the order of their ids
        sampling        None of an autoencoder; else recommended {"sampler", "num_sampling_steps", "cfg_scale",
                        "cfg_channels", "guidance_interval", "dynamic_thresholding"}; the last two may be missing
"""

import argparse
import errno
import os
import pickle
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline.spec import build_model, describe_bare_weights
from runtime.files import HashingFile, digest, digest_file, download, replace_text
from small_models import Autoencoder_models

# DiT's published weights; they carry their own non-commercial licence (CC BY-NC 4.0).
PUBLISHED = {
    name: f"https://dl.fbaipublicfiles.com/DiT/models/{name}" for name in ("DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt")
}

# --- one file --------------------------------------------------------------------------------------


def save(path: Path, state: dict) -> None:
    """Write a checkpoint and, beside it, `{name}.sha256`, as sha256sum does and checks it.

    Whoever reads `path` finds the whole of it or nothing, even after a power cut.

    Raises:
        OSError: the disk is full, or cannot be written to; no part of the file is left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    file = None
    try:
        with open(temporary, "wb") as raw:
            file = HashingFile(raw)
            torch.save(state, file)
            raw.flush()
            os.fsync(raw.fileno())
        digest_file(path).unlink(missing_ok=True)  # of the file that is replaced: better none than a wrong one
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        replace_text(digest_file(path), f"{file.sha256.hexdigest()}  {path.name}\n")
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else file and file.error
        if cause is None:
            raise
        raise OSError(f"cannot write the checkpoint {path}: {cause.strerror}") from None


class DamagedError(ValueError):
    """A file is not the checkpoint that was written."""


def verify(path: Path, flag: str) -> None:
    """DamagedError where a checkpoint is not what its sha256 says. Files without one, such as DiT's, pass."""
    if not digest_file(path).is_file():
        return
    if digest_file(path).read_text().split()[:1] != [digest(path)]:
        raise DamagedError(f"{flag} {path} is damaged: its sha256 is not that of {digest_file(path).name}")


def load(path: str | Path, flag: str = "--ckpt") -> dict:
    """Read a `.pt` or `.safetensors` file onto the CPU. Nothing in it is executed.

    Tensors of a `.pt` are mapped: only what is used takes memory, and processes of one machine share it.

    Raises: (`flag` is named in the message)
        FileNotFoundError: there is no such file.
        DamagedError: it is no checkpoint, or no longer the one that was written.
        ValueError: it holds more than weights and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{flag} {path} does not exist")
    verify(path, flag)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True,  # DiT's own trainer stores a Namespace
                               mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "unsupported global" in str(error).lower():
            raise ValueError(f"{flag} {path} holds objects other than weights and plain values; nothing was executed") from None
        raise DamagedError(f"{flag} {path} is truncated or no checkpoint") from None
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise  # the file may be good
        raise DamagedError(f"{flag} {path} is truncated or no checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{flag} {path} holds a {type(state).__name__}, not a dict of weights")
    return state


def find_model(name: str | Path) -> dict:
    """The weights of a checkpoint (its EMA, where it has one), by path or by the name of a published file."""
    return weights_of(load(resolve(name)), name)


def resolve(name: str | Path, flag: str = "--ckpt") -> Path:
    """The file that a path, a run's folder (its newest) or the name of a published file stands for."""
    if str(name) in PUBLISHED and not Path(name).is_file():
        return download(str(name), PUBLISHED[name], "DiT's weights are licensed CC BY-NC 4.0", zipfile.is_zipfile)
    if Path(name).is_dir():
        newest = latest(Path(name))
        if newest is None:
            raise FileNotFoundError(f"{flag} {name}: the folder holds no checkpoints/*.pt")
        return newest
    return Path(name)


def steps_of(folder: Path) -> list[Path]:
    """The numbered checkpoints of a run's folder, oldest first."""
    return sorted((folder / "checkpoints").glob("[0-9]*.pt"), key=lambda path: int(path.stem))


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder."""
    return next(reversed(steps_of(folder)), None)


def weights_of(state: dict, source: str | Path) -> dict:
    """The state dict in a checkpoint: its EMA, else its model, else itself."""
    weights = state.get("ema", state.get("model", state))
    if not isinstance(weights, dict) or not weights or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        raise ValueError(f"checkpoint {source} holds no state dict: neither 'ema' nor 'model' nor weights alone")
    return weights


# --- from a file to a network ----------------------------------------------------------------------


@dataclass
class Restored:
    """A network in evaluation mode with its EMA weights, and the spec of all that sampling needs beside it."""

    model: nn.Module
    spec: dict
    path: Path

    @property
    def name(self) -> str:
        """Run and step, or the file's name."""
        if self.path.parent.name == "checkpoints":
            return f"{self.path.parent.parent.resolve().name}-{self.path.stem}"
        return self.path.stem

    def sha256(self) -> str:
        """Of the file: what stands beside it, which `load` has compared with it, else counted now."""
        beside = digest_file(self.path)
        return beside.read_text().split()[0] if beside.is_file() else digest(self.path)


def restore(ckpt: str | Path | None, model: str | None = None, image_size: int | None = None, num_classes: int | None = None,
            vae: str | None = None, bare_vae: str = "mse", bare_cfg_scale: float = 4.0) -> Restored:
    """Rebuild what a checkpoint holds.

    Args:
        ckpt: a path, the name of a published file, or None for the published DiT-XL/2 of `image_size`.
        model, image_size, num_classes: describe bare weights (default: DiT-XL/2, 256, 1000); beside a checkpoint that
            describes itself they must agree with it.
        vae: the autoencoder, in place of the checkpoint's.
        bare_vae, bare_cfg_scale: recommended for bare weights.
    """
    if ckpt is None:
        ckpt = f"DiT-XL-2-{image_size or 256}x{image_size or 256}.pt"
        if model not in (None, "DiT-XL/2") or ckpt not in PUBLISHED:
            raise ValueError(f"--ckpt is needed: only DiT-XL/2 at --image-size 256 and 512 is published, not "
                             f"{model or 'DiT-XL/2'} at {image_size or 256}")
    path = resolve(ckpt)
    state = load(path)
    spec = dict(state["spec"]) if "spec" in state else describe_bare_weights(
        state, model, image_size, num_classes, bare_vae, bare_cfg_scale)
    if missing := {"model", "diffusion", "vae", "image_size", "channels", "classes", "sampling"} - set(spec):
        raise ValueError(f"checkpoint {path}: its description lacks {', '.join(sorted(missing))}")
    agree("--model", model, spec["model"]["name"], ckpt)
    agree("--image-size", image_size, spec["image_size"][0], ckpt)
    agree("--num-classes", num_classes, len(spec["classes"]), ckpt)
    spec["vae"] = vae or spec["vae"]
    return Restored(rebuild(spec["model"], weights_of(state, path), path), spec, path)


def restore_network(source: str) -> nn.Module:
    """The network of an autoencoder that train.py trained, with its EMA weights, from its checkpoint or run."""
    path = resolve(source, "--vae")
    state = load(path, "--vae")
    name = state["spec"]["model"]["name"] if isinstance(state.get("spec"), dict) else "nothing that describes itself"
    if name not in Autoencoder_models:
        raise ValueError(f"--vae {path} holds {name}, not one of {', '.join(Autoencoder_models)}")
    return rebuild(state["spec"]["model"], weights_of(state, path), path)


def agree(flag: str, given: object, stored: object, ckpt: str) -> None:
    if given is not None and given != stored:
        raise ValueError(f"{flag} {given} contradicts the checkpoint {ckpt}, which was trained with {stored}")


def rebuild(description: dict, weights: dict, source: Path) -> nn.Module:
    """A network of these weights, to evaluate."""
    with torch.device("meta"):  # initial weights would take time, 675 M of them in a DiT-XL
        network = build_model(description)
    load_weights(network.to_empty(device="cpu"), weights, source)
    return network.eval().requires_grad_(False)


def load_weights(network: nn.Module, weights: dict, source: Path) -> None:
    """Load all of a state dict; ValueError that names the first differences where it is of another network."""
    own = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in weights.items()}
    if own != given:
        differences = [f"{key} is {given.get(key, 'missing')} where the model has {own.get(key, 'nothing')}"
                       for key in sorted(own | given) if own.get(key) != given.get(key)]
        raise ValueError(f"checkpoint {source} is of another architecture ({len(differences)} differences, first: "
                         f"{differences[0]}); --model, --image-size and --num-classes describe bare weights")
    network.load_state_dict(weights)
