"""Distances between sets of images, on features (N, D). The mathematics only: no network, no files."""

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of the Gaussians fitted to two sets.

    Heusel et al. (arXiv:1706.08500), covariances with ddof 1. With S = F^T F, the trace of the root is the nuclear norm of
    F_a F_b^T: no matrix square root, no complex parts, and singular covariances need no epsilon.

    Args:
        a, b: features (N_a, D) and (N_b, D), at least two samples each.
    """
    def factor(x: np.ndarray) -> np.ndarray:  # (D, D), F^T F = covariance
        return np.linalg.qr((x - x.mean(axis=0)) / np.sqrt(len(x) - 1), mode="r")

    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    f_a, f_b = factor(a), factor(b)
    root = np.linalg.svd(f_a @ f_b.T, compute_uv=False).sum()
    return float(((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + (f_a**2).sum() + (f_b**2).sum() - 2 * root)
