"""One part of the input -> its shards, in a worker process (preprocess.py decides which and where).

A part is encoded in fixed batches with one thread, so its bytes do not depend on who does the work. Its
files are written under a temporary name and renamed when whole; its record in `.work/` follows them.
"""

import errno
import functools
import gc
import json
import multiprocessing
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_cm3leon.common.progress import Meter
from megatron_cm3leon.data.preprocess.dedupe import (
    UNUSABLE,
    Duplicates,
    checksum,
    find_unusable,
    hash_parts,
    hashes_path,
    save_array,
)  # fmt: skip
from megatron_cm3leon.data.preprocess.document_reader import DocumentReader, Loaded
from megatron_cm3leon.data.preprocess.encoder import PartEncoder, Task
from megatron_cm3leon.data.shards.reader import shard_files, write_json
from megatron_cm3leon.data.sources import BadInput, Entry

WORK = ".work"
"""Folder, inside the output, of what an unfinished run needs."""


@dataclass
class Shared:
    """Numbers that all processes see."""

    done: object
    """Inputs finished."""
    stop: object
    """1 once the run has failed."""
    workers: object
    """Workers that have begun."""


class _Stopped(Exception):
    """Another part made the run fail."""


_worker: dict = {}


def begin_work(task: Task, shared: Shared, progress: Meter | None = None) -> None:
    """Prepare this process for `work_on_part`; `progress` is given in the main process only."""
    torch.set_num_threads(1)  # sums of floats depend on the number of threads, and codes on the sums
    with shared.workers.get_lock():
        number = shared.workers.value
        shared.workers.value += 1
    load = task.load_tokenizers or load_on(choose_device(task.device, number))
    tokenizers = load(task.tokenizer)
    reader = DocumentReader(tokenizers, task.filters)  # one a worker: it remembers words
    _worker.update(task=task, shared=shared, progress=progress, tokenizers=tokenizers, reader=reader, duplicates=None)
    gc.freeze()  # the libraries' objects stay: looking through them again and again took a tenth of a caption's time
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process, which ends this one
        threading.Thread(target=_end_with_parent, daemon=True).start()


def load_on(device: str) -> Callable:
    """Loader of a tokenizer folder whose image tokenizer computes on `device`."""
    from megatron_cm3leon.tokenizers.folder import Tokenizers

    return functools.partial(Tokenizers.load, device=device)


def choose_device(device: str, number: int) -> str:
    """Where worker `number` computes: `cuda` spreads the workers over the GPUs of the node."""
    return f"cuda:{number % torch.cuda.device_count()}" if device == "cuda" else device


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def record_path(work: Path, part: int) -> Path:
    return work / f"part-{part:06d}.json"


def work_on_part(part: int) -> dict:
    """Write one part and its record, unless a whole one is there; returns the record's counts."""
    task: Task = _worker["task"]
    path = record_path(task.output / WORK, part)
    if task.deduplicate and not _worker["duplicates"]:
        _worker["duplicates"] = Duplicates(task.output / WORK)
    dropped = _worker["duplicates"].of_part(part) if task.deduplicate else None
    record = _kept_record(task, path, part, dropped)
    if record:
        _advance(record["read"])
        return count_record(record)
    # Two tasks that were given the same part write the same bytes, each in its own folder.
    temporary = task.output / WORK / f"part-{part:06d}.{socket.gethostname()}-{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    encoder = PartEncoder(task, _worker["tokenizers"], _worker["reader"], temporary, part, dropped, _advance)
    try:
        record = encoder.run()
        _move_files(temporary, task.output, record["shards"])
        _remove_rest(task.output, path, record["shards"])
        write_json(path, record)
    except OSError as error:
        raise _explain_full(error, task.output) from error
    finally:
        encoder.close()
        shutil.rmtree(temporary, ignore_errors=True)
    return count_record(record)


def count_record(record: dict) -> dict:
    """What a run adds up of a part's record; the record itself stays on the disk."""
    return {
        "part": record["part"],
        "read": record["read"],
        "written": sum(shard["documents"] for shard in record["shards"]),
        "quarantined": len(record["quarantine"]),
        "left_out": record.get("left_out", {}),
    }


def hash_part(part: int) -> dict:
    """Write the hashes of a part's pictures and texts, unless they are there; what is unusable is counted later."""
    task: Task = _worker["task"]
    path = hashes_path(task.output / WORK, part)
    if path.is_file():
        unusable = find_unusable(np.load(path))
        mended = task.source.external and unusable.any()
        if not (mended and _was_mended(task, part, lambda number, _: number < len(unusable) and unusable[number])):
            _advance(len(unusable))
            return {"part": part, "read": len(unusable), "quarantined": 0}
    (task.output / WORK / "duplicates.npy").unlink(missing_ok=True)  # of what was known before
    reader, rows = _worker["reader"], []
    for entry in task.source.read_part(part):
        loaded = reader.read(entry)
        hashes = np.full((2, 2), UNUSABLE if isinstance(loaded, BadInput) else 0, np.uint64)
        if isinstance(loaded, Loaded):
            pictures = [bytes.fromhex(sha256) for sha256 in loaded.sha256]
            hashes = np.stack([hash_parts(pictures), hash_parts([text.encode() for text in loaded.texts])])
        rows.append(hashes)
        _advance(1)
    try:
        save_array(path, np.stack(rows) if rows else np.zeros((0, 2, 2), np.uint64))
    except OSError as error:
        raise _explain_full(error, task.output) from error
    return {"part": part, "read": len(rows), "quarantined": 0}


def _advance(inputs: int) -> None:
    shared: Shared = _worker["shared"]
    if shared.stop.value:
        raise _Stopped
    with shared.done.get_lock():
        shared.done.value += inputs
    if _worker["progress"]:
        _worker["progress"].advance(inputs)


def _explain_full(error: OSError, output: Path) -> OSError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    return OSError(
        f"--output {output} cannot take more: {error.strerror}. Make room and run the same command again: parts that "
        f"are whole are kept."
    )


def _kept_record(task: Task, path: Path, part: int, dropped: np.ndarray | None) -> dict | None:
    """The record of a part that an earlier run finished, if its files are whole and nothing was mended."""
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    if record.get("dropped") != checksum(dropped):
        return None
    for shard in record["shards"]:
        for file in shard_files(task.output, shard["name"]):
            if not file.is_file() or file.stat().st_size != shard["files"][file.name]["bytes"]:
                return None
    bad = {entry["key"] for entry in record["quarantine"]} if task.source.external else ()
    if bad and _was_mended(task, part, lambda _, entry: getattr(entry, "key", None) in bad):
        return None
    return record


def _was_mended(task: Task, part: int, is_bad: Callable[[int, Entry], bool]) -> bool:
    """Whether one of a part's inputs that were bad can be read now."""
    reader = _worker["reader"]
    for number, entry in enumerate(task.source.read_part(part)):
        if is_bad(number, entry) and not isinstance(reader.read(entry), BadInput):
            return True
    return False


def _remove_rest(output: Path, path: Path, shards: list[dict]) -> None:
    """Remove shards that this part had when `path`, its record of an earlier run, was written, and has no more."""
    kept = {shard["name"] for shard in shards}
    for shard in json.loads(path.read_text())["shards"] if path.is_file() else ():
        for file in shard_files(output, shard["name"]) if shard["name"] not in kept else ():
            file.unlink(missing_ok=True)


def _move_files(temporary: Path, output: Path, shards: list[dict]) -> None:
    for shard in shards:
        for path in shard_files(temporary, shard["name"]):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, output / path.name)
