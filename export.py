"""Write a checkpoint as a folder that others load.

    python export.py --ckpt results/X --out FOLDER                       # for sample.py --ckpt FOLDER
    python export.py --ckpt results/X --out FOLDER --format diffusers    # for diffusers, without this checkout
    python export.py --ckpt results/X --out FOLDER --push user/repo      # also to the hub

- dinext: model.safetensors (the EMA), config.json (the Spec), README.md (the model card), the newest preview. A local
  autoencoder is copied to the folder vae. Nothing in the folder is executed.
- diffusers: for every network of models.py and small_models.py, exact. The folder holds exported.py as pipeline.py and the
  source of the network and of an autoencoder of ours, which diffusers runs with `trust_remote_code=True`. An autoencoder alone
  becomes one component, for diffusers' AutoModel.

The card shows the figures of `evaluate.py --json RUN/figures.json`.
"""

import inspect
import json
import re
import shlex
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse import Namespace

import models
import small_models
from diffusion import guidance
from diffusion.flow import FlowMatching
from diffusion.flow_map import FlowMap
from diffusion.gaussian_diffusion import GaussianDiffusion
from diffusion.process import Process
from diffusion.schedules import named_betas
from pipeline import checkpoint
from pipeline.autoencoders import HUB_IDS, SDVAE, TrainedAutoencoder, check_autoencoder, load_autoencoder
from pipeline.generation import Sampling
from pipeline.heads import weights_of
from pipeline.settings import BARE_OBJECTIVES, SamplingSettings
from pipeline.spec import OWN_VAE, BareWeights, Config, Spec
from runtime import UserError, cli
from runtime.files import check_writable, is_hub_id, read_json, write_json


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Write a checkpoint as a folder that others load.")
    parser.add_argument("--ckpt", required=True, help="see sample.py")
    parser.add_argument("--out", required=True, help="the folder to create")
    parser.add_argument("--format", default="dinext", choices=list(FORMATS), help="who loads it")
    parser.add_argument("--objective", choices=BARE_OBJECTIVES, help="of bare weights")
    parser.add_argument("--push", type=str | None, help="also upload it to the hub, as user/repo")
    parser.add_argument("--revision", type=str | None, help="the branch to push to; default: main")
    return parser


def main(args: Namespace) -> None:
    out = Path(args.out)
    if out.exists():
        raise UserError(f"--out {out} exists; name a new folder")
    if args.revision and not args.push:
        raise UserError("--revision names the branch of --push, which is not given")
    if args.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push, re.ASCII):
        raise UserError(f"--push {args.push} is not the name of a repository of the hub, user/repo")
    restored = checkpoint.restore(args.ckpt, BareWeights(objective=args.objective))
    if not restored.spec.is_autoencoder:
        Sampling.of(restored.spec)  # refuse a network that cannot be sampled
    check_writable(out.parent)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary)
        FORMATS[args.format](restored, args, folder)
        write_card(restored, args, folder)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors' files are private at first
        folder.rename(out)
        folder.mkdir()  # for TemporaryDirectory to remove
    if restored.remark:
        print(restored.remark)
    print(f"Wrote {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if args.push:
        print(f"Pushed to {push(out, args.push, args.revision)}")


# --- formats ---------------------------------------------------------------------------------------


def write_dinext(restored: checkpoint.Restored, args: Namespace, folder: Path) -> None:
    """Our own format."""
    spec = restored.spec
    if spec.vae not in ("pixels", *HUB_IDS) and Path(spec.vae).exists():  # a local path, which nobody else has
        autoencoder = open_autoencoder(spec)
        if isinstance(autoencoder, SDVAE):
            save_vae(autoencoder.vae, folder / OWN_VAE)
        else:
            trained = checkpoint.restore(spec.vae)
            checkpoint.save_folder(folder / OWN_VAE, trained.spec, trained.model.state_dict())
        spec = spec.with_vae(OWN_VAE)
    # Heads that sampling cannot use stay behind.
    used = {name: spec.heads[name] for name in ("split", "internal")} if "internal" in (spec.heads or {}) else None
    of_heads = weights_of(restored.heads, used or {})
    checkpoint.save_folder(folder, replace(spec, heads=used), restored.model.state_dict(), of_heads)


def save_vae(vae: torch.nn.Module, folder: Path) -> None:
    """A network of diffusers as a folder, which does not tell where it was read from."""
    vae.register_to_config(_name_or_path="")
    vae.save_pretrained(folder)


def write_diffusers(restored: checkpoint.Restored, args: Namespace, folder: Path) -> None:
    """A pipeline for diffusers with the code that it needs, or an autoencoder as one component."""
    import exported  # it imports diffusers, which is slow

    check_code(restored, args)
    if restored.spec.is_autoencoder:
        write_component(restored, exported.TrainedAutoencoder, "vae", folder)
        return
    spec, sampling = restored.spec, Sampling.of(restored.spec)
    settings, process = sampling.settings, sampling.process
    if settings.internal_scale != 1:
        raise UserError("--format diffusers has no internal guidance (internal_scale); the default format takes it")
    scheduler, timesteps = scheduler_of(settings, process, spec.diffusion)
    autoencoder, vae = open_autoencoder(spec), [None, None]
    if isinstance(autoencoder, SDVAE):
        save_vae(autoencoder.vae.to(memory_format=torch.contiguous_format), folder / "vae")
        vae = ["diffusers", type(autoencoder.vae).__name__]
    elif isinstance(autoencoder, TrainedAutoencoder):
        trained, vae = checkpoint.restore(spec.vae), ["vae", "TrainedAutoencoder"]
        check_code(trained, args)
        write_component(trained, exported.TrainedAutoencoder, "vae", folder / "vae")
    write_component(restored, exported.Network, "network", folder / "network")
    index = {
        "_class_name": ["pipeline", "DiNextPipeline"], "network": ["network", "Network"],
        "scheduler": ["diffusers", scheduler["_class_name"]], "vae": vae,
        "id2label": {str(i): name for i, name in enumerate(spec.classes)},
        "sampling": {
            "shape": [restored.model.in_channels, *restored.model.input_size], "num_classes": restored.model.num_classes,
            "steps": process.num_timesteps, "timesteps": timesteps, "cfg_scale": settings.cfg_scale,
            "cfg_channels": settings.cfg_channels, "guidance_interval": settings.guidance_interval,
            "flow": isinstance(process, FlowMatching), "map": settings.sampler == "map",
            "prediction": prediction_of(process), "input_scale": process.input_scale,
            "bounded": autoencoder.bounded or settings.dynamic_thresholding,
            "dynamic_thresholding": settings.dynamic_thresholding, **scale_of(autoencoder)}}
    write_json(folder / "model_index.json", index)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    (folder / "pipeline.py").write_text(pipeline_source())


def check_code(restored: checkpoint.Restored, args: Namespace) -> None:
    """Raises UserError if the network's code is not in models.py or small_models.py, which a folder for diffusers holds."""
    name = restored.spec.model.class_name
    if type(restored.model) not in (getattr(models, name, None), getattr(small_models, name, None)):
        flags = shlex.join(["--ckpt", args.ckpt, "--out", args.out])
        raise UserError(f"--format diffusers takes networks of models.py and small_models.py, whose code it copies, and {name} "
                        f"is of another file; the default format takes it: python {sys.argv[0]} {flags}")


def write_component(restored: checkpoint.Restored, kind: type, name: str, folder: Path) -> None:
    """A network as a component of diffusers: config.json, weights, and its code in `name`.py. `kind` is of exported.py."""
    model = restored.spec.model
    with torch.device("meta"):
        component = kind(model.class_name, model.args, {"AutoModel": f"{name}.{kind.__name__}"})
    component.network = restored.model.to(memory_format=torch.contiguous_format)  # safetensors takes no other
    component.save_pretrained(folder)
    (folder / f"{name}.py").write_text(component_source())


FORMATS = {"dinext": write_dinext, "diffusers": write_diffusers}


def open_autoencoder(spec: Spec) -> torch.nn.Module:
    """The autoencoder that the network was trained with."""
    with cli.prefix_errors("the checkpoint's autoencoder:"):
        autoencoder = load_autoencoder(spec.vae, statistics=spec.statistics)
        check_autoencoder(autoencoder, spec)
    return autoencoder


def scale_of(autoencoder: torch.nn.Module) -> dict[str, list[float]]:
    """Latents are (z - shift) * scale, for each channel or for all."""
    if not isinstance(autoencoder, SDVAE):
        return {"scale": [1.0], "shift": [0.0]}
    return {name: torch.as_tensor(getattr(autoencoder, name)).flatten().tolist() for name in ("scale", "shift")}


PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}  # of objectives, in diffusers' terms
FLOW_SCHEDULERS = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler",
                   "map": "FlowMatchEulerDiscreteScheduler"}  # a map is Euler with r


def prediction_of(process: Process) -> str:
    """What the network predicts: "epsilon", "v", "x0" or "velocity". UserError for a process that others registered."""
    if isinstance(process, GaussianDiffusion) or type(process) in (FlowMatching, FlowMap):
        return process.prediction
    raise UserError(f"--format diffusers has no form for a {type(process).__name__}; the default format takes it")


def scheduler_of(settings: SamplingSettings, process: Process, diffusion: Config) -> tuple[Config, list[int] | None]:
    """diffusers' scheduler that draws as our sampler does: its config, and the timesteps to set, or None.

    Raises:
        UserError: diffusers has none.
    """
    prediction, name, flow = prediction_of(process), settings.sampler, isinstance(process, FlowMatching)
    if flow and name in FLOW_SCHEDULERS:
        return dict(_class_name=FLOW_SCHEDULERS[name], num_train_timesteps=process.num_timesteps, shift=process.shift), None
    kinds = {"ddpm": dict(_class_name="DDPMScheduler", clip_sample=False, timestep_spacing="linspace"),
             "ddim": dict(_class_name="DDIMScheduler", clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading"),
             "dpm++": dict(_class_name="DPMSolverMultistepScheduler", algorithm_type="dpmsolver++", solver_order=2,
                           final_sigmas_type="zero")}
    if flow or name not in kinds:
        objective = diffusion.get("objective", prediction)
        raise UserError(f"diffusers has no scheduler for sampler {name} with objective {objective}")
    steps = diffusion.get("diffusion_steps", 1000)
    stride, timesteps = steps // process.num_timesteps, process.timestep_map[::-1]
    if name == "ddim" and timesteps != [i * stride for i in reversed(range(process.num_timesteps))]:
        raise UserError(f"diffusers' DDIM has steps of equal length: num_sampling_steps must be ddimN with an N that divides "
                        f"{steps}, not {settings.num_sampling_steps}")
    variance = dict(variance_type=process.variance) if name == "ddpm" else {}
    config = kinds[name] | variance | dict(num_train_timesteps=steps, prediction_type=PREDICTIONS[prediction],
                                           trained_betas=named_betas(diffusion.get("noise_schedule", "linear"), steps).tolist())
    return config, None if name == "ddim" else timesteps


# --- the code in a folder for diffusers ------------------------------------------------------------


def replace_once(text: str, old: str, new: str) -> str:
    """Replace `old`, which must occur exactly once."""
    assert text.count(old) == 1, old
    return text.replace(old, new)


def parts_of_exported() -> list[str]:
    """The source of exported.py: the pipeline, and the components."""
    import exported  # it imports diffusers, which is slow

    before, heading, after = inspect.getsource(exported).partition("# --- components")
    return [before, heading + after]


def pipeline_source() -> str:
    """pipeline.py: the pipeline of exported.py, with our guidance in place of its import."""
    guidance_code = replace_once(inspect.getsource(guidance), f'"""{guidance.__doc__}"""', "")
    guidance_code = replace_once(guidance_code, "from runtime import UserError", "UserError = ValueError")
    guidance_code = replace_once(guidance_code, "from .schedules import MODEL_TIME", f"MODEL_TIME = {guidance.MODEL_TIME}")
    imported = "from diffusion.guidance import MODEL_TIME, check_interval, dynamic_threshold, guide, in_interval\n"
    return replace_once(parts_of_exported()[0], imported, guidance_code.strip() + "\n").rstrip() + "\n"


def component_source() -> str:
    """network.py and vae.py: models.py, small_models.py, and the components of exported.py."""
    small_code = replace_once(inspect.getsource(small_models), f'"""{small_models.__doc__}"""', "")
    imported = next(line for line in small_code.splitlines() if line.startswith("from models import "))
    components = replace_once(parts_of_exported()[1], "(vars(models) | vars(small_models))[name]", "globals()[name]")
    for line in ("import models  # noqa: E402\n", "import small_models  # noqa: E402\n"):
        components = replace_once(components, line, "")
    return "\n\n".join([inspect.getsource(models), replace_once(small_code, imported, "").strip() + "\n", components])


# --- the card --------------------------------------------------------------------------------------


def write_card(restored: checkpoint.Restored, args: Namespace, folder: Path) -> None:
    """README.md, and the run's newest preview as samples.png."""
    spec, facts = restored.spec, restored.facts
    flags = facts["args"] if isinstance(facts.get("args"), dict) else {}
    is_run = "spec" in facts and restored.path.parent.name == "checkpoints"  # others' weights may lie in such a folder too
    run = restored.path.parent.parent if is_run else None
    licence = "mit" if run and not flags.get("init_from") else "unknown"
    card = restored.path.parent / "README.md"
    if not run and card.is_file() and (stated := re.search(r"^license: (\S+)$", card.read_text(), re.MULTILINE)):
        licence = stated[1]  # the folder's own
    if args.ckpt in checkpoint.PUBLISHED:
        licence = "cc-by-nc-4.0"
    parameters = sum(p.numel() for p in restored.model.parameters())
    vae = "in the folder vae" if (folder / "vae").is_dir() else public(spec.vae)
    rows = {"Network": f"{spec.model.name} ({spec.model.class_name}), {parameters:,} parameters",
            "Images": f"{spec.image_size[0]}x{spec.image_size[1]} (height x width), {len(spec.classes)} classes",
            "Autoencoder": None if spec.is_autoencoder else vae,
            "Data": public(flags.get("data_path")), "Steps": facts.get("step"), "Batch": flags.get("global_batch_size")}
    if not spec.is_autoencoder:
        rows |= {"Process": json.dumps(spec.diffusion) if spec.diffusion else "DiT's",
                 "Recommended sampling": json.dumps(spec.sampling.to_dict())}
    lines = ["---", f"license: {licence}", f"library_name: {'dinext' if args.format == 'dinext' else 'diffusers'}",
             *([] if spec.is_autoencoder else ["pipeline_tag: unconditional-image-generation"]),
             "tags:", "- class-conditional", "- diffusion", "- dinext", "---", "", f"# {restored.name}", ""]
    previews = sorted((run / "previews").glob("*.png")) if run else []
    if shown := [preview for preview in previews if preview.stem <= restored.path.stem]:  # a later one is of other weights
        shutil.copyfile(shown[-1], folder / "samples.png")
        lines += ["![samples](samples.png)", ""]
    lines += [*(f"- {name}: {value}" for name, value in rows.items() if value is not None), ""]
    lines += [restored.remark, ""] if restored.remark else []
    lines += (USE_AUTOENCODER if spec.is_autoencoder else USE)[args.format]
    if run and (run / "figures.json").is_file():
        with cli.prefix_errors(f"{run / 'figures.json'} is not a report of evaluate.py:", KeyError, TypeError):
            lines += ["", *figures_table(read_json(run / "figures.json"))]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def public(name: str | None) -> str | None:
    """A name for others to read: of a path its last part, as its folders are nobody's business. `train` says nothing alone."""
    if name is None or (is_hub_id(name) and not Path(name).exists()):
        return name
    parts = Path(name).parts
    return "/".join(parts[-2:] if parts[-1:] == ("train",) else parts[-1:])


USE = {"dinext": ["```", "python sample.py --ckpt THIS_FOLDER   # of DiNext, or the name of this repository", "```"],
       "diffusers": ["```python", "from diffusers import DiffusionPipeline",
                     'pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER", trust_remote_code=True)',
                     'pipe(class_labels=[0]).images[0].save("picture.png")', "```"]}
USE_AUTOENCODER = {
    "dinext": ["```", "python train.py --vae THIS_FOLDER …   # of DiNext", "```"],
    "diffusers": ["```python", "from diffusers import AutoModel  # 0.36 or newer",
                  'vae = AutoModel.from_pretrained("THIS_FOLDER", trust_remote_code=True)  # runs vae.py in it',
                  "latents = vae.encode(images).latent   # images (B, C, H, W) in [-1, 1]; latents need no scale",
                  "images = vae.decode(latents).sample", "```"]}


def figures_table(report: dict) -> list[str]:
    """evaluate.py's report as a table; its remarks give the number of samples."""
    rows = [[figure["name"], *("-" if figure[key] is None else f"{figure[key]:.4g}" for key in ("value", "floor")),
             figure["remark"]] for figure in report["figures"]]
    return ["| figure | samples | real images | |", "| --- | --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]


# --- the hub ---------------------------------------------------------------------------------------


def push(folder: Path, repository: str, revision: str | None) -> str:
    """Upload a folder to the hub, as the user whose token huggingface_hub finds. Returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=str(folder), revision=revision))
    except Exception as error:  # of the hub, or of whatever client it uses
        reason = str(error).strip().partition("\n")[0][:200]
    raise OSError(f"the hub refused {repository}: {reason}; {folder} is complete: to try again, run `hf upload {repository} "
                  f"{folder}`")


if __name__ == "__main__":
    cli.run(main, build_parser())
