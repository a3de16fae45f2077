"""Distances between two sets of images, from their features: ADM's suite, and figures without Inception. No files.

Legend: B images of a batch, N and M images of a set, D width of their features. Features arrive in batches, and their sums
are merged over processes. Only precision and recall need all features at once.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import torch
from torch import Tensor

from runtime import UserError

SPLIT = 5000  # images of one split of the Inception Score
NEIGHBOUR = 3  # a feature's radius is the distance to this neighbour
BLOCK = 10_000  # rows and columns of a block of distances, as in ADM: fp16 or fp32 is chosen per block

@dataclass(frozen=True)
class Gaussian:
    """The Gaussian fitted to a set of features: mean (D,) and covariance (D, D) with ddof 1, float64."""

    mean: np.ndarray
    covariance: np.ndarray

    def at(self, dimensions: np.ndarray) -> "Gaussian":
        """The Gaussian of some dimensions of the features."""
        return Gaussian(self.mean[dimensions], self.covariance[np.ix_(dimensions, dimensions)])

    @cached_property
    def factor(self) -> np.ndarray:
        """F (D, R) with F F^T = covariance, of rank R: Cholesky's, with pivoting. What is below rounding counts as 0.

        A set of N images has a rank of at most N - 1, so the time for a small set does not grow with D^3.
        """
        from scipy.linalg.lapack import dpstrf  # slow to import; scipy comes with scikit-learn

        lower, order, rank, _ = dpstrf(self.covariance, lower=1)
        factor = np.empty((len(lower), rank))
        factor[order - 1] = np.tril(lower)[:, :rank]
        return factor


class RunningCovariance:
    """Mean and scatter of features that arrive in batches: float64, about the running mean (Chan, Golub & LeVeque, 1979).

    The sums are kept on `device`, or on the CPU if that device has no float64 (mps).
    """

    def __init__(self, dimensions: int, device: torch.device | str = "cpu"):
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64, device=self.device)
        self.scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=self.device)

    def update(self, features: Tensor) -> "RunningCovariance":
        """Add a batch (B, D). An empty one changes nothing."""
        x = features.to(self.device).double()
        if len(x):
            mean = x.mean(dim=0)
            self._move(len(x), mean)
            self.scatter.addmm_((x - mean).T, x - mean)
        return self

    def merge(self, other: "RunningCovariance") -> "RunningCovariance":
        """Add the features that `other` has counted."""
        if other.count:
            self._move(other.count, other.mean.to(self.device))
            self.scatter += other.scatter.to(self.device)
        return self

    def _move(self, count: int, mean: Tensor) -> None:
        """Count `count` more samples with that mean (D,), and add the scatter between it and the mean so far."""
        total, delta = self.count + count, mean - self.mean
        self.scatter.addr_(delta, delta, alpha=self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def cpu(self) -> "RunningCovariance":
        """A copy whose sums are on the CPU."""
        return RunningCovariance(len(self.mean)).merge(self)

    def gaussian(self) -> Gaussian:
        """The Gaussian of at least two samples. The sums must be on the CPU."""
        return Gaussian(self.mean.numpy(), self.scatter.numpy() / (self.count - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al., arXiv:1706.08500): FID, on Inception's features.

    With S = F F^T, the trace of the root is the nuclear norm of F_a^T F_b. This needs no matrix square root, gives no
    complex parts, and takes singular covariances without an epsilon.
    """
    root = np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root)


class InceptionScore:
    """exp E[KL(p(y|x) || p(y))], the mean over consecutive splits of SPLIT images (Salimans et al., arXiv:1606.03498).

    As in ADM, images are not shuffled, and a shorter last split counts as much as the others.
    """

    def __init__(self):
        self.splits = defaultdict(float)  # split's number -> (2 + classes,): images, sum of p log p, sums of p

    def update(self, positions: np.ndarray, logits: Tensor) -> None:
        """Add a batch: the positions of its images in their set (B,), and their logits (B, classes)."""
        log_p = logits.double().log_softmax(dim=1)
        p = log_p.exp()
        rows = torch.cat([torch.ones(len(p), 1), (p * log_p).sum(1, keepdim=True), p], dim=1).numpy()
        for split in np.unique(positions // SPLIT):
            self.splits[int(split)] = self.splits[int(split)] + rows[positions // SPLIT == split].sum(axis=0)

    def merge(self, other: "InceptionScore") -> None:
        """Add the images that `other` has counted."""
        for split, sums in other.splits.items():
            self.splits[split] = self.splits[split] + sums

    def value(self) -> float:
        """The mean of the splits' scores."""
        scores = []
        for count, p_log_p, *p in self.splits.values():
            q = np.array(p) / count
            scores.append(np.exp(p_log_p / count - (q * np.log(q, where=q > 0, out=np.zeros_like(q))).sum()))
        return float(np.mean(scores))


def precision_and_recall(real: Tensor, fake: Tensor, precision: str = "adm") -> tuple[float, float]:
    """Precision: the share of fake features (N, D) near a real one. Recall: the share of real ones (M, D) near a fake one.

    The improved ones of Kynkäänniemi et al., arXiv:1904.06991: a feature is near b, one of the other set, if it lies within b's
    radius, which is b's distance to the third neighbour in b's set. `precision` is the arithmetic of the squared distances
    (see `distance_blocks`). Up to 2 GB are in use for a block.

    Raises:
        UserError: a set has fewer than four images, so that no image has a third neighbour.
    """
    if min(len(real), len(fake)) <= NEIGHBOUR:
        raise UserError(f"precision and recall need at least {NEIGHBOUR + 1} images in each set, for a third neighbour")
    real_radii, fake_radii = radii(real, precision), radii(fake, precision)
    real_near = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    fake_near = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    for rows, columns, distances in distance_blocks(real, fake, precision):
        fake_near[columns] |= (distances <= real_radii[rows, None]).any(dim=0)
        real_near[rows] |= (distances <= fake_radii[columns]).any(dim=1)
    return fake_near.sum().item() / len(fake), real_near.sum().item() / len(real)


def radii(features: Tensor, precision: str) -> Tensor:
    """Squared distance of each feature (N, D) to its third neighbour: (N,). The feature itself is not counted."""
    nearest = features.new_full((len(features), NEIGHBOUR + 1), torch.inf)
    for rows, _, distances in distance_blocks(features, features, precision):
        candidates = torch.cat([nearest[rows], distances], dim=1)
        nearest[rows] = candidates.topk(NEIGHBOUR + 1, largest=False).values
    return nearest[:, -1]


def distance_blocks(a: Tensor, b: Tensor, precision: str) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances of a (M, D) from b (N, D), block by block: rows, columns, float32 (len of rows, len of columns).

    "adm" computes a block in fp16, and again in fp32 if it is not all finite. "fp32" computes in fp32. fp16 products and
    squared norms are summed in fp32 and rounded once. A GPU sums products in the same way. How ADM's TensorFlow sums norms,
    in order and precision, depends on TensorFlow and the GPU: this moves a norm by up to two units of fp16.
    """
    for row, column in product(range(0, len(a), BLOCK), range(0, len(b), BLOCK)):
        rows, columns = slice(row, row + BLOCK), slice(column, column + BLOCK)
        distances = None
        if precision == "adm":
            distances = squared_distances(a[rows].half(), b[columns].half())
        if distances is None or not distances.isfinite().all():
            distances = squared_distances(a[rows], b[columns])
        yield rows, columns, distances.float()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """max(|a|^2 - 2 a b + |b|^2, 0): (M, D), (N, D) -> (M, N). Each term is rounded to the features' dtype."""
    def norms(x: Tensor) -> Tensor:
        return x.square().float().sum(dim=1).to(x.dtype)

    products = (a.float() @ b.float().T).to(a.dtype)
    return products.mul_(-2).add_(norms(a)[:, None]).add_(norms(b)).clamp_(min=0)


class Nearest:
    """The distance of each feature (N, D) to the nearest feature of another set, which arrives in batches.

    The distance is the root mean square over D, computed in float64: the distance of a copy is then 0 up to rounding.
    """

    def __init__(self, features: Tensor):
        self.features = features.double()
        self.norms = self.features.square().sum(dim=1)
        self.squares = torch.full_like(self.norms, torch.inf)

    def update(self, others: Tensor) -> None:
        """Add a batch (B, D) of the other set."""
        others = others.double()
        products = torch.addmm(others.square().sum(dim=1), self.features, others.T, alpha=-2)  # |b|^2 - 2 a b, (N, B)
        self.squares = self.squares.minimum((products.amin(dim=1) + self.norms).clamp(min=0))

    def distances(self) -> Tensor:
        """(N,), float64."""
        return (self.squares / self.features.shape[1]).sqrt()
