"""Reuse of features: most blocks of a network run only on key evaluations.

- "encoder" is Faster Diffusion (Li et al., arXiv:2312.09608): the other evaluations reuse the last key evaluation's
  encoder features unchanged, and run the decoder with their own t.
- "forecast" (as TaylorSeer, Liu et al., arXiv:2503.06923): the other evaluations extrapolate the last block's output.

Both are one mechanism. Key evaluations compute the features after `split` blocks. Other evaluations take the value at t of
the polynomial through the last `order` + 1 computed features (order 0 for "encoder"), or through as many as both branches of
guidance have: guidance multiplies the difference of their errors. So these evaluations do not depend on x_t, and consecutive
ones are decoded in one batch.

An evaluation is one call of the model by the sampler: one per step, or two for some solvers. They are counted from 0, the
noisiest. This file uses only the seam of a network: condition, encode, decode (see models.py).

Legend: B batch, R rows of a call: B, or 2B [conditional, unconditional] if guided. t is on the scale 0..1000.
Memory: order + 1 states of R rows, and the decoder's activations of at most max(R, `parallel`) rows. The differences of a
forecast take as much again as the states. A state of DiT-XL/2 at 256 pixels is 1.1 MiB per row.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from runtime import UserError

State = tuple[Tensor, ...]

PRIOR_NOISE_BELOW = 300  # prior noise is added at t below this
DEFAULTS = {  # split None: the network's own; -1: all blocks
    "encoder": {"key_steps": "paper", "split": None, "order": 0, "warm_up": 1},
    "forecast": {"key_steps": "every:4", "split": -1, "order": 2, "warm_up": 3},
}


@dataclass(frozen=True)
class Plan:
    """What each evaluation does in one run of a sampler."""

    times: tuple[float, ...]
    branches: tuple[int, ...]  # 2 for a guided evaluation, else 1
    keys: tuple[bool, ...]
    split: int  # blocks before the seam
    depth: int  # blocks of the network
    order: int
    parallel: int  # most rows to decode at once; one evaluation is never divided
    prior_noise: float
    rule: str

    def __str__(self) -> str:
        numbers = [k for k, key in enumerate(self.keys) if key]
        return (f"the first {self.split} of {self.depth} blocks run on {len(numbers)} of {len(self.keys)} evaluations "
                f"({self.rule}; order {self.order}; prior noise {self.prior_noise}): {' '.join(map(str, numbers))}")

    def block_calls(self) -> int:
        """The blocks computed per image, in both branches together."""
        return sum(n * (self.depth if key else self.depth - self.split) for n, key in zip(self.branches, self.keys))

    def group(self, k: int, rows: int) -> range:
        """The evaluations from k on that one batch can decode: they use the same known features and the same rows."""
        stop, longest = k + 1, max(1, self.parallel // rows)
        while stop < min(len(self.keys), k + longest) and not self.keys[stop] and self.branches[stop] == self.branches[k]:
            stop += 1
        return range(k, stop)


def plan(kind: str, times: Iterable[float], guided: Iterable[bool], depth: int, default_split: int,
         key_steps: str | None = None, split: int | None = None, order: int | None = None, warm_up: int | None = None,
         parallel: int = 64, prior_noise: float = 0.0) -> Plan:
    """Choose the key evaluations. An evaluation where guidance starts again is always a key.

    Args:
        kind: "encoder" or "forecast"; sets the defaults of the arguments below.
        times, guided: t, and whether there is guidance, at each evaluation.
        depth, default_split: the network's number of blocks, and the number before its default seam.
        key_steps: "paper", "every:N", or the numbers of the evaluations, such as "0,3,6".
        split: blocks before the seam, 0..depth.
        order: of the extrapolation.
        warm_up: the number of first evaluations that are all keys, at least `order`.
        parallel: the most rows of consecutive evaluations to decode together; 1 is serial, with the same result.
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
    if not 0 <= prior_noise < math.inf:
        raise UserError(f"`reuse_args`: prior_noise {prior_noise} is not a finite number of at least 0")
    times, branches = tuple(times), tuple(1 + on for on in guided)
    rule = default["key_steps"] if key_steps is None else key_steps
    keys = key_evaluations(rule, len(times))
    comes_back = [before < after for before, after in pairwise((branches[0], *branches))]
    keys = tuple(k < warm_up or keys[k] or comes_back[k] for k in range(len(times)))
    rule = f"paper: all but 1 <= k < {paper_end(len(times))} with k % 10 < 6" if rule == "paper" else rule
    return Plan(times, branches, keys, split, depth, order, parallel, prior_noise, rule)


def key_evaluations(rule: str, count: int) -> list[bool]:
    """For each of `count` evaluations, whether it is a key under a --key-steps rule.

    "paper" is Faster Diffusion's rule for 250 steps, 113 keys: all except 1 <= k < 230 with k % 10 < 6. For other counts
    the cycle of ten stays, and the last 8 % are keys. "every:N": k % N == 0. Otherwise the rule lists the numbers.
    """
    if rule == "paper":
        return [not (1 <= k < paper_end(count) and k % 10 < 6) for k in range(count)]
    every = rule.removeprefix("every:")
    if every != rule and every.isdecimal() and int(every) > 0:
        return [k % int(every) == 0 for k in range(count)]
    words = rule.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise UserError(f"`key_steps` {rule!r} is not understood; allowed: paper, every:N, or numbers such as 0,3,6")
    numbers = set(map(int, words))
    if 0 not in numbers or max(numbers) >= count:
        raise UserError(f"`key_steps` {rule}: the numbers must include 0 and be below {count}, the sampler's evaluations")
    return [k in numbers for k in range(count)]


def paper_end(count: int) -> int:
    return round(0.92 * count)


class Reuse:
    """A network (x, t, y) -> prediction that follows a plan. Create one for each batch; call it once per evaluation."""

    def __init__(self, network, plan: Plan, batch_size: int):
        self.network, self.plan, self.batch_size = network, plan, batch_size
        self.evaluation, self.times = 0, torch.tensor(plan.times)
        self.computed: list[list[tuple[float, State]]] = [[], []]  # per branch: the last order + 1, newest first
        self.ready: list[Tensor] = []  # outputs of later evaluations, the next one last

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (R, C, H, W), t (R,), y (R,) -> (R, C or 2C, H, W). x is used only on key evaluations."""
        k, self.evaluation = self.evaluation, self.evaluation + 1
        self.times = self.times.to(y.device)
        if self.plan.keys[k]:
            self.encode(k, x, t, y)
        if not self.ready:
            self.ready = self.decode(self.plan.group(k, len(y)), y)[::-1]
        return self.ready.pop()

    def encode(self, k: int, x: Tensor, t: Tensor, y: Tensor) -> None:
        """Compute the features of each branch, and keep those that the extrapolation needs."""
        state = self.network.encode(x, self.network.condition(t, y), self.plan.split)
        if k == 0:
            check_state(state, len(y))
        parts = list(zip(*(features.split(self.batch_size) for features in state)))
        time, present = self.plan.times[k], self.plan.branches
        for branch, part in enumerate(parts):
            kept = self.computed[branch] if k and branch < present[k - 1] else []  # a branch that starts again drops old ones
            kept = [entry for entry in kept if entry[0] != time]  # a solver may call twice at one t: the later x replaces
            self.computed[branch] = [(time, part), *kept][: self.plan.order + 1]

    def decode(self, group: range, y: Tensor) -> list[Tensor]:
        """The outputs (R, C or 2C, H, W) of consecutive evaluations, all in one batch."""
        branches = range(self.plan.branches[group.start])
        known = min(len(self.computed[branch]) for branch in branches)
        states = [self.features(branch, known, self.plan.times[k]) for k in group for branch in branches]
        state = tuple(torch.cat(features) for features in zip(*states))
        t = self.times[group.start : group.stop].repeat_interleave(len(y))
        out = self.network.decode(state, self.network.condition(t, y.repeat(len(group))), self.plan.split)
        return list(out.split(len(y)))

    def features(self, branch: int, known: int, t: float) -> State:
        """A branch's features at t, by the polynomial through the `known` last computed ones."""
        times, states = zip(*self.computed[branch][:known])
        return tuple(extrapolate(times, values, t) for values in zip(*states))


def check_state(state: object, rows: int) -> None:
    """Raise UserError if the network's encode does not return what the seam requires."""
    if not (isinstance(state, tuple) and state and all(isinstance(part, Tensor) and len(part) == rows for part in state)):
        raise UserError(f"`reuse`: the network's encode must return a tuple of tensors with the batch ({rows}) as their first "
                        f"dimension; it returned {type(state).__name__}")


def extrapolate(times: tuple[float, ...], values: tuple[Tensor, ...], t: float) -> Tensor:
    """The polynomial through (time, value) pairs at t, by Newton's divided differences; times must differ.

    Computed in at least fp32, returned in the values' dtype. A single value is returned unchanged.
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
    """A sampler's steps with Faster Diffusion's prior noise, which restores texture: x_t += prior_noise * x_T for t < 300.

    It is added in place before the next step, so never to the finished sample. `noise` is x_T (B, C, H, W).
    """
    upcoming = list(dict.fromkeys(plan.times))[1:]
    for step, t in zip(steps, [*upcoming, None]):
        yield step
        if plan.prior_noise and t is not None and t < PRIOR_NOISE_BELOW:
            step["sample"].add_(noise, alpha=plan.prior_noise)
