"""An index folder from shards: files on disk, refused inputs, and how an interrupted build continues."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

faiss = pytest.importorskip("faiss")

from megatron_cm3leon.common.atomic_io import add_checksum
from megatron_cm3leon.data.neighbors import CHECKSUMS, load_description, load_neighbors
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.retrieval import embeddings
from megatron_cm3leon.retrieval.build import build_index_folder
from megatron_cm3leon.retrieval.encoder import Encoder, combine
from megatron_cm3leon.retrieval.options import IndexOptions

OPTIONS = IndexOptions(neighbors=3, threshold=0.999)  # to an untrained encoder, everything is similar


@pytest.fixture(scope="module")
def index(shards, clip_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "index"
    build_index_folder(folder, shards, clip_folder, options=OPTIONS)
    return folder


def test_the_folder_has_the_documented_files_and_description(index, shards, clip_folder):
    corpus = open_shards(shards)
    description = load_description(index)
    assert description["documents"] == description["bank_documents"] == corpus.documents == 180
    assert description["vocabulary_hash"] == corpus.vocabulary.hash
    assert description["encoder_sha256"] == Encoder.load(clip_folder).sha256
    assert description["factory"] == "Flat" and description["recall_at_10"] == 1
    assert description["options"]["query_dropout"] == 0.2
    assert sum(description["neighbors_found"]) == 180
    names = {str(path.relative_to(index)) for path in index.rglob("*") if path.is_file()}
    arrays = [f"embeddings/{name}.npy" for name in ("bank", "bank_identities", "queries_text", "queries_image")]
    notes = ["embeddings/bank.json", "embeddings/queries_text.json", "index.faiss.json", "table.json"]
    assert names == {"index.json", "index.faiss", "neighbors.npy", CHECKSUMS, "scores.npy", *arrays, *notes}
    vectors = np.load(index / "embeddings/bank.npy")
    assert vectors.dtype == np.float16 and vectors.shape == (180, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=2e-3)


def test_vectors_are_those_of_caption_and_image(index, shards, shapes, clip_folder):
    encoder = Encoder.load(clip_folder)
    fields = json.loads((shapes / "train.jsonl").read_text().splitlines()[100])
    image = encoder.encode_images([Image.open(shapes / fields["image"])])
    expected = combine(encoder.encode_texts([fields["caption"]]), image)
    np.testing.assert_allclose(np.load(index / "embeddings/bank.npy")[100], expected[0], atol=2e-3)
    text = encoder.encode_texts([fields["caption"]], 0.2, [(0, 100)])
    np.testing.assert_allclose(np.load(index / "embeddings/queries_text.npy")[100], text[0], atol=2e-3)
    np.testing.assert_allclose(np.load(index / "embeddings/queries_image.npy")[100], image[0], atol=2e-3)


def test_the_table_follows_the_filters(index, shards):
    corpus = open_shards(shards)
    neighbors = load_neighbors(index, corpus)
    assert neighbors.bank is corpus
    assert neighbors.table.shape == (180, 3) and isinstance(neighbors.table, np.memmap)
    names = ("bank", "queries_text", "queries_image")
    vectors, *views = (np.load(index / f"embeddings/{name}.npy").astype(np.float32) for name in names)
    checksums = np.array(corpus.metadata(["picture_sha256"]).column(0).to_pylist())
    for number, row in enumerate(neighbors.table):
        kept = row[row >= 0]
        assert len(kept)
        assert number not in kept and len({*checksums[kept], checksums[number]}) == len(kept) + 1
        for query in (vectors, *views):
            assert (vectors[kept] @ query[number] <= 0.999 + 1e-6).all()
        between = vectors[kept] @ vectors[kept].T - 2 * np.eye(len(kept))
        assert (between <= 0.999 + 1e-6).all()
        assert (np.diff(np.load(index / "scores.npy")[number][row >= 0]) <= 0).all()


def test_faiss_and_plain_filters_give_the_same_neighbors(index, shards):
    """The oracle: an exact FAISS index of the files, and the filters in plain Python."""
    corpus = open_shards(shards)
    checksums = corpus.metadata(["picture_sha256"]).column(0).to_pylist()
    tokens = [corpus.read(number)[-4:].tobytes() for number in range(180)]
    names = ("bank", "queries_text", "queries_image")
    bank, *views = (np.load(index / f"embeddings/{name}.npy").astype(np.float32) for name in names)
    exact = faiss.IndexFlatIP(bank.shape[1])
    exact.add(bank)
    orders = [exact.search(view, 180)[1] for view in views]
    table, equal = load_neighbors(index, corpus).table, 0
    for number in range(0, 180, 4):
        kept = []

        def fits(other, number=number, kept=kept):
            near = [bank[number], *(view[number] for view in views), *bank[kept]]
            excluded = [number, *kept]
            return (
                max(vector @ bank[other] for vector in near) <= OPTIONS.threshold
                and checksums[other] not in [checksums[one] for one in excluded]
                and tokens[other] not in [tokens[one] for one in excluded]
            )

        for position in range(3):
            candidates = [*orders[position % 2][number], *orders[1 - position % 2][number]]
            kept += [other for other in [next(filter(fits, candidates), None)] if other is not None]
        equal += sorted(kept) == sorted(table[number][table[number] >= 0].tolist())
    assert equal >= 44  # of 45: an untrained encoder gives scores that are equal within rounding


def test_a_low_recall_is_reported(shards, clip_folder, tmp_path, caplog):
    options = IndexOptions(neighbors=3, threshold=0.999, factory="IVF30,Flat", search="nprobe=1")
    description = build_index_folder(tmp_path / "index", shards, clip_folder, options=options)
    assert description["recall_at_10"] < 0.9 and description["search"] == "nprobe=1"
    assert f"recall@10 of the index is {description['recall_at_10']:.3f}, below 0.9" in caplog.text
    caplog.clear()
    chosen = IndexOptions(neighbors=3, threshold=0.999, factory="IVF30,Flat")
    description = build_index_folder(tmp_path / "chosen", shards, clip_folder, options=chosen)
    assert description["recall_at_10"] > 0.9 and description["search"].startswith("nprobe=")
    assert "recall@10" not in caplog.text


def test_heldout_queries_retrieve_from_the_training_bank(shards, heldout_shards, clip_folder, tmp_path):
    description = build_index_folder(tmp_path / "index", heldout_shards, clip_folder, shards, OPTIONS)
    assert (description["documents"], description["bank_documents"]) == (20, 180)
    assert description["pictures_in_bank"] == 0
    heldout = open_shards(heldout_shards)
    neighbors = load_neighbors(tmp_path / "index", heldout)
    assert neighbors.table.shape == (20, 3) and neighbors.table.max() >= 20
    assert neighbors.bank.documents == 180
    assert neighbors.bank.read(int(neighbors.table[0, 0])).size > 4


def test_heldout_images_in_the_bank_are_reported(shapes, write_shards, shards, clip_folder, tmp_path, caplog):
    """Two training pairs among the held-out ones are reported, and their images are not retrieved for them."""
    lines = (shapes / "heldout.jsonl").read_text().splitlines()[:3] + (shapes / "train.jsonl").read_text().splitlines()[
        7:9
    ]
    (shapes / "leaked.jsonl").write_text("\n".join(lines))
    folder = write_shards(shapes / "leaked.jsonl", tmp_path / "leaked")
    description = build_index_folder(tmp_path / "index", folder, clip_folder, shards, OPTIONS)
    assert description["pictures_in_bank"] == 2
    assert "2 of 5 documents have an image that the memory bank also holds" in caplog.text
    assert not np.isin(load_neighbors(tmp_path / "index", open_shards(folder)).table[3:], [7, 8]).any()


def test_the_bank_is_found_next_to_a_moved_index(shapes, write_shards, heldout_shards, clip_folder, tmp_path):
    bank = write_shards(shapes / "train.jsonl", tmp_path / "before/bank")
    build_index_folder(tmp_path / "before/index", heldout_shards, clip_folder, bank, OPTIONS)
    (tmp_path / "before").rename(tmp_path / "after")
    corpus = open_shards(heldout_shards)
    assert load_neighbors(tmp_path / "after/index", corpus).bank.folder == tmp_path / "after/bank"
    shutil.rmtree(tmp_path / "after/bank")
    with pytest.raises(ValueError, match=r"the memory bank of the index .* is neither at .*before.* nor at .*after"):
        load_neighbors(tmp_path / "after/index", corpus)


def test_an_index_of_other_shards_is_refused(index, heldout_shards):
    with pytest.raises(ValueError, match=r"built from other shards: manifest.json of .* had sha256 .*, that of .* has"):
        load_neighbors(index, open_shards(heldout_shards))


def test_an_edited_manifest_is_refused(index, shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    load_neighbors(index, open_shards(copy))  # a copy has the same shards
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(add_checksum(manifest | {"command": "another path's spelling"})))
    load_neighbors(index, open_shards(copy))  # the command may differ
    next(iter(manifest["shards"][0]["files"].values()))["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(add_checksum(manifest)))
    with pytest.raises(ValueError, match=r"built from other shards.*copy"):
        load_neighbors(index, open_shards(copy))
    with pytest.raises(ValueError, match=r"built from other bank.*copy"):
        load_neighbors(index, open_shards(shards), open_shards(copy))


def test_another_vocabulary_is_refused(index, shapes, write_shards, vocabulary, clip_folder, shards, tmp_path):
    other = replace(vocabulary, image_size=300)
    folder = write_shards(shapes / "train.jsonl", tmp_path / "other", other)
    with pytest.raises(ValueError, match=rf"built with vocabulary {vocabulary.hash}, but the shards .* {other.hash}"):
        load_neighbors(index, open_shards(folder))
    with pytest.raises(ValueError, match=r"the memory bank at .* was made with another vocabulary .*image_size: 300"):
        build_index_folder(tmp_path / "index", shards, clip_folder, folder, OPTIONS)


def test_damaged_index_folders_are_refused(index, shards, tmp_path):
    corpus = open_shards(shards)
    with pytest.raises(ValueError, match=r"no index at .*: it has no index.json"):
        load_neighbors(tmp_path, corpus)
    copy = shutil.copytree(index, tmp_path / "copy")
    np.save(copy / "neighbors.npy", np.zeros((4, 3), np.int64))
    with pytest.raises(ValueError, match=r"neighbors.npy is int64 \[4, 3\] instead of int64 \[180, 3\]"):
        load_neighbors(copy, corpus)
    (copy / "neighbors.npy").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"neighbors.npy is unreadable"):
        load_neighbors(copy, corpus)
    (copy / "index.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="has format 9; this version reads format 1"):
        load_neighbors(copy, corpus)
    (copy / "index.json").write_text("{")
    with pytest.raises(ValueError, match="is not a valid description of an index"):
        load_neighbors(copy, corpus)


def test_an_interrupted_build_continues(index, shards, clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "PART_DOCUMENTS", 64)
    encoded, stop_at = [], 130
    original = Encoder.encode_images

    def count(self, images):
        encoded.append(len(images))
        if sum(encoded) > stop_at:
            raise KeyboardInterrupt
        return original(self, images)

    monkeypatch.setattr(Encoder, "encode_images", count)
    with pytest.raises(KeyboardInterrupt):
        build_index_folder(tmp_path / "index", shards, clip_folder, options=OPTIONS)
    with pytest.raises(ValueError, match="written last"):
        load_neighbors(tmp_path / "index", open_shards(shards))
    encoded.clear()
    build_index_folder(tmp_path / "index", shards, clip_folder, options=OPTIONS)
    assert sum(encoded) == 180 - 128  # two complete parts were kept
    for name in ("neighbors.npy", "embeddings/bank.npy", "embeddings/queries_text.npy"):
        assert (tmp_path / "index" / name).read_bytes() == (index / name).read_bytes()


def test_outputs_that_are_finished_or_have_other_settings_are_refused(index, shards, clip_folder, tmp_path):
    copy = shutil.copytree(index, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"already holds a finished index; give another folder, or --overwrite"):
        build_index_folder(copy, shards, clip_folder, options=OPTIONS)
    (copy / "index.json").unlink()
    with pytest.raises(ValueError, match=r"neighbors.npy was begun with other settings \(neighbors: 3 instead of 2"):
        build_index_folder(copy, shards, clip_folder, options=IndexOptions(neighbors=2, threshold=0.999))
    changed = IndexOptions(neighbors=3, query_dropout=0.5)
    with pytest.raises(
        ValueError, match=r"queries_text.npy was begun with other settings \(query_dropout: 0.2 instead of 0.5"
    ):
        build_index_folder(copy, shards, clip_folder, options=changed)
    description = build_index_folder(copy, shards, clip_folder, options=changed, overwrite=True)
    assert description["options"]["query_dropout"] == 0.5


def test_a_folder_with_other_files_is_not_changed(shards, clip_folder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(mine.txt\); give a new or empty folder"):
        build_index_folder(tmp_path, shards, clip_folder, options=OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match=r"holds other files \(mine.txt, a file\)"):
        build_index_folder(tmp_path / "mine.txt", shards, clip_folder, options=OPTIONS)


def test_a_changed_or_missing_image_is_named(shapes, write_shards, clip_folder, tmp_path):
    source = shutil.copytree(shapes, tmp_path / "source")
    folder = write_shards(source / "heldout.jsonl", tmp_path / "shards")
    Image.new("RGB", (32, 32)).save(source / "heldout/000003.png")
    with pytest.raises(ValueError, match=r"000003.png is not the image that .* was made from"):
        build_index_folder(tmp_path / "index", folder, clip_folder, options=OPTIONS)
    (source / "heldout/000003.png").unlink()
    with pytest.raises(ValueError, match=r"000003.png, an image of .* cannot be read .*--images tokens"):
        build_index_folder(tmp_path / "index", folder, clip_folder, options=OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (IndexOptions(neighbors=0), r"--neighbors \(0\) must be at least 1"),
        (IndexOptions(threshold=1.5), r"--threshold \(1.5\) must be above 0 and at most 1"),
        (IndexOptions(query_dropout=1.0), r"--query-dropout \(1.0\) must be in \[0, 1\)"),
        (IndexOptions(images="tokens"), "--images tokens requires --tokenizer"),
        (IndexOptions(candidates=0), "must be at least 1"),
        (IndexOptions(recall=0), r"--recall \(0\) must be above 0"),
        (IndexOptions(images="raw"), r"--images \(raw\) must be source or tokens"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        options.validate()
