"""Sharded checkpoints under canonical names: written by every rank at once, read under any layout.

folder.py says what a folder holds. A piece is a flat range of one rank's rectangular part of a whole tensor; its
place travels in the safetensors header. A tensor has up to three kinds: `weight`, and Adam's `exp_avg` and
`exp_avg_sq`. Nothing here depends on the layout that wrote or reads, on megatron-core or on process groups, and no
pickle is read or written. A folder appears under its final name only when it is whole and on the disk.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch

from megatron_cm3leon.checkpoint.format import (
    FORMAT,
    MANIFEST,
    SHARED_FILES,
    CheckpointFolder,
    Piece,
    Stored,
    damaged,
    hash_file,
    list_checkpoints,
    list_unfinished,
    rank_file,
    seal,
    step_folder,
    unfinished,
)
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import Config, save_config
from megatron_cm3leon.tokenizers.vocab import Vocabulary

__all__ = [
    "CheckpointReader",
    "Piece",
    "begin",
    "finish",
    "list_checkpoints",
    "list_unfinished",
    "read_weights",
    "step_folder",
    "unfinished",
    "write_rank",
]

WRITTEN_AT_ONCE = 4 << 20
"""Bytes; another thread hashes them, one block after the other."""
BLOCKS_AHEAD = 64
"""So far hashing may lag behind: it goes on while the disk is waited for, and holds 256 MiB at most."""


def begin(folder: Path) -> None:
    """Make the empty unfinished folder; one rank calls it before any rank writes."""
    temporary = unfinished(folder)
    if temporary.is_dir():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)


def write_rank(folder: Path, rank: int, pieces: Iterable[tuple[Piece, torch.Tensor]]) -> None:
    """Write one rank's pieces into the unfinished checkpoint of `folder`, and the record of its bytes and SHA-256.

    Tensors are flat and of any device; they become fp32. The record appears only once the file is on the disk.
    """
    path = unfinished(folder) / rank_file(rank)
    digest, size, hashed = hashlib.sha256(), 0, deque()
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        for block in _blocks(list(pieces)):
            hashed.append(pool.submit(digest.update, block))
            size += len(block)
            _write_all(file, block)
            if len(hashed) > BLOCKS_AHEAD:
                hashed.popleft().result()
        with _named(path):
            os.fsync(file.fileno())
    record = path.with_suffix(".json")
    _write_text(record.with_suffix(".part"), json.dumps({"bytes": size, "sha256": digest.hexdigest()}))
    os.replace(record.with_suffix(".part"), record)


def _blocks(pieces: list[tuple[Piece, torch.Tensor]]) -> Iterator[memoryview]:
    """The bytes of a safetensors file: header, then the numbers; one tensor at a time is on the CPU.

    The library's own writer keeps the interpreter's lock, which would stop training while a thread writes, and
    reports a full disk as an error of its own without the number of the cause.
    """
    header, end = {"__metadata__": {"pieces": json.dumps([piece.to_dict() for piece, _ in pieces])}}, 0
    for number, (piece, tensor) in enumerate(pieces):
        count = piece.stop - piece.start
        assert tensor.numel() == count, f"{piece} does not describe {tensor.numel()} numbers"
        header[str(number)] = {"dtype": "F32", "shape": [count], "data_offsets": [end, end + 4 * count]}
        end += 4 * count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8 bytes
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for _, tensor in pieces:
        if not tensor.numel():
            continue
        content = memoryview(tensor.detach().reshape(-1).to("cpu", torch.float32).contiguous().numpy()).cast("B")
        for start in range(0, len(content), WRITTEN_AT_ONCE):
            yield content[start : start + WRITTEN_AT_ONCE]


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """A failing write does not say which file it was: the error of the body gets its path."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _write_all(file, block: memoryview) -> None:
    """A write may take fewer bytes than it is given, when a disk is nearly full."""
    with _named(file.name):
        while len(block):
            block = block[file.write(block) :]


def _write_text(path: Path, text: str) -> None:
    with _named(path), open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Put a file's content, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finish(folder: Path, config: Config, vocabulary: Vocabulary, state: TrainState, versions: dict) -> None:
    """Write what all ranks share, then give the folder its final name; one rank calls it after every write."""
    temporary = unfinished(folder)
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
    manifest = seal({"format": FORMAT, "step": state.step, "versions": versions, "files": files})
    _write_text(temporary / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    _sync(temporary)
    aside = folder.with_name(folder.name + ".old")
    if folder.exists():  # a run that went back before this step writes it again
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    os.replace(temporary, folder)
    _sync(folder.parent)
    latest = folder.parent.parent / "latest"
    _write_text(latest.with_suffix(".tmp"), folder.name + "\n")
    os.replace(latest.with_suffix(".tmp"), latest)
    shutil.rmtree(aside, ignore_errors=True)


class CheckpointReader(CheckpointFolder):
    """A complete checkpoint: any whole tensor, or any rectangular part of one, from any layout's files.

    A file is hashed before its first number is used; `verify.verified` does so beside the reading, once a node.
    """

    def check_parameters(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """ValueError when a parameter of `shapes` (name -> shape of the whole tensor) is not the checkpoint's."""
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                self.check_all()  # a damaged header must not be blamed on the model
                raise ValueError(
                    f"checkpoint {self.folder}: {name} has shape {self.shape(name)}, this model has {shape}; use the "
                    f"model and data.seq_length of the checkpoint's config.yaml."
                )

    def read(self, name: str, kind: str = "weight") -> torch.Tensor:
        """The whole tensor, fp32, on the CPU."""
        shape = self.shape(name)
        return self.read_part(name, kind, (0,) * len(shape), shape)

    def read_part(self, name: str, kind: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """The rectangle of `size` at `offset` of the whole tensor; what lies beyond its edge is 0."""
        found = self._overlapping(name, kind, offset, size)
        if list(found) == [(tuple(offset), tuple(size))]:
            return self._read_pieces(tuple(size), found[offset, size], name)
        result = torch.zeros(size)
        missing = prod(
            max(0, min(start + length, edge) - start)
            for start, length, edge in zip(offset, size, self.shape(name), strict=True)
        )
        for (saved_offset, part), pieces in found.items():
            low, high = _overlap(offset, size, saved_offset, part)
            target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, saved_offset, strict=True))
            result[target] = self._read_pieces(part, pieces, name)[source]
            missing -= prod(b - a for a, b in zip(low, high, strict=True))
        if missing:
            raise damaged(self.folder, f"it misses {missing} numbers of {kind} {name}")
        return result

    def _overlapping(self, name: str, kind: str, offset, size) -> dict[tuple, list[Stored]]:
        """(offset, shape) of every saved part that has numbers of a rectangle -> its pieces."""
        parts: dict[tuple, list[Stored]] = {}
        for stored in self.find(name, kind):
            piece = stored.piece
            low, high = _overlap(offset, size, piece.offset, piece.part)
            if all(a < b for a, b in zip(low, high, strict=True)):
                parts.setdefault((piece.offset, piece.part), []).append(stored)
        return parts

    def files_of(self, parts: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> set[str]:
        """Files behind parts (name, offset, size), weights and moments."""
        files = set()
        for name, offset, size in parts:
            for kind in (kind for named, kind in self.pieces if named == name):
                for pieces in self._overlapping(name, kind, offset, size).values():
                    files |= {stored.file for stored in pieces}
        return files

    def _read_pieces(self, part: tuple[int, ...], pieces: list[Stored], name: str) -> torch.Tensor:
        flat = torch.empty(prod(part))
        for stored in pieces:
            numbers = flat[stored.piece.start : stored.piece.stop]
            if not numbers.numel():
                continue
            target = memoryview(numbers.numpy()).cast("B")
            with open(self.check(stored.file), "rb", buffering=0) as file:
                file.seek(stored.begin)
                while len(target):
                    size = file.readinto(target)
                    if not size:
                        raise damaged(self.folder, f"{stored.file} ends within {name}")
                    target = target[size:]
        if sum(stored.piece.stop - stored.piece.start for stored in pieces) != flat.numel():
            raise damaged(self.folder, f"it misses pieces of {name}")
        return flat.view(part)

    def verify(self) -> Iterator[str]:
        """Read every file and compare its SHA-256; yields each name, ValueError at the first that differs."""
        for name in self.manifest["files"]:
            self.checked.discard(name)
            self.check(name)
            yield name


def _overlap(offset, size, other_offset, other_size) -> tuple[list[int], list[int]]:
    """First element and end of what two rectangles share; some first is not below its end when they share nothing."""
    low = [max(a, b) for a, b in zip(offset, other_offset, strict=True)]
    high = [min(a + n, b + m) for a, n, b, m in zip(offset, size, other_offset, other_size, strict=True)]
    return low, high


def read_weights(folder: str | Path) -> CheckpointReader:
    """Open a checkpoint for its weights: `.names`, `.shape(name)`, `.read(name)`, `.config`, `.vocabulary`."""
    return CheckpointReader(folder)
