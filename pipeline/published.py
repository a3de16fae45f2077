"""Bare weights with DiT's keys -> our Spec and weights: DiT's, SiT's, REPA's, DMF's, IG's, LightningDiT's.

Sources: SiT: Ma et al. (arXiv:2401.08740), REPA: Yu et al. (arXiv:2410.06940), DMF: Lee et al. (arXiv:2510.24474), IG (internal
guidance): Zhou et al. (arXiv:2512.24176), LightningDiT: Yao et al. (arXiv:2501.01423).
"""

import math
import re
from dataclasses import replace

import torch

from models import DiT, DiT_models
from pipeline.spec import BareWeights, Config, Contents, Source, Weights, constructor_of
from runtime import UserError

PROJECTORS = "projectors."  # REPA's, which only training needs
UNCERTAINTY = "logvar_linear."  # DMF's, likewise
INTERNAL = "final_layer_xr."  # the head of internal guidance
INTERNAL_SPLIT = 8  # the blocks before it, in both published networks
# The published sampling. SiT: Heun with 250 evaluations. REPA: 250 steps and an interval. DMF: four, its guidance is learnt.
# IG: SiT's SDE, and both guidances.
FLOWS = {"sit": dict(sampler="heun", num_sampling_steps="125"),
         "repa": dict(sampler="euler", num_sampling_steps="250", cfg_scale=1.8, cfg_channels=None, guidance_interval=(0, 700)),
         "dmf": dict(sampler="map", num_sampling_steps="4", cfg_scale=1.0, cfg_channels=None),
         "ig": dict(sampler="sde", num_sampling_steps="250", cfg_scale=1.35, cfg_channels=None, guidance_interval=(0, 700),
                    internal_scale=1.4)}
DMF_DEPTH = 20 / 28  # the share of blocks before its seam, if no flag of its trainer tells
DMF_SHIFT = 1.5      # of its grid at 512 pixels
LIGHTNING = dict(sampler="euler", num_sampling_steps="250", cfg_scale=6.7, guidance_interval=(0, 875))  # XL, 800 epochs
LIGHTNING_IG = dict(sampler="heun", num_sampling_steps="125", cfg_scale=1.45, cfg_channels=None, guidance_interval=(0, 810),
                    internal_scale=1.4)  # XL with internal guidance, 680 epochs
LIGHTNING_SHIFT = 10 / 3  # of both: 0.3 in its direction of time


def read_dit(source: Source, bare: BareWeights) -> Contents:
    """DiT's weights, or any others that are not recognised."""
    remark = "" if bare.objective else ("weights without a description: assumed to predict epsilon, as DiT's do; if they are "
                                        "SiT's or REPA's, give --objective (to train, export.py --objective first)")
    return Contents(bare.spec(source.flags, shape_of(source.weights)), source.weights, remark)


def read_flow(source: Source, bare: BareWeights, kind: str) -> Contents:
    """SiT's, REPA's, DMF's or IG's weights, with the flags of their trainers if the file has them. `kind` is a key of FLOWS."""
    flags, is_map = source.flags, kind == "dmf"
    check_published_flow(flags, qk_norm=(False, True) if is_map else (False,))
    names = {"image_size": "resolution", "num_classes": "num_classes", "vae": "vae"}  # SiT's flags, like DiT's -> the others'
    stored = {name: flags.get(name, flags.get(other)) for name, other in names.items() if {name, other} & set(flags)}
    if "model" in flags:
        stored["model"] = re.sub("SiT|DMFT", "DiT", str(flags["model"]))
    spec = bare.spec(stored, shape_of(source.weights))
    if spec.model.class_name != "DiT":
        raise UserError(f"`model` {spec.model.name} is not a DiT, as the networks of SiT, REPA, DMF and IG are")
    args = spec.model.args | {"learn_sigma": False, "time_scale": 1e-3}
    if is_map:
        args |= {"map_split": flags.get("dmf_depth", round(DMF_DEPTH * args["depth"])),
                 "qk_norm": any(key.endswith("q_norm.scale") for key in source.weights)}
    diffusion = {"objective": "flow-map" if is_map else "flow"} | (
        {"shift": DMF_SHIFT} if is_map and spec.image_size[0] >= 512 else {})
    spec = replace(spec, model=replace(spec.model, args=args), diffusion=diffusion,
                   sampling=replace(spec.sampling, **FLOWS[kind]))
    weights = {re.sub(r"(\.[qk]_norm)\.scale$", r"\1.weight", key): value for key, value in source.weights.items()
               if not key.startswith((PROJECTORS, UNCERTAINTY))}
    weights = first_half(weights, spec.model.args)
    contents = with_internal(Contents(spec, reverse_time(weights) if kind == "sit" else weights,
                                      f"weights of {kind}'s {'flow map' if is_map else 'flow'}"))
    if kind == "ig" and not contents.heads:
        raise UserError(f"it has no head of internal guidance, whose tensors begin with {INTERNAL}")
    return contents


def read_lightning(source: Source, bare: BareWeights) -> Contents:
    """LightningDiT's weights. Its flow is SiT's, its latents are normalised, and an image is 16 times as large as they."""
    statistics = source.read_statistics()
    if statistics is None:
        raise UserError("a LightningDiT needs the mean and std of its latents: latents_stats.pt is missing beside it")
    names = {"mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2."}
    weights = {re.sub(r"mlp\.w\d+\.", lambda found: names[found[0]], key): value for key, value in source.weights.items()
               if not key.startswith("feat_rope.")}
    shape = {"image_size": 128} | shape_of(weights)
    spec = bare.spec({}, shape | {"model": "LightningDiT-XL/1", "image_size": 2 * shape["image_size"]})
    mean, std = statistics
    args = {"in_channels": len(mean), "input_size": spec.image_size[0] // 16, "learn_sigma": False, "time_scale": 1e-3}
    guided = LIGHTNING_IG if any(key.startswith(INTERNAL) for key in weights) else LIGHTNING
    spec = replace(spec, model=replace(spec.model, args=spec.model.args | args),
                   diffusion={"objective": "flow", "shift": LIGHTNING_SHIFT},
                   sampling=replace(spec.sampling, **guided), latents_mean=mean, latents_std=std)
    weights = reverse_time(first_half(weights, spec.model.args))
    return with_internal(Contents(spec, weights, "weights of a LightningDiT"))


def with_internal(contents: Contents) -> Contents:
    """Tell the head of internal guidance, if the weights have one, from the network."""
    of_head = {key: value for key, value in contents.weights.items() if key.startswith(INTERNAL)}
    if not of_head:
        return contents
    heads = {"split": INTERNAL_SPLIT, "internal": {}}
    return contents._replace(
        spec=replace(contents.spec, heads=heads),
        weights={key: value for key, value in contents.weights.items() if key not in of_head},
        heads={f"internal.final_layer.{key.removeprefix(INTERNAL)}": value for key, value in of_head.items()})


def shape_of(weights: Weights) -> Config:
    """The preset, image size and number of classes that the shapes of DiT's tensors tell; {} for other weights."""
    try:
        width, _, patch, _ = weights["x_embedder.proj.weight"].shape
        tokens, rows = weights["pos_embed"].shape[1], len(weights["y_embedder.embedding_table.weight"])
    except (KeyError, ValueError, IndexError):
        return {}
    depth = sum(key.endswith("attn.qkv.weight") for key in weights)
    return {"model": preset_of(dict(depth=depth, hidden_size=width, patch_size=patch)),
            "image_size": 8 * patch * math.isqrt(tokens), "num_classes": max(1, rows - 1)}


def preset_of(shape: Config) -> str:
    """DiT's preset with this depth, hidden_size, patch_size; DiT-XL/2 stands for a shape that no preset has."""
    for name in DiT_models:
        constructor, preset = constructor_of(name)
        same = all(preset.get(key) == shape[key] for key in ("depth", "hidden_size", "patch_size"))
        if constructor is DiT and same and not {"adaln", "lightning"} & set(preset):
            return name
    return "DiT-XL/2"


def check_published_flow(stored: Config, qk_norm: tuple[bool, ...]) -> None:
    """Raises UserError if its trainer was run with a path, prediction or norm that is not supported here."""
    for key, allowed in {"path_type": ("linear",), "prediction": ("velocity", "v"), "qk_norm": qk_norm}.items():
        value = stored.get(key, allowed[0])
        if (value.lower() if isinstance(value, str) else value) not in allowed:
            raise UserError(f"its {key} is {value}; only {' or '.join(map(str, allowed))} is supported")


def first_half(weights: Weights, args: Config) -> Weights:
    """Drop the second half of the output's channels, which SiT has but does not use."""
    channels, patch = args["in_channels"], args["patch_size"]
    linear = {key: weights[key] for key in ("final_layer.linear.weight", "final_layer.linear.bias") if key in weights}
    for key, value in linear.items():
        if len(value) == 2 * channels * patch**2:  # (p * p * 2C, ...)
            linear[key] = value.unflatten(0, (patch**2, 2 * channels))[:, :channels].flatten(0, 1)
    return weights | linear


def reverse_time(weights: Weights) -> Weights:
    """SiT's network u(x, s) gives data - noise at s, 1 = data. These weights give noise - data at t = 1 - s.

    cos(f - f t) and sin(f - f t) are linear in cos(f t) and sin(f t), so the first matrix of the time's MLP absorbs the
    reversal; the last layer absorbs the sign, and that of internal guidance's head too.
    """
    key = "t_embedder.mlp.0.weight"
    if key not in weights:
        return weights  # of another architecture: loading them raises the error
    cos, sin = weights[key].double().chunk(2, dim=1)  # (D, 128) each
    count = cos.shape[1]
    f = torch.exp(-math.log(10_000) * torch.arange(count, dtype=torch.float64) / count)
    matrix = torch.cat([cos * f.cos() + sin * f.sin(), cos * f.sin() - sin * f.cos()], dim=1)
    last = {name: -weights[name] for layer in ("final_layer.", INTERNAL) for kind in ("weight", "bias")
            if (name := f"{layer}linear.{kind}") in weights}
    return weights | last | {key: matrix.to(weights[key].dtype)}
