"""n-grams of a list of tokens, which BLEU and CIDEr-D count."""

from collections import Counter
from collections.abc import Sequence

LONGEST = 4
"""Tokens of the longest n-grams."""

Ngram = tuple[str, ...]


def count_ngrams(tokens: Sequence[str], longest: int = LONGEST) -> Counter[Ngram]:
    """How often each n-gram of 1 to `longest` tokens occurs."""
    return Counter(
        tuple(tokens[start : start + length])
        for length in range(1, longest + 1)
        for start in range(len(tokens) - length + 1)
    )
