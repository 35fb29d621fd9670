"""Files of lines: JSONL, and plain text with a document a line. A blank line is no input."""

import hashlib
import io
import json
import logging
from abc import abstractmethod
from collections.abc import Iterator

import numpy as np

from megatron_cm3leon.data.sources.base import FileSource, Part
from megatron_cm3leon.data.sources.documents import (
    FILE_NAME,
    TEXT_BLOCK,
    BadInput,
    Entry,
    RawText,
    RawTexts,
    check_document,
)  # fmt: skip
from megatron_cm3leon.data.sources.embedded import shorten
from megatron_cm3leon.data.sources.files import BYTE_ORDER_MARK, check_encoding, open_file
from megatron_cm3leon.data.sources.json_form import check_json_lines
from megatron_cm3leon.data.sources.rows import make_document

logger = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 22
_scan_json = json.JSONDecoder().scan_once
_decode_pairs = json.JSONDecoder(object_pairs_hook=tuple).decode
"""As json.loads, each object as the tuple of its (name, value): a dict would hide a name that stands twice."""


class _LinesSource(FileSource):
    def _cut(self, file: int) -> str:
        check_encoding(self.files[file])
        digest, offsets, lines, place, last = hashlib.sha256(), [0], 0, 0, b"\n"
        with open_file(self.files[file]) as content:
            while chunk := content.read(_CHUNK_BYTES):
                digest.update(chunk)
                ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + 1
                first = self.part_size - 1 - lines % self.part_size
                offsets += (place + ends[first :: self.part_size]).tolist()
                lines, place, last = lines + len(ends), place + len(chunk), chunk[-1:]
        if last != b"\n":
            lines += 1
        self._add_parts(file, [offset for offset in offsets if offset < place], lines)
        return digest.hexdigest()

    def _read(self, part: Part) -> Iterator[Entry | RawTexts]:
        name, parse, first, ahead = self.name_of(part.file), self._parser(part), part.first, part.number + 1
        done = 0
        with open_file(self.files[part.file]) as content:
            content.seek(part.begin)
            # io's, since fsspec's own `readlines` knows no limit
            while done < part.inputs and (lines := io.IOBase.readlines(content, TEXT_BLOCK)):
                if done == part.begin == 0:
                    lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
                numbers = range(done, min(done + len(lines), part.inputs))
                done = numbers.stop
                keys = [f"{first + number:08d}" for number in numbers]
                sources = [f"{name}:{ahead + number}" for number in numbers]
                lines = lines[: len(numbers)]
                if texts := self._find_texts(lines):
                    yield RawTexts(keys, sources, texts, ["{}"] * len(texts))
                else:
                    yield from _read_lines(lines, keys, sources, parse)

    @abstractmethod
    def _parser(self, part: Part):
        """A function (line, key, source) -> Entry."""

    @abstractmethod
    def _find_texts(self, lines: list[bytes]) -> list[str] | None:
        """The text of each line, where every line is sound and has nothing else; None otherwise."""


def _read_lines(lines: list[bytes], keys: list[str], sources: list[str], parse) -> Iterator[Entry]:
    for line, key, source in zip(lines, keys, sources, strict=True):
        if not line or line.isspace():
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            yield BadInput(key, source, f"not UTF-8: byte {error.start} of the line cannot be decoded")
            continue
        yield parse(text, key, source)


def _are_texts(texts: list) -> bool:
    """Whether check_document would refuse none of them."""
    if set(map(type, texts)) != {str} or not all(texts) or any(map(str.isspace, texts)):
        return False
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # an unpaired surrogate
        return False
    return True


def decode_json(line: str):
    """json.loads, without its overhead on lines that are sound."""
    line = line.strip(" \t\r\n")
    try:
        fields, end = _scan_json(line, 0)
    except StopIteration:
        end = -1
    return fields if end == len(line) else json.loads(line)


def _parse_or_none(line: str):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


class JsonlSource(_LinesSource):
    """A JSON object a line: {"image": .., "caption": ..}, {"text": ..} or {"segments": [..]}."""

    expects = 'a line {"image": "path.png", "caption": "text"}, {"text": "..."} or {"segments": [...]}'

    def _cut(self, file: int) -> str:
        before = self.count
        digest = super()._cut(file)
        fields = check_json_lines(self.files[file], self.count - before)
        if file == 0 and self.fields.find_image(fields) == FILE_NAME != self.fields.image:
            logger.info("%s: field %s is the image; --image-field gives another.", self.files[file], FILE_NAME)
        return digest

    def _parser(self, part: Part):
        names, locate = self.fields, self._locator(part.file)

        def parse(line: str, key: str, source: str) -> Entry:
            try:
                fields = decode_json(line)
            except (ValueError, RecursionError) as error:
                return BadInput(key, source, f"not JSON: {error}")
            if not isinstance(fields, dict):
                return BadInput(key, source, f"not a JSON object but {type(fields).__name__}")
            return make_document(fields, key, source, names, locate)

        return parse

    def _find_texts(self, lines: list[bytes]) -> list[str] | None:
        """Lines of nothing but {"text": ..} are parsed as one array, at half the cost.

        Each line begins with { and each but the last ends with }. No string holds a bare newline and no value
        follows a comma in an object: where two lines make one object, it is of more than a text, a list among its
        values. Where a line makes two objects, there are more objects than lines.
        """
        if self.fields.caption == "text":  # a caption, whose picture is missing
            return None
        content = b",".join(lines)
        if not content.startswith(b"{") or content.count(b"}\n,{") != len(lines) - 1:
            return None
        try:
            rows = _decode_pairs(f"[{content.decode()}]")
            texts = [text for ((name, text),) in rows if name == "text"]
        except (ValueError, RecursionError, TypeError):  # some line has more, or a fault that its own parse names
            return None
        return texts if len(rows) == len(lines) == len(texts) and _are_texts(texts) else None


class TextLinesSource(_LinesSource):
    """Plain text, a document a line."""

    expects, external = "a line of text", False

    def check_no_table(self) -> None:
        """ValueError where a file begins as JSON Lines or a table does: its lines would be read as plain text."""
        for path in self.files:
            with open_file(path) as content:
                line = content.readline(1 << 16).removeprefix(BYTE_ORDER_MARK).decode(errors="replace").strip()
            is_json = line.startswith("{") and line.endswith("}") and isinstance(_parse_or_none(line), dict)
            columns = max((line.split(mark) for mark in "\t,;|"), key=len)
            is_table = len(columns) > 1 and self.fields.find_image(dict.fromkeys(columns)) in columns
            if is_json or is_table:
                name = "jsonl" if is_json else "csv"
                raise ValueError(
                    f"--input {path} begins with {shorten(line, 60)!r}; give --format {name} to read its fields, or "
                    f"--format lines to read its lines as plain text."
                )

    def _parser(self, part: Part):
        return lambda line, key, source: check_document(RawText(key, source, [line.rstrip("\r\n")]))

    def _find_texts(self, lines: list[bytes]) -> list[str] | None:
        try:
            texts = [line.decode().rstrip("\r\n") for line in lines]
        except UnicodeDecodeError:
            return None
        return texts if _are_texts(texts) else None
