"""JSON arrays are read item by item, from any part, and give the inputs of JSON Lines."""

import json

import pytest

from megatron_cm3leon.data.tasks import sources
from megatron_cm3leon.data.tasks.sources import read_array
from tests.data.runs import read_all
from tests.data.tasks.instructions import open_rows, show_entry, write_rows

ITEMS = [{"text": "é🙂 ]},[{"}, 12, 'a, "b"', None, [1, [2]], {}, {"long": "x" * 500}, -3.5e2, True, "漢字"]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_items_of_an_array_and_their_positions(tmp_path, monkeypatch, indent, mark):
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 7)
    path = tmp_path / "x.json"
    path.write_bytes(mark + b"\n " + json.dumps(ITEMS, indent=indent, ensure_ascii=False).encode() + b"\n")
    found = list(read_array(str(path)))
    assert [item for _, item in found] == ITEMS
    for number, (position, _) in enumerate(found):
        assert [item for _, item in read_array(str(path), position)] == ITEMS[number:]


@pytest.mark.parametrize("content", [b'[{"a": 1}, {"a": }]', b'[{"a": 1}, {"a": 2}', b'[{"a": 1}, {"a"'])
def test_a_damaged_array_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.json is not valid JSON: the item that begins at byte \d+ cannot be read."):
        open_rows(tmp_path / "x.json", task="vqa")
    (tmp_path / "x.json").write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match=r"x.json is not UTF-8 .*; save it as UTF-8."):
        open_rows(tmp_path / "x.json", task="vqa")


def test_lines_and_array_have_the_same_documents_in_every_part_size(tmp_path):
    rows = [{"caption": f"cat {number}", "image": f"{number}.png"} for number in range(7)]
    lines = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    expected = [f"Describe the given picture.[ cat {number}]|<{number}.png>" for number in range(7)]
    for path in (lines, tmp_path / "rows.json"):
        for size in (1, 3, 7, 9):
            source = open_rows(path, task="caption", part_size=size)
            assert source.count == 7 and source.parts == -(-7 // size)
            entries = read_all(source)
            assert [show_entry(entry) for entry in entries] == expected
            assert [entry.key for entry in entries] == [f"{number:08d}" for number in range(7)]
    both = open_rows([lines, write_rows(tmp_path / "more.jsonl", rows)], task="caption", part_size=3)
    assert [entry.source for entry in read_all(both)][6:8] == ["rows.jsonl:7", "more.jsonl:1"]
    with pytest.raises(ValueError, match=r"files of several formats \(.*; preprocess each format by itself."):
        open_rows([lines, tmp_path / "rows.json"], task="caption")


def test_a_damaged_line_is_an_input_with_a_reason(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"caption": "a", "image": "a.png"}\n{"caption"\n\n{"caption": "\xff"}\n')
    assert [show_entry(entry).split(":")[0] for entry in read_all(open_rows(path, task="caption"))][1:] == [
        "not JSON",
        "not UTF-8",
    ]
