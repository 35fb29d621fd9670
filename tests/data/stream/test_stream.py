"""The stream is deterministic: any sequence can be computed at any time, and every document occurs once per epoch."""

import pickle

import numpy as np
import pytest

from megatron_cm3leon.config.loading import Config, load_config, save_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.data.stream.samples import order_modalities
from megatron_cm3leon.data.stream.stream import Stream, build_stream, number_samples, positions_in_samples
from tests.data.corpora import make_neighbors, make_pairs, make_vocabulary, write_shards

VOCABULARY = make_vocabulary()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards", make_pairs(130, VOCABULARY), VOCABULARY)


def make_stream(corpus, retrieval=True, packing="query", seq_length=64, **changes):
    config = Config()
    config.data.packing, config.data.seq_length = packing, seq_length
    config.train.global_batch_size = 8
    for name, value in changes.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return Stream(config, corpus, make_neighbors(corpus) if retrieval else None)


def build_sample(stream, epoch, position):
    """A sample built document by document: its tokens, and which of them belong to retrieved documents."""
    documents = stream.samples.choose_documents(np.array([epoch * stream.samples.span + position]))
    tokens, marks = [VOCABULARY.eos], [False]
    pairs = zip(documents.retrieved[0], documents.retrieved_image_first[0], strict=True)
    for number, image_first in pairs:
        if number >= 0:
            ids = np.concatenate(order_modalities(stream.corpus.read(number), image_first, VOCABULARY)).tolist()
            tokens += [*ids, VOCABULARY.break_id]
            marks += [True] * (len(ids) + 1)
    query = stream.corpus.read(documents.queries[0])
    tokens += np.concatenate(order_modalities(query, documents.query_image_first[0], VOCABULARY)).tolist()
    tokens += [VOCABULARY.eos]
    return tokens, marks + [False] * (len(tokens) - len(marks))


def test_a_hand_written_pair_becomes_exactly_these_tokens(tmp_path):
    vocabulary = make_vocabulary(text=10, image=6, height=2, width=2)
    code, brk, eos, pad = vocabulary.image_start, vocabulary.break_id, vocabulary.eos, vocabulary.pad
    pair = [3, 1, 4, brk, code + 5, code + 0, code + 2, code + 2]
    corpus = write_shards(tmp_path, [pair], vocabulary)
    settings = {"retrieval": False, "seq_length": 11, "cm3__probability": 0.0}
    text_first = make_stream(corpus, data__image_first_probability=0.0, **settings).sequence(0)
    assert text_first.tokens.tolist() == [eos, *pair, eos, pad, pad]
    assert text_first.weights.tolist() == [1] * 10 + [0, 0]
    image_first = make_stream(corpus, data__image_first_probability=1.0, **settings).sequence(0)
    assert image_first.tokens.tolist() == [eos, *pair[4:], brk, 3, 1, 4, eos, pad, pad]
    stream = make_stream(corpus, packing="stream", data__image_first_probability=0.0, **settings)
    assert stream.sequence(0).tokens.tolist() == [eos, *pair, eos, eos, 3]
    assert stream.sequence(1).tokens.tolist() == [1, 4, *pair[3:], eos, eos, 3, 1, 4]
    assert stream.sequence(1).epoch == 1


@pytest.mark.parametrize("retrieval", [False, True])
@pytest.mark.parametrize("choice", ["fixed", "uniform"])
def test_stream_packing_neither_skips_nor_repeats_nor_reorders_samples(corpus, retrieval, choice):
    stream = make_stream(
        corpus, retrieval, "stream", cm3__probability=0.0, retrieval__choice=choice, retrieval__loss_weight=0.25
    )
    expected, marks, queries = [], [], []
    for epoch in range(3):
        for position in range(corpus.documents):
            tokens, retrieved = build_sample(stream, epoch, position)
            expected += tokens
            marks += retrieved
        queries.append(
            sorted(
                stream.samples.choose_documents(epoch * corpus.documents + np.arange(corpus.documents)).queries.tolist()
            )
        )
    assert queries == [list(range(corpus.documents))] * 3
    count = len(expected) // 65
    sequences = stream.sequences(0, count)
    assert np.concatenate([sequence.tokens for sequence in sequences]).tolist() == expected[: count * 65]
    weights = np.where(marks, 0.25, 1.0)[: count * 65]
    assert np.concatenate([sequence.weights for sequence in sequences]).tolist() == weights.tolist()
    assert {number for sequence in sequences for number in sequence.documents.tolist()} == set(range(corpus.documents))
    fresh = make_stream(corpus, retrieval, "stream", cm3__probability=0.0, retrieval__choice=choice)
    for number in (count - 1, 3, count // 2, 0):  # a new stream, read in random order
        assert fresh.sequence(number).tokens.tolist() == sequences[number].tokens.tolist()


def test_stream_packing_reaches_any_group_of_the_prefix_table(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_cm3leon.data.stream.seek.GROUP", 8)
    corpus = write_shards(tmp_path, make_pairs(45, VOCABULARY), VOCABULARY)
    sequences = make_stream(corpus, packing="stream").sequences(0, 150)
    for number in (149, 17, 60, 0, 148):
        sequence = make_stream(corpus, packing="stream").sequence(number)
        assert sequence.tokens.tolist() == sequences[number].tokens.tolist()


@pytest.mark.parametrize("packing", ["query", "stream"])
def test_a_distant_sequence_is_computed_without_those_before_it(corpus, packing):
    stream = make_stream(corpus, packing == "query", packing)
    assert stream.sequence(10**12).epoch > 10**9


def test_a_sequence_may_be_longer_than_many_epochs(tmp_path):
    corpus = write_shards(tmp_path, make_pairs(2, VOCABULARY), VOCABULARY)
    sequence = make_stream(corpus, False, "stream", 400, cm3__probability=0.0).sequence(3)
    assert (sequence.tokens == VOCABULARY.eos).sum() > 20


@pytest.mark.parametrize("retrieval", [False, True])
def test_query_packing_keeps_the_first_eos_and_the_end_of_each_sample(corpus, retrieval):
    stream = make_stream(corpus, retrieval, cm3__probability=0.0, retrieval__loss_weight=0.25)
    seen = []
    for number in range(2 * corpus.documents):
        sequence = stream.sequence(number)
        tokens, marks = build_sample(stream, *divmod(number, corpus.documents))
        if len(tokens) > 65:
            tokens, marks = [tokens[0], *tokens[-64:]], [False, *marks[-64:]]
        weights = [0.25 if mark else 1.0 for mark in marks] + [0.0] * (65 - len(tokens))
        assert sequence.tokens.tolist() == tokens + [VOCABULARY.pad] * (65 - len(tokens))
        assert sequence.weights.tolist() == weights
        assert sequence.trimmed == 0
        seen += sequence.documents.tolist()
    assert sorted(seen) == sorted(list(range(corpus.documents)) * 2)
    assert seen[: corpus.documents] != seen[corpus.documents :], "each epoch has its own order"


@pytest.mark.parametrize("packing", ["query", "stream"])
def test_masked_sequences_keep_the_query_image_and_have_sentinels_in_pairs(corpus, packing):
    stream = make_stream(corpus, packing=packing, cm3__mean_spans=2.0, cm3__rotation_probability=0.2)
    masked = 0
    for sequence in stream.sequences(0, 200):
        tokens = sequence.tokens
        for index in range(VOCABULARY.sentinels):
            assert (tokens == VOCABULARY.sentinel(index)).sum() in (0, 2)
        masked += VOCABULARY.sentinel(0) in tokens
        assert (tokens == VOCABULARY.eoss).sum() == (tokens == VOCABULARY.sentinel(0)).sum() / 2 * len(
            [index for index in range(VOCABULARY.sentinels) if VOCABULARY.sentinel(index) in tokens]
        )
        assert ((sequence.weights == 0) == (tokens == VOCABULARY.pad)).all()
        if packing == "query":
            assert tokens[0] == VOCABULARY.eos
            codes = [code for code in corpus.read(int(sequence.documents[0])) if VOCABULARY.is_image(int(code))]
            found = [token for token in tokens.tolist() if VOCABULARY.is_image(token)]
            assert all(found.count(code) >= codes.count(code) for code in codes)
    assert masked > 100


def test_rotation_moves_an_entire_segment_of_the_query(corpus):
    stream = make_stream(corpus, cm3__rotation_probability=1.0, data__image_first_probability=0.0)
    kinds = {"text": 0, "image": 0}
    for sequence in stream.sequences(0, 100):
        tokens = sequence.tokens[sequence.tokens != VOCABULARY.pad].tolist()
        sentinel = VOCABULARY.sentinel(0)
        first, second = [position for position, token in enumerate(tokens) if token == sentinel]
        document = corpus.read(int(sequence.documents[0])).tolist()
        split = document.index(VOCABULARY.break_id)
        moved = tokens[second + 1 : -1]
        assert tokens[-1] == VOCABULARY.eoss and tokens[second - 1] == VOCABULARY.eos
        if moved == document[:split]:
            kinds["text"] += 1
            assert tokens[first : second - 1] == [sentinel, *document[split:]]
        else:
            kinds["image"] += 1
            assert moved == document[split + 1 :]
            assert tokens[first - split - 1 : second] == [*document[: split + 1], sentinel, VOCABULARY.eos]
    assert min(kinds.values()) > 25


def test_masked_sequences_without_documents_are_prompts_without_retrieval(corpus):
    plain = make_stream(corpus, cm3__probability=0.5)
    dropped = make_stream(corpus, cm3__probability=0.5, cm3__drop_documents_probability=0.5)
    n_dropped = 0
    for number in range(100):
        expected, found = plain.sequence(number), dropped.sequence(number)
        if (found.tokens == expected.tokens).all():
            assert found.retrieved.tolist() == expected.retrieved.tolist()
            continue
        n_dropped += 1
        tokens = found.tokens[found.weights > 0]
        query = corpus.read(int(found.documents[0]))
        assert len(found.retrieved) == 0 < len(expected.retrieved) and found.documents == expected.documents
        kept = tokens[~np.isin(tokens, [VOCABULARY.eos, VOCABULARY.eoss, *map(VOCABULARY.sentinel, range(16))])]
        assert sorted(kept.tolist()) == sorted(query.tolist()) and tokens[0] == VOCABULARY.eos
    assert 5 < n_dropped < 35


def test_a_caption_too_long_for_the_sequence_is_trimmed_and_counted(tmp_path):
    text, image = list(range(90)), list(range(VOCABULARY.image_start, VOCABULARY.image_start + 16))
    corpus = write_shards(tmp_path, [[*text, VOCABULARY.break_id, *image]], VOCABULARY)
    settings = {"retrieval": False, "seq_length": 40}
    sequence = make_stream(corpus, data__image_first_probability=0.0, cm3__probability=0.0, **settings).sequence(0)
    expected = [VOCABULARY.eos, *text[:22], VOCABULARY.break_id, *image, VOCABULARY.eos]
    assert sequence.tokens.tolist() == expected and sequence.trimmed == 68
    for masked in make_stream(corpus, **settings).sequences(0, 60):
        assert sum(VOCABULARY.is_image(token) for token in masked.tokens.tolist()) == 16
        assert masked.trimmed + (masked.weights > 0).sum() - 3 * (masked.tokens == VOCABULARY.eoss).sum() == 109


def test_an_image_longer_than_a_sequence_is_refused(corpus):
    with pytest.raises(ValueError, match=r"data.seq_length \(15\) cannot hold an image of 16 tokens.*at least 19"):
        make_stream(corpus, seq_length=15)


def test_retrieved_documents_are_drawn_from_the_table_row(corpus):
    stream = make_stream(corpus, retrieval__choice="uniform")
    table = stream.sources[0].neighbors.table
    queries = np.arange(corpus.documents)
    counts = np.zeros(4)
    for epoch in range(20):
        retrieved = stream.samples.sources[0].choose_retrieved(epoch, queries)
        for query, row in zip(queries, retrieved, strict=True):
            present = row[row >= 0].tolist()
            ranks = sorted(table[query].tolist().index(number) for number in present)
            assert all(rank >= 0 for rank in ranks)
            if (table[query] >= 0).sum() >= 3:
                counts[len(present)] += 1
    assert (np.abs(counts / counts.sum() - 0.25) < 0.05).all()
    fixed = make_stream(corpus).samples.sources[0].choose_retrieved(0, queries)
    assert ((fixed >= 0).sum(1) == np.minimum((table >= 0).sum(1), 3)).all()


def test_an_index_with_too_few_neighbors_is_refused(corpus):
    with pytest.raises(ValueError, match=r"retrieval.documents \(7\) exceeds the 5 neighbors"):
        make_stream(corpus, retrieval__documents=7)


def test_the_identity_depends_only_on_settings_that_change_the_stream(corpus):
    base = make_stream(corpus).identity
    assert make_stream(corpus, data__workers=7).identity == base
    assert make_stream(corpus, train__global_batch_size=16).identity == base
    assert pickle.loads(pickle.dumps(make_stream(corpus))).identity == base
    others = [
        make_stream(corpus, False),
        make_stream(corpus, packing="stream"),
        make_stream(corpus, cm3__mean_spans=2.0),
        make_stream(corpus, cm3__infill_probability=0.5),
        make_stream(corpus, cm3__drop_documents_probability=0.5),
        make_stream(corpus, retrieval__loss_weight=0.1),
    ]
    assert len({base, *(stream.identity for stream in others)}) == 7


def test_build_stream_names_the_missing_field(corpus):
    with pytest.raises(ValueError, match=r"data\.shards is empty; give the folder"):
        build_stream(Config())
    with pytest.raises(ValueError, match=r"validation\.shards is empty"):
        build_stream(Config(), train=False)
    config = Config()
    config.data.shards = str(corpus.folder)
    assert build_stream(config).sequence(0).tokens.shape == (4097,)


def test_sample_numbers_and_positions_equal_values_by_hand():
    eos = VOCABULARY.eos
    tokens = np.array([3, 4, eos, eos, 5, eos, eos, 6])
    samples = number_samples(tokens, eos)
    assert samples.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert number_samples(np.array([eos, eos, 3]), eos).tolist() == [0, 1, 1]
    assert positions_in_samples(samples).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert positions_in_samples(np.array([0, 1, 1, 0, -1, 1, -1])).tolist() == [0, 0, 1, 1, 0, 2, 1]


def test_moved_spans_stay_with_their_sample(corpus):
    """The spans of a masked sample keep its sample number; the first token after a change of sample has no loss."""
    settings = {"packing": "stream", "retrieval": False, "cm3__probability": 1.0, "data__attention": "sample"}
    stream, plain = make_stream(corpus, **settings), make_stream(corpus, packing="stream", retrieval=False)
    several = 0
    for number in range(40):
        sequence, other = stream.sequence(number), plain.sequence(number)
        assert np.array_equal(sequence.tokens, other.tokens)  # data.attention changes no token
        assert other.samples is None
        n_sentinels = {}
        for sample in set(sequence.samples.tolist()) - {-1}:
            tokens = sequence.tokens[sequence.samples == sample]
            is_sentinel = (tokens >= VOCABULARY.sentinel(0)) & (tokens < VOCABULARY.sentinel(7))
            n_sentinels[sample] = int(is_sentinel.sum())
            assert n_sentinels[sample] % 2 == 0  # the sentinel of a span occurs twice in the same sample
        several += len(n_sentinels) > 1 and any(n_sentinels.values())
        unseen = np.flatnonzero((np.diff(sequence.samples) != 0) & (sequence.tokens[1:] != VOCABULARY.eos)) + 1
        assert not sequence.weights[unseen].any()
        kept = np.setdiff1d(np.arange(len(sequence.tokens)), unseen)
        assert np.array_equal(sequence.weights[kept], other.weights[kept])
    assert several > 5


def test_loss_weights_are_scaled_by_modality_and_for_sentinels(corpus):
    """CM3 (2201.07520, A.1) gives sentinels no loss; the end-of-span tokens keep their weight."""
    settings = {"packing": "stream", "retrieval__loss_weight": 0.5, "cm3__min_spans": 1}
    plain = make_stream(corpus, **settings).sequences(0, 40)
    factors = {"data__text_loss_weight": 2.0, "data__image_loss_weight": 0.25, "cm3__sentinel_loss_weight": 0.0}
    weighted = make_stream(corpus, **settings, **factors).sequences(0, 40)
    sentinels = 0
    for sequence, other in zip(plain, weighted, strict=True):
        tokens = sequence.tokens
        assert np.array_equal(tokens, other.tokens)
        expected = (
            sequence.weights * np.where(tokens < 100, 2.0, 1.0) * np.where((tokens >= 100) & (tokens < 132), 0.25, 1)
        )
        is_sentinel = (tokens >= VOCABULARY.sentinel(0)) & (tokens < VOCABULARY.sentinel(0) + VOCABULARY.sentinels)
        expected[is_sentinel] = 0
        sentinels += is_sentinel.sum()
        assert np.allclose(other.weights, expected)
        assert {0.5, 1.0} >= set(sequence.weights.tolist())
    assert sentinels >= 70


def test_sources_of_a_config_are_opened_with_their_weights(corpus, tmp_path):
    other = write_shards(tmp_path / "texts", [[1, 2, 3], [4, 5]], VOCABULARY)
    path = tmp_path / "config.yaml"
    path.write_text(
        f"output: {tmp_path}\ndata:\n  seq_length: 64\n  sources:\n  - {{shards: {corpus.folder}, weight: 0.9}}\n"
        f"  - {{shards: {other.folder}, weight: 0.1}}\n"
    )
    config = load_config(path)
    validate_config(config)
    stream = build_stream(config)
    assert [source.corpus.folder.name for source in stream.sources] == ["shards", "texts"]
    assert stream.samples.mixture.weights == [9, 1]
    save_config(config, tmp_path / "again.yaml")
    assert build_stream(load_config(tmp_path / "again.yaml")).identity == stream.identity
    incompatible = write_shards(tmp_path / "incompatible", [[1, 2, 3]], make_vocabulary(text=90))
    config.data.sources[1].shards = str(incompatible.folder)
    with pytest.raises(ValueError, match=r"vocabulary.*incompatible|incompatible.*vocabulary"):
        build_stream(config)
