"""Mixture: which source each sample of the stream is of, exact to one sample at every step.

The weights are whole numbers w_1 .. w_S (0.7, 0.2, 0.1 become 7, 2, 1). The sources follow one another in a cycle of
w_1 + .. + w_S samples: after any number of samples, each source has had its share to less than one sample (Tijdeman's
chairman assignment: among the sources that may go, the one whose time runs out first).
"""

import math
from fractions import Fraction

import numpy as np

LONGEST_CYCLE = 1 << 16


def whole_weights(weights: list[float]) -> list[int]:
    """The smallest whole numbers in the ratio of the weights, read as decimals; ValueError where they are too large."""
    parts = [Fraction(str(weight)) for weight in weights]
    unit = math.lcm(*(part.denominator for part in parts))
    whole = [int(part * unit) for part in parts]
    divisor = math.gcd(*whole)
    whole = [number // divisor for number in whole]
    if sum(whole) > LONGEST_CYCLE:
        raise ValueError(
            f"the weights of data.sources ({', '.join(f'{weight:g}' for weight in weights)}) repeat only after "
            f"{sum(whole)} samples; at most {LONGEST_CYCLE} are supported: write them with fewer digits."
        )
    return whole


def build_cycle(weights: list[int]) -> np.ndarray:
    """Source of each sample of one cycle, int64 [sum(weights)]."""
    sources, total = len(weights), sum(weights)
    if sources == 1:
        return np.zeros(total, np.int64)
    # In units of 1 / (total * slack): a source may go when its share is ahead of its count by 1 / slack or more.
    slack = 2 * sources - 2
    counts, cycle = [0] * sources, np.empty(total, np.int64)
    for step in range(1, total + 1):
        ahead = [(weight * step - count * total) * slack for weight, count in zip(weights, counts, strict=True)]
        allowed = [source for source in range(sources) if ahead[source] >= total]
        limit = (slack - 1) * total
        chosen = min(allowed, key=lambda source: Fraction(limit - ahead[source], weights[source]))
        counts[chosen] += 1
        cycle[step - 1] = chosen
    assert counts == weights, "a cycle gives every source its weight"
    return cycle


class Mixture:
    """Source of any sample, and how many samples that source has had before it."""

    def __init__(self, weights: list[float]) -> None:
        self.weights = whole_weights(weights)
        self.cycle = build_cycle(self.weights)
        self.length = len(self.cycle)
        marks = self.cycle[:, None] == np.arange(len(self.weights))
        self.before = (np.cumsum(marks, 0) - marks)[np.arange(self.length), self.cycle]

    def split(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of samples `numbers`, and the number that each has within its source; both int64."""
        cycles, places = np.divmod(numbers, self.length)
        sources = self.cycle[places]
        return sources, cycles * np.array(self.weights)[sources] + self.before[places]
