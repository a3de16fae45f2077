"""Train a diffusion model: image -> latent -> noise -> x_t -> model -> loss -> step -> EMA.

    python train.py --config configs/digits.yaml
    torchrun --nproc_per_node=8 train.py --model DiT-XL/2 --data-path features/train

The order of the data and all random numbers of step k are functions of (seed, k). They are drawn for the global batch, and each
process takes its rows. So interruptions do not change a run, nor, up to rounding and on one model of GPU, does the number of
processes (CUDA's generator draws a large tensor differently on another model).
"""

import math
import time
from contextlib import nullcontext, suppress

import torch
from jsonargparse import ActionYesNo, Namespace
from torch import Tensor
from tqdm import tqdm

from evaluation.monitor import add_figure_arguments, open_monitor
from pipeline.autoencoders import check_features, load_autoencoder
from pipeline.heads import backbone, with_heads
from runtime import UserError, cli, processes
from runtime.files import check_writable
from runtime.log import TRACKERS, Log, Stopwatch, check_tracker, peak_memory
from runtime.processes import CommonError, Delayed, Stopped, StopSignal, World, distribute, set_timeouts, start_world
from runtime.randomness import generator, seed_global
from small_models import NETWORKS, Autoencoder_models
from training.datasets import load_dataset, load_everywhere, load_held_out
from training.initial import DEFAULT_MODEL, changes, check_fit, check_time_scale, find_initial, init_from
from training.objective import Objective, check_rows, means_of, process_of
from training.order import Batches, GlobalOrder
from training.previews import preview, save_previews_gif
from training.rows import Readable, Rows, choose_flip, describe
from training.runs import begin_or_continue, build_run_spec, list_skipped, save_run, streak_error
from training.state import OptimizerArgs, Training

VAL_IMAGES, VAL_BATCH = 4096, 64
GRAPHS = 32  # of torch.compile: a flow map's calls, in training and validation, are nine


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Train a class-conditional diffusion model.")
    parser.add_data_arguments()
    parser.add_shared_arguments()
    parser.add_argument("--results-dir", default="results", help="where the folders of runs lie")
    parser.add_argument("--run-name", type=str | None, help="begin or continue this run; default: a new NNN-model")
    parser.add_argument("--model", type=str | None, registry=NETWORKS,
                        help=f"a preset of models.py; default: that of --init-from, else {DEFAULT_MODEL}")
    parser.add_argument("--model-args", type=dict, default={}, help="arguments of the network, over its preset's")
    parser.add_argument("--heads", type=dict, default={}, help="pipeline/heads.py: internal, align: what is learnt beside")
    parser.add_argument("--diffusion-args", type=dict, default={}, help="of create_diffusion; label_drop (0.1); sampling")
    parser.add_argument("--optimizer-args", type=dict, default={}, help="training/state.py's OptimizerArgs: betas, schedule, …")
    parser.add_argument("--epochs", type=int, default=1400, help="passes over the data")
    parser.add_argument("--max-steps", type=int | None, help="optimizer steps, in place of --epochs")
    parser.add_argument("--global-batch-size", type=int, default=256, help="over all processes")
    parser.add_argument("--grad-accum", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--global-seed", type=int, default=0, help="of weights, order, noise, timesteps, dropped labels")
    parser.add_argument("--lr", type=float, default=1e-4, help="AdamW's, after its warm-up")
    parser.add_argument("--ema-decay", type=float, default=0.9999, help="of the weights that are sampled; less at first")
    parser.add_argument("--init-from", type=str | None, help="begin with its weights; without --model with its network too")
    parser.add_argument("--resume", type=str | None, help="resume weights, EMA, optimizer and step from this checkpoint")
    parser.add_argument("--flip", action=ActionYesNo(yes_prefix="", no_prefix="no-"), default=None,
                        help="mirror half of the samples; default: as the data says, yes for folders, no for digits")
    parser.add_argument("--log-every", type=int, default=100, help="steps between lines of the log")
    parser.add_argument("--ckpt-every", type=int, default=50_000, help="steps between checkpoints")
    parser.add_argument("--max-skipped", type=float, default=0.001, help="share of samples that may be unreadable")
    parser.add_argument("--keep-last", type=int | tuple[int, int], default=0,
                        help="so many checkpoints, K (0: all), or [K, M]: every M-th one, too")
    parser.add_argument("--preview-every", type=int, default=50_000, help="steps between EMA samples; 0: only at the end")
    parser.add_argument("--val-every", type=int, default=0, help="steps between validation losses; 0: none")
    add_figure_arguments(parser)
    parser.add_argument("--tracker", default="none", choices=list(TRACKERS), help="mirrors the log to it")
    return parser


def main(args: Namespace) -> None:
    world = start_world(args.device)
    check_tracker(args.tracker)
    run = Trainer(args, world)
    run.begin()
    start = time.perf_counter()
    try:
        try:
            with tqdm(desc="training", initial=run.first, total=run.max_steps, disable=not world.is_main) as bar:
                if run.first:
                    run.finish_step()  # an interruption may have left something undone
                while not run.over:
                    run.step()
                    bar.update()
                    run.finish_step()
            ending = f"Finished: {run.folder}"
        except Stopped as signal:
            while not run.save():  # in a streak of skipped steps, which the next good step ends, or too many skipped ones do
                with suppress(Stopped):  # no data came: then `save` ends the run
                    run.step()
            ending = f"Stopped by {signal}; the same command with --run-name {run.folder.name} goes on"
    except BaseException as error:
        run.rescue(error)
        raise
    if run.over:
        world.on_main(lambda: save_previews_gif(run.folder))
    run.log.say(f"{ending}. Step {run.state.step} of {run.max_steps}; {run.state.step - run.first} steps in "
                f"{time.perf_counter() - start:.0f} s")
    run.log.close()


class Trainer:
    """What a run is made of, one step of it, and what is due after a step."""

    def __init__(self, args: Namespace, world: World):
        """Build data, autoencoder, objective, network and optimizer from the flags. Nothing is written yet."""
        self.args, self.world, self.optim = args, world, check_flags(args)
        chosen, self.initial, taken, statistics = find_initial(args.as_dict(), world)
        for name, value in chosen.items():
            setattr(args, name, value)
        where = (args.image_size, args.data_root)
        self.data = load_everywhere(world, args.data_path, lambda: load_dataset(
            args.data_path, *where, num_classes=args.num_classes))
        args.flip = choose_flip(self.data, args.flip)
        with cli.prefix_errors("--val-every:"):
            self.held_out = load_everywhere(world, args.data_path, lambda: load_held_out(
                args.data_path, self.data, *where)) if args.val_every else None
        self.max_unreadable, self.unreadable = math.ceil(args.max_skipped * len(self.data)), set()
        self.order = GlobalOrder(len(self.data), args.global_batch_size, args.global_seed, world.rank, world.size,
                                 args.grad_accum, args.flip)
        self.max_steps = args.max_steps or math.ceil(args.epochs * len(self.data) / args.global_batch_size)
        usual = "pixels" if args.model in Autoencoder_models else taken.spec.vae if taken else "ema"
        args.vae = args.vae or self.data.made_by.get("vae", usual)
        if self.data.statistics or self.data.kind == "latents":  # the data's own, or they are normalised already
            statistics = self.data.statistics
        with cli.prefix_errors("--vae"):
            self.autoencoder = world.main_first(lambda: load_autoencoder(args.vae, world.device, statistics))
            check_features(self.autoencoder, self.data, self.held_out)
        self.flags = {name: value for name, value in args.as_dict().items() if name != "config"}  # as checkpoints hold them
        self.spec, label_drop = build_run_spec(args.model, args.model_args, args.diffusion_args, self.data, self.autoencoder,
                                               args.heads)
        process = process_of(self.spec)
        check_rows(process, self.order.rows)
        self.changes = changes(self.spec, label_drop, taken) if taken else []
        if self.initial:  # before a large network is built
            check_fit(self.spec.model.outline().state_dict(), self.initial, self.spec.classes)
            check_time_scale(self.spec, self.initial.spec)
        torch.manual_seed(args.global_seed)  # only the initialisation draws from it
        model = self.spec.model.build()
        if self.spec.heads:  # one of which may download an encoder
            model = world.main_first(lambda: with_heads(model, self.spec))
        heads = model.heads if self.spec.heads else None
        self.objective = Objective(process, self.autoencoder, self.data, label_drop, args.precision, heads)
        self.state = Training.begin(model.to(world.device).train(), args.lr, self.optim)

    def begin(self) -> None:
        """Open the run's folder, continue its newest checkpoint, and start to read."""
        args, world, state = self.args, self.world, self.state
        self.monitor = open_monitor(args.figures_ref, args.figures_every, args.figures_samples, args.data_root,
                                    args.results_dir, self.spec, self.autoencoder, world)
        world.on_main(lambda: check_writable(args.results_dir, state.size))
        weights = init_from(state, self.initial, self.spec.classes) if self.initial else "Fresh weights"
        self.folder, remarks = begin_or_continue(state, self.spec, self.flags, [weights, *self.changes], world, self.data.flip)
        self.initial = None  # its file may be deleted now
        self.first = state.step
        self.log = Log(self.folder, world, self.first, args.tracker, self.flags)
        self.log.say(f"{self.folder}: {describe(self.data, args.flip)}, {world.size} x {world.device.type}; "
                     f"{'; '.join(remarks)}; {self.first} of {self.max_steps} steps done")
        for data in (self.data, self.held_out):
            for remark in getattr(data, "remarks", []):
                self.log.say(f"--data-path {args.data_path}: {remark}")
        self.network = distribute(state.model, world)
        if args.compile:
            torch._dynamo.config.recompile_limit = GRAPHS
            state.model.compile(dynamic=False)  # else a second shape, as of a validation, makes every step a slower one
        self.batches = Batches(Readable(self.data, self.max_unreadable), self.order, range(self.first, self.max_steps),
                               args.num_workers, world.device)
        self.stop, self.stopwatch = StopSignal(world), Stopwatch()
        self.sound, self.owed = True, False  # whether the weights are those of `state.step`; whether a checkpoint is overdue
        self.streak = Delayed(state.meter.streak)

    def step(self) -> None:
        """One optimizer step. The host waits for the device only until the step before is done, or where a line is logged."""
        args, state = self.args, self.state
        state.begin_step()
        self.stopwatch.start()
        # The learning rate is a function of the step alone, so that a continued run has the same one.
        lr = state.opt.param_groups[0]["lr"] = args.lr * self.optim.factor(state.step, self.max_steps)
        losses = self.accumulate_gradients()
        grad_norm = state.clip_gradients(self.optim.clip_norm)
        # The fused AdamW reads `found_inf` on the device: where the loss or the gradient norm is not finite on any process,
        # all of them skip the step, and the host does not wait for that decision.
        self.sound = False
        state.opt.found_inf = state.meter.update(losses, grad_norm)
        state.opt.step()
        state.opt.zero_grad(set_to_none=True)
        state.update_ema(args.ema_decay)
        state.step += 1
        self.sound = True
        if state.step == self.first + 1 and self.stop.group:
            set_timeouts(None, self.stop.group)
        streak, self.streak = self.streak.read(), Delayed(state.meter.streak)
        means = state.meter.read() if self.due(args.log_every) else None
        self.stopwatch.stop()
        if means:
            samples = state.step * self.order.batch_size
            self.log.record(state.step, epoch=samples / len(self.data), samples=samples, **means, lr=lr,
                            grad_norm=grad_norm.item(), memory_gib=peak_memory(self.world.device),
                            **self.stopwatch.read(self.order.batch_size, self.batches.read_waited()))
            self.report_unreadable(self.batches.unreadable)
        if streak >= self.optim.max_skipped_steps and int(state.meter.streak):
            raise streak_error(streak, self.folder, args.resume)

    def accumulate_gradients(self) -> dict[str, Tensor]:
        """Backward through this process's micro-batches of one step. Returns the mean of each loss, over all processes."""
        draws = self.objective.draw(("train", self.args.global_seed, self.state.step), self.order.batch_size, self.state.model,
                                    self.world.device)
        means = 0.0
        for micro, rows in enumerate(self.order.rows):
            last = rows is self.order.rows[-1]  # processes exchange gradients once a step
            with self.stop.waiting():
                batch, labels = next(self.batches)
            seed_global("network", self.args.global_seed, self.state.step, self.world.rank, micro)  # ours draw nothing from it
            with nullcontext() if last or self.world.size == 1 else self.network.no_sync():
                losses = self.objective.losses(self.network, batch, labels, draws.rows(rows), self.state.step)
                (losses["loss"].mean() / len(self.order.rows)).backward()
            means = means + torch.stack(means_of(losses)) / len(self.order.rows)
        return dict(zip(losses, self.world.mean(means)))

    def finish_step(self) -> None:
        """Validate, save, preview and measure where due, skipping what was already done. Raises Stopped on a signal."""
        args, state, world = self.args, self.state, self.world
        if self.held_out and self.due(args.val_every) and state.validated < state.step:
            self.validate()
        measured = self.monitor is not None and self.due(args.figures_every)
        if self.due(args.ckpt_every) or self.owed or measured:
            self.owed = not self.save()
        picture = self.folder / "previews" / f"{state.step:07d}.png"
        if self.due(args.preview_every) and (state.step > self.first or not world.on_main(picture.exists)):
            shown = preview(state.ema, self.autoencoder, self.spec, picture, world, args.global_seed, args.precision,
                            self.stop.check, Readable(self.held_out or self.data, self.max_unreadable))
            self.log.image(state.step, picture)
            self.log.say(f"{picture}{': ' if shown else ''}{', '.join(shown)}")
        if measured and not self.owed:
            self.monitor.measure(state.ema, state.step, state.step == self.first, self.log, self.stop)
        if not self.over:
            self.stop.check(paced=True)

    @torch.no_grad()
    def validate(self) -> None:
        """The mean loss of raw and of EMA weights, always on the same held-out samples, at the same t and noise."""
        state, world, device = self.state, self.world, self.world.device
        objective = self.objective._replace(label_drop=0.0, heads=None)
        terms = objective.process.validation_terms
        totals = torch.zeros(2, 1 + len(terms), device=device)  # sums, counts: the loss of raw weights, terms of EMA weights
        order = torch.randperm(len(self.held_out), generator=generator("val", len(self.held_out)))[:VAL_IMAGES]
        readable, unreadable = Readable(self.held_out, self.max_unreadable), {}
        for k, rows in enumerate(tqdm(order.split(VAL_BATCH), desc="validation", leave=False, disable=not world.is_main)):
            if k % world.size == world.rank:
                with self.stop.waiting():
                    *parts, found = readable.__getitems__(Rows.plain(rows.numpy()))
                unreadable |= found
                batch, labels = (part.to(device) for part in parts)
                draws = objective.draw(("val", self.args.global_seed, k), len(rows), state.model, device)
                state.model.eval()
                raw, ema = (objective.losses(backbone(net), batch, labels, draws) for net in (state.model, state.ema))
                state.model.train()
                values = torch.stack([raw["loss"], *(ema[name] for name in terms)])
                undefined = values.isnan() & torch.tensor([[name != "loss"] for name in ("loss", *terms)], device=device)
                totals += torch.stack([values.masked_fill(undefined, 0.0), (~undefined).float()]).sum(dim=2)
            if (k + 1) % world.size == 0:
                self.stop.check()
        self.report_unreadable(unreadable)
        sums, counts = world.mean(totals)
        means = dict(zip(["val_loss", *(f"val_{name}_ema" for name in terms)], (sums / counts).tolist()))
        self.log.record(state.step, **means)
        skipped = world.on_main(state.meter.streak.item)  # then nothing is saved, `best.pt` neither
        if not skipped and state.validated_at(means["val_loss_ema"]):
            self.save("best.pt")

    def report_unreadable(self, found: dict[int, str]) -> None:
        """Name unreadable samples, each once, in the log and in skipped.txt. Too many end the run."""
        self.unreadable.update(found.values())
        parts = self.world.gather(self.unreadable)

        def report() -> int:
            for sentence in list_skipped(self.folder, every := set().union(*parts)):
                self.log.say(f"Skipped, the next one is read in its place: {sentence}")
            return len(every)

        if (count := self.world.on_main(report)) > self.max_unreadable:
            raise CommonError(f"{count} samples cannot be read, more than `max_skipped` allows; {self.folder}/skipped.txt "
                              "names them. Repair or remove them; the same command with `run_name` goes on")

    def save(self, name: str = "") -> bool:
        """Write a checkpoint, on the main process, and delete old ones. Returns False, and writes nothing, within a streak of
        skipped steps: the weights may be what makes their losses infinite. (At the end of a run a streak below the limit is
        saved.) All processes must call this together."""
        tolerated = self.optim.max_skipped_steps - 1 if self.over else 0
        streak = self.world.on_main(lambda: save_run(self.folder, self.state, self.spec, self.flags, name, tolerated))
        if streak and (self.over or self.stop.failed):  # no step is left
            raise streak_error(streak, self.folder, self.args.resume)
        return not streak

    def rescue(self, error: BaseException) -> None:
        """Save what a failure would lose. Perhaps only this process knows of it: the main one writes and asks nobody."""
        step, said, world = self.state.step, "", self.world
        if not world.is_main:
            if isinstance(error, CommonError):  # torchrun kills the main one half a minute after this one has ended
                with suppress(RuntimeError):
                    world.store.wait(["rescued"], processes.step_timeout())
            return
        try:
            if self.sound and self.state.saved != step and not self.half_a_sum(error) and not save_run(
                    self.folder, self.state, self.spec, self.flags):
                said = f"Saved step {step} before the error; the same command with --run-name {self.folder.name} goes on"
        except Exception as also:  # such as a full disk: the first error is the one to report
            said = f"Step {step} could not be saved: {cli.one_line(also)}"
        finally:
            world.add("rescued", 1)
        with suppress(OSError):
            said and self.log.say(said)

    def half_a_sum(self, error: BaseException) -> bool:
        """Whether the GPU waits for ever, for a process that is lost."""
        lost = isinstance(error, torch.distributed.DistBackendError) or cli.is_lost(error)
        return bool(lost) and self.world.device.type == "cuda"

    @property
    def over(self) -> bool:
        return self.state.step >= self.max_steps or self.state.validations_since_best >= (self.optim.patience or math.inf)

    def due(self, every: int) -> bool:
        """Whether to act after this step: at every multiple (0: none), and at the end."""
        return self.over or (every > 0 and self.state.step % every == 0)


def check_flags(args: Namespace) -> OptimizerArgs:
    cli.check_data_arguments(args)
    for names, allowed, fine in (
            ("epochs max_steps global_batch_size grad_accum log_every ckpt_every", "at least 1", lambda n: n >= 1),
            ("preview_every val_every keep_last", "at least 0", lambda n: n >= 0),
            ("global_seed", "in 0..2^63 - 1", lambda n: 0 <= n < 2**63),
            ("max_skipped", "a share, 0..1", lambda share: 0 <= share <= 1),
            ("lr", "a positive number", lambda x: 0 < x < math.inf), ("ema_decay", "in [0, 1)", lambda x: 0 <= x < 1)):
        cli.check_numbers(args, names.split(), allowed, fine)
    if args.resume and args.init_from:
        raise UserError("`resume` takes everything of a checkpoint and `init_from` its weights: give one of them")
    with cli.prefix_errors("--optimizer-args:"):
        return OptimizerArgs(**cli.check_arguments(OptimizerArgs, args.optimizer_args))


if __name__ == "__main__":
    cli.run(main, build_parser())
