"""Files of the raw input: local paths, and URLs of whatever fsspec opens (s3://, gs://, memory:// ...)."""

import codecs
import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import fsspec

from megatron_cm3leon.data.sources.documents import Picture

MAX_BYTES = 1 << 28
"""A picture or text file above this is refused: one bad input must not fill the memory."""
BYTE_ORDER_MARK = codecs.BOM_UTF8


def is_url(path: str) -> bool:
    return "://" in path or "::" in path


@lru_cache(64)  # an archive's file system closes it when nobody holds it any more, the reader of a member included
def _open_store(url: str):
    """(file system, path in it); ValueError where this machine lacks what the URL needs."""
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url} needs a package that is not installed: {error}.") from error


def open_file(path: str) -> BinaryIO:
    """Open for reading bytes."""
    if not is_url(path):
        return open(path, "rb")
    store, place = _open_store(path)
    return store.open(place, "rb")


def read_file(path: str) -> bytes:
    """A small file's content; ValueError when it is none, OSError when it cannot be read."""
    if is_url(path):
        store, place = _open_store(path)
        size = store.info(place)["size"] or 0
    else:
        local = Path(path)
        if local.exists() and not local.is_file():
            raise ValueError("not a regular file")  # a named pipe would never end
        size = local.stat().st_size
    check_size(size)
    return store.cat_file(place) if is_url(path) else local.read_bytes()


def read_picture(picture: Picture) -> bytes:
    """A picture's bytes; ValueError or OSError when there are none."""
    if picture.content is None:
        return read_file(picture.path)
    check_size(len(picture.content))
    return picture.content


def check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"{size:,} bytes are more than the {MAX_BYTES:,} that are read")


def check_encoding(path: str) -> None:
    """ValueError for a text file in UTF-16 or UTF-32, of which no line can be read."""
    with open_file(path) as content:
        start = content.read(64)
    start = start[: len(start) // 2 * 2]
    little, big = (any(start[first::2]) and not any(start[1 - first :: 2]) for first in (0, 1))
    encoding = "UTF-16LE" if little else "UTF-16BE" if big else ""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "UTF-16"
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        encoding = "UTF-32"
    if encoding:
        raise ValueError(f"{path} is {encoding}, not UTF-8; convert it: iconv -f {encoding} -t UTF-8 OLD > NEW.")


def measure_file(path: str) -> int:
    """Size in bytes; -1 for what is no file."""
    if is_url(path):
        store, place = _open_store(path)
        return store.info(place)["size"] if store.isfile(place) else -1
    return os.stat(path).st_size if os.path.isfile(path) else -1


def identify_file(path: str) -> str:
    """SHA-256 of a file's name, size and 64 blocks of 4 KiB all over it: for files too large to be read twice."""
    size = measure_file(path)
    digest = hashlib.sha256(f"{path.rpartition('/')[2]} {size}".encode())
    with open_file(path) as content:
        for number in range(64):
            content.seek(max(0, size - 4096) * number // 63)
            digest.update(content.read(4096))
    return digest.hexdigest()


def find_kind(path: str) -> str:
    """`file`, `folder`, or "" where there is nothing."""
    if is_url(path):
        store, place = _open_store(path)
        return "folder" if store.isdir(place) else "file" if store.exists(place) else ""
    return "folder" if os.path.isdir(path) else "file" if os.path.isfile(path) else ""


def list_folder(path: str) -> list[str]:
    """Relative names of all files at any depth, hidden ones left out, sorted."""
    found = []
    if is_url(path):
        store, place = _open_store(path)
        place = place.rstrip("/")
        found = [name[len(place) :].lstrip("/") for name in store.find(place)]
        return sorted(name for name in found if not any(part.startswith(".") for part in name.split("/")))
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        start = "" if folder == path else os.path.relpath(folder, path) + os.sep
        found += [start + name for name in files if not name.startswith(".")]
    return sorted(found)


def join(folder: str, name: str) -> str:
    """`name` as seen from `folder`; a URL or an absolute path stays what it is."""
    if is_url(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def make_absolute(path: str | Path) -> str:
    return str(path) if is_url(str(path)) else os.path.abspath(path)


def find_common_folder(files: list[str]) -> str:
    """The folder that holds all these files."""
    folders = [file.rpartition("/")[0].split("/") for file in files]
    shared = folders[0]
    for folder in folders[1:]:
        length = next((n for n, (a, b) in enumerate(zip(shared, folder, strict=False)) if a != b), len(folder))
        shared = shared[:length]
    return "/".join(shared)
