"""Tables: CSV with a header, and Parquet. Their columns correspond to the fields of JSON Lines."""

import csv
import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_cm3leon.data.sources.base import FileSource, Part
from megatron_cm3leon.data.sources.documents import CAPTION_FIELDS, BadInput, Entry
from megatron_cm3leon.data.sources.embedded import shorten
from megatron_cm3leon.data.sources.files import BYTE_ORDER_MARK, MAX_BYTES, check_encoding, identify_file, open_file
from megatron_cm3leon.data.sources.rows import Locate, make_document

logger = logging.getLogger(__name__)
_ROWS_AT_ONCE = 64
_DELIMITERS = (",", ";", "\t", "|")
_UNUSUAL = {";": "a semicolon", "|": "a vertical bar"}
_SEP_LINE = re.compile(rb'"?sep=(.)"?\r?\n')
"""First line of a file that gives the separator to Excel."""
_NO_VALUE = (ValueError, OverflowError, LookupError, pa.ArrowException)
"""Errors of pyarrow for values that Python cannot represent."""


@dataclass(frozen=True)
class _Style:
    """The dialect of a CSV file."""

    delimiter: str
    begin: int = 0
    """Bytes before the header."""
    trim: bool = False
    """Whether a space follows each separator."""
    columns: tuple[str, ...] = ()


class CsvSource(FileSource):
    """Records as RFC 4180 writes them: a quoted field may hold newlines.

    The separator is the one of comma, semicolon, tab and | that gives a header with known columns, or that of a first
    line sep=;. If a space follows the separators in the header, one is expected in the records, too.
    """

    expects = "a header with the columns image and caption (or text), and a record"

    def __init__(self, *arguments, **options) -> None:
        self._styles: dict[int, _Style] = {}
        super().__init__(*arguments, **options)

    def _cut(self, file: int) -> str:
        check_encoding(self.files[file])
        style = self._styles[file] = self._find_style(file)
        digest, position, records = hashlib.sha256(), style.begin, -1  # the first is the header
        begins: list[int] = []
        with open_file(self.files[file]) as content:
            digest.update(content.read(style.begin))
        for raw, blank in self._records(file, style.begin, style):
            digest.update(raw)
            if not blank:
                if records >= 0 and records % self.part_size == 0:
                    begins.append(position)
                records += 1
            position += len(raw)
        if records > 0:
            self._check_header(file, style.columns)  # its errors are reported before any work
            if file == 0 and (style.delimiter in _UNUSUAL or style.trim):
                separator = _UNUSUAL.get(style.delimiter, repr(style.delimiter)) + (" and space" if style.trim else "")
                logger.info("%s: the separator of its columns (the delimiter) is %s.", self.files[file], separator)
        self._add_parts(file, begins, max(records, 0))
        return digest.hexdigest()

    def _read(self, part: Part) -> Iterator[Entry]:
        name, locate = self.name_of(part.file), self._locator(part.file)
        style = self._styles[part.file]
        records = (raw for raw, blank in self._records(part.file, part.begin, style) if not blank)
        for number, raw in zip(range(part.inputs or 0), records, strict=False):
            key, source = f"{part.first + number:08d}", f"{name}:record {part.number + number + 1}"
            try:
                values = _parse(raw, style)
            except UnicodeDecodeError as error:
                yield BadInput(key, source, f"not UTF-8: byte {error.start} of the record cannot be decoded")
                continue
            except csv.Error as error:
                lines = len(raw.splitlines())
                yield BadInput(key, source, f"not CSV: {error} ({lines} lines)")
                continue
            if len(values) != len(style.columns):
                yield BadInput(key, source, f"not CSV: {len(values)} fields, the header has {len(style.columns)}")
                continue
            yield make_document(dict(zip(style.columns, values, strict=True)), key, source, self.fields, locate)

    def _find_style(self, file: int) -> _Style:
        """The first style in which the header has a known column, otherwise the one with the most columns."""
        with open_file(self.files[file]) as content:
            line = content.readline(64)
        usual = "\t" if self.files[file].lower().endswith(".tsv") else ","
        delimiters, begin = (usual, *(other for other in _DELIMITERS if other != usual)), 0
        if given := _SEP_LINE.fullmatch(line.removeprefix(BYTE_ORDER_MARK)):
            delimiters, begin = (given[1].decode("latin-1"),), len(line)
        styles = [self._read_header(file, _Style(delimiter, begin)) for delimiter in delimiters]
        most = max(styles, key=lambda style: len(style.columns))
        return next((style for style in styles if self.fields.are_in(style.columns)), most)

    def _read_header(self, file: int, style: _Style) -> _Style:
        """`style` with the names of the columns; ValueError if they cannot be decoded."""
        raw, _ = next(self._records(file, style.begin, style), (b"", True))
        try:
            plain, trimmed = (
                _parse(raw.removeprefix(BYTE_ORDER_MARK), replace(style, trim=trim)) for trim in (False, True)
            )
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.files[file]} is not UTF-8: byte {error.start} of its header cannot be decoded; convert it, for "
                f"example: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW."
            ) from error
        except csv.Error:
            return style
        known = [[name for name in names if self.fields.are_in([name])] for names in (plain, trimmed)]
        trim = len(known[1]) > len(known[0])
        names = (
            name.rstrip() if self.fields.are_in([name.rstrip()]) else name for name in (trimmed if trim else plain)
        )
        return replace(style, trim=trim, columns=tuple(names))

    def _check_header(self, file: int, columns: tuple[str, ...]) -> None:
        """ValueError if column names repeat, or none is known."""
        twice = sorted({name for name in columns if name and columns.count(name) > 1})
        if twice or not columns:
            fault = f"has the column {twice[0]!r} twice" if twice else "begins with a blank line, not with a header"
            raise ValueError(f"{self.files[file]} {fault}; its first line must name each column once.")
        if not self.fields.are_in(columns):
            what = "is one column" if len(columns) == 1 else f"has {len(columns)} columns"
            raise ValueError(
                f"{self.files[file]}: its header {what}, {shorten(', '.join(map(repr, columns)), 200)}, and none of "
                f"them is image, caption or text. The first line must name the columns, separated by comma, semicolon, "
                f"tab or |; for columns with other names, give --image-field and --caption-field."
            )

    def _records(self, file: int, begin: int, style: _Style) -> Iterator[tuple[bytes, bool]]:
        """Bytes of each record from `begin` on, and whether it is a blank line."""
        csv.field_size_limit(MAX_BYTES)
        with open_file(self.files[file]) as content:
            content.seek(begin)
            lines: list[bytes] = []
            reader = csv.reader(_note_lines(content, lines), delimiter=style.delimiter, skipinitialspace=style.trim)
            try:
                for row in reader:
                    yield b"".join(lines), not row
                    lines.clear()
            except csv.Error as error:
                cause = "a quote in it may not be closed."
                if "new-line" in str(error):
                    cause = "it has a carriage return outside quotes without a line feed after it."
                raise ValueError(
                    f"{self.files[file]}: the record that begins with {lines[0][:60]!r} is not valid CSV ({error}): "
                    f"{cause} Fix the file."
                ) from error


def _parse(raw: bytes, style: _Style) -> list[str]:
    """Fields of a record; UnicodeDecodeError or csv.Error if it is damaged."""
    text = raw.decode("utf-8")
    rows = list(csv.reader([text], delimiter=style.delimiter, skipinitialspace=style.trim, strict=True))
    return rows[0] if rows else []


def _note_lines(content: BinaryIO, lines: list[bytes]) -> Iterator[str]:
    """Lines for a csv.reader, which reads only those of its record; their bytes are appended to `lines`."""
    while line := content.readline():
        lines.append(line)
        yield line.decode("latin-1")  # separators and quotes have the same positions as in UTF-8


class ParquetSource(FileSource):
    """Rows with the path or bytes of an image and a caption, or with a text or segments."""

    expects = "a row with the columns image and caption (or text, or segments)"

    def _cut(self, file: int) -> str:
        path = self.files[file]
        try:
            with open_file(path) as content, pq.ParquetFile(content) as table:
                rows = table.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            count = self.count or 0
            self._parts.append(Part(file, -1, 0, count, 1))  # one input that cannot be read: quarantined
            self.count = count + 1
            rows = -1
        self._add_parts(file, list(range(0, rows, self.part_size)), max(rows, 0))
        return identify_file(path)

    def _read(self, part: Part) -> Iterator[Entry]:
        name, locate, number = self.name_of(part.file), self._locator(part.file), part.number
        inputs = part.inputs or 0
        try:
            with open_file(self.files[part.file]) as content, pq.ParquetFile(content) as table:
                needed = self._find_needed(table.schema_arrow.names)
                for fields in _read_rows(table, part.begin, inputs):
                    key, source = f"{part.first + number - part.number:08d}", f"{name}:row {number + 1}"
                    given = {column: value for column, value in fields.items() if value is not None or column == needed}
                    yield self._make_document(part, given, key, source, locate)
                    number += 1
        except (pa.ArrowException, OSError) as error:
            for lost in range(number, part.number + inputs):  # rows after the damage cannot be read, either
                key, source = f"{part.first + lost - part.number:08d}", f"{name}:row {lost + 1}"
                yield BadInput(key, source, f"damaged Parquet file: {error}")

    def _make_document(self, part: Part, fields: dict, key: str, source: str, locate: Locate) -> Entry:
        """The document of a row of `part`."""
        return make_document(fields, key, source, self.fields, locate)

    def _find_needed(self, columns: list[str]) -> str:
        """The image column if "text" holds captions, "" otherwise: a caption without an image is not a text."""
        captions = [self.fields.caption] if self.fields.caption else CAPTION_FIELDS
        if any(name in columns for name in captions if name != "text"):
            return ""
        return self.fields.find_image(dict.fromkeys(columns))


def _read_rows(table: pq.ParquetFile, begin: int, count: int) -> Iterator[dict]:
    """Rows [begin, begin + count), a few at a time, from the row groups that hold them."""
    groups: list[int] = []
    skip = position = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if position + rows > begin and position < begin + count:
            skip = skip if groups else begin - position
            groups.append(group)
        position += rows
    with closing(table.iter_batches(_ROWS_AT_ONCE, row_groups=groups)) as batches:
        for batch in batches:
            if skip >= len(batch):
                skip -= len(batch)
                continue
            rows = _to_rows(batch.slice(skip, count))
            skip = 0
            count -= len(rows)
            yield from rows
            if not count:
                return


def _to_rows(batch: pa.RecordBatch) -> list[dict]:
    """As to_pylist, but with text for values that Python cannot represent (nanoseconds, years above 9999)."""
    try:
        if not any(_has_nanoseconds(field.type) for field in batch.schema):
            return batch.to_pylist()
    except _NO_VALUE:
        pass
    columns = [[_to_value(scalar) for scalar in column] for column in batch.columns]
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _has_nanoseconds(kind: pa.DataType) -> bool:
    """Whether a type is or contains timestamps or durations in nanoseconds."""
    return any(f"{name}[ns" in str(kind) for name in ("timestamp", "duration"))


def _as_python(scalar: pa.Scalar) -> Any:
    """As as_py, but without pandas' types, which it returns for nanoseconds where pandas is installed."""
    if not scalar.is_valid or not _has_nanoseconds(scalar.type):
        return scalar.as_py()
    if isinstance(scalar, pa.TimestampScalar) and scalar.value % 1000 == 0:
        return scalar.cast(pa.timestamp("us", scalar.type.tz)).as_py()
    if isinstance(scalar, pa.DurationScalar) and scalar.value % 1000 == 0:
        return scalar.cast(pa.duration("us")).as_py()
    raise ValueError("Python has no nanoseconds")


def _to_value(scalar: pa.Scalar) -> Any:
    """As as_py; where that fails: nested values one by one, text that is not UTF-8 as bytes, others as text."""
    try:
        return _as_python(scalar)
    except _NO_VALUE:
        if isinstance(scalar, pa.StructScalar):
            return {name: _to_value(value) for name, value in scalar.items()}
        if isinstance(scalar, pa.ListScalar):
            return [_to_value(value) for value in scalar.values]
        if isinstance(scalar, pa.DictionaryScalar | pa.ExtensionScalar):
            return _to_value(scalar.value)
        if isinstance(scalar, pa.StringScalar | pa.LargeStringScalar | pa.StringViewScalar):
            return scalar.as_buffer().to_pybytes()
        try:
            return scalar.cast(pa.string()).as_py()
        except _NO_VALUE:
            return str(scalar.value)
