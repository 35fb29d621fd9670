"""ROUGE-L of captions, equal to pycocoevalcap's: Lin 2004, with beta = 1.2 and the best precision and recall.

Precision and recall are maximized over the references separately, so they may come from two of them.
"""

from collections.abc import Sequence

BETA = 1.2
"""Weight of recall against precision."""


def compute_rouge(caption: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L of one caption's tokens, 0 to 1."""
    # As in pycocoevalcap, a caption without tokens is one empty token: it matches a reference without tokens.
    caption = caption or [""]
    references = [reference or [""] for reference in references]
    lengths = [find_longest_subsequence(reference, caption) for reference in references]
    precision = max(length / len(caption) for length in lengths)
    recall = max(length / len(reference) for length, reference in zip(lengths, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def find_longest_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for token in left:
        diagonal = 0
        for position, other in enumerate(right, 1):
            above = row[position]
            row[position] = diagonal + 1 if token == other else max(above, row[position - 1])
            diagonal = above
    return row[-1]
