"""ShardWriter: documents -> one shard, in the format that reader.py describes and reads."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_cm3leon.common.atomic_io import sha256_file
from megatron_cm3leon.data.shards.reader import INDEX_DTYPE, METADATA_SCHEMA, shard_files
from megatron_cm3leon.data.shards.targets import TARGETS_ENDING, describe_targets
from megatron_cm3leon.tokenizers.vocab import Vocabulary

_REPEATING = ["caption", "image", "picture_sha256", "extra", "kind"]
"""Columns that have the same value in all rows of a text corpus; key and source differ in every row."""
_TAR_BLOCK, _TAR_RECORD = 512, 10240
_BUFFER_BYTES = 1 << 20
_NPY_HEADER = 128


class ShardWriter:
    """Writes one shard: tar, index and metadata. The bytes depend only on the documents."""

    def __init__(self, folder: Path, name: str, vocabulary: Vocabulary) -> None:
        self.folder, self.name, self.vocabulary = folder, name, vocabulary
        self.dtype = vocabulary.dtype.newbyteorder("<")
        self.bytes = 0
        """Size of the tar so far."""
        self._indexes: list[np.ndarray] = []
        self._columns: dict[str, list] = {name: [] for name in METADATA_SCHEMA.names}
        self._keys: list[str] = []
        self._payloads: list[bytes] = []
        """Keys and ids of the documents that are not written yet."""
        self._documents = 0
        self._targets: list[np.ndarray] = []
        self._written, self._digest = 0, hashlib.sha256()
        self._file = open(folder / f"{name}.tar", "wb")  # noqa: SIM115 (closed by `close`)

    def add(self, key: str, ids: np.ndarray, metadata: dict, targets: Iterable[tuple[int, int]] = ()) -> None:
        """Append a document; `metadata` has the fields of METADATA_SCHEMA except the key.

        `targets` of an instruction document: ranges [start, end) of its tokens, in order. ValueError if one is not
        valid (targets.py).
        """
        ids = np.asarray(ids)
        assert ids.ndim == 1 and len(ids), f"the ids of document {key} are not a non-empty row"
        assert ids.min() >= 0 and ids.max() < self.vocabulary.size, f"document {key} has ids outside the vocabulary"
        self.add_bytes(key, np.ascontiguousarray(ids, self.dtype).tobytes(), metadata, targets)

    def add_bytes(self, key: str, payload: bytes, metadata: dict, targets: Iterable[tuple[int, int]] = ()) -> None:
        """Append a document whose ids are given as bytes of the shards' dtype; the rest as for `add`."""
        self.add_many([key], [payload], {name: [metadata.get(name)] for name in self._columns}, [targets])

    def add_many(
        self, keys: list[str], payloads: list[bytes], metadata: dict[str, list],
        targets: Sequence[Iterable[tuple[int, int]]] = (),
    ) -> None:  # fmt: skip
        """Append documents; `metadata` has one list per field, as long as `keys`, and so has `targets` if given."""
        assert all(payloads), f"document {keys[payloads.index(b'')]} has no ids"
        assert not targets or len(targets) == len(keys), f"{len(targets)} lists of targets of {len(keys)} documents"
        for document, (key, payload, ranges) in enumerate(zip(keys, payloads, targets, strict=False), self._documents):
            rows = describe_targets(key, np.frombuffer(payload, self.dtype), ranges, document, self.vocabulary)
            self._targets += [rows] * bool(len(rows))
        self._documents += len(keys)
        self._keys += keys
        self._payloads += payloads
        for name, column in self._columns.items():
            column += keys if name == "key" else metadata[name]
        sizes = np.fromiter(map(len, payloads), np.int64, len(payloads)) + _NPY_HEADER
        self.bytes += int((_TAR_BLOCK + sizes + -sizes % _TAR_BLOCK).sum())
        if self.bytes - self._written > _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Write the waiting documents: many headers at once take a fraction of the time of single ones."""
        if not self._keys:
            return
        content, offsets = pack_members(self._keys, self._payloads, self.dtype)
        index = np.empty(len(offsets), INDEX_DTYPE)
        index["offset"] = offsets + self._written
        index["tokens"] = [len(payload) // self.dtype.itemsize for payload in self._payloads]
        index["crc32"] = list(map(zlib.crc32, self._payloads))
        self._indexes.append(index)
        self._write(content.data)
        self._keys, self._payloads = [], []
        assert self._written == self.bytes, f"{self._written} bytes of {self.name}.tar instead of {self.bytes}"

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._written += len(content)

    def close(self) -> dict:
        """Finish the files; returns the shard's entry in the manifest."""
        self._flush()
        end = self.bytes + 2 * _TAR_BLOCK
        self._write(bytes(end + -end % _TAR_RECORD - self.bytes))
        self._file.close()
        index = np.concatenate(self._indexes)
        np.save(self.folder / f"{self.name}.idx.npy", index)
        columns = [pa.array(self._columns[field.name], field.type) for field in METADATA_SCHEMA]
        table = pa.Table.from_arrays(columns, schema=METADATA_SCHEMA)
        pq.write_table(table, self.folder / f"{self.name}.parquet", use_dictionary=_REPEATING)
        paths = shard_files(self.folder, {"name": self.name, "files": {}})
        if self._targets:
            paths.append(self.folder / f"{self.name}{TARGETS_ENDING}")
            np.save(paths[-1], np.concatenate(self._targets))
        files = {}
        for path in paths:
            checksum = self._digest.hexdigest() if path.suffix == ".tar" else sha256_file(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": checksum}
        return {
            "name": self.name,
            "documents": len(index),
            "tokens": int(index["tokens"].sum()),
            "files": files,
            "sha256": self._digest.hexdigest(),
        }

    def abandon(self) -> None:
        """Close the file of a shard that will not be finished."""
        self._file.close()


def pack_members(keys: list[str], payloads: list[bytes], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Consecutive members <key>.tokens.npy, as tarfile and numpy write them (mtime, uid and gid 0).

    Returns the bytes, uint8, and the offset of each payload in them, int64.
    """
    assert max(map(len, keys)) <= 89, "a key does not fit a plain tar header"
    sizes = np.fromiter(map(len, payloads), np.int64, len(payloads))
    spans = _TAR_BLOCK + _NPY_HEADER + sizes
    spans += -spans % _TAR_BLOCK
    starts = np.cumsum(spans) - spans
    content = np.zeros(int(spans.sum()), np.uint8)
    blocks, first = content.reshape(-1, _TAR_BLOCK), starts // _TAR_BLOCK
    names = np.array([f"{key}.tokens.npy" for key in keys], "S100").view(np.uint8).reshape(-1, 100)
    octal = _write_octal(sizes + _NPY_HEADER, 11)
    blocks[first] = _tar_template()
    blocks[first, :100] = names
    blocks[first, 124:135] = octal
    checksums = _tar_template().sum(dtype=np.int64) + names.sum(1, dtype=np.int64) + octal.sum(1)
    blocks[first, 148:154] = _write_octal(checksums, 6)
    blocks[first, 154:156] = np.frombuffer(b"\0 ", np.uint8)
    name = dtype.str
    headers = b"".join([_npy_header(tokens, name) for tokens in (sizes // dtype.itemsize).tolist()])
    blocks[first + 1, :_NPY_HEADER] = np.frombuffer(headers, np.uint8).reshape(-1, _NPY_HEADER)
    offsets, view = starts + _TAR_BLOCK + _NPY_HEADER, content.data
    for offset, payload in zip(offsets.tolist(), payloads, strict=True):
        view[offset : offset + len(payload)] = payload
    return content, offsets


def _write_octal(numbers: np.ndarray, digits: int) -> np.ndarray:
    """ASCII octal digits, int64 [numbers, digits]."""
    return (numbers[:, None] >> 3 * np.arange(digits - 1, -1, -1) & 7) + ord("0")


@lru_cache(1 << 16)
def _npy_header(tokens: int, dtype: str) -> bytes:
    """The header of a .npy file with a row of ids."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": (tokens,)})
    assert header.tell() == _NPY_HEADER, f"numpy writes {header.tell()} bytes before an array"
    return header.getvalue()


@lru_cache(1)
def _tar_template() -> np.ndarray:
    """A member's header as its checksum counts it: empty name and size, spaces for the checksum; uint8 [512]."""
    header = bytearray(tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT))
    header[124:135], header[148:156] = bytes(11), b" " * 8
    return np.frombuffer(bytes(header), np.uint8)
