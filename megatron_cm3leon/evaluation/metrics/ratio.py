"""Ratios of sums over documents or dialogs, whose intervals resample numerator and denominator together."""

import numpy as np


def divide_sums(pairs: np.ndarray) -> float:
    """The sum of the first column over the sum of the second, of [n, 2]."""
    numerator, denominator = pairs.sum(0)
    return float(numerator / denominator)
