"""BLEU of captions, equal to pycocoevalcap's: Papineni et al. 2002, with the closest reference length.

BLEU is not a mean over captions: matches and lengths are summed over all of them first. `count_matches` gives one row
of counts per caption, `compute_bleu` the score of their sum, which a bootstrap resamples row by row.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from megatron_cm3leon.evaluation.metrics.ngrams import LONGEST, count_ngrams

# pycocoevalcap's constants, which keep the quotients defined; without them its scores are not reproduced.
_SMALL, _TINY = 1e-9, 1e-15


def count_matches(caption: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Counts of one caption's tokens, float64 [2 + 2 * 4]: length, reference length, matches and n-grams for n = 1..4.

    An n-gram matches at most as often as it occurs in one of the references. The reference length is the closest one to
    the caption's, the shorter of two equally close ones.
    """
    limits: Counter = Counter()
    for reference in references:
        limits |= count_ngrams(reference)  # the largest count of each n-gram
    matches = np.zeros(LONGEST)
    for ngram, count in count_ngrams(caption).items():
        matches[len(ngram) - 1] += min(count, limits[ngram])
    closest = min((abs(len(reference) - len(caption)), len(reference)) for reference in references)[1]
    ngrams = np.maximum(0, len(caption) - np.arange(LONGEST))
    return np.concatenate([[len(caption), closest], matches, ngrams])


def compute_bleu(counts: np.ndarray, n: int = LONGEST) -> float:
    """Corpus BLEU-n, 0 to 1, of the rows of `count_matches` [captions, 10]."""
    length, reference_length, *rest = counts.sum(0)
    matches, ngrams = np.array(rest[:n]), np.array(rest[LONGEST : LONGEST + n])
    score = float(np.prod((matches + _TINY) / (ngrams + _SMALL)) ** (1 / n))
    ratio = (length + _TINY) / (reference_length + _SMALL)
    return score * float(np.exp(1 - 1 / ratio)) if ratio < 1 else score
