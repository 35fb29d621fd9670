"""Files of lines: JSON Lines, and plain text with one document per line. Blank lines are skipped."""

import hashlib
import io
import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np

from megatron_cm3leon.data.sources.base import FileSource, Part
from megatron_cm3leon.data.sources.documents import (
    FILE_NAME,
    TEXT_BATCH_CHARACTERS,
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
Parse = Callable[[str, str, str], Entry]
"""(line, key, source) -> input."""
_CHUNK_BYTES = 1 << 22
_scan_json: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
"""Without the regular expression of `decode`; the attribute is not in the type stubs."""
_decode_pairs = json.JSONDecoder(object_pairs_hook=tuple).decode
"""As json.loads, but each object as a tuple of (name, value): a dict would hide a repeated name."""


class LinesSource(FileSource):
    """Files of lines, each of which is an input."""

    def _cut(self, file: int) -> str:
        check_encoding(self.files[file])
        digest, offsets, lines, position, last = hashlib.sha256(), [0], 0, 0, b"\n"
        with open_file(self.files[file]) as content:
            while chunk := content.read(_CHUNK_BYTES):
                digest.update(chunk)
                ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + 1
                first = self.part_size - 1 - lines % self.part_size
                offsets += (position + ends[first :: self.part_size]).tolist()
                lines, position, last = lines + len(ends), position + len(chunk), chunk[-1:]
        if last != b"\n":
            lines += 1
        self._add_parts(file, [offset for offset in offsets if offset < position], lines)
        return digest.hexdigest()

    def _read(self, part: Part) -> Iterator[Entry | RawTexts]:
        name, parse, first, first_line = self.name_of(part.file), self._parser(part), part.first, part.number + 1
        done, inputs = 0, part.inputs or 0
        with open_file(self.files[part.file]) as content:
            content.seek(part.begin)
            # the method of io.IOBase, because `readlines` of fsspec has no limit
            while done < inputs and (lines := io.IOBase.readlines(cast(io.IOBase, content), TEXT_BATCH_CHARACTERS)):
                if done == part.begin == 0:
                    lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
                numbers = range(done, min(done + len(lines), inputs))
                done = numbers.stop
                keys = [f"{first + number:08d}" for number in numbers]
                sources = [f"{name}:{first_line + number}" for number in numbers]
                lines = lines[: len(numbers)]
                if texts := self._find_texts(lines):
                    yield RawTexts(keys, sources, texts, ["{}"] * len(texts))
                else:
                    yield from _read_lines(lines, keys, sources, parse)

    @abstractmethod
    def _parser(self, part: Part) -> Parse:
        """A function (line, key, source) -> Entry."""

    @abstractmethod
    def _find_texts(self, lines: list[bytes]) -> list[str] | None:
        """The text of each line, if every line is valid and holds only a text; None otherwise."""


def _read_lines(lines: list[bytes], keys: list[str], sources: list[str], parse: Parse) -> Iterator[Entry]:
    for line, key, source in zip(lines, keys, sources, strict=True):
        if not line or line.isspace():
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            yield BadInput(key, source, f"not UTF-8: byte {error.start} of the line cannot be decoded")
            continue
        yield parse(text, key, source)


def _are_texts(texts: list[Any]) -> bool:
    """Whether check_document would accept all of them."""
    if set(map(type, texts)) != {str} or not all(texts) or any(map(str.isspace, texts)):
        return False
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # an unpaired surrogate
        return False
    return True


def decode_json(line: str) -> Any:
    """As json.loads, without its overhead for valid lines."""
    line = line.strip(" \t\r\n")
    try:
        fields, end = _scan_json(line, 0)
    except StopIteration:
        end = -1
    return fields if end == len(line) else json.loads(line)


def _parse_or_none(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


class JsonlSource(LinesSource):
    """One JSON object per line: {"image": .., "caption": ..}, {"text": ..} or {"segments": [..]}."""

    expects = 'a line {"image": "path.png", "caption": "text"}, {"text": "..."} or {"segments": [...]}'

    def _cut(self, file: int) -> str:
        before = self.count or 0
        digest = super()._cut(file)
        fields = check_json_lines(self.files[file], (self.count or 0) - before)
        if file == 0 and self.fields.find_image(fields) == FILE_NAME != self.fields.image:
            logger.info("%s: field %s is the image; --image-field chooses another.", self.files[file], FILE_NAME)
        return digest

    def _parser(self, part: Part) -> Parse:
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
        """Lines that hold only {"text": ..} are parsed as one array, which takes half the time.

        Each line begins with { and each but the last ends with }. In JSON, a string holds no unescaped newline, and a
        comma in an object is followed by a name: if two lines form one object, it holds more than a text, with a list
        among its values; if one line holds two objects, there are more objects than lines.
        """
        if self.fields.caption == "text":  # a caption, whose image is missing
            return None
        content = b",".join(lines)
        if not content.startswith(b"{") or content.count(b"}\n,{") != len(lines) - 1:
            return None
        try:
            rows = _decode_pairs(f"[{content.decode()}]")
            texts = [text for ((name, text),) in rows if name == "text"]
        except (
            ValueError,
            RecursionError,
            TypeError,
        ):  # a line has other fields or an error: parsed alone
            return None
        return texts if len(rows) == len(lines) == len(texts) and _are_texts(texts) else None


class TextLinesSource(LinesSource):
    """Plain text, one document per line."""

    expects, external = "a line of text", False

    def check_no_table(self) -> None:
        """ValueError if a file begins like JSON Lines or a table: its lines would be read as plain text."""
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

    def _parser(self, part: Part) -> Parse:
        return lambda line, key, source: check_document(RawText(key, source, [line.rstrip("\r\n")]))

    def _find_texts(self, lines: list[bytes]) -> list[str] | None:
        try:
            texts = [line.decode().rstrip("\r\n") for line in lines]
        except UnicodeDecodeError:
            return None
        return texts if _are_texts(texts) else None
