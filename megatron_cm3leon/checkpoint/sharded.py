"""Sharded checkpoints under canonical names: written by all ranks in parallel, read under any layout.

format.py describes the folder. A piece is a flat range of one rank's rectangular part of a whole tensor; its position
is stored in the safetensors header. A tensor has up to three kinds: `weight`, and Adam's `exp_avg` and `exp_avg_sq`.
This module does not depend on the layouts that write and read, on megatron-core or on process groups, and uses no
pickle. A folder gets its final name only when it is complete and on disk.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from math import prod
from pathlib import Path

import torch

from megatron_cm3leon.checkpoint.format import (
    FORMAT,
    MANIFEST,
    SHARED_FILES,
    CheckpointFolder,
    Piece,
    StoredPiece,
    damage_error,
    hash_file,
    rank_file,
    temporary_folder,
)
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.common.atomic_io import add_checksum
from megatron_cm3leon.config.loading import Config, save_config
from megatron_cm3leon.tokenizers.vocab import Vocabulary

WRITE_CHUNK_BYTES = 4 << 20
"""Bytes per write; another thread hashes the chunks in order."""
MAX_UNHASHED_CHUNKS = 64
"""Chunks that may be written but not yet hashed: hashing overlaps the waits for the disk and holds at most 256 MiB."""


def begin_checkpoint(folder: Path) -> None:
    """Create the empty temporary folder; one rank calls it before any rank writes."""
    temporary = temporary_folder(folder)
    if temporary.is_dir():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)


def write_rank_file(folder: Path, rank: int, pieces: Iterable[tuple[Piece, torch.Tensor]]) -> None:
    """Write the pieces of one rank into the temporary folder of `folder`, then a record with size and SHA-256.

    Tensors are flat, on any device, and converted to fp32. The record appears only after the file is on disk.
    Errors of the file system are OSError with the path as `filename`.
    """
    path = temporary_folder(folder) / rank_file(rank)
    digest, size = hashlib.sha256(), 0
    unhashed: deque[Future] = deque()
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        for chunk in _serialize(list(pieces)):
            unhashed.append(pool.submit(digest.update, chunk))
            size += len(chunk)
            _write_fully(file, chunk)
            if len(unhashed) > MAX_UNHASHED_CHUNKS:
                unhashed.popleft().result()
        with _add_filename(path):
            os.fsync(file.fileno())
    record = path.with_suffix(".json")
    _write_text(record.with_suffix(".part"), json.dumps({"bytes": size, "sha256": digest.hexdigest()}))
    os.replace(record.with_suffix(".part"), record)


def _serialize(pieces: list[tuple[Piece, torch.Tensor]]) -> Iterator[memoryview]:
    """Bytes of a safetensors file in chunks: header, then the numbers. One tensor at a time is copied to the CPU.

    The writer of the safetensors library holds the interpreter lock, which would stop training while a thread writes,
    and reports a full disk as an error without errno.
    """
    header: dict[str, dict] = {"__metadata__": {"pieces": json.dumps([piece.to_dict() for piece, _ in pieces])}}
    end = 0
    for number, (piece, tensor) in enumerate(pieces):
        count = piece.stop - piece.start
        assert tensor.numel() == count, f"{piece} does not describe {tensor.numel()} numbers"
        header[str(number)] = {"dtype": "F32", "shape": [count], "data_offsets": [end, end + 4 * count]}
        end += 4 * count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8 bytes
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for _, tensor in pieces:
        if not tensor.numel():
            continue
        content = tensor.detach().reshape(-1).to("cpu", torch.float32).contiguous().numpy().data.cast("B")
        for start in range(0, len(content), WRITE_CHUNK_BYTES):
            yield content[start : start + WRITE_CHUNK_BYTES]


@contextmanager
def _add_filename(path: str | Path) -> Iterator[None]:
    """Add the path to an OSError of the body: that of a failed write does not name the file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _write_fully(file: FileIO, chunk: memoryview) -> None:
    """Write all of `chunk`: on a nearly full disk one call may write fewer bytes than it is given."""
    with _add_filename(file.name):
        while len(chunk):
            chunk = chunk[file.write(chunk) :]


def _write_text(path: Path, text: str) -> None:
    """Write a small file and put it on disk."""
    with _add_filename(path), open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Put the content of a file, or the entries of a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finish_checkpoint(folder: Path, config: Config, vocabulary: Vocabulary, state: TrainState, versions: dict) -> None:
    """Write the files that all ranks share, then rename the folder; one rank calls it after all ranks have written.

    `versions`: library -> version, for the manifest.
    """
    temporary = temporary_folder(folder)
    save_config(config, temporary / "config.yaml")
    vocabulary.save(temporary / "vocab.json")
    state.save(temporary / "state.json")
    files = {}
    for record in sorted(temporary.glob("rank-*.json")):
        files[record.with_suffix(".safetensors").name] = json.loads(record.read_text())
        record.unlink()
    for name in SHARED_FILES:
        path = temporary / name
        _sync(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    manifest = add_checksum({"format": FORMAT, "step": state.step, "versions": versions, "files": files})
    _write_text(temporary / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    _sync(temporary)
    replaced = folder.with_name(folder.name + ".old")
    if folder.exists():  # a run that rolled back to an earlier step writes this one again
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(folder, replaced)
    os.replace(temporary, folder)
    _sync(folder.parent)
    latest = folder.parent.parent / "latest"
    _write_text(latest.with_suffix(".tmp"), folder.name + "\n")
    os.replace(latest.with_suffix(".tmp"), latest)
    shutil.rmtree(replaced, ignore_errors=True)


class CheckpointReader(CheckpointFolder):
    """Reads whole tensors, or rectangular parts of them, from a complete checkpoint of any layout.

    A file is hashed before its first number is used; within `verify.verify_while_reading` it is hashed during the
    reading instead, once per node.
    """

    def check_parameters(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ValueError when a parameter of `shapes` (name -> shape of the whole tensor) is missing or differs."""
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                self.check_all()  # a damaged header is reported as damage, not as another model
                raise ValueError(
                    f"checkpoint {self.folder}: {name} has shape {self.shape(name)}, this model has {shape}; use the "
                    f"model and data.seq_length of the checkpoint's config.yaml."
                )

    def read(self, name: str, kind: str = "weight") -> torch.Tensor:
        """Read a whole tensor; fp32, on the CPU."""
        shape = self.shape(name)
        return self.read_part(name, kind, (0,) * len(shape), shape)

    def read_part(self, name: str, kind: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """Read the rectangle of shape `size` at `offset` of the whole tensor; zeros beyond the edge of the tensor."""
        parts = self._find_overlapping(name, kind, offset, size)
        if list(parts) == [(tuple(offset), tuple(size))]:
            return self._read_pieces(tuple(size), parts[offset, size], name)
        result = torch.zeros(size)
        missing = prod(
            max(0, min(start + length, edge) - start)
            for start, length, edge in zip(offset, size, self.shape(name), strict=True)
        )
        for (saved_offset, part), pieces in parts.items():
            low, high = _overlap(offset, size, saved_offset, part)
            target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, saved_offset, strict=True))
            result[target] = self._read_pieces(part, pieces, name)[source]
            missing -= prod(b - a for a, b in zip(low, high, strict=True))
        if missing:
            raise damage_error(self.folder, f"{missing} numbers of {kind} {name} are missing")
        return result

    def _find_overlapping(
        self, name: str, kind: str, offset: tuple[int, ...], size: tuple[int, ...]
    ) -> dict[tuple, list[StoredPiece]]:
        """(offset, shape) of every saved part that overlaps a rectangle -> the pieces of that part."""
        parts: dict[tuple, list[StoredPiece]] = {}
        for stored in self.find(name, kind):
            piece = stored.piece
            low, high = _overlap(offset, size, piece.offset, piece.part)
            if all(a < b for a, b in zip(low, high, strict=True)):
                parts.setdefault((piece.offset, piece.part), []).append(stored)
        return parts

    def list_files(self, parts: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> set[str]:
        """Names of the files that contain weights or moments of `parts`, each (name, offset, size)."""
        files = set()
        for name, offset, size in parts:
            for kind in (kind for stored_name, kind in self.pieces if stored_name == name):
                for pieces in self._find_overlapping(name, kind, offset, size).values():
                    files |= {stored.file for stored in pieces}
        return files

    def _read_pieces(self, part: tuple[int, ...], pieces: list[StoredPiece], name: str) -> torch.Tensor:
        """Read one saved part of shape `part`; raises ValueError when `pieces` do not cover it."""
        flat = torch.empty(prod(part))
        for stored in pieces:
            numbers = flat[stored.piece.start : stored.piece.stop]
            if not numbers.numel():
                continue
            target = numbers.numpy().data.cast("B")
            with open(self.check(stored.file), "rb", buffering=0) as file:
                file.seek(stored.begin)
                while len(target):
                    size = file.readinto(target)
                    if not size:
                        raise damage_error(self.folder, f"{stored.file} ends within {name}")
                    target = target[size:]
        if sum(stored.piece.stop - stored.piece.start for stored in pieces) != flat.numel():
            raise damage_error(self.folder, f"pieces of {name} are missing")
        return flat.view(part)

    def verify(self) -> Iterator[str]:
        """Verify the SHA-256 of every file and yield its name; raises ValueError at the first that differs."""
        for name in self.manifest["files"]:
            self.checked.discard(name)
            self.check(name)
            yield name


def _overlap(offset, size, other_offset, other_size) -> tuple[list[int], list[int]]:
    """First element and end (exclusive) of the intersection; in some dimension first >= end when it is empty."""
    low = [max(a, b) for a, b in zip(offset, other_offset, strict=True)]
    high = [min(a + n, b + m) for a, n, b, m in zip(offset, size, other_offset, other_size, strict=True)]
    return low, high
