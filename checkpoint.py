"""Checkpoints: written whole or not at all, read without trusting a pickle, and describing themselves.

A checkpoint is a dict with DiT's keys and two more:
    model, ema      state dicts of the trained network and of its moving average
    opt             the optimizer's state
    args            the flags of the run
    step            how many optimizer steps were taken
    spec            plain dict of how to rebuild what sampling needs:
        model           {"name", "args"}: DiT_models[name](**args)
        diffusion       arguments of create_diffusion
        vae             of load_autoencoder
        image_size      (H, W);  channels: of an image
        classes         names, in the order of their ids
        sampling        recommended {"sampler", "num_sampling_steps", "cfg_scale", "cfg_channels"}
"""

import argparse
import fcntl
import os
import pickle
import socket
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from models import DiT_models

# DiT's published weights; they carry their own non-commercial licence (CC BY-NC 4.0).
PUBLISHED = {
    name: f"https://dl.fbaipublicfiles.com/DiT/models/{name}" for name in ("DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt")
}

# --- one file ------------------------------------------------------------------------------------


def save(path: Path, state: dict) -> None:
    """Write a checkpoint. Whoever reads `path` finds the whole of it or nothing, even after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def load(path: str | Path, flag: str = "--ckpt") -> dict:
    """Read a `.pt` or `.safetensors` file onto the CPU. Nothing in it is executed.

    Raises: (`flag` is named in the message)
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, no checkpoint, or holds more than weights and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{flag} {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)  # DiT's own trainer stores a Namespace
    except pickle.UnpicklingError as error:
        foreign = "unsupported global" in str(error).lower()
        reason = "holds objects other than weights and plain values; nothing was executed" if foreign else (
            "is truncated or no checkpoint")
        raise ValueError(f"{flag} {path} {reason}") from None
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise ValueError(f"{flag} {path} is truncated or no checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{flag} {path} holds a {type(state).__name__}, not a dict of weights")
    return state


def download(name: str) -> Path:
    """The published weights of that name in torch's cache, fetched over https at the first time."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    print(f"Downloading {PUBLISHED[name]} (DiT's weights are licensed CC BY-NC 4.0) to {path}")
    try:
        torch.hub.download_url_to_file(PUBLISHED[name], str(temporary))
        if not zipfile.is_zipfile(temporary):
            raise OSError("the download is incomplete")
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot download {PUBLISHED[name]}: {error}; fetch it by other means and pass its path") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def find_model(name: str | Path) -> dict:
    """The weights of a checkpoint (its EMA, where it has one), by path or by the name of a published file."""
    return weights_of(load(resolve(name)), name)


def resolve(name: str | Path, flag: str = "--ckpt") -> Path:
    """The file that a path, a run's folder (its newest) or the name of a published file stands for."""
    if str(name) in PUBLISHED and not Path(name).is_file():
        return download(str(name))
    if Path(name).is_dir():
        newest = latest(Path(name))
        if newest is None:
            raise FileNotFoundError(f"{flag} {name}: the folder holds no checkpoints/*.pt")
        return newest
    return Path(name)


def weights_of(state: dict, source: str | Path) -> dict:
    """The state dict in a checkpoint: its EMA, else its model, else itself."""
    weights = state.get("ema", state.get("model", state))
    if not isinstance(weights, dict) or not weights or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        raise ValueError(f"checkpoint {source} holds no state dict: neither 'ema' nor 'model' nor weights alone")
    return weights


# --- from a file to a network --------------------------------------------------------------------


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
    network = build_model(spec["model"])
    load_weights(network, weights_of(state, path), path)
    return Restored(network.eval().requires_grad_(False), spec, path)


def agree(flag: str, given: object, stored: object, ckpt: str) -> None:
    if given is not None and given != stored:
        raise ValueError(f"{flag} {given} contradicts the checkpoint {ckpt}, which was trained with {stored}")


def describe_bare_weights(state: dict, model: str | None, image_size: int | None, num_classes: int | None, vae: str,
                          cfg_scale: float) -> dict:
    """The spec of weights that DiT's code wrote: an epsilon model on Stable Diffusion's latents."""
    stored = vars(state["args"]) if isinstance(state.get("args"), argparse.Namespace) else {}
    given = {key: value for key, value in (("model", model), ("image_size", image_size), ("num_classes", num_classes))
             if value is not None}
    args = {"model": "DiT-XL/2", "image_size": 256, "num_classes": 1000, "vae": vae} | given | stored
    model, image_size, num_classes = args["model"], args["image_size"], args["num_classes"]
    if image_size < 8 or image_size % 8 or num_classes < 1:
        raise ValueError(f"--image-size {image_size} must be a positive multiple of 8, --num-classes {num_classes} positive")
    return {
        "model": {"name": model, "args": {"input_size": image_size // 8, "num_classes": num_classes}},
        "diffusion": {},
        "vae": args["vae"],
        "image_size": (image_size, image_size),
        "channels": 3,
        "classes": imagenet_classes() if num_classes == 1000 else [str(i) for i in range(num_classes)],
        "sampling": {"sampler": "ddpm", "num_sampling_steps": "250", "cfg_scale": cfg_scale, "cfg_channels": 3},
    }


def imagenet_classes() -> list[str]:
    from timm.data import ImageNetInfo
    return ImageNetInfo().label_descriptions()


def build_model(description: dict) -> nn.Module:
    """{"name", "args"} -> a network."""
    if description["name"] not in DiT_models:
        raise ValueError(f"--model {description['name']} is unknown; allowed: {', '.join(DiT_models)}")
    return DiT_models[description["name"]](**description["args"])


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


def init_from(network: nn.Module, source: str) -> str:
    """Take from a checkpoint the weights whose name and shape fit; says which did and which did not."""
    path = resolve(source, "--init-from")
    weights, own = weights_of(load(path, "--init-from"), path), network.state_dict()
    fitting = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    if not fitting:
        raise ValueError(f"--init-from {source}: none of its {len(weights)} tensors fits this model")
    network.load_state_dict(fitting, strict=False)
    fresh = sorted(set(own) - set(fitting))
    return (f"Initialised {len(fitting)} of {len(own)} tensors from {source}; fresh: {', '.join(fresh) or 'none'}; "
            f"unused: {', '.join(sorted(set(weights) - set(fitting))) or 'none'}")


# --- the folder of a run -------------------------------------------------------------------------


def open_run(results: Path, run_name: str | None, model: str) -> Path:
    """The folder of this run: `run_name`, made or found again, or a new `NNN-model`; held until this process ends.

    A torchrun restart finds the folder that its launch opened, by the launch's run id.

    Raises:
        ValueError: another process holds it.
    """
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if launch == "none":  # torchrun's default, the same for every launch: its agent's process tells them apart
        launch = f"{socket.gethostname()}-{os.getppid()}"
    folder = results / run_name if run_name else None
    if folder is None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        folder = next((file.parent for file in sorted(results.glob("[0-9][0-9][0-9]-*/launch"), reverse=True)
                       if file.read_text() == launch), None)
    folder = folder or new_folder(results, model.replace("/", "-"))
    for part in ("checkpoints", "previews"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: data workers would inherit it and outlive us
    except (BlockingIOError, PermissionError):
        raise ValueError(f"another process is training in {folder}; choose another --run-name") from None
    (folder / "launch").write_text(launch)
    return folder


def new_folder(results: Path, model: str) -> Path:
    """Make the next `NNN-model`; two launches at once get two."""
    while True:
        numbers = [int(path.name[:3]) for path in results.glob("[0-9][0-9][0-9]-*")]
        folder = results / f"{max(numbers, default=-1) + 1:03d}-{model}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder


def save_step(folder: Path, state: dict, keep_last: int) -> None:
    """Write `checkpoints/{step:07d}.pt` and delete all but the newest `keep_last` (0 keeps all)."""
    save(folder / "checkpoints" / f"{state['step']:07d}.pt", state)
    for path in sorted((folder / "checkpoints").glob("[0-9]*.pt"))[: -keep_last if keep_last else 0]:
        path.unlink()


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder."""
    return max((folder / "checkpoints").glob("[0-9]*.pt"), default=None)


def load_same_run(path: str | Path, spec: dict, args: dict) -> dict:
    """A checkpoint to continue; ValueError where it is of another run."""
    state = load(path, "--resume")
    if "spec" not in state or "opt" not in state:
        raise ValueError(f"{path} is not a training checkpoint; --init-from takes weights alone")
    fixed = ("global_batch_size", "global_seed", "diffusion_args", "optimizer_args")
    stored, wanted = (described | {key: flags[key] for key in fixed}
                      for described, flags in ((state["spec"], state["args"]), (spec, args)))
    for key, value in wanted.items():
        if stored[key] != value:
            raise ValueError(f"{path} was trained with {key} {stored[key]}, not {value}: choose another --run-name, or "
                             "take its weights alone with --init-from")
    return state
