"""Raw pairs as the tokenizers need them: the captions or the paths of the pictures.

Input is a JSONL file with {"image": path, "caption": text} a line, paths relative to the file, or a folder
with img.png beside img.txt (sub-folders are looked through). Preprocessing reads the same forms, with all
their fields, in data/sources.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}


def read_captions(source: str | Path) -> Iterator[str]:
    """Captions of a JSONL file or a folder, in order."""
    source = _existing(source)
    if source.is_dir():
        for path in sorted(source.rglob("*.txt")):
            yield path.read_text(encoding="utf-8").rstrip("\n")
        return
    for number, fields in _read_lines(source):
        yield _field(source, number, fields, "caption")


def list_pictures(source: str | Path) -> list[Path]:
    """Paths of the pictures of a JSONL file or a folder, in order; ValueError when there is none."""
    source = _existing(source)
    if source.is_dir():
        found = sorted(path for path in source.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    else:
        found = [source.parent / _field(source, number, fields, "image") for number, fields in _read_lines(source)]
    if not found:
        raise ValueError(f"{source} holds no pictures.")
    return found


def _existing(source: str | Path) -> Path:
    source = Path(source)
    if not source.exists():
        raise ValueError(f"--input {source} does not exist; give a JSONL file of pairs or a folder of pictures.")
    return source


def _read_lines(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not a line of JSON: {error}") from error
            yield number, fields


def _field(path: Path, number: int, fields, name: str) -> str:
    if not isinstance(fields, dict) or not isinstance(fields.get(name), str):
        raise ValueError(f'{path}:{number}: needs a text field "{name}"; a pair is {{"image": ..., "caption": ...}}.')
    return fields[name]
