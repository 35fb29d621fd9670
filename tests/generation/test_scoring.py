"""Generator.score and score_tokens against a plain loop over the rows, and their errors."""

import numpy as np
import pytest
import torch

from megatron_cm3leon.generation import scoring
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.generator import Generator
from tests.models import make_tokenizers, save_random_llama


def score_plainly(decoder, prefix, target):
    """Summed log-probability of the target in one forward pass of this row alone."""
    scores = decoder.all_logits(torch.tensor([prefix + target[:-1]]))[0].log_softmax(-1)
    return sum(scores[len(prefix) - 1 + place, token].item() for place, token in enumerate(target))


def continue_greedily(decoder, prefix, count):
    """The `count` most likely ids after a prefix, one forward pass each."""
    ids = list(prefix)
    for _ in range(count):
        ids.append(int(decoder.all_logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prefix) :]


def draw_rows(vocabulary, seed=0):
    """Prefixes and targets of many lengths; the longest row fills the context of 64. Some prefixes are shared."""
    random = np.random.default_rng(seed)
    lengths = [(1, 1), (1, 64), (64, 1), (30, 12), (7, 3), (29, 2), (5, 20)]
    rows = [[random.integers(0, vocabulary.size, length).tolist() for length in pair] for pair in lengths]
    shared = random.integers(0, vocabulary.size, 40).tolist()
    rows += [[shared, random.integers(0, vocabulary.size, length).tolist()] for length in (1, 4, 4, 9, 2)]
    return [list(part) for part in zip(*[rows[number] for number in random.permutation(len(rows))], strict=True)]


@pytest.mark.parametrize("small", [False, True], ids=["default bounds", "smallest bounds"])
@pytest.mark.parametrize("family", ["cm3leon", "llama"])
def test_scores_are_those_of_a_plain_loop(generator, vocabulary, tmp_path, monkeypatch, family, small):
    if family == "llama":
        save_random_llama(tmp_path, vocabulary)
        generator = Generator(Decoder.load(tmp_path), make_tokenizers(["a"] * 10, vocabulary))
    if small:  # several batches, a few logits at a time, two targets of a prefix at a time
        for name, value in (("LOGIT_BYTES", 1000), ("BATCH_TOKENS", 64), ("LARGEST_BATCH", 2)):
            monkeypatch.setattr(scoring, name, value)
    prefixes, targets = draw_rows(vocabulary)
    found = generator.score(prefixes, targets)
    plain = [score_plainly(generator.decoder, *row) for row in zip(prefixes, targets, strict=True)]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-5)


def test_ids_that_greedy_decoding_takes_are_marked(generator, vocabulary):
    decoder, random = generator.decoder, np.random.default_rng(1)
    prefixes = [random.integers(0, vocabulary.size, length).tolist() for length in (5, 9, 40, 40, 40)]
    prefixes[3:] = [prefixes[2]] * 2  # a shared prefix, whose targets are read step by step
    targets = [continue_greedily(decoder, prefix, 6) for prefix in prefixes]
    for row, place in ((1, 5), (3, 2)):
        targets[row][place] = (targets[row][place] + 1) % vocabulary.size
    scored = scoring.score_tokens(decoder, prefixes, targets)
    assert [row.is_greedy for row in scored] == [True, False, True, False, True]
    assert scored[1].most_likely.tolist() == [True] * 5 + [False] and not scored[3].most_likely[2]
    assert [row.total for row in scored] == generator.score(prefixes, targets).tolist()
    assert all(len(row.log_probabilities) == len(row.most_likely) == 6 for row in scored)


def test_a_shared_prefix_is_read_once(generator, vocabulary, monkeypatch):
    read = []
    start = Decoder.start
    monkeypatch.setattr(Decoder, "start", lambda self, given, room: read.append(len(given)) or start(self, given, room))
    prefix = list(range(20))
    generator.score([prefix] * 3, [[1], [2, 3], [1, 2, 3, 4]])
    generator.score([prefix, prefix], [[1] * 20, [2]])  # a target as long as its prefix is read in one pass
    assert read == [3]


def test_memory_for_logits_is_bounded(generator, vocabulary, monkeypatch):
    rows = []
    logits = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, state: rows.append(len(state)) or logits(self, state))
    monkeypatch.setattr(scoring, "LOGIT_BYTES", scoring.ID_BYTES * vocabulary.size * 5)
    generator.score([[1, 2], [3]], [[4] * 30, [5] * 11])
    assert max(rows) == 5 and sum(rows) == 41


@pytest.mark.parametrize(
    ("prefixes", "targets", "message"),
    [
        ([[1], [2]], [[1]], "there are 2 prefixes for 1 targets; give one for each"),
        ([[1], []], [[1], [1]], "prefix 1 is empty; begin it with </s>"),
        ([[1], [1]], [[1], []], "target 1 is empty; give at least one id"),
        ([[1]], [[36]], "target 0 has the id 36; the model's ids are 0 to 35"),
        ([[-1, 3]], [[3]], "prefix 0 has the id -1; the model's ids are 0 to 35"),
        ([[1.5]], [[3]], "prefix 0 must be a list of ids; encode texts"),
        (["abc"], [[3]], "prefix 0 must be a list of ids; encode texts"),
        ([1], [2], "prefix 0 must be a list of ids"),
        ([[1] * 60], [[1] * 6], r"prefix 0 \(60 tokens\) and its target \(6\) need 65 positions; .* context has 64"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(generator, prefixes, targets, message):
    with pytest.raises(ValueError, match=message):
        generator.score(prefixes, targets)


def test_no_rows_have_no_scores(generator):
    assert generator.score([], []).shape == (0,)
