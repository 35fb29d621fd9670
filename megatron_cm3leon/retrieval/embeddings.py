"""Embeddings of a corpus on disk: of the memory bank's documents, and of the queries.

embeddings/bank.npy                 float16 [documents, width], unit vectors of whole documents
embeddings/bank_identities.npy      uint64 [documents, P, 2], what makes two pictures the same (contents.py)
embeddings/queries.npy ...          the same of the query documents, where they are not the bank's
embeddings/queries_text.npy         float16 [documents, width], of the text alone, a part of its tokens dropped
embeddings/queries_image.npy        float16 [documents, width], of the pictures alone

A row of zeros stands where a document has no text or no picture. A document's vector is its text's and its pictures'
(the average of several), averaged; all are of length 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cm3leon.data.shards.reader import Corpus
from megatron_cm3leon.retrieval.contents import Content, ContentReader, ReadPictures, compute_identities, read_ahead
from megatron_cm3leon.retrieval.encoder import Encoder, combine, normalize
from megatron_cm3leon.retrieval.part_arrays import Rows

PART_DOCUMENTS = 4096
"""Documents of a part, the unit of resuming and of the tasks' work."""
BATCH_DOCUMENTS = 64
DTYPE = np.float16
DOCUMENTS, QUERIES = "documents", "queries"


@dataclass(kw_only=True)
class Wanted:
    """Embeddings of one kind of all documents of a corpus."""

    rows: Rows
    kind: str
    """DOCUMENTS: whole ones and identities. QUERIES: text and pictures apart."""
    dropout: float = 0.0
    """Share of the text tokens that is left out of QUERIES."""
    seed: int = 0
    """Seed of the dropout."""


def open_embeddings(folder: Path, name: str, kind: str, corpus: Corpus, settings: dict, dropout=0.0, seed=0) -> Wanted:
    """The arrays of one kind in `folder`; `settings` says with what they are made besides dropout and seed."""
    endings = {DOCUMENTS: ("", "_identities"), QUERIES: ("_text", "_image")}[kind]
    if kind == QUERIES:
        settings = {**settings, "query_dropout": dropout, "seed": seed if dropout else 0}
    rows = Rows(
        folder, f"{name}{endings[0]}", [name + end for end in endings], corpus.documents, PART_DOCUMENTS, settings
    )
    return Wanted(rows=rows, kind=kind, dropout=dropout, seed=seed)


def encode_corpus(
    encoder: Encoder,
    reader: ContentReader,
    read_pictures: ReadPictures,
    wanted: list[Wanted],
    task: int = 0,
    tasks: int = 1,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the missing parts of this task; several kinds share the work on pictures."""
    missing = [set(each.rows.missing(task, tasks)) for each in wanted]
    for part in range(task, wanted[0].rows.parts, tasks):
        chosen = [each for each, parts in zip(wanted, missing, strict=True) if part in parts]
        numbers = wanted[0].rows.range(part)
        if not chosen:
            advance(len(numbers))
            continue
        starts = range(numbers.start, numbers.stop, BATCH_DOCUMENTS)
        batches = [range(start, min(start + BATCH_DOCUMENTS, numbers.stop)) for start in starts]
        pieces = [[] for _ in chosen]
        for contents, pictures in read_ahead(reader, read_pictures, batches):
            images = _encode_pictures(encoder, pictures)
            for each, found in zip(chosen, pieces, strict=True):
                found.append(_encode_batch(encoder, each, contents, images))
            advance(len(contents))
        for each, found in zip(chosen, pieces, strict=True):
            vectors, others = zip(*found, strict=True)
            content = zip(each.rows.arrays, (vectors, others), strict=True)
            each.rows.write(part, {array: _concatenate(arrays) for array, arrays in content})


def _concatenate(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    """Arrays one behind the other, narrower ones filled with zeros."""
    widest = np.max([array.shape[1:] for array in arrays], axis=0)
    padded = [
        np.pad(array, [(0, 0), *((0, most - width) for most, width in zip(widest, array.shape[1:], strict=True))])
        for array in arrays
    ]
    return np.concatenate(padded)


def _encode_pictures(encoder: Encoder, pictures: list[list]) -> np.ndarray:
    """Unit vectors [documents, width] of each document's pictures on average; zeros where there is none."""
    flat = [picture for each in pictures for picture in each]
    vectors = np.concatenate(
        [np.zeros((0, encoder.width), np.float32)]
        + [encoder.encode_pictures(flat[n : n + BATCH_DOCUMENTS]) for n in range(0, len(flat), BATCH_DOCUMENTS)]
    )
    sums = np.zeros((len(pictures), encoder.width), np.float32)
    np.add.at(sums, np.repeat(np.arange(len(pictures)), list(map(len, pictures))), vectors)
    return normalize(sums)


def _encode_batch(encoder: Encoder, wanted: Wanted, contents: list[Content], images: np.ndarray):
    """The two arrays of a kind for some documents; ValueError names one whose vector is not finite."""
    texts = [content.text for content in contents]
    if wanted.kind == QUERIES:
        keys = [(wanted.seed, content.number) for content in contents]
        both = encoder.encode_texts(texts, wanted.dropout, keys), images
    else:
        both = combine(encoder.encode_texts(texts), images), compute_identities(contents)
    for vectors in (both[0], images):
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise ValueError(
                f"the embedding of {contents[int(bad[0])].name} holds NaN or infinity: the weights of the encoder at "
                f"{encoder.folder} are damaged, or do not suit this device. Nothing was written of this part."
            )
    return both[0].astype(DTYPE), both[1].astype(DTYPE) if wanted.kind == QUERIES else both[1]
