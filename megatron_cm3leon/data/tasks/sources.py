"""Sources of instruction documents: lines, JSON arrays, tables and annotated data sets, whose rows a filler turns into
documents.

With `--all-templates` the input is read once for each template: its parts follow one another, template by template.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_cm3leon.data.sources.base import FileSource, Part
from megatron_cm3leon.data.sources.documents import BadInput, Entry, Fields
from megatron_cm3leon.data.sources.files import (
    BYTE_ORDER_MARK,
    check_encoding,
    join_path,
    open_file,
    read_file,
)  # fmt: skip
from megatron_cm3leon.data.sources.folders import FolderInputs
from megatron_cm3leon.data.sources.lines import LinesSource, Parse, decode_json
from megatron_cm3leon.data.sources.rows import Locate
from megatron_cm3leon.data.sources.tables import ParquetSource
from megatron_cm3leon.data.tasks.annotations import AnnotationFiles, Row, read_rows

_CHUNK_BYTES = 1 << 20
_WHITE = " \t\r\n"


class Filler(Protocol):
    """Turns a row into a document: RecordFiller, ConversationFiller."""

    @property
    def passes(self) -> int:
        """How often the input is read."""

    def describe(self) -> dict:
        """The task, for the manifest."""

    def fill(self, record: object, key: str, source: str, number: int, form: int, locate: Locate) -> Entry:
        """The document of row `number`, in pass `form`."""


@dataclass(frozen=True)
class _PassPart(Part):
    """A part, read for one template."""

    form: int = 0


def _repeat_parts(parts: list[Part], count: int, passes: int) -> list[Part]:
    """The parts of each pass; those of a later pass have later numbers."""
    return [
        _PassPart(part.file, part.begin, part.number, part.first + form * count, part.inputs, form)
        for form in range(passes)
        for part in parts
    ]


class _InstructionSource(FileSource):
    """Files whose rows become instruction documents."""

    expects = "a row with the fields of the task"

    def __init__(self, files: list[str], part_size: int, filler: Filler, folder: str = "", images: str = "") -> None:
        """`images`: folder to which the paths of images are relative ("": that of each file)."""
        self.filler, self.images, self.tasks = filler, images, [filler.describe()]
        super().__init__(files, part_size, Fields(), folder)
        self._inputs = self.count or 0
        self._parts = _repeat_parts(self._parts, self._inputs, filler.passes)
        self.count = self._inputs * filler.passes

    def _image_folder(self, file: int) -> str:
        return self.images or super()._image_folder(file)

    def _fill(self, part: Part, record: object, key: str, source: str, locate: Locate) -> Entry:
        form = part.form if isinstance(part, _PassPart) else 0
        return self.filler.fill(record, key, source, int(key) - form * self._inputs, form, locate)


class LinesOfRows(_InstructionSource, LinesSource):
    """JSON Lines."""

    def _parser(self, part: Part) -> Parse:
        locate = self._locator(part.file)

        def parse(line: str, key: str, source: str) -> Entry:
            try:
                record = decode_json(line)
            except (ValueError, RecursionError) as error:
                return BadInput(key, source, f"not JSON: {error}")
            return self._fill(part, record, key, source, locate)

        return parse

    def _find_texts(self, lines: list[bytes]) -> None:
        return None


class ArrayOfRows(_InstructionSource):
    """A JSON file that is one array; it is read item by item, whatever its size."""

    def _cut(self, file: int) -> str:
        check_encoding(self.files[file])
        begins, items = [], 0
        for begin, _ in read_array(self.files[file]):
            if items % self.part_size == 0:
                begins.append(begin)
            items += 1
        self._add_parts(file, begins, items)
        return _hash_file(self.files[file])

    def _read(self, part: Part) -> Iterator[Entry]:
        name, locate = self.name_of(part.file), self._locator(part.file)
        items = read_array(self.files[part.file], part.begin)
        for number, (_, record) in zip(range(part.inputs or 0), items, strict=False):
            source = f"{name}:item {part.number + number + 1}"
            yield self._fill(part, record, f"{part.first + number:08d}", source, locate)


class ParquetOfRows(_InstructionSource, ParquetSource):
    """A table."""

    def _make_document(self, part: Part, fields: dict, key: str, source: str, locate: Locate) -> Entry:
        return self._fill(part, fields, key, source, locate)

    def _find_needed(self, columns: list[str]) -> str:
        return ""


class AnnotatedSource(_InstructionSource):
    """Files of annotations.py; each is held in memory while its parts are read."""

    def __init__(self, form: str, others: AnnotationFiles, *arguments, **options) -> None:
        """`form`: the format; the rest as for the other sources."""
        self.form, self.others = form, others
        self._rows: tuple[int, Sequence[Row]] = -1, ()
        super().__init__(*arguments, **options)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_rows": (-1, ())}  # a worker reads the rows itself

    def _load_rows(self, file: int) -> Sequence[Row]:
        if self._rows[0] != file:
            self._rows = file, read_rows(self.form, self.files[file], self.others)
        return self._rows[1]

    def _cut(self, file: int) -> str:
        inputs = len(self._load_rows(file))
        self._add_parts(file, list(range(0, inputs, self.part_size)), inputs)
        digests = [_hash_file(path) for path in (self.files[file], self.others.annotations) if path]
        return hashlib.sha256(json.dumps([*digests, self.others.image_name, self.others.split]).encode()).hexdigest()

    def _read(self, part: Part) -> Iterator[Entry]:
        name, locate, rows = self.name_of(part.file), self._locator(part.file), self._load_rows(part.file)
        for number, row in enumerate(rows[part.begin : part.begin + (part.inputs or 0)]):
            key, source = f"{part.first + number:08d}", f"{name}:{row.label}"
            if row.record is None:
                yield BadInput(key, source, row.reason)
            else:
                yield self._fill(part, row.record, key, source, locate)


class Pix2PixSource(FolderInputs):
    """Folders of InstructPix2Pix: prompt.json ({"edit": instruction}) beside SEED_0.jpg and its edited SEED_1.jpg."""

    expects = "a folder with prompt.json, SEED_0.jpg and SEED_1.jpg"

    def __init__(self, folder: str, part_size: int, names: Sequence[str], filler: Filler) -> None:
        """`names`: the files in the folder, from list_folder."""
        self.filler, self.tasks = filler, [filler.describe()]
        super().__init__(folder, part_size, names)
        self._parts = _repeat_parts(self._parts, len(self.names), filler.passes)
        self.count = len(self.names) * filler.passes

    def _list(self, names: Sequence[str]) -> list[str]:
        found = {name: _PIX2PIX.fullmatch(name) for name in names}
        firsts = {name: match for name, match in found.items() if match and match[2] == "0"}
        seconds = {f"{match[1]}_0{match[3]}" for match in found.values() if match and match[2] == "1"}
        return sorted(firsts.keys() | seconds)

    def _files_of(self, name: str) -> list[str]:
        return [name, _name_edited(name), _name_prompt(name)]

    def _read(self, part: Part) -> Iterator[Entry]:
        form = part.form if isinstance(part, _PassPart) else 0
        names = self.names[part.number : part.number + (part.inputs or 0)]
        for number, name in enumerate(names, part.number):
            yield self._fill(name, f"{part.first + number - part.number:08d}", number, form)

    def _read_input(self, name: str, key: str) -> Entry:
        return self._fill(name, key, int(key), 0)

    def _fill(self, name: str, key: str, number: int, form: int) -> Entry:
        prompt = _name_prompt(name)
        try:
            fields = json.loads(read_file(join_path(self.folder, prompt)))
        except FileNotFoundError:
            return BadInput(key, name, f"no instruction: {prompt} is missing beside the image")
        except (OSError, ValueError, RecursionError) as error:
            return BadInput(key, name, f"unreadable instruction: {prompt}: {error}")
        if not isinstance(fields, dict) or "edit" not in fields:
            return BadInput(key, name, f'no instruction: {prompt} has no field "edit"')
        others = {field: value for field, value in fields.items() if field != "edit"}
        record = {**others, "instruction": fields["edit"], "image": name, "edited": _name_edited(name)}
        return self.filler.fill(record, key, name, number, form, lambda path: (path, join_path(self.folder, path)))


_PIX2PIX = re.compile(r"((?:.*/)?[^/]+)_([01])(\.(?:jpg|jpeg|png|webp))", re.IGNORECASE)


def _name_edited(name: str) -> str:
    """The edited image of an image."""
    stem, ending = os.path.splitext(name)
    return f"{stem[:-1]}1{ending}"


def _name_prompt(name: str) -> str:
    return f"{name[: name.rfind('/') + 1]}prompt.json"


def _hash_file(path: str) -> str:
    digest = hashlib.sha256()
    with open_file(path) as content:
        while chunk := content.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def is_array(path: str) -> bool:
    """Whether a file begins as a JSON array."""
    with open_file(path) as content:
        return content.read(64).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")


def read_array(path: str, begin: int = 0) -> Iterator[tuple[int, Any]]:
    """(position in bytes, item) of each item of a JSON array; `begin`: position of the first item, 0 for the file's.

    Raises ValueError if the file is not valid JSON.
    """
    decoder, to_text = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    text, position, offset, complete = "", 0, begin, False
    # `offset` is the position in bytes of text[position].
    with open_file(path) as content:
        content.seek(begin)
        started = begin > 0
        while True:
            while position < len(text) and (text[position] in _WHITE or (started and text[position] == ",")):
                position, offset = position + 1, offset + 1
            if position < len(text) and not started:
                assert text[position] == "[", f"{path} is not an array"
                started, position, offset = True, position + 1, offset + 1
                continue
            if position < len(text) and text[position] == "]":
                return
            try:
                value, end = decoder.raw_decode(text, position)
            except json.JSONDecodeError:  # an item that is not complete yet, or is damaged
                value, end = None, len(text)
            if end < len(text):
                yield offset, value
                offset += len(text[position:end].encode())
                position = end
                continue
            if complete:
                raise ValueError(f"{path} is not valid JSON: the item that begins at byte {offset} cannot be read.")
            # The chunks grow with the item, so that a long one is not scanned many times.
            chunk = content.read(max(_CHUNK_BYTES, len(text) - position))
            complete = not chunk
            try:
                more = to_text.decode(chunk, complete)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8.") from error
            if not offset and not text and more.startswith("\ufeff"):
                more, offset = more[1:], len(BYTE_ORDER_MARK)
            text, position = text[position:] + more, 0
