"""Fréchet distance and MMD: against torch-fidelity, against direct computation, and their standard errors."""

import numpy as np
import pytest
import torch

from megatron_cm3leon.evaluation.metrics.distances import (
    FrechetDistance,
    compute_cmmd,
    gaussian_kernel,
    polynomial_kernel,
    resample_discrepancy,
)
from megatron_cm3leon.evaluation.metrics.encoders import to_unit_vectors
from megatron_cm3leon.evaluation.metrics.fidelity import load_fidelity
from megatron_cm3leon.evaluation.metrics.statistics import compute_statistics


def draw(n, width=24, shift=0.0, seed=0):
    random = np.random.default_rng(seed)
    return (random.normal(size=(n, width)) @ np.diag(np.linspace(0.2, 2, width)) + shift).astype(np.float32)


def measure(x, y):
    return FrechetDistance(compute_statistics(y)).measure(x, 0, 0).value


@pytest.mark.parametrize("n", [300, 10])  # more and fewer images than features
def test_the_frechet_distance_is_torch_fidelitys(n):
    x, y = draw(n, shift=0.3), draw(200, seed=1)
    fid = load_fidelity("metric_fid")
    theirs = fid.fid_statistics_to_metric(
        *(fid.fid_features_to_statistics(torch.from_numpy(each)) for each in (x, y)), verbose=False
    )["frechet_inception_distance"]
    assert measure(x, y) == pytest.approx(theirs, rel=1e-5)


def test_the_frechet_distance_of_two_normal_distributions_is_the_formulas():
    x = np.array([[-1.0], [1.0]], np.float32)  # mean 0, variance 2
    y = np.array([[2.0], [4.0], [6.0]], np.float32)  # mean 4, variance 4
    assert measure(x, y) == pytest.approx(16 + (2 - 2**0.5) ** 2)
    assert measure(y, y) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n", [60, 12])  # covariances, and Gram matrices
def test_the_interval_is_that_of_resampled_images(n):
    x, y = draw(n, shift=0.3), draw(200, seed=1)
    figure = FrechetDistance(compute_statistics(y)).measure(x, 5, seed=3)
    random = np.random.default_rng((3, 0))
    found = [measure(x[random.integers(0, n, n)], y) for _ in range(5)]
    assert figure.high - figure.value == pytest.approx(1.96 * np.std(found, ddof=1), rel=1e-5)


def test_the_interval_is_as_wide_as_the_distances_of_other_samples_differ():
    distance = FrechetDistance(compute_statistics(draw(2000, seed=99)))
    values = [distance.measure(draw(400, shift=0.3, seed=n), 0, 0).value for n in range(60)]
    figure = distance.measure(draw(400, shift=0.3, seed=0), 100, 0)
    assert figure.low < figure.value < figure.high
    assert (figure.high - figure.low) / 2 / 1.96 == pytest.approx(np.std(values), rel=0.35)


def test_cmmd_is_the_formula_and_its_kernel_torch_fidelitys():
    x, y = to_unit_vectors(draw(1500, width=8, shift=0.5)), to_unit_vectors(draw(40, width=8, seed=1))

    def mean(a, b):
        squares = ((a[:, None].astype(np.float64) - b[None]) ** 2).sum(-1)
        return np.exp(-squares / 200).mean()

    assert compute_cmmd(x, y) == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-6)
    kid = load_fidelity("metric_kid")
    assert np.allclose(gaussian_kernel(x[:5], y), kid.kernel_rbf(x[:5], y, kid_kernel_rbf_sigma=10))
    assert np.allclose(polynomial_kernel(x[:5], y), kid.kernel_poly(x[:5], y))


def test_resampled_discrepancies_are_those_of_the_resampled_images():
    x, y = draw(30, shift=0.3), draw(50, seed=1)
    found = resample_discrepancy(x, y, polynomial_kernel, 4, seed=3)
    random = np.random.default_rng((3, 1))
    for value in found:
        chosen = random.integers(0, 30, 30)
        pairs = polynomial_kernel(x.astype(np.float64), x.astype(np.float64))[np.ix_(chosen, chosen)]
        others = chosen[:, None] != chosen[None]
        expected = pairs[others].mean() - 2 * polynomial_kernel(x[chosen].astype(np.float64), y).mean()
        assert value == pytest.approx(expected, rel=1e-6)


def test_resamples_of_few_images_have_pairs():
    x, y = draw(3, shift=0.3), draw(5, seed=1)
    kernel = polynomial_kernel(x.astype(np.float64), x.astype(np.float64))
    within = [kernel[i, j] for i, j in ((0, 1), (0, 2), (1, 2))]
    # A third of the draws are 2 images, whose pairs are of these two; one image alone is one draw in nine.
    found = resample_discrepancy(x, y, lambda a, b: polynomial_kernel(a, b) * (len(a) == len(b)), 200, seed=0)
    assert min(within) - 1e-9 <= found.min() and found.max() <= max(within) + 1e-9 and found.std() > 0
    assert not len(resample_discrepancy(x[:2], y, polynomial_kernel, 200, seed=0))


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 images, but there is 1"):
        compute_statistics(draw(1))
