"""Reuse of features: most blocks of a network run on key evaluations only.

- "encoder" is Faster Diffusion (Li et al., arXiv:2312.09608): the other evaluations take the last key evaluation's encoder
  features as they are, and run the decoder with their own t.
- "forecast" (as TaylorSeer, Liu et al., arXiv:2503.06923): they extrapolate the last block's output.

Both are one mechanism. The features after `split` blocks are computed on key evaluations; elsewhere they are the value at t
of the polynomial through the last `order` + 1 computed ones, of order 0 for "encoder". So between two key evaluations nothing
depends on x_t, and consecutive ones are decoded in one batch.

An evaluation is one call of the model by the sampler: one a step, two where the solver makes two. They are counted from 0,
the noisiest. Of a network this file knows the seam only: condition, encode, decode (see models.py).

Legend: B batch, R rows of a call: B, or 2B [conditional, unconditional] where it is guided. t on the scale 0..1000.
Memory: order + 1 states of R rows (a state of DiT-XL/2 at 256 pixels is 1.1 MiB a row in fp32, half of it in bf16, and the
differences of a forecast are as many again), and the decoder's activations of at most max(R, `parallel`) rows.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from runtime import UserError

State = tuple[Tensor, ...]

PRIOR_NOISE_BELOW = 300  # t, from which on prior noise is added
DEFAULTS = {  # split None: the network's own; -1: all blocks
    "encoder": {"key_steps": "paper", "split": None, "order": 0, "warm_up": 1},
    "forecast": {"key_steps": "every:4", "split": -1, "order": 2, "warm_up": 3},
}


@dataclass(frozen=True)
class Plan:
    """What happens at each evaluation of one run of a sampler."""

    times: tuple[float, ...]
    branches: tuple[int, ...]  # 2 where an evaluation is guided, else 1
    keys: tuple[bool, ...]
    split: int  # blocks before the seam
    depth: int  # blocks of the network
    order: int
    parallel: int  # rows that are decoded at once, if they are more than one evaluation's
    prior_noise: float
    rule: str

    def __str__(self) -> str:
        numbers = [k for k, key in enumerate(self.keys) if key]
        return (f"the first {self.split} of {self.depth} blocks run on {len(numbers)} of {len(self.keys)} evaluations "
                f"({self.rule}; order {self.order}; prior noise {self.prior_noise}): {' '.join(map(str, numbers))}")

    def block_calls(self) -> int:
        """Blocks that an image runs through, both branches counted."""
        return sum(n * (self.depth if key else self.depth - self.split) for n, key in zip(self.branches, self.keys))

    def group(self, k: int, rows: int) -> range:
        """The evaluations from k on that can be decoded in one batch: with the same features known, and the same rows."""
        stop, longest = k + 1, max(1, self.parallel // rows)
        while stop < min(len(self.keys), k + longest) and not self.keys[stop] and self.branches[stop] == self.branches[k]:
            stop += 1
        return range(k, stop)


def plan(kind: str, times: Iterable[float], guided: Iterable[bool], depth: int, default_split: int,
         key_steps: str | None = None, split: int | None = None, order: int | None = None, warm_up: int | None = None,
         parallel: int = 64, prior_noise: float = 0.0) -> Plan:
    """Choose the key evaluations. An evaluation to which the unconditional branch comes back is always one.

    Args:
        kind: "encoder" or "forecast": the defaults of what follows.
        times, guided: t, and whether there is guidance, at each evaluation.
        depth, default_split: of the network: its number of blocks, and of those before its own seam.
        key_steps: "paper", "every:N", or the evaluations' numbers, as "0,3,6".
        split: blocks before the seam, 0..depth.
        order: of the extrapolation.
        warm_up: the first so many evaluations are keys, at least `order`.
        parallel: decode consecutive evaluations together, up to so many rows; 1 is serial, to the same result.
        prior_noise: the paper's 0.003, see add_prior_noise.
    """
    if kind not in DEFAULTS:
        raise UserError(f"`reuse` {kind!r} is unknown; allowed: none, {', '.join(DEFAULTS)}")
    default = DEFAULTS[kind]
    if split is None:
        split = {None: default_split, -1: depth}[default["split"]]
    order = default["order"] if order is None else order
    warm_up = max(default["warm_up"], order + 1) if warm_up is None else warm_up
    if not 0 <= split <= depth:
        raise UserError(f"`reuse_args`: split {split} is not in 0..{depth}, the number of the network's blocks")
    if order < 0 or warm_up < max(1, order):
        raise UserError(f"`reuse_args`: order {order} and warm_up {warm_up} are not 0 <= order <= warm_up, warm_up >= 1")
    if parallel < 1:
        raise UserError(f"`reuse_args`: parallel {parallel} is not at least 1")
    times, branches = tuple(times), tuple(1 + on for on in guided)
    if not 0 <= prior_noise < math.inf:
        raise UserError(f"`reuse_args`: prior_noise {prior_noise} is not a finite number of at least 0")
    rule = default["key_steps"] if key_steps is None else key_steps
    keys = key_evaluations(rule, len(times))
    comes_back = [before < after for before, after in pairwise((branches[0], *branches))]
    keys = tuple(k < warm_up or keys[k] or comes_back[k] for k in range(len(times)))
    rule = f"paper: all but 1 <= k < {paper_end(len(times))} with k % 10 < 6" if rule == "paper" else rule
    return Plan(times, branches, keys, split, depth, order, parallel, prior_noise, rule)


def key_evaluations(rule: str, count: int) -> list[bool]:
    """Which of `count` evaluations a --key-steps rule makes keys.

    "paper" is Faster Diffusion's for 250 steps, 113 keys: all but 1 <= k < 230 with k % 10 < 6. For another count the
    cycle of ten stays, and the last 8 % are keys. "every:N": k % N == 0. Else the numbers themselves.
    """
    if rule == "paper":
        return [not (1 <= k < paper_end(count) and k % 10 < 6) for k in range(count)]
    every = rule.removeprefix("every:")
    if every != rule and every.isdecimal() and int(every) > 0:
        return [k % int(every) == 0 for k in range(count)]
    words = rule.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise UserError(f"`key_steps` {rule!r} is not understood; write paper, every:N, or numbers such as 0,3,6")
    numbers = set(map(int, words))
    if 0 not in numbers or max(numbers) >= count:
        raise UserError(f"`key_steps` {rule}: the numbers must begin with 0, before which there is nothing to reuse, and "
                        f"end below {count}, the evaluations of this sampler")
    return [k in numbers for k in range(count)]


def paper_end(count: int) -> int:
    return round(0.92 * count)


class Reuse:
    """A network `(x, t, y) -> prediction` that follows a plan: made anew for each batch, called once an evaluation."""

    def __init__(self, network, plan: Plan, batch_size: int):
        self.network, self.plan, self.batch_size = network, plan, batch_size
        self.evaluation, self.times = 0, torch.tensor(plan.times)
        self.computed: list[list[tuple[float, State]]] = [[], []]  # a branch: the last order + 1, the newest first
        self.ready: list[Tensor] = []  # outputs of the evaluations to come, the next one last

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (R, C, H, W), t (R,), y (R,) -> (R, C or 2C, H, W). x matters on key evaluations only."""
        k, self.evaluation = self.evaluation, self.evaluation + 1
        self.times = self.times.to(y.device)
        if self.plan.keys[k]:
            self.encode(k, x, t, y)
        if not self.ready:
            self.ready = self.decode(self.plan.group(k, len(y)), y)[::-1]
        return self.ready.pop()

    def encode(self, k: int, x: Tensor, t: Tensor, y: Tensor) -> None:
        """Compute the features of both branches, and what the extrapolation needs of them."""
        state = self.network.encode(x, self.network.condition(t, y), self.plan.split)
        if k == 0:
            check_state(state, len(y))
        parts = list(zip(*(features.split(self.batch_size) for features in state)))
        time, present = self.plan.times[k], self.plan.branches
        for branch, part in enumerate(parts):
            kept = self.computed[branch] if k and branch < present[k - 1] else []  # away, its features have aged
            kept = [entry for entry in kept if entry[0] != time]  # a solver may ask twice at one t: the later x counts
            self.computed[branch] = [(time, part), *kept][: self.plan.order + 1]

    def decode(self, group: range, y: Tensor) -> list[Tensor]:
        """The outputs (R, C or 2C, H, W) of consecutive evaluations, all in one batch."""
        branches = range(self.plan.branches[group.start])
        states = [self.features(branch, self.plan.times[k]) for k in group for branch in branches]
        state = tuple(torch.cat(features) for features in zip(*states))
        t = self.times[group.start : group.stop].repeat_interleave(len(y))
        out = self.network.decode(state, self.network.condition(t, y.repeat(len(group))), self.plan.split)
        return list(out.split(len(y)))

    def features(self, branch: int, t: float) -> State:
        """A branch's features at t, by the polynomial through the computed ones."""
        times, states = zip(*self.computed[branch])
        return tuple(extrapolate(times, values, t) for values in zip(*states))


def check_state(state: object, rows: int) -> None:
    """UserError where a network's encode does not return what the seam asks for."""
    if not (isinstance(state, tuple) and state and all(isinstance(part, Tensor) and len(part) == rows for part in state)):
        raise UserError(f"`reuse`: the network's encode must return a tuple of tensors with the batch ({rows}) as their first "
                        f"dimension; it returned {type(state).__name__}")


def extrapolate(times: tuple[float, ...], values: tuple[Tensor, ...], t: float) -> Tensor:
    """The polynomial through (time, value) pairs at t, by Newton's divided differences; times must differ.

    In fp32 at least, returned in the values' dtype. One value is returned as it is.
    """
    if len(values) == 1:
        return values[0]
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    differences = [value.to(dtype) for value in values]
    result, factor = differences[0], 1.0
    for order in range(1, len(times)):
        differences = [(b - a) / (times[i + order] - times[i]) for i, (a, b) in enumerate(pairwise(differences))]
        factor *= t - times[order - 1]
        result = result + factor * differences[0]
    return result.to(values[0].dtype)


def add_prior_noise(steps: Iterator[dict[str, Tensor]], noise: Tensor, plan: Plan) -> Iterator[dict[str, Tensor]]:
    """A sampler's steps with Faster Diffusion's prior noise, which gives back texture: x_t += prior_noise * x_T for t < 300.

    Added in place before the next step, so never to the finished sample. `noise` is x_T (B, C, H, W).
    """
    upcoming = list(dict.fromkeys(plan.times))[1:]
    for step, t in zip(steps, [*upcoming, None]):
        yield step
        if plan.prior_noise and t is not None and t < PRIOR_NOISE_BELOW:
            step["sample"].add_(noise, alpha=plan.prior_noise)
