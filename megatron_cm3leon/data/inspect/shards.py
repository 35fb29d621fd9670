"""Checksums and statistics of a shard folder, and images decoded from its tokens (tools/inspect_shards.py)."""

import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from megatron_cm3leon.common.atomic_io import sha256_file
from megatron_cm3leon.common.progress import track
from megatron_cm3leon.data.shards.reader import Corpus, shard_files, split_segments
from megatron_cm3leon.tokenizers.images import from_pixels
from megatron_cm3leon.tokenizers.vocab import check_same_vocabulary

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


def find_damaged_files(corpus: Corpus, threads: int = 4) -> list[str]:
    """The files that differ from the manifest, as text; for a tar, with the numbers of the damaged documents."""
    files = [(entry, path) for entry in corpus.shards for path in shard_files(corpus.folder, entry)]
    damaged = []
    with ThreadPoolExecutor(threads) as pool:  # SHA-256 releases the interpreter lock
        sums = pool.map(lambda file: sha256_file(file[1]), files)
        for (entry, path), found in track(
            zip(files, sums, strict=True), label="verify", unit="files", total=len(files)
        ):
            if found != entry["files"][path.name]["sha256"]:
                rows = _find_damaged_rows(corpus, entry) if path.suffix == ".tar" else []
                where = (
                    f" in documents {', '.join(map(str, rows[:5]))}{' ...' if len(rows) > 5 else ''}" if rows else ""
                )
                damaged.append(f"{path.name}: its sha256 differs from the manifest{where}")
    return damaged


def _find_damaged_rows(corpus: Corpus, entry: dict) -> list[int]:
    """Numbers of a shard's documents whose bytes do not match their crc32."""
    first = sum(other["documents"] for other in corpus.shards[: corpus.shards.index(entry)])
    rows = []
    index = np.load(corpus.folder / f"{entry['name']}.idx.npy", allow_pickle=False)
    with open(corpus.folder / f"{entry['name']}.tar", "rb") as file:
        for row, (offset, tokens, crc) in enumerate(index.tolist()):
            file.seek(offset)
            if zlib.crc32(file.read(tokens * corpus.dtype.itemsize)) != crc:
                rows.append(first + row)
    return rows


@dataclass
class ShardStats:
    """Statistics of a corpus; all counts of tokens and kinds are of the documents that were read."""

    documents: int
    tokens: int
    lengths: list[int]
    """Quantiles of the tokens per document, at QUANTILES."""
    read: int
    """Documents whose ids were read."""
    kinds: Counter[str] = field(default_factory=Counter)
    text_tokens: int = 0
    image_tokens: int = 0
    images: int = 0
    codes: int = 0
    """Number of different image codes."""


def measure_shards(corpus: Corpus, max_documents: int = 100_000) -> ShardStats:
    """Statistics of the lengths of all documents, and of the ids of at most `max_documents` evenly spaced ones."""
    vocabulary = corpus.vocabulary
    lengths = np.quantile(corpus.lengths, QUANTILES, method="nearest").astype(int).tolist()
    numbers = np.unique(np.linspace(0, corpus.documents - 1, min(max_documents, corpus.documents)).astype(int))
    found = ShardStats(corpus.documents, int(corpus.lengths.sum(dtype=np.int64)), lengths, len(numbers))
    used = np.zeros(vocabulary.image_size, bool)
    for number in track(numbers.tolist(), label="read", unit="documents"):
        ids = corpus.read(number)
        image = ids[vocabulary.is_image(ids)]
        used[image - vocabulary.image_start] = True
        found.image_tokens += len(image)
        found.text_tokens += int(vocabulary.is_text(ids).sum())
        found.images += len(image) // vocabulary.image_tokens
        has_targets = len(corpus.targets(np.array([number]))[0]) > 0
        found.kinds["instruction" if has_targets else classify_document(ids, corpus)] += 1
    found.codes = int(used.sum())
    return found


def classify_document(ids: np.ndarray, corpus: Corpus) -> str:
    """Kind of a document without targets (pair, text or interleaved) from its ids."""
    segments = split_segments(ids, corpus.vocabulary)
    images = [bool(len(segment) and corpus.vocabulary.is_image(int(segment[0]))) for segment in segments]
    if not any(images):
        return "text" if len(segments) == 1 else "interleaved"
    return "pair" if sorted(images) == [False, True] else "interleaved"


def decode_images(corpus: Corpus, tokenizers, count: int) -> tuple[list[Image.Image], list[str]]:
    """Images decoded from the tokens of evenly spaced documents, each with "<document number>: <text>".

    The text is decoded from the tokens, too: both are what training reads. Raises ValueError if the tokenizers have a
    different vocabulary.
    """
    check_same_vocabulary(tokenizers.vocabulary, corpus.vocabulary, f"the shards at {corpus.folder}")
    vocabulary = corpus.vocabulary
    images: list[Image.Image] = []
    captions: list[str] = []
    for number in np.unique(
        np.linspace(0, corpus.documents - 1, min(4 * count, corpus.documents)).astype(int)
    ).tolist():
        segments = split_segments(corpus.read(number).astype(np.int64), vocabulary)
        texts = [part for part in segments if len(part) and vocabulary.is_text(int(part[0]))]
        for part in segments:
            if len(part) == vocabulary.image_tokens and vocabulary.is_image(part).all():
                codes = torch.from_numpy(part - vocabulary.image_start)
                images.append(from_pixels(tokenizers.image.decode(codes[None])[0]))
                text = tokenizers.text.decode(texts[0].tolist()) if texts else ""
                captions.append(f"{number}: {text}")
                break
    step = max(1, len(images) // count)
    return images[::step][:count], captions[::step][:count]


def describe_shards(corpus: Corpus, found: ShardStats) -> str:
    """Manifest and statistics as lines of text."""
    manifest, sizes = corpus.manifest, 0
    for entry in corpus.shards:
        sizes += sum(file["bytes"] for file in entry["files"].values())
    part = "" if found.read == found.documents else f" (of {found.read} documents)"
    lines = [
        f"{corpus.folder}: {found.documents} documents, {found.tokens} tokens, {len(corpus.shards)} shards, "
        f"{sizes / 1e6:.1f} MB",
        f"vocabulary {corpus.vocabulary.hash}, {corpus.vocabulary.size} ids as {corpus.dtype.name}, "
        f"{corpus.vocabulary.image_tokens} tokens per image",
        "tokens per document: " + ", ".join(f"{q:.0%} {n}" for q, n in zip(QUANTILES, found.lengths, strict=True)),
        f"kinds{part}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(found.kinds.items())),
        f"tokens{part}: {found.text_tokens} of text, {found.image_tokens} of {found.images} images",
        f"image codes used{part}: {found.codes} of {corpus.vocabulary.image_size}",
    ]
    if corpus.has_targets:
        rows, targets = corpus.all_targets()
        tokens = int((rows["end"].astype(np.int64) - rows["start"]).sum())
        lines.append(f"targets: {tokens} tokens of {len(rows)} targets in {int((targets > 0).sum())} documents")
    counts = manifest.get("accounts")
    if counts:
        names = ("read", "written", "duplicates", "filtered", "quarantined")
        lines.append("inputs: " + ", ".join(f"{counts[name]} {name}" for name in names if name in counts))
        lines += [f"  {count} x {reason}" for reason, count in counts["reasons"].items()]
    if manifest.get("command"):
        lines.append(f"written by: {manifest['command']}")
    return "\n".join(lines)


def verify_shards(corpus: Corpus) -> None:
    """Check the SHA-256 of every file; ValueError with all damaged files."""
    damaged = find_damaged_files(corpus)
    if damaged:
        raise ValueError(
            f"{len(damaged)} files at {corpus.folder} are damaged: {'; '.join(damaged)}. Copy them again, or "
            f"preprocess the data again with tools/preprocess_data.py --overwrite."
        )
