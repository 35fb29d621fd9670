"""Mixture: the source of each sample of the stream, with exact shares at every step.

The weights are integers w_1 .. w_S (0.7, 0.2, 0.1 become 7, 2, 1). The sources alternate in a cycle of w_1 + .. + w_S
samples: after any number of samples, the count of each source differs from its share by less than one sample
(Tijdeman's chairman assignment: of the sources that are allowed to be next, the one with the earliest deadline).
"""

import math
from fractions import Fraction

import numpy as np

MAX_CYCLE = 1 << 16


def compute_integer_weights(weights: list[float]) -> list[int]:
    """The smallest integers in the ratio of the weights, read as decimals; ValueError if they are too large."""
    parts = [Fraction(str(weight)) for weight in weights]
    unit = math.lcm(*(part.denominator for part in parts))
    integers = [int(part * unit) for part in parts]
    divisor = math.gcd(*integers)
    integers = [number // divisor for number in integers]
    if sum(integers) > MAX_CYCLE:
        raise ValueError(
            f"the weights of data.sources ({', '.join(f'{weight:g}' for weight in weights)}) repeat only after "
            f"{sum(integers)} samples; at most {MAX_CYCLE} are supported: write them with fewer digits."
        )
    return integers


def build_cycle(weights: list[int]) -> np.ndarray:
    """Source of each sample of one cycle, int64 [sum(weights)]."""
    sources, total = len(weights), sum(weights)
    if sources == 1:
        return np.zeros(total, np.int64)
    # In units of 1 / (total * slack): a source may be next if its share exceeds its count by 1 / slack or more.
    slack = 2 * sources - 2
    counts, cycle = [0] * sources, np.empty(total, np.int64)
    for step in range(1, total + 1):
        ahead = [(weight * step - count * total) * slack for weight, count in zip(weights, counts, strict=True)]
        allowed = [source for source in range(sources) if ahead[source] >= total]
        limit = (slack - 1) * total
        chosen = min(allowed, key=lambda source: Fraction(limit - ahead[source], weights[source]))
        counts[chosen] += 1
        cycle[step - 1] = chosen
    assert counts == weights, f"{counts} samples per cycle instead of {weights}"
    return cycle


class Mixture:
    """Source of any sample, and the number of samples of that source before it."""

    def __init__(self, weights: list[float]) -> None:
        self.weights = compute_integer_weights(weights)
        self.cycle = build_cycle(self.weights)
        self.length = len(self.cycle)
        marks = self.cycle[:, None] == np.arange(len(self.weights))
        self.before = (np.cumsum(marks, 0) - marks)[np.arange(self.length), self.cycle]

    def split(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of samples `numbers` (int64), and the number of each within its source; both int64."""
        cycles, positions = np.divmod(numbers, self.length)
        sources = self.cycle[positions]
        return sources, cycles * np.array(self.weights)[sources] + self.before[positions]
