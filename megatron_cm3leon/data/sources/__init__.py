"""Raw readers: a corpus in any of these forms, cut into fixed parts.

    tar        WebDataset tars as img2dataset writes them: <key>.jpg, <key>.txt, <key>.json
    folder     img.png beside img.txt, at any depth, in the order of their names
    jsonl      {"image": "relative/path.png", "caption": "text", ...}, {"text": ...} or {"segments": [...]} a line
    csv        the same columns with a header, separated by commas, semicolons, tabs or |
    parquet    the same columns
    lines      plain text, a document a line
    texts      a folder of .txt and .md files, a document each

Images are paths, relative to the file that names them, data: URIs, base64, or bytes in Parquet. Inputs are local
paths or URLs that fsspec opens.
A reader yields every input: a RawDocument, or a BadInput or Filtered that says why it is none.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_cm3leon.data.sources.base import Source
from megatron_cm3leon.data.sources.documents import (
    KINDS,
    PICTURE_ENDINGS,
    BadInput,
    Entry,
    Fields,
    Filtered,
    Picture,
    RawDocument,
    RawPair,
    RawText,
    RawTexts,
)  # fmt: skip
from megatron_cm3leon.data.sources.embedded import shorten
from megatron_cm3leon.data.sources.files import find_kind, join, list_folder, make_absolute, read_picture
from megatron_cm3leon.data.sources.folders import FolderSource, TextFilesSource
from megatron_cm3leon.data.sources.lines import JsonlSource, TextLinesSource
from megatron_cm3leon.data.sources.tables import CsvSource, ParquetSource
from megatron_cm3leon.data.sources.tars import TarSource

__all__ = [
    "FORMATS", "KINDS", "PICTURE_ENDINGS", "BadInput", "Entry", "Fields", "Filtered", "FolderSource", "JsonlSource",
    "Picture", "RawDocument", "RawPair", "RawText", "RawTexts", "Source", "open_source", "read_picture",
    "shorten",
]  # fmt: skip

_FILES = {
    "tar": (TarSource, (".tar",)),
    "parquet": (ParquetSource, (".parquet",)),
    "csv": (CsvSource, (".csv", ".tsv")),
    "lines": (TextLinesSource, (".txt",)),
    "jsonl": (JsonlSource, (".jsonl", ".ndjson", ".json")),
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tgz")
_FOLDERS = {"folder": FolderSource, "texts": TextFilesSource}
FORMATS = ("auto", *_FILES, *_FOLDERS)


def open_source(
    inputs: str | Path | Sequence[str | Path], part_size: int, form: str = "auto", fields: Fields = Fields()  # noqa: B008
) -> Source:  # fmt: skip
    """Open `--input`: one folder, or files of one format in the order given; ValueError when there is nothing to read.

    `form` is one of FORMATS; auto goes by the endings of names. A folder that holds tars or Parquet files (as
    img2dataset's output does) is read as those.
    """
    if part_size < 1:
        raise ValueError(f"--part-size ({part_size}) must be at least 1.")
    paths = [make_absolute(path) for path in ([inputs] if isinstance(inputs, str | Path) else inputs)]
    kinds = {path: find_kind(path) for path in paths}
    for path, kind in kinds.items():
        if not kind:
            raise ValueError(f"--input {path} does not exist; give a JSONL file or a folder of pictures and captions.")
    if "folder" in kinds.values():
        if len(paths) > 1:
            raise ValueError(f"--input: give one folder, or files; these are {len(paths)} of which one is a folder.")
        source = _open_folder(paths[0], part_size, form, fields)
    else:
        if form in _FOLDERS:
            raise ValueError(f"--format {form} reads a folder, but --input {paths[0]} is a file.")
        source = _open_files(paths, part_size, form, fields)
    if source.count == 0:
        shown = paths[0] if len(paths) == 1 else f"{paths[0]} ..."
        raise ValueError(f"--input {shown} holds no pair; expected {source.expects}.")
    return source


def _open_folder(path: str, part_size: int, form: str, fields: Fields) -> Source:
    path = path.rstrip("/") or path
    names = list_folder(path) if form not in _FOLDERS else []
    for name in ("tar", "parquet") if form == "auto" else (form,) if form in _FILES else ():
        cls, endings = _FILES[name]
        found = [join(path, file) for file in names if file.lower().endswith(endings)]
        if found:
            return cls(found, part_size, fields, path)
        if form != "auto":
            raise ValueError(f"--input {path} holds no {' or '.join(endings)} file, which --format {form} reads.")
    return _FOLDERS["folder" if form == "auto" else form](path, part_size)


def _open_files(paths: list[str], part_size: int, form: str, fields: Fields) -> Source:
    packed = next((path for path in paths if path.partition("::")[0].lower().endswith(_COMPRESSED)), "")
    if packed:
        raise ValueError(f"--input {packed} is compressed; unpack it first, as parts begin in the middle of a file.")
    if form == "auto":
        forms = {path: _guess_form(path) for path in paths}
        if len(set(forms.values())) > 1:
            shown = ", ".join(f"{os.path.basename(path)}: {name}" for path, name in list(forms.items())[:4])
            raise ValueError(f"--input: files of several formats ({shown}); preprocess each format by itself.")
        source = _FILES[forms[paths[0]]][0](paths, part_size, fields)
        if isinstance(source, TextLinesSource):
            source.check_no_table()
        return source
    return _FILES[form][0](paths, part_size, fields)


def _guess_form(path: str) -> str:
    return next((name for name, (_, endings) in _FILES.items() if path.lower().endswith(endings)), "jsonl")
