"""Other formats <-> our Spec and weights, as dictionaries that checkpoint.py has read or will write. No file is opened here.

- bare weights: DiT's `.pt`; SiT's and REPA's, which have the same keys and another meaning; LightningDiT's
- a folder of diffusers' DiTPipeline: model_index.json, transformer/, scheduler/, vae/; in and out
- what pipeline/exported.py needs to draw what our samplers draw, by diffusers' schedulers; out

Sources: SiT: Ma et al. (arXiv:2401.08740), REPA: Yu et al. (arXiv:2410.06940), LightningDiT: Yao et al. (arXiv:2501.01423),
diffusers' DiTTransformer2DModel.
"""

import math
import re
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion import create_diffusion
from diffusion.flow import FlowMatching
from diffusion.gaussian_diffusion import GaussianDiffusion
from diffusion.process import Process
from diffusion.schedules import named_betas
from models import DiT, DiT_models, sincos_position_embedding
from pipeline.spec import BareWeights, ModelSpec, SamplingSettings, Spec, constructor_of
from runtime import UserError

Weights = dict[str, Tensor]
Config = dict[str, Any]

PROJECTORS = "projectors."  # REPA's, which only training needs
# What flow models are sampled by, as published: SiT's Heun with 250 evaluations, REPA's 250 steps and interval.
FLOWS = {"sit": dict(sampler="heun", num_sampling_steps="125"),
         "repa": dict(sampler="euler", num_sampling_steps="250", cfg_scale=1.8, cfg_channels=None, guidance_interval=(0, 700))}
OBJECTIVES = ("epsilon", *FLOWS)
# LightningDiT-XL of 800 epochs. Its paper also shifts the times of the steps, which no sampler here does.
LIGHTNING = dict(sampler="euler", num_sampling_steps="250", cfg_scale=6.7, guidance_interval=(0, 875))

# diffusers' names -> ours
TOP = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1", "proj_out_2": "final_layer.linear"}
BLOCK = {"norm1.linear": "adaLN_modulation.1", "attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2"}
EMBEDDERS = {"norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",  # a copy in each block
             "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
             "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table"}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}  # ours -> diffusers'


class Published(NamedTuple):
    """A network as others publish it, in our terms."""

    spec: Spec
    weights: Weights
    remark: str = ""  # a sentence about what was assumed


# --- bare weights ----------------------------------------------------------------------------------


def from_bare(weights: Weights, stored: Config, bare: BareWeights) -> Published:
    """Weights with DiT's keys.

    Args:
        stored: the flags of the trainer that wrote the file, if it holds them.
        bare: what the user says of the weights. Without an objective, projectors or a `resolution` mean REPA's and other flags
            of a SiT's trainer mean SiT's; any other weights are taken to predict epsilon, as DiT's do.
    """
    projectors = any(key.startswith(PROJECTORS) for key in weights)
    name = str(stored.get("model", ""))
    found = "repa" if projectors or "resolution" in stored else "sit" if name.startswith("SiT") else None
    if bare.objective and found not in (None, bare.objective):
        raise UserError(f"`objective` {bare.objective} contradicts what stands beside these weights, which are of {found}")
    objective = bare.objective or found or "epsilon"
    if objective == "epsilon":
        remark = "" if bare.objective else ("bare weights, taken to predict epsilon as DiT's do; if they are SiT's or REPA's, "
                                            "the objective must be given")
        return Published(bare.spec(stored, shape_of(weights)), weights, remark)
    check_published_flow(stored)
    flags = {"image_size": "resolution", "num_classes": "num_classes", "vae": "vae"}  # SiT's names are DiT's
    stored = {key: stored.get(key, stored.get(other)) for key, other in flags.items() if {key, other} & set(stored)}
    spec = bare.spec(stored | ({"model": name.replace("SiT", "DiT")} if name else {}), shape_of(weights))
    if spec.model.class_name != "DiT":
        raise UserError(f"`model` {spec.model.name} is no DiT, as the networks of SiT and REPA are")
    model = replace(spec.model, args=spec.model.args | {"learn_sigma": False, "time_scale": 1e-3})
    spec = replace(spec, model=model, diffusion={"objective": "flow"}, sampling=replace(spec.sampling, **FLOWS[objective]))
    weights = first_half({key: value for key, value in weights.items() if not key.startswith(PROJECTORS)}, spec.model.args)
    remark = f"bare weights of {objective}'s flow"
    return Published(spec, reverse_time(weights) if objective == "sit" else weights, remark)


def is_lightning(weights: Weights) -> bool:
    return any(".mlp.w12." in key for key in weights)


def from_lightning(weights: Weights, bare: BareWeights, statistics: tuple[list[float], ...] | None) -> Published:
    """LightningDiT's weights. Its flow is SiT's, its latents are normalised, and an image is 16 times as large as they.

    Args:
        statistics: mean and standard deviation of the latents, which it has in a file of its own.
    """
    if bare.objective:
        raise UserError(f"`objective` {bare.objective}: these are weights of a LightningDiT, which has a flow of its own")
    if statistics is None:
        raise UserError("it is a LightningDiT, so mean and std of its latents must lie beside it in latents_stats.pt")
    names = {"mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2."}
    weights = {re.sub(r"mlp\.w\d+\.", lambda found: names[found[0]], key): value for key, value in weights.items()
               if not key.startswith("feat_rope.")}
    shape = {"image_size": 128} | shape_of(weights)
    spec = bare.spec({}, shape | {"model": "LightningDiT-XL/1", "image_size": 2 * shape["image_size"]})
    mean, std = statistics
    args = {"in_channels": len(mean), "input_size": spec.image_size[0] // 16, "learn_sigma": False,
            "time_scale": 1e-3}
    spec = replace(spec, model=replace(spec.model, args=spec.model.args | args), diffusion={"objective": "flow"},
                   sampling=replace(spec.sampling, **LIGHTNING), latents_mean=mean, latents_std=std)
    return Published(spec, reverse_time(first_half(weights, spec.model.args)), "bare weights of a LightningDiT")


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


def check_published_flow(stored: Config) -> None:
    """SiT's and REPA's trainers know other paths and predictions than the published ones; these have no form here."""
    for key, allowed in {"path_type": ("linear",), "prediction": ("velocity", "v"), "qk_norm": (False,)}.items():
        value = stored.get(key, allowed[0])
        if (value.lower() if isinstance(value, str) else value) not in allowed:
            raise UserError(f"its {key} is {value}; only {' or '.join(map(str, allowed))} is known here")


def first_half(weights: Weights, args: Config) -> Weights:
    """Without the second half of the output's channels, which SiT has as DiT, and does not use."""
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
        return weights  # of another architecture, which loading will say
    cos, sin = weights[key].double().chunk(2, dim=1)  # (D, 128) each
    count = cos.shape[1]
    f = torch.exp(-math.log(10_000) * torch.arange(count, dtype=torch.float64) / count)
    matrix = torch.cat([cos * f.cos() + sin * f.sin(), cos * f.sin() - sin * f.cos()], dim=1)
    last = {name: -weights[name] for name in ("final_layer.linear.weight", "final_layer.linear.bias") if name in weights}
    return weights | last | {key: matrix.to(weights[key].dtype)}


# --- diffusers -------------------------------------------------------------------------------------


def from_diffusers(index: Config, config: Config, scheduler: Config, weights: Weights, vae: str,
                   bare: BareWeights) -> Published:
    """A folder of DiTPipeline: the dictionaries of model_index.json, transformer/ and scheduler/ and the weights.

    Args:
        vae: the folder's, as load_autoencoder takes it.
        bare: its cfg_scale is recommended.
    """
    check_transformer(config)
    heads, width = config["num_attention_heads"], config["num_attention_heads"] * config["attention_head_dim"]
    classes, diffusion = config["num_embeds_ada_norm"], diffusion_of(scheduler, config["out_channels"] > config["in_channels"])
    args = dict(input_size=config["sample_size"], patch_size=config["patch_size"], in_channels=config["in_channels"],
                hidden_size=width, depth=config["num_layers"], num_heads=heads, num_classes=classes,
                learn_sigma=diffusion["learn_sigma"], time_scale=diffusion["diffusion_steps"] / 1000)  # theirs counts steps
    size = (8 * config["sample_size"],) * 2
    names = {str(i): name for i, name in dict(index.get("id2label") or {}).items()}
    spec = bare.spec({"model": preset_of(args), "image_size": size[0], "num_classes": classes, "vae": vae})
    model = ModelSpec(spec.model.name, "DiT", spec.model.args | args)
    spec = replace(spec, model=model, diffusion=diffusion,
                   sampling=replace(spec.sampling, cfg_channels=min(3, args["in_channels"])),
                   classes=[names.get(str(i), name) for i, name in enumerate(spec.classes)])
    return Published(spec, transformer_weights(weights, args))


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
    """Arguments of create_diffusion for a scheduler's config. UserError where its process has no form here."""
    scheduler = dict(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02,
                     prediction_type="epsilon", _class_name="DDIMScheduler") | scheduler
    steps, schedule, name = (scheduler[key] for key in ("num_train_timesteps", "beta_schedule", "_class_name"))
    objective = {theirs: own for own, theirs in PREDICTIONS.items()}.get(scheduler["prediction_type"])
    ends = [scheduler["beta_start"], scheduler["beta_end"]]
    known = schedule == "squaredcos_cap_v2" or (
        schedule == "linear" and np.allclose(ends, named_betas("linear", steps)[[0, -1]], rtol=1e-5))
    other = [key for key in ("trained_betas", "rescale_betas_zero_snr", "use_flow_sigmas") if scheduler.get(key)]
    if not objective or not known or other or name.startswith("FlowMatch"):
        raise UserError(f"its scheduler is none that create_diffusion knows: {', '.join([name, *other])}, "
                        f"{scheduler['prediction_type']}, {schedule}, {steps} steps, betas {ends[0]} to {ends[1]}")
    return dict(noise_schedule=schedule, diffusion_steps=steps, objective=objective, learn_sigma=learn_sigma)


def transformer_weights(theirs: Weights, args: Config) -> Weights:
    """diffusers' state dict -> ours. UserError if it is not a DiT's, or if the blocks' copies of the embedders differ."""
    theirs, ours = dict(theirs), {}

    def take(prefix: str) -> dict[str, Tensor]:
        """Take away what has this prefix: "weight" and, where there is one, "bias"."""
        found = {kind: theirs.pop(f"{prefix}.{kind}") for kind in ("weight", "bias") if f"{prefix}.{kind}" in theirs}
        if not found:
            raise UserError(f"its transformer lacks {prefix}.weight, so it is no DiT of {args['depth']} blocks")
        return found

    def put(prefix: str, tensors: dict[str, Tensor]) -> None:
        ours.update({f"{prefix}.{kind}": tensor for kind, tensor in tensors.items()})

    for name, own in TOP.items():
        put(own, take(name))
    for i in range(args["depth"]):
        block = f"transformer_blocks.{i}"
        for name, own in BLOCK.items():
            put(f"blocks.{i}.{own}", take(f"{block}.{name}"))
        thirds = [take(f"{block}.{name}") for name in QKV]
        put(f"blocks.{i}.attn.qkv", {kind: torch.cat([third[kind] for third in thirds]) for kind in thirds[0]})
        for name, own in EMBEDDERS.items():
            copy = take(f"{block}.{name}")
            if i and any(not torch.equal(ours[f"{own}.{kind}"], tensor) for kind, tensor in copy.items()):
                raise UserError(f"its blocks 0 and {i} differ in {name}; a DiT has one such embedder for all blocks")
            put(own, copy)
    theirs.pop("pos_embed.pos_embed", None)
    if theirs:
        raise UserError(f"its transformer has {next(iter(theirs))}, which no DiT has")
    side = args["input_size"] // args["patch_size"]
    return ours | {"pos_embed": sincos_position_embedding((side, side), args["hidden_size"])}


def to_diffusers(spec: Spec, weights: Weights) -> tuple[Config, Config, Config, Weights]:
    """What from_diffusers takes: model_index.json, the configs of transformer and scheduler, and the transformer's weights.

    Raises:
        UserError: diffusers' DiT cannot express the network or its process.
    """
    args, process = spec.model.args, create_diffusion("", **spec.diffusion)
    schedule, steps = spec.diffusion.get("noise_schedule", "linear"), process.num_timesteps
    if (prediction_of(process) not in PREDICTIONS or schedule not in ("linear", "squaredcos_cap_v2") or steps != 1000
            or process.input_scale != 1):
        raise UserError(f"its process, {spec.diffusion}, is none that DiTPipeline's schedulers know")
    square = len(set(np.atleast_1d(args["input_size"]).tolist())) == 1
    plain = dict(adaln="zero", class_token=False, time_scale=1.0, mlp_ratio=4.0, qk_norm=False, lightning=False)
    if spec.model.class_name != "DiT" or not square or any(args[key] != value for key, value in plain.items()):
        raise UserError(f"{spec.model.name} is not DiT's own network, the only one that diffusers' DiTPipeline knows")
    config = dict(_class_name="DiTTransformer2DModel", num_attention_heads=args["num_heads"],
                  attention_head_dim=args["hidden_size"] // args["num_heads"], in_channels=args["in_channels"],
                  out_channels=args["in_channels"] * (2 if args["learn_sigma"] else 1), num_layers=args["depth"],
                  sample_size=int(np.max(args["input_size"])), patch_size=args["patch_size"], activation_fn="gelu-approximate",
                  num_embeds_ada_norm=args["num_classes"], norm_type="ada_norm_zero", attention_bias=True, dropout=0.0,
                  norm_elementwise_affine=False, norm_eps=1e-5)
    ends = named_betas("linear", steps)[[0, -1]].tolist()
    scheduler = dict(_class_name="DDIMScheduler", num_train_timesteps=steps, beta_schedule=schedule,
                     beta_start=ends[0], beta_end=ends[1], prediction_type=PREDICTIONS[process.prediction],
                     clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading")
    index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"],
             "scheduler": ["diffusers", "DDIMScheduler"], "vae": ["diffusers", "AutoencoderKL"],
             "id2label": {str(i): name for i, name in enumerate(spec.classes)}}
    return index, config, scheduler, their_weights(weights, args)


def their_weights(ours: Weights, args: Config) -> Weights:
    """Our DiT's state dict -> diffusers': the inverse of transformer_weights."""
    theirs: Weights = {}

    def copy(own: str, name: str) -> None:
        theirs.update({name + key.removeprefix(own): value for key, value in ours.items() if key.startswith(f"{own}.")})

    for name, own in TOP.items():
        copy(own, name)
    for i in range(args["depth"]):
        block = f"transformer_blocks.{i}"
        for name, own in BLOCK.items():
            copy(f"blocks.{i}.{own}", f"{block}.{name}")
        for name, own in EMBEDDERS.items():
            copy(own, f"{block}.{name}")
        for kind in ("weight", "bias"):
            thirds = ours[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            theirs.update({f"{block}.{name}.{kind}": third for name, third in zip(QKV, thirds)})
    return {key: value.clone() for key, value in theirs.items()}  # a file of safetensors shares no memory


def prediction_of(process: Process) -> str:
    """What the network predicts: "epsilon", "v", "x0" or "flow". UserError for a process of one's own."""
    if isinstance(process, GaussianDiffusion):
        return process.prediction
    if isinstance(process, FlowMatching):
        return "flow"
    raise UserError(f"a {type(process).__name__} has no form among diffusers' schedulers")


def scheduler_of(settings: SamplingSettings, process: Process, diffusion: Config) -> tuple[Config, list[int] | None]:
    """diffusers' scheduler that draws as our sampler does: its config, and the timesteps to set, if it is told them.

    Raises:
        UserError: diffusers has none.
    """
    objective, name = prediction_of(process), settings.sampler
    if objective == "flow" and name in ("euler", "heun"):
        return dict(_class_name=f"FlowMatch{name.title()}DiscreteScheduler", num_train_timesteps=process.num_timesteps,
                    shift=1.0), None
    kinds = {"ddpm": dict(_class_name="DDPMScheduler", clip_sample=False, timestep_spacing="linspace"),
             "ddim": dict(_class_name="DDIMScheduler", clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading"),
             "dpm++": dict(_class_name="DPMSolverMultistepScheduler", algorithm_type="dpmsolver++", solver_order=2,
                           final_sigmas_type="zero")}
    if objective not in PREDICTIONS or name not in kinds:
        raise UserError(f"sampler {name} of objective {objective} has no form among diffusers' schedulers")
    steps = diffusion.get("diffusion_steps", 1000)
    stride, timesteps = steps // process.num_timesteps, process.timestep_map[::-1]
    if name == "ddim" and timesteps != [i * stride for i in reversed(range(process.num_timesteps))]:
        raise UserError(f"diffusers' DDIM has steps of one length: num_sampling_steps must be ddimN with an N that divides "
                        f"{steps}, not {settings.num_sampling_steps}")
    variance = dict(variance_type=process.variance) if name == "ddpm" else {}
    config = kinds[name] | variance | dict(num_train_timesteps=steps, prediction_type=PREDICTIONS[objective],
                                           trained_betas=named_betas(diffusion.get("noise_schedule", "linear"), steps).tolist())
    return config, None if name == "ddim" else timesteps
