"""A shard folder looked at: checksums, statistics, pictures decoded from tokens (tools/inspect_shards.py)."""

import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from megatron_cm3leon.common.progress import track
from megatron_cm3leon.data.shards.reader import Corpus, sha256_file, shard_files, split_segments
from megatron_cm3leon.tokenizers.images import from_pixels
from megatron_cm3leon.tokenizers.vocab import check_same_vocabulary

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


def find_damage(corpus: Corpus, threads: int = 4) -> list[str]:
    """What differs from the manifest: names of files and, inside a damaged tar, of its damaged documents."""
    files = [(entry, path) for entry in corpus.shards for path in shard_files(corpus.folder, entry["name"])]
    damaged = []
    with ThreadPoolExecutor(threads) as pool:  # SHA-256 releases the interpreter
        sums = pool.map(lambda file: sha256_file(file[1]), files)
        for (entry, path), found in track(
            zip(files, sums, strict=True), label="verify", unit="files", total=len(files)
        ):
            if found != entry["files"][path.name]["sha256"]:
                rows = _find_damaged_rows(corpus, entry) if path.suffix == ".tar" else []
                where = (
                    f" in documents {', '.join(map(str, rows[:5]))}{' ...' if len(rows) > 5 else ''}" if rows else ""
                )
                damaged.append(f"{path.name}: its sha256 is not the manifest's{where}")
    return damaged


def _find_damaged_rows(corpus: Corpus, entry: dict) -> list[int]:
    """Numbers, in the corpus, of a shard's documents whose bytes do not have their crc32."""
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
class Statistics:
    """Figures of a corpus; token counts and shares are of the documents looked at."""

    documents: int
    tokens: int
    lengths: list[int]
    """Tokens a document at QUANTILES."""
    seen: int
    """Documents whose ids were read."""
    kinds: Counter = field(default_factory=Counter)
    text_tokens: int = 0
    image_tokens: int = 0
    pictures: int = 0
    codes: int = 0
    """Different image codes met."""


def measure(corpus: Corpus, most: int = 100_000) -> Statistics:
    """Statistics of all documents' lengths, and of the ids of at most `most` documents spread over the corpus."""
    vocabulary = corpus.vocabulary
    lengths = np.quantile(corpus.lengths, QUANTILES, method="nearest").astype(int).tolist()
    numbers = np.unique(np.linspace(0, corpus.documents - 1, min(most, corpus.documents)).astype(int))
    found = Statistics(corpus.documents, int(corpus.lengths.sum(dtype=np.int64)), lengths, len(numbers))
    used = np.zeros(vocabulary.image_size, bool)
    for number in track(numbers.tolist(), label="read", unit="documents"):
        ids = corpus.read(number)
        image = ids[vocabulary.is_image(ids)]
        used[image - vocabulary.image_start] = True
        found.image_tokens += len(image)
        found.text_tokens += int(vocabulary.is_text(ids).sum())
        found.pictures += len(image) // vocabulary.image_tokens
        found.kinds[find_kind(ids, corpus)] += 1
    found.codes = int(used.sum())
    return found


def find_kind(ids: np.ndarray, corpus: Corpus) -> str:
    """pair, text or interleaved, from the ids alone."""
    segments = split_segments(ids, corpus.vocabulary)
    images = [bool(len(segment) and corpus.vocabulary.is_image(int(segment[0]))) for segment in segments]
    if not any(images):
        return "text" if len(segments) == 1 else "interleaved"
    return "pair" if sorted(images) == [False, True] else "interleaved"


def decode_pictures(corpus: Corpus, tokenizers, count: int) -> tuple[list[Image.Image], list[str]]:
    """Pictures decoded from tokens, of documents spread over the corpus, each with its number and the text before it.

    Text comes from the tokens too: what is shown is what training reads.
    """
    check_same_vocabulary(tokenizers.vocabulary, corpus.vocabulary, f"the shards at {corpus.folder}")
    vocabulary, pictures, captions = corpus.vocabulary, [], []
    for number in np.unique(
        np.linspace(0, corpus.documents - 1, min(4 * count, corpus.documents)).astype(int)
    ).tolist():
        segments = split_segments(corpus.read(number).astype(np.int64), vocabulary)
        texts = [part for part in segments if len(part) and vocabulary.is_text(int(part[0]))]
        for part in segments:
            if len(part) == vocabulary.image_tokens and vocabulary.is_image(part).all():
                codes = torch.from_numpy(part - vocabulary.image_start)
                pictures.append(from_pixels(tokenizers.image.decode(codes[None])[0]))
                text = tokenizers.text.decode(texts[0].tolist()) if texts else ""
                captions.append(f"{number}: {text}")
                break
    step = max(1, len(pictures) // count)
    return pictures[::step][:count], captions[::step][:count]


def describe(corpus: Corpus, found: Statistics) -> str:
    """Manifest and statistics as lines of text."""
    manifest, sizes = corpus.manifest, 0
    for entry in corpus.shards:
        sizes += sum(file["bytes"] for file in entry["files"].values())
    part = "" if found.seen == found.documents else f" (of {found.seen} documents)"
    lines = [
        f"{corpus.folder}: {found.documents} documents, {found.tokens} tokens, {len(corpus.shards)} shards, "
        f"{sizes / 1e6:.1f} MB",
        f"vocabulary {corpus.vocabulary.hash}, {corpus.vocabulary.size} ids as {corpus.dtype.name}, "
        f"{corpus.vocabulary.image_tokens} tokens a picture",
        "tokens a document: " + ", ".join(f"{q:.0%} {n}" for q, n in zip(QUANTILES, found.lengths, strict=True)),
        f"kinds{part}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(found.kinds.items())),
        f"tokens{part}: {found.text_tokens} of text, {found.image_tokens} of {found.pictures} pictures",
        f"image codes met{part}: {found.codes} of {corpus.vocabulary.image_size}",
    ]
    accounts = manifest.get("accounts")
    if accounts:
        names = ("read", "written", "duplicates", "filtered", "quarantined")
        lines.append("inputs: " + ", ".join(f"{accounts[name]} {name}" for name in names if name in accounts))
        lines += [f"  {count} x {reason}" for reason, count in accounts["reasons"].items()]
    if manifest.get("command"):
        lines.append(f"made by: {manifest['command']}")
    return "\n".join(lines)


def require_whole(corpus: Corpus) -> None:
    """ValueError that names every damaged file."""
    damaged = find_damage(corpus)
    if damaged:
        raise ValueError(
            f"{len(damaged)} files at {corpus.folder} are damaged: {'; '.join(damaged)}. Copy them again, or write the "
            f"folder again with tools/preprocess_data.py --overwrite."
        )
