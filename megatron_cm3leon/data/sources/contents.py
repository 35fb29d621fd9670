"""Format of a folder, from the names of its files; and warnings for the files that are not read."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from unicodedata import normalize

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_cm3leon.data.sources.documents import IMAGE_ENDINGS, IMAGE_FIELDS, UNREAD_ENDINGS, Fields
from megatron_cm3leon.data.sources.files import join_path, open_file

logger = logging.getLogger(__name__)
ENDINGS = {
    "tar": (".tar",),
    "parquet": (".parquet",),
    "csv": (".csv", ".tsv"),
    "lines": (".txt",),
    "jsonl": (".jsonl", ".ndjson", ".json"),
}
"""File extensions of each format."""
_IMAGES = (*IMAGE_ENDINGS, *UNREAD_ENDINGS)
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tgz", ".lz4", ".7z", ".rar", ".zstd", ".lzma", ".txz", ".tbz2")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Tables of Hugging Face's imagefolder: they list the images next to them in the column file_name."""


def choose_format(folder: str, names: Sequence[str], fields: Fields) -> tuple[str, list[str], Fields]:
    """Format of a folder that holds these files: (format, the files that are read, names of their fields).

    Tars come first; then Parquet files, unless they only describe images that have captions next to them (as those of
    img2dataset's `--output_format files` do); then images with captions, or with a table of imagefolder. Raises
    ValueError with the contents of the folder if it holds none of these.
    """
    tars = _select(names, ENDINGS["tar"])
    images = _select(names, _IMAGES)
    if tars:
        _warn(folder, images, "images next to the tars are not read; --format folder reads them")
        return "tar", tars, fields
    captioned = _have_captions(names, images)
    tables = _select(names, ENDINGS["parquet"])
    metadata = [name for name in names if os.path.basename(name) in _METADATA]
    if tables and not metadata and (not captioned or _hold_images(folder, tables, fields)):
        return "parquet", tables, fields
    if images and (captioned or not metadata):
        if not captioned:
            _refuse_lone_table(folder, names)
        elif tables:
            logger.info("--input %s: %s without images; read as --format folder.", folder, _show(tables))
        return "folder", [], fields
    if metadata:
        kinds = {form for form, endings in ENDINGS.items() if _select(metadata, endings)}
        if len(kinds) > 1:
            raise ValueError(
                f"--input {folder} holds {metadata[0]} and {metadata[-1]}; give the files of one format as --input."
            )
        return kinds.pop(), metadata, fields if fields.image else Fields("file_name", fields.caption)
    raise ValueError(explain_unread(folder, names))


def warn_of_compressed(folder: str, names: Iterable[str]) -> None:
    """Log which compressed files of a folder are not read."""
    _warn(folder, _select(names, _COMPRESSED), "compressed files are not read; unpack them first")


def warn_of_images_without_row(folder: str, names: Iterable[str], rows: int | None) -> None:
    """Log if a folder holds more images than its table has rows."""
    images = _select(names, _IMAGES)
    if rows is not None and len(images) > rows:
        logger.warning(
            "--input %s: %d images, but %d rows in the metadata file: images without a row are not read.",
            folder, len(images), rows,
        )  # fmt: skip


def explain_compressed(path: str) -> str:
    """Why a compressed file is not read; "" for other files."""
    if not path.partition("::")[0].lower().endswith(_COMPRESSED):
        return ""
    return f"--input {path} is compressed; unpack it first, because parts begin in the middle of a file."


def explain_unread(folder: str, names: Sequence[str]) -> str:
    """Contents of a folder in which nothing can be read, and the remedy."""
    for name in names:
        if fault := explain_ending(join_path(folder, name)):
            return fault
    for form, what in (("jsonl", "as JSON Lines"), ("csv", "as tables")):
        if files := _select(names, ENDINGS[form]):
            return f"--input {folder} holds no image and no tar, but {_show(files)}; --format {form} reads them {what}."
    for name in names:
        if fault := explain_compressed(join_path(folder, name)):
            return fault
    if files := _select(names, ENDINGS["lines"]):
        return f"--input {folder} holds no image, but {_show(files)}; --format texts reads each one as a document."
    endings = Counter(os.path.splitext(name)[1].lower() or "no extension" for name in names)
    there = ", ".join(f"{ending} ({count})" for ending, count in endings.most_common(4)) or "no file"
    return (
        f"--input {folder} holds {there}, which are not read; expected images ({', '.join(IMAGE_ENDINGS[:4])} ...) "
        f"with .txt captions next to them, tars or Parquet files."
    )


def explain_ending(path: str) -> str:
    """Why a file cannot be read whose extension is of an unsupported format; "" for other files."""
    if path.lower().endswith((".arrow", ".feather")):
        remedy = 'datasets.load_from_disk(FOLDER).to_parquet("x.parquet")'
        return f"--input {path} is an Arrow file, which is not read; convert it to Parquet, for example with {remedy}."
    return ""


def _refuse_lone_table(folder: str, names: Sequence[str]) -> None:
    """ValueError if no image has a caption next to it and the folder has a file that may list the images."""
    tables = _select(names, (*ENDINGS["jsonl"], *ENDINGS["csv"]))
    if tables:
        raise ValueError(
            f"--input {folder} holds images without captions next to them. If {tables[0]} lists them, give that file: "
            f"--input {join_path(folder, tables[0])}."
        )


def _have_captions(names: Sequence[str], images: Sequence[str]) -> bool:
    """Whether an image has a .txt or .json of the same name next to it."""
    stems = {normalize("NFC", os.path.splitext(name)[0]) for name in images}
    return any(
        normalize("NFC", os.path.splitext(name)[0]) in stems
        for name in names
        if name.lower().endswith((".txt", ".json"))
    )


def _hold_images(folder: str, tables: Iterable[str], fields: Fields) -> bool:
    """Whether a Parquet file has a column of images."""
    wanted = {fields.image} if fields.image else {*IMAGE_FIELDS, "segments"}
    for name in tables:
        try:
            with open_file(join_path(folder, name)) as content, pq.ParquetFile(content) as table:
                if wanted & set(table.schema_arrow.names):
                    return True
        except (pa.ArrowException, OSError) as error:
            logger.warning("--input %s: %s is not a Parquet file that can be read: %s.", folder, name, error)
    return False


def _select(names: Iterable[str], endings: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.lower().endswith(endings)]


def _show(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"


def _warn(folder: str, names: Sequence[str], what: str) -> None:
    if names:
        logger.warning("--input %s: %d %s (%s).", folder, len(names), what, _show(names))
