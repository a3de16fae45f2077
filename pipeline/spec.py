"""What a checkpoint says of itself."""

import argparse

from torch import nn

from small_models import NETWORKS

RECOMMENDED = ("sampler", "num_sampling_steps", "cfg_scale", "cfg_channels", "guidance_interval", "dynamic_thresholding")


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
    if description["name"] not in NETWORKS:
        raise ValueError(f"--model {description['name']} is unknown; allowed: {', '.join(NETWORKS)}")
    return NETWORKS[description["name"]](**description["args"])


def recommend(process, label_drop: float, given: dict) -> dict:
    """The spec's "sampling": what its process recommends, with what was given to --diffusion-args as `sampling` above it."""
    sampling = process.recommended | {"cfg_channels": None, "guidance_interval": None, "dynamic_thresholding": False}
    sampling["num_sampling_steps"] = min(sampling["num_sampling_steps"], process.num_timesteps)
    if label_drop == 0:  # there is no unconditional half to guide by
        sampling["cfg_scale"] = 1.0
    if not isinstance(given, dict) or set(given) - set(sampling):
        raise ValueError(f"--diffusion-args: sampling {given} is not a dictionary with the keys {', '.join(sampling)}")
    return sampling | given
