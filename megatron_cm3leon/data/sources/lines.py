"""Files of lines: JSONL, and plain text with a document a line. A blank line is no input."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator
from itertools import islice

import numpy as np

from megatron_cm3leon.data.sources.base import FileSource, Part
from megatron_cm3leon.data.sources.documents import BadInput, Entry, RawText, check_document, make_document
from megatron_cm3leon.data.sources.files import open_file

_CHUNK_BYTES = 1 << 22
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_scan_json = json.JSONDecoder().scan_once


class _LinesSource(FileSource):
    def _cut(self, file: int) -> str:
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

    def _read(self, part: Part) -> Iterator[Entry]:
        name, parse, first, ahead = self.name_of(part.file), self._parser(part), part.first, part.number + 1
        with open_file(self.files[part.file]) as content:
            content.seek(part.begin)
            for number, line in enumerate(islice(content, part.inputs)):
                if number == part.begin == 0:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if not line or line.isspace():
                    continue
                key, source = f"{first + number:08d}", f"{name}:{ahead + number}"
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    yield BadInput(key, source, f"not UTF-8: byte {error.start} of the line cannot be decoded")
                    continue
                yield parse(text, key, source)

    @abstractmethod
    def _parser(self, part: Part):
        """A function (line, key, source) -> Entry."""


def decode_json(line: str):
    """json.loads, without its overhead on lines that are sound."""
    line = line.strip(" \t\r\n")
    try:
        fields, end = _scan_json(line, 0)
    except StopIteration:
        end = -1
    return fields if end == len(line) else json.loads(line)


class JsonlSource(_LinesSource):
    """A JSON object a line: {"image": .., "caption": ..}, {"text": ..} or {"segments": [..]}."""

    expects = 'a line {"image": "path.png", "caption": "text"}, {"text": "..."} or {"segments": [...]}'

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


class TextLinesSource(_LinesSource):
    """Plain text, a document a line."""

    expects, external = "a line of text", False

    def _parser(self, part: Part):
        return lambda line, key, source: check_document(RawText(key, source, [line.rstrip("\r\n")]))
