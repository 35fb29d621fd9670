"""Packings that are not in the paper: complete images, complete samples; their padding, and access to any sequence."""

import numpy as np
import pytest

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.data.stream.best_fit import count_bins, pack_best_fit, pack_closing, pack_in_order, pack_window
from megatron_cm3leon.data.stream.samples import DataSource
from megatron_cm3leon.data.stream.stream import Stream, number_samples
from tests.data.corpora import make_neighbors, make_pairs, make_vocabulary, write_shards

V = make_vocabulary()


def make_documents(count=90):
    """Pairs, texts, and interleaved documents of two images."""
    generator = np.random.default_rng(3)
    pairs = make_pairs(count, V)
    for number in range(0, count, 5):
        pairs[number] = generator.integers(0, V.text_size, generator.integers(1, 50))
    for number in range(2, count, 7):
        pairs[number] = np.concatenate([pairs[number], [V.break_id], *make_pairs(1, V, number)])
    return pairs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("packing") / "shards", make_documents(), V)


def make_config(packing, seq_length=64, **changes):
    config = Config()
    config.data.packing, config.data.seq_length, config.cm3.probability = packing, seq_length, 0.0
    config.train.global_batch_size = 8
    for name, value in changes.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return config


def make_stream(corpus, packing, retrieval=False, **options):
    return Stream(make_config(packing, **options), corpus, make_neighbors(corpus) if retrieval else None)


def remove_padding(sequence):
    """The tokens of an unmasked sequence."""
    return sequence.tokens[sequence.weights > 0]


def are_image_tokens(before, after):
    return V.is_image(int(before)) and V.is_image(int(after))


@pytest.mark.parametrize("retrieval", [False, True])
def test_whole_images_equals_the_stream_without_the_ends_of_cut_images(corpus, retrieval):
    plain = make_stream(corpus, "stream", retrieval)
    whole_images = make_stream(corpus, "stream_whole_images", retrieval)
    expected = np.concatenate([sequence.tokens for sequence in plain.sequences(0, 62)])
    position = dropped = padded = 0
    for sequence in whole_images.sequences(0, 60):
        tokens = remove_padding(sequence)
        assert sequence.tokens.tolist() == tokens.tolist() + [V.pad] * (65 - len(tokens))
        assert tokens.tolist() == expected[position : position + len(tokens)].tolist()
        assert position == 0 or not are_image_tokens(*expected[position - 1 : position + 1])
        position += len(tokens)
        assert V.is_image(expected[position : position + sequence.trimmed]).all()
        position, dropped, padded = position + sequence.trimmed, dropped + sequence.trimmed, padded + 65 - len(tokens)
    assert dropped > 50 and padded > 50
    for number in (59, 7, 31):
        other = make_stream(corpus, "stream_whole_images", retrieval).sequence(number)
        assert other.tokens.tolist() == whole_images.sequence(number).tokens.tolist()


@pytest.mark.parametrize("retrieval", [False, True])
def test_documents_packing_has_every_complete_sample_once_per_epoch(corpus, retrieval):
    stream = make_stream(corpus, "documents", retrieval, seq_length=160, data__attention="sample")
    expected = {}
    query = make_stream(corpus, "query", retrieval, seq_length=160)
    for sequence in query.sequences(0, corpus.documents):
        expected[int(sequence.documents[0])] = remove_padding(sequence).tolist()
    found, number = {}, 0
    while len(found) < corpus.documents:
        sequence = stream.sequence(number)
        tokens = remove_padding(sequence)
        assert np.array_equal(sequence.samples[: len(tokens)], number_samples(tokens, V.eos))
        assert (sequence.samples[len(tokens) :] == -1).all() and sequence.epoch == 0 and sequence.trimmed == 0
        starts = np.flatnonzero(np.diff(sequence.samples[: len(tokens)], prepend=-1))
        for document, sample in zip(sequence.documents.tolist(), np.split(tokens, starts[1:]), strict=True):
            assert document not in found and sample.tolist() == expected[document]
            found[document] = number
        number += 1
    assert stream.sequence(number).epoch == 1
    assert retrieval or number < corpus.documents / 2


def test_a_sample_longer_than_a_sequence_is_alone_and_its_trimmed_tokens_are_counted(tmp_path):
    text, image = list(range(90)), list(range(V.image_start, V.image_start + 16))
    corpus = write_shards(tmp_path, [[*text, V.break_id, *image], [1, 2, 3]], V)
    sequences = make_stream(corpus, "documents", seq_length=40, data__image_first_probability=0.0).sequences(0, 2)
    long, short = sorted(sequences, key=lambda sequence: -sequence.trimmed)
    assert long.tokens.tolist() == [V.eos, *text[:22], V.break_id, *image, V.eos] and long.trimmed == 68
    assert remove_padding(short).tolist() == [V.eos, 1, 2, 3, V.eos] and short.trimmed == 0


@pytest.mark.parametrize("packing", ["stream_whole_images", "documents"])
def test_an_image_longer_than_a_sequence_is_refused(corpus, packing):
    with pytest.raises(ValueError, match=rf"cannot hold an image of 16 tokens.*packing={packing}.*at least 19"):
        make_stream(corpus, packing, seq_length=15)


@pytest.mark.parametrize("packing", ["query", "stream", "stream_whole_images", "documents"])
def test_masking_keeps_sentinels_in_pairs_under_every_packing(corpus, packing):
    stream = make_stream(corpus, packing, True, cm3__probability=1.0, cm3__mean_spans=2.0)
    masked = 0
    for sequence in stream.sequences(0, 80):
        for index in range(V.sentinels):
            assert (sequence.tokens == V.sentinel(index)).sum() in (0, 2)
        masked += V.sentinel(0) in sequence.tokens
        assert ((sequence.weights == 0) == (sequence.tokens == V.pad)).all()
    assert masked > 40


def test_best_fit_equals_results_by_hand():
    assert pack_in_order([3, 3, 2, 4], 6) == [[0, 1], [2, 3]]
    assert pack_in_order([5, 2, 4], 6) == [[0], [1, 2]]
    fitted = pack_best_fit([4, 3, 3, 2, 6, 1], 6)
    assert sorted(sorted(items) for items in fitted) == [[0, 3], [1, 2], [4], [5]]
    assert pack_closing([4, 4, 3, 5, 2, 5], 9) == [[0, 3], [1, 5], [2, 4]]
    assert sorted(map(sorted, pack_window(np.array([4, 5, 2, 1]), 6))) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    "name, padding",
    [("emoji", 0.02), ("text", 0.005), ("near-equal", 1.0)],
)
def test_best_fit_pads_little_and_never_more_than_in_order(name, padding):
    generator = np.random.default_rng(7)
    lengths = {
        "emoji": generator.integers(2, 12, 4096) + 64 + 3,
        "text": np.minimum(generator.lognormal(np.log(350), 1.0, 4096).astype(int) + 2, 4097),
        "near-equal": generator.geometric(1 / 40, 4096) + 1027,
    }[name]
    bins = pack_window(lengths, 4097)
    assert sorted(item for items in bins for item in items) == list(range(4096))
    assert max(sum(lengths[item] for item in items) for items in bins) <= 4097
    assert len(bins) <= len(pack_in_order(lengths.tolist(), 4097))
    assert 1 - lengths.sum() / (len(bins) * 4097) <= padding


def test_count_bins_equals_packing_each_window():
    generator = np.random.default_rng(3)
    for capacity in (20, 100):
        lengths = np.concatenate(
            [
                generator.integers(1, capacity + 1, 30),
                np.full(25, capacity // 3),
                generator.geometric(0.2, 50).clip(1, capacity),
            ]
        )
        for _ in range(50):
            generator.shuffle(lengths)
            sizes = generator.integers(1, 40, 9)
            firsts = np.append(0, np.cumsum(sizes))
            firsts = firsts[firsts < len(lengths)]
            expected = [len(pack_window(window, capacity)) for window in np.split(lengths, firsts[1:])]
            assert count_bins(lengths, firsts, capacity).tolist() == expected


@pytest.mark.parametrize("packing", ["stream", "stream_whole_images", "documents"])
@pytest.mark.parametrize("access", ["walk", "table", "kept table", "cursor"])
def test_every_way_of_access_gives_the_same_sequence(corpus, packing, access, monkeypatch, tmp_path):
    """With many small groups per epoch: walking over them, a table in memory or on disk, and a cursor."""
    monkeypatch.setattr("megatron_cm3leon.data.stream.seek.GROUP", 8)
    stream = make_stream(corpus, packing, True)
    sequences = stream.sequences(0, 300)
    assert sequences[299].epoch >= 1
    monkeypatch.setattr("megatron_cm3leon.data.stream.seek._WALK", 2 if "table" in access else 10**6)
    for number in (299, 20, 130, 0):
        fresh = make_stream(corpus, packing, True)
        if access == "kept table":
            fresh.keep_tables(tmp_path)
        if access == "cursor":
            fresh.resume(stream.cursor(max(0, number - 3)))
            measured = []
            measure = fresh.packing.prefix_sums.measure
            fresh.packing.prefix_sums.measure = lambda starts, measure=measure, log=measured: (
                log.append(1) or measure(starts)
            )
        sequence = fresh.sequence(number)
        assert sequence.tokens.tolist() == sequences[number].tokens.tolist()
        assert sequence.weights.tolist() == sequences[number].weights.tolist()
        if access == "cursor":
            assert len(measured) < 6, "a cursor is close to the sequence"
    assert bool(list(tmp_path.glob("*.npy"))) == (access == "kept table")


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_far_epochs_of_a_small_corpus_leave_no_files(corpus, packing, tmp_path):
    """An epoch of a few groups needs no table; otherwise there would be one file per epoch."""
    stream = make_stream(corpus, packing, False)
    stream.keep_tables(tmp_path)
    assert stream.sequence(10_000).epoch > 64 and not list(tmp_path.iterdir())


def test_a_stored_table_of_wrong_size_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_cm3leon.data.stream.seek._WALK", 0)
    stream = make_stream(corpus, "stream", True)
    stream.keep_tables(tmp_path)
    np.save(tmp_path / f"{stream.identity}-000000.npy", np.zeros(7, np.int64))
    with pytest.raises(ValueError, match=r"-000000.npy is not a table of 2 integers; delete it"):
        stream.sequence(0)


def test_sources_are_mixed_in_one_stream(corpus, tmp_path):
    texts = write_shards(tmp_path, [np.full(5 + number, number) for number in range(7)], V)
    sources = [DataSource(corpus, make_neighbors(corpus), 0.75), DataSource(texts, None, 0.25)]
    for packing in ("query", "stream", "stream_whole_images", "documents"):
        config = make_config(packing, 160)
        stream = Stream(config, sources)
        assert stream.samples.mixture.weights == [3, 1]
        seen = [number for sequence in stream.sequences(0, 200) for number in sequence.documents.tolist()]
        if packing == "query":
            of_texts = np.array(seen) >= corpus.documents
            assert (np.abs(np.cumsum(of_texts) - np.arange(1, 201) / 4) < 1).all()
            texts_seen = np.array(seen)[of_texts] - corpus.documents
            assert all(sorted(texts_seen[start : start + 7]) == list(range(7)) for start in range(0, 49, 7))
            pairs_seen = np.array(seen)[~of_texts][:90]
            assert sorted(pairs_seen) == list(range(90))
            assert stream.corpus.locate(corpus.documents + 3) == (texts, 3)
            sequence = stream.sequence(int(np.flatnonzero(of_texts)[0]))
            assert len(sequence.retrieved) == 0
        again = Stream(config, sources)
        assert again.sequence(150).tokens.tolist() == stream.sequence(150).tokens.tolist()
        assert Stream(config, [sources[0], DataSource(texts, None, 0.5)]).identity != stream.identity
