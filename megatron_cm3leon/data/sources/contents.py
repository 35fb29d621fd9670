"""What the names in a folder say: in which format it is read, and what of it is not read."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from unicodedata import normalize

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_cm3leon.data.sources.documents import PICTURE_ENDINGS, PICTURE_FIELDS, UNREAD_ENDINGS, Fields
from megatron_cm3leon.data.sources.files import join_listed, open_file

logger = logging.getLogger(__name__)
ENDINGS = {
    "tar": (".tar",),
    "parquet": (".parquet",),
    "csv": (".csv", ".tsv"),
    "lines": (".txt",),
    "jsonl": (".jsonl", ".ndjson", ".json"),
}
"""Of the files of each format."""
_IMAGES = (*PICTURE_ENDINGS, *UNREAD_ENDINGS)
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tgz", ".lz4", ".7z", ".rar", ".zstd", ".lzma", ".txz", ".tbz2")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Tables that Hugging Face's imagefolder keeps beside the images that their column file_name names."""


def choose_format(folder: str, names: Sequence[str], fields: Fields) -> tuple[str, list[str], Fields]:
    """Format of a folder that holds files of these names: (format, the files that are read, names of their fields).

    Tars go first; then Parquet files, unless they only describe images that have captions beside them (as those of
    img2dataset's `--output_format files` do); then images with captions, or with a table of imagefolder. ValueError
    names what is there if it is none of these.
    """
    tars = _select(names, ENDINGS["tar"])
    images = _select(names, _IMAGES)
    if tars:
        _warn(folder, images, "images beside the tars are not read; --format folder reads these")
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
            logger.info("--input %s: %s without images; read as with --format folder.", folder, _show(tables))
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
            "--input %s: %d images, but %d rows in the metadata file: an image without a row is not read.",
            folder, len(images), rows,
        )  # fmt: skip


def explain_compressed(path: str) -> str:
    """Why a compressed file is not read; "" if it is none."""
    if not path.partition("::")[0].lower().endswith(_COMPRESSED):
        return ""
    return f"--input {path} is compressed; unpack it first, as parts begin in the middle of a file."


def explain_unread(folder: str, names: Sequence[str]) -> str:
    """What a folder holds in which nothing can be read, and the remedy."""
    for name in names:
        if fault := explain_ending(join_listed(folder, name)):
            return fault
    for form, what in (("jsonl", "as lines of JSON"), ("csv", "as tables")):
        if files := _select(names, ENDINGS[form]):
            return (
                f"--input {folder} holds no image and no tar, but {_show(files)}; --format {form} reads these {what}."
            )
    for name in names:
        if fault := explain_compressed(join_listed(folder, name)):
            return fault
    if files := _select(names, ENDINGS["lines"]):
        return f"--input {folder} holds no image, but {_show(files)}; --format texts reads each as a document."
    endings = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in names)
    there = ", ".join(f"{ending} ({count})" for ending, count in endings.most_common(4)) or "no file"
    return (
        f"--input {folder} holds {there}, which are not read; expected images ({', '.join(PICTURE_ENDINGS[:4])} ...) "
        f"with .txt captions beside them, tars or Parquet files."
    )


def explain_ending(path: str) -> str:
    """Why a file whose ending belongs to a format that is not read cannot be read; "" for other files."""
    if path.lower().endswith((".arrow", ".feather")):
        remedy = 'datasets.load_from_disk(FOLDER).to_parquet("x.parquet")'
        return f"--input {path} is an Arrow file, which is not read; convert it to Parquet, such as with {remedy}."
    return ""


def _refuse_lone_table(folder: str, names: Sequence[str]) -> None:
    """ValueError where no image has a caption beside it and a file is there that may list them."""
    tables = _select(names, (*ENDINGS["jsonl"], *ENDINGS["csv"]))
    if tables:
        raise ValueError(
            f"--input {folder} holds images without captions beside them. If {tables[0]} lists them, give that file: "
            f"--input {join_listed(folder, tables[0])}."
        )


def _have_captions(names: Sequence[str], images: Sequence[str]) -> bool:
    """Whether an image has a .txt or .json of its name beside it."""
    stems = {normalize("NFC", os.path.splitext(name)[0]) for name in images}
    return any(
        normalize("NFC", os.path.splitext(name)[0]) in stems
        for name in names
        if name.lower().endswith((".txt", ".json"))
    )


def _hold_images(folder: str, tables: Iterable[str], fields: Fields) -> bool:
    """Whether a Parquet file has a column of images."""
    wanted = {fields.image} if fields.image else {*PICTURE_FIELDS, "segments"}
    for name in tables:
        try:
            with open_file(join_listed(folder, name)) as content, pq.ParquetFile(content) as table:
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
