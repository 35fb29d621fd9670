"""Near-ties: draws that rounding can turn.

gumbel-1 and greedy decoding take the token of the largest value (logit / temperature + noise). Devices, and batches of
other sizes, round logits differently in the last digits; a token can only differ where the two largest values of its
draw are about as close as that. `decode_batches(..., margins=array)` keeps their differences.
"""

import numpy as np

NEAR_TIE = 1e-4
"""Difference below which a draw counts as a near-tie; fp32 logits of a 350m model differ by about 1e-5."""


def count_near_ties(margins: np.ndarray, threshold: float = NEAR_TIE) -> int:
    """How many draws were that close."""
    return int((margins < threshold).sum())


def unexplained_differences(
    ids: np.ndarray, others: np.ndarray, margins: np.ndarray, threshold: float = NEAR_TIE
) -> list[int]:
    """Sequences [n, length] whose first token that differs was not a near-tie; later ones follow from the first."""
    differs = ids != others
    first = differs.argmax(1)
    close = margins[np.arange(len(ids)), first] < threshold
    return np.flatnonzero(differs.any(1) & ~close).tolist()
