"""Formats of checkpoints -> our Spec and weights. checkpoint.py reads the files; nothing is opened here.

FORMATS has one entry a format: how it is recognised, and how its `Source` becomes `Contents`. Another format is one entry.

- ours: a training checkpoint, or a folder of export.py
- a folder of diffusers' DiTPipeline: model_index.json, transformer/, scheduler/, vae/
- weights with DiT's keys: DiT's `.pt`; SiT's, REPA's and DMF's, whose outputs mean something else; LightningDiT's
- LDM's autoencoder, as diffusers' AutoencoderKL

Sources: SiT: Ma et al. (arXiv:2401.08740), REPA: Yu et al. (arXiv:2410.06940), DMF: Lee et al. (arXiv:2510.24474),
LightningDiT: Yao et al. (arXiv:2501.01423), LDM: Rombach et al. (arXiv:2112.10752), diffusers' DiTTransformer2DModel.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.schedules import named_betas
from models import DiT, DiT_models, sincos_position_embedding
from pipeline.spec import OWN_VAE, BareWeights, Config, Contents, ModelSpec, Source, Spec, Weights, constructor_of
from runtime import UserError


class Format(NamedTuple):
    """A format of checkpoints. `objective` selects it by `--objective`, if its weights do not describe themselves."""

    name: str
    matches: Callable[[Source], bool]
    read: Callable[[Source, BareWeights], Contents]
    objective: str | None = None


def interpret(source: Source, bare: BareWeights) -> Contents:
    """Read a source by the first of FORMATS that matches, or by that of `bare.objective`.

    Raises:
        UserError: it cannot be read, or its format contradicts `bare.objective`.
    """
    found = next(format for format in FORMATS if format.matches(source))
    if bare.objective in (None, found.objective):
        return found.read(source, bare)
    if found is not FORMATS[-1]:  # the last one matches all weights
        raise UserError(f"`objective` {bare.objective} contradicts the file, whose format is {found.name}")
    return next(format for format in FORMATS if format.objective == bare.objective).read(source, bare)


def read_own(source: Source, bare: BareWeights) -> Contents:
    spec = Spec.from_dict(source.description)
    if not source.weights:
        raise FileNotFoundError("model.safetensors does not exist")
    return Contents(spec.with_vae(str(source.path.parent / OWN_VAE)) if spec.vae == OWN_VAE else spec, source.weights)


# --- weights with DiT's keys -----------------------------------------------------------------------

PROJECTORS = "projectors."  # REPA's, which only training needs
UNCERTAINTY = "logvar_linear."  # DMF's, likewise
# The published sampling. SiT: Heun with 250 evaluations. REPA: 250 steps and an interval. DMF: four, its guidance is learnt.
FLOWS = {"sit": dict(sampler="heun", num_sampling_steps="125"),
         "repa": dict(sampler="euler", num_sampling_steps="250", cfg_scale=1.8, cfg_channels=None, guidance_interval=(0, 700)),
         "dmf": dict(sampler="map", num_sampling_steps="4", cfg_scale=1.0, cfg_channels=None)}
DMF_DEPTH = 20 / 28  # the share of blocks before its seam, if no flag of its trainer tells
DMF_SHIFT = 1.5      # of its grid at 512 pixels
LIGHTNING = dict(sampler="euler", num_sampling_steps="250", cfg_scale=6.7, guidance_interval=(0, 875))  # XL, 800 epochs
LIGHTNING_SHIFT = 10 / 3  # of the same: 0.3 in its direction of time


def read_dit(source: Source, bare: BareWeights) -> Contents:
    """DiT's weights, or any others that are not recognised."""
    remark = "" if bare.objective else ("weights without a description: assumed to predict epsilon, as DiT's do; if they are "
                                        "SiT's or REPA's, give --objective (to train, export.py --objective first)")
    return Contents(bare.spec(source.flags, shape_of(source.weights)), source.weights, remark)


def read_flow(source: Source, bare: BareWeights, kind: str) -> Contents:
    """SiT's, REPA's or DMF's weights, with the flags of their trainers if the file has them. `kind` is a key of FLOWS."""
    flags, is_map = source.flags, kind == "dmf"
    check_published_flow(flags, qk_norm=(False, True) if is_map else (False,))
    names = {"image_size": "resolution", "num_classes": "num_classes", "vae": "vae"}  # SiT's flags, like DiT's -> the others'
    stored = {name: flags.get(name, flags.get(other)) for name, other in names.items() if {name, other} & set(flags)}
    if "model" in flags:
        stored["model"] = re.sub("SiT|DMFT", "DiT", str(flags["model"]))
    spec = bare.spec(stored, shape_of(source.weights))
    if spec.model.class_name != "DiT":
        raise UserError(f"`model` {spec.model.name} is not a DiT, as the networks of SiT, REPA and DMF are")
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
    return Contents(spec, reverse_time(weights) if kind == "sit" else weights,
                    f"weights of {kind}'s {'flow map' if is_map else 'flow'}")


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
    spec = replace(spec, model=replace(spec.model, args=spec.model.args | args),
                   diffusion={"objective": "flow", "shift": LIGHTNING_SHIFT},
                   sampling=replace(spec.sampling, **LIGHTNING), latents_mean=mean, latents_std=std)
    return Contents(spec, reverse_time(first_half(weights, spec.model.args)), "weights of a LightningDiT")


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
    reversal; the last layer absorbs the sign.
    """
    key = "t_embedder.mlp.0.weight"
    if key not in weights:
        return weights  # of another architecture: loading them raises the error
    cos, sin = weights[key].double().chunk(2, dim=1)  # (D, 128) each
    count = cos.shape[1]
    f = torch.exp(-math.log(10_000) * torch.arange(count, dtype=torch.float64) / count)
    matrix = torch.cat([cos * f.cos() + sin * f.sin(), cos * f.sin() - sin * f.cos()], dim=1)
    last = {name: -weights[name] for name in ("final_layer.linear.weight", "final_layer.linear.bias") if name in weights}
    return weights | last | {key: matrix.to(weights[key].dtype)}


# --- diffusers -------------------------------------------------------------------------------------

# diffusers' names -> ours
TOP = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1", "proj_out_2": "final_layer.linear"}
BLOCK = {"norm1.linear": "adaLN_modulation.1", "attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2"}
EMBEDDERS = {"norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",  # a copy in each block
             "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
             "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table"}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


def read_diffusers(source: Source, bare: BareWeights) -> Contents:
    """A folder that diffusers' DiTPipeline.save_pretrained wrote, or one of the hub. It recommends `bare.cfg_scale`."""
    index = source.configs["model_index.json"]
    kind = index.get("_class_name")
    if kind != "DiTPipeline":
        raise UserError(f"it holds {'a pipeline with custom code' if isinstance(kind, list) else kind}, which only diffusers "
                        "loads; of diffusers' pipelines only DiTPipeline is read here")
    for name in ("transformer/config.json", "scheduler/scheduler_config.json"):
        if name not in source.configs:
            raise FileNotFoundError(f"{name} does not exist")
    if not source.weights:
        raise FileNotFoundError(f"{source.path}/transformer holds no diffusion_pytorch_model.safetensors or .bin")
    config, scheduler = source.configs["transformer/config.json"], source.configs["scheduler/scheduler_config.json"]
    check_transformer(config)
    heads, width = config["num_attention_heads"], config["num_attention_heads"] * config["attention_head_dim"]
    classes, diffusion = config["num_embeds_ada_norm"], diffusion_of(scheduler, config["out_channels"] > config["in_channels"])
    args = dict(input_size=config["sample_size"], patch_size=config["patch_size"], in_channels=config["in_channels"],
                hidden_size=width, depth=config["num_layers"], num_heads=heads, num_classes=classes,
                learn_sigma=diffusion["learn_sigma"], time_scale=diffusion["diffusion_steps"] / 1000)  # it counts steps
    names = {str(i): name for i, name in dict(index.get("id2label") or {}).items()}
    spec = bare.spec({"model": preset_of(args), "image_size": 8 * config["sample_size"], "num_classes": classes,
                      "vae": source.vae or bare.vae})
    spec = replace(spec, model=ModelSpec(spec.model.name, "DiT", spec.model.args | args), diffusion=diffusion,
                   sampling=replace(spec.sampling, cfg_channels=min(3, args["in_channels"])),
                   classes=[names.get(str(i), name) for i, name in enumerate(spec.classes)])
    return Contents(spec, transformer_weights(source.weights, args))


def check_transformer(config: Config) -> None:
    expected = {"_class_name": ("DiTTransformer2DModel", "Transformer2DModel"), "norm_type": ("ada_norm_zero",),
                "activation_fn": ("gelu-approximate",), "attention_bias": (True,)}
    for key, allowed in expected.items():
        if config.get(key) not in allowed:
            raise UserError(f"its transformer's {key} is {config.get(key)}; a DiT's is {' or '.join(map(str, allowed))}")
    if missing := {"num_attention_heads", "attention_head_dim", "num_layers", "sample_size", "patch_size", "in_channels",
                   "out_channels", "num_embeds_ada_norm"} - set(config):
        raise UserError(f"its transformer's config lacks {', '.join(sorted(missing))}")


def preset_of(shape: Config) -> str:
    """DiT's preset with this depth, hidden_size, patch_size; DiT-XL/2 stands for a shape that no preset has."""
    for name in DiT_models:
        constructor, preset = constructor_of(name)
        same = all(preset.get(key) == shape[key] for key in ("depth", "hidden_size", "patch_size"))
        if constructor is DiT and same and not {"adaln", "lightning"} & set(preset):
            return name
    return "DiT-XL/2"


def diffusion_of(scheduler: Config, learn_sigma: bool) -> Config:
    """Arguments of create_diffusion for a scheduler's config. Raises UserError if create_diffusion has no such process."""
    scheduler = dict(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02,
                     prediction_type="epsilon", _class_name="DDIMScheduler") | scheduler
    steps, schedule, name = (scheduler[key] for key in ("num_train_timesteps", "beta_schedule", "_class_name"))
    objective = PREDICTIONS.get(scheduler["prediction_type"])
    ends = [scheduler["beta_start"], scheduler["beta_end"]]
    known = schedule == "squaredcos_cap_v2" or (
        schedule == "linear" and np.allclose(ends, named_betas("linear", steps)[[0, -1]], rtol=1e-5))
    other = [key for key in ("trained_betas", "rescale_betas_zero_snr", "use_flow_sigmas") if scheduler.get(key)]
    if not objective or not known or other or name.startswith("FlowMatch"):
        raise UserError(f"its scheduler is not supported: {', '.join([name, *other])}, "
                        f"{scheduler['prediction_type']}, {schedule}, {steps} steps, betas {ends[0]} to {ends[1]}")
    return dict(noise_schedule=schedule, diffusion_steps=steps, objective=objective, learn_sigma=learn_sigma)


def transformer_weights(weights: Weights, args: Config) -> Weights:
    """diffusers' state dict -> ours. UserError if it is not a DiT's, or if the blocks' copies of the embedders differ."""
    remaining, renamed = dict(weights), {}

    def take(prefix: str) -> dict[str, Tensor]:
        """Remove the tensors with this prefix: "weight" and, if there is one, "bias"."""
        found = {kind: remaining.pop(f"{prefix}.{kind}") for kind in ("weight", "bias") if f"{prefix}.{kind}" in remaining}
        if not found:
            raise UserError(f"its transformer lacks {prefix}.weight, so it is not a DiT of {args['depth']} blocks")
        return found

    def put(prefix: str, tensors: dict[str, Tensor]) -> None:
        renamed.update({f"{prefix}.{kind}": tensor for kind, tensor in tensors.items()})

    for old, new in TOP.items():
        put(new, take(old))
    for i in range(args["depth"]):
        block = f"transformer_blocks.{i}"
        for old, new in BLOCK.items():
            put(f"blocks.{i}.{new}", take(f"{block}.{old}"))
        thirds = [take(f"{block}.{old}") for old in QKV]
        put(f"blocks.{i}.attn.qkv", {kind: torch.cat([third[kind] for third in thirds]) for kind in thirds[0]})
        for old, new in EMBEDDERS.items():
            copy = take(f"{block}.{old}")
            if i and any(not torch.equal(renamed[f"{new}.{kind}"], tensor) for kind, tensor in copy.items()):
                raise UserError(f"its blocks 0 and {i} differ in {old}; a DiT has one such embedder for all blocks")
            put(new, copy)
    remaining.pop("pos_embed.pos_embed", None)
    if remaining:
        raise UserError(f"its transformer has {next(iter(remaining))}, which no DiT has")
    side = args["input_size"] // args["patch_size"]
    return renamed | {"pos_embed": sincos_position_embedding((side, side), args["hidden_size"])}


# --- LDM's autoencoder -----------------------------------------------------------------------------

LDM = [  # LDM's names -> diffusers'
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."), (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."), (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."), (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."), (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."), (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0.")]


def from_ldm(weights: Weights) -> tuple[Config, Weights]:
    """The config and weights of diffusers' AutoencoderKL for LDM's (Rombach et al., arXiv:2112.10752), such as VA-VAE's.

    Raises:
        UserError, KeyError: these are not the weights of such an autoencoder.
    """
    weights = {key.removeprefix("first_stage_model."): value for key, value in weights.items()}
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    weights = {key: value for key, value in weights.items() if key.startswith(parts)}
    first = "encoder.down.{}.block.0.conv1.weight"
    for key in ("encoder.conv_in.weight", first.format(0), "quant_conv.weight", "post_quant_conv.weight"):
        if key not in weights:
            raise UserError(f"it lacks {key}")
    levels = sum(first.format(level) in weights for level in range(10))
    blocks = sum(f"encoder.down.0.block.{j}.conv1.weight" in weights for j in range(10))
    attention = [f"encoder.down.{level}.attn.0.q.weight" in weights for level in range(levels)]
    down = ["AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in attention]
    config = dict(in_channels=weights["encoder.conv_in.weight"].shape[1],
                  out_channels=weights["decoder.conv_out.weight"].shape[0],
                  latent_channels=weights["post_quant_conv.weight"].shape[0], layers_per_block=blocks, down_block_types=down,
                  up_block_types=[kind.replace("Down", "Up").replace("Encoder", "Decoder") for kind in reversed(down)],
                  block_out_channels=[len(weights[first.format(level)]) for level in range(levels)],
                  norm_num_groups=32, scaling_factor=1.0)
    return config, {ldm_name(key, levels): value.flatten(1) if re.search(r"attn.*\.(q|k|v|proj_out)\.weight", key) else value
                    for key, value in weights.items()}


def ldm_name(key: str, levels: int) -> str:
    """diffusers' name of one of LDM's tensors; LDM counts the decoder's levels from the highest resolution."""
    key = re.sub(r"^(decoder\.up\.)(\d+)", lambda found: f"{found[1]}{levels - 1 - int(found[2])}", key)
    for pattern, replacement in LDM:
        key = re.sub(pattern, replacement, key)
    return key


# --- all formats -----------------------------------------------------------------------------------

FORMATS = (  # the first that matches is taken
    Format("diffusers", lambda source: "model_index.json" in source.configs, read_diffusers),
    Format("DiNext", lambda source: source.description is not None, read_own),
    Format("LightningDiT", lambda source: any(".mlp.w12." in key for key in source.weights), read_lightning),
    Format("DMF", lambda source: str(source.flags.get("model")).startswith("DMFT") or any(
        key.startswith(UNCERTAINTY) for key in source.weights), partial(read_flow, kind="dmf"), "dmf"),
    Format("REPA", lambda source: "resolution" in source.flags or any(key.startswith(PROJECTORS) for key in source.weights),
           partial(read_flow, kind="repa"), "repa"),
    Format("SiT", lambda source: str(source.flags.get("model")).startswith("SiT"), partial(read_flow, kind="sit"), "sit"),
    Format("DiT", lambda source: True, read_dit, "epsilon"),
)
