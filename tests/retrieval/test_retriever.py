"""Search for generation: texts, images, both; the filters of the table; error messages."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("faiss")

from megatron_cm3leon.data.neighbors import load_neighbors
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.retrieval.build import build_index_folder
from megatron_cm3leon.retrieval.options import IndexOptions
from megatron_cm3leon.retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def index(shards, clip_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched") / "index"
    build_index_folder(folder, shards, clip_folder, options=IndexOptions(neighbors=3, threshold=0.999, query_dropout=0))
    return folder


@pytest.fixture(scope="module")
def retriever(index):
    return Retriever.load(index)


@pytest.fixture(scope="module")
def pairs(shapes):
    lines = [json.loads(line) for line in (shapes / "train.jsonl").read_text().splitlines()]
    return [(fields["caption"], Image.open(shapes / fields["image"]).convert("RGB")) for fields in lines]


def test_a_document_of_the_bank_retrieves_the_neighbors_of_its_row(retriever, index, shards, pairs):
    numbers = [0, 50, 179]
    texts, images = zip(*(pairs[number] for number in numbers), strict=True)
    found = retriever.search(texts, images, k=3, bank_numbers=numbers)
    expected = load_neighbors(index, open_shards(shards)).table[numbers]
    # The table was searched with vectors rounded to float16; scores of an untrained encoder are almost equal.
    assert (found == expected).mean() > 0.7


@pytest.mark.parametrize("form", ["text", "image", "both"])
def test_queries_of_text_or_image_or_both(retriever, pairs, form):
    texts = [caption for caption, _ in pairs[:4]] if form != "image" else None
    images = [image for _, image in pairs[:4]] if form != "text" else None
    found = retriever.search(texts, images)
    assert found.shape == (4, 2) and found.dtype == np.int64
    assert (found >= 0).all() and (found[:, 0] != found[:, 1]).all()
    assert retriever.bank.read(int(found[0, 0])).size > 4


def test_a_threshold_that_none_passes_gives_minus_one(retriever, pairs, monkeypatch):
    monkeypatch.setitem(retriever.description["options"], "threshold", -1.0)
    assert (retriever.search([pairs[0][0]]) == -1).all()


def test_another_encoder_or_bank_is_refused(index, clip_folder, heldout_shards, tmp_path):
    copy = shutil.copytree(clip_folder, tmp_path / "clip")
    Retriever.load(index, encoder=copy)  # the same encoder elsewhere
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"note": "edited"}))
    with pytest.raises(ValueError, match=r"was built with the encoder .* but .*clip is another one"):
        Retriever.load(index, encoder=copy)
    with pytest.raises(ValueError, match="built from other bank"):
        Retriever.load(index, bank=open_shards(heldout_shards))
    with pytest.raises(ValueError, match="no index at"):
        Retriever.load(tmp_path)
