"""The stream: block and batch numbers -> tokens, as a pure function of data, settings and seed.

    shards + neighbour table -> samples (samples.py) -> sources (packing.py) -> masked blocks (cm3.py)

`stream.block(n)` is the same for any number of ranks, workers or nodes, whenever it is asked for.
Batch b is blocks [b * G, (b + 1) * G), G = train.global_batch_size; epochs follow one another without end.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np

from megatron_cm3leon.config import Config
from megatron_cm3leon.data.cm3 import TOKENS_PER_SPAN, SpanSampler, mask_block
from megatron_cm3leon.data.packing import QueryPacking, Source, StreamPacking
from megatron_cm3leon.data.samples import Samples
from megatron_cm3leon.data.shards import open_shards

STREAM_VERSION = 1
"""Part of the fingerprint; raised by any change of the code that changes a block."""
_PACKINGS = {"query": QueryPacking, "stream": StreamPacking}


@dataclass
class Block:
    """One training sequence of seq_length + 1 tokens."""

    tokens: np.ndarray
    """int64 [seq_length + 1], after CM3 masking."""
    weights: np.ndarray
    """Loss weight of each token as a target, float32 [seq_length + 1]; 0 for <pad>."""
    samples: np.ndarray | None
    """Which sample of the block a token is of, int64 [seq_length + 1], -1 for <pad>; None under attention=causal."""
    trimmed: int
    """Tokens of the source that masking pushed out, or of a query too long for a block."""
    documents: np.ndarray
    """Numbers of the query documents in this block, int64."""
    retrieved: np.ndarray
    """Numbers of the retrieved documents in the memory bank, int64."""
    epoch: int
    """Epoch of the first token, from 0."""


class Stream:
    """Blocks of a corpus under the settings of a Config."""

    def __init__(self, config: Config, corpus, neighbors=None) -> None:
        """`neighbors` (.table, .bank) puts config.retrieval.documents in front of each query document."""
        self.config, self.corpus, self.neighbors = config, corpus, neighbors
        self.vocabulary = corpus.vocabulary
        self.length = config.data.seq_length + 1
        self.global_batch_size = config.train.global_batch_size
        self.samples = Samples(
            corpus,
            neighbors,
            seed=config.seed,
            documents=config.retrieval.documents,
            choice=config.retrieval.choice,
            image_first_probability=config.data.image_first_probability,
        )
        self.packing = _PACKINGS[config.data.packing](self.samples, self.length)
        if self.packing.max_growth < 0:
            needed = self.length - 1 - self.packing.max_growth
            raise ValueError(
                f"data.seq_length ({config.data.seq_length}) cannot hold a picture of "
                f"{self.vocabulary.image_tokens} tokens with </s>, <break> and text, which packing=query needs; "
                f"give at least {needed}, or use packing=stream or an image tokenizer with fewer tokens."
            )
        limit = min(self.vocabulary.sentinels, self.packing.max_growth // TOKENS_PER_SPAN)
        self.sampler = SpanSampler(config.cm3, config.seed, limit)

    def blocks(self, start: int, stop: int) -> list[Block]:
        """Blocks start..stop-1."""
        assert 0 <= start <= stop, f"there are no blocks {start}..{stop}"
        if start == stop:
            return []
        numbers = np.arange(start, stop)
        draws = self.sampler.draw(numbers)
        sources = self.packing.sources(numbers, TOKENS_PER_SPAN * draws.spans)
        tokens = np.full((len(numbers), self.length), self.vocabulary.pad, np.int64)
        rows = zip(sources, draws.spans.tolist(), draws.rotated.tolist(), draws.uniforms, strict=True)
        return [
            self._mask(source, spans, rotated, uniforms, tokens[row])
            for row, (source, spans, rotated, uniforms) in enumerate(rows)
        ]

    def block(self, number: int) -> Block:
        """One block; the same as in any batch."""
        return self.blocks(number, number + 1)[0]

    def batch(self, number: int) -> list[Block]:
        """Batch b of the whole run, over all ranks."""
        return self.blocks(number * self.global_batch_size, (number + 1) * self.global_batch_size)

    def prepare(self, number: int) -> None:
        """Build what block `number` needs, so that forked loader workers share it."""
        if hasattr(self.packing, "prepare"):
            self.packing.prepare(number)

    @property
    def fingerprint(self) -> str:
        """Hash of all that determines batch b: data, neighbours, settings, seed, global batch size."""
        config = self.config
        data = asdict(config.data)
        for name in ("shards", "workers", "prefetch"):
            del data[name]
        parts = {
            "version": STREAM_VERSION,
            "corpus": self.corpus.identity,
            "data": data,
            "cm3": asdict(config.cm3),
            "seed": config.seed,
            "global_batch_size": self.global_batch_size,
        }
        if self.samples.documents:
            retrieval = asdict(config.retrieval)
            del retrieval["index"]
            parts |= {"retrieval": retrieval, "bank": self.samples.bank.identity, "table": self._table_hash()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def _table_hash(self) -> str:
        """Hash of the neighbour table's shape and of up to 4,096 of its rows, evenly spaced."""
        table = self.samples.table
        rows = np.linspace(0, len(table) - 1, min(len(table), 4096)).astype(np.int64)
        sampled = np.ascontiguousarray(table[rows], np.int64)
        return hashlib.sha256(repr(table.shape).encode() + sampled.tobytes()).hexdigest()

    def _mask(self, source: Source, spans: int, rotated: bool, uniforms: list[float], tokens: np.ndarray) -> Block:
        """Mask a source into `tokens`, which comes filled with <pad>."""
        by_sample = self.config.data.attention == "sample"
        values = np.ones((1 + by_sample, len(source.tokens)))  # loss weight, and number of the sample
        for start, end in source.retrieved_spans:
            values[0, start:end] = self.config.retrieval.loss_weight
        masked = np.zeros((1 + by_sample, self.length))
        if by_sample:
            values[1], masked[1] = number_samples(source.tokens, self.vocabulary.eos), -1
        trimmed = mask_block(
            source.tokens,
            values,
            source.query_start,
            spans,
            rotated,
            uniforms,
            self.vocabulary,
            self.packing.cut,
            tokens,
            masked,
        )
        weights, samples = masked[0].astype(np.float32), None
        if by_sample:
            samples = masked[1].astype(np.int64)
            # A span that was moved behind another sample begins behind a token that does not see its sample.
            unseen = (samples[1:] != samples[:-1]) & (tokens[1:] != self.vocabulary.eos)
            weights[1:][unseen] = 0
        documents = np.array(source.documents, np.int64)
        retrieved = np.array(source.retrieved, np.int64)
        return Block(tokens, weights, samples, trimmed + source.trimmed, documents, retrieved, source.epoch)


def number_samples(tokens: np.ndarray, eos: int) -> np.ndarray:
    """Which sample of an unmasked source a token is of, from 0: one begins at each </s> behind another's last </s>."""
    ends = tokens == eos
    return np.cumsum(np.r_[False, ends[1:] & ends[:-1]])


def positions_in_samples(samples: np.ndarray) -> np.ndarray:
    """For each token, how many tokens of its own sample stand before it; `samples` as in Block."""
    order = np.argsort(samples, kind="stable")
    ordered = samples[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[first, len(samples)])
    positions = np.empty(len(samples), np.int64)
    positions[order] = np.arange(len(samples)) - np.repeat(first, lengths)
    return positions


def build_stream(config: Config, train: bool = True, retrieval: bool = True) -> Stream:
    """Open the training data of a Config, or with `train=False` its validation data.

    `retrieval=False` leaves retrieved documents out, whatever the config says.
    """
    section = "data" if train else "validation"
    folder = getattr(config, section).shards
    if not folder:
        raise ValueError(
            f"{section}.shards is empty; give the folder of shards that tools/preprocess_data.py wrote "
            f"({section}.shards=...)."
        )
    corpus = open_shards(folder)
    index = config.retrieval.index if train else config.validation.index
    if not (retrieval and index and config.retrieval.documents):
        return Stream(config, corpus)
    from megatron_cm3leon.retrieval.neighbors import load_neighbors  # only where there is an index

    return Stream(config, corpus, load_neighbors(index, corpus))
