"""Streams and files are those of golden.json: what users have on their disks stays readable and resumable."""

import json

import pytest

from tests.golden.golden import GOLDEN, collect, list_differences

EXPECTED = json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("faiss")  # of an index
    return collect()


@pytest.mark.parametrize("part", EXPECTED)
def test_formats_and_streams_are_the_golden_ones(found, part):
    assert not list(list_differences(EXPECTED[part], found[part], part))


def test_a_new_field_is_accepted_and_a_changed_or_missing_one_is_named():
    golden = {"a": {"b": 1, "c": [1, 2]}}
    assert not list(list_differences(golden, {"a": {"b": 1, "c": [1, 2], "new": 0}, "more": {}}))
    assert list(list_differences(golden, {"a": {"b": 2, "c": [1]}})) == [
        "/a/b: 2 instead of 1",
        "/a/c: [1] instead of [1, 2]",
    ]
    assert list(list_differences(golden, {"a": {"b": 1}})) == ["/a/c is missing"]
