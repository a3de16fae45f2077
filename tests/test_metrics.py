import numpy as np
import pytest
import torch

from evaluation import metrics
from evaluation.metrics import (
    Gaussian,
    InceptionScore,
    Nearest,
    RunningCovariance,
    distance_blocks,
    frechet_distance,
    precision_and_recall,
)

# --- Fréchet distance (its oracle: test_figures.py) ------------------------------------------------


def distance(*sets):
    return frechet_distance(*(RunningCovariance(x.shape[1]).update(torch.as_tensor(x)).gaussian() for x in sets))


def test_frechet_distance_of_covariances_that_commute():
    """The sum of (sd_a - sd_b)^2 along the axes that they share."""
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    mean_a, mean_b, a, b = rng.normal(size=6), rng.normal(size=6), rng.uniform(0, 3, 6), rng.uniform(0, 3, 6)
    a[0] = b[1] = 0
    expected = ((mean_a - mean_b) ** 2).sum() + ((a - b) ** 2).sum()
    got = frechet_distance(*(Gaussian(mean, (axes * sd**2) @ axes.T) for mean, sd in ((mean_a, a), (mean_b, b))))
    assert got == pytest.approx(expected, rel=1e-7)


def test_sets_of_fewer_samples_than_dimensions():
    """FD(X, X) = 0; FD(X, c X) = (1 - c)^2 (|mu|^2 + tr S); on orthogonal supports nothing is shared."""
    a = np.random.default_rng(0).normal(size=(20, 100)) + 1
    a[:, 3] = 1
    size = (a.mean(0) ** 2).sum() + np.trace(np.cov(a, rowvar=False))
    assert distance(a, a) == pytest.approx(0, abs=1e-12 * size)
    assert distance(a, 3 * a) == pytest.approx(4 * size, rel=1e-12)
    left, right = np.hstack([a, 0 * a]), np.hstack([0 * a, 5 * a])
    assert distance(left, right) == pytest.approx(26 * size, rel=1e-10)


def test_moments_of_batches_are_numpys_whatever_the_batches_and_their_order():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(57, 5)) * [1, 2, 3, 4, 0] + 1e5
    whole, parts = RunningCovariance(5), [RunningCovariance(5), RunningCovariance(5), RunningCovariance(5)]
    for i, batch in enumerate(np.split(x, [3, 4, 4, 20, 21, 40])):  # one of them is empty
        whole.update(torch.from_numpy(batch))
        parts[i % 2].update(torch.from_numpy(batch))
    merged = RunningCovariance(5)
    for part in reversed(parts):  # one of them is empty
        merged.merge(part)
    for moments in (whole, merged):
        gaussian = moments.gaussian()
        assert moments.count == 57
        assert gaussian.mean == pytest.approx(x.mean(axis=0), rel=1e-14)
        assert gaussian.covariance == pytest.approx(np.cov(x, rowvar=False), rel=1e-9, abs=1e-12)


# --- Inception Score -------------------------------------------------------------------------------


def adms_inception_score(logits, split):
    """As its evaluator computes it, over all predictions at once."""
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = []
    for i in range(0, len(p), split):
        part = p[i : i + split]
        kl = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(kl.sum(axis=1).mean()))
    return np.mean(scores)


def test_inception_score_is_adms_with_a_ragged_last_split(monkeypatch):
    monkeypatch.setattr(metrics, "SPLIT", 7)
    logits = np.random.default_rng(0).normal(size=(20, 9)) * 3
    a, b = InceptionScore(), InceptionScore()
    for i, positions in enumerate(np.split(np.arange(20), range(4, 20, 4))):  # across the splits' borders
        (a, b)[i % 2].update(positions, torch.from_numpy(logits[positions]).float())
    b.merge(a)
    assert b.value() == pytest.approx(adms_inception_score(logits, 7), rel=1e-6)


def test_a_probability_that_underflows_counts_nothing():
    certain = InceptionScore()
    certain.update(np.arange(12), torch.eye(4).repeat(3, 1) * 2000)
    assert certain.value() == pytest.approx(4)  # the number of classes


# --- precision and recall (their oracle: test_figures.py) ------------------------------------------


def by_definition(real, fake):
    """Precision and recall, each pair of images by itself."""
    def share_near(points, centres):
        squares = ((centres[:, None] - centres) ** 2).sum(axis=2)
        thirds = [np.sort(np.delete(row, i))[2] for i, row in enumerate(squares)]
        return np.mean([any(((p - c) ** 2).sum() <= third for c, third in zip(centres, thirds)) for p in points])
    return share_near(fake, real), share_near(real, fake)


def test_precision_and_recall_by_definition_with_ties(monkeypatch):
    """Small integers: distances are exact, many of them equal. Blocks do not divide the sets."""
    monkeypatch.setattr(metrics, "BLOCK", 7)
    rng = np.random.default_rng(0)
    real, fake = rng.integers(0, 6, (31, 3)), rng.integers(2, 9, (23, 3))
    expected = by_definition(real, fake)
    assert 0 < min(expected) < max(expected) < 1
    for precision in ("adm", "fp32"):
        assert precision_and_recall(torch.tensor(real).float(), torch.tensor(fake).float(), precision) == expected
    with pytest.raises(ValueError, match="at least 4"):
        precision_and_recall(torch.randn(9, 2), torch.randn(3, 2))


def test_adms_distances_are_rounded_to_fp16_and_fp32_in_a_block_that_overflows(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 8)
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0, 3, (16, 40)).astype(np.float32), rng.uniform(0, 3, (8, 40)).astype(np.float32)
    a[9] = 60  # 40 * 60^2 is more than fp16 has
    found = {rows.start: distances for rows, _, distances in distance_blocks(*map(torch.from_numpy, (a, b)), "adm")}
    half = np.float16
    norms = [np.sum((x.astype(half) ** 2).astype(np.float32), axis=1).astype(half) for x in (a[:8], b)]
    products = (a[:8].astype(half).astype(np.float32) @ b.T.astype(half).astype(np.float32)).astype(half)
    assert np.array_equal(found[0], (norms[0][:, None] - half(2) * products) + norms[1])
    exact = ((a[:, None].astype(np.float64) - b) ** 2).sum(axis=2)
    assert found[8] == pytest.approx(exact[8:], rel=1e-5)
    assert np.abs(found[0].numpy() - exact[:8]).max() > 1e-3


def test_the_nearest_of_all_batches_by_brute_force_and_a_copy_is_at_no_distance():
    torch.manual_seed(0)
    features, shown = torch.randn(10, 30), torch.randn(25, 30)
    features[6] = shown[24]
    nearest = Nearest(features)
    for batch in shown.split(7):
        nearest.update(batch)
    brute = (features[:, None].double() - shown.double()).square().mean(dim=2).sqrt().amin(dim=1)
    assert torch.allclose(nearest.distances(), brute, atol=1e-7)
    assert nearest.distances()[6] < 1e-7
