"""The Spec of a run, from its flags; and its folder: open, continue, save."""

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from diffusion import OBJECTIVES, create_diffusion, supported_arguments
from diffusion.flow_map import FlowMap, check_network
from diffusion.process import Network, Process, check
from pipeline import checkpoint
from pipeline.autoencoders import Pixels
from pipeline.generation import Sampling, check_thresholding
from pipeline.heads import HEADS, check_heads, identity_of
from pipeline.settings import SamplingSettings
from pipeline.spec import ModelSpec, Spec, constructor_of, defaults_of
from runtime import UserError
from runtime.cli import WRONG_VALUE, check_arguments, prefix_errors
from runtime.files import is_restart, lock_folder, sha256_file, write_text
from runtime.processes import CommonError, World
from small_models import NETWORKS, Autoencoder_models
from training.objective import SSIM_WINDOW
from training.rows import TrainingData
from training.state import LOGGED, Training

# --- flags -> Spec -----------------------------------------------------------------------------------


@dataclass
class TrainerArgs:
    """The entries of --diffusion-args that are not of create_diffusion."""

    label_drop: float = 0.1                       # share of labels that become the null class in training
    sampling: dict = field(default_factory=dict)  # over what the process recommends


TRAINER_ARGS = [entry.name for entry in fields(TrainerArgs)]


def build_run_spec(model: str, model_args: dict[str, Any], diffusion_args: dict[str, Any], data: TrainingData,
                   autoencoder: nn.Module, heads: dict[str, Any] | None = None) -> tuple[Spec, float]:
    """The Spec of a network to be trained, every argument checked, and the share of labels to drop.

    Args:
        model: a name in NETWORKS.
        model_args: of its constructor, over its preset's.
        diffusion_args: of create_diffusion, of the objective's factory, and of TrainerArgs.
        heads: see pipeline/heads.py.
    """
    if model in Autoencoder_models:
        if heads:
            raise UserError(f"`heads` are for networks that are sampled from, not for `model` {model}")
        return build_autoencoder_spec(model, model_args, diffusion_args, data, autoencoder), 0.0
    with prefix_errors("`diffusion_args`:", *WRONG_VALUE):
        given = {name: diffusion_args[name] for name in TRAINER_ARGS if name in diffusion_args}
        label_drop, sampling = astuple(TrainerArgs(**check_arguments(TrainerArgs, given)))
        if not 0 <= label_drop <= 1:
            raise UserError(f"label_drop {label_drop} is not in 0..1")
        diffusion = check_objective_arguments({name: diffusion_args[name] for name in diffusion_args if name not in given})
        process = create_diffusion("", **diffusion)
        check(process, Process, "a process needs")
        if label_drop == 0 and isinstance(process, FlowMap) and process.omega:
            raise UserError(f"map_guidance {process.omega} needs a label_drop above 0, which teaches the null label")
    with prefix_errors("`vae`"):
        channels, *size = autoencoder.latent_shape(data.image_size, data.channels)
    from_data = dict(input_size=tuple(size), in_channels=channels, num_classes=len(data.classes))
    if "learn_sigma" in defaults_of(constructor_of(model)[0]):
        from_data["learn_sigma"] = process.learn_sigma
    elif process.learn_sigma:
        raise UserError(f"`diffusion_args`: learn_sigma is true, but `model` {model} has no argument learn_sigma, and so no "
                        "channels for a learned variance; set learn_sigma to false")
    with prefix_errors("`diffusion_args`: sampling:", *WRONG_VALUE):
        settings = SamplingSettings.recommend(process, label_drop, sampling)
    spec = assemble_spec(model, model_args, from_data, diffusion, data, autoencoder, settings)
    if isinstance(process, FlowMap):
        with prefix_errors("`model_args`:"):
            check_network(spec.model.outline(), spec.model.args.get("time_scale"))
    if heads:
        spec = replace(spec, heads=heads_of_run(heads, spec, process, data))
    with prefix_errors("`diffusion_args`: sampling:", *WRONG_VALUE):
        check_thresholding(Sampling.of(spec).settings, autoencoder)
    return spec, label_drop


def heads_of_run(heads: dict[str, Any], spec: Spec, process: Process, data: TrainingData) -> dict[str, Any]:
    """The flag `heads`, checked against the network, the process and the data, with every argument."""
    if isinstance(process, FlowMap):
        raise UserError("`heads` are not for objective 'flow-map': train them with the flow, and pass {} for its map")
    checked = check_heads(heads, spec.model.outline())
    for name in {*checked} - {"split"}:
        if name in {"loss", *LOGGED, *process.validation_terms} or "." in name or hasattr(nn.ModuleDict, name):
            raise UserError(f"`heads`: a head cannot have the name {name!r}, which means something else")
    if spec.diffusion.get("use_kl") and "internal" in checked:
        raise UserError("`heads`: internal needs a loss with an mse, which use_kl of `diffusion_args` leaves out")
    if data.kind != "images" and (blind := [name for name in checked if getattr(HEADS.get(name), "needs_images", False)]):
        raise UserError(f"`heads`: {blind[0]} needs pictures, and `data_path` holds cached latents alone")
    return checked


def check_objective_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Check names and types against create_diffusion and the objective's factory. Returns the arguments, converted.

    A parameter of another objective is left to create_diffusion, which accepts only its default.
    """
    common = defaults_of(create_diffusion)
    del common["timestep_respacing"]  # the sampler's
    checked = check_arguments(create_diffusion, {name: value for name, value in arguments.items() if name in common})
    objective = checked.get("objective", common["objective"])
    supported = supported_arguments(objective)
    elsewhere = {name for other in OBJECTIVES for name in supported_arguments(other)} - {*supported, *common}
    further = {name: value for name, value in arguments.items() if name not in {*common, *elsewhere}}
    with prefix_errors(f"objective {objective!r}:"):
        further = check_arguments(OBJECTIVES[objective], further, {"timesteps", *common},
                                  (*(name for name in supported if name in common), *TRAINER_ARGS))
    return checked | further | {name: arguments[name] for name in arguments if name in elsewhere}


def build_autoencoder_spec(model: str, model_args: dict[str, Any], diffusion_args: dict[str, Any], data: TrainingData,
                           autoencoder: nn.Module) -> Spec:
    """The Spec of an autoencoder to be trained."""
    if diffusion_args or not isinstance(autoencoder, Pixels) or data.kind != "images":
        raise UserError(f"`model` {model} is trained to reconstruct images: it needs `vae` pixels and no `diffusion_args`")
    if min(data.image_size) < SSIM_WINDOW:
        raise UserError(f"`image_size` {data.image_size} is smaller than SSIM's window of {SSIM_WINDOW} pixels")
    from_data = dict(input_size=tuple(data.image_size), in_channels=data.channels)
    return assemble_spec(model, model_args, from_data, {}, data, autoencoder, None)


def assemble_spec(model: str, model_args: dict[str, Any], from_data: dict[str, Any], diffusion: dict[str, Any],
                  data: TrainingData, autoencoder: nn.Module, sampling: SamplingSettings | None) -> Spec:
    """The Spec, after its network was built once, without memory where that is possible."""
    with prefix_errors("`model_args`:"):
        chosen = check_arguments(constructor_of(model)[0], model_args, set(from_data))
    spec = Spec(ModelSpec.of_preset(model, from_data | chosen), diffusion, image_size=tuple(data.image_size),
                channels=data.channels, classes=list(data.classes), sampling=sampling, **autoencoder.spec)
    with prefix_errors("`model_args` or `image_size`:", *spec.model.wrong_values):
        network = spec.model.outline()
    if sampling:
        check(network, Network, "training needs")
    return spec


# --- the folder ------------------------------------------------------------------------------------


def begin_or_continue(training: Training, spec: Spec, flags: dict[str, Any], remarks: list[str],
                      world: World, data_flip: bool) -> tuple[Path, list[str]]:
    """Open the run's folder. `training` continues its newest checkpoint, else `resume`, else begins as it is.

    Args:
        remarks: what the log says of `training` as it is.
        data_flip: what the flag `flip` is in checkpoints that are older than it.

    Returns: the folder, and remarks for the log.
    """
    results, run_name = Path(flags["results_dir"]), flags["run_name"]
    begun = world.on_main(lambda: run_name and checkpoint.latest(results / run_name))
    if flags["resume"] and not begun:  # a run that has begun does not need the flag
        with prefix_errors("`resume`"):
            remarks, _ = continue_from(training, checkpoint.resolve(flags["resume"]), spec, flags, data_flip)
    folder = world.on_main(lambda: open_run(results, run_name, spec.model.name))
    newest, damaged = world.on_main(lambda: newest_undamaged(folder))
    if newest:
        remarks, as_described = continue_from(training, newest, spec, flags, data_flip)
        if training.step != int(newest.stem):
            raise UserError(f"{newest} is of step {training.step}: it was renamed; call it {training.step:07d}.pt again")
        training.saved = training.step if as_described else 0
        remarks += [f"--{name.replace('_', '-')} {flags[name]} is not used: this run continues its own checkpoint"
                    for name in ("resume", "init_from") if flags[name]]
    parameters = sum(p.numel() for p in training.parameters)
    return folder, [f"{spec.model.name}, {parameters:,} parameters", *damaged, *remarks]


def fixed_settings(spec: Spec, flags: dict[str, Any]) -> dict[str, Any]:
    """The settings that must not change when a run is continued, by the names that an error uses."""
    fixed = {f"`{key}`": flags[key] for key in ("global_batch_size", "global_seed", "flip")}
    fixed["`diffusion_args`"] = {key: value for key, value in flags["diffusion_args"].items() if key != "sampling"}
    model = {"model": spec.model.name, **{f"model argument {key}": value for key, value in spec.model.args.items()}}
    model.pop("model argument gradient_checkpointing", None)
    vae = "vae_sha256" if spec.vae_sha256 else "vae"  # a folder may have moved
    of_data = (vae, "image_size", "channels", "classes", "latents_mean", "latents_std")
    return model | fixed | {key: getattr(spec, key) for key in of_data} | {"`heads`": identity_of(spec.heads or {})}


def open_run(results: Path, run_name: str | None, model: str) -> Path:
    """The folder of this run: `run_name`, created if missing, or a new `NNN-model`. It is locked until this process ends.

    A torchrun restart finds the folder that its launch opened by the launch's run id.

    Raises:
        UserError: another process has locked it.
    """
    if run_name is not None and (run_name in ("", "..") or Path(run_name).name != run_name):
        raise UserError(f"`run_name` {run_name!r} is not the name of a folder in `results_dir`")
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if launch == "none":  # torchrun's default, the same for every launch: its agent's process tells them apart
        launch = f"{socket.gethostname()}-{os.getppid()}"
    folder = None if run_name is None else results / run_name
    if folder is None and is_restart(launch):
        folder = next((file.parent for file in sorted(results.glob("[0-9][0-9][0-9]-*/launch"), reverse=True)
                       if file.read_text() == launch), None)
    try:
        folder = folder or new_folder(results, model.replace("/", "-"))
        for part in ("checkpoints", "previews"):
            (folder / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {error.filename}: {error.strerror}; choose another `run_name`") from None
    file = folder / "launch"
    restart = is_restart(launch) and file.read_text() == launch if file.is_file() else is_restart()
    lock_folder(folder, restart, "choose another `run_name`")
    write_text(file, launch)
    return folder


def new_folder(results: Path, model: str) -> Path:
    """Create the next `NNN-model`, a different one for each launch. Other names, such as 2026-11-23, do not count."""
    models = {name.replace("/", "-") for name in NETWORKS}
    while True:
        names = (path.name.partition("-") for path in results.glob("*-*"))
        numbers = [int(number) for number, _, rest in names if number.isdecimal() and rest in models]
        folder = results / f"{max(numbers, default=-1) + 1:03d}-{model}"
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def save_run(folder: Path, training: Training, spec: Spec, flags: dict[str, Any], name: str = "", tolerated: int = 0) -> int:
    """Write `checkpoints/{name}`; without a name this step's checkpoint, unless it exists, and delete old ones.

    Within a streak of more than `tolerated` skipped steps nothing is written, and within any nothing is deleted.

    Returns: how many were just skipped in a row, 0 if the checkpoint is there.
    """
    if (streak := int(training.meter.streak)) > tolerated:
        return streak
    training.undo_step()  # one that has begun: its data did not come, or it failed
    state = training.state_dict() | {"args": flags, "spec": spec.to_dict()}
    if name:
        checkpoint.save(folder / "checkpoints" / name, state)
    elif training.saved != training.step:
        keep_last, every = flags["keep_last"] if isinstance(flags["keep_last"], tuple) else (flags["keep_last"], 0)
        save_step(folder, state, 0 if streak else keep_last, every * flags["ckpt_every"])
        training.saved = training.step
    return 0


def streak_error(streak: float, folder: Path, resumed: str | None) -> CommonError:
    newest = checkpoint.latest(folder) or resumed
    good = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint from before"
    return CommonError(f"{streak:.0f} steps in a row had a loss or gradient norm that is not finite. They were skipped and "
                       f"nothing was saved since: {good}. Try a lower `lr`, or clip_norm in `optimizer_args`")


def save_step(folder: Path, state: dict[str, Any], keep_last: int, every: int) -> None:
    """Write `checkpoints/{step:07d}.pt`. Delete all but the newest `keep_last` (0: all) and multiples of `every` (0: none)."""
    checkpoint.save(folder / "checkpoints" / f"{state['step']:07d}.pt", state)
    for path in checkpoint.steps_of(folder)[: -keep_last if keep_last else 0]:
        if not every or int(path.stem) % every:
            path.unlink()
            sha256_file(path).unlink(missing_ok=True)


def list_skipped(folder: Path, sentences: Iterable[str]) -> list[str]:
    """Add sentences about unreadable samples to a run's `skipped.txt`, each once. Returns the new ones."""
    path = folder / "skipped.txt"
    known = path.read_text().splitlines() if path.exists() else []
    new = sorted(set(sentences) - set(known))
    if new:
        folder.mkdir(parents=True, exist_ok=True)  # it may have been removed during the run
        write_text(path, "".join(f"{sentence}\n" for sentence in known + new))
    return new


def newest_undamaged(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be read, None if there is none; and a remark on each newer one, which is renamed.

    Raises:
        UserError: all checkpoints are damaged.
    """
    remarks = []
    for path in reversed(checkpoint.steps_of(folder)):
        try:
            checkpoint.load(path)
        except checkpoint.DamagedError as error:
            path.rename(f"{path}.damaged")
            remarks.append(f"checkpoint {error}; it is now {path.name}.damaged, and the one before is used")
        else:
            return path, remarks
    if damaged := list((folder / "checkpoints").glob("[0-9]*.pt.damaged")):
        raise UserError(f"{folder} has only damaged checkpoints, such as {damaged[0].name}; choose another `run_name`")
    return None, remarks


def continue_from(training: Training, path: Path, spec: Spec, flags: dict[str, Any],
                  data_flip: bool) -> tuple[list[str], bool]:
    """Load a checkpoint of this run into `training`.

    label_std matters only for initial weights: where no flag names it, spec.model.args takes the checkpoint's, in place.

    Returns: remarks for the log, on the flags below that have changed; whether the checkpoint's Spec is still right.

    Raises:
        UserError: the checkpoint is of another run.
    """
    state = checkpoint.load(path)
    if missing := {"args", "spec", *training.state_dict()} - set(state):
        raise UserError(f"{path} cannot be continued, it lacks {', '.join(sorted(missing))}; `init_from` takes only weights")
    stored_spec = checkpoint.spec_of(state, path)
    if "label_std" not in flags["model_args"] and "label_std" in stored_spec.model.args:  # its default changed
        spec.model.args["label_std"] = stored_spec.model.args["label_std"]
    stored, wanted = fixed_settings(stored_spec, {"flip": data_flip} | state["args"]), fixed_settings(spec, flags)
    for key in sorted(wanted | stored, key=lambda key: (key.startswith("model argument"), key != "model")):  # the model first
        if stored.get(key) != wanted.get(key):
            raise UserError(f"{path} was trained with {key} {stored.get(key)}, not {wanted.get(key)}: choose another "
                            "`run_name`, or take only its weights with `init_from`")
    with prefix_errors(f"{path} cannot be continued:", LookupError, AttributeError, *WRONG_VALUE):
        training.check(state)
        training.load_state_dict(state)
    free = ("data_path", "max_steps", "epochs", "lr", "ema_decay", "diffusion_args", "optimizer_args", "precision")
    changed = [f"--{key.replace('_', '-')} was {state['args'][key]}, is now {flags[key]}"
               for key in free if state["args"][key] != flags[key]]
    return [f"Continuing {path}", *changed], stored_spec == spec
