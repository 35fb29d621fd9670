"""One part of the input -> its shards, in a worker process (preprocess.py decides which and where).

A part is encoded in fixed batches with one thread, so its bytes do not depend on who does the work. Its
files are written under a temporary name and renamed when whole; its record in `.work/` follows them.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_cm3leon.data.shards import ShardWriter, shard_files, write_json
from megatron_cm3leon.data.sources import BadInput, FolderSource, JsonlSource, RawPair
from megatron_cm3leon.progress import Meter
from megatron_cm3leon.tokenizers.pixels import load_picture, to_pixels

SHARD_BYTES = 1 << 30
"""A part whose tar grows beyond this goes on in another shard."""
WORK = ".work"
"""Folder, inside the output, of what an unfinished run needs."""


@dataclass
class Task:
    """What every worker is told."""

    source: JsonlSource | FolderSource
    output: Path
    batch_size: int


@dataclass
class Shared:
    """Numbers that all processes see."""

    done: object
    """Inputs finished."""
    stop: object
    """1 once the run has failed."""


class _Stopped(Exception):
    """Another part made the run fail."""


_worker: dict = {}


def begin_work(
    task: Task, shared: Shared, load_tokenizers: Callable, tokenizer: Path, progress: Meter | None = None
) -> None:
    """Prepare this process for `work_on_part`; `progress` is given in the main process only."""
    torch.set_num_threads(1)  # sums of floats depend on the number of threads, and codes on the sums
    _worker.update(task=task, shared=shared, progress=progress, tokenizers=load_tokenizers(tokenizer))
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process, which ends this one
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def work_on_part(part: int) -> dict:
    """Write one part and its record, unless a whole one is there; returns the record."""
    task: Task = _worker["task"]
    path = task.output / WORK / f"part-{part:06d}.json"
    record = _kept_record(task, path, part)
    if record:
        _advance(record["read"])
        return record
    temporary = task.output / WORK / f"part-{part:06d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    encoder = _PartEncoder(task, _worker["tokenizers"], temporary, part)
    try:
        record = encoder.run()
        _move_files(temporary, task.output, record["shards"])
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_json(path, record)
    return record


def _advance(inputs: int) -> None:
    shared: Shared = _worker["shared"]
    if shared.stop.value:
        raise _Stopped
    with shared.done.get_lock():
        shared.done.value += inputs
    if _worker["progress"]:
        _worker["progress"].advance(inputs)


def _kept_record(task: Task, path: Path, part: int) -> dict | None:
    """The record of a part that an earlier run finished, if its files are whole and nothing was mended."""
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    for shard in record["shards"]:
        for file in shard_files(task.output, shard["name"]):
            if not file.is_file() or file.stat().st_size != shard["files"][file.name]["bytes"]:
                return None
    bad = {entry["key"]: entry["reason"] for entry in record["quarantine"]}
    for entry in task.source.read_part(part) if bad else ():
        if entry.key in bad and not isinstance(_load_pixels(task.source.folder, entry, 8), BadInput):
            return None
    return record


def _move_files(temporary: Path, output: Path, shards: list[dict]) -> None:
    for shard in shards:
        for path in shard_files(temporary, shard["name"]):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, output / path.name)


class _PartEncoder:
    """Turns the inputs of one part into its shards."""

    def __init__(self, task: Task, tokenizers, folder: Path, part: int) -> None:
        self.task, self.tokenizers, self.folder, self.part = task, tokenizers, folder, part
        self.vocabulary = tokenizers.vocabulary
        self.shards, self.quarantine, self.read = [], [], 0
        self.writer: ShardWriter | None = None

    def run(self) -> dict:
        batch = []
        for entry in self.task.source.read_part(self.part):
            self.read += 1
            loaded = _load_pixels(self.task.source.folder, entry, self.tokenizers.image.image_size)
            text = [] if isinstance(loaded, BadInput) else self.tokenizers.text.encode(entry.caption)
            if not isinstance(loaded, BadInput) and not len(text):
                loaded = BadInput(entry.key, entry.source, "empty caption: it encodes to no token")
            if isinstance(loaded, BadInput):
                self.quarantine.append(loaded.to_dict())
                _advance(1)
                continue
            batch.append((entry, text, *loaded))
            if len(batch) == self.task.batch_size:
                self._write(batch)
                batch = []
        self._write(batch)
        self._close_shard()
        fields = {"part": self.part, "read": self.read}
        return {**fields, "shards": self.shards, "quarantine": self.quarantine}

    @torch.no_grad()
    def _write(self, batch: list[tuple]) -> None:
        if not batch:
            return
        codes = self.tokenizers.image.encode(torch.stack([pixels for _, _, pixels, _ in batch]))
        assert codes.shape == (len(batch), self.vocabulary.image_tokens), f"the image tokenizer gave {codes.shape}"
        image_ids = codes.cpu().numpy() + self.vocabulary.image_start
        for (pair, text, _, sha256), image in zip(batch, image_ids, strict=True):
            if self.writer and self.writer.bytes > SHARD_BYTES:
                self._close_shard()
            if not self.writer:
                name = f"shard-{self.part:06d}-{len(self.shards):03d}"
                self.writer = ShardWriter(self.folder, name, self.vocabulary)
            ids = np.concatenate([np.asarray(text, np.int64), [self.vocabulary.break_id], image])
            fields = {"caption": pair.caption, "image": pair.image, "source": pair.source, "extra": pair.extra}
            self.writer.add(pair.key, ids, {**fields, "picture_sha256": sha256})
        _advance(len(batch))

    def _close_shard(self) -> None:
        if self.writer:
            self.shards.append(self.writer.close())
            self.writer = None


def _load_pixels(folder: Path, entry: RawPair | BadInput, size: int) -> tuple[torch.Tensor, str] | BadInput:
    """Pixels of a pair's picture and the SHA-256 of its file, or why there are none."""
    if isinstance(entry, BadInput):
        return entry
    path = folder / entry.image
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")  # a named pipe would never end
        content = path.read_bytes()
        return to_pixels(load_picture(content), size), hashlib.sha256(content).hexdigest()
    except FileNotFoundError:
        return BadInput(entry.key, entry.source, f"missing picture: {entry.image}")
    except (ValueError, OSError) as error:  # load_picture turns whatever a decoder raises into ValueError
        return BadInput(entry.key, entry.source, f"unreadable picture: {entry.image}: {error}")
