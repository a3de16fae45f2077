"""What a checkpoint says of itself: how to rebuild its network, process and autoencoder, and how to sample from it.

In memory it is a `Spec`; in the file it is a plain dict of numbers, strings, lists, tuples and dicts, see `Spec.to_dict`:

    model           {"name": the preset, "class": of the network, "args": every argument of its constructor}
    diffusion       arguments of create_diffusion
    vae             the name that load_autoencoder takes;  vae_sha256: the sha256 of its weights, if train.py trained it
    latents_mean    and latents_std: of each channel of raw latents, if the features were normalised by them
    image_size      (H, W) of an image;  channels: its number of channels
    classes         names, in the order of their ids
    sampling        the recommended settings of sampling; None for an autoencoder, from which nothing is sampled
    heads           split and arguments of the heads that were trained with the network, see heads.py
"""

import argparse
import inspect
import re
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.settings import SamplingSettings
from runtime import UserError
from runtime.cli import WRONG_VALUE
from small_models import NETWORKS

Weights = dict[str, Tensor]
Config = dict[str, Any]
Statistics = tuple[list[float], list[float]]  # mean and standard deviation of each channel of raw latents

OWN_VAE = "vae"  # a Spec's vae if the autoencoder lies in a folder of this name beside the weights
OPTIONAL = {"vae_sha256", "latents_mean", "latents_std", "heads"}  # fields of a Spec that a checkpoint may lack

# --- the network -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSpec:
    """How to build a network again, even after its preset has changed."""

    name: str             # the preset, as --model names it
    class_name: str       # the network's class
    args: dict[str, Any]  # every argument of its constructor

    @classmethod
    def of_preset(cls, name: str, args: dict[str, Any]) -> "ModelSpec":
        """The preset `name`, with `args` over its own arguments.

        Raises:
            UserError: there is no such preset.
        """
        if name not in NETWORKS:
            raise UserError(f"`model` {name} is unknown; allowed: {', '.join(NETWORKS)}")
        constructor, preset = constructor_of(name)
        return cls(name, constructor.__name__, defaults_of(constructor) | preset | args)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "ModelSpec":
        if missing := {"name", "class", "args"} - set(stored):
            raise UserError(f"the description of its network lacks {', '.join(sorted(missing))}")
        constructor = find_constructor(stored["name"], stored["class"])
        defaults = defaults_of(constructor)  # of arguments that were added later
        if "label_std" in defaults:
            defaults["label_std"] = 0.02  # of all networks before it was an argument
        return cls(stored["name"], stored["class"], defaults | stored["args"])

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "class": self.class_name, "args": self.args}

    @property
    def wrong_values(self) -> tuple[type[Exception], ...]:
        """What the constructor raises for wrong values. A stranger's RuntimeError or TypeError is a bug, to be traced."""
        own = find_constructor(self.name, self.class_name).__module__ in ("models", "small_models")
        return WRONG_VALUE if own else (ValueError, ArithmeticError, AssertionError)

    def build(self) -> nn.Module:
        """The network, with initial weights.

        Raises:
            UserError: its constructor does not have these arguments.
            wrong_values: it does not take their values.
        """
        constructor = find_constructor(self.name, self.class_name)
        try:
            inspect.signature(constructor).bind(**self.args)
        except TypeError as error:
            raise UserError(f"{self.class_name}: {error}") from None
        return constructor(**self.args)

    def outline(self) -> nn.Module:
        """The network without memory, on the meta device; a real one if its constructor needs numbers, as `.item()` does."""
        with suppress(Exception), torch.device("meta"):
            return self.build()
        return self.build()


def constructor_of(name: str) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """What builds a preset, and the arguments that the preset fixes. An entry of a registry may be any callable."""
    entry = NETWORKS[name]
    return (entry.func, entry.keywords) if isinstance(entry, partial) else (entry, {})


def defaults_of(constructor: Callable) -> dict[str, Any]:
    parameters = inspect.signature(constructor).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def find_constructor(name: str, class_name: str) -> Callable[..., nn.Module]:
    """The constructor of that class, the preset's if it is of that class."""
    presets = [name] if name in NETWORKS else []
    for constructor in (constructor_of(preset)[0] for preset in presets + list(NETWORKS)):
        if constructor.__name__ == class_name:
            return constructor
    raise UserError(f"its network is of class {class_name} (preset {name}), which is not in any registry; register your own "
                    "class first, as docs/extending.md shows")


# --- the whole -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """What a checkpoint says of itself. The module's docstring describes the stored form."""

    model: ModelSpec
    diffusion: dict[str, Any]          # arguments of create_diffusion; empty for an autoencoder
    vae: str                           # of load_autoencoder
    image_size: tuple[int, int]        # (H, W) of an image
    channels: int                      # of an image
    classes: list[str]                 # names, in the order of their ids
    sampling: SamplingSettings | None  # recommended; None for an autoencoder
    vae_sha256: str | None = None      # of the autoencoder's weights, where train.py trained it
    latents_mean: list[float] | None = None  # of each channel of the autoencoder's raw latents, if they are normalised by
    latents_std: list[float] | None = None   # these instead of the autoencoder's own scale
    heads: dict[str, Any] | None = None      # trained with the network

    @property
    def is_autoencoder(self) -> bool:
        """Whether the network is an autoencoder, from which nothing is sampled."""
        return self.sampling is None

    @classmethod
    def from_dict(cls, stored: object) -> "Spec":
        """Raises UserError if something is missing or unknown to this version."""
        names = {entry.name for entry in fields(cls)}
        given = set(stored) if isinstance(stored, dict) else set()
        if missing := names - given - OPTIONAL:
            raise UserError(f"its description lacks {', '.join(sorted(missing))}")
        if unknown := given - names:
            raise UserError(f"its description has {', '.join(sorted(unknown))}, which this version does not know")
        if not isinstance(stored["classes"], list):
            raise UserError(f"its classes are {stored['classes']!r}, not a list of names")
        if ("latents_mean" in given) != ("latents_std" in given):
            raise UserError("it has only one of latents_mean and latents_std")
        model, image_size, sampling = ModelSpec.from_dict(stored["model"]), tuple(stored["image_size"]), stored["sampling"]
        sampling = None if sampling is None else SamplingSettings.from_dict(sampling)
        return cls(**stored | dict(model=model, image_size=image_size, sampling=sampling))

    def to_dict(self) -> dict[str, Any]:
        """The plain dict that a checkpoint holds."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        plain = {name: value for name, value in plain.items() if value is not None or name not in OPTIONAL}
        return plain | {"model": self.model.to_dict(), "sampling": self.sampling and self.sampling.to_dict()}

    @property
    def statistics(self) -> Statistics | None:
        """Mean and standard deviation by which raw latents are normalised, as load_autoencoder takes them."""
        return None if self.latents_mean is None else (self.latents_mean, self.latents_std)

    def with_vae(self, vae: str | None) -> "Spec":
        return replace(self, vae=vae) if vae else self


@dataclass(frozen=True)
class BareWeights:
    """What the user says about weights that do not describe themselves, such as DiT's published ones.

    None: what the flags in their file or the shapes of the tensors tell.
    """

    model: str | None = None
    image_size: int | None = None
    num_classes: int | None = None
    vae: str = "mse"
    cfg_scale: float = 4.0
    objective: str | None = None  # of BARE_OBJECTIVES; None: what the file shows, else epsilon

    def spec(self, stored: dict[str, Any], shape: dict[str, Any] | None = None) -> Spec:
        """An epsilon model on Stable Diffusion's latents.

        Args:
            stored: the flags of DiT's own trainer, if the file has them.
            shape: the model, image_size and num_classes that the shapes of the weights suggest.
        """
        given = {key: getattr(self, key) for key in ("model", "image_size", "num_classes") if getattr(self, key) is not None}
        args = {"model": "DiT-XL/2", "image_size": 256, "num_classes": 1000, "vae": self.vae} | (shape or {}) | given | stored
        model, image_size, num_classes = args["model"], args["image_size"], args["num_classes"]
        if image_size < 8 or image_size % 8 or num_classes < 1:
            raise UserError(f"`image_size` {image_size} must be a positive multiple of 8, `num_classes` {num_classes} positive")
        return Spec(ModelSpec.of_preset(model, {"input_size": image_size // 8, "num_classes": num_classes}), diffusion={},
                    vae=args["vae"], image_size=(image_size, image_size), channels=3, classes=default_class_names(num_classes),
                    sampling=SamplingSettings(cfg_scale=self.cfg_scale, cfg_channels=3, num_sampling_steps="250"))


# --- what is read from a path ------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """What checkpoint.py found at a path."""

    path: Path                             # of the file with the weights; of the folder if it has none
    weights: Weights                       # the EMA, else the model; {} if there are none
    facts: Config                          # what else the file holds, without the optimizer: spec, args, step, …
    configs: dict[str, Config] = field(default_factory=dict)  # the JSON files of a folder, by their names in it
    vae: str | None = None                 # the folder of an autoencoder beside the weights
    read_statistics: Callable[[], Statistics | None] = lambda: None  # of LightningDiT's latents_stats.pt beside the weights
    remark: str = ""                       # a sentence about what was taken, if other weights could be meant

    @property
    def description(self) -> Config | None:
        """The stored form of a Spec, if the source describes itself."""
        return self.facts.get("spec", self.configs.get("config.json"))

    @property
    def heads(self) -> Weights:
        """The EMA weights of our heads; {} if there are none."""
        return self.facts.get("heads", {}).get("ema", {})

    @property
    def flags(self) -> Config:
        """The flags of DiT's own trainer, or of a fork's, if the file holds them."""
        flags = self.facts.get("args")
        return vars(flags) if isinstance(flags, argparse.Namespace) else {}


class Contents(NamedTuple):
    """A network as our Spec and weights, whatever the format it was read from."""

    spec: Spec
    weights: Weights
    remark: str = ""  # a sentence about what was assumed
    heads: Weights = {}  # of the heads that were trained with it, see heads.py


# --- names of classes --------------------------------------------------------------------------------


def default_class_names(count: int) -> list[str]:
    """ImageNet's English names for 1,000 classes, else numbers."""
    if count != 1000:
        return [str(i) for i in range(count)]
    from timm.data import ImageNetInfo  # slow to import

    return ImageNetInfo().label_descriptions()


def normal_name(name: str) -> str:
    """A class's name as names are compared: without differences of case, Unicode form and kind of space."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    return re.sub(r"[\s_-]+", "_", folded.strip())
