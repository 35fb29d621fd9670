"""One part of the input -> its shards, in a worker process (run.py decides which part and which process).

A part is encoded in fixed batches with one thread, so its bytes do not depend on which process encodes it. Its files
are written under a temporary name and renamed when complete; its record in `.work/` is written after them.
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
from multiprocessing.context import SpawnContext
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
import torch

from megatron_cm3leon.common.atomic_io import write_json
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
from megatron_cm3leon.data.preprocess.encoder import LoadTokenizers, PartEncoder, WorkerSettings
from megatron_cm3leon.data.shards.reader import shard_files
from megatron_cm3leon.data.sources import BadInput, Entry

WORK = ".work"
"""Folder, inside the output, of the files that an unfinished run needs."""


@dataclass
class SharedCounters:
    """Numbers in shared memory, visible to all worker processes."""

    done: "Synchronized[int]"
    """Inputs finished."""
    stop: "Synchronized[int]"
    """1 once the run has failed."""
    workers: "Synchronized[int]"
    """Workers that have started."""

    @classmethod
    def create(cls, context: SpawnContext) -> "SharedCounters":
        """All zero."""
        return cls(context.Value("q", 0), context.Value("b", 0), context.Value("i", 0))


class _Stopped(Exception):
    """Another part made the run fail."""


class Worker:
    """Encodes or hashes parts of the input in this process."""

    def __init__(self, settings: WorkerSettings, shared: SharedCounters, progress: Meter | None = None) -> None:
        """Load the tokenizers and set torch to one thread; `progress` is given in the main process only."""
        torch.set_num_threads(1)  # sums of floats depend on the number of threads, and codes on the sums
        with shared.workers.get_lock():
            number = shared.workers.value
            shared.workers.value += 1
        load = settings.load_tokenizers or build_tokenizer_loader(choose_worker_device(settings.device, number))
        self.settings, self.shared, self.progress = settings, shared, progress
        self.tokenizers = load(settings.tokenizer)
        self.reader = DocumentReader(self.tokenizers, settings.filters)  # one per worker: it caches words
        self._duplicates: Duplicates | None = None
        gc.freeze()  # the libraries' objects stay: scanning them at every collection took 10 % of a caption's time

    def encode_part(self, part: int) -> dict:
        """Write one part and its record, unless a complete one exists; returns count_record of the record.

        Raises OSError with the remedy if the disk is full.
        """
        settings = self.settings
        path = record_path(settings.output / WORK, part)
        dropped = self._load_duplicates().of_part(part) if settings.deduplicate else None
        record = self._load_kept_record(path, part, dropped)
        if record:
            self._advance(record["read"])
            return count_record(record)
        # Two tasks that were given the same part write the same bytes, each in its own folder.
        temporary = settings.output / WORK / f"part-{part:06d}.{socket.gethostname()}-{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        encoder = PartEncoder(settings, self.tokenizers, self.reader, temporary, part, dropped, self._advance)
        try:
            record = encoder.run()
            _move_files(temporary, settings.output, record["shards"])
            _remove_stale_shards(settings.output, path, record["shards"])
            write_json(path, record)
        except OSError as error:
            raise _explain_full_disk(error, settings.output) from error
        finally:
            encoder.close()
            shutil.rmtree(temporary, ignore_errors=True)
        return count_record(record)

    def hash_part(self, part: int) -> dict:
        """Write the hashes of a part's images and texts, unless they exist; unusable inputs are counted later.

        Returns the number of inputs under "read". Raises OSError with the remedy if the disk is full.
        """
        settings = self.settings
        path = hashes_path(settings.output / WORK, part)
        if path.is_file():
            unusable = find_unusable(np.load(path))
            if not (settings.source.external and unusable.any() and self._was_fixed(part, _is_marked(unusable))):
                self._advance(len(unusable))
                return {"part": part, "read": len(unusable), "quarantined": 0}
        (settings.output / WORK / "duplicates.npy").unlink(missing_ok=True)  # computed from the old hashes
        rows = []
        for entry in settings.source.read_part(part):
            loaded = self.reader.read(entry)
            hashes = np.full((2, 2), UNUSABLE if isinstance(loaded, BadInput) else 0, np.uint64)
            if isinstance(loaded, Loaded):
                images = [bytes.fromhex(sha256) for sha256 in loaded.sha256]
                hashes = np.stack([hash_parts(images), hash_parts([text.encode() for text in loaded.texts])])
            rows.append(hashes)
            self._advance(1)
        try:
            save_array(path, np.stack(rows) if rows else np.zeros((0, 2, 2), np.uint64))
        except OSError as error:
            raise _explain_full_disk(error, settings.output) from error
        return {"part": part, "read": len(rows), "quarantined": 0}

    def _load_duplicates(self) -> Duplicates:
        if not self._duplicates:
            self._duplicates = Duplicates(self.settings.output / WORK)
        return self._duplicates

    def _advance(self, inputs: int) -> None:
        if self.shared.stop.value:
            raise _Stopped
        with self.shared.done.get_lock():
            self.shared.done.value += inputs
        if self.progress:
            self.progress.advance(inputs)

    def _load_kept_record(self, path: Path, part: int, dropped: np.ndarray | None) -> dict | None:
        """The record of a part that an earlier run finished, if its files are complete and no input was fixed since."""
        if not path.is_file():
            return None
        record = json.loads(path.read_text())
        if record.get("dropped") != checksum(dropped):
            return None
        for shard in record["shards"]:
            for file in shard_files(self.settings.output, shard):
                if not file.is_file() or file.stat().st_size != shard["files"][file.name]["bytes"]:
                    return None
        bad = {entry["key"] for entry in record["quarantine"]} if self.settings.source.external else set()
        if bad and self._was_fixed(part, lambda _, entry: getattr(entry, "key", None) in bad):
            return None
        return record

    def _was_fixed(self, part: int, is_bad: Callable[[int, Entry], bool]) -> bool:
        """Whether one of a part's inputs that were unusable can be read now."""
        for number, entry in enumerate(self.settings.source.read_part(part)):
            if is_bad(number, entry) and not isinstance(self.reader.read(entry), BadInput):
                return True
        return False


_worker: Worker | None = None
"""The worker of a pool's process: a pool passes arguments to tasks by pickling them, and a worker cannot be pickled."""


def init_worker(settings: WorkerSettings, shared: SharedCounters) -> None:
    """Initializer of a pool's processes."""
    global _worker
    _worker = Worker(settings, shared)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process, which ends this one
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def run_in_worker(method: Callable[[Worker, int], dict], part: int) -> dict:
    """Call `method` (Worker.encode_part or Worker.hash_part) on the worker of this process."""
    assert _worker is not None, "init_worker has not run in this process"
    return method(_worker, part)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a pool's process has a parent"
    parent.join()
    os._exit(1)


def build_tokenizer_loader(device: str) -> LoadTokenizers:
    """Function that loads a tokenizer folder with its image tokenizer on `device`."""
    from megatron_cm3leon.tokenizers.folder import Tokenizers

    return functools.partial(Tokenizers.load, device=device)


def choose_worker_device(device: str, number: int) -> str:
    """Device of worker `number`: `cuda` spreads the workers over the GPUs of the node."""
    return f"cuda:{number % torch.cuda.device_count()}" if device == "cuda" else device


def record_path(work: Path, part: int) -> Path:
    """Path of a part's record in the work folder."""
    return work / f"part-{part:06d}.json"


def count_record(record: dict) -> dict:
    """The counts of a part's record that a run sums up; the record itself stays on the disk."""
    return {
        "part": record["part"],
        "read": record["read"],
        "written": sum(shard["documents"] for shard in record["shards"]),
        "quarantined": len(record["quarantine"]),
        "left_out": record.get("left_out", {}),
    }


def _is_marked(unusable: np.ndarray) -> Callable[[int, Entry], bool]:
    """Whether input `number` of a part is among those marked in `unusable`, bool [inputs]."""
    return lambda number, _: bool(number < len(unusable) and unusable[number])


def _explain_full_disk(error: OSError, output: Path) -> OSError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    return OSError(
        f"--output {output} cannot be written: {error.strerror}. Free some space and run the same command again: "
        f"complete parts are kept."
    )


def _remove_stale_shards(output: Path, path: Path, shards: list[dict]) -> None:
    """Remove shards that this part had in an earlier run (its record is at `path`) and no longer has."""
    kept = {shard["name"] for shard in shards}
    for shard in json.loads(path.read_text())["shards"] if path.is_file() else ():
        for file in shard_files(output, shard) if shard["name"] not in kept else ():
            file.unlink(missing_ok=True)


def _move_files(temporary: Path, output: Path, shards: list[dict]) -> None:
    for shard in shards:
        for path in shard_files(temporary, shard):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, output / path.name)
