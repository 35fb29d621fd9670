"""Text files of users: every line counts, and what cannot be read is named with its place."""

import pytest

from megatron_cm3leon.evaluation.text_files import read_objects, read_text


def test_all_lines_are_read_with_their_numbers(tmp_path):
    # With a byte-order mark, a blank line, a line separator within a text, and without a last line end.
    content = '\ufeff{"a": 1}\n \n{"a": "x\u2028y"}'
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    assert list(read_objects(tmp_path / "a.jsonl")) == [(1, {"a": 1}), (3, {"a": "x\u2028y"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n[1]\n', "a.jsonl:2: not a JSON object"),
        (b'{"a": 1}\n{"a"', "a.jsonl:2: not valid JSON"),
        (b'{"a": "caf\xe9"}', "a.jsonl is not UTF-8: its byte 10 cannot be decoded; save it as UTF-8"),
    ],
)
def test_a_fault_is_named_with_its_place(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_objects(tmp_path / "a.jsonl"))
    if b"\xe9" in content:
        with pytest.raises(ValueError, match=message):
            read_text(tmp_path / "a.jsonl")
