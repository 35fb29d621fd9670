"""The stream of instruction documents: exact sequences, loss weights, the same samples in any packing, resuming."""

import numpy as np
import pytest

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.data.stream.loader import Loader
from megatron_cm3leon.data.stream.samples import DataSource
from megatron_cm3leon.data.stream.stream import Stream, positions_in_samples
from tests.data.corpora import Neighbors, make_pairs, make_vocabulary, write_instructions, write_shards

V = make_vocabulary(text=50, image=20, height=2, width=2, sentinels=8)
EOS, BREAK, EOSS, PAD = V.eos, V.break_id, V.eoss, V.pad
S0, S1, S2 = map(V.sentinel, range(3))
IMAGE = [V.image_start + code for code in (1, 2, 3, 4)]
VQA, ANSWER = [1, 2, 3, 20, 21, 4, BREAK, *IMAGE], [(3, 5)]
MASKED_VQA = [EOS, 1, 2, 3, S0, 4, BREAK, *IMAGE, EOS, S0, 20, 21, EOSS]


def make_stream(sources, packing="query", seq_length=24, neighbors=None, **changes):
    config = Config()
    config.data.packing, config.data.seq_length, config.cm3.probability = packing, seq_length, 0.0
    config.train.global_batch_size, config.retrieval.documents = 4, 1
    for name, value in changes.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return Stream(config, sources, neighbors)


@pytest.fixture(scope="module")
def vqa(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("vqa"), [VQA], V, targets=[ANSWER])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """60 instruction documents of several forms, some without targets."""
    return write_instructions(tmp_path_factory.mktemp("instructions"), 60, V)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("pairs"), make_pairs(40, V), V)


def test_a_hand_written_question_becomes_exactly_these_tokens(vqa):
    sequence = make_stream(vqa).sequence(0)
    assert sequence.tokens.tolist() == [*MASKED_VQA, *[PAD] * 9]
    assert sequence.weights.tolist() == [1.0] * 16 + [0.0] * 9
    assert np.flatnonzero(sequence.targets).tolist() == [13, 14] and sequence.trimmed == 0
    by_target = make_stream(vqa, sft__loss="target").sequence(0)
    assert by_target.tokens.tolist() == sequence.tokens.tolist()
    assert np.flatnonzero(by_target.weights).tolist() == [13, 14, 15]  # the answer, and <eoss>
    plain = make_stream(vqa, sft__loss="target", sft__mask_targets=0.0).sequence(0)
    assert plain.tokens.tolist() == [EOS, *VQA, EOS, *[PAD] * 12]  # an image is not moved to the front
    assert np.flatnonzero(plain.weights).tolist() == [4, 5, 6]  # the answer, and the next token of the prompt


def test_an_image_target_ends_with_the_sample_and_may_lose_its_condition(tmp_path):
    corpus = write_shards(tmp_path, [[1, 2, BREAK, *IMAGE]], V, targets=[[(3, 7)]])
    settings = {"data__image_first_probability": 1.0, "sft__loss": "target"}
    sequence = make_stream(corpus, seq_length=10, **settings).sequence(0)
    assert sequence.tokens.tolist() == [EOS, 1, 2, BREAK, *IMAGE, EOS, PAD, PAD]
    assert np.flatnonzero(sequence.weights).tolist() == [4, 5, 6, 7, 8]
    dropped = make_stream(corpus, seq_length=10, **settings, sft__drop_condition_probability=1.0).sequence(0)
    assert dropped.tokens.tolist() == [EOS, S0, BREAK, *IMAGE, EOS, PAD, PAD, PAD]
    assert np.flatnonzero(dropped.weights).tolist() == [3, 4, 5, 6, 7]


def test_samples_are_numbered_and_weighted_in_a_pack(vqa):
    settings = {"seq_length": 40, "data__attention": "sample"}
    pack = make_stream(vqa, "stream", **settings).sequence(0)
    assert pack.tokens.tolist() == (MASKED_VQA * 3)[:41]
    assert pack.samples.tolist() == [0] * 16 + [1] * 16 + [2] * 9
    assert np.flatnonzero(pack.weights == 0).tolist() == [16, 32]  # no sample has a loss on its first </s>
    by_target = make_stream(vqa, "stream", **settings, sft__loss="target").sequence(0)
    assert np.flatnonzero(by_target.weights).tolist() == [13, 14, 15, 29, 30, 31]
    causal = make_stream(vqa, "stream", seq_length=40).sequence(0)
    assert causal.samples is None and causal.weights.min() == 1


def test_retrieved_documents_are_context(tmp_path, vqa):
    corpus = write_shards(tmp_path, [VQA, [5, BREAK, *IMAGE]], V, targets=[ANSWER, []])
    neighbors = Neighbors(np.array([[1], [0]]), corpus)
    stream = make_stream(
        corpus,
        "query",
        40,
        neighbors,
        sft__loss="target",
        retrieval__loss_weight=0.25,
        data__image_first_probability=1.0,
    )
    found = {int(sequence.documents[0]): sequence for sequence in stream.sequences(0, 2)}
    question, pair = found[0], found[1]
    assert question.tokens.tolist() == [EOS, *IMAGE, BREAK, 5, BREAK, *MASKED_VQA[1:], *[PAD] * 18]
    assert question.weights.tolist() == [0, *[0.25] * 7, *[0] * 12, 1, 1, 1, *[0] * 18]
    # The retrieved question keeps its targets and its order; the query is pre-training data.
    assert pair.tokens.tolist() == [EOS, *VQA, BREAK, *IMAGE, BREAK, 5, EOS, *[PAD] * 21]
    assert pair.weights.tolist() == [0, *[0.25] * 12, *[1] * 7, *[0] * 21] and not pair.targets.any()


def test_a_document_that_does_not_fit_loses_its_prompt_first_and_is_counted(tmp_path, vqa):
    sequence = make_stream(vqa, seq_length=13).sequence(0)
    assert sequence.tokens.tolist() == [EOS, 1, S0, 4, BREAK, *IMAGE, EOS, S0, 20, 21, EOSS] and sequence.trimmed == 2
    long = write_shards(tmp_path, [[1, *[20] * 30]], V, targets=[[(1, 31)]])
    for packing in ("query", "documents"):
        sequence = make_stream(long, packing, seq_length=13).sequence(0)
        assert sequence.tokens.tolist() == [EOS, *[20] * 12, EOS] and sequence.trimmed == 19
        [problem] = make_stream(long, packing, seq_length=13).report_problems()
        assert "1 documents of" in problem and "sequence of 14 tokens, such as document 0 (made) with 30" in problem
    assert make_stream(long, "stream", seq_length=13).report_problems() == []


def split_samples(sequence):
    """The tokens, weights and targets of each sample of a pack, without padding."""
    count = int((sequence.samples >= 0).sum())
    starts = np.flatnonzero(np.diff(sequence.samples[:count])) + 1
    columns = (sequence.tokens, sequence.weights, sequence.targets, positions_in_samples(sequence.samples))
    return zip(*(np.split(column[:count], starts) for column in columns), strict=True)


@pytest.mark.parametrize("loss", ["all", "target"])
@pytest.mark.parametrize("retrieval", [False, True])
def test_a_pack_holds_exactly_what_each_sample_alone_holds(corpus, loss, retrieval):
    neighbors = Neighbors(np.arange(60)[::-1, None].copy(), corpus) if retrieval else None
    settings = {"sft__loss": loss, "sft__mask_targets": 0.5, "sft__drop_condition_probability": 0.3}
    settings |= {"data__attention": "sample", "retrieval__loss_weight": 0.5, "seq_length": 80, "neighbors": neighbors}
    alone, packed = {}, {}
    for sequence in make_stream(corpus, "query", **settings).sequences(0, 60):
        [sample] = split_samples(sequence)
        alone[int(sequence.documents[0])] = sample
    stream, number = make_stream(corpus, "documents", **settings), 0
    while len(packed) < 60:
        sequence = stream.sequence(number)
        assert sequence.trimmed == 0 and sequence.epoch == 0
        for document, sample in zip(sequence.documents.tolist(), split_samples(sequence), strict=True):
            packed[document] = sample
        begins = sequence.tokens[1:][np.diff(sequence.samples) > 0]
        assert (begins == EOS).all() and not sequence.weights[1:][np.diff(sequence.samples) > 0].any()
        number += 1
    assert number < 60 / (1.5 if retrieval else 2)
    n_sentinels = 0
    for document, (tokens, weights, targets, positions) in alone.items():
        found = packed[document]
        assert found[0].tolist() == tokens.tolist() and found[3].tolist() == positions.tolist()
        assert found[1][1:].tolist() == weights[1:].tolist() and found[2].tolist() == targets.tolist()
        n_sentinels += V.is_sentinel(tokens).sum()
    assert n_sentinels > 20


@pytest.mark.parametrize("packing", ["query", "stream", "stream_whole_images", "documents"])
def test_any_sequence_of_any_rank_is_the_same(corpus, pairs, packing, monkeypatch):
    monkeypatch.setattr("megatron_cm3leon.data.stream.seek.GROUP", 32)
    settings = {"sft__mask_targets": 0.5, "sft__loss": "target", "seq_length": 40, "cm3__probability": 0.5}
    sources = [DataSource(corpus, weight=2.0), DataSource(pairs)]
    expected = make_stream(sources, packing, **settings).sequences(0, 120)
    for number in (119, 17, 0):  # a new stream, read in random order; 120 sequences are several epochs
        found = make_stream(sources, packing, **settings).sequence(number)
        assert found.tokens.tolist() == expected[number].tokens.tolist()
        assert found.weights.tolist() == expected[number].weights.tolist()
        assert found.targets.tolist() == expected[number].targets.tolist()
    for rank in range(2):
        with Loader(
            make_stream(sources, packing, **settings), rank=rank, size=2, workers=rank, start_batch=20
        ) as loader:
            _, micro_batches = next(loader)
            for number, micro_batch in enumerate(micro_batches, 80 + 2 * rank):
                assert micro_batch.tokens[0].tolist() == expected[number].tokens[:-1].tolist()
                assert micro_batch.loss_weights[0].tolist() == expected[number].weights[1:].tolist()
    cursor = make_stream(sources, packing, **settings).cursor(100)
    resumed = make_stream(sources, packing, **settings)
    resumed.resume(cursor)
    assert resumed.sequence(101).tokens.tolist() == expected[101].tokens.tolist()


@pytest.mark.parametrize("mask", [1.0, 0.5])
def test_stream_packing_counts_the_added_tokens_over_epochs(corpus, mask, monkeypatch):
    """With constant forms complete epochs are skipped by division, otherwise they are counted: the tokens agree."""
    settings = {"sft__mask_targets": mask, "seq_length": 63}
    stream, query = make_stream(corpus, "stream", **settings), make_stream(corpus, "query", **settings)
    tokens = [sequence.tokens[sequence.tokens != PAD] for sequence in query.sequences(0, 180)]
    joined = np.concatenate(tokens)
    assert make_stream(corpus, "stream", **settings).packing.prefix_sums.span_units == (
        sum(map(len, tokens[:60])) if mask == 1 else None
    )
    number = len(joined) // 64 - 1
    assert stream.sequence(number).tokens.tolist() == joined[number * 64 : (number + 1) * 64].tolist()
    assert stream.sequence(number).epoch == 2


@pytest.mark.parametrize(("packing", "least"), [("query", 60), ("documents", 5)])
def test_cm3_masking_numbers_its_spans_after_the_moved_targets_and_cuts_none(corpus, packing, least):
    settings = {"seq_length": 60, "cm3__probability": 1.0, "cm3__mean_spans": 2.0, "cm3__min_spans": 1}
    plain, masked = make_stream(corpus, packing, seq_length=60), make_stream(corpus, packing, **settings)
    moved = 0
    for before, after in zip(plain.sequences(0, 60), masked.sequences(0, 60), strict=True):
        numbers = [token - S0 for token in before.tokens.tolist() if V.is_sentinel(token)]
        added = [token - S0 for token in after.tokens.tolist() if V.is_sentinel(token)]
        first = max(numbers, default=-1) + 1
        assert sorted(number for number in added if number < first) == sorted(numbers)
        for number in set(added) - set(range(first)):
            assert added.count(number) == 2
            moved += 1
        if before.targets.any():
            assert after.trimmed == 0 and after.targets.sum() >= before.targets.sum()
            kept = ~np.isin(after.tokens, [PAD, EOSS]) & ~V.is_sentinel(after.tokens)
            other = ~np.isin(before.tokens, [PAD, EOSS]) & ~V.is_sentinel(before.tokens)
            assert sorted(after.tokens[kept]) == sorted(before.tokens[other])
    assert moved > least


def test_the_identity_has_the_section_only_for_data_with_targets(corpus, pairs):
    base = make_stream(corpus).identity
    changes = [{"sft__loss": "target"}, {"sft__mask_targets": 0.5}, {"sft__drop_condition_probability": 0.1}]
    assert len({base, *(make_stream(corpus, **change).identity for change in changes)}) == 4
    assert len({make_stream(pairs, **change).identity for change in ({}, *changes)}) == 1
    tokens = [make_stream(pairs, **change).sequence(3).tokens.tolist() for change in ({}, *changes)]
    assert tokens == [tokens[0]] * 4 and make_stream(pairs).sequence(3).targets is None
