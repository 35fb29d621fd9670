"""Character and word error rates of text that was read back: edits per character, or word, of the expected text."""

import unicodedata
from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

from megatron_cm3leon.evaluation.result import Figure, bootstrap

CASES = ("keep", "ignore")


def normalize_text(text: str, case: str = "keep") -> str:
    """Unicode NFKC with single spaces, in lower case if `case` is "ignore"."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    return text.casefold() if case == "ignore" else text


def count_edits(expected: str, found: str) -> tuple[int, int, int, int]:
    """(edits of characters, characters, edits of words, words): insertions, deletions and substitutions count 1."""
    words, found_words = expected.split(), found.split()
    return Levenshtein.distance(expected, found), len(expected), Levenshtein.distance(words, found_words), len(words)


def measure_error_rates(pairs: Sequence[tuple[str, str]], seed: int = 0) -> dict[str, Figure]:
    """Figures of (expected, found) pairs of normalized texts, with intervals over the pairs.

    `character_error_rate` and `word_error_rate` are edits over all pairs per expected character or word, so they can
    exceed 1; `read_exactly` is the share of pairs without an edit. ValueError without pairs, or for an empty
    expected text.
    """
    for number, (expected, _) in enumerate(pairs):
        if not expected:
            raise ValueError(f"the expected text of pair {number} is empty; give the text that the image shows.")
    counts = np.array([count_edits(*pair) for pair in pairs], np.float64).reshape(-1, 4)

    def rate(column: int):
        return lambda rows: float(rows[:, column].sum() / rows[:, column + 1].sum())

    return {
        "character_error_rate": bootstrap(counts, rate(0), seed=seed),
        "word_error_rate": bootstrap(counts, rate(2), seed=seed),
        "read_exactly": bootstrap(counts[:, 0] == 0, seed=seed),
    }
