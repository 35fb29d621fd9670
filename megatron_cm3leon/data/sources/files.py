"""Files of the raw input: local paths, and URLs that fsspec opens (s3://, gs://, memory:// ...)."""

import codecs
import hashlib
import logging
import os
import re
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, Literal
from unicodedata import normalize

import fsspec

from megatron_cm3leon.data.sources.documents import RawImage

logger = logging.getLogger(__name__)
MAX_BYTES = 1 << 28
"""Maximum bytes of an image or text file: one bad input must not fill the memory."""
BYTE_ORDER_MARK = codecs.BOM_UTF8


_PROTOCOL = re.compile(r"([A-Za-z][\w+.-]*)://")
_WRAPPERS = ("zip", "tar", "libarchive", "simplecache", "filecache", "blockcache")
"""Protocols that read from another file, so a relative path may follow `::`."""


def is_url(path: str) -> bool:
    """Whether fsspec opens `path`: `s3://...`, or a chain (`simplecache::s3://...`). A local name may hold `::`."""
    first, _, rest = path.partition("::")
    return bool(_PROTOCOL.match(first)) or (
        first in fsspec.available_protocols() and (rest.startswith("/") or bool(_PROTOCOL.match(rest)))
    )


def _split_chain(url: str) -> tuple[str, str]:
    """The first link of a chain of stores, and the rest with its `::`; the rest is "" if `::` is part of a name."""
    first, *links = url.split("::")
    protocol = _PROTOCOL.match(first)
    chained = not protocol or protocol[1] in _WRAPPERS or any(is_url(link) or link.startswith("/") for link in links)
    return (first, url[len(first) :]) if chained else (url, "")


@lru_cache(64)  # an archive is closed when its file system and the readers of its members are no longer used
def _open_store(url: str) -> tuple[Any, str]:
    """(file system of fsspec, path in it); ValueError if this machine lacks a package that the URL requires."""
    try:
        if "::" in url and not _split_chain(url)[1]:
            folder, _, name = url.rpartition("/")  # url_to_fs would read the name as a chain
            store, place = _open_store(folder)
            return store, f"{place.rstrip('/')}/{name}"
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url} requires a package that is not installed: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{url} cannot be opened: {error}.") from error


def open_file(path: str) -> BinaryIO:
    """Open a local file or a URL to read bytes."""
    if not is_url(path):
        return open(path, "rb")
    store, place = _open_store(path)
    return store.open(place, "rb")


def read_file(path: str) -> bytes:
    """Content of a small file; ValueError if it is not a file or too large, OSError if it cannot be read."""
    if is_url(path):
        store, place = _open_store(path)
        size = store.info(place)["size"] or 0
    else:
        local = Path(path)
        if local.exists() and not local.is_file():
            raise ValueError("not a regular file")  # reading a named pipe would never end
        size = local.stat().st_size
    check_size(size)
    return store.cat_file(place) if is_url(path) else local.read_bytes()


def read_image_bytes(image: RawImage) -> bytes:
    """Bytes of an image; ValueError or OSError if they cannot be read.

    One system may write a name with composed letters (NFC) that another system stores decomposed (NFD): if no file has
    the given name, a file whose name differs only in its Unicode form is read.
    """
    if image.content is not None:
        check_size(len(image.content))
        return image.content
    try:
        return read_file(image.path)
    except FileNotFoundError:
        other = "" if image.path.isascii() else _find_other_form(image.path)
        if not other:
            raise
        return read_file(other)


def _find_other_form(path: str) -> str:
    """The file whose path differs from `path` only in its Unicode form; "" if there is none."""
    folder, slash, name = path.rpartition("/")
    forms: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
    same_folder = (folder + slash + normalize(form, name) for form in forms)
    spelled = (normalize(one, folder) + slash + normalize(other, name) for one, other in product(forms, forms))
    return next((found for found in (*same_folder, *spelled) if measure_file(found) >= 0), "")


def check_size(size: int) -> None:
    """ValueError if an image or text file is too large."""
    if size > MAX_BYTES:
        raise ValueError(f"{size:,} bytes are more than the {MAX_BYTES:,} that are read")


def check_encoding(path: str) -> None:
    """ValueError for a text file in UTF-16 or UTF-32, which cannot be read by lines."""
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
    """Size in bytes; -1 if it is not a file."""
    if is_url(path):
        store, place = _open_store(path)
        return store.info(place)["size"] if store.isfile(place) else -1
    return os.stat(path).st_size if os.path.isfile(path) else -1


def identify_file(path: str) -> str:
    """SHA-256 of a file's name, size and 64 evenly spaced blocks of 4 KiB, for files too large to be read twice."""
    size = measure_file(path)
    digest = hashlib.sha256(f"{path.rpartition('/')[2]} {size}".encode())
    with open_file(path) as content:
        for number in range(64):
            content.seek(max(0, size - 4096) * number // 63)
            digest.update(content.read(4096))
    return digest.hexdigest()


def find_path_kind(path: str) -> str:
    """ "file", "folder", or "" if the path does not exist."""
    if is_url(path):
        store, place = _open_store(path)
        return "folder" if store.isdir(place) else "file" if store.exists(place) else ""
    return "folder" if os.path.isdir(path) else "file" if os.path.isfile(path) else ""


def list_folder(path: str) -> list[str]:
    """Relative names of all files at any depth, sorted. Names that begin with a dot are skipped.

    Linked folders are followed after the real ones, and each folder is read once, so links may form loops. Raises
    ValueError if the target of a link without a file extension, which may be a folder, does not exist; OSError if a
    folder cannot be listed.
    """
    found: list[str] = []
    if is_url(path):
        store, place = _open_store(path)
        place = place.rstrip("/")
        found = [name[len(place) :].lstrip("/") for name in store.find(place)]
        return sorted(name for name in found if not any(part.startswith(".") for part in name.split("/")))
    waiting = [path]
    seen: set[tuple[int, int]] = set()
    while waiting:
        start, before = waiting.pop(0), len(found)
        waiting += _walk(path, start, seen, found)
        if len(found) > before and start != path:
            logger.info("--input %s: %d files are read through the link %s.", path, len(found) - before, start)
    return sorted(found)


def _walk(path: str, start: str, seen: set[tuple[int, int]], found: list[str]) -> list[str]:
    """Append the names, relative to `path`, of the files below `start` to `found`; returns the links to folders."""
    links = []
    for folder, folders, files in os.walk(start, onerror=_stop):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        linked = (os.path.join(folder, name) for name in folders)
        links += [link for link in linked if os.path.islink(link) and not _is_loop(link)]
        begin = "" if folder == path else os.path.relpath(folder, path) + os.sep
        for name in files:
            if "." not in name:
                _check_link(os.path.join(folder, name))
        found += [begin + name for name in files if not name.startswith(".")]
    return links


def _is_loop(link: str) -> bool:
    """Whether the target of a link is one of the folders that contain it."""
    holder, target = os.path.realpath(os.path.dirname(link)), os.path.realpath(link)
    if os.path.commonpath([holder, target]) != target:
        return False
    logger.info("%s is a link to a folder that contains it and is not followed.", link)
    return True


def _check_link(file: str) -> None:
    if os.path.islink(file) and not os.path.exists(file):
        raise ValueError(
            f"{file} is a link to {os.readlink(file)}, which does not exist; mount or restore the target, or remove "
            f"the link."
        )


def _stop(error: OSError) -> None:
    raise error


def resolve_name(folder: str, name: str) -> str:
    """Path or URL of `name` relative to `folder`; a URL or an absolute path is returned unchanged."""
    return name if is_url(name) else join_path(folder, name)


def join_path(folder: str, name: str) -> str:
    """Path or URL of a file in the listing of `folder`, whatever characters its `name` holds."""
    if not is_url(folder):
        return os.path.join(folder, name)
    links = folder.split("::") if _split_chain(folder)[1] else [folder]
    place = next((number for number, link in enumerate(links) if _PROTOCOL.match(link)), -1)
    links[place] += name if links[place].endswith("/") else f"/{name}"
    return "::".join(links)


def make_absolute(path: str | Path) -> str:
    """An absolute path, or the URL."""
    path = str(path)
    if "::" not in path:
        path = path.removeprefix("file://")
    return path if is_url(path) else os.path.abspath(path)


def find_common_folder(files: list[str]) -> str:
    """The deepest folder that contains all these files."""
    folders = [file.rpartition("/")[0].split("/") for file in files]
    shared = folders[0]
    for folder in folders[1:]:
        length = next((n for n, (a, b) in enumerate(zip(shared, folder, strict=False)) if a != b), len(folder))
        shared = shared[:length]
    return "/".join(shared)
