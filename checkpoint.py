"""Checkpoints: written whole or not at all, read without trusting a pickle, and describing themselves.

A checkpoint is a dict with DiT's keys and more:
    model, ema      state dicts of the trained network and of its moving average
    opt             the optimizer's state
    args            the flags of the run
    step, …         how many optimizer steps were taken, and the rest of `Training`
    spec            plain dict of how to rebuild what sampling needs:
        model           {"name", "args"}: DiT_models[name](**args)
        diffusion       arguments of create_diffusion
        vae             of load_autoencoder;  vae_sha256: of its weights, where train.py trained it
        image_size      (H, W);  channels: of an image
        classes         names, in the order of their ids
        sampling        None of an autoencoder; else recommended {"sampler", "num_sampling_steps", "cfg_scale",
                        "cfg_channels", "guidance_interval", "dynamic_thresholding"}; the last two may be missing
"""

import argparse
import copy
import errno
import fcntl
import hashlib
import math
import os
import pickle
import socket
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models import Autoencoder_models, DiT_models

# DiT's published weights; they carry their own non-commercial licence (CC BY-NC 4.0).
PUBLISHED = {
    name: f"https://dl.fbaipublicfiles.com/DiT/models/{name}" for name in ("DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt")
}

# The network of FID, converted from TensorFlow's of 2015 by torch-fidelity.
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

LOCK_PATIENCE = 180  # seconds, of a restart

# --- one file ------------------------------------------------------------------------------------


class HashingFile:
    """A file opened for writing, with the sha256 of what went into it and the error that stopped it, if any."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.error = file, hashlib.sha256(), None
        self.hasher = ThreadPoolExecutor(max_workers=1)

    def write(self, data: bytes) -> int:
        hashing = self.hasher.submit(self.sha256.update, data)  # while the disk is busy
        try:
            self.file.write(data)
        except OSError as error:  # torch.save would report it as a failure of its own
            self.error = error
            raise
        finally:
            hashing.result()
        return len(data)

    def flush(self) -> None:
        self.file.flush()


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


def replace_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def download(name: str, url: str, licence: str, complete: Callable[[Path], bool]) -> Path:
    """A file in torch's cache, fetched over https at the first time; OSError that says what else to do."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    print(f"Downloading {url} ({licence}) to {path}")
    try:
        torch.hub.download_url_to_file(url, str(temporary))
        if not complete(temporary):
            raise OSError("the download is incomplete")
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot download {url}: {error}; fetch it by other means and pass its path") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


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


def inception_weights(path: str | None) -> Path:
    """The file of FID's Inception: the given one, or that of torch's cache, or a download; ValueError where it is another."""
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"--weights {path} is no file")
    file = Path(path) if path is not None else download(
        INCEPTION, INCEPTION_URL, "Apache 2.0", lambda file: digest(file) == INCEPTION_SHA256)
    if (found := digest(file)) != INCEPTION_SHA256:
        raise ValueError(f"--weights {file} is not {INCEPTION}: its sha256 is {found}, expected {INCEPTION_SHA256}"
                         f"{'; delete it, to download it again' if path is None else ''}")
    return file


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
    networks = DiT_models | Autoencoder_models
    if description["name"] not in networks:
        raise ValueError(f"--model {description['name']} is unknown; allowed: {', '.join(networks)}")
    return networks[description["name"]](**description["args"])


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


def init_from(training: "Training", source: str) -> str:
    """Take from a checkpoint the weights whose name and shape fit; says which did and which did not."""
    path = resolve(source, "--init-from")
    weights, own = weights_of(load(path, "--init-from"), path), training.model.state_dict()
    fitting = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    if not fitting:
        raise ValueError(f"--init-from {source}: none of its {len(weights)} tensors fits this model")
    for network in (training.model, training.ema):
        network.load_state_dict(fitting, strict=False)
    fresh = sorted(set(own) - set(fitting))
    return (f"Initialised {len(fitting)} of {len(own)} tensors from {source}; fresh: {', '.join(fresh) or 'none'}; "
            f"unused: {', '.join(sorted(set(weights) - set(fitting))) or 'none'}")


# --- a run: its state and its folder ------------------------------------------------------------


@dataclass
class OptimizerArgs:
    """train.py's --optimizer-args: AdamW, how its learning rate runs, and when a run gives up."""

    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    clip_norm: float = math.inf
    max_skipped: int = 20         # steps in a row whose loss or gradient norm is not finite
    patience: int | None = None   # validations in a row without a better loss

    def __post_init__(self):
        for name, fine in (("betas", all(0 <= beta < 1 for beta in self.betas)), ("weight_decay", self.weight_decay >= 0),
                           ("warmup_steps", self.warmup_steps >= 0), ("clip_norm", self.clip_norm > 0),
                           ("max_skipped", self.max_skipped > 0), ("patience", self.patience is None or self.patience > 0)):
            if not fine:
                raise ValueError(f"--optimizer-args: {name} {getattr(self, name)} is out of range")

    def factor(self, step: int, max_steps: int) -> float:
        """What --lr is multiplied by in step `step`, from 0: a linear warm-up, then 1, or half a cosine to 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / max_steps)) if self.schedule == "cosine" else 1.0
        return cosine * min(1.0, (step + 1) / (self.warmup_steps + 1))


@dataclass
class Training:
    """All that changes from step to step: what a training checkpoint holds beside what describes it."""

    model: nn.Module
    ema: nn.Module
    opt: torch.optim.Optimizer
    meter: nn.Module                      # losses since the last line of the log
    step: int = 0                         # optimizer steps taken
    validated: int = 0                    # the step of the last validation
    best: float = math.inf                # the lowest validation loss of the EMA
    validations_since_best: int = 0
    saved: int = 0                        # the step of the newest checkpoint in the run's folder, not part of one

    @classmethod
    def begin(cls, model: nn.Module, meter: nn.Module, lr: float, args: OptimizerArgs) -> "Training":
        trained = [p for p in model.parameters() if p.requires_grad]
        opt = torch.optim.AdamW(trained, lr, args.betas, weight_decay=args.weight_decay, fused=True)
        return cls(model, copy.deepcopy(model).eval().requires_grad_(False), opt, meter)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return self.opt.param_groups[0]["params"]

    @cached_property
    def averaged(self) -> tuple[list, list]:
        """The weights of the EMA, and those that they follow."""
        return list(self.ema.parameters()), list(self.model.parameters())

    def set_lr(self, lr: float) -> float:
        self.opt.param_groups[0]["lr"] = lr
        return lr

    def update_ema(self, decay: float) -> None:
        """ema <- decay * ema + (1 - decay) * model, with a smaller decay in the first steps."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        get_ema_multi_avg_fn(decay)(*self.averaged, None)

    def validated_at(self, loss: float) -> bool:
        """Note a validation loss; whether it is the lowest so far."""
        self.validated = self.step
        better = loss < self.best
        self.validations_since_best = 0 if better else self.validations_since_best + 1
        self.best = loss if better else self.best
        return better

    def state_dict(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "ema", "opt", "meter")}
        return parts | {name: getattr(self, name) for name in ("step", "validated", "best", "validations_since_best")}

    def load_state_dict(self, state: dict) -> None:
        group = {name: self.opt.param_groups[0][name] for name in ("betas", "weight_decay")}
        for name in ("model", "ema", "opt", "meter"):
            getattr(self, name).load_state_dict(state[name])
        self.opt.param_groups[0].update(group)  # as --optimizer-args now has them
        self.meter.forgive()
        for name in ("step", "validated", "best", "validations_since_best"):
            setattr(self, name, state[name])

    @property
    def size(self) -> int:
        """Bytes of a checkpoint: the weights twice, and AdamW's two moments of what is trained."""
        weights = [*self.model.state_dict().values(), *self.ema.state_dict().values()]
        return sum(tensor.nbytes for tensor in weights + 2 * self.parameters)


def begin_or_continue(training: Training, spec: dict, args, world) -> tuple[Path, list[str]]:
    """Open the run's folder; `training` continues its newest checkpoint, else --resume, else takes --init-from's weights.

    Returns: the folder, and sentences for the log.
    """
    results, remarks = Path(args.results_dir), ["Fresh weights"]
    if not world.on_main(lambda: args.run_name and latest(results / args.run_name)):  # else neither flag is needed any more
        if args.resume:
            remarks, _ = continue_from(training, resolve(args.resume, "--resume"), spec, args)
        elif args.init_from:
            remarks = [world.main_first(lambda: init_from(training, args.init_from))]
    folder = world.on_main(lambda: open_run(results, args.run_name, args.model))
    newest, damaged = world.on_main(lambda: latest_intact(folder))
    if newest:
        remarks, as_described = continue_from(training, newest, spec, args)
        training.saved = training.step if as_described else 0
    return folder, [f"{args.model}, {sum(p.numel() for p in training.parameters):,} parameters", *damaged, *remarks]


def flags_of(args) -> dict:
    """The flags of a run, as a checkpoint and a config hold them."""
    return {name: value for name, value in args.as_dict().items() if name != "config"}


def identity(spec: dict, flags: dict) -> dict:
    """What must not change while a run is continued."""
    fixed = {f"--{key.replace('_', '-')}": flags[key] for key in ("global_batch_size", "global_seed")}
    fixed["--diffusion-args"] = {key: value for key, value in flags["diffusion_args"].items() if key != "sampling"}
    model = {"model": spec["model"]["name"], **{f"model argument {key}": value for key, value in spec["model"]["args"].items()}}
    model.pop("model argument gradient_checkpointing", None)
    vae = "vae_sha256" if "vae_sha256" in spec else "vae"  # a folder may have moved
    return model | fixed | {key: spec[key] for key in (vae, "image_size", "channels", "classes")}


def open_run(results: Path, run_name: str | None, model: str) -> Path:
    """The folder of this run: `run_name`, made or found again, or a new `NNN-model`; held until this process ends.

    A torchrun restart finds the folder that its launch opened, by the launch's run id.

    Raises:
        ValueError: another process holds it.
    """
    if run_name is not None and (not run_name or Path(run_name).name != run_name):
        raise ValueError(f"--run-name {run_name!r} is not the name of a folder in --results-dir")
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if launch == "none":  # torchrun's default, the same for every launch: its agent's process tells them apart
        launch = f"{socket.gethostname()}-{os.getppid()}"
    folder = None if run_name is None else results / run_name
    if folder is None and is_restart():
        folder = next((file.parent for file in sorted(results.glob("[0-9][0-9][0-9]-*/launch"), reverse=True)
                       if file.read_text() == launch), None)
    folder = folder or new_folder(results, model.replace("/", "-"))
    for part in ("checkpoints", "previews"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    hold(folder, launch)
    replace_text(folder / "launch", launch)
    return folder


def is_restart() -> bool:
    """Whether torchrun started this process anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def hold(folder: Path, launch: str, advice: str = "choose another --run-name") -> None:
    """Lock a folder until this process ends; ValueError where another process holds it.

    A restart waits a while: the server of a network file system is slow to miss a machine that is gone.
    """
    handle, path = os.open(folder / "lock", os.O_CREAT | os.O_RDWR), folder / "launch"
    restart = is_restart() and (path.read_text() if path.is_file() else launch) == launch
    for _ in range(LOCK_PATIENCE if restart else 1):
        try:
            return fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: data workers would inherit and outlive it
        except (BlockingIOError, PermissionError):
            time.sleep(1 if restart else 0)
        except OSError as error:
            return print(f"{folder} cannot be locked ({error.strerror}): do not start this run twice at once", file=sys.stderr)
    raise ValueError(f"another process is at work in {folder}; {advice}")


def new_folder(results: Path, model: str) -> Path:
    """Make the next `NNN-model`; two launches at once get two."""
    while True:
        numbers = [int(path.name.split("-")[0]) for path in results.glob("[0-9][0-9][0-9]*-*")]
        folder = results / f"{max(numbers, default=-1) + 1:03d}-{model}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder


def save_run(folder: Path, training: Training, spec: dict, args, name: str = "") -> None:
    """Write `checkpoints/{name}`, or else this step's checkpoint, unless the folder has it, and delete what is too old."""
    state = training.state_dict() | {"args": flags_of(args), "spec": spec}
    if name:
        save(folder / "checkpoints" / name, state)
    elif training.saved != training.step:
        keep_last, every = args.keep_last if isinstance(args.keep_last, tuple) else (args.keep_last, 0)
        save_step(folder, state, keep_last, every * args.ckpt_every)
        training.saved = training.step


def save_step(folder: Path, state: dict, keep_last: int, every: int) -> None:
    """Write `checkpoints/{step:07d}.pt`, then delete the numbered ones that are no longer wanted.

    Args:
        keep_last: how many of the newest to keep, 0 for all.
        every: multiples of this step are kept too; 0 for none.
    """
    save(folder / "checkpoints" / f"{state['step']:07d}.pt", state)
    for path in steps_of(folder)[: -keep_last if keep_last else 0]:
        if not every or int(path.stem) % every:
            path.unlink()
            digest_file(path).unlink(missing_ok=True)


def steps_of(folder: Path) -> list[Path]:
    """The numbered checkpoints of a run's folder, oldest first."""
    return sorted((folder / "checkpoints").glob("[0-9]*.pt"), key=lambda path: int(path.stem))


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder."""
    return next(reversed(steps_of(folder)), None)


def latest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, None where there is none at all; and a sentence on each newer one, set aside.

    Raises:
        ValueError: all of them are damaged.
    """
    remarks = []
    for path in reversed(steps_of(folder)):
        try:
            load(path, "checkpoint")
        except DamagedError as error:
            path.rename(f"{path}.damaged")
            remarks.append(f"{error}; it is now {path.name}.damaged, and the one before is used")
        else:
            return path, remarks
    if damaged := list((folder / "checkpoints").glob("[0-9]*.pt.damaged")):
        raise ValueError(f"{folder} has only damaged checkpoints, such as {damaged[0].name}; another --run-name begins anew")
    return None, remarks


def continue_from(training: Training, path: str | Path, spec: dict, args) -> tuple[list[str], bool]:
    """Load a checkpoint of this run.

    Returns: sentences for the log, on each flag that has changed; whether the checkpoint's own description is still right.

    Raises:
        ValueError: it is of another run.
    """
    state, args = load(path, "checkpoint"), flags_of(args)
    if missing := {"args", "spec", *training.state_dict()} - set(state):
        raise ValueError(f"{path} is no checkpoint to continue, it lacks {', '.join(sorted(missing))}; --init-from takes its "
                         "weights alone")
    stored, wanted = identity(state["spec"], state["args"]), identity(spec, args)
    for key in sorted(wanted | stored, key=lambda key: (key.startswith("model argument"), key != "model")):  # the model first
        if stored.get(key) != wanted.get(key):
            raise ValueError(f"{path} was trained with {key} {stored.get(key)}, not {wanted.get(key)}: choose another "
                             "--run-name, or take its weights alone with --init-from")
    training.load_state_dict(state)
    free = ("data_path", "max_steps", "epochs", "lr", "ema_decay", "diffusion_args", "optimizer_args", "precision")
    changed = [f"--{key.replace('_', '-')} was {state['args'][key]}, is now {args[key]}"
               for key in free if state["args"][key] != args[key]]
    return [f"Continuing {path}", *changed], state["spec"] == spec
