"""Checkpoints: written completely or not at all, read without trusting a pickle, and describing themselves.

Reading has three stages: a name -> a path (`resolve`), a path -> what lies there (`open_source`), what lies there -> a network
(`read`, `restore`). pipeline/interchange.py has the formats. A training checkpoint is a dict with DiT's keys and more:
    model, ema      state dicts of the trained network and of its moving average
    opt             the optimizer's state
    args            the flags of the run
    step, …         how many optimizer steps were taken, and the rest of training/state.py's `Training`
    spec            what the checkpoint says of itself, see pipeline/spec.py

This file alone reads and writes the weights of networks. (export.py writes folders for diffusers by diffusers' own methods.)
"""

import argparse
import errno
import hashlib
import os
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.interchange import interpret
from pipeline.spec import OWN_VAE, BareWeights, Config, Contents, ModelSpec, Source, Spec, Statistics
from pipeline.weights import WithoutDraws, find_weights, load_weights, stripped
from runtime import UserError, files
from runtime.cli import WRONG_VALUE, prefix_errors
from runtime.files import sha256, sha256_file, write_json, write_text
from runtime.processes import of_launch
from small_models import Autoencoder_models

# DiT's published weights; they carry their own non-commercial licence (CC BY-NC 4.0).
PUBLISHED = {f"DiT-XL-2-{size}.pt": f"https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-{size}.pt"
             for size in ("256x256", "512x512")}

# The files that are fetched from a repository of the hub; and those that are fetched if these lack the weights.
HUB_FILES = ["*.json", "model.safetensors*", "heads.safetensors*", "*/*.json", "*/model.safetensors*",
             *(f"*/diffusion_pytorch_model{part}.{kind}" for part in ("", "-*-of-*") for kind in ("safetensors", "bin"))]
HUB_VARIANTS = ["*/diffusion_pytorch_model*fp16*", "*/diffusion_pytorch_model*bf16*"]

# --- one file ------------------------------------------------------------------------------------


def save(path: Path, state: dict) -> None:
    """Write a checkpoint and, beside it, `{name}.sha256`, as sha256sum does and checks it.

    Raises:
        OSError: the disk is full, or cannot be written to; no part of the file is left behind.
    """
    hashing = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # it may have been removed during the run
        with files.atomic(path) as file:
            hashing = files.HashingFile(file)
            torch.save(state, hashing)
            file.flush()
            os.fsync(file.fileno())
            sha256_file(path).unlink(missing_ok=True)  # of the replaced file: no sha256 is better than a wrong one
        write_text(sha256_file(path), f"{hashing.sha256.hexdigest()}  {path.name}\n")
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else hashing and hashing.error
        if cause is None:
            raise
        raise OSError(f"cannot write the checkpoint {path}: {cause.strerror}") from None


def save_folder(folder: Path, spec: Spec, weights: dict[str, Tensor], heads: dict[str, Tensor] | None = None) -> None:
    """Write a folder that describes itself: config.json, model.safetensors, heads.safetensors if there are any, and sha256s."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", spec.to_dict())
    for name, tensors in (("model.safetensors", weights), (HEADS, heads)):
        if tensors:
            save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
            write_text(sha256_file(folder / name), f"{sha256(folder / name)}  {name}\n")


class DamagedError(UserError):
    """A file is not a checkpoint, or has changed since it was written."""


def verify(path: Path) -> None:
    """Raises DamagedError if a checkpoint does not have the sha256 stored beside it. Files without one, such as DiT's, pass,
    and so do those whose file beside them is empty or holds something else.

    Of the processes that torchrun started on a machine, the first one checks: its error ends the others.
    """
    beside = sha256_file(path)
    if of_launch("LOCAL_RANK", 0) != 0 or not beside.is_file():
        return
    stored = re.search(r"\b[0-9a-f]{64}\b", beside.read_text(errors="replace").lower())
    if stored and stored[0] != sha256(path):
        raise DamagedError(f"{path} is damaged: its sha256 differs from the one in {beside.name}")


def load(path: str | Path) -> dict:
    """Read a `.pt` or `.safetensors` file onto the CPU. Nothing in it is executed.

    Tensors of a `.pt` are mapped: only what is used takes memory, and processes of one machine share it.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedError: it is not a checkpoint, or has changed since it was written.
        UserError: it holds other objects than weights and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}")
    verify(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):  # DiT's flags
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "unsupported global" in str(error).lower():
            raise UserError(f"{path} holds objects other than weights and plain values; nothing was executed") from None
        raise DamagedError(f"{path} is truncated or not a checkpoint") from None
    except Exception as error:  # a damaged file can raise any error
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise  # the file may be good
        raise DamagedError(f"{path} is truncated or not a checkpoint") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a dict of weights")
    return state


def find_model(name: str | Path) -> dict[str, Tensor]:
    """The weights of a checkpoint (its EMA, if it has one), by path or by the name of a published file."""
    return find_weights(load(resolve(name)), name)[0]


def resolve(name: str | Path) -> Path:
    """The path of a checkpoint's file, or of a folder that `open_source` reads.

    Args:
        name: a path; a run's folder (its newest checkpoint); a folder of export.py or of diffusers; the name of a
            published file; or a repository of the hub, user/repo or user/repo@revision, which is then downloaded.
    """
    path = Path(name)
    if str(name) in PUBLISHED and not path.is_file():
        return files.download(str(name), PUBLISHED[name], "DiT's weights are licensed CC BY-NC 4.0", zipfile.is_zipfile)
    if files.is_hub_id(str(name)):
        folder = files.download_folder(str(name), HUB_FILES)
        lacking = [part for part in ("transformer", "vae") if (folder / part).is_dir() and not component_file(folder / part)]
        return files.download_folder(str(name), HUB_FILES + HUB_VARIANTS) if lacking else folder
    if path.is_dir() and not (path / "config.json").is_file() and not (path / "model_index.json").is_file():
        if newest := latest(path):
            return newest
        raise FileNotFoundError(f"{name}: the folder holds no checkpoints/*.pt, no config.json and no model_index.json")
    if not path.exists():
        raise FileNotFoundError(f"{name} does not exist: it must be a file, the folder of a run or of export.py, "
                                f"{' or '.join(PUBLISHED)}, or user/repo of the hub")
    return path


def steps_of(folder: Path) -> list[Path]:
    """The numbered checkpoints of a run's folder, oldest first. Raises OSError if the folder cannot be read."""
    checkpoints = folder / "checkpoints"
    names = os.listdir(checkpoints) if checkpoints.is_dir() else []
    numbered = [checkpoints / name for name in names if re.fullmatch(r"\d+\.pt", name, re.ASCII)]
    return sorted(numbered, key=lambda path: int(path.stem))


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder."""
    return next(reversed(steps_of(folder)), None)


# --- a path -> what lies there ---------------------------------------------------------------------

CONFIGS = ("config.json", "model_index.json", "transformer/config.json", "scheduler/scheduler_config.json")
DIFFUSERS = "diffusion_pytorch_model"  # diffusers' name of a component's weights
HEADS = "heads.safetensors"  # beside our model.safetensors


def component_file(folder: Path) -> Path | None:
    """The file with the weights of one of diffusers' components, or the index of its parts; None if there is none.

    Full precision goes before a variant such as fp16.
    """
    kinds = ("safetensors", "bin")
    patterns = [*(f"{kind}{index}" for kind in kinds for index in ("", ".index.json")),
                *(pattern for kind in kinds for pattern in (f"{kind}.index.*.json", f"*.{kind}"))]
    return next((path for pattern in patterns for path in sorted(folder.glob(f"{DIFFUSERS}.{pattern}"))), None)


def variant_of(file: Path) -> str | None:
    """fp16 of diffusion_pytorch_model.fp16.safetensors, and of diffusion_pytorch_model.safetensors.index.fp16.json."""
    found = re.search(rf"^{DIFFUSERS}\.(?!safetensors|bin)(\w+)|\.index\.(\w+)\.json$", file.name)
    return found and (found[1] or found[2])


def parts_of(file: Path) -> list[Path]:
    """The file itself, or the parts that an index of diffusers names."""
    if file.suffix != ".json":
        return [file]
    with prefix_errors(f"{file} is damaged:", KeyError, AttributeError, TypeError):
        names = {Path(name).name for name in files.read_json(file)["weight_map"].values()}
    return [file.with_name(name) for name in sorted(names)]


def load_component(file: Path) -> dict[str, Tensor]:
    """The weights in a file of diffusers, or in the parts that its index names."""
    return {name: value for part in parts_of(file) for name, value in find_weights(load(part), part)[0].items()}


def open_source(path: Path) -> Source:
    """Read a file, or the files of a folder that belong to a network, whatever their format."""
    configs = {name: files.read_json(path / name) for name in CONFIGS if (path / name).is_file()}
    if path.is_dir():
        own = path / "model.safetensors"
        file = component_file(path / "transformer") if "model_index.json" in configs else own if own.is_file() else None
        vae = str(path / OWN_VAE) if (path / OWN_VAE).is_dir() else None
        variant = file and variant_of(file)
        facts = {"heads": {"ema": load(path / HEADS)}} if (path / HEADS).is_file() else {}
        return Source(file or path, load_component(file) if file else {}, facts, configs, vae,
                      remark=f"its transformer is there as the variant {variant} only" if variant else "")
    state = load(path)
    weights, remark = find_weights(state, path)
    facts = {} if weights is state else {name: value for name, value in state.items() if name not in ("model", "ema", "opt")}
    if "spec" in facts:  # names are as written, and so is what lies beside the weights
        return Source(path, weights, facts)
    return Source(path, stripped(weights), facts, {}, None, partial(read_latent_statistics, path.parent), remark)


def read_latent_statistics(folder: Path) -> Statistics | None:
    """Mean and standard deviation of each channel of latents, from LightningDiT's latents_stats.pt, if a folder has it."""
    path = folder / "latents_stats.pt"
    if not path.is_file():
        return None
    with prefix_errors(f"{path} is damaged:", KeyError, AttributeError, TypeError):
        stored = load(path)
        mean, std = (stored[name].flatten().tolist() for name in ("mean", "std"))
    return mean, std


# --- what lies there -> a network ------------------------------------------------------------------


def read(path: Path, bare: BareWeights) -> tuple[Source, Contents]:
    """What lies at a path, and the network in it.

    Raises:
        UserError, OSError: the format is unknown or the source incomplete, or `bare` contradicts it.
    """
    source = open_source(path)
    with prefix_errors(f"checkpoint {path}:", KeyError, AttributeError, *WRONG_VALUE):
        contents = interpret(source, bare)
    return source, contents._replace(remark="; ".join(filter(None, (contents.remark, source.remark))))


def label_drop_of(facts: Config, usual: float | None = None) -> float | None:
    """The label drop in a checkpoint's flags, `usual` if they do not name it; None if there are no flags of train.py's."""
    flags = facts.get("args")
    return flags.get("diffusion_args", {}).get("label_drop", usual) if isinstance(flags, dict) else None


def spec_of(state: dict, path: Path) -> Spec:
    """What a training checkpoint says of itself. UserError if it says nothing, or its description is not understood."""
    if "spec" not in state:
        raise UserError(f"{path} has no description of itself")
    with prefix_errors(f"checkpoint {path}:", KeyError, *WRONG_VALUE):
        return Spec.from_dict(state["spec"])


@dataclass
class Restored:
    """A network in evaluation mode with its EMA weights, and the spec of what sampling needs beside it."""

    model: nn.Module
    spec: Spec
    path: Path        # of the weights
    remark: str       # a sentence about what was assumed, or ""
    facts: Config     # what else a training checkpoint holds: args, step, …
    heads: dict[str, Tensor] = field(default_factory=dict)  # the weights of the heads that were trained with it

    @property
    def name(self) -> str:
        """Run and step, or the name of the file, of a folder, of a repository of the hub and its revision."""
        path = self.path
        if path.parent.name == "checkpoints":
            return f"{path.parent.parent.resolve().name}-{path.stem}"
        component = path.name.startswith(DIFFUSERS)
        if path.stem != "model" and not component:
            return path.stem
        folder = (path.parent.parent if component else path.parent).absolute()
        if folder.parent.name == "snapshots":  # models--user--repo/snapshots/revision
            return f"{folder.parents[1].name.removeprefix('models--')}-{folder.name[:7]}"
        return folder.name

    def sha256(self) -> str:
        """The sha256 of the file: from the file beside it, which `load` has checked, else computed now. Of several: of theirs.

        Several are the parts that an index names, and model.safetensors with heads.safetensors.
        """
        heads = [self.path.parent / HEADS] if (self.path.parent / HEADS).is_file() else []
        found = [beside.read_text().split()[0] if (beside := sha256_file(part)).is_file() else sha256(part)
                 for part in [*parts_of(self.path), *heads]]
        return found[0] if len(found) == 1 else hashlib.sha256(" ".join(found).encode()).hexdigest()


def restore(ckpt: str | Path | None, bare: BareWeights = BareWeights(), vae: str | None = None,
            name: str = "ckpt") -> Restored:
    """Rebuild what a checkpoint holds.

    Args:
        ckpt: see `resolve`; None for the published DiT-XL/2 of bare.image_size.
        bare: the description of weights that do not describe themselves; it must not contradict a checkpoint that does.
        vae: the autoencoder, in place of the checkpoint's.
        name: of the parameter, for errors.
    """
    if ckpt is None:
        size, model = bare.image_size or 256, bare.model or "DiT-XL/2"
        ckpt = f"DiT-XL-2-{size}x{size}.pt"
        if model != "DiT-XL/2" or ckpt not in PUBLISHED:
            raise UserError(f"`ckpt` is needed: only DiT-XL/2 at `image_size` 256 and 512 is published, not {model} at {size}")
    with prefix_errors(f"`{name}`"):
        source, (spec, weights, remark, heads) = read(resolve(ckpt), bare)
    stored = {"model": spec.model.name, "image_size": spec.image_size[0], "num_classes": len(spec.classes)}
    for entry, value in stored.items():
        if (given := getattr(bare, entry)) not in (None, value):
            raise UserError(f"`{entry}` {given} contradicts the checkpoint {ckpt}, which was trained with {value}")
    model = rebuild(spec.model, weights, source.path)
    if not spec.is_autoencoder and len(spec.classes) != model.num_classes:
        raise UserError(f"{source.path}: its description names {len(spec.classes)} classes, its network has "
                        f"{model.num_classes}")
    return Restored(model, spec.with_vae(vae), source.path, remark, source.facts, heads)


def restore_own_autoencoder(source: str) -> nn.Module:
    """An autoencoder that train.py trained, with its EMA weights, from its checkpoint, run or exported folder."""
    found, (spec, weights, *_) = read(resolve(source), BareWeights())
    if spec.model.name not in Autoencoder_models:
        raise UserError(f"{found.path} holds a {spec.model.name}, not one of {', '.join(Autoencoder_models)}")
    return rebuild(spec.model, weights, found.path)


def rebuild(model: ModelSpec, weights: dict[str, Tensor], source: Path) -> nn.Module:
    """The network in evaluation mode with these weights. What they lack, as some buffers, is what its constructor computes."""
    with prefix_errors(f"checkpoint {source}:", *model.wrong_values), torch.device("cpu"), WithoutDraws():
        network = model.build()
    load_weights(network, weights, source)
    return network.eval().requires_grad_(False)
