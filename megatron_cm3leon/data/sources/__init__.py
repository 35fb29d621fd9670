"""Raw readers: a corpus in any of these formats, cut into fixed parts.

    tar        WebDataset tars as img2dataset writes them: <key>.jpg, <key>.txt, <key>.json
    folder     img.png next to img.txt, at any depth, in the order of their names; linked folders are followed
    jsonl      {"image": "relative/path.png", "caption": "text", ...}, {"text": ...} or {"segments": [...]} per line
    csv        the same columns with a header, separated by commas, semicolons, tabs or |
    parquet    the same columns
    lines      plain text, one document per line
    texts      a folder of .txt and .md files, one document each

Images are paths relative to the file that lists them, data: URIs, base64, or bytes in Parquet. Inputs are local paths
or URLs that fsspec opens, or patterns of them. A reader yields every input: as a RawDocument, or as a BadInput or
Filtered with the reason.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_cm3leon.data.sources.base import FileSource, Source
from megatron_cm3leon.data.sources.contents import (
    ENDINGS,
    choose_format,
    explain_compressed,
    explain_ending,
    warn_of_compressed,
    warn_of_images_without_row,
)  # fmt: skip
from megatron_cm3leon.data.sources.documents import (
    IMAGE_ENDINGS,
    KINDS,
    BadInput,
    Entry,
    Fields,
    Filtered,
    RawDocument,
    RawImage,
    RawInstruction,
    RawPair,
    RawText,
    RawTexts,
)  # fmt: skip
from megatron_cm3leon.data.sources.embedded import shorten
from megatron_cm3leon.data.sources.files import find_path_kind, join_path, list_folder, open_file, read_image_bytes
from megatron_cm3leon.data.sources.folders import FolderSource, TextFilesSource
from megatron_cm3leon.data.sources.lines import JsonlSource, TextLinesSource
from megatron_cm3leon.data.sources.patterns import expand_inputs
from megatron_cm3leon.data.sources.tables import CsvSource, ParquetSource
from megatron_cm3leon.data.sources.tars import TarSource

__all__ = [
    "FORMATS",
    "IMAGE_ENDINGS",
    "KINDS",
    "BadInput",
    "Entry",
    "Fields",
    "Filtered",
    "FolderSource",
    "JsonlSource",
    "RawDocument",
    "RawImage",
    "RawInstruction",
    "RawPair",
    "RawText",
    "RawTexts",
    "Source",
    "open_source",
    "read_image_bytes",
    "shorten",
]  # fmt: skip

_FILES: dict[str, Callable[..., FileSource]] = {
    "tar": TarSource,
    "parquet": ParquetSource,
    "csv": CsvSource,
    "lines": TextLinesSource,
    "jsonl": JsonlSource,
}
_FOLDERS: dict[str, Callable[[str, int, Sequence[str]], Source]] = {"folder": FolderSource, "texts": TextFilesSource}
FORMATS = ("auto", *_FILES, *_FOLDERS)


def open_source(
    inputs: str | Path | Sequence[str | Path], part_size: int, form: str = "auto", fields: Fields = Fields()  # noqa: B008
) -> Source:  # fmt: skip
    """Open `--input`: one folder, or files of one format in the given order; ValueError if there is nothing to read.

    Patterns (`part{0..9}.tar`, `part*.tar`, `~/x`) are expanded. `part_size`: inputs per part. `form` is one of
    FORMATS; auto chooses by file extension (for a folder: `choose_format`).
    """
    if part_size < 1:
        raise ValueError(f"--part-size ({part_size}) must be at least 1.")
    paths = expand_inputs([inputs] if isinstance(inputs, str | Path) else inputs)
    kinds = {path: find_path_kind(path) for path in paths}
    for path, kind in kinds.items():
        if not kind:
            several = " Several inputs are separated by spaces." if "::" in path else ""
            raise ValueError(
                f"--input {path} does not exist; give a JSONL file or a folder of images and captions.{several}"
            )
    if "folder" in kinds.values():
        if len(paths) > 1:
            raise ValueError(f"--input must be one folder, or files; of its {len(paths)} values, one is a folder.")
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
    names = list_folder(path)
    if form == "auto":
        form, files, fields = choose_format(path, names, fields)
        warn_of_compressed(path, names)
    elif form in _FILES:
        files = [name for name in names if name.lower().endswith(ENDINGS[form])]
        if not files:
            packed = (name for name in names if os.path.splitext(name)[0].lower().endswith(ENDINGS[form]))
            raise ValueError(
                next(filter(None, (explain_compressed(join_path(path, name)) for name in packed)), "")
                or f"--input {path} holds no {' or '.join(ENDINGS[form])} file, which --format {form} reads."
            )
    if form in _FOLDERS:
        return _FOLDERS[form](path, part_size, names)
    source = _FILES[form]([join_path(path, name) for name in files], part_size, fields, path)
    if fields.image == "file_name":
        warn_of_images_without_row(path, names, source.count)
    return source


def _open_files(paths: list[str], part_size: int, form: str, fields: Fields) -> Source:
    for path in paths:
        if fault := explain_compressed(path) or (form == "auto" and explain_ending(path)):
            raise ValueError(fault)
    if form == "auto":
        forms = {path: _guess_form(path) for path in paths}
        if len(set(forms.values())) > 1:
            shown = ", ".join(f"{os.path.basename(path)}: {name}" for path, name in list(forms.items())[:4])
            raise ValueError(f"--input: files of several formats ({shown}); preprocess each format by itself.")
        source = _FILES[forms[paths[0]]](paths, part_size, fields)
        if isinstance(source, TextLinesSource):
            source.check_no_table()
        return source
    return _FILES[form](paths, part_size, fields)


def _guess_form(path: str) -> str:
    """Format by the file extension; files with other extensions are JSON Lines if they begin with {."""
    form = next((name for name, endings in ENDINGS.items() if path.lower().endswith(endings)), "")
    if not form:
        with open_file(path) as content:
            start = content.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        if start and not start.startswith(b"{"):
            ending = os.path.splitext(path)[1]
            raise ValueError(
                f"--input {path} {f'ends with {ending}' if ending else 'has no ending'}, which is none of the formats "
                f"that are read; convert it, or give its format: --format {', '.join(_FILES)}."
            )
    return form or "jsonl"
