"""Folders that appear under their name when they are whole, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output`, renamed to it at the end, in place of what is there; removed on any error."""
    output = output.resolve()  # what a link leads to, not the link, is what appears
    if output.is_mount():
        raise ValueError(f"{output} is a mount point, which cannot be renamed to; give a folder inside it.")
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
        if error.errno and error.filename is None:  # as where a disk is full
            error.filename = str(output)
        raise
    finally:
        if aside.exists() and not output.exists():
            aside.rename(output)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
