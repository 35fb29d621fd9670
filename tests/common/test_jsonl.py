"""Files of one JSON object per line."""

import os

import pytest

from megatron_cm3leon.common.jsonl import drop_truncated_line, parse_lines


@pytest.mark.parametrize("complete", ["", '{"a": 1}\n', '{"a": 1}\n{"a": 2}\n', '{"a": "' + "x" * 70_000 + '"}\n'])
def test_only_an_incomplete_last_line_is_removed(tmp_path, complete):
    path = tmp_path / "lines.jsonl"
    for incomplete in ("", '{"a'):
        path.write_text(complete + incomplete)
        file = os.open(path, os.O_RDWR)
        drop_truncated_line(file)
        os.close(file)
        assert path.read_text() == complete


def test_the_error_names_the_damaged_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"half')
    with pytest.raises(ValueError, match=r"lines.jsonl is damaged: line 2 is not valid JSON"):
        list(parse_lines(path))
