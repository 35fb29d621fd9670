"""Shards: tokenised documents in plain WebDataset tars, and the reader of a folder of them.

    shards/manifest.json              vocabulary, counts, checksums, the command and its options
    shards/shard-000000-000.tar       one member <key>.tokens.npy a document (uint16, or uint32)
    shards/shard-000000-000.idx.npy   (offset u64, tokens u32, crc32 u32) a document
    shards/shard-000000-000.parquet   key, caption, image, source, picture_sha256, extra, kind

`offset` is where a document's first token stands in the tar (behind the .npy header); the crc is over the token bytes
and is compared when a process reads a document for the first time. A document's number is its place in manifest order.
A pair is stored as text ids, <break>, image ids; a text as its ids; an interleaved document as its texts and
pictures in their order with <break> between them. No document holds </s>.

`caption` is a pair's alone: the ids of other texts decode to them exactly. Names and checksums of an interleaved
document's pictures stand one a line.
"""

import hashlib
import io
import json
import mmap
import os
import resource
import tarfile
import weakref
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_cm3leon.tokenizers.vocab import Vocabulary

FORMAT = 1
MANIFEST = "manifest.json"
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("tokens", "<u4"), ("crc32", "<u4")])
METADATA_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "caption", "image", "source", "picture_sha256", "extra", "kind")]
)
_REPEATING = ["caption", "image", "picture_sha256", "extra", "kind"]
"""Columns of which a text corpus has one value; key and source differ in every row."""
_TAR_BLOCK, _TAR_RECORD = 512, 10240
_BUFFER_BYTES = 1 << 20
_NPY_HEADER = 128
_OPEN_FILES_KEPT_FREE = 256


def split_segments(ids: np.ndarray, vocabulary: Vocabulary) -> list[np.ndarray]:
    """Segments of a document: what stands between its <break>s."""
    breaks = np.flatnonzero(ids == vocabulary.break_id)
    starts, ends = np.append(0, breaks + 1), np.append(breaks, len(ids))
    return [ids[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class ShardWriter:
    """Writes one shard: tar, index and metadata. The bytes depend on the documents alone."""

    def __init__(self, folder: Path, name: str, vocabulary: Vocabulary) -> None:
        self.folder, self.name, self.vocabulary = folder, name, vocabulary
        self.dtype = vocabulary.dtype.newbyteorder("<")
        self.bytes = 0
        """Size of the tar so far."""
        self._indexes: list[np.ndarray] = []
        self._columns: dict[str, list] = {name: [] for name in METADATA_SCHEMA.names}
        self._keys, self._payloads, self._rows = [], [], []
        """Documents that wait to be written."""
        self._written, self._digest = 0, hashlib.sha256()
        self._file = open(folder / f"{name}.tar", "wb")  # noqa: SIM115 (closed by `close`)

    def add(self, key: str, ids: np.ndarray, metadata: dict) -> None:
        """Append a document; `metadata` has METADATA_SCHEMA's fields except the key."""
        ids = np.asarray(ids)
        assert ids.ndim == 1 and len(ids), f"document {key} is not a row of ids"
        assert ids.min() >= 0 and ids.max() < self.vocabulary.size, f"document {key} has ids outside the vocabulary"
        self.add_bytes(key, np.ascontiguousarray(ids, self.dtype).tobytes(), metadata)

    def add_bytes(self, key: str, payload: bytes, metadata: dict) -> None:
        """Append a document whose ids are given as bytes of the shards' type."""
        assert payload, f"document {key} has no ids"
        self._keys.append(key)
        self._payloads.append(payload)
        self._rows.append(metadata)
        size = _NPY_HEADER + len(payload)
        self.bytes += _TAR_BLOCK + size + -size % _TAR_BLOCK
        if self.bytes - self._written > _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Write the documents that wait: many headers at once cost a fraction of one after the other."""
        if not self._keys:
            return
        content, offsets = pack_members(self._keys, self._payloads, self.dtype)
        index = np.empty(len(offsets), INDEX_DTYPE)
        index["offset"] = offsets + self._written
        index["tokens"] = [len(payload) // self.dtype.itemsize for payload in self._payloads]
        index["crc32"] = list(map(zlib.crc32, self._payloads))
        self._indexes.append(index)
        for name, column in self._columns.items():
            column += self._keys if name == "key" else [row.get(name) for row in self._rows]
        self._write(content)
        for waiting in (self._keys, self._payloads, self._rows):
            waiting.clear()
        assert self._written == self.bytes, f"{self._written} bytes of {self.name}.tar instead of {self.bytes}"

    def _write(self, content) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._written += len(content)

    def close(self) -> dict:
        """Finish the three files; returns the shard's entry in the manifest."""
        self._flush()
        end = self.bytes + 2 * _TAR_BLOCK
        self._write(bytes(end + -end % _TAR_RECORD - self.bytes))
        self._file.close()
        index = np.concatenate(self._indexes)
        np.save(self.folder / f"{self.name}.idx.npy", index)
        columns = [pa.array(self._columns[field.name], field.type) for field in METADATA_SCHEMA]
        table = pa.Table.from_arrays(columns, schema=METADATA_SCHEMA)
        pq.write_table(table, self.folder / f"{self.name}.parquet", use_dictionary=_REPEATING)
        entry = {"name": self.name, "documents": len(index), "tokens": int(index["tokens"].sum()), "files": {}}
        for path in shard_files(self.folder, self.name):
            checksum = self._digest.hexdigest() if path.suffix == ".tar" else sha256_file(path)
            entry["files"][path.name] = {"bytes": path.stat().st_size, "sha256": checksum}
        entry["sha256"] = entry["files"][f"{self.name}.tar"]["sha256"]
        return entry

    def abandon(self) -> None:
        """Close what will not be finished."""
        self._file.close()


def pack_members(keys: list[str], payloads: list[bytes], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Members <key>.tokens.npy as tarfile and numpy write them (mtime, uid and gid 0), one behind the other.

    Returns the bytes, uint8, and the place of each payload in them, int64.
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
    headers = b"".join([_npy_header(size // dtype.itemsize, dtype.str) for size in sizes.tolist()])
    blocks[first + 1, :_NPY_HEADER] = np.frombuffer(headers, np.uint8).reshape(-1, _NPY_HEADER)
    offsets, view = starts + _TAR_BLOCK + _NPY_HEADER, memoryview(content)
    for offset, payload in zip(offsets.tolist(), payloads, strict=True):
        view[offset : offset + len(payload)] = payload
    return content, offsets


def _write_octal(numbers: np.ndarray, digits: int) -> np.ndarray:
    """ASCII octal digits, int64 [numbers, digits]."""
    return (numbers[:, None] >> 3 * np.arange(digits - 1, -1, -1) & 7) + ord("0")


@lru_cache(1 << 16)
def _npy_header(tokens: int, dtype: str) -> bytes:
    """What stands in front of a row of ids in a .npy file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": (tokens,)})
    assert header.tell() == _NPY_HEADER, f"numpy writes {header.tell()} bytes in front of an array"
    return header.getvalue()


@lru_cache(1)
def _tar_template() -> np.ndarray:
    """A member's header as it is summed up: name and size empty, spaces for the checksum."""
    header = bytearray(tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT))
    header[124:135], header[148:156] = bytes(11), b" " * 8
    return np.frombuffer(bytes(header), np.uint8)


def shard_files(folder: Path, name: str) -> list[Path]:
    """The three files of a shard."""
    return [folder / f"{name}{ending}" for ending in (".tar", ".idx.npy", ".parquet")]


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file that is either whole or absent, and on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def build_manifest(vocabulary: Vocabulary, shards: list[dict], **others) -> dict:
    """The manifest's content; `others` are the writer's own fields (accounts, command, options ...)."""
    return {
        "format": FORMAT,
        "content_sha256": hash_content(vocabulary.hash, shards),
        "vocabulary": vocabulary.to_dict(),
        "documents": sum(entry["documents"] for entry in shards),
        "tokens": sum(entry["tokens"] for entry in shards),
        "shards": shards,
        **others,
    }


def hash_content(vocabulary_hash: str, shards: list[dict]) -> str:
    """Identity of documents and their metadata, from a manifest's entries: SHA-256, hexadecimal.

    Shards made again elsewhere, by another command line or another number of workers or tasks, keep it.
    """
    checksums = [file["sha256"] for entry in shards for file in entry["files"].values()]
    return hashlib.sha256("\n".join([vocabulary_hash, *checksums]).encode()).hexdigest()


class Corpus:
    """Documents of a shard folder, by number; memory-mapped, safe to fork and to pickle."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = _load_manifest(self.folder)
        self.vocabulary = Vocabulary.from_dict(self.manifest["vocabulary"])
        self.shards = self.manifest["shards"]
        self.dtype = self.vocabulary.dtype.newbyteorder("<")
        self._indexes = [self._load_index(entry) for entry in self.shards]
        self._starts = np.cumsum([0] + [len(index) for index in self._indexes])
        self.documents = int(self._starts[-1])
        self.lengths = np.concatenate([index["tokens"] for index in self._indexes])
        """Tokens of each document, uint32."""
        self._checked = np.zeros(self.documents // 8 + 1, np.uint8)  # one bit a document: its crc was compared
        self._files: dict[int, int] = {}
        weakref.finalize(self, _close_files, self._files)
        self._maps: dict[int, tuple[mmap.mmap, np.ndarray]] = {}
        self._map_limit = _raise_open_files(2 * len(self.shards)) // 2
        if self.documents != self.manifest["documents"]:
            raise _mismatch(
                self.folder, f"it counts {self.manifest['documents']} documents, the files {self.documents}"
            )

    def __reduce__(self):
        return Corpus, (str(self.folder),)

    @property
    def identity(self) -> str:
        """Hash of the documents and their order: vocabulary and checksum of every shard."""
        parts = [self.vocabulary.hash, *(entry["sha256"] for entry in self.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def read(self, number: int) -> np.ndarray:
        """Ids of a document (read-only view of the file, uint16 or uint32), its crc compared.

        Raises ValueError that names shard and document when the bytes are not those written.
        """
        shard, row, offset, tokens, crc = self._locate(number)
        ids = self._map(shard)[1][offset : offset + tokens * self.dtype.itemsize]
        if zlib.crc32(ids) != crc:
            raise self._damaged(shard, row)
        return ids.view(self.dtype)

    def read_into(self, numbers: np.ndarray, out: np.ndarray, starts: np.ndarray) -> None:
        """Read documents `numbers` (int64) to where each starts in `out`, which is of the shards' dtype.

        Reads the files rather than their maps: half the time where a page is touched for the first time. The crc of
        each is compared the first time that this process reads it. Raises as `read`, and for a file cut short.
        """
        bits = np.left_shift(1, numbers & 7).astype(np.uint8)
        checked = (self._checked[numbers >> 3] & bits).tolist()
        size, memory, files = self.dtype.itemsize, memoryview(out).cast("B"), self._files
        places = (starts * size).tolist()
        for (shard, row, offset, tokens, crc), known, place in zip(
            self._locate_many(numbers), checked, places, strict=True
        ):
            part = memory[place : place + tokens * size]
            found = os.preadv(files[shard] if shard in files else self._open(shard), (part,), offset)
            if found != len(part) or (not known and zlib.crc32(part) != crc):
                raise self._damaged(shard, row)
        np.bitwise_or.at(self._checked, numbers >> 3, bits)

    def metadata(self, columns: list[str] | None = None) -> pa.Table:
        """Metadata of all documents in their order; `columns` chooses among METADATA_SCHEMA's."""
        paths = [self.folder / f"{entry['name']}.parquet" for entry in self.shards]
        return pa.concat_tables([pq.read_table(path, columns=columns) for path in paths])

    def metadata_row(self, number: int) -> dict:
        """Metadata of one document; reads its shard's file alone."""
        shard, row, *_ = self._locate(number)
        path = self.folder / f"{self.shards[shard]['name']}.parquet"
        return pq.read_table(path, memory_map=True).slice(row, 1).to_pylist()[0]

    def prefetch(self, numbers: np.ndarray) -> None:
        """Ask the kernel to read documents (int64) ahead; a hint that changes nothing else."""
        size, files = self.dtype.itemsize, self._files
        for shard, _, offset, tokens, _ in self._locate_many(numbers):
            file = files[shard] if shard in files else self._open(shard)
            os.posix_fadvise(file, offset, tokens * size, os.POSIX_FADV_WILLNEED)

    def _locate_many(self, numbers: np.ndarray) -> list[tuple[int, int, int, int, int]]:
        """`_locate` of many documents, which exist."""
        shards = np.searchsorted(self._starts, numbers, "right") - 1
        rows = numbers - self._starts[shards]
        indexes = self._indexes
        return [
            (shard, row, *indexes[shard].item(row)) for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)
        ]

    def _locate(self, number: int) -> tuple[int, int, int, int, int]:
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} is outside 0..{self.documents - 1} of {self.folder}")
        shard = int(np.searchsorted(self._starts, number, "right")) - 1
        row = number - int(self._starts[shard])
        return (shard, row, *self._indexes[shard].item(row))

    def _damaged(self, shard: int, row: int) -> ValueError:
        return ValueError(
            f"document {self._starts[shard] + row} (row {row} of {self.folder / self.shards[shard]['name']}.tar) is "
            f"damaged: its bytes do not match their crc32. Copy this shard again, or write the folder again with "
            f"tools/preprocess_data.py --overwrite."
        )

    def _map(self, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        mapped = self._maps.get(shard)
        if mapped is None:
            if len(self._maps) >= self._map_limit:
                del self._maps[next(iter(self._maps))]
            with open(self.folder / f"{self.shards[shard]['name']}.tar", "rb") as file:
                whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped = self._maps[shard] = whole, np.frombuffer(whole, np.uint8)
        return mapped

    def _open(self, shard: int) -> int:
        """File descriptor of a shard's tar; the oldest is closed where there are too many."""
        if len(self._files) >= self._map_limit:
            os.close(self._files.pop(next(iter(self._files))))
        file = self._files[shard] = os.open(self.folder / f"{self.shards[shard]['name']}.tar", os.O_RDONLY)
        return file

    def _load_index(self, entry: dict) -> np.ndarray:
        """Check a shard's files against the manifest and map its index."""
        for path in shard_files(self.folder, entry["name"]):
            if not path.is_file():
                raise _mismatch(self.folder, f"{path.name} is missing")
            expected, size = entry["files"][path.name]["bytes"], path.stat().st_size
            if size != expected:
                raise _mismatch(self.folder, f"{path.name} has {size} bytes instead of {expected}")
        try:
            index = np.load(self.folder / f"{entry['name']}.idx.npy", mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise _mismatch(self.folder, f"{entry['name']}.idx.npy is unreadable ({error})") from error
        tar_bytes = entry["files"][f"{entry['name']}.tar"]["bytes"]
        if index.dtype != INDEX_DTYPE or len(index) != entry["documents"]:
            raise _mismatch(self.folder, f"{entry['name']}.idx.npy does not list {entry['documents']} documents")
        if (index["offset"] + index["tokens"] * np.uint64(self.dtype.itemsize)).max() > tar_bytes:
            raise _mismatch(self.folder, f"{entry['name']}.idx.npy points beyond the end of its tar")
        return np.asarray(index)  # a plain array over the map: np.memmap is slow to index


def open_shards(folder: str | Path) -> Corpus:
    """Open a folder that tools/preprocess_data.py wrote; ValueError when it is not whole."""
    return Corpus(folder)


def _close_files(files: dict[int, int]) -> None:
    for file in files.values():
        os.close(file)


def _load_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"no shards at {folder}: it has no {MANIFEST}, which is written last. Run tools/preprocess_data.py "
            f"with --output {folder} (again: it finishes what is missing)."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
        manifest["vocabulary"], manifest["documents"], manifest["shards"][0]["files"]
        names = [entry["name"] for entry in manifest["shards"]]
    except (ValueError, KeyError, IndexError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no manifest of shards ({type(error).__name__}: {error}).") from error
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}; this version reads format {FORMAT}. Preprocess the data again.")
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{path} names a shard outside its own folder.")
    return manifest


def _mismatch(folder: Path, what: str) -> ValueError:
    return ValueError(
        f"the shards at {folder} do not match their {MANIFEST}: {what}. Copy the folder again, or write it again "
        f"with tools/preprocess_data.py --overwrite."
    )


def _raise_open_files(shards: int) -> int:
    """File descriptors that shards may hold at once (a map holds one too); asks for as many as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = shards + _OPEN_FILES_KEPT_FREE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return shards if soft == resource.RLIM_INFINITY else max(16, soft - _OPEN_FILES_KEPT_FREE)
