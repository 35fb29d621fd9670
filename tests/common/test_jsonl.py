"""Files of one JSON object a line."""

import os

import pytest

from megatron_cm3leon.common.jsonl import drop_truncated_line, parse_lines


@pytest.mark.parametrize("whole", ["", '{"a": 1}\n', '{"a": 1}\n{"a": 2}\n', '{"a": "' + "x" * 70_000 + '"}\n'])
def test_a_half_line_is_cut_off_and_no_more(tmp_path, whole):
    path = tmp_path / "lines.jsonl"
    for rest in ("", '{"a'):
        path.write_text(whole + rest)
        file = os.open(path, os.O_RDWR)
        drop_truncated_line(file)
        os.close(file)
        assert path.read_text() == whole


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"half')
    with pytest.raises(ValueError, match=r"lines.jsonl is damaged: line 2 is not valid JSON"):
        list(parse_lines(path))
