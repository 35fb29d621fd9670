"""Fréchet distance and maximum mean discrepancy of features, with bootstrap standard errors over images.

A percentile interval would be wrong here: a resampled set has fewer distinct images, and these distances grow when
there are fewer images, so that all resamples may lie above the value itself. The interval is therefore the value and
1.96 standard deviations of the resamples on both sides. The reference is held fixed: it is the same for all models that
are compared. The bias of a small number of images is not part of the interval.

Legend: X features of generated images [n, d], Y of the reference [m, d].
"""

from collections.abc import Callable

import numpy as np

from megatron_cm3leon.evaluation.metrics.statistics import BLOCK, Statistics
from megatron_cm3leon.evaluation.result import Figure

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
KERNEL_BLOCK = 1024
"""Rows of features of a block of a kernel matrix."""
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
"""Of the RBF kernel, and the factor that CMMD is reported with (Jayasumana et al. 2401.09603)."""
INTERVAL = (
    "value +- 1.96 standard deviations over {resamples} bootstrap resamples of the images' features, reference fixed"
)


class FrechetDistance:
    """Distance to a reference: |mean difference|^2 + tr(A) + tr(B) - 2 tr((AB)^1/2), in float64 (Heusel 1706.08500).

    The last trace is the sum of the square roots of the eigenvalues of a symmetric matrix, so that there are no complex
    numbers and no NaN: of X B X^T / (n - 1) with X centered, [n, n], if there are at most as many images as features,
    else of B^1/2 A B^1/2, [d, d].
    """

    def __init__(self, reference: Statistics) -> None:
        self.reference = reference
        self.trace = float(np.trace(reference.covariance))
        self._root: np.ndarray | None = None

    @property
    def root(self) -> np.ndarray:
        """B^1/2 [d, d]; eigenvalues below 0, which rounding makes, count as 0."""
        if self._root is None:
            values, vectors = np.linalg.eigh(self.reference.covariance)
            self._root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
        return self._root

    def measure(self, features: np.ndarray, resamples: int, seed: int) -> Figure:
        """The distance of images X and its interval."""
        n = len(features)
        value, found = self.resample(features, resamples, seed)
        return make_figure(value, found, n, minimum=0)

    def resample(self, features: np.ndarray, resamples: int, seed: int) -> tuple[float, np.ndarray]:
        """The distance of images X, and of sets of images drawn from them with replacement: float64 [resamples].

        The same number of images, of resamples and seed draw the same images: the differences between two such arrays
        are those of a paired bootstrap.
        """
        n, width = features.shape
        gram = self._compute_gram(features) if n <= width else None
        value = self._measure_counts(features, np.ones(n), gram)
        random = np.random.default_rng((seed, 0))
        found = [
            self._measure_counts(features, np.bincount(random.integers(0, n, n), minlength=n), gram)
            for _ in range(resamples)
        ]
        return value, np.array(found)

    def _compute_gram(self, features: np.ndarray) -> np.ndarray:
        """X B X^T [n, n]; X is centered, which keeps its digits."""
        centered = features - features.mean(axis=0, dtype=np.float64)
        return centered @ self.reference.covariance @ centered.T

    def _measure_counts(self, features: np.ndarray, counts: np.ndarray, gram: np.ndarray | None) -> float:
        """The distance of images that occur `counts` times each."""
        n, chosen = len(features), np.flatnonzero(counts)
        weights = counts[chosen].astype(np.float64)
        mean = np.zeros(features.shape[1])
        for start in range(0, len(chosen), BLOCK):
            mean += weights[start : start + BLOCK] @ features[chosen[start : start + BLOCK]].astype(np.float64) / n
        variance, products = 0.0, np.zeros_like(self.reference.covariance) if gram is None else None
        for start in range(0, len(chosen), BLOCK):
            centered = features[chosen[start : start + BLOCK]] - mean
            centered *= np.sqrt(weights[start : start + BLOCK] / (n - 1))[:, None]
            variance += float((centered**2).sum())
            if products is not None:
                products += centered.T @ centered
        if products is not None:
            symmetric = self.root @ products @ self.root
        else:
            assert gram is not None
            symmetric = _center(gram[np.ix_(chosen, chosen)], weights, n)
        difference = mean - self.reference.mean
        return float(difference @ difference + variance + self.trace - 2 * _sum_roots(symmetric))


def _center(gram: np.ndarray, weights: np.ndarray, n: int) -> np.ndarray:
    """The Gram matrix of images that occur `weights` times, n in all, after their mean is subtracted, over n - 1."""
    rows = gram @ weights / n
    centered = gram - rows[:, None] - rows[None] + weights @ rows / n
    scale = np.sqrt(weights / (n - 1))
    return centered * scale[:, None] * scale[None]


def _sum_roots(symmetric: np.ndarray) -> float:
    """Sum of the square roots of the eigenvalues."""
    return float(np.sqrt(np.linalg.eigvalsh((symmetric + symmetric.T) / 2).clip(0)).sum())


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """KID's kernel, (x y / d + 1)^3 (Binkowski et al. 1801.01401)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """CMMD's kernel, exp(-|x - y|^2 / (2 sigma^2)) with sigma 10."""
    squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None] - 2 * x @ y.T
    return np.exp(-squares / (2 * CMMD_SIGMA**2))


def mean_kernel(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> np.ndarray:
    """Mean over Y of the kernel with each row of X, [n], in blocks."""
    found = np.zeros(len(x))
    for row in range(0, len(x), KERNEL_BLOCK):
        block = x[row : row + KERNEL_BLOCK].astype(np.float64)
        for column in range(0, len(y), KERNEL_BLOCK):
            values = kernel(block, y[column : column + KERNEL_BLOCK].astype(np.float64))
            found[row : row + KERNEL_BLOCK] += values.sum(axis=1)
    return found / len(y)


def compute_cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """CMMD of unit vectors as its authors compute it: 1000 x squared MMD, pairs of an image with itself included."""
    within = mean_kernel(x, x, gaussian_kernel).mean() + mean_kernel(y, y, gaussian_kernel).mean()
    return float(CMMD_SCALE * (within - 2 * mean_kernel(x, y, gaussian_kernel).mean()))


def resample_discrepancy(x: np.ndarray, y: np.ndarray, kernel: Kernel, resamples: int, seed: int) -> np.ndarray:
    """Squared MMDs [resamples] of images X drawn with replacement, up to a constant of the fixed reference.

    Pairs of an image with itself do not count, also if it was drawn twice; a resample of one image alone, which has no
    pairs, is drawn again. Fewer than 3 images have no resamples: two images form one pair only.
    """
    n = len(x)
    if not resamples or n < 3:
        return np.zeros(0)
    random = np.random.default_rng((seed, 1))
    counts = np.stack([_draw_counts(random, n) for _ in range(resamples)], 1).astype(np.float64)
    within = np.zeros(resamples)
    for row in range(0, n, KERNEL_BLOCK):
        block, rows = x[row : row + KERNEL_BLOCK].astype(np.float64), counts[row : row + KERNEL_BLOCK]
        for column in range(0, n, KERNEL_BLOCK):
            values = kernel(block, x[column : column + KERNEL_BLOCK].astype(np.float64))
            if column == row:
                np.fill_diagonal(values, 0)
            within += (rows * (values @ counts[column : column + KERNEL_BLOCK])).sum(axis=0)
    pairs = n**2 - (counts**2).sum(axis=0)
    return within / pairs - 2 * mean_kernel(x, y, kernel) @ counts / n


def _draw_counts(random: np.random.Generator, n: int) -> np.ndarray:
    """How often each of n images occurs among n that are drawn with replacement, two different ones at least."""
    while True:
        counts = np.bincount(random.integers(0, n, n), minlength=n)
        if counts.max() < n:
            return counts


def make_figure(value: float, resampled: np.ndarray, n: int, unit: str = "", minimum: float = -np.inf) -> Figure:
    """The value with 1.96 standard deviations of `resampled` on both sides; without resamples no interval."""
    if len(resampled) < 2:
        return Figure(value, n=n, unit=unit)
    error = 1.96 * float(np.std(resampled, ddof=1))
    return Figure(value, max(minimum, value - error), value + error, n, unit)
