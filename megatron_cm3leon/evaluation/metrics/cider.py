"""CIDEr-D of captions, equal to pycocoevalcap's: Vedantam et al. 2015, with n-grams of 1 to 4 tokens and sigma = 6.

The weight of an n-gram depends on the number of images whose references contain it, counted over the whole reference
set: the same caption has another score in another set, and no score in a set of one image, where all weights are 0.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from megatron_cm3leon.evaluation.metrics.ngrams import LONGEST, Ngram, count_ngrams

SIGMA = 6.0
"""Standard deviation, in tokens, of the penalty for captions of another length than the reference."""


class Cider:
    """Scores captions with the document frequencies of a set of references."""

    def __init__(self, references: Sequence[Sequence[Sequence[str]]]) -> None:
        """`references`: tokens of the references of each image; ValueError for fewer than two images."""
        if len(references) < 2:
            raise ValueError(
                f"CIDEr-D needs the references of at least 2 images, there are {len(references)}: an n-gram's weight "
                f"is the logarithm of the number of images over those that contain it."
            )
        self.frequency = Counter(
            ngram for image in references for ngram in {ngram for tokens in image for ngram in count_ngrams(tokens)}
        )
        """Images whose references contain an n-gram."""
        self.log_images = math.log(len(references))

    def score(self, caption: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """CIDEr-D of one caption's tokens, 0 to 10; the corpus score is the mean over the images."""
        weights, norms = self._weigh(caption)
        total = 0.0
        for reference in references:
            others, other_norms = self._weigh(reference)
            # The number of bigrams stands for the length.
            difference = max(0, len(caption) - 1) - max(0, len(reference) - 1)
            penalty = math.exp(-(difference**2) / (2 * SIGMA**2))
            products = np.zeros(LONGEST)
            for ngram, weight in weights.items():
                other = others.get(ngram, 0.0)
                products[len(ngram) - 1] += min(weight, other) * other
            scale = norms * other_norms
            total += penalty * float(np.divide(products, scale, out=products, where=scale != 0).sum())
        return 10 * total / LONGEST / len(references)

    def _weigh(self, tokens: Sequence[str]) -> tuple[dict[Ngram, float], np.ndarray]:
        """tf-idf of each n-gram, and their Euclidean norm per length of n-gram [4]."""
        weights = {
            ngram: count * (self.log_images - math.log(max(1, self.frequency[ngram])))
            for ngram, count in count_ngrams(tokens).items()
        }
        squares = np.zeros(LONGEST)
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        return weights, np.sqrt(squares)
