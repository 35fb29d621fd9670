"""Preparing the output folder of an index build.

index/embeddings/          vectors of the bank and of the queries (embeddings.py)
index/index.faiss          FAISS index over the bank, and index.faiss.json: how it was built, the measured recall
index/neighbors.npy        the documents that each document may retrieve, scores.npy and table.json beside it (table.py)
index/index.json           what it was built from and how; written last

An index over a bank that another index folder has embedded links these files.
"""

import os
import shutil
from pathlib import Path

from megatron_cm3leon.data.neighbors import CHECKSUMS, INDEX_FILE
from megatron_cm3leon.retrieval.table import TABLE_FILES

FAISS_INDEX, FAISS_DESCRIPTION = "index.faiss", "index.faiss.json"
BANK_FILES = (
    "embeddings/bank.npy",
    "embeddings/bank_identities.npy",
    "embeddings/bank.json",
    FAISS_INDEX,
    FAISS_DESCRIPTION,
)
"""Files of an index folder that depend on the bank alone."""


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Create `folder`, or keep the files of an unfinished build; `overwrite` removes those of any earlier build.

    Raises ValueError if the folder holds a finished index (unless `overwrite`) or files of something else.
    """
    if overwrite:
        (folder / INDEX_FILE).unlink(missing_ok=True)
        for name in ("embeddings", ".table"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (FAISS_INDEX, FAISS_DESCRIPTION, *TABLE_FILES):
            (folder / name).unlink(missing_ok=True)
    elif (folder / INDEX_FILE).exists():
        raise ValueError(f"--output {folder} already holds a finished index; give another folder, or --overwrite.")
    elif folder.exists() and (others := _list_other_files(folder)):
        raise ValueError(
            f"--output {folder} holds other files ({', '.join(others[:3])}{' ...' if len(others) > 3 else ''}); "
            f"give a new or empty folder."
        )
    (folder / "embeddings").mkdir(parents=True, exist_ok=True)


def link_bank_files(source: Path, folder: Path, bank_folder: Path) -> None:
    """Link the BANK_FILES of the index folder `source` into `folder`, or copy them if the file system has no links.

    Raises ValueError if `source` lacks one; `bank_folder` is the folder of the bank's shards, for the message.
    """
    missing = [name for name in BANK_FILES if not (source / name).is_file()]
    if missing:
        raise ValueError(
            f"the index at {source} lacks {missing[0]}: it was built by an earlier version, or is incomplete. "
            f"Give the shards of its bank as --bank, {bank_folder}, to build these files again."
        )
    for name in BANK_FILES:
        if not (folder / name).exists():
            _link(source / name, folder / name)


def _list_other_files(folder: Path) -> list[str]:
    """Names in a folder that do not belong to an index; hidden files are ignored."""
    if not folder.is_dir():
        return [f"{folder.name}, a file"]
    known = {"embeddings", "table", *TABLE_FILES, CHECKSUMS, INDEX_FILE, FAISS_INDEX, FAISS_DESCRIPTION}
    return sorted(path.name for path in folder.iterdir() if path.name not in known and not path.name.startswith("."))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileExistsError:
        return  # another task was faster
    except OSError:
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
