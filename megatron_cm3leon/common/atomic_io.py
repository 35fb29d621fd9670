"""Folders and JSON files that appear under their name when they are complete, or not at all; checksums."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output`, renamed to `output` at the end and removed on any error.

    What `output` held before is replaced. Raises ValueError for a mount point, which cannot be renamed to.
    """
    output = output.resolve()  # the target of a link is replaced, not the link
    if output.is_mount():
        raise ValueError(f"{output} is a mount point, which cannot be replaced; give a folder inside it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.parent / f".{output.name}.tmp-{os.getpid()}"
    aside = output.parent / f".{output.name}.old-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        if output.exists():
            output.rename(aside)
        folder.rename(output)
    except OSError as error:
        if error.errno and error.filename is None:  # for example when the disk is full
            error.filename = str(output)
        raise
    finally:
        if aside.exists() and not output.exists():
            aside.rename(output)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file atomically: it is complete or absent, and on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def add_checksum(content: dict) -> dict:
    """`content` with the SHA-256 of its other fields under "sha256"."""
    rest = json.dumps({name: content[name] for name in content if name != "sha256"}, sort_keys=True)
    return content | {"sha256": hashlib.sha256(rest.encode()).hexdigest()}
