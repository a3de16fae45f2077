"""The settings of sampling: their flags, what a checkpoint recommends, and what records and file names say of them.

A new setting is a field of SamplingSettings with its check, a flag in `add_flags`, an entry in `record` and in
`file_name_parts`, and its use in generation.py.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from diffusion.guidance import check_interval, check_scale
from diffusion.process import Process
from diffusion.reuse import DEFAULTS, plan
from diffusion.samplers import SAMPLERS
from runtime import UserError
from runtime.cli import ArgumentParser, check_arguments, prefix_errors
from small_models import DIFFUSION_NETWORKS

BARE_OBJECTIVES = ("epsilon", "sit", "repa", "dmf", "ig")  # of weights that do not describe themselves: published.py
RECOMMENDED = ("cfg_scale", "cfg_channels", "guidance_interval", "internal_scale", "internal_interval", "dynamic_thresholding",
               "sampler", "num_sampling_steps")
DERIVED = {"kind", "times", "guided", "depth", "default_split", "key_steps"}  # arguments of reuse.plan not in `reuse_args`


def add_sampling_arguments(parser: ArgumentParser) -> None:
    """Add the flags of every script that samples: which checkpoint, and how."""
    parser.add_shared_arguments()
    parser.add_argument("--ckpt", type=str | None, help="checkpoint, run folder or published name; default: DiT-XL/2's")
    parser.add_argument("--guide-ckpt", type=str | None,
                        help="autoguidance: a weaker checkpoint, whose prediction replaces the unconditional one")
    parser.add_argument("--model", registry=DIFFUSION_NETWORKS, help="for bare weights (DiT-XL/2)")
    parser.add_argument("--image-size", type=int | None, help="for bare weights (256)")
    parser.add_argument("--num-classes", type=int | None, help="for bare weights (1000)")
    parser.add_argument("--objective", choices=BARE_OBJECTIVES, help="for bare weights: of DiT, SiT, REPA, DMF or IG (epsilon)")
    parser.add_argument("--vae", type=str | None, help="ema, mse, pixels, a folder, own run, hub id; default: the checkpoint's")
    SamplingSettings.add_flags(parser)


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn. A checkpoint recommends the settings in RECOMMENDED.

    Raises:
        UserError: a value is not allowed for any network.
    """

    cfg_scale: float = 1.0                                 # of classifier-free guidance
    cfg_channels: int | None = None                        # how many of the first channels are guided; None: all
    guidance_interval: tuple[float, float] | None = None   # timesteps, 0..1000, with guidance; None: all
    internal_scale: float = 1.0                            # of internal guidance, by a head of the network (see heads.py)
    internal_interval: tuple[float, float] | None = None   # timesteps, 0..1000, with it; None: all
    dynamic_thresholding: bool = False                     # for pixels only
    sampler: str = "ddpm"                                  # of diffusion/samplers.py
    num_sampling_steps: str | int = 250                    # the respacing of the process
    eta: float = 0.0                                       # of ddim and map
    reuse: str = "none"                                    # of features, see diffusion/reuse.py
    key_steps: str | None = None                           # the rule of reuse; None: the default of its kind
    reuse_args: dict[str, Any] = field(default_factory=dict)  # further arguments of reuse.plan
    precision: str = "fp32"

    def __post_init__(self):
        check_scale(self.cfg_scale)
        check_interval(self.guidance_interval)
        check_scale(self.internal_scale, "internal_scale")
        check_interval(self.internal_interval, "internal_interval")
        if not isinstance(self.dynamic_thresholding, bool):
            raise UserError(f"`dynamic_thresholding` {self.dynamic_thresholding!r} is neither true nor false")
        if self.reuse == "none" and (self.key_steps is not None or self.reuse_args):
            raise UserError("`key_steps` and `reuse_args` apply only with `reuse` encoder or forecast")
        if self.reuse_args:
            with prefix_errors("`reuse_args`:"):
                object.__setattr__(self, "reuse_args", check_arguments(plan, self.reuse_args, skip=DERIVED))

    @staticmethod
    def add_flags(parser: ArgumentParser) -> None:
        """Add a flag for each setting but `precision`, which all scripts have. None stands for the checkpoint's value."""
        def recommended(flag: str, help: str, **options) -> None:
            parser.add_argument(flag, help=f"{help}; default: the checkpoint's", **options)

        recommended("--cfg-scale", "guidance, 1 = none", type=float | None)
        recommended("--cfg-channels", "guided channels", type=int | None)
        recommended("--guidance-interval", "timesteps with guidance, 0..1000; at others only the conditional half is computed",
                    type=float, nargs=2, metavar=("LO", "HI"))
        recommended("--internal-scale", "internal guidance by a trained head, 1 = none", type=float | None)
        recommended("--internal-interval", "timesteps with internal guidance", type=float, nargs=2, metavar=("LO", "HI"))
        recommended("--dynamic-thresholding", "true, false: Imagen's bound of predicted pixels", type=bool | None)
        recommended("--sampler", "the solver", choices=list(SAMPLERS))
        recommended("--num-sampling-steps", "steps, or a respacing string such as ddim50", type=str | int | None)
        parser.add_argument("--eta", type=float, default=0.0, help="noise of ddim, 0..1; of map, 0 or 1")
        parser.add_argument("--reuse", choices=["none", *DEFAULTS], default="none",
                            help="run most blocks on key steps only, and reuse or forecast their features elsewhere")
        parser.add_argument("--key-steps", type=str | None,
                            help="paper (for encoder), every:N (every:4 for forecast), or 0,3,6")
        parser.add_argument("--reuse-args", type=dict, default={}, help="split, order, warm_up, parallel, prior_noise")

    @classmethod
    def given(cls, flags: dict[str, Any]) -> dict[str, Any]:
        """The settings among a script's flags that were given. Raises UserError for values that no network allows."""
        found = {setting.name: flags[setting.name] for setting in fields(cls) if flags.get(setting.name) is not None}
        cls(**found)
        return found

    @classmethod
    def recommend(cls, process: Process, label_drop: float, given: dict[str, Any]) -> "SamplingSettings":
        """What a new checkpoint recommends: the process's recommendation, overridden by `given`."""
        if not isinstance(given, dict):
            raise UserError(f"{given!r} is not a dictionary")
        if unknown := [name for name in given if name not in RECOMMENDED]:
            raise UserError(f"unknown key {unknown[0]!r}; allowed: {', '.join(RECOMMENDED)}")
        recommended = dict(process.recommended)
        recommended["num_sampling_steps"] = min(recommended["num_sampling_steps"], process.num_timesteps)
        if label_drop == 0:  # there is no unconditional half to guide by
            recommended["cfg_scale"] = 1.0
        return cls(**recommended | given)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "SamplingSettings":
        """The settings that a checkpoint recommends."""
        if unknown := set(stored) - set(RECOMMENDED):
            raise UserError(f"unknown settings of sampling: {', '.join(sorted(unknown))}")
        return cls(**stored)

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return {name: getattr(self, name) for name in RECOMMENDED}

    def record(self, reuse: str) -> dict[str, Any]:
        """What NAME.json and the text chunks of a PNG say. `reuse` describes the plan, with key steps and arguments."""
        internal = {"internal_scale": self.internal_scale, "internal_interval": self.internal_interval}
        return {"cfg_scale": self.cfg_scale, "cfg_channels": self.cfg_channels, "guidance_interval": self.guidance_interval,
                **(internal if self.internal_scale != 1 else {}), "dynamic_thresholding": self.dynamic_thresholding,
                "sampler": self.sampler, "steps": self.num_sampling_steps, "eta": self.eta, "reuse": reuse,
                "precision": self.precision}

    def file_name_parts(self, reuse: str | None) -> list[str]:
        """The parts of a file name. Less common settings appear only if they are not the default."""
        inside = [f"internal-{self.internal_scale:g}", *map("{:g}".format, self.internal_interval or ())]
        parts = [f"cfg-{self.cfg_scale}", str(self.cfg_channels),
                 "interval-{:g}-{:g}".format(*self.guidance_interval) if self.guidance_interval else None,
                 "-".join(inside) if self.internal_scale != 1 else None,
                 "thresholded" if self.dynamic_thresholding else None,
                 self.sampler, str(self.num_sampling_steps), f"eta-{self.eta}" if self.eta else None, reuse, self.precision]
        return [part for part in parts if part is not None]
