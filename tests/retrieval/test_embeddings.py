"""Embeddings of several tasks, or after an interruption, have the same bytes; NaN is refused with its document."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("faiss")

from megatron_cm3leon.retrieval import embeddings, table
from megatron_cm3leon.retrieval.build import build_index_folder
from megatron_cm3leon.retrieval.encoder import Encoder
from megatron_cm3leon.retrieval.options import IndexOptions
from megatron_cm3leon.retrieval.part_arrays import PartitionedArrays

OPTIONS = IndexOptions(neighbors=3, threshold=0.999)
FILES = ("neighbors.npy", "scores.npy", *(f"embeddings/{name}.npy" for name in ("bank", "queries_text")))


@pytest.fixture(scope="module")
def small_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "PART_DOCUMENTS", 48)
        patch.setattr(table, "PART_NEIGHBORS", 50)
        yield


@pytest.fixture(scope="module")
def single_task_index(shards, clip_folder, tmp_path_factory, small_parts):
    folder = tmp_path_factory.mktemp("single-task") / "index"
    build_index_folder(folder, shards, clip_folder, options=OPTIONS)
    return folder


def test_tasks_write_what_one_process_writes(single_task_index, shards, clip_folder, tmp_path):
    folder = tmp_path / "index"
    for task in (2, 0):
        assert build_index_folder(folder, shards, clip_folder, options=OPTIONS, task=task, tasks=3) is None
    with pytest.raises(
        ValueError, match=r"1 of 4 parts of .*bank are missing, such as part 1; run the unfinished tasks"
    ):
        build_index_folder(folder, shards, clip_folder, options=OPTIONS, stage="index")
    build_index_folder(folder, shards, clip_folder, options=OPTIONS, task=1, tasks=3)
    build_index_folder(folder, shards, clip_folder, options=OPTIONS, stage="index")
    build_index_folder(folder, shards, clip_folder, options=OPTIONS, stage="neighbors", task=1, tasks=2)
    assert build_index_folder(folder, shards, clip_folder, options=OPTIONS)["documents"] == 180
    for name in FILES:
        assert (folder / name).read_bytes() == (single_task_index / name).read_bytes(), name
    assert {path.name for path in folder.iterdir()} == {path.name for path in single_task_index.iterdir()}


def test_heldout_documents_use_the_embeddings_of_their_bank(
    single_task_index, heldout_shards, clip_folder, tmp_path, monkeypatch
):
    encoded, original = [], Encoder.encode_images

    def count(self, images):
        encoded.append(len(images))
        return original(self, images)

    monkeypatch.setattr(Encoder, "encode_images", count)
    description = build_index_folder(tmp_path / "index", heldout_shards, clip_folder, single_task_index, OPTIONS)
    assert sum(encoded) == 20  # and none of the 180 of the bank
    assert (tmp_path / "index/embeddings/bank.npy").samefile(single_task_index / "embeddings/bank.npy")
    assert (tmp_path / "index/index.faiss").samefile(single_task_index / "index.faiss")
    again = build_index_folder(tmp_path / "again", heldout_shards, clip_folder, description["bank"], OPTIONS)
    for name in ("neighbors.npy", "embeddings/bank.npy"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "index" / name).read_bytes()
    changed = ("shards", "bank", "documents", "bank_documents", "factory", "search", "recall_at_10", "neighbors_found")
    assert {name: again[name] for name in changed} == {name: description[name] for name in changed}


def test_a_bank_of_an_earlier_version_is_refused(single_task_index, heldout_shards, clip_folder, tmp_path):
    copy = shutil.copytree(single_task_index, tmp_path / "copy")
    (copy / "index.faiss.json").unlink()
    with pytest.raises(
        ValueError,
        match=r"copy lacks index.faiss.json: it was built by an earlier version.*Give the shards of its bank",
    ):
        build_index_folder(tmp_path / "index", heldout_shards, clip_folder, copy, OPTIONS)


def test_another_recall_changes_the_search_parameters_without_a_new_index(shards, clip_folder, tmp_path):
    options = replace(OPTIONS, factory="IVF16,Flat", recall=0.3)
    build_index_folder(tmp_path / "index", shards, clip_folder, options=options, stage="encode")
    results = []
    for recall in (0.3, 0.99, 0.99):
        build_index_folder(
            tmp_path / "index", shards, clip_folder, options=replace(options, recall=recall), stage="index"
        )
        status = (tmp_path / "index/index.faiss").stat(), (tmp_path / "index/index.faiss.json").stat()
        results.append((json.loads((tmp_path / "index/index.faiss.json").read_text()), *status))
    assert results[0][0]["search"] == "nprobe=8" and results[1][0]["recall_at_10"] > results[0][0]["recall_at_10"]
    assert results[0][1].st_mtime_ns == results[1][1].st_mtime_ns  # the same FAISS index
    assert results[1][2].st_mtime_ns == results[2][2].st_mtime_ns  # nothing was left to do


def test_the_bank_of_another_encoder_is_refused(single_task_index, heldout_shards, clip_folder, tmp_path):
    other = shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(other / "model.safetensors")
    save_file({name: weight * 1.5 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"bank.npy was begun with other settings \(encoder_sha256"):
        build_index_folder(tmp_path / "index", heldout_shards, other, single_task_index, OPTIONS)


def test_an_embedding_of_nan_names_its_document(shards, clip_folder, tmp_path):
    broken = shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(broken / "model.safetensors")
    weights["text_projection.weight"][3, 5] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    message = (
        r"the embedding of document 0 \(0000000\) of .* holds NaN or infinity: the weights of the encoder at .*clip"
    )
    with pytest.raises(ValueError, match=message):
        build_index_folder(tmp_path / "index", shards, broken, options=OPTIONS)
    assert not (tmp_path / "index/index.json").exists()
    assert not list((tmp_path / "index").rglob("*.np?"))


def test_embeddings_damaged_on_disk_are_refused(single_task_index, heldout_shards, clip_folder, tmp_path):
    copy = shutil.copytree(single_task_index, tmp_path / "copy")
    vectors = np.load(copy / "embeddings/bank.npy")
    vectors[77] = np.nan
    np.save(copy / "embeddings/bank.npy", vectors)
    options = IndexOptions(neighbors=3, threshold=0.999, factory="IVF4,Flat")  # built from the damaged vectors
    with pytest.raises(ValueError, match=r"the embedding of document 77 holds NaN or infinity .* encode again"):
        build_index_folder(tmp_path / "index", heldout_shards, clip_folder, copy, options)


def test_rows_of_different_widths_are_joined(tmp_path):
    rows = PartitionedArrays(tmp_path, "numbers", ["a"], 5, 3, {"by": "test"})
    rows.write_part(0, {"a": np.ones((3, 1, 2))})
    assert rows.missing_parts() == [1] and rows.missing_parts(0, 2) == []
    rows.write_part(1, {"a": np.full((2, 2, 2), 7)})
    rows.join()
    expected = np.zeros((5, 2, 2))
    expected[:3, 0], expected[3:] = 1, 7
    assert (rows.load("a") == expected).all() and rows.joined and not rows.parts_folder.exists()
    with pytest.raises(ValueError, match=r"a.npy was begun with other settings \(by: test instead of other"):
        PartitionedArrays(tmp_path, "numbers", ["a"], 5, 3, {"by": "other"})
