"""State dicts as they lie in files: in which container, under which names, of which values. checkpoint.py reads the files.

Trainers store a state dict under a key of a dict (DiT: "ema", "model"; Lightning: "state_dict"), and wrappers put a word before
all names (DDP: "module.", torch.compile: "_orig_mod."). Both are undone here.
"""

import re
from collections.abc import Collection
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.spec import Weights
from runtime import UserError
from runtime.cli import shortened

FIRST = ("ema", "model")  # the containers of DiT's checkpoints and of ours, in order of preference; then an EMA by any name
EMA = re.compile(r"(^|[._])(ema|averaged?|shadow)\d*([._]|$)", re.IGNORECASE)
COMMON = ("state_dict", "model_state_dict", "module", "net", "params", "weights")  # then these
UNKNOWN = len(FIRST) + 2  # the rank of all others
NOT_WEIGHTS = re.compile(r"opt|lr_|sched|loss|meter|heads$")  # how names of what else has tensors begin
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # anywhere in a name


def find_weights(state: dict, source: str | Path) -> tuple[Weights, str]:
    """The state dict in a checkpoint: its EMA, else its model, else itself; and a remark if another could be meant.

    Raises:
        UserError: there is none, or none of several is the obvious one.
    """
    found = sorted(state_dicts(state).items(), key=lambda entry: rank(entry[0]))
    names = [name for name, _ in found]
    if names != [""] and isinstance(state.get("ema"), dict) and not any(name.partition(".")[0] == "ema" for name in names):
        raise UserError(f"checkpoint {source}: its 'ema' is no state dict: torch.save the weights alone that you want")
    if not names or (len(names) > 1 and rank(names[0]) == UNKNOWN):
        raise UserError(f"checkpoint {source} holds {'several state dicts' if names else 'no state dict'}, neither 'ema' nor "
                        f"'model' nor weights alone. It has {shortened(names or state)}: torch.save the right one alone")
    best, *beside = names
    if best in ("", *FIRST) and set(beside) <= {"model"}:
        return found[0][1], ""
    return found[0][1], f"took the weights {best!r} of {Path(source).name}" + (
        f", not {shortened(beside)} beside them: to take others, torch.save them alone" if beside else "")


def state_dicts(content: object, name: str = "") -> dict[str, Weights]:
    """All state dicts in a checkpoint by their keys, joined by dots; "" is the checkpoint itself."""
    if not isinstance(content, dict) or not content or not all(isinstance(key, str) for key in content):
        return {}
    if all(isinstance(value, Tensor) for value in content.values()):
        return {name: content}
    inner = (state_dicts(value, f"{name}.{key}" if name else key) for key, value in content.items()
             if not NOT_WEIGHTS.match(key))
    return {key: weights for found in inner for key, weights in found.items()}


def rank(name: str) -> int:
    """The place of a container in the order of preference."""
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    if first in FIRST:
        return FIRST.index(first)
    return len(FIRST) if EMA.search(name) else len(FIRST) + 1 if last in COMMON or not name else UNKNOWN


def stripped(weights: Weights) -> Weights:
    """A state dict without the words of wrappers, without what all names share, and without counters beside such names."""
    weights = {WRAPPERS.sub("", name): value for name, value in weights.items()}
    named = {name: value for name, value in weights.items()  # without AveragedModel's n_averaged
             if "." in name or value.ndim or value.is_floating_point()}
    prefix = shared(named)
    return {name.removeprefix(prefix): value for name, value in named.items()} if prefix else weights


def shared(names: Collection[str]) -> str:
    """What all names begin with, up to a dot: "module." of "module.a.weight" and "module.b.weight"."""
    first, last = (name.split(".")[:-1] for name in (min(names, default=""), max(names, default="")))
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, last))
    return "".join(f"{word}." for word, _ in same)


def fitted(weights: Weights, expected: Weights) -> Weights:
    """The weights under the names of a network, where only what all names share is different."""
    before, after = shared(weights), shared(expected)
    renamed = {after + name.removeprefix(before): value for name, value in weights.items()}
    return renamed if len(renamed.keys() & expected.keys()) > len(weights.keys() & expected.keys()) else weights


def check_values(weights: Weights, expected: Weights, source: object) -> None:
    """Raises UserError if weights of a network are not floating-point, or not finite. (A mask may hold -inf.)"""
    for name, value in weights.items():
        if name not in expected:
            continue
        if expected[name].is_floating_point() and not value.is_floating_point():
            raise UserError(f"{source}: {name} is {value.dtype}, not floating-point: quantised weights are not read; convert "
                            "them to floating point first")
        if not (value.is_floating_point() and not value.float().sum().isfinite()):
            continue
        if wrong := int((value.isnan() | value.isposinf()).sum()):
            raise UserError(f"{source}: {wrong:,} of {value.numel():,} values of {name} are not finite, as after a run that "
                            "diverged; take an earlier checkpoint")


def load_weights(network: nn.Module, weights: Weights, source: object) -> None:
    """Load all of a state dict. Raises UserError if it is of another network, which names a difference, or has wrong values."""
    state = network.state_dict()
    weights = fitted(weights, state)
    expected, given = ({name: tuple(value.shape) for name, value in part.items()} for part in (state, weights))
    advice = "`model`, `image_size` and `num_classes` describe bare weights"
    if not expected.keys() & given.keys():
        heads = [shortened(dict.fromkeys(name.split(".")[0] for name in names)) for names in (given, expected)]
        raise UserError(f"checkpoint {source} is of another architecture: none of its {len(given)} tensors is in the model; "
                        f"their names begin with {heads[0]}, the model's with {heads[1]}; {advice}")
    if expected != given:
        differences = [f"{name} is {given.get(name, 'missing')}, the model has {expected.get(name, 'none')}"
                       for name in sorted(expected | given) if expected.get(name) != given.get(name)]
        raise UserError(f"checkpoint {source} is of another architecture ({len(differences)} differences, first: "
                        f"{differences[0]}); {advice}")
    check_values(weights, state, source)
    network.load_state_dict(weights)


class WithoutDraws(TorchDispatchMode):
    """Parameters get no random initial values: weights replace them, and to draw the 675 M of a DiT-XL takes time."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        draws = function in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default)
        if draws and isinstance(args[0] if args[0]._base is None else args[0]._base, nn.Parameter):
            return args[0]
        return function(*args, **(kwargs or {}))
