"""What a run takes from another checkpoint, `init_from`: its weights, and without `model` the settings of its network."""

from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from diffusion import create_diffusion
from pipeline import checkpoint
from pipeline.heads import WithHeads, backbone, weights_of
from pipeline.spec import BareWeights, ModelSpec, Spec, Statistics, Weights, defaults_of, normal_name
from pipeline.weights import check_values, fitted
from runtime import UserError
from runtime.cli import check_arguments, prefix_errors, shortened
from runtime.processes import World
from training.runs import TRAINER_ARGS, TrainerArgs
from training.state import Training

DEFAULT_MODEL = "DiT-XL/2"
FROM_DATA = {"input_size", "in_channels", "num_classes", "learn_sigma"}  # arguments of networks that data and process decide
CLASS_TABLE = "embedding_table.weight"  # how the names of class embeddings end


class Initial(NamedTuple):
    """A checkpoint from which a run takes settings or weights."""

    source: str               # its name
    spec: Spec
    weights: Weights
    remark: str               # a sentence about what was assumed, or ""
    label_drop: float | None  # of its training, if it tells
    heads: Weights            # of the heads that were trained with it, see heads.py; {} if there are none


def read_initial(source: str) -> Initial:
    """The checkpoint of that name, see `checkpoint.resolve`."""
    found, (spec, weights, remark, heads) = checkpoint.read(checkpoint.resolve(source), BareWeights(vae="ema"))
    drop = checkpoint.label_drop_of(found.facts, TrainerArgs.label_drop)
    return Initial(source, spec, weights, remark, drop, heads)


def read_own(folder: Path) -> Initial | None:
    """The newest readable checkpoint of a run, None if it has none."""
    for path in reversed(checkpoint.steps_of(folder)):
        with suppress(checkpoint.DamagedError):
            return read_initial(str(path))
    return None


def find_initial(flags: dict[str, Any],
                 world: World) -> tuple[dict[str, Any], Initial | None, Initial | None, Statistics | None]:
    """What a run begins with, by its flags.

    Returns: the flags of the network, completed by `init_from` if `model` is not given; the checkpoint whose weights it begins
    with; that whose settings it takes; and the statistics of the latents that its network has learnt. A run (of that
    `run_name`) with a checkpoint of its own takes the last two from that: it continues even when the other is gone.
    """
    folder, own, source, taken = Path(flags["results_dir"], flags["run_name"] or ""), None, None, None
    begun = world.on_main(lambda: bool(flags["run_name"] and checkpoint.latest(folder)))
    chosen = {"model": flags["model"] or DEFAULT_MODEL}
    if flags["init_from"]:
        own = read_own(folder) if begun else None
        with prefix_errors("`init_from`"):
            source = own or world.main_first(lambda: read_initial(flags["init_from"]))
            if flags["model"] is None:
                taken, chosen = source, take_settings(source, flags)
    return chosen, None if own else source, taken, source and source.spec.statistics


# --- settings --------------------------------------------------------------------------------------


def take_settings(initial: Initial, given: dict[str, Any]) -> dict[str, Any]:
    """The flags that describe a network: those of the checkpoint, under those that were given.

    The autoencoder is not among them, because features know theirs.

    Args:
        given: image_size (None: not given), heads; model_args and diffusion_args, which override entry by entry. (Another
            objective begins from its own defaults.)

    Raises:
        UserError: the checkpoint's preset is not known here.
    """
    ModelSpec.of_preset(initial.spec.model.name, {})
    spec, (height, width), diffusion_args = initial.spec, initial.spec.image_size, given["diffusion_args"]
    stored = {name: value for name, value in spec.model.args.items() if name not in FROM_DATA}
    objective = spec.diffusion.get("objective", defaults_of(create_diffusion)["objective"])
    if spec.sampling:
        drop = {} if initial.label_drop is None else {"label_drop": initial.label_drop}
        with prefix_errors("`diffusion_args`:"):
            trainers = drop | check_arguments(TrainerArgs, {name: diffusion_args[name] for name in TRAINER_ARGS
                                                            if name in diffusion_args})
        if diffusion_args.get("objective", objective) == objective:
            recommended = spec.sampling.to_dict()
            if trainers.get("label_drop") == 0:
                del recommended["cfg_scale"]  # there will be nothing to guide by
            if "internal" not in given["heads"]:
                del recommended["internal_scale"], recommended["internal_interval"]
            trainers["sampling"] = recommended | trainers.get("sampling", {})
            diffusion_args = spec.diffusion | diffusion_args
        diffusion_args = diffusion_args | trainers
    return {"model": spec.model.name, "model_args": stored | given["model_args"], "diffusion_args": diffusion_args,
            "image_size": given["image_size"] or (height if height == width else None)}


def changes(spec: Spec, label_drop: float, initial: Initial) -> list[str]:
    """What a run changes of the checkpoint whose settings it took. The log tells classes with the weights."""
    def facts(spec: Spec, label_drop: float | None) -> dict[str, Any]:
        sampling = spec.sampling.to_dict() if spec.sampling else {}
        model = {name: list(value) if isinstance(value, tuple) else value for name, value in spec.model.args.items()
                 if name not in FROM_DATA}
        drop = {} if label_drop is None else {"label_drop": label_drop}
        return {**model, **defaults_of(create_diffusion), **spec.diffusion, **sampling, **drop, "image_size": spec.image_size,
                "vae": spec.vae_sha256 or spec.vae, "latents_mean": spec.latents_mean, "latents_std": spec.latents_std}
    before = facts(initial.spec, label_drop if initial.spec.is_autoencoder else initial.label_drop)
    after = facts(spec, label_drop)
    differing = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [f"settings of {initial.source}",
            *(f"{name} was {before.get(name, 'unknown')}, is now {after.get(name, 'unknown')}" for name in differing)]


# --- weights ---------------------------------------------------------------------------------------


def init_from(training: Training, initial: Initial, classes: list[str]) -> str:
    """Load the weights that match in name and shape, and the embeddings of `classes` that have the same name.

    Returns: a remark that says which weights matched and which did not.
    """
    state, weights, source = backbone(training.model).state_dict(), initial.weights, initial.source
    taken, fresh = matching(state, initial, classes)
    of_heads, begun = fitting_heads(training.model, initial), set()
    for network, heads in training.networks().values():
        network.load_state_dict(taken, strict=False)
        if heads is not None:
            heads.load_state_dict(of_heads, strict=False)
            begun = {*heads}
    kept, theirs = names_of(of_heads), names_of(initial.heads)
    differing = [*(key for key in state if key not in taken), *(f"head {name}" for name in sorted(begun - kept))]
    unused = [*(key for key in fitted(weights, state) if key not in state), *(f"head {name}" for name in sorted(theirs - kept))]
    remark = "" if fresh is None else (f"; embeddings of no label and of {len(classes) - len(fresh)} of {len(classes)} "
                                       f"classes, by name; fresh classes: {shortened(fresh)}")
    return (f"Initialised {len(taken)} of {len(state)} tensors from {source}{initial.remark and f' ({initial.remark})'}; "
            f"fresh: {shortened(differing)}; unused: {shortened(unused)}{remark}")


def fitting_heads(model: nn.Module, initial: Initial) -> Weights:
    """The weights of heads of the same name and seam, each if all of its tensors fit."""
    if not isinstance(model, WithHeads) or not initial.heads or model.split != initial.spec.heads["split"]:
        return {}
    fit = {name for name, head in model.heads.items() if all(
        f"{name}.{key}" in initial.heads and initial.heads[f"{name}.{key}"].shape == value.shape
        for key, value in head.state_dict().items())}
    return weights_of(initial.heads, fit)


def names_of(heads: Weights) -> set[str]:
    """The names of the heads that have weights."""
    return {key.partition(".")[0] for key in heads}


def check_fit(state: dict[str, Tensor], initial: Initial, classes: list[str]) -> None:
    """Check how much of a network can be initialised.

    Args:
        state: the network's state dict, on the meta device too.

    Raises:
        UserError: less than half of its numbers, or by wrong values.
    """
    check_values(fitted(initial.weights, state), state, f"`init_from` {initial.source}")
    taken, fresh = matching(state, initial, classes)
    tables = sum(state[key][0].numel() for key in state if key.endswith(CLASS_TABLE)) * len(fresh or ())
    found, wanted = (sum(value.numel() for value in tensors.values()) - tables for tensors in (taken, state))
    if found < wanted / 2:
        key = next(key for key in state if key not in taken)
        theirs, ours = initial.weights.get(key), tuple(state[key].shape)
        raise UserError(f"`init_from` {initial.source}: only {len(taken)} of {len(state)} tensors match this model, "
                        f"{found / wanted:.1%} of its weights; {key} is {'missing' if theirs is None else tuple(theirs.shape)} "
                        f"where the model has {ours}. Leave out `model`, `model_args` and `image_size` (`model` null over a "
                        f"config): they are then {initial.source}'s, a {initial.spec.model.name}")


def check_time_scale(spec: Spec, initial: Spec) -> None:
    """Raises UserError if the weights were trained with another scale of the times than the network embeds."""
    wanted, stored = (of.model.args.get("time_scale", 1.0) for of in (spec, initial))
    if wanted != stored:
        raise UserError(f"`init_from`: its time_scale is {stored}, that of `model_args` {wanted}: with another one its weights "
                        "mean nothing")


def matching(state: dict[str, Tensor], initial: Initial, classes: list[str]) -> tuple[dict[str, Tensor], list[str] | None]:
    """The weights that fit a network's state dict, and the classes without one of that name (None: no class embeddings fit)."""
    weights, fresh = fitted(initial.weights, state), None
    taken = {key: value for key, value in weights.items() if key in state and state[key].shape == value.shape}
    for key in state:
        if key.endswith(CLASS_TABLE) and key in weights and state[key].shape[1:] == weights[key].shape[1:]:
            rows, names = len(weights[key]), initial.spec.classes
            names = names if rows - len(names) in (0, 1) else [str(i) for i in range(rows - 1)]
            taken[key], fresh = match_classes(state[key], classes, weights[key], names)
    return taken, fresh


def match_classes(initial: Tensor, classes: list[str], source: Tensor, source_classes: list[str]) -> tuple[Tensor, list[str]]:
    """A table of class embeddings (L or L + 1, D): the source's rows for classes of the same name, and its null row.

    Returns: the table, and the names of the classes that keep their initial rows.
    """
    rows = defaultdict(list)
    for row, name in enumerate(source_classes):
        rows[normal_name(name)].append(row)  # two of ImageNet's classes are cranes
    table, fresh = initial.clone(), []
    for row, name in enumerate(classes):
        if found := rows[normal_name(name)]:
            table[row] = source[found.pop(0)]
        else:
            fresh.append(name)
    if len(initial) > len(classes) and len(source) > len(source_classes):
        table[-1] = source[-1]
    return table, fresh
