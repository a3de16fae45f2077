import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

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


def gaussian_of(features):
    return RunningCovariance(features.shape[1]).update(torch.as_tensor(features)).gaussian()


def distance(a, b):
    return frechet_distance(gaussian_of(a), gaussian_of(b))


# --- Fréchet distance ----------------------------------------------------------------------------


def test_frechet_distance_of_covariances_that_commute():
    """The sum of (sd_a - sd_b)^2 along the axes that they share."""
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    mean_a, mean_b, a, b = rng.normal(size=6), rng.normal(size=6), rng.uniform(0, 3, 6), rng.uniform(0, 3, 6)
    a[0] = b[1] = 0
    expected = ((mean_a - mean_b) ** 2).sum() + ((a - b) ** 2).sum()
    got = frechet_distance(*(Gaussian(mean, (axes * sd**2) @ axes.T) for mean, sd in ((mean_a, a), (mean_b, b))))
    assert got == pytest.approx(expected, rel=1e-7)


def test_frechet_distance_equals_the_matrix_square_root():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6) for _ in range(2))
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s_a @ s_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_a + s_b - 2 * root)
    assert distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_sets_of_fewer_samples_than_dimensions():
    """FD(X, X) = 0; FD(X, c X) = (1 - c)^2 (|mu|^2 + tr S); on orthogonal supports nothing is shared."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(20, 100)) + 1
    a[:, 3] = 1
    mean, covariance = a.mean(0), np.cov(a, rowvar=False)
    size = (mean**2).sum() + np.trace(covariance)
    assert distance(a, a) == pytest.approx(0, abs=1e-12 * size)
    assert distance(a, 3 * a) == pytest.approx(4 * size, rel=1e-12)
    assert distance(a, a + 2) == pytest.approx(400, rel=1e-10)
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
    assert gaussian.at(np.array([3, 1])).covariance == pytest.approx(np.cov(x[:, [3, 1]], rowvar=False), rel=1e-9)


# --- Inception Score -----------------------------------------------------------------------------


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
    count = 20
    logits = np.random.default_rng(0).normal(size=(count, 9)) * 3
    expected = adms_inception_score(logits, 7)
    a, b = InceptionScore(), InceptionScore()
    for i, positions in enumerate(np.split(np.arange(count), range(4, count, 4))):  # across the splits' borders
        (a, b)[i % 2].update(positions, torch.from_numpy(logits[positions]).float())
    b.merge(a)
    assert b.value() == pytest.approx(expected, rel=1e-6)


def test_inception_score_of_certain_and_of_equal_predictions():
    """The number of classes, and 1; a probability that underflows counts nothing."""
    certain, equal = InceptionScore(), InceptionScore()
    certain.update(np.arange(12), torch.eye(4).repeat(3, 1) * 2000)
    equal.update(np.arange(12), torch.zeros(12, 4))
    assert certain.value() == pytest.approx(4)
    assert equal.value() == pytest.approx(1)


# --- precision and recall ------------------------------------------------------------------------


def by_definition(real, fake):
    """Precision and recall, each pair of images by itself."""
    def share_near(points, centres):
        near = 0
        for p in points:
            for i, c in enumerate(centres):
                third = sorted(((c - o) ** 2).sum() for j, o in enumerate(centres) if j != i)[2]
                if ((p - c) ** 2).sum() <= third:
                    near += 1
                    break
        return near / len(points)
    return share_near(fake, real), share_near(real, fake)


@pytest.mark.parametrize("precision", ["adm", "fp32"])
def test_precision_and_recall_by_definition_with_ties(monkeypatch, precision):
    """Small integers: distances are exact, many of them equal. Blocks do not divide the sets."""
    monkeypatch.setattr(metrics, "BLOCK", 7)
    rng = np.random.default_rng(0)
    real, fake = rng.integers(0, 6, (31, 3)), rng.integers(2, 9, (23, 3))
    expected = by_definition(real, fake)
    assert min(expected) > 0
    assert max(expected) < 1
    assert precision_and_recall(*(torch.tensor(x, dtype=torch.float32) for x in (real, fake)), precision) == expected


def test_precision_and_recall_are_torch_fidelitys():
    torch.manual_seed(0)
    real, fake = torch.randn(300, 6), torch.randn(200, 6) * 0.7 + 0.4
    theirs = prc_features_to_metric(fake, real, prc_neighborhood=3, prc_batch_size=128, save_cpu_ram=False, verbose=False)
    own = precision_and_recall(real, fake, "fp32")
    assert own == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert abs(own[0] - own[1]) > 0.1


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
    exact = ((a[8:, None].astype(np.float64) - b) ** 2).sum(axis=2)
    assert found[8] == pytest.approx(exact, rel=1e-5)
    assert np.abs(found[0].numpy() - ((a[:8, None] - b) ** 2).sum(axis=2)).max() > 1e-3


def test_fewer_than_four_images_have_no_third_neighbour():
    with pytest.raises(ValueError, match="at least 4"):
        precision_and_recall(torch.randn(9, 2), torch.randn(3, 2))


# --- the nearest image ---------------------------------------------------------------------------


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
