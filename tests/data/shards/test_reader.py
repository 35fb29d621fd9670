"""Shards on disk: documents that are read, and the error messages for damaged or wrong files."""

import gc
import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from megatron_cm3leon.common.atomic_io import add_checksum
from megatron_cm3leon.data.shards.reader import open_shards, split_segments
from megatron_cm3leon.data.shards.writer import pack_members
from megatron_cm3leon.tokenizers.vocab import check_same_vocabulary
from tests.data.corpora import make_pairs, make_vocabulary, write_shards

V = make_vocabulary()


@pytest.fixture
def pairs():
    return make_pairs(30, V)


@pytest.fixture
def folder(tmp_path, pairs):
    write_shards(tmp_path / "shards", pairs, V, 8)
    return tmp_path / "shards"


def test_documents_are_read_in_manifest_order(folder, pairs):
    corpus = open_shards(folder)
    assert corpus.documents == 30 and corpus.lengths.dtype == np.uint32
    for number in (29, 0, 8, 7, 15):
        assert corpus.read(number).tolist() == pairs[number].tolist()
        assert corpus.lengths[number] == len(pairs[number])
    assert corpus.metadata(["caption"])["caption"].to_pylist() == [f"caption {number}" for number in range(30)]
    assert not corpus.read(0).flags.writeable
    corpus.prefetch(np.arange(30))
    with pytest.raises(IndexError, match=r"document 30 is outside 0\.\.29"):
        corpus.read(30)
    copy = pickle.loads(pickle.dumps(corpus))
    assert copy.identity == corpus.identity and copy.read(3).tolist() == pairs[3].tolist()


def test_ids_beyond_16_bits_are_stored_in_32(tmp_path):
    vocabulary = make_vocabulary(text=70_000)
    corpus = write_shards(tmp_path / "shards", [[69_999, vocabulary.break_id, 70_001]], vocabulary)
    assert corpus.read(0).tolist() == [69_999, vocabulary.break_id, 70_001] and corpus.read(0).dtype == np.uint32


def test_reading_works_with_fewer_open_files_than_shards(folder, pairs):
    corpus = open_shards(folder)
    corpus._map_limit = 2
    assert [corpus.read(number).tolist() for number in range(30)] == [pair.tolist() for pair in pairs]
    assert len(corpus._maps) == 2


def read_flat(corpus, numbers):
    numbers = np.array(numbers)
    lengths = corpus.lengths[numbers].astype(np.int64)
    out = np.empty(lengths.sum(), corpus.dtype)
    corpus.read_into(numbers, out, np.cumsum(lengths) - lengths)
    return out.tolist()


def test_many_documents_are_read_at_once(folder, pairs):
    corpus = open_shards(folder)
    corpus._map_limit = 2
    numbers = [29, 0, 8, 8, 7, 15]
    corpus.prefetch(np.array(numbers))
    assert read_flat(corpus, numbers) == np.concatenate([pairs[number] for number in numbers]).tolist()
    assert len(corpus._files) == 2
    files = dict(corpus._files)
    del corpus
    gc.collect()
    for file in files.values():
        with pytest.raises(OSError):
            os.fstat(file)


def test_read_into_verifies_checksums_when_it_first_reads_a_document(folder, pairs):
    corpus, verified = open_shards(folder), open_shards(folder)
    read_flat(verified, range(30))
    tar = folder / "shard-000001-000.tar"
    content = bytearray(tar.read_bytes())
    offset = int(np.load(folder / "shard-000001-000.idx.npy")["offset"][2])
    content[offset + 3] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ValueError, match=r"document 10 \(row 2 of .*shard-000001-000.tar\) is damaged"):
        read_flat(corpus, [9, 10])
    assert read_flat(corpus, [9]) == pairs[9].tolist()
    os.truncate(tar, offset)
    with pytest.raises(ValueError, match=r"document 10 \(row 2 of .*shard-000001-000.tar\) is damaged"):
        read_flat(verified, [10])


def test_the_error_names_the_damaged_document(folder):
    tar = folder / "shard-000001-000.tar"
    content = bytearray(tar.read_bytes())
    offset = int(np.load(folder / "shard-000001-000.idx.npy")["offset"][2])
    content[offset + 3] ^= 1
    tar.write_bytes(content)
    corpus = open_shards(folder)
    corpus.read(9)
    with pytest.raises(ValueError, match=r"document 10 \(row 2 of .*shard-000001-000\.tar\) is damaged.*crc32"):
        corpus.read(10)


def change_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(add_checksum(manifest)))


def test_files_that_do_not_match_the_manifest_are_refused(folder, tmp_path):
    def check_error(match, damage):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        damage(copy)
        with pytest.raises(ValueError, match=match):
            open_shards(copy)
        shutil.rmtree(copy)

    name = "shard-000002-000"
    check_error(f"{name}.tar is missing", lambda copy: (copy / f"{name}.tar").unlink())
    check_error(r"\.parquet is missing.*--overwrite", lambda copy: (copy / f"{name}.parquet").unlink())
    check_error(r"tar has \d+ bytes instead of", lambda copy: (copy / f"{name}.tar").open("ab").write(b"x"))
    size = (folder / f"{name}.idx.npy").stat().st_size
    check_error("idx.npy is unreadable", lambda copy: (copy / f"{name}.idx.npy").write_bytes(b"x" * size))
    check_error(
        "it lists 31 documents, the index",
        lambda copy: change_manifest(copy, lambda m: m.update(documents=31)),
    )
    check_error(
        "has format 3; this version reads formats 1 and 2",
        lambda copy: change_manifest(copy, lambda m: m.update(format=3)),
    )
    check_error("is not a valid manifest of shards", lambda copy: (copy / "manifest.json").write_text("{"))
    check_error("is not a valid manifest of shards", lambda copy: change_manifest(copy, lambda m: m.pop("shards")))
    check_error("outside its folder", lambda copy: change_manifest(copy, lambda m: m["shards"][0].update(name="../x")))
    check_error("vocabulary hash", lambda copy: change_manifest(copy, lambda m: m["vocabulary"].update(text_size=7)))
    check_error(r"has no manifest\.json, which is written last", lambda copy: (copy / "manifest.json").unlink())


def test_another_vocabulary_is_refused_with_its_differences(folder):
    other = make_vocabulary(text=120)
    with pytest.raises(ValueError, match=r"shards was made with another vocabulary.*text_size: 100 instead of 120"):
        check_same_vocabulary(other, open_shards(folder).vocabulary, "shards")


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_members_equal_those_that_tarfile_and_numpy_write(dtype):
    draws = np.random.default_rng(0)
    rows = [draws.integers(0, 60_000, size).astype(dtype) for size in (1, 7, 191, 192, 193, 448, 5000, 100_000)]
    keys = [f"{number:08d}" for number in range(7)] + ["k" * 89]
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, row in zip(keys, rows, strict=True):
            member = io.BytesIO()
            np.save(member, row)
            header = tarfile.TarInfo(f"{key}.tokens.npy")
            header.size = member.tell()
            tar.addfile(header, io.BytesIO(member.getvalue()))
    content, offsets = pack_members(keys, [row.tobytes() for row in rows], np.dtype(dtype))
    assert expected.getvalue()[: len(content)] == content.tobytes()
    for row, offset in zip(rows, offsets, strict=True):
        assert content[offset : offset + row.nbytes].tobytes() == row.tobytes()


def test_segments_are_split_at_breaks():
    ids = np.array([1, 2, V.break_id, 3, V.break_id])
    assert [segment.tolist() for segment in split_segments(ids, V)] == [[1, 2], [3], []]


def test_an_edited_manifest_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"tokens": 1}))
    with pytest.raises(ValueError, match=r"copy/manifest.json is damaged: it does not match its SHA-256"):
        open_shards(copy)
    del manifest["sha256"]  # as earlier versions wrote it
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert open_shards(copy).documents == manifest["documents"]
