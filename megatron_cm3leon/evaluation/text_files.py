"""Text files and JSON Lines that users write, read strictly: every line counts, and a fault is named with its line."""

import json
from collections.abc import Iterator
from pathlib import Path


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without byte-order mark; ValueError, with the place, if it is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: its byte {error.start} cannot be decoded; save it as UTF-8.") from error


def read_objects(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(number of the line, JSON object) of each line that is not blank; ValueError for anything else."""
    # Not splitlines: a text in a JSON object may hold U+2028, which is a line break to Python.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not valid JSON ({error}); write one JSON object per line.") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path}:{number}: not a JSON object; write one per line.")
        yield number, found
