"""Write a checkpoint as a folder that others load.

    python export.py --ckpt results/X --out FOLDER                       # for sample.py --ckpt FOLDER
    python export.py --ckpt results/X --out FOLDER --format diffusers    # for diffusers, where this code is not
    python export.py --ckpt results/X --out FOLDER --push user/repo      # onto the hub too

- dinext: model.safetensors (the EMA), config.json (the Spec), README.md (the model card), the newest preview. An autoencoder
  that lies on this machine comes along, in the folder vae. Nothing in the folder is executed.
- diffusers: for every network of models.py and small_models.py, exact, with a pipeline.py and the network's source, which
  diffusers runs after `trust_remote_code=True`.
- diffusers-dit: for DiT alone, for diffusers' own DiTPipeline.

Figures in the card are those of `evaluate.py --json RUN/figures.json`.
"""

import inspect
import json
import re
import shutil
import tempfile
from pathlib import Path

import torch
from jsonargparse import Namespace

import models
import small_models
from diffusion import guidance
from pipeline import checkpoint, interchange
from pipeline.autoencoders import HUB_IDS, SDVAE, Pixels, check_autoencoder, load_autoencoder
from pipeline.generation import Sampling
from pipeline.spec import BareWeights, Spec
from runtime import UserError, cli
from runtime.files import check_writable, read_json

FREQUENCIES = ("diffusers' DiT divides the frequencies of the timestep's embedding by 127 where DiT divides by 128: its "
               "outputs differ from DiT's, by up to 8 % on trained weights. --format diffusers is exact.")


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Write a checkpoint as a folder that others load.")
    parser.add_argument("--ckpt", required=True, help="as of sample.py")
    parser.add_argument("--out", required=True, help="the folder to make")
    parser.add_argument("--format", default="dinext", choices=list(FORMATS), help="who loads it")
    parser.add_argument("--objective", type=str | None, choices=[*interchange.OBJECTIVES, None], help="of bare weights")
    parser.add_argument("--push", type=str | None, help="also onto the hub, as user/repo")
    parser.add_argument("--revision", type=str | None, help="the branch to push to; default: main")
    return parser


def main(args: Namespace) -> None:
    out = Path(args.out)
    if out.exists():
        raise UserError(f"--out {out} exists; name a new folder")
    if args.revision and not args.push:
        raise UserError("--revision names the branch of --push, which is not given")
    if args.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push, re.ASCII):
        raise UserError(f"--push {args.push} is no name of a repository of the hub, user/repo")
    restored = checkpoint.restore(args.ckpt, BareWeights(objective=args.objective))
    if restored.spec.is_autoencoder and args.format != "dinext":
        raise UserError(f"--ckpt {args.ckpt} is an autoencoder; --format dinext takes it")
    if not restored.spec.is_autoencoder:
        Sampling.of(restored.spec)  # what nothing can be sampled from is not worth a folder
    check_writable(out.parent)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as made:
        remarks = [restored.remark] if restored.remark else []
        remarks += FORMATS[args.format](restored, Path(made))
        write_card(restored, args, Path(made), remarks)
        for path in (Path(made), *Path(made).rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors' files are private at first
        Path(made).rename(out)
        Path(made).mkdir()  # for TemporaryDirectory to remove
    print(*remarks, f"Wrote {out}: {', '.join(sorted(path.name for path in out.iterdir()))}", sep="\n")
    if args.push:
        print(f"Pushed to {push(out, args.push, args.revision)}")


# --- formats ---------------------------------------------------------------------------------------


def write_dinext(restored: checkpoint.Restored, folder: Path) -> list[str]:
    """Our own format. Returns remarks, as the other two do."""
    spec = restored.spec
    if spec.vae not in ("pixels", *HUB_IDS) and Path(spec.vae).exists():  # a path, which others do not have
        autoencoder = open_autoencoder(spec)
        if isinstance(autoencoder, SDVAE):
            autoencoder.vae.save_pretrained(folder / checkpoint.OWN_VAE)
        else:
            own = checkpoint.restore(spec.vae)
            checkpoint.save_folder(folder / checkpoint.OWN_VAE, own.spec, own.model.state_dict())
        spec = spec.with_vae(checkpoint.OWN_VAE)
    checkpoint.save_folder(folder, spec, restored.model.state_dict())
    return []


def write_diffusers(restored: checkpoint.Restored, folder: Path) -> list[str]:
    """A pipeline of one's own, with the code that it needs."""
    spec, sampling = restored.spec, Sampling.of(restored.spec)
    scheduler, timesteps = interchange.scheduler_of(sampling.settings, sampling.process, spec.diffusion)
    autoencoder, settings, source = in_diffusers(spec), sampling.settings, network_source(spec.model.class_name)
    index = {
        "_class_name": ["pipeline", "DiNextPipeline"], "network": ["network", "Network"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "vae": [None, None] if isinstance(autoencoder, Pixels) else ["diffusers", type(autoencoder.vae).__name__],
        "id2label": {str(i): name for i, name in enumerate(spec.classes)},
        "sampling": {
            "shape": [restored.model.in_channels, *restored.model.input_size], "num_classes": restored.model.num_classes,
            "steps": sampling.process.num_timesteps, "timesteps": timesteps, "cfg_scale": settings.cfg_scale,
            "cfg_channels": settings.cfg_channels, "guidance_interval": settings.guidance_interval,
            "prediction": interchange.prediction_of(sampling.process), "input_scale": sampling.process.input_scale,
            "bounded": autoencoder.bounded or settings.dynamic_thresholding,
            "dynamic_thresholding": settings.dynamic_thresholding, **scale_of(autoencoder)}}
    network = {"_class_name": "Network", "name": spec.model.class_name, "args": spec.model.args}
    weights = {f"network.{key}": value for key, value in restored.model.state_dict().items()}
    checkpoint.save_pipeline(folder, index, scheduler, "network", network, weights)
    (folder / "pipeline.py").write_text(pipeline_source())
    (folder / "network" / "network.py").write_text(source)
    if isinstance(autoencoder, SDVAE):
        autoencoder.vae.save_pretrained(folder / "vae")
    return []


def write_diffusers_dit(restored: checkpoint.Restored, folder: Path) -> list[str]:
    """For diffusers' DiTPipeline."""
    spec = restored.spec
    index, config, scheduler, weights = interchange.to_diffusers(spec, restored.model.state_dict())
    autoencoder = in_diffusers(spec)
    if isinstance(autoencoder, Pixels) or type(autoencoder.vae).__name__ != "AutoencoderKL":
        raise UserError(f"the model's autoencoder, {spec.vae}, is no AutoencoderKL, which DiTPipeline needs")
    if torch.is_tensor(autoencoder.scale) or autoencoder.shift:
        raise UserError("DiTPipeline knows only the scaling_factor of latents, and these are shifted, or scaled by channel; "
                        "--format diffusers takes them")
    checkpoint.save_pipeline(folder, index, scheduler, "transformer", config, weights)
    autoencoder.vae.save_pretrained(folder / "vae")
    count = len(spec.classes)
    null = f"DiTPipeline's label of no class is 1000: with {count} classes it cannot guide; pass guidance_scale=1."
    return [FREQUENCIES, *([null] if count != 1000 else [])]


FORMATS = {"dinext": write_dinext, "diffusers": write_diffusers, "diffusers-dit": write_diffusers_dit}


def open_autoencoder(spec: Spec) -> torch.nn.Module:
    """The autoencoder that the network was trained with."""
    with cli.prefix_errors("the checkpoint's autoencoder:"):
        autoencoder = load_autoencoder(spec.vae, statistics=spec.statistics)
        check_autoencoder(autoencoder, spec)
    return autoencoder


def in_diffusers(spec: Spec) -> Pixels | SDVAE:
    """The autoencoder, if diffusers knows it."""
    autoencoder = open_autoencoder(spec)
    if not isinstance(autoencoder, Pixels | SDVAE):
        raise UserError(f"the model's autoencoder, {spec.vae}, has no form in diffusers; --format dinext takes it along")
    return autoencoder


def scale_of(autoencoder: Pixels | SDVAE) -> dict[str, list[float]]:
    """Latents are (z - shift) * scale, for each channel or for all."""
    if isinstance(autoencoder, Pixels):
        return {"scale": [1.0], "shift": [0.0]}
    return {name: torch.as_tensor(getattr(autoencoder, name)).flatten().tolist() for name in ("scale", "shift")}


def pipeline_source() -> str:
    """pipeline.py: pipeline/exported.py with our guidance in place of its import, and without the network."""
    from pipeline import exported  # it imports diffusers, which is slow

    guide = inspect.getsource(guidance).replace(f'"""{guidance.__doc__}"""', "", 1)
    guide = guide.replace("from runtime import UserError", "UserError = ValueError")
    guide = guide.replace("from .schedules import MODEL_TIME", f"MODEL_TIME = {guidance.MODEL_TIME}")
    text = inspect.getsource(exported).replace(inspect.getsource(exported.Network), "").replace("import models\n", "")
    before, line, after = text.partition("from diffusion.guidance import MODEL_TIME, dynamic_threshold, guide, in_interval\n")
    assert line
    return before + guide.strip() + "\n" + after.rstrip() + "\n"


def network_source(class_name: str) -> str:
    """network.py: models.py, small_models.py for a network of it, and the network as a component of diffusers."""
    from pipeline import exported

    text = inspect.getsource(models)
    if not hasattr(models, class_name):
        if not hasattr(small_models, class_name):
            raise UserError(f"the network is a {class_name}, which neither models.py nor small_models.py has; --format dinext "
                            "takes it")
        small = inspect.getsource(small_models)
        own = next(line for line in small.splitlines() if line.startswith("from models import "))
        text += "\n\n" + small.replace(f'"""{small_models.__doc__}"""', "", 1).replace(own, "", 1).strip() + "\n"
    component = inspect.getsource(exported.Network).replace("getattr(models, name)", "globals()[name]")
    return (f"{text}\n\nfrom diffusers import ConfigMixin, ModelMixin  # noqa: E402\n"
            f"from diffusers.configuration_utils import register_to_config  # noqa: E402\n\n\n{component}")


# --- the card --------------------------------------------------------------------------------------


def write_card(restored: checkpoint.Restored, args: Namespace, folder: Path, remarks: list[str]) -> None:
    """README.md, and the run's newest preview as samples.png."""
    spec, state = restored.spec, checkpoint.load(restored.path)
    own = "spec" in state and restored.path.parent.name == "checkpoints"  # weights of others may lie in such a folder too
    run = restored.path.parent.parent if own else None
    flags = state["args"] if isinstance(state.get("args"), dict) else {}
    licence = "mit" if run and not flags.get("init_from") else "unknown"
    if args.ckpt in checkpoint.PUBLISHED:
        licence = "cc-by-nc-4.0"
    parameters = sum(p.numel() for p in restored.model.parameters())
    facts = {"Network": f"{spec.model.name} ({spec.model.class_name}), {parameters:,} parameters",
             "Images": f"{spec.image_size[0]}x{spec.image_size[1]} (height x width), {len(spec.classes)} classes",
             "Autoencoder": "in the folder vae" if (folder / "vae").is_dir() else None if spec.is_autoencoder else spec.vae,
             "Data": flags.get("data_path"), "Steps": state.get("step"), "Batch": flags.get("global_batch_size")}
    if not spec.is_autoencoder:
        facts |= {"Process": json.dumps(spec.diffusion) if spec.diffusion else "DiT's",
                  "Recommended sampling": json.dumps(spec.sampling.to_dict())}
    lines = ["---", f"license: {licence}", f"library_name: {'dinext' if args.format == 'dinext' else 'diffusers'}",
             *([] if spec.is_autoencoder else ["pipeline_tag: unconditional-image-generation"]),
             "tags:", "- class-conditional", "- diffusion", "- dinext", "---", "", f"# {restored.name}", ""]
    if preview := newest_preview(run, restored.path):
        shutil.copyfile(preview, folder / "samples.png")
        lines += ["![samples](samples.png)", ""]
    lines += [*(f"- {name}: {value}" for name, value in facts.items() if value is not None), "", *remarks, ""]
    scale = str(spec.sampling.cfg_scale if len(spec.classes) == 1000 else 1.0) if spec.sampling else ""
    lines += [line.replace("SCALE", scale) for line in (AUTOENCODER if spec.is_autoencoder else USE[args.format])]
    if run and (run / "figures.json").is_file():
        with cli.prefix_errors(f"{run / 'figures.json'} is no report of evaluate.py:", KeyError, TypeError):
            lines += ["", *figures_table(read_json(run / "figures.json"))]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def newest_preview(run: Path | None, path: Path) -> Path | None:
    """The newest of a run's previews that is not younger than its checkpoint."""
    previews = sorted((run / "previews").glob("*.png")) if run else []
    return next((preview for preview in reversed(previews) if preview.stem <= path.stem), None)


USE = {"dinext": ["```", "python sample.py --ckpt THIS_FOLDER   # of DiNext, or the name of this repository", "```"],
       "diffusers": ["```python", "from diffusers import DiffusionPipeline",
                     'pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER", trust_remote_code=True)',
                     'pipe(class_labels=[0]).images[0].save("picture.png")', "```"],
       "diffusers-dit": ["```python", "from diffusers import DiTPipeline", 'pipe = DiTPipeline.from_pretrained("THIS_FOLDER")',
                         'pipe(class_labels=[0], guidance_scale=SCALE).images[0].save("picture.png")', "```"]}
AUTOENCODER = ["```", "python train.py --vae THIS_FOLDER …   # of DiNext", "```"]


def figures_table(report: dict) -> list[str]:
    """evaluate.py's report as a table; the number of samples stands in its remarks."""
    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    rows = [f"| {one['name']} | {cell(one['value'])} | {cell(one['floor'])} | {one['remark']} |" for one in report["figures"]]
    return ["| figure | samples | real images | |", "| --- | --- | --- | --- |", *rows]


# --- the hub ---------------------------------------------------------------------------------------


def push(folder: Path, repository: str, revision: str | None) -> str:
    """Put a folder onto the hub, as the user whose token huggingface_hub finds. Returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=str(folder), revision=revision))
    except Exception as error:  # of the hub, or of whatever client it uses
        reason = str(error).strip().partition("\n")[0][:200]
    raise OSError(f"the hub did not take {repository}: {reason}; {folder} is complete, and `hf upload {repository} {folder}` "
                  "tries again")


if __name__ == "__main__":
    cli.run(main, build_parser())
