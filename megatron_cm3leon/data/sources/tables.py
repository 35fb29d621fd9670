"""Tables: CSV (tabs in .tsv) with a header, and Parquet. Their columns are the fields of a JSONL line."""

import csv
import hashlib
from collections.abc import Iterator
from contextlib import closing
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_cm3leon.data.sources.base import FileSource, Part
from megatron_cm3leon.data.sources.documents import (
    CAPTION_FIELDS,
    PICTURE_FIELDS,
    BadInput,
    Entry,
    make_document,
)  # fmt: skip
from megatron_cm3leon.data.sources.files import MAX_BYTES, identify_file, open_file

_ROWS_AT_ONCE = 64


class CsvSource(FileSource):
    """Records as RFC 4180 writes them: a quoted field may hold newlines."""

    expects = "a header with the columns image and caption (or text), and a record"

    def _cut(self, file: int) -> str:
        digest, begins, place, records = hashlib.sha256(), [], 0, -1  # the first is the header
        for raw, blank in self._records(file, 0):
            digest.update(raw)
            if not blank:
                if records >= 0 and records % self.part_size == 0:
                    begins.append(place)
                records += 1
            place += len(raw)
        if records > 0:
            self._read_header(file)  # its faults are told before any work
        self._add_parts(file, begins, max(records, 0))
        return digest.hexdigest()

    def _read(self, part: Part) -> Iterator[Entry]:
        name, locate = self.name_of(part.file), self._locator(part.file)
        columns = self._read_header(part.file)
        records = (raw for raw, blank in self._records(part.file, part.begin) if not blank)
        for number, raw in zip(range(part.inputs), records, strict=False):
            key, source = f"{part.first + number:08d}", f"{name}:record {part.number + number + 1}"
            try:
                values = self._parse(raw, part.file)
            except UnicodeDecodeError as error:
                yield BadInput(key, source, f"not UTF-8: byte {error.start} of the record cannot be decoded")
                continue
            except csv.Error as error:
                lines = len(raw.splitlines())
                yield BadInput(key, source, f"not CSV: {error} ({lines} lines)")
                continue
            if len(values) != len(columns):
                yield BadInput(key, source, f"not CSV: {len(values)} fields, the header has {len(columns)}")
                continue
            yield make_document(dict(zip(columns, values, strict=True)), key, source, self.fields, locate)

    def _read_header(self, file: int) -> list[str]:
        """Names of the columns; ValueError where there are none to tell apart."""
        raw, _ = next(self._records(file, 0))
        try:
            columns = self._parse(raw.removeprefix(b"\xef\xbb\xbf"), file)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.files[file]} is not UTF-8: byte {error.start} of its header cannot be decoded; convert it."
            ) from error
        twice = sorted({name for name in columns if name and columns.count(name) > 1})
        if twice or not columns:
            fault = f"has the column {twice[0]!r} twice" if twice else "begins with a blank line, not with a header"
            raise ValueError(f"{self.files[file]} {fault}; its first line has to name each column once.")
        return columns

    def _parse(self, raw: bytes, file: int) -> list[str]:
        rows = list(csv.reader([raw.decode("utf-8")], delimiter=self._delimiter(file), strict=True))
        return rows[0] if rows else []

    def _records(self, file: int, begin: int) -> Iterator[tuple[bytes, bool]]:
        """Bytes of each record from `begin` on, and whether it is a blank line."""
        csv.field_size_limit(MAX_BYTES)
        with open_file(self.files[file]) as content:
            content.seek(begin)
            lines: list[bytes] = []
            reader = csv.reader(_note_lines(content, lines), delimiter=self._delimiter(file))
            try:
                for row in reader:
                    yield b"".join(lines), not row
                    lines.clear()
            except csv.Error as error:
                cause = "a quote that is opened there is never closed?"
                if "new-line" in str(error):
                    cause = "a carriage return stands outside quotes without a line feed behind it."
                raise ValueError(
                    f"{self.files[file]}: the record that begins with {lines[0][:60]!r} is no CSV ({error}): {cause} "
                    f"Mend the file."
                ) from error

    def _delimiter(self, file: int) -> str:
        return "\t" if self.files[file].lower().endswith(".tsv") else ","


def _note_lines(content: BinaryIO, lines: list[bytes]) -> Iterator[str]:
    """Lines for a csv.reader, which takes no more of them than its record needs; their bytes are kept in `lines`."""
    while line := content.readline():
        lines.append(line)
        yield line.decode("latin-1")  # separators and quotes are where they are in UTF-8


class ParquetSource(FileSource):
    """Rows with a picture's path or bytes, a caption, a text or segments."""

    expects = "a row with the columns image and caption (or text, or segments)"

    def _cut(self, file: int) -> str:
        path = self.files[file]
        try:
            with open_file(path) as content, pq.ParquetFile(content) as table:
                rows = table.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            self._parts.append(Part(file, -1, 0, self.count, 1))  # one input that cannot be read: quarantined
            self.count += 1
            rows = -1
        self._add_parts(file, list(range(0, rows, self.part_size)), max(rows, 0))
        return identify_file(path)

    def _read(self, part: Part) -> Iterator[Entry]:
        name, locate, number = self.name_of(part.file), self._locator(part.file), part.number
        try:
            with open_file(self.files[part.file]) as content, pq.ParquetFile(content) as table:
                needed = self._find_needed(table.schema_arrow.names)
                for fields in _read_rows(table, part.begin, part.inputs):
                    key, source = f"{part.first + number - part.number:08d}", f"{name}:row {number + 1}"
                    given = {column: value for column, value in fields.items() if value is not None or column == needed}
                    yield make_document(given, key, source, self.fields, locate)
                    number += 1
        except (pa.ArrowException, OSError) as error:
            for lost in range(number, part.number + part.inputs):  # what follows the damage cannot be read either
                key, source = f"{part.first + lost - part.number:08d}", f"{name}:row {lost + 1}"
                yield BadInput(key, source, f"damaged Parquet file: {error}")

    def _find_needed(self, columns: list[str]) -> str:
        """The column of pictures where "text" holds captions: a row without a picture is no text."""
        captions = [self.fields.caption] if self.fields.caption else CAPTION_FIELDS
        if any(name in columns for name in captions if name != "text"):
            return ""
        return self.fields.find(dict.fromkeys(columns), self.fields.image, PICTURE_FIELDS)


def _read_rows(table: pq.ParquetFile, begin: int, count: int) -> Iterator[dict]:
    """Rows [begin, begin + count), a few at a time, from the row groups that hold them."""
    groups, skip, place = [], 0, 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if place + rows > begin and place < begin + count:
            skip = skip if groups else begin - place
            groups.append(group)
        place += rows
    with closing(table.iter_batches(_ROWS_AT_ONCE, row_groups=groups)) as batches:
        for batch in batches:
            if skip >= len(batch):
                skip -= len(batch)
                continue
            rows = batch.slice(skip, count).to_pylist()
            skip = 0
            count -= len(rows)
            yield from rows
            if not count:
                return
