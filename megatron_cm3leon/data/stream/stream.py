"""The stream: sequence and batch numbers -> tokens, as a pure function of data, settings and seed.

    shards + neighbor tables -> samples (samples.py) -> layouts (packing.py) -> masked sequences (cm3.py)

`stream.sequence(n)` is the same for any number of ranks, workers or nodes, and at any time.
Batch b is sequences [b * G, (b + 1) * G), G = train.global_batch_size, in a run that never changed G
(monitoring/positions.py). Epochs follow one another without end.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.config.schema import SourceConfig, ValidationSource
from megatron_cm3leon.data.shards.reader import Corpus, open_shards
from megatron_cm3leon.data.stream.best_fit import DocumentsPacking
from megatron_cm3leon.data.stream.cm3 import TOKENS_PER_SPAN, MaskDraws, SpanSampler, mask_sequence
from megatron_cm3leon.data.stream.identity import describe_sources, identify
from megatron_cm3leon.data.stream.layout import Layout, write_layout
from megatron_cm3leon.data.stream.mixture import MixturePlan, plan_mixture
from megatron_cm3leon.data.stream.packing import Packing, QueryPacking, StreamPacking, WholeImagesPacking
from megatron_cm3leon.data.stream.samples import DataSource, NeighborTable, Samples
from megatron_cm3leon.data.stream.targets import MASKED, PRETRAINING

PACKINGS: dict[str, Callable[[Samples, int], Packing]] = {
    "query": QueryPacking,
    "stream": StreamPacking,
    "stream_whole_images": WholeImagesPacking,
    "documents": DocumentsPacking,
}
PADDING_VALUES = np.array([0, -1, 0], np.float32)
"""Loss weight, number of the sample, and whether it is a target, of <pad>."""


@dataclass
class TokenSequence:
    """One training sequence of seq_length + 1 tokens."""

    tokens: np.ndarray
    """int64 [seq_length + 1], after CM3 masking."""
    weights: np.ndarray
    """Loss weight of each token as a target, float32 [seq_length + 1]; 0 for <pad>."""
    samples: np.ndarray | None
    """Sample that each token belongs to, from 0 in each sequence, int64 [seq_length + 1], -1 for <pad>; None under
    attention=causal."""
    targets: np.ndarray | None
    """Whether each token belongs to a target of a query document, bool [seq_length + 1]; None if the data have none."""
    trimmed: int
    """Tokens cut because masking adds tokens, or because a query is longer than a sequence."""
    documents: np.ndarray
    """Query documents in this sequence, by their number in stream.corpus, int64."""
    retrieved: np.ndarray
    """Retrieved documents in this sequence, by their number in stream.corpus, int64."""
    epoch: int
    """Epoch of the first token, from 0; with several sources, of its source."""


@dataclass
class SequencePlan:
    """The decisions for some sequences that need no document's tokens."""

    layout: Layout
    draws: MaskDraws


@dataclass
class SequenceBatch:
    """Several sequences, one per row."""

    tokens: np.ndarray
    """[rows, seq_length + 1], after CM3 masking, of the shards' dtype (uint16 or uint32)."""
    weights: np.ndarray
    """float32 [rows, seq_length + 1], as in TokenSequence."""
    samples: np.ndarray | None
    """int32 [rows, seq_length + 1], as in TokenSequence."""
    targets: np.ndarray | None
    """bool [rows, seq_length + 1], as in TokenSequence."""
    trimmed: np.ndarray
    """int64 [rows], as in TokenSequence."""

    @property
    def positions(self) -> np.ndarray:
        """Under attention=sample: position of each token in its sample, from 0; int64 [rows, seq_length + 1]."""
        assert self.samples is not None, "data.attention is not sample"
        return np.stack([positions_in_samples(samples) for samples in self.samples])

    def rows(self, rows: slice) -> "SequenceBatch":
        """Some of the rows, as views."""
        samples = None if self.samples is None else self.samples[rows]
        targets = None if self.targets is None else self.targets[rows]
        return SequenceBatch(self.tokens[rows], self.weights[rows], samples, targets, self.trimmed[rows])


class Stream:
    """Sequences of one or several corpora under the settings of a Config."""

    def __init__(
        self, config: Config, sources: Corpus | list[DataSource], neighbors: NeighborTable | None = None
    ) -> None:
        """`sources`: a corpus and its neighbor table, or several DataSources.

        With a neighbor table, config.retrieval.documents retrieved documents precede each query document. Raises
        ValueError if data.seq_length cannot hold an image.
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
            sft=config.sft,
        )
        self.corpus = self.samples.corpus
        self.vocabulary = self.corpus.vocabulary
        self.length = config.data.seq_length + 1
        self.global_batch_size = config.train.global_batch_size
        self.packing = PACKINGS[config.data.packing](self.samples, self.length)
        if self.packing.max_growth < 0:
            needed = self.length - 1 - self.packing.max_growth
            raise ValueError(
                f"data.seq_length ({config.data.seq_length}) cannot hold an image of "
                f"{self.vocabulary.image_tokens} tokens with </s>, <break> and text, which "
                f"packing={config.data.packing} requires; set it to at least {needed}, or use packing=stream or an "
                f"image tokenizer with fewer tokens."
            )
        limit = min(self.vocabulary.sentinels, self.packing.max_growth // TOKENS_PER_SPAN)
        self.sampler = SpanSampler(config.cm3, config.seed, limit)

    def plan(self, numbers: np.ndarray) -> SequencePlan:
        """Decide all of sequences `numbers` (int64) that needs no document's tokens; cheapest for many at once."""
        draws = self.sampler.draw(numbers)
        return SequencePlan(
            self.packing.lay_out(numbers, TOKENS_PER_SPAN * draws.spans, draws.without_documents), draws
        )

    def prefetch(self, plan: SequencePlan) -> None:
        """Let the kernel read the documents of a plan ahead of `fill`."""
        self.corpus.prefetch(np.unique(plan.layout.documents))

    def fill(self, plan: SequencePlan) -> SequenceBatch:
        """Read the documents of a plan and apply CM3 masking (CM3Leon section 2.2)."""
        layout, draws, vocabulary = plan.layout, plan.draws, self.vocabulary
        tokens = np.full((len(layout.numbers), self.length), vocabulary.pad, vocabulary.dtype)
        targets = np.zeros(tokens.shape, bool) if self.samples.has_targets else None
        write_layout(layout, self.corpus, tokens, targets)
        filled, trimmed = layout.filled.copy(), layout.trimmed.copy()
        values = self._values(layout, tokens, targets)
        spans, first_sentinels = self._limit_spans(layout, draws.spans, tokens)
        for row in np.flatnonzero(spans).tolist():
            count = int(layout.filled[row])
            source, source_values = tokens[row, :count].copy(), None
            if values is not None:
                source_values = values[:, row, :count].copy()
                values[:, row] = PADDING_VALUES[: len(values), None]
            tokens[row] = vocabulary.pad
            n_trimmed, filled[row] = mask_sequence(
                source,
                source_values,
                int(layout.query_starts[row]),
                int(spans[row]),
                bool(draws.rotated[row]),
                bool(draws.infilled[row]),
                draws.uniforms[row],
                vocabulary,
                self.packing.cut,
                tokens[row],
                None if values is None else values[:, row],
                int(first_sentinels[row]),
            )
            trimmed[row] += n_trimmed
        weights, samples = self._weigh(tokens, filled, values)
        if values is not None and targets is not None:
            targets = values[2] > 0
        return SequenceBatch(tokens, weights, samples, targets, trimmed)

    def _limit_spans(self, layout: Layout, spans: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many spans CM3 masking moves in each row, and how many sentinels the row holds before it; both int64.

        As drawn in rows without instruction documents. In others spans are numbered after the sentinels of the samples,
        and where the packing keeps documents complete, masking cuts none of these documents to make room.
        """
        first_sentinels = np.zeros(len(spans), np.int64)
        if not self.samples.has_targets:
            return spans, first_sentinels
        numbers = tokens.astype(np.int64) - self.vocabulary.sentinel(0)
        first_sentinels = np.where(self.vocabulary.is_sentinel(tokens), numbers + 1, 0).max(1)
        limits = self.vocabulary.sentinels - first_sentinels
        if self.packing.keeps_documents:
            rows = np.unique(layout.rows[(layout.forms != PRETRAINING) & ~layout.retrieved])
            kept = layout.filled[rows]
            if self.packing.cut == "head":  # retrieved documents may be cut, but for the first </s> of the sequence
                kept = kept - layout.query_starts[rows] + 1
            limits[rows] = np.minimum(limits[rows], (self.length - kept) // TOKENS_PER_SPAN)
        return np.minimum(spans, np.maximum(limits, 0)), first_sentinels

    def _values(self, layout: Layout, tokens: np.ndarray, targets: np.ndarray | None) -> np.ndarray | None:
        """Values that move with their tokens, float32 [1 to 3, rows, length], as PADDING_VALUES lists them."""
        by_sample, weight = self.config.data.attention == "sample", self.config.retrieval.loss_weight
        if targets is None and not by_sample and (weight == 1 or not self.samples.documents):
            return None
        values = np.ones((1 + by_sample if targets is None else 3, *tokens.shape), np.float32)
        if weight != 1:
            chosen = np.flatnonzero(layout.retrieved)
            values[0].reshape(-1)[layout.breaks] = weight
            stops = layout.starts[chosen] + layout.lengths[chosen]
            starts = np.maximum(layout.starts[chosen], self.packing.cut == "head")  # there, position 0 holds </s>
            for row, start, stop in zip(layout.rows[chosen].tolist(), starts.tolist(), stops.tolist(), strict=True):
                values[0, row, start:stop] = weight
        if by_sample:
            values[1] = number_samples(tokens, self.vocabulary.eos, self.vocabulary.eoss)
        if targets is not None:
            values[2] = targets
            self._weigh_targets(layout, tokens, targets, values[0])
        for row, count in enumerate(layout.filled.tolist()):
            values[:, row, count:] = PADDING_VALUES[: len(values), None]
        return values

    def _weigh_targets(self, layout: Layout, tokens: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> None:
        """Set the loss weights [rows, length] of samples with instruction documents (config.sft.loss)."""
        by_target = self.config.sft.loss == "target"
        if by_target:
            chosen = np.flatnonzero((layout.forms != PRETRAINING) & ~layout.retrieved)
            starts = np.maximum(layout.starts[chosen], 0).tolist()
            stops = layout.starts[chosen] + layout.lengths[chosen] + (layout.forms[chosen] != MASKED)  # with its </s>
            for row, start, stop in zip(layout.rows[chosen].tolist(), starts, stops.tolist(), strict=True):
                weights[row, start:stop] = 0
            weights[tokens[:, 0] == self.vocabulary.eos, 0] = 0  # nothing predicts it
            weights[targets] = 1
            weights[:, 1:][targets[:, :-1]] = 1  # the token after a target says that it ends
        if by_target or self.config.data.attention == "sample":
            weights[begin_samples(tokens, self.vocabulary.eos, self.vocabulary.eoss)] = 0

    def _weigh(
        self, tokens: np.ndarray, filled: np.ndarray, values: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Loss weights (float32) and, under attention=sample, samples (int32) of masked sequences."""
        weights, samples = np.ones(tokens.shape, np.float32), None
        if values is None:
            for row in np.flatnonzero(filled < self.length).tolist():
                weights[row, filled[row] :] = 0
        else:
            weights = values[0]
            if self.config.data.attention == "sample":
                samples = values[1].astype(np.int32)
                # The token before a span that was moved after another sample cannot attend to the sample of the span.
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

    def sequences(self, start: int, stop: int) -> list[TokenSequence]:
        """Sequences start..stop-1, 0 <= start <= stop."""
        assert 0 <= start <= stop, f"there are no sequences {start}..{stop}"
        if start == stop:
            return []
        plan = self.plan(np.arange(start, stop))
        layout, batch = plan.layout, self.fill(plan)
        result = []
        for row in range(stop - start):
            in_row = layout.of_row(row)
            documents, retrieved = layout.documents[in_row], layout.retrieved[in_row]
            result.append(
                TokenSequence(
                    tokens=batch.tokens[row].astype(np.int64),
                    weights=batch.weights[row],
                    samples=None if batch.samples is None else batch.samples[row].astype(np.int64),
                    targets=None if batch.targets is None else batch.targets[row],
                    trimmed=int(batch.trimmed[row]),
                    documents=documents[~retrieved],
                    retrieved=documents[retrieved],
                    epoch=int(layout.epochs[row]),
                )
            )
        return result

    def sequence(self, number: int) -> TokenSequence:
        """One sequence; the same as in any batch."""
        return self.sequences(number, number + 1)[0]

    def batch(self, number: int) -> list[TokenSequence]:
        """Batch `number`, of all ranks, at the global batch size of the config."""
        return self.sequences(number * self.global_batch_size, (number + 1) * self.global_batch_size)

    def report_problems(self) -> list[str]:
        """Sentences about instruction documents that do not fit into a sequence, or cannot be masked."""
        length = self.length if self.packing.keeps_documents else None
        return [problem for source in self.samples.sources for problem in source.forms.report_problems(length)]

    def cursor(self, number: int) -> dict:
        """Position of sequence `number`, for a checkpoint: with it, `resume` takes the same time at any step."""
        anchor = self.packing.anchor(number)
        return anchor.to_dict() if anchor else {}

    def resume(self, cursor: dict) -> None:
        """Restore the position from a cursor of this stream (of the same identity)."""
        if cursor and self.packing.prefix_sums:
            self.packing.prefix_sums.add_cursor(cursor)

    def keep_tables(self, folder: Path) -> None:
        """Store the tables that are needed to reach distant sequences in `folder`."""
        if self.packing.prefix_sums:
            self.packing.prefix_sums.keep_tables(folder, self.identity)

    @property
    def identity(self) -> str:
        """Hash of everything that determines sequence n: data, neighbors, settings, seed."""
        return identify(describe_sources(self.samples, self.config), self.config)


def begin_samples(tokens: np.ndarray, eos: int, eoss: int | None = None) -> np.ndarray:
    """Whether each token of an unmasked sequence [..., tokens] is the first </s> of a sample; bool, same shape.

    It follows the last </s> of another sample, or the <eoss> (if given) of its last moved target. The first token of a
    sequence is none.
    """
    begins = np.zeros(tokens.shape, bool)
    ends = tokens == eos
    before = ends[..., :-1] if eoss is None else ends[..., :-1] | (tokens[..., :-1] == eoss)
    begins[..., 1:] = ends[..., 1:] & before
    return begins


def number_samples(tokens: np.ndarray, eos: int, eoss: int | None = None) -> np.ndarray:
    """Sample that each token of an unmasked sequence [..., tokens] belongs to, from 0; int64, same shape.

    `eos`, `eoss`: as in begin_samples.
    """
    return np.cumsum(begin_samples(tokens, eos, eoss), -1)


def positions_in_samples(samples: np.ndarray) -> np.ndarray:
    """Position of each token in its sample, from 0; `samples` [tokens] as in TokenSequence; int64 [tokens]."""
    order = np.argsort(samples, kind="stable")
    ordered = samples[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[first, len(samples)])
    positions = np.empty(len(samples), np.int64)
    positions[order] = np.arange(len(samples)) - np.repeat(first, lengths)
    return positions


def build_stream(
    config: Config, train: bool = True, retrieval: bool = True, source: ValidationSource | None = None
) -> Stream:
    """Open the training data of a Config, or with `train=False` its validation data: those of `source` where given.

    `retrieval=False` uses no retrieved documents, whatever the config says. Raises ValueError if no shards are given.
    """
    if source:
        described = [SourceConfig(shards=source.shards, index=source.index)]
    elif train:
        described = config.data.sources or [SourceConfig(shards=config.data.shards, index=config.retrieval.index)]
    else:
        described = [SourceConfig(shards=config.validation.shards, index=config.validation.index)]
    if not described[0].shards:
        section = "data" if train else "validation"
        raise ValueError(
            f"{section}.shards is empty; give the folder of shards that tools/preprocess_data.py wrote "
            f"({section}.shards=...)."
        )
    sources = [_open_source(each, retrieval and config.retrieval.documents > 0) for each in described]
    training = train and not source
    if training and (plan := plan_sources(config, [each.corpus.documents for each in sources])):
        for each, weight in zip(sources, plan.weights, strict=True):
            each.weight = float(weight)
    stream = Stream(config, sources)
    output = Path(config.output)
    if training and output.is_dir() and os.access(output, os.W_OK):
        stream.keep_tables(output / "stream")
    return stream


def plan_sources(config: Config, documents: list[int]) -> MixturePlan | None:
    """The mixture of data.sources with these numbers of documents; None if their weights are given."""
    mixture = config.data.mixture
    if mixture.rule == "weights":
        return None
    shares = [source.share for source in config.data.sources]
    return plan_mixture(documents, shares, mixture.alpha, mixture.cap, mixture.minimum_ratio, mixture.maximum_ratio)


def _open_source(source: SourceConfig, retrieval: bool) -> DataSource:
    corpus = open_shards(source.shards)
    if not (retrieval and source.index):
        return DataSource(corpus, weight=source.weight)
    from megatron_cm3leon.data.neighbors import load_neighbors  # only where there is an index

    return DataSource(corpus, load_neighbors(source.index, corpus), source.weight)
