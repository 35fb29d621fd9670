"""Raw readers: image-text pairs as a JSONL file or as a folder, cut into fixed parts of the input.

    JSONL    {"image": "relative/path.png", "caption": "text", ...}; paths are relative to the file
    folder   img.png beside img.txt, at any depth, in the order of their names

A reader yields every input: a RawPair, or a BadInput that says why it is none. Keys count inputs
(00000012 is line 13), so they are safe names in a tar whatever the user's own keys are.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm")
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class RawPair:
    """A caption and the place of its picture."""

    key: str
    source: str
    """Where the pair was read, such as `pairs.jsonl:13`."""
    caption: str
    image: str
    """Picture's path as the input gives it, relative to the source's folder."""
    extra: str
    """The input's other fields as a JSON object."""


@dataclass(frozen=True)
class BadInput:
    """An input that makes no document, and why."""

    key: str
    source: str
    reason: str

    def to_dict(self) -> dict:
        fields = {"key": self.key, "source": self.source, "reason": self.reason}
        return {name: text.encode(errors="replace").decode() for name, text in fields.items()}  # valid Unicode


class JsonlSource:
    """Lines of a JSONL file; a blank line is no input."""

    def __init__(self, path: Path, part_size: int) -> None:
        self.path, self.part_size = path.absolute(), part_size
        self.folder = self.path.parent
        self.offsets, self.count, self.identity = self._scan()
        """Byte at which each part begins; lines; SHA-256 of the file."""

    @property
    def parts(self) -> int:
        return len(self.offsets)

    def part_inputs(self, part: int) -> int:
        """Lines of a part, blank ones among them."""
        return min(self.part_size, self.count - part * self.part_size)

    def read_part(self, part: int) -> Iterator[RawPair | BadInput]:
        """The inputs of a part in order."""
        first = part * self.part_size
        with open(self.path, "rb") as file:
            file.seek(self.offsets[part])
            for number in range(first, first + self.part_inputs(part)):
                line = file.readline()
                if number == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
                if line.strip():
                    yield _parse_line(line, f"{number:08d}", f"{self.path.name}:{number + 1}")

    def _scan(self) -> tuple[list[int], int, str]:
        digest, offsets, lines, place, last = hashlib.sha256(), [0], 0, 0, b"\n"
        with open(self.path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + 1
                first = self.part_size - 1 - lines % self.part_size
                offsets += (place + ends[first :: self.part_size]).tolist()
                lines, place, last = lines + len(ends), place + len(chunk), chunk[-1:]
        if last != b"\n":
            lines += 1
        return [offset for offset in offsets if offset < place], lines, digest.hexdigest()


def _parse_line(line: bytes, key: str, source: str) -> RawPair | BadInput:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadInput(key, source, f"not UTF-8: byte {error.start} of the line cannot be decoded")
    except (ValueError, RecursionError) as error:
        return BadInput(key, source, f"not JSON: {error}")
    if not isinstance(fields, dict):
        return BadInput(key, source, f"not a JSON object but {type(fields).__name__}")
    for name in ("image", "caption"):
        if not isinstance(fields.get(name), str):
            what = f"is {type(fields[name]).__name__}, not text" if name in fields else "is missing"
            return BadInput(key, source, f'field "{name}" {what}')
    extra = {name: value for name, value in fields.items() if name not in ("image", "caption")}
    return _check(RawPair(key, source, fields["caption"], fields["image"], json.dumps(extra, sort_keys=True)))


class FolderSource:
    """Pictures with their captions beside them."""

    def __init__(self, path: Path, part_size: int) -> None:
        self.folder, self.part_size = path.absolute(), part_size
        self.names = self._list()
        """Relative paths, sorted: every picture, and every caption that has no picture."""
        self.count = len(self.names)
        self.identity = self._hash()

    @property
    def parts(self) -> int:
        return -(-self.count // self.part_size)

    def part_inputs(self, part: int) -> int:
        return min(self.part_size, self.count - part * self.part_size)

    def read_part(self, part: int) -> Iterator[RawPair | BadInput]:
        """The inputs of a part in order."""
        first = part * self.part_size
        for number, name in enumerate(self.names[first : first + self.part_size], first):
            yield self._read(name, f"{number:08d}")

    def _read(self, name: str, key: str) -> RawPair | BadInput:
        if name.endswith(".txt"):
            return BadInput(key, name, "no picture beside this caption")
        path = (self.folder / name).with_suffix(".txt")
        try:
            caption = path.read_bytes().decode("utf-8-sig").rstrip("\r\n")
        except FileNotFoundError:
            return BadInput(key, name, f"no caption: {path.name} is missing beside the picture")
        except UnicodeDecodeError as error:
            return BadInput(key, name, f"not UTF-8: byte {error.start} of {path.name} cannot be decoded")
        return _check(RawPair(key, name, caption, name, "{}"))

    def _list(self) -> list[str]:
        found = []
        for folder, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            visible = [name for name in files if not name.startswith(".")]
            pictures = [name for name in visible if name.lower().endswith(PICTURE_ENDINGS)]
            stems = {os.path.splitext(name)[0] for name in pictures}
            captions = [name for name in visible if name.endswith(".txt") and name[:-4] not in stems]
            found += [os.path.relpath(os.path.join(folder, name), self.folder) for name in pictures + captions]
        return sorted(found)

    def _hash(self) -> str:
        """SHA-256 of names and sizes; the bytes are read once only, when they are encoded."""
        digest = hashlib.sha256()
        for name in self.names:
            path = self.folder / name
            for file in (path, path.with_suffix(".txt")):
                size = file.stat().st_size if file.is_file() else -1
                digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def _check(pair: RawPair) -> RawPair | BadInput:
    """Refuse what no document can be made of: an empty caption, text that is no Unicode."""
    reason = ""
    if not pair.caption.strip():
        reason = "empty caption"
    elif not pair.image:
        reason = "empty picture path"
    try:
        f"{pair.caption}{pair.image}".encode()
    except UnicodeEncodeError:
        reason = "not Unicode: an unpaired surrogate in caption or picture path"
    if not reason:
        return pair
    return BadInput(pair.key, pair.source, reason)


def open_source(path: str | Path, part_size: int) -> JsonlSource | FolderSource:
    """Open `--input`; ValueError when there is nothing to read."""
    path = Path(path)
    if part_size < 1:
        raise ValueError(f"--part-size ({part_size}) must be at least 1.")
    if path.is_dir():
        source = FolderSource(path, part_size)
        what = f"a picture ({', '.join(PICTURE_ENDINGS)}) beside a .txt of the same name"
    elif path.is_file():
        source, what = JsonlSource(path, part_size), 'a line {"image": "path.png", "caption": "text"}'
    else:
        raise ValueError(f"--input {path} does not exist; give a JSONL file or a folder of pictures and captions.")
    if not source.count:
        raise ValueError(f"--input {path} holds no pair; expected {what}.")
    return source
