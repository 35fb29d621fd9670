"""Held-out loss per token, byte and pixel, with 0..n retrieved documents in context.

    with k documents   </s> document <break> ... document <break> query </s>

The figures of all k are computed from the same tokens: those of the query documents, without those of retrieved
documents and the last </s>. Intervals are over documents. For each k (`_documents_K` ends the name of a figure):

    loss                nats per token of any kind
    loss_text           nats per text piece or <break>
    loss_image          nats per image code
    text_per_byte       nats of text pieces per byte of the text in UTF-8
    image_per_pixel     nats of image codes per pixel of the images as the tokenizer reads them
    loss_change         loss minus the loss with the first k, on the same resampled documents

The ranks of a launch share the documents, and an interrupted measurement continues.

Reference: perplexity of CM3Leon with retrieved documents (arXiv 2309.02591, sections 2.2 and 3).
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cm3leon.common.cli import user_path
from megatron_cm3leon.data.shards.reader import Corpus, open_shards, split_segments
from megatron_cm3leon.evaluation.loss import BREAK, IMAGE, KINDS, TEXT, build_sequence, measure_documents
from megatron_cm3leon.evaluation.metrics.ratio import divide_sums
from megatron_cm3leon.evaluation.ranks import Ranks
from megatron_cm3leon.evaluation.result import Figure, Result, bootstrap, hash_input
from megatron_cm3leon.generation.codec import Codec
from megatron_cm3leon.generation.decoder import KINDS as DTYPES
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.retrieved import DocumentSource
from megatron_cm3leon.tokenizers.vocab import check_same_vocabulary

AT_ONCE = 64
"""Documents that are measured in one call."""
BYTES, PIXELS = KINDS, KINDS + 1
"""Columns of a document's units, after the numbers of tokens of each kind."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of tools/evaluate.py loss."""
    add = parser.add_argument
    add("--model", type=user_path, required=True, help="folder that tools/convert_checkpoint.py export wrote")
    add("--shards", type=user_path, required=True, help="shards of held-out documents")
    add("--index", type=user_path, help="index to retrieve documents from")
    add("--documents", type=int, nargs="+", default=[0], help="numbers of retrieved documents, a figure for each")
    add("--count", type=int, help="held-out documents, drawn at random (default: all)")
    add("--seed", type=int, default=0, help="of the choice of documents and of the intervals")
    add("--encoder", type=user_path, help="CLIP folder, if it was moved since the index recorded its path")
    add("--dtype", choices=DTYPES, default="fp32", help="type of the model's matrices")
    add("--device", default="auto", help="cpu, cuda, or auto: CUDA if there is a device")


def evaluate(
    *,
    output: str | Path,
    model: str | Path,
    shards: str | Path,
    index: str | Path | None = None,
    documents: Sequence[int] = (0,),
    count: int | None = None,
    seed: int = 0,
    encoder: str | Path | None = None,
    dtype: str = "fp32",
    device: str = "auto",
    ranks: Ranks | None = None,
) -> Result | None:
    """Measure the loss of held-out documents; an interrupted measurement continues from `output`.

    `documents` are numbers of retrieved documents. None on ranks other than the first. ValueError for shards of another
    vocabulary, documents that do not fit into the context, numbers above 0 without an index, and shards that are the
    index's own memory bank.
    """
    ranks = ranks or Ranks()
    numbers = _check_numbers(documents, index, count)
    generator = Generator.load(model, dtype, ranks.resolve_device(device))
    corpus = open_shards(shards)
    check_same_vocabulary(generator.vocabulary, corpus.vocabulary, f"the shards at {shards}")
    source = DocumentSource.load(index, generator.vocabulary, encoder) if index and max(numbers) else None
    if source and source.bank.identity == corpus.identity:
        raise ValueError(
            f"the shards at {shards} are the memory bank of {index}: each document would retrieve itself; give "
            f"held-out shards."
        )
    settings = {
        "documents": numbers,
        "count": count,
        "dtype": dtype,
        "context": generator.decoder.context,
        "text_per_byte": "text pieces without <break>",
        "image_per_pixel": "without color channels",
    }
    read = {"model": Path(model), "shards": Path(shards) / "manifest.json"}
    read |= {"index": Path(str(index)) / "index.json"} if source else {}
    inputs = ranks.from_first(lambda: {name: hash_input(path) for name, path in read.items()})
    chosen = np.random.default_rng(seed).permutation(corpus.documents)[:count].tolist()
    measurement = _Measurement(generator, corpus, source, numbers)
    with closing(ranks.open_items(output, {"settings": settings, "inputs": inputs, "seed": seed})) as finished:
        ranks.finish_items(
            {str(number): number for number in chosen},
            measurement.measure,
            finished,
            batch_size=AT_ONCE,
            label="loss",
            unit="documents",
        )
    if not ranks.first:
        return None
    items = [finished.items[str(number)] for number in chosen]
    return Result(
        task="loss",
        figures=compute_figures(items, numbers, seed),
        settings=settings,
        seed=seed,
        inputs=inputs,
        notes=list(_describe_dropped(items, numbers)),
        tables={"tokens": dict(zip(("text", "break", "image"), _sum_tokens(items), strict=True))},
    )


def _check_numbers(documents: Sequence[int], index: str | Path | None, count: int | None) -> list[int]:
    numbers = list(dict.fromkeys(documents))
    if not numbers or min(numbers) < 0:
        raise ValueError(f"documents ({', '.join(map(str, documents))}) must be one or more numbers of 0 or above.")
    if max(numbers) and not index:
        raise ValueError(f"documents ({max(numbers)}) above 0 requires an index to retrieve from; give --index.")
    if count is not None and count < 1:
        raise ValueError(f"count ({count}) must be at least 1.")
    return numbers


@dataclass(frozen=True)
class _Measurement:
    """What is measured: the documents of a corpus, with each of `numbers` of retrieved documents."""

    generator: Generator
    corpus: Corpus
    source: DocumentSource | None
    numbers: list[int]

    def measure(self, chosen: list[int]) -> Iterator[dict]:
        """For each document: losses {k: [KINDS]}, units [KINDS + 2], retrieved documents that fit {k: number}."""
        vocabulary, decoder = self.generator.vocabulary, self.generator.decoder
        queries = [self.corpus.read(number).astype(np.int64) for number in chosen]
        retrieved = self._retrieve(queries)
        losses, kept = {}, {}
        for k in self.numbers:
            given = [row[len(row) - k :] if k < len(row) else row for row in retrieved]
            losses[k], tokens = measure_documents(decoder, queries, given, vocabulary)
            kept[k] = [_count_kept(query, row, self.generator) for query, row in zip(queries, given, strict=True)]
        for place, query in enumerate(queries):
            yield {
                "losses": {str(k): losses[k][place].tolist() for k in self.numbers},
                "units": [*tokens[place].tolist(), *_measure_content(query, self.generator.codec)],
                "kept": {str(k): kept[k][place] for k in self.numbers},
            }

    def _retrieve(self, queries: list[np.ndarray]) -> list[list[np.ndarray]]:
        """Retrieved documents of each query by its text, or by its first image if it has none; most similar last."""
        most = max(self.numbers)
        if self.source is None or not most:
            return [[] for _ in queries]
        codec, vocabulary = self.generator.codec, self.generator.vocabulary
        rows: list[list[np.ndarray]] = [[] for _ in queries]
        texts: dict[int, str] = {}
        images: dict[int, np.ndarray] = {}
        for place, query in enumerate(queries):
            segments = [part for part in split_segments(query, vocabulary) if len(part)]
            text = " ".join(codec.text.decode(part.tolist()) for part in segments if vocabulary.is_text(part).all())
            if text.strip():
                texts[place] = text
            elif segments:
                images[place] = segments[0] - vocabulary.image_start
        if texts:
            found = self.source.find(most, texts=list(texts.values()))
            for place, documents in zip(texts, self.source.read(found), strict=True):
                rows[place] = documents
        if images:
            found = self.source.find(most, images=codec.decode_images(np.stack(list(images.values()))))
            for place, documents in zip(images, self.source.read(found), strict=True):
                rows[place] = documents
        return rows


def _count_kept(query: np.ndarray, given: list[np.ndarray], generator: Generator) -> int:
    """How many of the given documents fit in front of the query."""
    _, start = build_sequence(query, given, generator.vocabulary, generator.decoder.context)
    lengths = np.cumsum([len(document) + 1 for document in given[::-1]])
    return int((1 + lengths <= start).sum())


def _measure_content(query: np.ndarray, codec: Codec) -> tuple[int, int]:
    """Bytes of the document's texts in UTF-8, and pixels of its images."""
    vocabulary = codec.vocabulary
    segments = split_segments(query, vocabulary)
    texts = [codec.text.decode(part[vocabulary.is_text(part)].tolist()) for part in segments]
    n_codes = int(vocabulary.is_image(query).sum())
    side = codec.image.image_size
    return sum(len(text.encode()) for text in texts), n_codes * side * side // vocabulary.image_tokens


FIGURES = {
    "loss": (range(KINDS), range(KINDS), "nats per token"),
    "loss_text": ((TEXT, BREAK), (TEXT, BREAK), "nats per token"),
    "loss_image": ((IMAGE,), (IMAGE,), "nats per code"),
    "text_per_byte": ((TEXT,), (BYTES,), "nats per byte"),
    "image_per_pixel": ((IMAGE,), (PIXELS,), "nats per pixel"),
}
"""Figure -> columns of losses, columns of units, unit."""


def compute_figures(items: list[dict], numbers: Sequence[int], seed: int) -> dict[str, Figure]:
    """Figures of documents: sums of losses over sums of units, with intervals over the documents.

    An item has `losses` {k: [KINDS]} and `units` [KINDS + 2]. What no document has, such as images, has no figure.
    """
    units = np.array([item["units"] for item in items], np.float64)
    figures = {}
    for k in numbers:
        losses = np.array([item["losses"][str(k)] for item in items], np.float64)
        for name, (loss_columns, unit_columns, unit) in FIGURES.items():
            pairs = np.stack([losses[:, loss_columns].sum(1), units[:, unit_columns].sum(1)], 1)
            pairs = pairs[pairs[:, 1] > 0]
            if len(pairs):
                figures[f"{name}_documents_{k}"] = bootstrap(pairs, divide_sums, seed=seed, unit=unit)
        if k != numbers[0]:
            first = np.array([item["losses"][str(numbers[0])] for item in items], np.float64)
            pairs = np.stack([(losses - first).sum(1), units[:, :KINDS].sum(1)], 1)
            figures[f"loss_change_documents_{k}"] = bootstrap(pairs, divide_sums, seed=seed, unit="nats per token")
    return figures


def _sum_tokens(items: list[dict]) -> list[int]:
    return np.array([item["units"][:KINDS] for item in items]).sum(0).tolist()


def _describe_dropped(items: list[dict], numbers: Sequence[int]) -> Iterator[str]:
    """How many retrieved documents were in context, where it was fewer than requested."""
    for k in numbers:
        kept = np.array([item["kept"][str(k)] for item in items])
        if (kept < k).any():
            yield (
                f"{int((kept < k).sum())} of {len(items)} documents had fewer than {k} retrieved documents in context, "
                f"on average {kept.mean():.2f}: the others did not fit, or were not found."
            )
