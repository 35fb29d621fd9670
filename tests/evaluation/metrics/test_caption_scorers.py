"""BLEU, CIDEr-D and ROUGE-L are pycocoevalcap's on the same tokens; hand-computed cases."""

import math

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider as PublishedCider
from pycocoevalcap.rouge.rouge import Rouge

from megatron_cm3leon.evaluation.metrics.bleu import compute_bleu, count_matches
from megatron_cm3leon.evaluation.metrics.cider import Cider
from megatron_cm3leon.evaluation.metrics.rouge import compute_rouge, find_longest_subsequence

WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "circle",
    "square",
    "on",
    "with",
    "small",
    "large",
    "dog",
    "cat",
    "runs",
    "sits",
    "-lrb-",
    "'s",
]


@pytest.fixture(scope="module")
def corpus():
    """120 images: a caption and 1 to 5 references each, of words drawn by Zipf's law; some empty, some identical."""
    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, len(WORDS) + 1)

    def draw(low):
        return [str(word) for word in random.choice(WORDS, random.integers(low, 14), p=weights / weights.sum())]

    references = [[draw(1) for _ in range(random.integers(1, 6))] for _ in range(120)]
    captions = [draw(0) if number % 3 else references[number][0] for number in range(120)]
    captions[1], references[4][0], references[5] = [], [], [[]]
    captions[5] = []
    joined = {number: [" ".join(tokens) for tokens in group] for number, group in enumerate(references)}
    return captions, references, joined, {number: [" ".join(tokens)] for number, tokens in enumerate(captions)}


def test_bleu_equals_pycocoevalcap(corpus):
    scorer = Bleu(4)
    captions, references, joined, joined_captions = corpus
    expected, per_caption = scorer.compute_score(joined, joined_captions, verbose=0)
    counts = np.stack([count_matches(*pair) for pair in zip(captions, references, strict=True)])
    assert 0 < expected[3] < expected[0] < 1
    for n in (1, 2, 3, 4):
        assert compute_bleu(counts, n) == pytest.approx(expected[n - 1], rel=1e-6)
        assert [compute_bleu(row[None], n) for row in counts] == pytest.approx(per_caption[n - 1], abs=1e-6)


def test_cider_equals_pycocoevalcap(corpus):
    scorer = PublishedCider()
    captions, references, joined, joined_captions = corpus
    expected, per_caption = scorer.compute_score(joined, joined_captions)
    cider = Cider(references)
    scores = [cider.score(*pair) for pair in zip(captions, references, strict=True)]
    assert scores == pytest.approx(per_caption.tolist(), abs=1e-6)
    assert np.mean(scores) == pytest.approx(expected, rel=1e-6) and expected > 1


def test_rouge_equals_pycocoevalcap(corpus):
    scorer = Rouge()
    captions, references, joined, joined_captions = corpus
    _, per_caption = scorer.compute_score(joined, joined_captions)
    scores = [compute_rouge(*pair) for pair in zip(captions, references, strict=True)]
    assert scores == pytest.approx(per_caption.tolist(), abs=1e-6) and len(set(scores)) > 50


def test_bleu_by_hand():
    # "the the cat" against "the cat sat" and "a cat": "the" matches once; the closest length is 3.
    counts = count_matches(["the", "the", "cat"], [["the", "cat", "sat"], ["a", "cat"]])
    assert counts.tolist() == [3, 3, 2, 1, 0, 0, 3, 2, 1, 0]
    assert compute_bleu(counts[None], 2) == pytest.approx(math.sqrt(2 / 3 * 1 / 2))
    # Two equally close lengths: the shorter one. One token of three: the penalty is exp(1 - 3).
    assert count_matches(["a"] * 4, [["a"] * 5, ["a"] * 3])[1] == 3
    assert compute_bleu(count_matches(["a"], [["a"] * 3])[None], 1) == pytest.approx(math.exp(-2))


def test_cider_by_hand():
    cider = Cider([[["red", "circle"]], [["blue", "square"]]])
    # Unigrams and bigrams are equal, there are no longer n-grams: 10 * (1 + 1 + 0 + 0) / 4.
    assert cider.score(["red", "circle"], [["red", "circle"]]) == pytest.approx(5)
    assert cider.score(["blue", "square"], [["red", "circle"]]) == 0
    with pytest.raises(ValueError, match="needs the references of at least 2 images, there are 1"):
        Cider([[["red"]]])


def test_rouge_by_hand():
    assert find_longest_subsequence(["a", "b", "c", "d"], ["b", "x", "d", "a"]) == 2
    precision, recall = 2 / 4, 2 / 3
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert compute_rouge(["a", "b", "c", "d"], [["b", "d", "e"]]) == pytest.approx(expected)
    assert compute_rouge(["a"], [["b"]]) == 0
