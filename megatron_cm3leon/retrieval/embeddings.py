"""Embeddings of a corpus on disk: of the memory bank's documents, and of the queries.

embeddings/bank.npy                 float16 [documents, width], unit vectors of whole documents
embeddings/bank_identities.npy      uint64 [documents, P, 2], hashes by which equal images are found (contents.py)
embeddings/queries.npy ...          the same for the query documents, if they are not those of the bank
embeddings/queries_text.npy         float16 [documents, width], of the text alone, with some of its tokens dropped
embeddings/queries_image.npy        float16 [documents, width], of the images alone

A document without a text, or without an image, has a row of zeros there. The vector of a document is the average of
its text vector and its image vector (the average over several images). Every vector has length 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_cm3leon.data.shards.reader import Corpus
from megatron_cm3leon.retrieval.contents import Content, ContentReader, ReadImages, compute_identities, read_ahead
from megatron_cm3leon.retrieval.encoder import Encoder, combine, normalize
from megatron_cm3leon.retrieval.part_arrays import PartitionedArrays

PART_DOCUMENTS = 4096
"""Documents per part, the unit of resumption and of a task's work."""
BATCH_DOCUMENTS = 64
DTYPE = np.float16
DOCUMENTS, QUERIES = "documents", "queries"


@dataclass(frozen=True, kw_only=True)
class EmbeddingJob:
    """Embeddings of one kind, of all documents of a corpus."""

    arrays: PartitionedArrays
    kind: str
    """DOCUMENTS: vectors of whole documents, and identities. QUERIES: vectors of the text and of the images."""
    dropout: float = 0.0
    """Share of the text tokens that is dropped for QUERIES."""
    seed: int = 0
    """Seed of the dropout."""


def open_embeddings(
    folder: Path, name: str, kind: str, corpus: Corpus, settings: dict, dropout: float = 0.0, seed: int = 0
) -> EmbeddingJob:
    """The arrays of one kind in `folder`; `settings` describes the input besides dropout and seed."""
    suffixes = {DOCUMENTS: ("", "_identities"), QUERIES: ("_text", "_image")}[kind]
    if kind == QUERIES:
        settings = {**settings, "query_dropout": dropout, "seed": seed if dropout else 0}
    names = [name + suffix for suffix in suffixes]
    arrays = PartitionedArrays(folder, names[0], names, corpus.documents, PART_DOCUMENTS, settings)
    return EmbeddingJob(arrays=arrays, kind=kind, dropout=dropout, seed=seed)


def encode_corpus(
    encoder: Encoder,
    reader: ContentReader,
    read_images: ReadImages,
    jobs: Sequence[EmbeddingJob],
    task: int = 0,
    tasks: int = 1,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the missing parts of this task for all `jobs`, which encode the same corpus and share its images.

    `advance(documents)` is called after each batch.
    """
    missing = [set(job.arrays.missing_parts(task, tasks)) for job in jobs]
    for part in range(task, jobs[0].arrays.parts, tasks):
        part_jobs = [job for job, parts in zip(jobs, missing, strict=True) if part in parts]
        numbers = jobs[0].arrays.part_range(part)
        if part_jobs:
            _encode_part(encoder, reader, read_images, part_jobs, part, advance)
        else:
            advance(len(numbers))


def _encode_part(
    encoder: Encoder,
    reader: ContentReader,
    read_images: ReadImages,
    jobs: Sequence[EmbeddingJob],
    part: int,
    advance: Callable[[int], None],
) -> None:
    """Encode one part for all `jobs` and write it."""
    numbers = jobs[0].arrays.part_range(part)
    starts = range(numbers.start, numbers.stop, BATCH_DOCUMENTS)
    batches = [range(start, min(start + BATCH_DOCUMENTS, numbers.stop)) for start in starts]
    results: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in jobs]
    for contents, images in read_ahead(reader, read_images, batches):
        image_vectors = _encode_images(encoder, images)
        for job, batch_results in zip(jobs, results, strict=True):
            batch_results.append(_encode_batch(encoder, job, contents, image_vectors))
        advance(len(contents))
    for job, batch_results in zip(jobs, results, strict=True):
        columns = zip(job.arrays.array_names, zip(*batch_results, strict=True), strict=True)
        job.arrays.write_part(part, {array: _concatenate(batches) for array, batches in columns})


def _concatenate(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays concatenated along the rows; narrower ones are padded with zeros."""
    widest = np.max([array.shape[1:] for array in arrays], axis=0)
    padded = [
        np.pad(array, [(0, 0), *((0, most - width) for most, width in zip(widest, array.shape[1:], strict=True))])
        for array in arrays
    ]
    return np.concatenate(padded)


def _encode_images(encoder: Encoder, images: Sequence[Sequence[Image.Image]]) -> np.ndarray:
    """Unit vectors [documents, width] of the average image of each document; zeros if it has none."""
    flat = [image for document in images for image in document]
    vectors = np.concatenate(
        [np.zeros((0, encoder.width), np.float32)]
        + [encoder.encode_images(flat[n : n + BATCH_DOCUMENTS]) for n in range(0, len(flat), BATCH_DOCUMENTS)]
    )
    sums = np.zeros((len(images), encoder.width), np.float32)
    np.add.at(sums, np.repeat(np.arange(len(images)), list(map(len, images))), vectors)
    return normalize(sums)


def _encode_batch(
    encoder: Encoder, job: EmbeddingJob, contents: Sequence[Content], image_vectors: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The two arrays of a job for some documents; ValueError names a document whose vector is not finite."""
    texts = [content.text for content in contents]
    if job.kind == QUERIES:
        keys = [(job.seed, content.number) for content in contents]
        vectors, second = encoder.encode_texts(texts, job.dropout, keys), image_vectors.astype(DTYPE)
    else:
        vectors, second = combine(encoder.encode_texts(texts), image_vectors), compute_identities(contents)
    for checked in (vectors, image_vectors):
        bad = np.flatnonzero(~np.isfinite(checked).all(axis=1))
        if len(bad):
            raise ValueError(
                f"the embedding of {contents[int(bad[0])].name} holds NaN or infinity: the weights of the encoder at "
                f"{encoder.folder} are damaged, or are not suited to this device. This part was not written."
            )
    return vectors.astype(DTYPE), second
