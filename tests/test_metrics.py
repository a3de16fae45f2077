import numpy as np
import pytest
import scipy.linalg

from metrics import frechet_distance


def test_frechet_distance_of_gaussians_in_one_dimension():
    """(mu_a - mu_b)^2 + (sd_a - sd_b)^2, with ddof 1."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 2, (50, 1)), rng.normal(-1, 0.5, (70, 1))
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_equals_the_matrix_square_root():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6) for _ in range(2))
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s_a @ s_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_a + s_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_a_set_has_no_distance_from_itself_even_with_constant_and_missing_dimensions():
    a = np.random.default_rng(0).normal(size=(5, 8))  # fewer samples than dimensions
    a[:, 3] = 1
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, a + 2) == pytest.approx(8 * 4)
