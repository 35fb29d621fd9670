"""Shards: tokenized documents in plain WebDataset tars (written by writer.py), and the reader of a folder of them.

    shards/manifest.json              vocabulary, counts, checksums, the command and its options
    shards/shard-000000-000.tar       one member <key>.tokens.npy per document (uint16, or uint32)
    shards/shard-000000-000.idx.npy   (offset u64, tokens u32, crc32 u32) per document
    shards/shard-000000-000.parquet   key, caption, image, source, picture_sha256, extra, kind
    shards/shard-000000-000.targets.npy   only with instruction documents: their targets (targets.py)

`offset` is the position of a document's first token in the tar, in bytes (after the .npy header). The crc32 is over the
token bytes and is checked when a process reads a document for the first time. Documents are numbered in the order of
the manifest. A pair is stored as text ids, <break>, image ids; a text as its ids; an interleaved document as its texts
and images in their order, separated by <break>. No document holds </s>.

`caption` is set for pairs only: other texts can be decoded from their ids exactly. Names and checksums of the images of
an interleaved document are separated by newlines.
"""

import hashlib
import json
import mmap
import os
import platform
import resource
import weakref
import zlib
from pathlib import Path
from tokenize import TokenError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_cm3leon.common.atomic_io import add_checksum, sha256_file
from megatron_cm3leon.data.shards.targets import TARGETS_DTYPE, TARGETS_ENDING, load_targets
from megatron_cm3leon.tokenizers.vocab import Vocabulary

FORMAT, FORMAT_WITH_TARGETS = 1, 2
"""Formats of a manifest. Shards with targets have their own, because an older reader would train on their prompts."""
MANIFEST = "manifest.json"
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("tokens", "<u4"), ("crc32", "<u4")])
METADATA_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "caption", "image", "source", "picture_sha256", "extra", "kind")]
)
_OPEN_FILES_KEPT_FREE = 256


def split_segments(ids: np.ndarray, vocabulary: Vocabulary) -> list[np.ndarray]:
    """Segments of a document: its ids [tokens] split at each <break>, without the <break>s."""
    breaks = np.flatnonzero(ids == vocabulary.break_id)
    starts, ends = np.append(0, breaks + 1), np.append(breaks, len(ids))
    return [ids[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def shard_files(folder: Path, entry: dict) -> list[Path]:
    """The files of a shard, from its entry in the manifest: three, and that of its targets if it has any."""
    endings = (".tar", ".idx.npy", ".parquet", *([TARGETS_ENDING] if _has_targets(entry) else []))
    return [folder / f"{entry['name']}{ending}" for ending in endings]


def _has_targets(entry: dict) -> bool:
    return f"{entry['name']}{TARGETS_ENDING}" in entry["files"]


def build_manifest(vocabulary: Vocabulary, shards: list[dict], **others) -> dict:
    """The content of a manifest with its SHA-256; `others`: further fields (accounts, command, options ...)."""
    manifest = {
        "format": FORMAT_WITH_TARGETS if any(map(_has_targets, shards)) else FORMAT,
        "content_sha256": hash_content(vocabulary.hash, shards),
        "vocabulary": vocabulary.to_dict(),
        "documents": sum(entry["documents"] for entry in shards),
        "tokens": sum(entry["tokens"] for entry in shards),
        "shards": shards,
        **others,
    }
    return add_checksum(manifest)


def check_seal(path: Path, content: dict) -> None:
    """ValueError if a file's content does not match its "sha256"; older files have none."""
    if "sha256" in content and add_checksum(content) != content:
        raise ValueError(f"{path} is damaged: it does not match its SHA-256. Restore it, or create the folder again.")


def hash_content(vocabulary_hash: str, shards: list[dict]) -> str:
    """Identity of documents and their metadata, from a manifest's entries: SHA-256, hexadecimal.

    It is the same for shards written again elsewhere, by a different command line or number of workers or tasks.
    """
    checksums = [file["sha256"] for entry in shards for file in entry["files"].values()]
    return hashlib.sha256("\n".join([vocabulary_hash, *checksums]).encode()).hexdigest()


class Corpus:
    """Documents of a shard folder, by number; memory-mapped, safe to fork and to pickle.

    Raises ValueError if the folder is incomplete or does not match its manifest.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = load_manifest(self.folder)
        self.vocabulary = Vocabulary.from_dict(self.manifest["vocabulary"])
        self.shards = self.manifest["shards"]
        self.dtype = self.vocabulary.dtype.newbyteorder("<")
        self._indexes = [self._load_index(entry) for entry in self.shards]
        self._starts = np.cumsum([0] + [len(index) for index in self._indexes])
        self.documents = int(self._starts[-1])
        self.lengths = np.concatenate([index["tokens"] for index in self._indexes])
        """Tokens of each document, uint32."""
        self._targets, self._target_starts = self._load_targets()
        self._checked = np.zeros(self.documents // 8 + 1, np.uint8)  # one bit per document: its crc was checked
        self._checked_metadata: set[int] = set()
        self._files: dict[int, int] = {}
        weakref.finalize(self, _close_files, self._files)
        self._maps: dict[int, tuple[mmap.mmap, np.ndarray]] = {}
        self._map_limit = _raise_open_files(2 * len(self.shards)) // 2
        if self.documents != self.manifest["documents"]:
            raise _mismatch(
                self.folder, f"it lists {self.manifest['documents']} documents, the index files {self.documents}"
            )

    def __reduce__(self) -> "tuple[type[Corpus], tuple[str]]":
        return Corpus, (str(self.folder),)

    @property
    def identity(self) -> str:
        """Hash of the documents, their targets and their order.

        SHA-256 of the vocabulary and, for every shard, the checksum of its tar and of its targets if it has any.
        """
        parts = [self.vocabulary.hash]
        for entry in self.shards:
            parts.append(entry["sha256"])
            if _has_targets(entry):
                parts.append(entry["files"][entry["name"] + TARGETS_ENDING]["sha256"])
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def read(self, number: int) -> np.ndarray:
        """Ids of a document (read-only view of the file, uint16 or uint32), after checking its crc32.

        Raises ValueError with shard and document if the bytes are damaged, IndexError if there is no such document.
        """
        shard, row, offset, tokens, crc = self._locate(number)
        ids = self._map(shard)[1][offset : offset + tokens * self.dtype.itemsize]
        if zlib.crc32(ids.data) != crc:
            raise self._damaged(shard, row)
        return ids.view(self.dtype)

    def read_into(self, numbers: np.ndarray, out: np.ndarray, starts: np.ndarray) -> None:
        """Read documents `numbers` (int64) into `out` (of the shards' dtype), each at its index in `starts` (int64).

        Reads the files instead of their memory maps, which halves the time if a page is touched for the first time. The
        crc32 of each document is checked the first time that this process reads it. Raises as `read`, and for a
        truncated file.
        """
        bits = np.left_shift(1, numbers & 7).astype(np.uint8)
        checked = (self._checked[numbers >> 3] & bits).tolist()
        size, memory, files = self.dtype.itemsize, out.data.cast("B"), self._files
        targets = (starts * size).tolist()
        for (shard, row, offset, tokens, crc), known, target in zip(
            self._locate_many(numbers), checked, targets, strict=True
        ):
            part = memory[target : target + tokens * size]
            found = os.preadv(files[shard] if shard in files else self._open(shard), (part,), offset)
            if found != len(part) or (not known and zlib.crc32(part) != crc):
                raise self._damaged(shard, row)
        np.bitwise_or.at(self._checked, numbers >> 3, bits)

    @property
    def has_targets(self) -> bool:
        """Whether a document has targets."""
        return len(self._targets) > 0

    def targets(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Targets of documents `numbers` (int64): for each its ranges [start, end), int64 [targets, 2], in order."""
        if not self.has_targets:
            return [np.empty((0, 2), np.int64)] * len(numbers)
        ranges = []
        for first, last in zip(self._target_starts[numbers], self._target_starts[numbers + 1], strict=True):
            rows = self._targets[first:last]
            ranges.append(np.stack([rows["start"], rows["end"]], 1).astype(np.int64))
        return ranges

    def all_targets(self) -> tuple[np.ndarray, np.ndarray]:
        """All targets, of TARGETS_DTYPE with numbers of documents in this corpus, and how many each document has.

        The second array is int64 [documents]; both are empty if there are no targets.
        """
        return self._targets, np.diff(self._target_starts)

    def metadata(self, columns: list[str] | None = None) -> pa.Table:
        """Metadata of all documents in their order; `columns`: names from METADATA_SCHEMA, None for all."""
        paths = [self.metadata_file(shard) for shard in range(len(self.shards))]
        return pa.concat_tables([pq.read_table(path, columns=columns) for path in paths])

    def metadata_row(self, number: int) -> dict:
        """Metadata of one document; reads only the file of its shard."""
        shard, row, *_ = self._locate(number)
        path = self.metadata_file(shard)
        return pq.read_table(path, memory_map=True).slice(row, 1).to_pylist()[0]

    def metadata_file(self, shard: int) -> Path:
        """Path of a shard's Parquet file; its SHA-256 is checked once per process. ValueError if it is damaged."""
        name = f"{self.shards[shard]['name']}.parquet"
        path = self.folder / name
        if shard not in self._checked_metadata:
            if sha256_file(path) != self.shards[shard]["files"][name]["sha256"]:
                raise _mismatch(self.folder, f"{name} is damaged, it does not match its SHA-256")
            self._checked_metadata.add(shard)
        return path

    def prefetch(self, numbers: np.ndarray) -> None:
        """Let the kernel read documents `numbers` (int64) ahead; only a hint."""
        size, files = self.dtype.itemsize, self._files
        for shard, _, offset, tokens, _ in self._locate_many(numbers):
            file = files[shard] if shard in files else self._open(shard)
            os.posix_fadvise(file, offset, tokens * size, os.POSIX_FADV_WILLNEED)

    def _locate_many(self, numbers: np.ndarray) -> list[tuple[int, int, int, int, int]]:
        """`_locate` for many documents, which must exist."""
        shards = np.searchsorted(self._starts, numbers, "right") - 1
        rows = numbers - self._starts[shards]
        indexes = self._indexes
        return [
            (shard, row, *indexes[shard].item(row)) for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)
        ]

    def _locate(self, number: int) -> tuple[int, int, int, int, int]:
        """Shard, row in the shard, and (offset, tokens, crc32) of a document."""
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} is outside 0..{self.documents - 1} of {self.folder}")
        shard = int(np.searchsorted(self._starts, number, "right")) - 1
        row = number - int(self._starts[shard])
        return (shard, row, *self._indexes[shard].item(row))

    def _damaged(self, shard: int, row: int) -> ValueError:
        name = self.shards[shard]["name"]
        index = self.folder / f"{name}.idx.npy"
        cause = f"its bytes do not match their crc32 in {index.name}"
        if sha256_file(index) != self.shards[shard]["files"][index.name]["sha256"]:
            cause = f"{index.name} does not match its SHA-256"
        return ValueError(
            f"document {self._starts[shard] + row} (row {row} of {self.folder / name}.tar) is damaged: {cause}. "
            f"Copy this shard again, or preprocess the data again with tools/preprocess_data.py --overwrite."
        )

    def _map(self, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        mapped = self._maps.get(shard)
        if mapped is None:
            if len(self._maps) >= self._map_limit:
                del self._maps[next(iter(self._maps))]
            with open(self.folder / f"{self.shards[shard]['name']}.tar", "rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped = self._maps[shard] = content, np.frombuffer(content, np.uint8)
        return mapped

    def _open(self, shard: int) -> int:
        """File descriptor of a shard's tar; the oldest one is closed if too many are open."""
        if len(self._files) >= self._map_limit:
            os.close(self._files.pop(next(iter(self._files))))
        path = self.folder / f"{self.shards[shard]['name']}.tar"
        try:
            file = self._files[shard] = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(
                f"{path} cannot be opened: {error.strerror}; it existed when the run started. Check that the file "
                f"system is mounted on {platform.node()} and start the same command again."
            ) from error
        return file

    def _load_index(self, entry: dict) -> np.ndarray:
        """Check a shard's files against the manifest and map its index."""
        for path in shard_files(self.folder, entry):
            if not path.is_file():
                raise _mismatch(self.folder, f"{path.name} is missing")
            expected, size = entry["files"][path.name]["bytes"], path.stat().st_size
            if size != expected:
                raise _mismatch(self.folder, f"{path.name} has {size} bytes instead of {expected}")
        try:
            index = np.load(self.folder / f"{entry['name']}.idx.npy", mmap_mode="r", allow_pickle=False)
        except (ValueError, SyntaxError, TokenError) as error:  # raised by numpy for a damaged header
            raise _mismatch(self.folder, f"{entry['name']}.idx.npy is unreadable ({error})") from error
        tar_bytes = entry["files"][f"{entry['name']}.tar"]["bytes"]
        if index.dtype != INDEX_DTYPE or len(index) != entry["documents"]:
            raise _mismatch(self.folder, f"{entry['name']}.idx.npy does not list {entry['documents']} documents")
        if (tokens := int(index["tokens"].sum(dtype=np.uint64))) != entry["tokens"]:
            # The layout of every sequence depends on the lengths: an error must be found before documents are read.
            raise _mismatch(self.folder, f"{entry['name']}.idx.npy counts {tokens} tokens instead of {entry['tokens']}")
        if (index["offset"] + index["tokens"] * np.uint64(self.dtype.itemsize)).max() > tar_bytes:
            raise _mismatch(self.folder, f"{entry['name']}.idx.npy points beyond the end of its tar")
        return np.asarray(index)  # a plain array over the map: np.memmap is slow to index

    def _load_targets(self) -> tuple[np.ndarray, np.ndarray]:
        """Targets of all documents, and the first one of each document, int64 [documents + 1]; empty without any."""
        parts = []
        for entry, first, index in zip(self.shards, self._starts.tolist(), self._indexes, strict=False):
            if _has_targets(entry):
                name = entry["name"] + TARGETS_ENDING
                try:
                    rows = load_targets(self.folder / name, entry["files"][name]["sha256"], index["tokens"])
                except ValueError as error:
                    raise _mismatch(self.folder, str(error)) from error
                rows["document"] += first
                parts.append(rows)
        if not parts:
            return np.empty(0, TARGETS_DTYPE), np.empty(0, np.int64)
        targets = np.concatenate(parts)
        counts = np.bincount(targets["document"], minlength=self.documents)
        return targets, np.concatenate([[0], np.cumsum(counts)])


def open_shards(folder: str | Path) -> Corpus:
    """Open a folder that tools/preprocess_data.py wrote; ValueError if it is incomplete."""
    return Corpus(folder)


def _close_files(files: dict[int, int]) -> None:
    for file in files.values():
        os.close(file)


def load_manifest(folder: Path) -> dict:
    """Read and check the manifest of a shard folder; ValueError if there is none or it has an unknown format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"no shards at {folder}: it has no {MANIFEST}, which is written last. Run tools/preprocess_data.py "
            f"with --output {folder} (again, if it was interrupted)."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
        manifest["vocabulary"], manifest["documents"], manifest["shards"][0]["files"]
        names = [entry["name"] for entry in manifest["shards"]]
    except (ValueError, KeyError, IndexError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a valid manifest of shards ({type(error).__name__}: {error}).") from error
    check_seal(path, manifest)
    if found not in (FORMAT, FORMAT_WITH_TARGETS):
        raise ValueError(
            f"{path} has format {found}; this version reads formats {FORMAT} and {FORMAT_WITH_TARGETS}. Preprocess the "
            f"data again."
        )
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{path} refers to a shard outside its folder; preprocess the data again.")
    return manifest


def _mismatch(folder: Path, what: str) -> ValueError:
    return ValueError(
        f"the shards at {folder} do not match their {MANIFEST}: {what}. Copy the folder again, or preprocess the data "
        f"again with tools/preprocess_data.py --overwrite."
    )


def _raise_open_files(shards: int) -> int:
    """File descriptors that shards may use (a memory map uses one, too); raises the process limit as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = shards + _OPEN_FILES_KEPT_FREE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return shards if soft == resource.RLIM_INFINITY else max(16, soft - _OPEN_FILES_KEPT_FREE)
