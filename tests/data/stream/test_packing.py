"""Packings beyond the paper's: whole pictures, whole samples; waste, and any distance at the same cost."""

import numpy as np
import pytest

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.data.stream.best_fit import count_bins, pack_best_fit, pack_closing, pack_in_order, pack_window
from megatron_cm3leon.data.stream.samples import DataSource
from megatron_cm3leon.data.stream.stream import Stream, number_samples
from tests.data.corpora import make_neighbors, make_pairs, make_vocabulary, write_shards

V = make_vocabulary()


def make_documents(count=90):
    """Pairs, texts, and interleaved documents of two pictures."""
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


def source(block):
    """The tokens of an unmasked block, without its padding."""
    return block.tokens[block.weights > 0]


def inside_a_picture(before, after):
    return V.is_image(int(before)) and V.is_image(int(after))


@pytest.mark.parametrize("retrieval", [False, True])
def test_whole_images_is_the_stream_but_for_the_ends_of_cut_pictures(corpus, retrieval):
    plain = make_stream(corpus, "stream", retrieval)
    whole = make_stream(corpus, "stream_whole_images", retrieval)
    expected = np.concatenate([block.tokens for block in plain.sequences(0, 62)])
    place = dropped = padded = 0
    for block in whole.sequences(0, 60):
        tokens = source(block)
        assert block.tokens.tolist() == tokens.tolist() + [V.pad] * (65 - len(tokens))
        assert tokens.tolist() == expected[place : place + len(tokens)].tolist()
        assert place == 0 or not inside_a_picture(*expected[place - 1 : place + 1])
        place += len(tokens)
        assert V.is_image(expected[place : place + block.trimmed]).all()
        place, dropped, padded = place + block.trimmed, dropped + block.trimmed, padded + 65 - len(tokens)
    assert dropped > 50 and padded > 50
    for number in (59, 7, 31):
        other = make_stream(corpus, "stream_whole_images", retrieval).sequence(number)
        assert other.tokens.tolist() == whole.sequence(number).tokens.tolist()


@pytest.mark.parametrize("retrieval", [False, True])
def test_documents_are_whole_samples_each_once_an_epoch(corpus, retrieval):
    stream = make_stream(corpus, "documents", retrieval, seq_length=160, data__attention="sample")
    wanted = {}
    query = make_stream(corpus, "query", retrieval, seq_length=160)
    for block in query.sequences(0, corpus.documents):
        wanted[int(block.documents[0])] = source(block).tolist()
    found, number = {}, 0
    while len(found) < corpus.documents:
        block = stream.sequence(number)
        tokens = source(block)
        assert np.array_equal(block.samples[: len(tokens)], number_samples(tokens, V.eos))
        assert (block.samples[len(tokens) :] == -1).all() and block.epoch == 0 and block.trimmed == 0
        starts = np.flatnonzero(np.diff(block.samples[: len(tokens)], prepend=-1))
        for document, own in zip(block.documents.tolist(), np.split(tokens, starts[1:]), strict=True):
            assert document not in found and own.tolist() == wanted[document]
            found[document] = number
        number += 1
    assert stream.sequence(number).epoch == 1
    assert retrieval or number < corpus.documents / 2


def test_a_sample_longer_than_a_block_stands_alone_and_its_loss_is_counted(tmp_path):
    text, picture = list(range(90)), list(range(V.image_start, V.image_start + 16))
    corpus = write_shards(tmp_path, [[*text, V.break_id, *picture], [1, 2, 3]], V)
    blocks = make_stream(corpus, "documents", seq_length=40, data__image_first_probability=0.0).sequences(0, 2)
    long, short = sorted(blocks, key=lambda block: -block.trimmed)
    assert long.tokens.tolist() == [V.eos, *text[:22], V.break_id, *picture, V.eos] and long.trimmed == 68
    assert source(short).tolist() == [V.eos, 1, 2, 3, V.eos] and short.trimmed == 0


@pytest.mark.parametrize("packing", ["stream_whole_images", "documents"])
def test_a_picture_longer_than_a_block_is_refused(corpus, packing):
    with pytest.raises(ValueError, match=rf"cannot hold an image of 16 tokens.*packing={packing}.*at least 19"):
        make_stream(corpus, packing, seq_length=15)


@pytest.mark.parametrize("packing", ["query", "stream", "stream_whole_images", "documents"])
def test_masking_keeps_sentinels_in_pairs_under_every_packing(corpus, packing):
    stream = make_stream(corpus, packing, True, cm3__probability=1.0, cm3__mean_spans=2.0)
    masked = 0
    for block in stream.sequences(0, 80):
        for index in range(V.sentinels):
            assert (block.tokens == V.sentinel(index)).sum() in (0, 2)
        masked += V.sentinel(0) in block.tokens
        assert ((block.weights == 0) == (block.tokens == V.pad)).all()
    assert masked > 40


def test_best_fit_by_hand():
    assert pack_in_order([3, 3, 2, 4], 6) == [[0, 1], [2, 3]]
    assert pack_in_order([5, 2, 4], 6) == [[0], [1, 2]]
    fitted = pack_best_fit([4, 3, 3, 2, 6, 1], 6)
    assert sorted(sorted(items) for items in fitted) == [[0, 3], [1, 2], [4], [5]]
    assert pack_closing([4, 4, 3, 5, 2, 5], 9) == [[0, 3], [1, 5], [2, 4]]
    assert sorted(map(sorted, pack_window(np.array([4, 5, 2, 1]), 6))) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    "name, waste",
    [("emoji", 0.02), ("text", 0.005), ("near-equal", 1.0)],
)
def test_best_fit_pads_little_and_never_more_than_in_order(name, waste):
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
    assert 1 - lengths.sum() / (len(bins) * 4097) <= waste


def test_bins_of_many_windows_are_counted_as_they_are_packed():
    generator = np.random.default_rng(3)
    for room in (20, 100):
        lengths = np.concatenate(
            [generator.integers(1, room + 1, 30), np.full(25, room // 3), generator.geometric(0.2, 50).clip(1, room)]
        )
        for _ in range(50):
            generator.shuffle(lengths)
            sizes = generator.integers(1, 40, 9)
            firsts = np.append(0, np.cumsum(sizes))
            firsts = firsts[firsts < len(lengths)]
            expected = [len(pack_window(window, room)) for window in np.split(lengths, firsts[1:])]
            assert count_bins(lengths, firsts, room).tolist() == expected


@pytest.mark.parametrize("packing", ["stream", "stream_whole_images", "documents"])
@pytest.mark.parametrize("way", ["walk", "table", "kept table", "cursor"])
def test_any_block_by_any_way(corpus, packing, way, monkeypatch, tmp_path):
    """Small groups, so that an epoch has many: reading on, a table, one on disk and a cursor lead to the same block."""
    monkeypatch.setattr("megatron_cm3leon.data.stream.seek.GROUP", 8)
    whole = make_stream(corpus, packing, True)
    blocks = whole.sequences(0, 300)
    assert blocks[299].epoch >= 1
    monkeypatch.setattr("megatron_cm3leon.data.stream.seek._WALK", 2 if "table" in way else 10**6)
    for number in (299, 20, 130, 0):
        fresh = make_stream(corpus, packing, True)
        if way == "kept table":
            fresh.keep_tables(tmp_path)
        if way == "cursor":
            fresh.resume(whole.cursor(max(0, number - 3)))
            measured = []
            measure = fresh.packing.prefix_sums.measure
            fresh.packing.prefix_sums.measure = lambda starts, measure=measure, log=measured: (
                log.append(1) or measure(starts)
            )
        block = fresh.sequence(number)
        assert block.tokens.tolist() == blocks[number].tokens.tolist()
        assert block.weights.tolist() == blocks[number].weights.tolist()
        if way == "cursor":
            assert len(measured) < 6, "a cursor leads there at once"
    assert bool(list(tmp_path.glob("*.npy"))) == (way == "kept table")


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_far_epochs_of_a_small_corpus_leave_no_files(corpus, packing, tmp_path):
    """An epoch of a few groups is walked through; a table for each epoch would be a file for each."""
    stream = make_stream(corpus, packing, False)
    stream.keep_tables(tmp_path)
    assert stream.sequence(10_000).epoch > 64 and not list(tmp_path.iterdir())


def test_a_table_of_another_size_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_cm3leon.data.stream.seek._WALK", 0)
    stream = make_stream(corpus, "stream", True)
    stream.keep_tables(tmp_path)
    np.save(tmp_path / f"{stream.identity}-000000.npy", np.zeros(7, np.int64))
    with pytest.raises(ValueError, match=r"-000000.npy is not a table of 2 integers; delete it"):
        stream.sequence(0)


def test_mixed_sources_stand_in_one_stream(corpus, tmp_path):
    texts = write_shards(tmp_path, [np.full(5 + number, number) for number in range(7)], V)
    sources = [DataSource(corpus, make_neighbors(corpus), 0.75), DataSource(texts, None, 0.25)]
    for packing in ("query", "stream", "stream_whole_images", "documents"):
        config = make_config(packing, 160)
        stream = Stream(config, sources)
        assert stream.samples.mixture.weights == [3, 1]
        seen = [number for block in stream.sequences(0, 200) for number in block.documents.tolist()]
        if packing == "query":
            of_texts = np.array(seen) >= corpus.documents
            assert (np.abs(np.cumsum(of_texts) - np.arange(1, 201) / 4) < 1).all()
            mine = np.array(seen)[of_texts] - corpus.documents
            assert all(sorted(mine[start : start + 7]) == list(range(7)) for start in range(0, 49, 7))
            own = np.array(seen)[~of_texts][:90]
            assert sorted(own) == list(range(90))
            assert stream.corpus.locate(corpus.documents + 3) == (texts, 3)
            block = stream.sequence(int(np.flatnonzero(of_texts)[0]))
            assert len(block.retrieved) == 0
        again = Stream(config, sources)
        assert again.sequence(150).tokens.tolist() == stream.sequence(150).tokens.tolist()
        assert Stream(config, [sources[0], DataSource(texts, None, 0.5)]).identity != stream.identity
