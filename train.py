"""Train a diffusion model: image -> latent -> noise -> x_t -> model -> loss -> step -> EMA.

    python train.py --config configs/digits.yaml
    torchrun --nproc_per_node=8 train.py --model DiT-XL/2 --data-path /imagenet/train

A run does not depend on the number of processes, nor on interruptions, but for rounding: the order of the data and all
random numbers of step k are functions of (seed, k), drawn for the global batch, of which each process takes its rows.
The same command with --run-name continues a run.
"""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import checkpoint
import runtime
from autoencoders import load_autoencoder
from data import GlobalOrder, load_batches, load_dataset, to_unit_range
from diffusion import create_diffusion
from models import DiT_models
from sample import DIT_LABELS, autocast, generate, save_grid, settings_for

PREVIEW_COLUMNS, PREVIEW_ROWS = 10, 4
VAL_IMAGES, VAL_BATCH = 4096, 64


@dataclass
class OptimizerArgs:
    """--optimizer-args: AdamW, and how its learning rate runs."""

    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    clip_norm: float | None = None

    def __post_init__(self):
        for name, value, fine in (
                ("betas", self.betas, all(0 <= beta < 1 for beta in self.betas)),
                ("weight_decay", self.weight_decay, self.weight_decay >= 0),
                ("warmup_steps", self.warmup_steps, self.warmup_steps >= 0),
                ("clip_norm", self.clip_norm, self.clip_norm is None or self.clip_norm > 0)):
            if not fine:
                raise ValueError(f"--optimizer-args: {name} {value} is out of range")

    def factor(self, step: int, max_steps: int) -> float:
        """What --lr is multiplied by in step `step`, from 0: a linear warm-up, then 1, or half a cosine to 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / max_steps)) if self.schedule == "cosine" else 1.0
        return cosine * min(1.0, (step + 1) / (self.warmup_steps + 1))


def build_parser() -> runtime.ArgumentParser:
    parser = runtime.ArgumentParser("Train a class-conditional diffusion model.")
    parser.add_shared_arguments()
    parser.add_argument("--data-path", required=True, help="digits, mnist, cifar10, or a folder of classes")
    parser.add_argument("--data-root", default="data", help="where named data sets lie")
    parser.add_argument("--results-dir", default="results")
    parser.add_argument("--run-name", type=str | None, help="begin or continue this run; default: a new NNN-model")
    parser.add_argument("--model", default="DiT-XL/2", choices=list(DiT_models))
    parser.add_argument("--model-args", type=dict, default={}, help="arguments of the network, over its preset's")
    parser.add_argument("--diffusion-args", type=dict, default={},
                        help="arguments of create_diffusion; label_drop (0.1); sampling, what sample.py shall do")
    parser.add_argument("--optimizer-args", type=dict, default={},
                        help="betas, weight_decay, warmup_steps, schedule (constant, cosine), clip_norm")
    parser.add_argument("--vae", default="ema", help="ema, mse, pixels, a folder or a hub id")
    parser.add_argument("--image-size", type=int | None, help="default: a named set's own, 256 for a folder")
    parser.add_argument("--num-classes", type=int | None, help="default: the data's, with which it must agree")
    parser.add_argument("--epochs", type=int, default=1400)
    parser.add_argument("--max-steps", type=int | None, help="optimizer steps, in place of --epochs")
    parser.add_argument("--global-batch-size", type=int, default=256, help="over all processes")
    parser.add_argument("--grad-accum", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--global-seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--ema-decay", type=float, default=0.9999)
    parser.add_argument("--num-workers", type=int, default=4)
    parser.add_argument("--init-from", type=str | None, help="checkpoint whose fitting weights to begin with")
    parser.add_argument("--resume", type=str | None, help="checkpoint of which to take everything")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--ckpt-every", type=int, default=50_000)
    parser.add_argument("--keep-last", type=int, default=0, help="checkpoints to keep; 0: all")
    parser.add_argument("--preview-every", type=int, default=50_000, help="steps between EMA samples; 0: only at the end")
    parser.add_argument("--val-every", type=int, default=0, help="steps between validation losses; 0: none")
    parser.add_argument("--tracker", default="none", choices=list(runtime.TRACKERS))
    return parser


# --- the pieces of a run -------------------------------------------------------------------------

class Draws(NamedTuple):
    """All random numbers of one step, for the rows of a batch."""

    noise: Tensor      # (B, C, H, W) of the diffusion
    posterior: Tensor  # (B, C, H, W) of the autoencoder
    t: Tensor          # (B,)
    drop: Tensor       # (B,) uniform: below label_drop, a label becomes the null class
    flip: Tensor       # (B,) bool

    def rows(self, rows: slice) -> "Draws":
        return Draws(*(draw[rows] for draw in self))


def draw(process, latent_shape: tuple[int, int, int], batch_size: int, address: tuple, device: torch.device) -> Draws:
    """The draws of a global batch, a function of the address alone."""
    generator = runtime.generator(*address, device=device)
    normal = partial(torch.randn, (batch_size, *latent_shape), generator=generator, device=device)
    uniform = partial(torch.rand, batch_size, generator=generator, device=device)
    return Draws(normal(), normal(), process.sample_times(batch_size, generator), uniform(), uniform() < 0.5)


class Objective(NamedTuple):
    """What is minimised: images and labels -> loss of each."""

    process: object
    autoencoder: nn.Module
    null_label: int
    label_drop: float
    flip: bool
    precision: str

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """images (B, C, H, W) uint8, labels (B,) -> (B,)."""
        x = to_unit_range(images)
        if self.flip:
            x = torch.where(draws.flip.view(-1, 1, 1, 1), x.flip(-1), x)
        with torch.no_grad():
            latents = self.autoencoder.encode(x, draws.posterior)
        y = torch.where(draws.drop < self.label_drop, self.null_label, labels)
        with autocast(x.device, self.precision):
            return self.process.training_losses(model, latents, draws.t, dict(y=y), draws.noise)["loss"]


def describe(args, dataset, autoencoder: nn.Module) -> tuple[dict, float]:
    """The checkpoint's `spec` (see checkpoint.py), every argument checked, and the share of labels to drop."""
    diffusion_args = dict(args.diffusion_args)
    label_drop = diffusion_args.pop("label_drop", 0.1)
    if not isinstance(label_drop, int | float) or not 0 <= label_drop <= 1:
        raise ValueError(f"--diffusion-args: label_drop {label_drop} is not a share, 0..1")
    given = diffusion_args.pop("sampling", {})
    diffusion = runtime.check_arguments(create_diffusion, diffusion_args, "--diffusion-args", {"timestep_respacing"})
    process = runtime.naming("--diffusion-args", lambda: create_diffusion("", **diffusion))
    sampling = process.recommended | {"cfg_channels": None}
    sampling["num_sampling_steps"] = min(sampling["num_sampling_steps"], process.num_timesteps)
    if label_drop == 0:  # there is no unconditional half to guide by
        sampling["cfg_scale"] = 1.0
    if not isinstance(given, dict) or set(given) - set(sampling):
        raise ValueError(f"--diffusion-args: sampling {given} is not a dictionary with the keys {', '.join(sampling)}")
    if args.num_classes not in (None, len(dataset.classes)):
        raise ValueError(f"--num-classes {args.num_classes}: {args.data_path} has {len(dataset.classes)} classes")
    channels, *size = autoencoder.latent_shape(dataset.image_size, dataset.channels)
    from_data = dict(input_size=tuple(size), in_channels=channels, num_classes=len(dataset.classes),
                     learn_sigma=process.learn_sigma)
    network = DiT_models[args.model]
    chosen = runtime.check_arguments(network.func, args.model_args, "--model-args", set(from_data))
    spec = {
        "model": {"name": args.model, "args": from_data | chosen},
        "diffusion": diffusion,
        "vae": autoencoder.spec["vae"],
        "image_size": tuple(dataset.image_size),
        "channels": dataset.channels,
        "classes": list(dataset.classes),
        "sampling": sampling | given,
    }
    runtime.naming("--diffusion-args: sampling", lambda: settings_for(spec))
    with torch.device("meta"):
        runtime.naming("--image-size, --model-args", lambda: checkpoint.build_model(spec["model"]))
    return spec, label_drop


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema <- decay * ema + (1 - decay) * model, with a smaller decay in the first steps (step from 0)."""
    decay = min(decay, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)


@torch.no_grad()
def validate(training: "Training", objective: Objective, held_out, args, world: runtime.World) -> dict[str, float]:
    """The mean loss of raw and of EMA weights, always on the same held-out images, at the same t and noise."""
    model, networks = training.model, (training.model, training.ema)
    totals = torch.zeros(3, device=world.device)  # the two sums, and the number of images
    chosen = torch.randperm(len(held_out), generator=runtime.generator("val", len(held_out)))[:VAL_IMAGES]
    batches = chosen.split(VAL_BATCH)
    for k in range(world.rank, len(batches), world.size):
        images, labels = (part.to(world.device) for part in held_out.__getitems__(batches[k].tolist()))
        draws = draw(objective.process, (model.in_channels, *model.input_size), len(labels), ("val", args.global_seed, k),
                     world.device)
        losses = [objective._replace(label_drop=0.0, flip=False).losses(network, images, labels, draws).sum()
                  for network in networks]
        totals += torch.stack([*losses, torch.tensor(float(len(labels)), device=world.device)])
    raw, ema, count = world.mean(totals).tolist()
    return {"val_loss": raw / count, "val_loss_ema": ema / count}


def preview(ema: nn.Module, autoencoder: nn.Module, spec: dict, folder: Path, step: int, args) -> Path:
    """Write a grid of EMA samples, a class a column, always from the same noise; its path."""
    count = len(spec["classes"])
    labels = (DIT_LABELS if count == 1000 else list(range(min(count, PREVIEW_COLUMNS)))) * PREVIEW_ROWS
    images = generate(ema, autoencoder, labels, range(len(labels)), args.global_seed, **settings_for(spec),
                      precision=args.precision)
    path = folder / "previews" / f"{step:07d}.png"
    save_grid(images, path, columns=len(labels) // PREVIEW_ROWS)
    return path


def accumulate_gradients(network: nn.Module, objective: Objective, batches: Iterator, draws: Draws,
                         order: GlobalOrder) -> Tensor:
    """Backward through this process's micro-batches of one step; the mean loss."""
    loss = torch.zeros((), device=draws.t.device)
    for rows in order.rows:
        images, labels = next(batches)
        last = rows is order.rows[-1]  # processes exchange gradients once a step
        with nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync():
            losses = objective.losses(network, images, labels, draws.rows(rows))
            (losses.mean() / len(order.rows)).backward()
        loss += losses.detach().mean() / len(order.rows)
    return loss


@dataclass
class Training:
    """All that changes from step to step: what a checkpoint holds."""

    model: nn.Module
    ema: nn.Module
    opt: torch.optim.Optimizer
    loss_sum: Tensor     # over the steps since the last line of the log
    loss_count: int = 0  # number of these
    step: int = 0        # optimizer steps taken

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "ema": self.ema.state_dict(), "opt": self.opt.state_dict(),
                "loss_sum": self.loss_sum, "loss_count": self.loss_count, "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        for name in ("model", "ema", "opt"):
            getattr(self, name).load_state_dict(state[name])
        self.loss_sum.copy_(state["loss_sum"])
        self.loss_count, self.step = state["loss_count"], state["step"]


def open_run(training: Training, spec: dict, flags: dict, args, world: runtime.World) -> tuple[Path, str | Path | None]:
    """The run's folder; and the checkpoint that `training` now continues: the folder's newest, else --resume, else None."""
    state = checkpoint.load_same_run(args.resume, spec, flags) if args.resume else None  # refused before a folder is made
    results = world.on_main(lambda: runtime.check_writable(args.results_dir))
    folder = world.on_main(lambda: checkpoint.open_run(results, args.run_name, args.model))
    newest = world.on_main(lambda: checkpoint.latest(folder))
    if newest:
        state = checkpoint.load_same_run(newest, spec, flags)
    if state:
        training.load_state_dict(state)
    return folder, newest or args.resume


# --- the run -------------------------------------------------------------------------------------


def main(args) -> None:
    world = runtime.start_world(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    check_numbers(args)
    runtime.check_tracker(args.tracker)
    optim = OptimizerArgs(**runtime.check_arguments(OptimizerArgs, args.optimizer_args, "--optimizer-args"))
    dataset = world.main_first(lambda: load_dataset(args.data_path, args.image_size, args.data_root))
    held_out = load_dataset(args.data_path, args.image_size, args.data_root, "val") if args.val_every else None
    if held_out and held_out.classes != dataset.classes:
        raise ValueError(f"--val-every: the held-out part of --data-path {args.data_path} has other classes than it")
    order = GlobalOrder(len(dataset), args.global_batch_size, args.global_seed, world.rank, world.size, args.grad_accum)
    max_steps = args.max_steps or math.ceil(args.epochs * len(dataset) / args.global_batch_size)
    autoencoder = world.main_first(lambda: load_autoencoder(args.vae, world.device))
    spec, label_drop = describe(args, dataset, autoencoder)
    process = create_diffusion("", **spec["diffusion"])
    objective = Objective(process, autoencoder, len(dataset.classes), label_drop, dataset.flip, args.precision)

    torch.manual_seed(args.global_seed)  # nothing but the initialisation draws from it
    model = checkpoint.build_model(spec["model"]).to(world.device).train()
    beginning = "Fresh weights"
    if args.init_from:
        beginning = world.main_first(lambda: checkpoint.init_from(model, args.init_from))
    parameters, latent_shape = [p for p in model.parameters() if p.requires_grad], (model.in_channels, *model.input_size)
    training = Training(
        model, copy.deepcopy(model).eval().requires_grad_(False),
        torch.optim.AdamW(parameters, args.lr, optim.betas, weight_decay=optim.weight_decay, fused=True),
        torch.zeros((), device=world.device))
    flags = {name: value for name, value in args.as_dict().items() if name != "config"}
    folder, source = open_run(training, spec, flags, args, world)
    beginning = f"Continuing {source}" if source else beginning
    log = runtime.Log(folder, world, training.step, args.tracker, flags)
    log.say(f"{folder}: {args.model}, {sum(p.numel() for p in parameters):,} parameters, {len(dataset):,} images of "
            f"{len(dataset.classes)} classes, {world.size} x {world.device.type}. {beginning}: {training.step} of "
            f"{max_steps} steps done")

    if args.compile:
        model.compile()
    network = DistributedDataParallel(model) if world.size > 1 else model
    runtime.checks_are_done()
    steps = range(training.step, max_steps)
    batches = load_batches(dataset, order, steps, args.num_workers, world.device)
    started = clock = time.perf_counter()
    clock_step = training.step
    for step in (bar := tqdm(steps, "training", initial=steps.start, total=max_steps, disable=not world.is_main)):
        lr = set_learning_rate(training.opt, args.lr * optim.factor(step, max_steps))
        draws = draw(process, latent_shape, order.batch_size, ("train", order.seed, step), world.device)
        loss = accumulate_gradients(network, objective, batches, draws, order)
        grad_norm = nn.utils.clip_grad_norm_(parameters, optim.clip_norm or math.inf)
        training.opt.step()
        training.opt.zero_grad(set_to_none=True)
        update_ema(training.ema, model, args.ema_decay, step)
        training.loss_sum += world.mean(loss)
        training.loss_count += 1
        training.step = step + 1

        if due(training.step, args.log_every, max_steps):
            samples, mean_loss = training.step * order.batch_size, training.loss_sum.item() / training.loss_count
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            log.record(training.step, epoch=samples / len(dataset), samples=samples, loss=mean_loss, lr=lr,
                       grad_norm=grad_norm.item(), images_per_second=(training.step - clock_step) * order.batch_size / seconds)
            bar.set_postfix(loss=f"{mean_loss:.4f}")
            training.loss_count, clock_step = 0, training.step
            training.loss_sum.zero_()
        if held_out and due(training.step, args.val_every, max_steps):
            log.record(training.step, **validate(training, objective, held_out, args, world))
        if world.is_main and due(training.step, args.preview_every, max_steps):
            log.image(training.step, preview(training.ema, autoencoder, spec, folder, training.step, args))
        if world.is_main and due(training.step, args.ckpt_every, max_steps):
            checkpoint.save_step(folder, training.state_dict() | {"args": flags, "spec": spec}, args.keep_last)
    log.say(f"Finished: {folder} is at step {training.step}; {len(steps)} steps in {time.perf_counter() - started:.0f} s")
    log.close()


def due(step: int, every: int, max_steps: int) -> bool:
    """Whether to act after `step` steps: at every multiple (0: none), and at the end."""
    return step == max_steps or (every > 0 and step % every == 0)


def check_numbers(args) -> None:
    for flag in ("epochs", "max_steps", "global_batch_size", "grad_accum", "log_every", "ckpt_every"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is not at least 1")
    for flag in ("num_workers", "global_seed", "keep_last", "preview_every", "val_every"):
        if getattr(args, flag) < 0:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is negative")
    if args.run_name is not None and Path(args.run_name).name != args.run_name:
        raise ValueError(f"--run-name {args.run_name!r} is not the name of a folder in --results-dir")
    if not (args.lr > 0 and math.isfinite(args.lr)):
        raise ValueError(f"--lr {args.lr} is not a positive number")
    if not 0 <= args.ema_decay < 1:
        raise ValueError(f"--ema-decay {args.ema_decay} is not in [0, 1)")


if __name__ == "__main__":
    runtime.run(main, build_parser())
