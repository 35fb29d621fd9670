"""Detection of JSON files that are not JSON Lines: one array, one object, or objects over several lines."""

import json

from megatron_cm3leon.data.sources.embedded import shorten
from megatron_cm3leon.data.sources.files import open_file

_START = 1 << 16
"""Bytes that are checked; a file with a single line is read completely."""


def check_json_lines(path: str, lines: int) -> dict:
    """The object of the first line, {} if there is none; ValueError for a JSON file that is not JSON Lines.

    `lines`: number of lines in the file.
    """
    with open_file(path) as content:
        text = content.read(-1 if lines == 1 else _START).decode("utf-8-sig", "replace").lstrip()
    first, _, rest = text.partition("\n")
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        _check_several_lines(path, text)
        return {}
    if not rest.strip():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            raise ValueError(_explain_array(path))
        if isinstance(value, dict) and _holds_rows(value):
            raise ValueError(_explain_object(path, value))
    return value if isinstance(value, dict) else {}


def _check_several_lines(path: str, text: str) -> None:
    """The same check if the first line is not valid JSON by itself."""
    if text[:1] == "[" and text[1:].lstrip()[:1] == "{":
        raise ValueError(_explain_array(path))
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        value, end = {}, 0
    if isinstance(value, dict) and _holds_rows(value):
        raise ValueError(_explain_object(path, value))
    if "\n" in text[:end] or text.split("\n", 1)[0].strip() == "{":
        raise ValueError(
            f"{path} holds JSON objects over several lines; one object per line is expected. Convert it: "
            f"jq -c . OLD > NEW.jsonl"
        )


def _holds_rows(value: dict) -> bool:
    """Whether an object's values are the rows or columns of a table."""
    columns = bool(value) and all(isinstance(column, dict) for column in value.values())
    rows = any(isinstance(rows, list) and rows and isinstance(rows[0], dict) for rows in value.values())
    return columns or (rows and value.keys().isdisjoint(("image", "caption", "text", "segments")))


def _explain_array(path: str) -> str:
    return f"{path} is one JSON array; one object per line is expected. Convert it: jq -c '.[]' OLD > NEW.jsonl"


def _explain_object(path: str, value: dict) -> str:
    return (
        f"{path} is one JSON object for the whole file (its fields: {shorten(', '.join(value), 200)}); one object per "
        f'line is expected, such as {{"image": "path.png", "caption": "text"}}. docs/data.md shows how to convert it.'
    )
