"""Targets of instruction documents on disk: what is read, the identity of shards that have them, and bad files."""

import hashlib
import json

import numpy as np
import pytest

from megatron_cm3leon.common.atomic_io import add_checksum, sha256_file
from megatron_cm3leon.data.inspect.shards import describe_shards, measure_shards, verify_shards
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.data.shards.targets import TARGETS_DTYPE
from megatron_cm3leon.data.shards.writer import ShardWriter
from tests.data.corpora import make_vocabulary, write_shards

V = make_vocabulary()
IMAGE = [V.image_start + code for code in range(16)]
DOCUMENTS = [[1, 2, 3, 4, V.break_id, *IMAGE], [5, 6], [7, V.break_id, *IMAGE], [8, 9, 10]]
TARGETS = [[(1, 2), (2, 4)], [], [(2, 18)], [(2, 3)]]
NAMES = ("shard-000000-000.targets.npy", "shard-000001-000.targets.npy")


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path, DOCUMENTS, V, 2, TARGETS)
    return tmp_path


def test_targets_are_read_as_they_were_written(folder):
    corpus = open_shards(folder)
    assert corpus.has_targets and corpus.manifest["format"] == 2
    assert [rows.tolist() for rows in corpus.targets(np.array([3, 0, 1, 2]))] == [
        [[2, 3]], [[1, 2], [2, 4]], [], [[2, 18]]
    ]  # fmt: skip
    rows, counts = corpus.all_targets()
    assert rows.tolist() == [(0, 1, 2, 0), (0, 2, 4, 0), (2, 2, 18, 1), (3, 2, 3, 0)] and counts.tolist() == [
        2,
        0,
        1,
        1,
    ]
    verify_shards(corpus)
    shown = describe_shards(corpus, measure_shards(corpus))
    assert "targets: 20 tokens of 4 targets in 3 documents" in shown.splitlines()
    assert np.load(folder / NAMES[1]).tolist() == [(0, 2, 18, 1), (1, 2, 3, 0)]


def test_targets_are_part_of_the_identity_of_the_shards_that_have_them(folder, tmp_path):
    corpus = open_shards(folder)
    plain = write_shards(tmp_path / "plain", DOCUMENTS, V, 2)
    other = write_shards(tmp_path / "other", DOCUMENTS, V, 2, [[(1, 2), (2, 3)], *TARGETS[1:]])
    partial = write_shards(tmp_path / "partial", DOCUMENTS, V, 2, [[], [], *TARGETS[2:]])
    assert plain.manifest["format"] == 1 and not plain.has_targets
    assert [len(rows) for rows in plain.targets(np.array([0, 3]))] == [0, 0]
    assert len({each.identity for each in (corpus, plain, other, partial)}) == 4
    assert len({each.manifest["content_sha256"] for each in (corpus, plain, other, partial)}) == 4
    for entry, same in zip(plain.shards, partial.shards, strict=True):
        assert entry["sha256"] == same["sha256"]
    assert plain.shards[0] == partial.shards[0]  # a shard without targets has the same three files
    assert not (tmp_path / "partial" / NAMES[0]).exists()
    parts = [V.hash, partial.shards[0]["sha256"], partial.shards[1]["sha256"], sha256_file(folder / NAMES[1])]
    assert partial.identity == hashlib.sha256("\n".join(parts).encode()).hexdigest()


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        ([(2, 2)], r"target 2\.\.2 of document 00000000, which has 21 tokens, must be a range within"),
        ([(2, 22)], r"target 2\.\.22 of document .* must be a range within"),
        ([(2, 4), (3, 4)], r"target 3\.\.4 .* after the target before it"),
        ([(3, 5)], r"target 3\.\.5 .* must be a part of one text or of one image, without <break>"),
    ],
)
def test_a_range_that_is_not_valid_is_refused_when_it_is_written(tmp_path, targets, match):
    writer = ShardWriter(tmp_path, "shard-000000-000", V)
    with pytest.raises(ValueError, match=match):
        writer.add("00000000", np.array(DOCUMENTS[0]), {}, targets)
    writer.abandon()


def replace_targets(folder, rows, update=True):
    np.save(folder / NAMES[0], rows)
    manifest = json.loads((folder / "manifest.json").read_text())
    file = manifest["shards"][0]["files"][NAMES[0]]
    file["bytes"] = (folder / NAMES[0]).stat().st_size
    if update:
        file["sha256"] = sha256_file(folder / NAMES[0])
    (folder / "manifest.json").write_text(json.dumps(add_checksum(manifest)))


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([(0, 2, 4, 0), (0, 1, 2, 0)], r"target 1\.\.2 of document 0 after target 2\.\.4 of document 0.*sorted"),
        ([(0, 1, 3, 0), (0, 2, 4, 0)], r"target 2\.\.4 of document 0 after target 1\.\.3.*must not overlap"),
        ([(1, 0, 1, 0), (0, 2, 4, 0)], r"target 2\.\.4 of document 0 after target 0\.\.1 of document 1"),
        ([(1, 0, 3, 0)], r"target 0\.\.3 of document 1, which has 2"),
        ([(1, 1, 1, 0)], r"target 1\.\.1 of document 1, which has 2"),
        ([(2, 0, 1, 0)], r"a target of document 2, but the shard has 2"),
        ([], r"is not a list of targets"),
    ],
)
def test_targets_that_are_not_valid_are_refused_when_the_shards_are_opened(folder, rows, match):
    replace_targets(folder, np.array(rows, TARGETS_DTYPE))
    with pytest.raises(ValueError, match=rf"do not match their manifest.json: {NAMES[0]} .*{match}.*--overwrite"):
        open_shards(folder)


def test_damaged_and_missing_files_of_targets_are_refused(folder):
    replace_targets(folder, np.arange(3))
    with pytest.raises(ValueError, match="is not a list of targets"):
        open_shards(folder)
    replace_targets(folder, np.array([(0, 1, 2, 0), (0, 2, 3, 0)], TARGETS_DTYPE), update=False)
    with pytest.raises(ValueError, match=rf"{NAMES[0]} is damaged, it does not match its SHA-256"):
        open_shards(folder)
    (folder / NAMES[0]).unlink()
    with pytest.raises(ValueError, match=rf"{NAMES[0]} is missing"):
        open_shards(folder)
