"""Formats of checkpoints -> our Spec and weights. checkpoint.py reads the files; nothing is opened here.

FORMATS has one entry a format: how it is recognised, and how its `Source` becomes `Contents`. Another format is one entry.

- ours: a training checkpoint, or a folder of export.py
- a folder of diffusers' DiTPipeline: model_index.json, transformer/, scheduler/, vae/
- bare weights with DiT's keys, by published.py: DiT's `.pt`; SiT's, REPA's, DMF's and IG's, whose outputs mean something
  else; LightningDiT's
- LDM's autoencoder, as diffusers' AutoencoderKL

Sources: those of published.py; LDM: Rombach et al. (arXiv:2112.10752), diffusers' DiTTransformer2DModel.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.schedules import named_betas
from models import sincos_position_embedding
from pipeline.published import INTERNAL, PROJECTORS, UNCERTAINTY, preset_of, read_dit, read_flow, read_lightning
from pipeline.spec import OWN_VAE, BareWeights, Config, Contents, ModelSpec, Source, Spec, Weights
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
    spec = spec.with_vae(str(source.path.parent / OWN_VAE)) if spec.vae == OWN_VAE else spec
    return Contents(spec, source.weights, heads=source.heads)


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
    Format("IG", lambda source: any(key.startswith(INTERNAL) for key in source.weights), partial(read_flow, kind="ig"), "ig"),
    Format("DMF", lambda source: str(source.flags.get("model")).startswith("DMFT") or any(
        key.startswith(UNCERTAINTY) for key in source.weights), partial(read_flow, kind="dmf"), "dmf"),
    Format("REPA", lambda source: "resolution" in source.flags or any(key.startswith(PROJECTORS) for key in source.weights),
           partial(read_flow, kind="repa"), "repa"),
    Format("SiT", lambda source: str(source.flags.get("model")).startswith("SiT"), partial(read_flow, kind="sit"), "sit"),
    Format("DiT", lambda source: True, read_dit, "epsilon"),
)
