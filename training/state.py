"""The state that changes at each step (weights, EMA, optimizer, meter) and its settings."""

import copy
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.heads import WithHeads, backbone
from pipeline.weights import check_values
from runtime import UserError

# What a line of the log holds beside the scalars of training_losses.
LOGGED = ("step", "time", "epoch", "samples", "loss_moving_mean", "skipped_steps", "lr", "grad_norm", "memory_gib",
          "images_per_second", "data_wait_share")


@dataclass
class OptimizerArgs:
    """train.py's --optimizer-args: AdamW, the schedule of its learning rate, and when a run ends early."""

    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    clip_norm: float = math.inf
    max_skipped_steps: int = 20   # consecutive steps whose loss or gradient norm is not finite
    patience: int | None = None   # consecutive validations without a better loss

    def __post_init__(self):
        for name, allowed, valid in (
                ("betas", "two numbers in [0, 1)", all(0 <= beta < 1 for beta in self.betas)),
                ("weight_decay", "at least 0", self.weight_decay >= 0), ("warmup_steps", "at least 0", self.warmup_steps >= 0),
                ("clip_norm", "above 0", self.clip_norm > 0), ("max_skipped_steps", "at least 1", self.max_skipped_steps > 0),
                ("patience", "at least 1", self.patience is None or self.patience > 0)):
            if not valid:
                raise UserError(f"{name} {getattr(self, name)} is not {allowed}")

    def factor(self, step: int, max_steps: int) -> float:
        """The factor of --lr in step `step`, counted from 0: a linear warm-up, then 1, or half a cosine to 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / max_steps)) if self.schedule == "cosine" else 1.0
        return cosine * min(1.0, (step + 1) / (self.warmup_steps + 1))


@dataclass
class Training:
    """All that changes at each step. A training checkpoint holds this and the run's description."""

    model: nn.Module
    ema: nn.Module
    opt: torch.optim.Optimizer
    meter: "LossMeter"                    # losses since the last log line
    step: int = 0                         # optimizer steps taken
    validated: int = 0                    # the step of the last validation
    best: float = math.inf                # the lowest validation loss of the EMA
    validations_since_best: int = 0
    saved: int = 0                        # the step of the newest checkpoint in the run's folder; not saved itself
    before: list[Tensor] = field(default_factory=list)  # in the middle of a step: the model's buffers before it

    @classmethod
    def begin(cls, model: nn.Module, lr: float, args: OptimizerArgs) -> "Training":
        trained = [p for p in model.parameters() if p.requires_grad]
        opt = torch.optim.AdamW(trained, lr, args.betas, weight_decay=args.weight_decay, fused=True)
        opt.found_inf = torch.zeros((), device=trained[0].device)  # 1.0: the fused AdamW skips the step, and so does the EMA
        return cls(model, copy.deepcopy(model).eval().requires_grad_(False), opt, LossMeter().to(trained[0].device))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return self.opt.param_groups[0]["params"]

    @cached_property
    def averaged(self) -> tuple[list, list]:
        """The weights of the EMA, and the model's weights that they average."""
        return list(self.ema.parameters()), list(self.model.parameters())

    def clip_gradients(self, clip_norm: float) -> Tensor:
        """Scale the gradients down to a norm of at most `clip_norm`. Returns their norm before."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if clip_norm < math.inf:  # else each gradient would be multiplied by 1, a pass over all of them
            nn.utils.clip_grads_with_norm_(self.parameters, clip_norm, norm)
        return norm

    def begin_step(self) -> None:
        """Keep the model's buffers: the statistics of a step that is skipped, or that fails, do not count."""
        self.before = [buffer.clone() for buffer in self.model.buffers()]

    @torch.no_grad()
    def undo_step(self) -> None:
        """After a failure between `begin_step` and the optimizer's step: the state is that before the step."""
        for buffer, before in zip(self.model.buffers(), self.before):
            buffer.copy_(before)
        self.before = []

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """ema <- decay * ema + (1 - decay) * model, with a smaller decay in the first steps. A skipped step changes nothing.

        Buffers, such as BatchNorm's statistics, are copied. Where processes differ in them, a checkpoint holds rank 0's.
        The device decides whether the step is skipped: the host does not wait for it.
        """
        decay, skip = min(decay, (1 + self.step) / (10 + self.step)), self.opt.found_inf
        rates = {dtype: (1 - skip).to(dtype) * (1 - decay) for dtype in {p.dtype for p in self.averaged[0]}}
        for averaged, weight in zip(*self.averaged):
            averaged.lerp_(weight, rates[averaged.dtype])
        for buffer, before in zip(self.model.buffers(), self.before):  # anew each time: a module may replace them
            buffer.copy_(torch.where(skip > 0, before, buffer))
        for averaged, buffer in zip(self.ema.buffers(), self.model.buffers()):
            averaged.copy_(buffer)
        self.before = []

    def validated_at(self, loss: float) -> bool:
        """Record a validation loss. Returns whether it is the lowest so far."""
        self.validated, self.saved = self.step, 0  # a checkpoint of this step, if it exists, lacks the validation
        better = loss < self.best
        self.validations_since_best = 0 if better else self.validations_since_best + 1
        self.best = loss if better else self.best
        return better

    def networks(self) -> dict[str, tuple[nn.Module, nn.Module | None]]:
        """Of "model" and "ema" the network, and its heads, if it has some. A checkpoint holds the heads apart."""
        both = {"model": self.model, "ema": self.ema}
        return {name: (backbone(model), model.heads if isinstance(model, WithHeads) else None) for name, model in both.items()}

    def state_dict(self) -> dict:
        parts = {name: network.state_dict() for name, (network, _) in self.networks().items()}
        heads = {name: heads.state_dict() for name, (_, heads) in self.networks().items() if heads is not None}
        parts |= {"heads": heads} if heads else {}
        parts |= {name: getattr(self, name).state_dict() for name in ("opt", "meter")}
        return parts | {name: getattr(self, name) for name in ("step", "validated", "best", "validations_since_best")}

    def check(self, state: dict) -> None:
        """Raises UserError if values of a checkpoint are not finite, or the optimizer's of other shapes than the parameters."""
        for name, (network, heads) in self.networks().items():
            check_values(state[name], network.state_dict(), name)
            if heads is not None:
                check_values(state["heads"][name], heads.state_dict(), f"heads of {name}")
        for index, moments in state["opt"]["state"].items():
            shape = self.parameters[index].shape
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape != shape:
                    raise UserError(f"opt: {name} {index} is {tuple(moments[name].shape)}, the parameter {tuple(shape)}")
                if not moments[name].isfinite().all():
                    raise UserError(f"opt: {name} {index} is not finite; take an earlier checkpoint")

    def load_state_dict(self, state: dict) -> None:
        group = {name: self.opt.param_groups[0][name] for name in ("betas", "weight_decay")}
        for name, (network, heads) in self.networks().items():
            network.load_state_dict(state[name])
            if heads is not None:
                heads.load_state_dict(state["heads"][name])
        for name in ("opt", "meter"):
            getattr(self, name).load_state_dict(state[name])
        self.opt.param_groups[0].update(group)  # use the current --optimizer-args
        for name in ("step", "validated", "best", "validations_since_best"):
            setattr(self, name, state[name])

    @property
    def size(self) -> int:
        """Bytes of a checkpoint: the weights twice, and AdamW's two moments of the trained parameters."""
        weights = [*self.model.state_dict().values(), *self.ema.state_dict().values()]
        return sum(tensor.nbytes for tensor in weights + 2 * self.parameters)


class LossMeter(nn.Module):
    """The training losses and the number of skipped steps, counted on the device and read only when a line is logged.

    If the loss or gradient norm is not finite on any process, all skip the step. The buffers are saved in checkpoints.
    """

    HORIZON = 100  # steps that the moving mean covers
    TERM = "term_"  # prefix of a buffer (sum, count), one for each scalar other than "loss"

    def __init__(self):
        super().__init__()
        for name in ("total", "count", "seen", "moving_mean", "skipped"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("streak", torch.zeros(()), persistent=False)  # steps skipped in a row; never saved in one

    @property
    def terms(self) -> dict[str, Tensor]:
        return {name.removeprefix(self.TERM): term for name, term in self.named_buffers() if name.startswith(self.TERM)}

    def update(self, losses: dict[str, Tensor], grad_norm: Tensor) -> Tensor:
        """Count a step, given means over all processes. Returns AdamW's `found_inf`: 1.0 to skip the step, else 0.0."""
        loss = losses["loss"]
        skip = (~(loss.isfinite() & grad_norm.isfinite())).float()
        for name in [name for name in losses if name != "loss"]:
            if name not in self.terms:
                self.add_term(name, loss)
            self.terms[name].add_(torch.where(skip > 0, 0.0, torch.stack([losses[name], torch.ones_like(loss)])))
        loss = torch.where(skip > 0, 0.0, loss)
        self.total += loss
        self.count += 1 - skip
        self.seen += 1 - skip
        self.moving_mean += (1 - skip) * (loss - self.moving_mean) / self.seen.clamp(1, self.HORIZON)
        self.skipped += skip
        self.streak.add_(skip).mul_(skip)
        return skip

    def add_term(self, name: str, like: Tensor) -> None:
        if "." in name or name in LOGGED:
            raise UserError(f"training_losses returns a scalar named {name!r}; names must have no dot and differ from "
                            f"{', '.join(LOGGED)}")
        self.register_buffer(self.TERM + name, like.new_zeros(2))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the state of a checkpoint into a new meter. An older one may hold a streak, or no terms: they start at zero."""
        state = {name: value for name, value in state.items() if name not in ("streak", "longest_streak")}
        for name in state.keys() - self.state_dict().keys():
            self.add_term(name.removeprefix(self.TERM), self.total)
        super().load_state_dict(state)

    def read(self) -> dict[str, float]:
        """Mean losses since the last reading (nan if all steps were skipped), their moving mean, and all skipped steps."""
        values = {"loss": (self.total / self.count).item()} | {
            name: (total / count).item() for name, (total, count) in self.terms.items()} | {
            "loss_moving_mean": self.moving_mean.item(), "skipped_steps": int(self.skipped)}
        for buffer in (self.total, self.count, *self.terms.values()):
            buffer.zero_()
        return values
