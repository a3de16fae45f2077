"""What a checkpoint says of itself: how to rebuild its network, process and autoencoder, and how to sample from it.

In memory it is a `Spec`; in the file it is a plain dict of numbers, strings, lists, tuples and dicts, as `Spec.to_dict` says:

    model           {"name": the preset, "class": of the network, "args": every argument of its constructor}
    diffusion       arguments of create_diffusion
    vae             of load_autoencoder;  vae_sha256: of its weights, where train.py trained it
    latents_mean    and latents_std, of each channel of raw latents, where the features were normalised by them
    image_size      (H, W);  channels: of an image
    classes         names, in the order of their ids
    sampling        the recommended settings of sampling; None for an autoencoder, from which nothing is sampled

`SamplingSettings` is the one list of the settings of sampling.
"""

import inspect
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from torch import nn

from diffusion.guidance import check_interval, check_scale
from diffusion.process import Process
from diffusion.reuse import DEFAULTS, plan
from diffusion.samplers import SAMPLERS
from runtime import UserError
from runtime.cli import ArgumentParser, check_arguments, prefix_errors
from small_models import NETWORKS

OPTIONAL = {"vae_sha256", "latents_mean", "latents_std"}  # fields of a Spec that a checkpoint may lack
DERIVED = {"kind", "times", "guided", "depth", "default_split", "key_steps"}  # arguments of reuse.plan not in `reuse_args`

# --- the settings of sampling ----------------------------------------------------------------------


def setting(default: Any, help: str = "", recommended: bool = False, key: str | None = "",
            part: Callable[[Any], str | None] | None = None, **flag: Any) -> Any:
    """A field of SamplingSettings.

    Args:
        default: where neither a checkpoint nor a flag says otherwise.
        help: of the flag. Without it the field has no flag of its own.
        recommended: a checkpoint recommends a value, and that value is the flag's default.
        key: the field's name in NAME.json and in a PNG's text chunks; "" is the field's own name, None leaves it out.
        part: value -> its part of the file name of sample_ddp.py; None for none.
        flag: further arguments of add_argument: type, choices, nargs, metavar.
    """
    flag["default"] = None if recommended else default
    metadata = dict(help=help, recommended=recommended, key=key, part=part, flag=flag)
    return field(default_factory=dict, metadata=metadata) if default == {} else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn. A new setting is one field here and its use in generation.py.

    The flags of the sampling scripts, `--diffusion-args.sampling`, a checkpoint's recommendation, the file name of
    sample_ddp.py, NAME.json and the text chunks of a PNG are derived from the fields, in this order.

    Raises:
        UserError: a value is not allowed, whatever the network.
    """

    cfg_scale: float = setting(            # of classifier-free guidance
        1.0, "guidance, 1 = none", True, part="cfg-{}".format, type=float | None)
    cfg_channels: int | None = setting(    # how many of the first channels are guided; None: all
        None, "guided channels", True, part=str, type=int | None)
    guidance_interval: tuple[float, float] | None = setting(  # timesteps, 0..1000; None: everywhere
        None, "timesteps, 0..1000, with guidance; elsewhere the unconditional half is not computed", True,
        part=lambda interval: "interval-{:g}-{:g}".format(*interval) if interval else None,
        type=float, nargs=2, metavar=("LO", "HI"))
    dynamic_thresholding: bool = setting(  # for pixels only
        False, "true, false: Imagen's bound of predicted pixels", True, part=lambda on: "thresholded" if on else None,
        type=bool | None)
    sampler: str = setting(                # of diffusion/samplers.py
        "ddpm", "the solver", True, part=str, choices=SAMPLERS)
    num_sampling_steps: str | int = setting(  # the respacing of the process
        250, "steps, or a respacing string such as ddim50", True, key="steps", part=str, type=str | int | None)
    eta: float = setting(                  # of ddim
        0.0, "noise of ddim, 0..1", part=lambda eta: f"eta-{eta}" if eta else None, type=float)
    reuse: str = setting(                  # of features, see diffusion/reuse.py
        "none", "run most blocks on key steps only, and reuse or forecast their features elsewhere",
        part=lambda kind: None if kind == "none" else kind, choices=["none", *DEFAULTS])
    key_steps: str | None = setting(       # the rule of reuse; None: the kind's own
        None, "paper (for encoder), every:N (every:4 for forecast), or 0,3,6", key=None, type=str | None)
    reuse_args: dict = setting(            # further arguments of reuse.plan
        {}, "split, order, warm_up, parallel, prior_noise", key=None, type=dict)
    precision: str = setting("fp32", part=str)  # its flag is one that all scripts share

    def __post_init__(self):
        check_scale(self.cfg_scale)
        check_interval(self.guidance_interval)
        if not isinstance(self.dynamic_thresholding, bool):
            raise UserError(f"`dynamic_thresholding` {self.dynamic_thresholding!r} is neither true nor false")
        if self.reuse == "none" and (self.key_steps is not None or self.reuse_args):
            raise UserError("`key_steps` and `reuse_args` have a meaning only with `reuse` encoder or forecast")
        if self.reuse_args:
            with prefix_errors("`reuse_args`:"):
                object.__setattr__(self, "reuse_args", check_arguments(plan, self.reuse_args, skip=DERIVED))

    @classmethod
    def add_flags(cls, parser: ArgumentParser) -> None:
        """A flag for each setting."""
        for one in fields(cls):
            about = one.metadata
            if about["help"]:
                remark = "; default: the checkpoint's" if about["recommended"] else ""
                choices = {"choices": list(about["flag"]["choices"])} if "choices" in about["flag"] else {}
                parser.add_argument(f"--{one.name.replace('_', '-')}", help=about["help"] + remark, **about["flag"] | choices)

    @classmethod
    def given(cls, flags: dict[str, Any]) -> dict[str, Any]:
        """Those of a script's flags that are settings and were given, checked as far as no network is needed."""
        found = {one.name: flags[one.name] for one in fields(cls) if flags.get(one.name) is not None}
        cls(**found)
        return found

    @classmethod
    def recommendable(cls) -> list[str]:
        """The names of the settings that a checkpoint recommends."""
        return [one.name for one in fields(cls) if one.metadata["recommended"]]

    @classmethod
    def recommend(cls, process: Process, label_drop: float, given: dict[str, Any]) -> "SamplingSettings":
        """What a new checkpoint recommends: what its process does, with `given` above it."""
        if not isinstance(given, dict):
            raise UserError(f"{given!r} is not a dictionary")
        if unknown := [name for name in given if name not in cls.recommendable()]:
            raise UserError(f"unknown key {unknown[0]!r}; allowed: {', '.join(cls.recommendable())}")
        own = dict(process.recommended)
        own["num_sampling_steps"] = min(own["num_sampling_steps"], process.num_timesteps)
        if label_drop == 0:  # there is no unconditional half to guide by
            own["cfg_scale"] = 1.0
        return cls(**own | given)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "SamplingSettings":
        """A checkpoint's recommendation."""
        if unknown := set(stored) - set(cls.recommendable()):
            raise UserError(f"its sampling has {', '.join(sorted(unknown))}, which this version does not know")
        return cls(**stored)

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {name: getattr(self, name) for name in self.recommendable()}

    def record(self, **said: str) -> dict[str, Any]:
        """What NAME.json and the text chunks of a PNG say; `said` replaces a setting by what came of it."""
        return {one.metadata["key"] or one.name: said.get(one.name, getattr(self, one.name))
                for one in fields(self) if one.metadata["key"] is not None}

    def file_name_parts(self, **said: str) -> list[str]:
        """The parts of a file name that tell the settings; those that are out of the ordinary only where they are."""
        parts = [one.metadata["part"](said.get(one.name, getattr(self, one.name)))
                 for one in fields(self) if one.metadata["part"]]
        return [part for part in parts if part is not None]


# --- the network -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSpec:
    """How to build a network again, whatever becomes of today's presets."""

    name: str             # the preset, as --model names it
    class_name: str       # of the network
    args: dict[str, Any]  # every argument of its constructor

    @classmethod
    def of_preset(cls, name: str, args: dict[str, Any]) -> "ModelSpec":
        """A preset of today with `args` above it.

        Raises:
            UserError: there is no such preset.
        """
        if name not in NETWORKS:
            raise UserError(f"`model` {name} is unknown; allowed: {', '.join(NETWORKS)}")
        constructor, preset = constructor_of(name)
        return cls(name, constructor.__name__, defaults_of(constructor) | preset | args)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "ModelSpec":
        constructor = find_constructor(stored["name"], stored["class"])
        args = defaults_of(constructor) | stored["args"]  # defaults: of arguments that were added later
        return cls(stored["name"], stored["class"], args)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "class": self.class_name, "args": self.args}

    def build(self) -> nn.Module:
        """The network, with initial weights. A wrong argument raises what its constructor raises."""
        return find_constructor(self.name, self.class_name)(**self.args)


def constructor_of(name: str) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """What builds a preset, and the arguments that the preset fixes. An entry of a registry may be any callable."""
    entry = NETWORKS[name]
    return (entry.func, entry.keywords) if isinstance(entry, partial) else (entry, {})


def defaults_of(constructor: Callable) -> dict[str, Any]:
    parameters = inspect.signature(constructor).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def find_constructor(name: str, class_name: str) -> Callable[..., nn.Module]:
    """The constructor of that name, the preset's own first."""
    own = [constructor_of(name)[0]] if name in NETWORKS else []
    for constructor in own + [constructor_of(other)[0] for other in NETWORKS]:
        if constructor.__name__ == class_name:
            return constructor
    raise UserError(f"its network is of class {class_name} (preset {name}), which no registry has; a class of one's own must "
                    "be registered first, as docs/extending.md shows")


# --- the whole -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """What a checkpoint says of itself. The module's docstring has its form in a file."""

    model: ModelSpec
    diffusion: dict[str, Any]          # arguments of create_diffusion; empty for an autoencoder
    vae: str                           # of load_autoencoder
    image_size: tuple[int, int]        # (H, W) of an image
    channels: int                      # of an image
    classes: list[str]                 # names, in the order of their ids
    sampling: SamplingSettings | None  # recommended; None for an autoencoder
    vae_sha256: str | None = None      # of the autoencoder's weights, where train.py trained it
    latents_mean: list[float] | None = None  # of each channel of the autoencoder's raw latents, where they are normalised by
    latents_std: list[float] | None = None   # these and not as the autoencoder says

    @property
    def is_autoencoder(self) -> bool:
        """Whether the network is an autoencoder, from which nothing is sampled."""
        return self.sampling is None

    @classmethod
    def from_dict(cls, stored: object) -> "Spec":
        """Raises UserError where something is missing, or of a kind that this version does not know."""
        names = {one.name for one in fields(cls)}
        given = set(stored) if isinstance(stored, dict) else set()
        if missing := names - given - OPTIONAL:
            raise UserError(f"its description lacks {', '.join(sorted(missing))}")
        if unknown := given - names:
            raise UserError(f"its description has {', '.join(sorted(unknown))}, which this version does not know")
        if not isinstance(stored["classes"], list) or ("latents_mean" in given) != ("latents_std" in given):
            raise UserError("its classes are no list of names, or only one of latents_mean and latents_std is there")
        model, image_size, sampling = ModelSpec.from_dict(stored["model"]), tuple(stored["image_size"]), stored["sampling"]
        sampling = None if sampling is None else SamplingSettings.from_dict(sampling)
        return cls(**stored | dict(model=model, image_size=image_size, sampling=sampling))

    def to_dict(self) -> dict[str, Any]:
        """The plain dict that a checkpoint holds."""
        plain = {one.name: getattr(self, one.name) for one in fields(self)}
        plain = {name: value for name, value in plain.items() if value is not None or name not in OPTIONAL}
        return plain | {"model": self.model.to_dict(), "sampling": self.sampling and self.sampling.to_dict()}

    @property
    def statistics(self) -> tuple[list[float], list[float]] | None:
        """Mean and standard deviation by which raw latents are normalised, as load_autoencoder takes them."""
        return None if self.latents_mean is None else (self.latents_mean, self.latents_std)

    def with_vae(self, vae: str | None) -> "Spec":
        return replace(self, vae=vae) if vae else self


@dataclass(frozen=True)
class BareWeights:
    """What bare weights, such as DiT's published ones, are said to be. None: what their file or their shapes tell."""

    model: str | None = None
    image_size: int | None = None
    num_classes: int | None = None
    vae: str = "mse"
    cfg_scale: float = 4.0
    objective: str | None = None  # of interchange.OBJECTIVES; None: what the file shows, else epsilon

    def spec(self, stored: dict[str, Any], shape: dict[str, Any] | None = None) -> Spec:
        """An epsilon model on Stable Diffusion's latents.

        Args:
            stored: the flags of DiT's own trainer, where the file has them.
            shape: the model, image_size and num_classes that the weights look like, where nobody tells them.
        """
        given = {key: getattr(self, key) for key in ("model", "image_size", "num_classes") if getattr(self, key) is not None}
        args = {"model": "DiT-XL/2", "image_size": 256, "num_classes": 1000, "vae": self.vae} | (shape or {}) | given | stored
        model, image_size, num_classes = args["model"], args["image_size"], args["num_classes"]
        if image_size < 8 or image_size % 8 or num_classes < 1:
            raise UserError(f"`image_size` {image_size} must be a positive multiple of 8, `num_classes` {num_classes} positive")
        return Spec(
            model=ModelSpec.of_preset(model, {"input_size": image_size // 8, "num_classes": num_classes}),
            diffusion={},
            vae=args["vae"],
            image_size=(image_size, image_size),
            channels=3,
            classes=default_class_names(num_classes),
            sampling=SamplingSettings(sampler="ddpm", num_sampling_steps="250", cfg_scale=self.cfg_scale, cfg_channels=3),
        )


def default_class_names(count: int) -> list[str]:
    """ImageNet's English names for 1,000 classes, else numbers."""
    from timm.data import ImageNetInfo
    return ImageNetInfo().label_descriptions() if count == 1000 else [str(i) for i in range(count)]


def normal_name(name: str) -> str:
    """A class's name in the form in which names are compared: case, Unicode's forms and the kind of space do not count."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    return re.sub(r"[\s_-]+", "_", folded.strip())
