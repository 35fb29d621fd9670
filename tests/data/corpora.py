"""Synthetic shard folders and neighbor tables for tests of the data code and of training."""

from dataclasses import dataclass

import numpy as np

from megatron_cm3leon.common.atomic_io import write_json
from megatron_cm3leon.data.shards.reader import MANIFEST, build_manifest, open_shards
from megatron_cm3leon.data.shards.writer import ShardWriter
from megatron_cm3leon.tokenizers.vocab import Vocabulary


def make_vocabulary(text=100, image=32, height=4, width=4, sentinels=16, specials=32) -> Vocabulary:
    """A vocabulary of these sizes that belongs to no tokenizer files."""
    return Vocabulary(
        text_size=text,
        image_size=image,
        sentinels=sentinels,
        specials=specials,
        image_height=height,
        image_width=width,
        text_sha256="0" * 64,
        image_sha256="1" * 64,
    )


def write_shards(folder, documents, vocabulary, shard_documents=40, targets=None):
    """Write rows of ids as a shard folder; returns the opened Corpus.

    `targets`: ranges (start, end) of each document.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for start in range(0, len(documents), shard_documents):
        writer = ShardWriter(folder, f"shard-{start // shard_documents:06d}-000", vocabulary)
        for number, ids in enumerate(documents[start : start + shard_documents], start):
            row = {"caption": f"caption {number}", "image": f"{number}.png", "source": "made", "extra": "{}"}
            ranges = targets[number] if targets else ()
            writer.add(f"{number:08d}", np.array(ids), {**row, "picture_sha256": ""}, ranges)
        entries.append(writer.close())
    write_json(folder / MANIFEST, build_manifest(vocabulary, entries))
    return open_shards(folder)


def make_pairs(count, vocabulary, seed=0, text=(1, 12)):
    """Random pairs: text, <break>, one image."""
    generator = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        words = generator.integers(0, vocabulary.text_size, generator.integers(*text))
        codes = generator.integers(vocabulary.image_start, vocabulary.image_end, vocabulary.image_tokens)
        pairs.append(np.concatenate([words, [vocabulary.break_id], codes]))
    return pairs


def make_instructions(count, vocabulary):
    """Instruction documents and their targets: a question, a drawing, an edit, a chat; every fifth has none."""
    v, draws = vocabulary, np.random.default_rng(5)

    def text(longest):
        return draws.integers(0, v.text_size, draws.integers(1, longest + 1)).tolist()

    def image():
        return draws.integers(v.image_start, v.image_end, v.image_tokens).tolist()

    documents, targets = [], []
    for number in range(count):
        pieces = [  # (ids, is a target); [<break>] between segments
            [(text(5), False), (text(3), True), ([7], False), ([v.break_id], False), (image(), False)],
            [(text(6), False), ([v.break_id], False), (image(), True)],
            [(image(), False), ([v.break_id], False), (text(4), False), ([v.break_id], False), (image(), True)],
            [(text(3), False), (text(2), True), (text(3), False), (text(2), True), (text(2), False), (text(3), True)],
            [(text(4), False), ([v.break_id], False), (image(), False)],
        ][number % 5]
        ends = np.cumsum([len(ids) for ids, _ in pieces]).tolist()
        documents.append([token for ids, _ in pieces for token in ids])
        targets.append([(end - len(ids), end) for end, (ids, chosen) in zip(ends, pieces, strict=True) if chosen])
    return documents, targets


def write_instructions(folder, count, vocabulary):
    """A shard folder of make_instructions; returns the opened Corpus."""
    documents, targets = make_instructions(count, vocabulary)
    return write_shards(folder, documents, vocabulary, targets=targets)


@dataclass
class Neighbors:
    """The part of the result of retrieval.neighbors.load_neighbors that the stream uses."""

    table: np.ndarray
    bank: object

    def check(self, rows):
        """The table is in memory: there is no file to check."""


def make_neighbors(corpus, columns=5, seed=0, missing=0.1):
    """Random neighbors from the corpus itself; rows with fewer neighbors end with -1."""
    generator = np.random.default_rng(seed)
    table = generator.integers(0, corpus.documents, (corpus.documents, columns))
    counts = generator.binomial(columns, 1 - missing, corpus.documents)
    table[np.arange(columns) >= counts[:, None]] = -1
    return Neighbors(table, corpus)


class ByteText:
    """A text tokenizer whose pieces are bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids) -> str:
        return bytes(ids).decode()


class MeanImage:
    """An image tokenizer of 8 x 8 pixels: four codes, the mean brightness of each quarter in 16 steps."""

    image_size, grid, codebook_size = 8, (2, 2), 16

    def encode(self, pixels):
        assert pixels.shape[1:] == (3, 8, 8) and pixels.dtype.is_floating_point
        means = pixels.mean(1).unflatten(1, (2, 4)).unflatten(3, (2, 4)).mean((2, 4))
        return ((means + 1) * 7.5).round().long().flatten(1)


class ByteTokenizers:
    """Replaces the tokenizers of a folder in tests of shards."""

    def __init__(self) -> None:
        self.text, self.image = ByteText(), MeanImage()
        self.vocabulary = make_vocabulary(text=256, image=16, height=2, width=2)

    @classmethod
    def load(cls, folder) -> "ByteTokenizers":
        return cls()


def write_images(folder, count):
    """Write `count` small gray images and a pairs.jsonl that lists them; returns its path."""
    import json

    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        Image.new("RGB", (10, 8), (number * 7 % 256,) * 3).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": f"picture {number}", "id": number}))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
