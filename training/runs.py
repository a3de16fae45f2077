"""The folder of a run: open, continue, save; and what its flags say of the checkpoint to be."""

import os
import socket
from pathlib import Path

import torch
from torch import nn

from diffusion import create_diffusion
from pipeline import checkpoint
from pipeline.autoencoders import Pixels
from pipeline.checkpoint import DamagedError
from pipeline.generation import check_thresholding, settings_for
from pipeline.spec import build_model, recommend
from runtime import cli
from runtime.files import digest_file, hold, is_restart, replace_text
from small_models import NETWORKS, Autoencoder_models
from training.objective import SSIM_WINDOW
from training.state import Training


def describe(args, data, autoencoder: nn.Module) -> tuple[dict, float]:
    """The `spec` of train.py's flags (see checkpoint.py), every one of them checked, and the share of labels to drop."""
    if args.model in Autoencoder_models:
        return describe_autoencoder(args, data, autoencoder), 0.0
    given = {"label_drop": 0.1, "sampling": {}} | args.diffusion_args
    label_drop, sampling = given.pop("label_drop"), given.pop("sampling")
    if not isinstance(label_drop, int | float) or not 0 <= label_drop <= 1:
        raise ValueError(f"--diffusion-args: label_drop {label_drop} is not a share, 0..1")
    diffusion = cli.check_arguments(create_diffusion, given, "--diffusion-args", {"timestep_respacing"},
                                        ("label_drop", "sampling"))
    process = cli.naming("--diffusion-args", lambda: create_diffusion("", **diffusion))
    channels, *size = autoencoder.latent_shape(data.image_size, data.channels)
    from_data = dict(input_size=tuple(size), in_channels=channels, num_classes=len(data.classes),
                     learn_sigma=process.learn_sigma)
    spec = spec_of(args, from_data, diffusion, data, autoencoder, recommend(process, label_drop, sampling))
    cli.naming("--diffusion-args: sampling", lambda: check_thresholding(settings_for(spec), autoencoder))
    return spec, label_drop


def describe_autoencoder(args, data, autoencoder: nn.Module) -> dict:
    """The spec of an autoencoder to be trained: nothing of it is sampled."""
    if args.diffusion_args or not isinstance(autoencoder, Pixels) or data.kind != "images":
        raise ValueError(f"--model {args.model} is trained on images by their reconstruction: with --vae pixels, and without "
                         "--diffusion-args")
    if min(data.image_size) < SSIM_WINDOW:
        raise ValueError(f"--image-size {data.image_size} is less than the {SSIM_WINDOW} pixels of SSIM's window")
    from_data = dict(input_size=tuple(data.image_size), in_channels=data.channels)
    return spec_of(args, from_data, {}, data, autoencoder, None)


def spec_of(args, from_data: dict, diffusion: dict, data, autoencoder: nn.Module, sampling: dict | None) -> dict:
    network = NETWORKS[args.model].func
    chosen = cli.check_arguments(network, args.model_args, "--model-args", set(from_data))
    spec = {
        "model": {"name": args.model, "args": from_data | chosen},
        "diffusion": diffusion,
        **autoencoder.spec,
        "image_size": tuple(data.image_size),
        "channels": data.channels,
        "classes": list(data.classes),
        "sampling": sampling,
    }
    with torch.device("meta"):
        cli.naming("--image-size, --model-args", lambda: build_model(spec["model"]))
    return spec


# --- the folder ------------------------------------------------------------------------------------


def begin_or_continue(training: Training, spec: dict, args, world) -> tuple[Path, list[str]]:
    """Open the run's folder; `training` continues its newest checkpoint, else --resume, else takes --init-from's weights.

    Returns: the folder, and sentences for the log.
    """
    results, remarks = Path(args.results_dir), ["Fresh weights"]
    begun = world.on_main(lambda: args.run_name and checkpoint.latest(results / args.run_name))
    if not begun:  # else neither flag is needed any more
        if args.resume:
            remarks, _ = continue_from(training, checkpoint.resolve(args.resume, "--resume"), spec, args)
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
        checkpoint.save(folder / "checkpoints" / name, state)
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
    checkpoint.save(folder / "checkpoints" / f"{state['step']:07d}.pt", state)
    for path in checkpoint.steps_of(folder)[: -keep_last if keep_last else 0]:
        if not every or int(path.stem) % every:
            path.unlink()
            digest_file(path).unlink(missing_ok=True)


def latest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, None where there is none at all; and a sentence on each newer one, set aside.

    Raises:
        ValueError: all of them are damaged.
    """
    remarks = []
    for path in reversed(checkpoint.steps_of(folder)):
        try:
            checkpoint.load(path, "checkpoint")
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
    state, args = checkpoint.load(path, "checkpoint"), flags_of(args)
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


def init_from(training: "Training", source: str) -> str:
    """Take from a checkpoint the weights whose name and shape fit; says which did and which did not."""
    path = checkpoint.resolve(source, "--init-from")
    weights, own = checkpoint.weights_of(checkpoint.load(path, "--init-from"), path), training.model.state_dict()
    fitting = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    if not fitting:
        raise ValueError(f"--init-from {source}: none of its {len(weights)} tensors fits this model")
    for network in (training.model, training.ema):
        network.load_state_dict(fitting, strict=False)
    fresh = sorted(set(own) - set(fitting))
    return (f"Initialised {len(fitting)} of {len(own)} tensors from {source}; fresh: {', '.join(fresh) or 'none'}; "
            f"unused: {', '.join(sorted(set(weights) - set(fitting))) or 'none'}")
