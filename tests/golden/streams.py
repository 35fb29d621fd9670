"""Streams of golden.json: deterministic documents, several settings, the first three batches of each."""

import hashlib
import json
from pathlib import Path

import numpy as np

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.data.stream.identity import describe_sources, identify
from megatron_cm3leon.data.stream.samples import DataSource
from megatron_cm3leon.data.stream.stream import Stream
from tests.data.corpora import Neighbors, make_vocabulary, write_shards

VOCABULARY = make_vocabulary()
SETTINGS = {
    "query": {},
    "query, weighted": {
        "retrieval.choice": "uniform",
        "retrieval.loss_weight": 0.25,
        "cm3.sentinel_loss_weight": 0.5,
        "cm3.rotation_probability": 0.5,
        "cm3.mean_spans": 3.0,
        "data.text_loss_weight": 2.0,
        "data.image_first_probability": 0.25,
    },
    "stream": {"data.packing": "stream", "data.attention": "sample"},
    "stream_whole_images": {"data.packing": "stream_whole_images"},
    "documents": {"data.packing": "documents", "data.attention": "sample", "retrieval.documents": 1, "seed": 7},
    "without retrieval": {"data.packing": "documents", "neighbors": False},
    "mixture": {"data.packing": "stream", "weights": (0.7, 0.3)},
}
"""Streams by name: what differs from a batch of 4 sequences of 96 tokens with 2 retrieved documents. `neighbors` and
`weights` (of two sources) are not fields of the configuration."""
INSTRUCTIONS = {
    "instructions": {"cm3.probability": 0.0},
    "instructions, packed": {
        "data.packing": "documents",
        "data.attention": "sample",
        "cm3.probability": 0.0,
        "sft.loss": "target",
        "sft.mask_targets": 0.75,
        "sft.drop_condition_probability": 0.25,
        "neighbors": False,
    },
    "instructions, mixed with pairs": {"data.packing": "stream", "retrieval.loss_weight": 0.5, "weights": (1.0, 1.0)},
}
"""The same for streams whose first source has targets."""


def hash_numbers(numbers: np.ndarray) -> str:
    """Hash of integers and their shape."""
    numbers = np.ascontiguousarray(numbers, "<i8")
    return hashlib.sha256(repr(numbers.shape).encode() + numbers.tobytes()).hexdigest()[:16]


def draw(*key) -> int:
    """A number below 2^32 that `key` determines, under every version of numpy."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


def make_documents(count: int, source: int) -> list[np.ndarray]:
    """Pairs: 1 to 12 text ids, <break>, one image."""
    v, documents = VOCABULARY, []
    for number in range(count):
        length = 1 + draw(source, number) % 12
        words = [draw("text", source, number, position) % v.text_size for position in range(length)]
        codes = [draw("image", source, number, position) % v.image_size for position in range(v.image_tokens)]
        documents.append(np.array([*words, v.break_id, *(v.image_start + code for code in codes)]))
    return documents


def make_instructions(count: int) -> tuple[list[np.ndarray], list[list[tuple[int, int]]]]:
    """Questions with an image after the answer, captions with an image to draw, chats, and pairs without targets."""
    v, documents, targets = VOCABULARY, [], []
    for number, pair in enumerate(make_documents(count, 2)):
        words = len(pair) - 1 - v.image_tokens
        answer = [draw("answer", number, position) % v.text_size for position in range(1 + number % 3)]
        if number % 4 == 0:
            pair, ranges = np.array([*pair[:words], *answer, *pair[words:]]), [(words, words + len(answer))]
        elif number % 4 == 1:
            ranges = [(words + 1, len(pair))]
        elif number % 4 == 2:
            turn = [*pair[:words].tolist(), *answer]
            pair, ranges = np.array([*turn, *turn]), [(words, len(turn)), (len(turn) + words, 2 * len(turn))]
        else:
            ranges = []
        documents.append(pair)
        targets.append(ranges)
    return documents, targets


def make_neighbors(corpus) -> Neighbors:
    """Four neighbors of a third of the documents, three and two of the others; -1 where there is none."""
    rows = range(corpus.documents)
    table = np.array([[draw("neighbor", row, column) % len(rows) for column in range(4)] for row in rows])
    table[np.arange(4) >= np.array([[4 - row % 3] for row in rows])] = -1
    return Neighbors(table, corpus)


def make_config(settings: dict) -> Config:
    """The configuration of one of SETTINGS."""
    config = Config()
    config.data.seq_length, config.train.global_batch_size, config.retrieval.documents = 95, 4, 2
    for name, value in settings.items():
        section, _, field = name.rpartition(".")
        if field not in ("neighbors", "weights"):
            setattr(getattr(config, section) if section else config, field, value)
    return config


def make_stream(settings: dict, corpora: list) -> Stream:
    """The stream of one of SETTINGS over one or two corpora."""
    neighbors = make_neighbors(corpora[0]) if settings.get("neighbors", True) else None
    weights = settings.get("weights", (1.0,))
    parts = zip(corpora, (neighbors, None), weights, strict=False)
    return Stream(make_config(settings), [DataSource(*part) for part in parts])


def describe_stream(stream: Stream) -> dict:
    """Identity, first three batches and some cursors of a stream. Loss weights are in units of 1/1024."""
    sequences, sources = stream.sequences(0, 12), describe_sources(stream.samples, stream.config)
    batches = [sequences[start : start + 4] for start in (0, 4, 8)]
    samples = [sequence.samples for sequence in sequences]
    weights = [np.stack([sequence.weights * 1024 for sequence in batch]).round() for batch in batches]
    targets = [sequence.targets for sequence in sequences]
    return {
        "identities": {version: identify(sources, stream.config, version) for version in (1, 2)},
        "sources": sources,
        "first sequence": str(sequences[0].tokens.tolist()),
        "tokens": [hash_numbers(np.stack([sequence.tokens for sequence in batch])) for batch in batches],
        "weights": [hash_numbers(numbers) for numbers in weights],
        "samples": None if samples[0] is None else hash_numbers(np.stack(samples)),
        **({} if targets[0] is None else {"targets": hash_numbers(np.stack(targets))}),
        "documents": str([sequence.documents.tolist() for sequence in sequences]),
        "retrieved": str([sequence.retrieved.tolist() for sequence in sequences]),
        "trimmed": str([sequence.trimmed for sequence in sequences]),
        "epochs": str([sequence.epoch for sequence in sequences]),
        "cursors": [json.dumps(stream.cursor(number)) for number in (0, 11, 5000)],
    }


def describe_streams(folder: Path) -> dict:
    """The streams of all SETTINGS and INSTRUCTIONS."""
    counts = (90, 40)
    corpora = [
        write_shards(folder / str(source), make_documents(count, source), VOCABULARY)
        for source, count in enumerate(counts)
    ]
    documents, targets = make_instructions(60)
    instructions = write_shards(folder / "instructions", documents, VOCABULARY, targets=targets)
    found = {name: describe_stream(make_stream(settings, corpora)) for name, settings in SETTINGS.items()}
    for name, settings in INSTRUCTIONS.items():
        found[name] = describe_stream(make_stream(settings, [instructions, corpora[1]]))
    return found
