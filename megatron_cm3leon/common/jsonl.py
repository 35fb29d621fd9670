"""JSON Lines files of a run (metrics.jsonl, events.jsonl): reading, and repairing the end before appending."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

LONGEST_LINE = 1 << 16
"""Bytes; longer than any line."""


def parse_lines(path: Path) -> Iterator[dict]:
    """The JSON objects of a file, one per line; a truncated last line is skipped.

    Raises ValueError, with the number of the line, for a complete line that is not valid JSON.
    """
    for number, text in enumerate(path.read_text(errors="replace").split("\n")[:-1], 1):
        # What follows the last line end is a truncated line, which a killed run can leave.
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged: line {number} is not valid JSON ({error}); delete that line to read the others."
            ) from error
        yield line


def drop_truncated_line(file: int) -> None:
    """Remove a truncated last line, which a full disk or a kill can leave: the next line would be appended to it.

    file: descriptor of a file that is open for reading and writing.
    """
    size = os.fstat(file).st_size
    start = max(0, size - LONGEST_LINE)
    tail = os.pread(file, LONGEST_LINE, start)
    if not tail.endswith(b"\n"):
        os.ftruncate(file, start + tail.rfind(b"\n") + 1)
