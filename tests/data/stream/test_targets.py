"""Instruction documents: exact tokens of every form, what is cut, and the forms that are drawn."""

import numpy as np
import pytest

from megatron_cm3leon.config.schema import SFTConfig
from megatron_cm3leon.data.stream.targets import (
    COMPLETE,
    MASKED,
    PRETRAINING,
    UNCONDITIONAL,
    DocumentTargets,
    FormSampler,
    build_form,
    shorten_prompts,
)
from tests.data.corpora import make_vocabulary, write_shards

V = make_vocabulary(text=50, image=20, height=2, width=2, sentinels=4)
EOS, BREAK, EOSS = V.eos, V.break_id, V.eoss
S0, S1 = V.sentinel(0), V.sentinel(1)
IMAGE = [V.image_start + code for code in (1, 2, 3, 4)]
VQA = [1, 2, 3, 20, 21, 4, BREAK, *IMAGE]  # Question: 1 2 3 Answer: 20 21. | image
DRAW = [1, 2, BREAK, *IMAGE]
TURNS = [1, 20, 2, 21, 22, BREAK, *IMAGE, BREAK, 3, 23]


def build(ids, targets, form, room=99):
    tokens, marks = build_form(np.array(ids, np.uint16), np.array(targets).reshape(-1, 2), form, room, V)
    assert tokens.dtype == np.uint16 and len(tokens) == len(marks)
    return tokens.tolist(), tokens[marks].tolist()


def test_a_masked_answer_moves_behind_the_end_of_the_sample():
    expected = [1, 2, 3, S0, 4, BREAK, *IMAGE, EOS, S0, 20, 21, EOSS]
    assert build(VQA, [(3, 5)], MASKED) == (expected, [20, 21])
    assert build(VQA, [(3, 5)], COMPLETE) == (VQA, [20, 21])


def test_targets_are_numbered_and_the_one_at_the_end_stays():
    targets = [(1, 2), (3, 5), (12, 13)]
    expected = [1, S0, 2, S1, BREAK, *IMAGE, BREAK, 3, 23, EOS, S0, 20, EOSS, S1, 21, 22, EOSS]
    assert build(TURNS, targets, MASKED) == (expected, [23, 20, 21, 22])
    image_first = [*IMAGE, BREAK, 1, 2]
    assert build(image_first, [(0, 4)], MASKED) == ([S0, BREAK, 1, 2, EOS, S0, *IMAGE, EOSS], IMAGE)


def test_the_condition_of_an_image_becomes_one_sentinel():
    assert build(DRAW, [(3, 7)], UNCONDITIONAL) == ([S0, BREAK, *IMAGE], IMAGE)
    edit = [1, BREAK, *IMAGE, BREAK, 2, BREAK, *IMAGE[::-1]]
    assert build(edit, [(9, 13)], UNCONDITIONAL) == ([S0, BREAK, *IMAGE[::-1]], IMAGE[::-1])


@pytest.mark.parametrize(
    ("room", "kept"),
    [
        (10, [1, 2, 20, 21, 4, BREAK, *IMAGE]),  # the longest text of the prompt loses its end
        (9, [1, 20, 21, 4, BREAK, *IMAGE]),
        (8, [20, 21, 4, BREAK, *IMAGE]),  # then the prompt loses its first tokens
        (4, [20, 21, *IMAGE[2:]]),
        (2, [20, 21]),
        (1, [20]),  # a target is cut last
    ],
)
def test_the_prompt_is_cut_before_the_targets(room, kept):
    assert build(VQA, [(3, 5)], COMPLETE, room)[0] == kept


def test_a_masked_document_that_is_cut_keeps_its_sentinels():
    assert build(VQA, [(3, 5)], MASKED, 13)[0] == [1, S0, 4, BREAK, *IMAGE, EOS, S0, 20, 21, EOSS]
    assert build(VQA, [(3, 5)], MASKED, 6)[0] == [S0, EOS, S0, 20, 21, EOSS]
    assert build(VQA, [(3, 5)], MASKED, 5)[0] == [S0, EOS, S0, 20, EOSS]
    assert build(DRAW, [(3, 7)], UNCONDITIONAL, 5)[0] == [BREAK, *IMAGE]


def test_the_longest_target_loses_its_end_first():
    marks = np.array([1, 1, 1, 0, 1, 1], bool)
    ids = np.array([1, 2, 3, BREAK, 4, 5])
    assert ids[shorten_prompts(ids, marks, 4, V)].tolist() == [1, 2, 4, 5]
    assert ids[shorten_prompts(ids, marks, 2, V)].tolist() == [1, 4]
    assert ids[shorten_prompts(ids, marks, 1, V)].tolist() == [1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    documents = [VQA, DRAW, TURNS, [1, 2, 3], [*DRAW[:3], *IMAGE, BREAK, 9], [1, 20, 2, 21, 3, 22, 4, 23, 5, 24, 6]]
    targets = [[(3, 5)], [(3, 7)], [(1, 2), (3, 5), (12, 13)], [], [(3, 7)], [(n, n + 1) for n in range(1, 11, 2)]]
    return write_shards(tmp_path_factory.mktemp("targets"), documents, V, 4, targets)


def test_the_forms_depend_on_the_ranges_alone(corpus):
    found = DocumentTargets.of_corpus(corpus)
    assert found.counts.tolist() == [1, 1, 3, 0, 1, 5] and found.tokens.tolist() == [2, 4, 4, 0, 4, 5]
    assert found.moved.tolist() == [1, 0, 2, 0, 1, 5] and found.condition.tolist() == [0, 3, 0, 0, 3, 0]


def test_lengths_are_those_of_the_built_documents(corpus):
    numbers = np.arange(6)
    for mask, drop in ((1, 0), (0, 0), (1, 1), (0.5, 0.5)):
        sampler = FormSampler(SFTConfig(mask_targets=mask, drop_condition_probability=drop), corpus, 7, "corpus")
        assert sampler.is_constant == (mask in (0, 1))
        for epoch in range(10):
            forms = sampler.draw(epoch, numbers)
            assert forms[3] == PRETRAINING and forms[5] == COMPLETE  # five targets, four sentinels
            lengths = sampler.measure(numbers, forms)
            for number, targets in zip(numbers.tolist(), corpus.targets(numbers), strict=True):
                tokens, _ = build(corpus.read(number), targets, forms[number])
                assert len(tokens) == lengths[number]
    always = FormSampler(SFTConfig(drop_condition_probability=1.0), corpus, 7, "corpus")
    expected = [MASKED, UNCONDITIONAL, MASKED, PRETRAINING, UNCONDITIONAL, COMPLETE]
    assert always.draw(0, numbers).tolist() == expected
    assert always.without_change(np.array([-1, 3, 0])).tolist() == [PRETRAINING, PRETRAINING, COMPLETE]


def test_forms_are_drawn_per_document_and_epoch_with_their_probability(corpus):
    sampler = FormSampler(SFTConfig(mask_targets=0.25, drop_condition_probability=0.5), corpus, 1, "corpus")
    forms = np.stack([sampler.draw(epoch, np.arange(6)) for epoch in range(2000)])
    assert abs((forms[:, 0] == MASKED).mean() - 0.25) < 0.03
    assert abs((forms[:, 1] == UNCONDITIONAL).mean() - 0.5) < 0.035
    assert abs((forms[:, 4] == MASKED).mean() - 0.125) < 0.025
    assert np.array_equal(sampler.draw(3, np.array([4, 0])), forms[3, [4, 0]])
    other = FormSampler(sampler.config, corpus, 1, "corpus 1")
    assert not np.array_equal(np.stack([other.draw(epoch, np.arange(6)) for epoch in range(50)]), forms[:50])


def test_documents_that_do_not_fit_are_counted_and_named(corpus):
    sampler = FormSampler(SFTConfig(), corpus, 1, "corpus")
    [many] = sampler.report_problems(None)
    assert "1 documents of" in many and "4 sentinels, such as document 5 (made) with 5: their targets stay" in many
    _, long = sampler.report_problems(9)
    assert "1 documents of" in long and "longer than a sequence of 9 tokens, such as document 2 (made) with 4" in long
    assert sampler.report_problems(12) == [many]
    assert FormSampler(SFTConfig(mask_targets=0.0), corpus, 1, "corpus").report_problems(8) == []
