"""The stream: block and batch numbers -> tokens, as a pure function of data, settings and seed.

    shards + neighbour tables -> samples (samples.py) -> layouts (packing.py) -> masked blocks (cm3.py)

`stream.block(n)` is the same for any number of ranks, workers or nodes, whenever it is asked for.
Batch b is blocks [b * G, (b + 1) * G), G = train.global_batch_size, in a run that never changed G (positions.py);
epochs follow one another without end.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.config.schema import SourceConfig
from megatron_cm3leon.data.shards.reader import Corpus, open_shards
from megatron_cm3leon.data.stream.best_fit import DocumentsPacking
from megatron_cm3leon.data.stream.cm3 import TOKENS_PER_SPAN, MaskDraws, SpanSampler, mask_block
from megatron_cm3leon.data.stream.identity import describe_sources, identify
from megatron_cm3leon.data.stream.layout import Layout, write_layout
from megatron_cm3leon.data.stream.packing import QueryPacking, StreamPacking, WholeImagesPacking
from megatron_cm3leon.data.stream.samples import DataSource, Samples

PACKINGS = {
    "query": QueryPacking,
    "stream": StreamPacking,
    "stream_whole_images": WholeImagesPacking,
    "documents": DocumentsPacking,
}
_OF_PADDING = np.array([0, -1], np.float32)  # loss weight, number of the sample


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
    """Query documents in this block, by their number in the stream's library, int64."""
    retrieved: np.ndarray
    """Retrieved documents in this block, by their number in the stream's library, int64."""
    epoch: int
    """Epoch of the first token, from 0; with several sources, of its source."""


@dataclass
class Plan:
    """What is known of some blocks before their documents are read."""

    layout: Layout
    draws: MaskDraws


@dataclass
class Blocks:
    """Some blocks, row by row."""

    tokens: np.ndarray
    """[rows, seq_length + 1], after CM3 masking, of the shards' type (uint16 or uint32)."""
    weights: np.ndarray
    """float32 [rows, seq_length + 1], as in Block."""
    samples: np.ndarray | None
    """int32 [rows, seq_length + 1], as in Block."""
    trimmed: np.ndarray
    """int64 [rows], as in Block."""

    @property
    def positions(self) -> np.ndarray:
        """Under attention=sample: how many tokens of its own sample stand before each, int64 [rows, length]."""
        return np.stack([positions_in_samples(samples) for samples in self.samples])

    def rows(self, rows: slice) -> "Blocks":
        """Some of them; views."""
        samples = None if self.samples is None else self.samples[rows]
        return Blocks(self.tokens[rows], self.weights[rows], samples, self.trimmed[rows])


class Stream:
    """Blocks of one or several corpora under the settings of a Config."""

    def __init__(self, config: Config, sources: Corpus | list[DataSource], neighbors=None) -> None:
        """`sources`: a corpus with its `neighbors` (.table, .bank), or several DataSources.

        Neighbours put config.retrieval.documents in front of each query document.
        """
        if isinstance(sources, Corpus):
            sources = [DataSource(sources, neighbors)]
        self.config, self.sources = config, sources
        self.samples = Samples(
            sources,
            seed=config.seed,
            documents=config.retrieval.documents,
            choice=config.retrieval.choice,
            image_first_probability=config.data.image_first_probability,
        )
        self.library = self.samples.library
        self.vocabulary = self.library.vocabulary
        self.length = config.data.seq_length + 1
        self.global_batch_size = config.train.global_batch_size
        self.packing = PACKINGS[config.data.packing](self.samples, self.length)
        if self.packing.max_growth < 0:
            needed = self.length - 1 - self.packing.max_growth
            raise ValueError(
                f"data.seq_length ({config.data.seq_length}) cannot hold a picture of "
                f"{self.vocabulary.image_tokens} tokens with </s>, <break> and text, which "
                f"packing={config.data.packing} needs; give at least {needed}, or use packing=stream or an image "
                f"tokenizer with fewer tokens."
            )
        limit = min(self.vocabulary.sentinels, self.packing.max_growth // TOKENS_PER_SPAN)
        self.sampler = SpanSampler(config.cm3, config.seed, limit)

    def plan(self, numbers: np.ndarray) -> Plan:
        """Decide all of blocks `numbers` (int64) that needs no document's tokens; cheapest for many at once."""
        draws = self.sampler.draw(numbers)
        return Plan(self.packing.lay_out(numbers, TOKENS_PER_SPAN * draws.spans), draws)

    def prefetch(self, plan: Plan) -> None:
        """Ask for the documents of a plan ahead of `fill`."""
        self.library.prefetch(np.unique(plan.layout.documents))

    def fill(self, plan: Plan) -> Blocks:
        """Read the documents of a plan and mask the blocks."""
        layout, draws, vocabulary = plan.layout, plan.draws, self.vocabulary
        tokens = np.full((len(layout.numbers), self.length), vocabulary.pad, vocabulary.dtype)
        write_layout(layout, self.library, tokens)
        filled, trimmed = layout.filled.copy(), layout.trimmed.copy()
        values = self._values(layout, tokens)
        for row in np.flatnonzero(draws.spans).tolist():
            count = int(layout.filled[row])
            source, own = tokens[row, :count].copy(), None
            if values is not None:
                own = values[:, row, :count].copy()
                values[:, row] = _OF_PADDING[: len(values), None]
            tokens[row] = vocabulary.pad
            gone, filled[row] = mask_block(
                source,
                own,
                int(layout.query_starts[row]),
                int(draws.spans[row]),
                bool(draws.rotated[row]),
                draws.uniforms[row],
                vocabulary,
                self.packing.cut,
                tokens[row],
                None if own is None else values[:, row],
            )
            trimmed[row] += gone
        weights, samples = self._weigh(tokens, filled, values)
        return Blocks(tokens, weights, samples, trimmed)

    def _values(self, layout: Layout, tokens: np.ndarray) -> np.ndarray | None:
        """What travels with the tokens, float32 [1 or 2, rows, length]: loss weight, number of the sample."""
        by_sample, weight = self.config.data.attention == "sample", self.config.retrieval.loss_weight
        if not by_sample and (weight == 1 or not self.samples.documents):
            return None
        values = np.ones((1 + by_sample, *tokens.shape), np.float32)
        if weight != 1:
            chosen = np.flatnonzero(layout.retrieved)
            values[0].reshape(-1)[layout.breaks] = weight
            stops = layout.places[chosen] + layout.lengths[chosen]
            starts = np.maximum(layout.places[chosen], self.packing.cut == "head")  # there </s> has place 0
            for row, start, stop in zip(layout.rows[chosen].tolist(), starts.tolist(), stops.tolist(), strict=True):
                values[0, row, start:stop] = weight
        if by_sample:
            values[1] = number_samples(tokens, self.vocabulary.eos)
        for row, count in enumerate(layout.filled.tolist()):
            values[:, row, count:] = _OF_PADDING[: len(values), None]
        return values

    def _weigh(self, tokens: np.ndarray, filled: np.ndarray, values: np.ndarray | None):
        """Loss weights float32 and, under attention=sample, samples int32 of masked blocks."""
        weights, samples = np.ones(tokens.shape, np.float32), None
        if values is None:
            for row in np.flatnonzero(filled < self.length).tolist():
                weights[row, filled[row] :] = 0
        else:
            weights = values[0]
            if len(values) == 2:
                samples = values[1].astype(np.int32)
                # A span moved behind another sample begins behind a token that does not see its sample.
                unseen = (samples[:, 1:] != samples[:, :-1]) & (tokens[:, 1:] != self.vocabulary.eos)
                weights[:, 1:][unseen] = 0
        data, cm3 = self.config.data, self.config.cm3
        for factor, kind in (
            (data.text_loss_weight, self.vocabulary.is_text),
            (data.image_loss_weight, self.vocabulary.is_image),
            (cm3.sentinel_loss_weight, self.vocabulary.is_sentinel),
        ):
            if factor != 1:
                weights[kind(tokens)] *= factor
        return weights, samples

    def blocks(self, start: int, stop: int) -> list[Block]:
        """Blocks start..stop-1."""
        assert 0 <= start <= stop, f"there are no blocks {start}..{stop}"
        if start == stop:
            return []
        plan = self.plan(np.arange(start, stop))
        layout, blocks = plan.layout, self.fill(plan)
        result = []
        for row in range(stop - start):
            own = layout.of_row(row)
            documents, retrieved = layout.documents[own], layout.retrieved[own]
            result.append(
                Block(
                    tokens=blocks.tokens[row].astype(np.int64),
                    weights=blocks.weights[row],
                    samples=None if blocks.samples is None else blocks.samples[row].astype(np.int64),
                    trimmed=int(blocks.trimmed[row]),
                    documents=documents[~retrieved],
                    retrieved=documents[retrieved],
                    epoch=int(layout.epochs[row]),
                )
            )
        return result

    def block(self, number: int) -> Block:
        """One block; the same as in any batch."""
        return self.blocks(number, number + 1)[0]

    def batch(self, number: int) -> list[Block]:
        """Batch b of the whole run, over all ranks."""
        return self.blocks(number * self.global_batch_size, (number + 1) * self.global_batch_size)

    def cursor(self, number: int) -> dict:
        """Where block `number` stands, for a checkpoint: with it, `resume` costs the same at any step."""
        if not self.packing.prefix:
            return {}
        return self.packing.anchor(number).to_dict()

    def resume(self, cursor: dict) -> None:
        """Take up a cursor of this stream (of the same identity)."""
        if cursor and self.packing.prefix:
            self.packing.prefix.add_cursor(cursor)

    def keep_tables(self, folder: Path) -> None:
        """Keep the tables that distant blocks need in `folder`."""
        if self.packing.prefix:
            self.packing.prefix.keep_tables(folder, self.identity)

    @property
    def identity(self) -> str:
        """Hash of all that determines sequence n: data, neighbors, settings, seed."""
        return identify(describe_sources(self.samples, self.config), self.config)


def number_samples(tokens: np.ndarray, eos: int) -> np.ndarray:
    """Which sample of its unmasked source [..., tokens] a token is of, from 0.

    One begins at each </s> behind another's last </s>.
    """
    begins = np.zeros(tokens.shape, np.int64)
    ends = tokens == eos
    begins[..., 1:] = ends[..., 1:] & ends[..., :-1]
    return np.cumsum(begins, -1)


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
    if train:
        described = config.data.sources or [SourceConfig(shards=config.data.shards, index=config.retrieval.index)]
    else:
        described = [SourceConfig(shards=config.validation.shards, index=config.validation.index)]
    if not described[0].shards:
        section = "data" if train else "validation"
        raise ValueError(
            f"{section}.shards is empty; give the folder of shards that tools/preprocess_data.py wrote "
            f"({section}.shards=...)."
        )
    stream = Stream(config, [_open_source(source, retrieval and config.retrieval.documents) for source in described])
    output = Path(config.output)
    if train and output.is_dir() and os.access(output, os.W_OK):
        stream.keep_tables(output / "stream")
    return stream


def _open_source(source: SourceConfig, retrieval: bool) -> DataSource:
    corpus = open_shards(source.shards)
    if not (retrieval and source.index):
        return DataSource(corpus, weight=source.weight)
    from megatron_cm3leon.data.neighbors import load_neighbors  # only where there is an index

    return DataSource(corpus, load_neighbors(source.index, corpus), source.weight)
