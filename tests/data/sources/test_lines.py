"""Files of lines: reading them in batches and reading them line by line give the same documents."""

import random

import pytest

from megatron_cm3leon.data.sources import RawTexts, lines, open_source
from tests.data.runs import read_all

LINES = [
    b'{"text": "one"}', b' {"text":"two"} ', b'{"text": "a"},{"text": "b"}', b'{"text": "cut', b'{"text": "c"',
    b'"text": "d"}', b'{"text": "e"}}', b'{"text": {}', b'{"text": 5}', b'{"text": ""}', b'{"text": " \\n"}', b"",
    b"  ", b'{"text": "\\ud800"}', '{"text": "é🙂"}'.encode(), b'{"text": "\xff"}', b'{"text": "f", "id": 3}', b"[]",
    b"{}", b'{"text": "}\\n,{"}', b'{"text": "g", "text": "h"}', b'{"id": 3}', b'{"text": "\xe2\x80\xa8"}',
    b'{"text": "i"}\r', b'{"text": [{}', b'{}], "text": "j"}', b'{"text": "\xed\xa0\x80", "text": "k"}',
]  # fmt: skip


@pytest.mark.parametrize("ending", ["jsonl", "txt"])
def test_lines_read_in_batches_equal_lines_read_one_by_one(tmp_path, monkeypatch, ending):
    draws, path = random.Random(0), tmp_path / f"corpus.{ending}"
    monkeypatch.setattr(lines, "TEXT_BATCH_CHARACTERS", 60)
    n_batched = 0
    for number in range(400):
        chosen = draws.choices(LINES[: draws.choice((1, 3, 6, len(LINES)))], k=draws.randrange(1, 12))
        path.write_bytes((b"\xef\xbb\xbf" if number % 5 == 0 else b"") + b"\n".join(chosen) + b"\n" * (number % 2))
        source = open_source(path, draws.randrange(1, 12), "lines" if ending == "txt" else "jsonl")
        batches = [batch for part in range(source.parts) for batch in source.read_batches(part)]
        flat = [entry for batch in batches for entry in (batch if isinstance(batch, RawTexts) else [batch])]
        assert flat == read_all(source)
        n_batched += any(isinstance(batch, RawTexts) and len(batch) > 1 for batch in batches)
        with monkeypatch.context() as patch:
            for kind in (lines.JsonlSource, lines.TextLinesSource):
                patch.setattr(kind, "_find_texts", lambda *_: None)
            assert read_all(source) == flat, chosen
    assert n_batched > 100


def test_lines_that_are_valid_only_when_joined_are_reported(tmp_path):
    """Joined by commas, these lines are valid JSON with one text per line."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text":[{}\n{}],"text":"x"}\n{"text":"a"},{"text":"b"}\n')
    assert [entry.reason.split(":")[0] for entry in read_all(open_source(path, 10))] == ["not JSON"] * 3
    path.write_bytes(b'{"text": "\xed\xa0\x80", "text": "b"}\n')
    assert [entry.reason.split(":")[0] for entry in read_all(open_source(path, 10))] == ["not UTF-8"]
