"""Near-ties: draws whose result rounding can change.

gumbel-1 and greedy decoding take the token of the largest value (logit / temperature + noise). Logits are rounded
differently on other devices and in batches of other sizes; a token can differ only where the two largest values of its
draw are about as close as that. `decode_batches(..., margins=array)` stores their difference for each draw.
"""

import numpy as np

NEAR_TIE = 1e-4
"""Difference below which a draw counts as a near-tie; fp32 logits of a 350m model differ by about 1e-5."""


def count_near_ties(margins: np.ndarray, threshold: float = NEAR_TIE) -> int:
    """Number of draws with a margin below `threshold`."""
    return int((margins < threshold).sum())


def unexplained_differences(
    ids: np.ndarray, others: np.ndarray, margins: np.ndarray, threshold: float = NEAR_TIE
) -> list[int]:
    """Numbers of the sequences whose first different token was not a near-tie; later tokens follow from the first.

    All arrays are [sequences, length]; `margins` are those of `ids`.
    """
    differs = ids != others
    first = differs.argmax(1)
    close = margins[np.arange(len(ids)), first] < threshold
    return np.flatnonzero(differs.any(1) & ~close).tolist()
