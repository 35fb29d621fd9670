"""Streams and files equal golden.json: existing files stay readable, and existing runs can be resumed."""

import json
from dataclasses import MISSING, fields

import pytest

from megatron_cm3leon.checkpoint.format import Piece
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.data.preprocess.filters import Filters
from megatron_cm3leon.data.stream.seek import Anchor
from megatron_cm3leon.evaluation.options import EvaluationOptions
from megatron_cm3leon.retrieval.options import IndexOptions
from megatron_cm3leon.tokenizers.image_training import ImageTrainingOptions
from megatron_cm3leon.tokenizers.vqgan import VQGANConfig
from tests.golden.golden import GOLDEN, collect, list_differences

EXPECTED = json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("faiss")  # builds the index
    return collect()


@pytest.mark.parametrize("part", EXPECTED)
def test_formats_and_streams_equal_the_golden_file(found, part):
    assert not list(list_differences(EXPECTED[part], found[part], part))


@pytest.mark.parametrize(
    "kind", [Anchor, EvaluationOptions, Filters, ImageTrainingOptions, IndexOptions, Piece, TrainState, VQGANConfig]
)
def test_to_dict_contains_every_field(kind):
    required = [field.name for field in fields(kind) if field.default is field.default_factory is MISSING]
    values = dict.fromkeys(required, (1,))
    assert len(kind(**values).to_dict()) == len(fields(kind))


def test_a_new_field_is_accepted_and_a_changed_or_missing_one_is_reported():
    golden = {"a": {"b": 1, "c": [1, 2]}}
    assert not list(list_differences(golden, {"a": {"b": 1, "c": [1, 2], "new": 0}, "more": {}}))
    assert list(list_differences(golden, {"a": {"b": 2, "c": [1]}})) == [
        "/a/b: 2 instead of 1",
        "/a/c: [1] instead of [1, 2]",
    ]
    assert list(list_differences(golden, {"a": {"b": 1}})) == ["/a/c is missing"]
