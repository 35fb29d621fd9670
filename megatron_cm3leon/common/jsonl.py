"""Records of a run: files of one JSON object a line (metrics.jsonl, events.jsonl), read and gone on with."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

LONGEST_LINE = 1 << 16
"""Bytes; more than any line has."""


def parse_lines(path: Path) -> Iterator[dict]:
    """The objects of a file with one a line; ValueError naming the line that is none."""
    for number, text in enumerate(path.read_text(errors="replace").split("\n")[:-1], 1):
        # What follows the last line end is the half line that a killed run can leave.
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged: line {number} is no JSON ({error}); delete that line to read the others."
            ) from error
        yield line


def drop_half_line(file: int) -> None:
    """Take away what a full disk or a kill left behind the last line end: the next line would be lost with it.

    file: descriptor of a file that is open for reading and writing.
    """
    size = os.fstat(file).st_size
    start = max(0, size - LONGEST_LINE)
    tail = os.pread(file, LONGEST_LINE, start)
    if not tail.endswith(b"\n"):
        os.ftruncate(file, start + tail.rfind(b"\n") + 1)
