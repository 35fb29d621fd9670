"""Build an index folder: encode bank and queries, index the bank, write the neighbors of every document.

`build_index_folder` runs three stages, each of which continues where an interrupted run stopped:

    encode      embeddings of the bank's documents and of the queries
    index       FAISS index over the bank, its search parameters and recall
    neighbors   table of the documents that each document may retrieve

Several tasks can share the first and the last stage. folder.py lists the files.
"""

import json
import logging
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cm3leon.common.progress import meter
from megatron_cm3leon.data.neighbors import (
    CHECKSUMS,
    FORMAT,
    INDEX_FILE,
    checksum_rows,
    load_description,
    manifest_sha256,
    open_bank,
)
from megatron_cm3leon.data.shards.reader import Corpus, open_shards, seal, write_json
from megatron_cm3leon.distributed.device import resolve_device
from megatron_cm3leon.retrieval.contents import ContentReader
from megatron_cm3leon.retrieval.embeddings import DOCUMENTS, QUERIES, EmbeddingJob, encode_corpus, open_embeddings
from megatron_cm3leon.retrieval.encoder import Encoder
from megatron_cm3leon.retrieval.filters import NO_NEIGHBOR, Bank, Queries
from megatron_cm3leon.retrieval.folder import FAISS_DESCRIPTION, FAISS_INDEX, link_bank_files, prepare_folder
from megatron_cm3leon.retrieval.images import SourceImages, build_token_image_reader
from megatron_cm3leon.retrieval.index import (
    Recall,
    build_index,
    check_finite,
    choose_factory,
    load_index,
    move_to_gpus,
    require_faiss,
    save_index,
    search_index,
    tune_search,
)
from megatron_cm3leon.retrieval.options import IndexOptions
from megatron_cm3leon.retrieval.part_arrays import PartitionedArrays
from megatron_cm3leon.retrieval.table import count_neighbors, count_shared_images, open_table, write_table
from megatron_cm3leon.tokenizers.folder import Tokenizers
from megatron_cm3leon.tokenizers.vocab import check_same_vocabulary

logger = logging.getLogger(__name__)

LOW_RECALL = 0.9


def build_index_folder(
    output: str | Path,
    shards: str | Path,
    encoder_folder: str | Path,
    bank: str | Path | None = None,
    options: IndexOptions | None = None,
    overwrite: bool = False,
    stage: str = "",
    task: int = 0,
    tasks: int = 1,
) -> dict | None:
    """Build the index of `shards` over the memory bank `bank` (shards or an index folder; default: the shards).

    `stage` encode or neighbors runs that stage alone, as task `task` of `tasks`; stage index runs between them, as one
    task. Stage "" runs all stages, or as one of several tasks stage encode. Returns the content of index.json, or None
    if the folder is not finished. Raises ValueError if `output` holds a finished index (unless `overwrite`) or one that
    was begun with other settings.
    """
    options = options or IndexOptions()
    options.validate()
    output = Path(output)
    _check_stage(stage, tasks, overwrite, output)
    encode_only = stage == "encode" or (not stage and tasks > 1)
    if not encode_only:
        require_faiss()
    inputs = _open_inputs(shards, bank, encoder_folder, options.device)
    prepare_folder(output, overwrite)
    if inputs.bank_index:
        link_bank_files(inputs.bank_index, output, inputs.bank.folder)
    jobs = _open_jobs(output, inputs, options)

    if stage in ("", "encode"):
        _encode(inputs, jobs, options, task, tasks)
    if encode_only:
        return None
    bank_arrays, queries = _join_embeddings(jobs)
    if stage in ("", "index"):
        _build_faiss_index(output, inputs, bank_arrays, queries, options)
    if stage == "index":
        return None
    faiss_description = _load_faiss_description(output)
    table = _open_table(output, inputs, faiss_description, options)
    _write_missing_neighbors(table, output / FAISS_INDEX, faiss_description, bank_arrays, queries, options, task, tasks)
    if stage == "neighbors":
        return None
    table.join()
    neighbors = table.load("neighbors")
    np.save(output / CHECKSUMS, checksum_rows(neighbors))
    description = _describe(output, inputs, neighbors, faiss_description, options)
    if not jobs.same_documents:
        description["pictures_in_bank"] = count_shared_images(queries, bank_arrays)
    write_json(output / INDEX_FILE, seal(description))
    return description


def _check_stage(stage: str, tasks: int, overwrite: bool, output: Path) -> None:
    if stage == "index" and tasks > 1:
        raise ValueError("--stage index runs as one task; run it without --task-id and --num-tasks.")
    if overwrite and (tasks > 1 or stage):
        raise ValueError(f"--overwrite would remove what other tasks or stages wrote; remove {output} first.")


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What an index is built from."""

    queries: Corpus
    """The documents that retrieve."""
    bank: Corpus
    """The documents that are retrieved; the same object as `queries` if they are the same shards."""
    bank_index: Path | None
    """Index folder that has embedded and indexed the bank."""
    encoder: Encoder
    encoder_sha256: str


def _open_inputs(shards: str | Path, bank: str | Path | None, encoder_folder: str | Path, device: str) -> _Inputs:
    queries = open_shards(shards)
    bank_index = Path(bank) if bank and (Path(bank) / INDEX_FILE).is_file() else None
    if bank_index:
        bank_corpus = open_bank(bank_index, load_description(bank_index))
    else:
        bank_corpus = queries if bank is None else open_shards(bank)
    if manifest_sha256(bank_corpus) == manifest_sha256(queries):
        bank_corpus = queries
    check_same_vocabulary(queries.vocabulary, bank_corpus.vocabulary, f"the memory bank at {bank_corpus.folder}")
    encoder = Encoder.load(encoder_folder, resolve_device(device))
    return _Inputs(
        queries=queries, bank=bank_corpus, bank_index=bank_index, encoder=encoder, encoder_sha256=encoder.sha256
    )


@dataclass(frozen=True, kw_only=True)
class _Jobs:
    """The embeddings of an index folder."""

    bank: EmbeddingJob
    """Whole documents of the bank."""
    query_documents: EmbeddingJob
    """Whole query documents; the same job as `bank` if they are the documents of the bank."""
    query_views: EmbeddingJob
    """Texts and images of the query documents, which the bank is searched with."""

    @property
    def same_documents(self) -> bool:
        """Whether the query documents are the documents of the bank."""
        return self.query_documents is self.bank


def _open_jobs(output: Path, inputs: _Inputs, options: IndexOptions) -> _Jobs:
    folder = output / "embeddings"

    def describe(corpus: Corpus) -> dict:
        return {
            "encoder_sha256": inputs.encoder_sha256,
            "manifest_sha256": manifest_sha256(corpus),
            "pictures": options.images,
        }

    bank_settings, query_settings = describe(inputs.bank), describe(inputs.queries)
    bank = open_embeddings(folder, "bank", DOCUMENTS, inputs.bank, bank_settings)
    query_views = open_embeddings(
        folder, "queries", QUERIES, inputs.queries, query_settings, options.query_dropout, options.seed
    )
    query_documents = bank
    if inputs.bank is not inputs.queries:
        query_documents = open_embeddings(folder, "queries", DOCUMENTS, inputs.queries, query_settings)
    return _Jobs(bank=bank, query_documents=query_documents, query_views=query_views)


def _encode(inputs: _Inputs, jobs: _Jobs, options: IndexOptions, task: int, tasks: int) -> None:
    """Encode this task's parts; in one pass if bank and queries are the same shards."""
    if jobs.same_documents:
        passes = [("encode bank", inputs.bank, [jobs.bank, jobs.query_views])]
    else:
        passes = [
            ("encode bank", inputs.bank, [jobs.bank]),
            ("encode queries", inputs.queries, [jobs.query_documents, jobs.query_views]),
        ]
    for label, corpus, corpus_jobs in passes:
        if not any(job.arrays.missing_parts(task, tasks) for job in corpus_jobs):
            continue
        tokenizers = _load_tokenizers(corpus, options.tokenizer)
        reader = ContentReader(corpus, tokenizers.text.decode if tokenizers else None)
        if tokenizers and options.images == "tokens":
            read_images = build_token_image_reader(tokenizers.image)
        else:
            read_images = SourceImages(corpus)
        arrays = corpus_jobs[0].arrays
        documents = sum(len(arrays.part_range(part)) for part in range(task, arrays.parts, tasks))
        with meter(documents, label, "documents") as progress:
            encode_corpus(inputs.encoder, reader, read_images, corpus_jobs, task, tasks, progress.advance)


def _load_tokenizers(corpus: Corpus, folder: str) -> Tokenizers | None:
    if not folder:
        return None
    tokenizers = Tokenizers.load(folder)
    check_same_vocabulary(corpus.vocabulary, tokenizers.vocabulary, f"the tokenizer at {folder}")
    return tokenizers


def _join_embeddings(jobs: _Jobs) -> tuple[Bank, Queries]:
    """Join the parts of all embeddings; ValueError while a task has not finished its parts."""
    for arrays in {id(job.arrays): job.arrays for job in (jobs.bank, jobs.query_documents, jobs.query_views)}.values():
        arrays.join()
    bank_vectors, bank_identities = _load_arrays(jobs.bank)
    vectors, identities = _load_arrays(jobs.query_documents)
    documents = len(vectors)
    queries = Queries(
        vectors=vectors,
        identities=identities,
        bank_numbers=np.arange(documents) if jobs.same_documents else np.full(documents, NO_NEIGHBOR, np.int64),
        views=_load_arrays(jobs.query_views),
    )
    return Bank(vectors=bank_vectors, identities=bank_identities), queries


def _load_arrays(job: EmbeddingJob) -> tuple[np.ndarray, ...]:
    return tuple(job.arrays.load(name) for name in job.arrays.array_names)


def _build_faiss_index(output: Path, inputs: _Inputs, bank: Bank, queries: Queries, options: IndexOptions) -> None:
    """Build the FAISS index, choose its search parameters and measure its recall, unless all this is on disk."""
    factory = options.factory or choose_factory(*bank.vectors.shape)
    build_settings = {
        "encoder_sha256": inputs.encoder_sha256,
        "bank_manifest_sha256": manifest_sha256(inputs.bank),
        "factory": factory,
        "seed": options.seed,
    }
    search_settings = {"wanted_search": options.search, "wanted_recall": options.recall}
    description_file, index_file = output / FAISS_DESCRIPTION, output / FAISS_INDEX
    on_disk = description_file.is_file() and index_file.is_file()
    written = json.loads(description_file.read_text()) if on_disk else {}
    if written.items() >= {**build_settings, **search_settings}.items():
        return
    if written.items() >= build_settings.items():
        index = load_index(index_file, options.search)
    else:
        description_file.unlink(missing_ok=True)
        with meter(len(bank.vectors), f"index {factory}", "documents") as progress:
            index = build_index(bank.vectors, factory, options.search, options.seed, progress.advance)
        save_index(index, index_file)
    order = np.random.default_rng(options.seed).permutation(len(queries.vectors))
    tuning_vectors = _sample_views(queries, np.sort(order[: options.recall_queries]))
    test_vectors = _sample_views(queries, np.sort(order[-options.recall_queries :]))
    search = options.search or tune_search(index, Recall(bank.vectors, tuning_vectors), options.recall)
    recall = float(Recall(bank.vectors, test_vectors).measure(index).mean())
    if recall < LOW_RECALL:
        logger.warning(
            "recall@10 of the index is %.3f, below %.1f: %s (search %r) misses neighbors that exact search finds. "
            "Give a larger --search value, or another --factory.", recall, LOW_RECALL, factory, search,
        )  # fmt: skip
    measured = {"search": search, "recall_at_10": recall, "recall_queries": len(test_vectors)}
    write_json(description_file, {**build_settings, **search_settings, **measured})


def _sample_views(queries: Queries, documents: np.ndarray) -> np.ndarray:
    """Search vectors float32 [n, width] of these documents: the text of the first, the images of the second ..."""
    numbers = [documents[view :: len(queries.views)] for view in range(len(queries.views))]
    vectors = np.concatenate([view[part] for view, part in zip(queries.views, numbers, strict=True)])
    check_finite(vectors, np.concatenate(numbers))
    return np.asarray(vectors[vectors.any(axis=1)], np.float32)


def _load_faiss_description(output: Path) -> dict:
    path = output / FAISS_DESCRIPTION
    if not path.is_file():
        raise ValueError(f"{output} has no {FAISS_INDEX} yet; run --stage index (as one task) first.")
    return json.loads(path.read_text())


def _open_table(output: Path, inputs: _Inputs, faiss_description: dict, options: IndexOptions) -> PartitionedArrays:
    names = ("encoder_sha256", "bank_manifest_sha256", "factory", "search")
    settings = {name: faiss_description[name] for name in names}
    settings |= {
        "queries_manifest_sha256": manifest_sha256(inputs.queries),
        "query_dropout": options.query_dropout,
    }
    return open_table(output, inputs.queries.documents, options, settings)


def _write_missing_neighbors(
    table: PartitionedArrays,
    index_file: Path,
    faiss_description: dict,
    bank: Bank,
    queries: Queries,
    options: IndexOptions,
    task: int,
    tasks: int,
) -> None:
    """Write this task's parts of the table."""
    parts = table.missing_parts(task, tasks)
    if parts:
        index = move_to_gpus(load_index(index_file, faiss_description["search"]))
        write_table(table, parts, lambda vectors, k: search_index(index, vectors, k), bank, queries, options)


def _describe(
    output: Path, inputs: _Inputs, neighbors: np.ndarray, faiss_description: dict, options: IndexOptions
) -> dict:
    """The content of index.json."""
    return {
        "format": FORMAT,
        "encoder": str(inputs.encoder.folder.resolve()),
        "encoder_sha256": inputs.encoder_sha256,
        **_describe_corpus("shards", inputs.queries, output),
        **_describe_corpus("bank", inputs.bank, output),
        "vocabulary_hash": inputs.queries.vocabulary.hash,
        "documents": inputs.queries.documents,
        "bank_documents": inputs.bank.documents,
        "neighbors": options.neighbors,
        "neighbors_found": count_neighbors(neighbors),
        **{name: faiss_description[name] for name in ("factory", "search", "recall_at_10")},
        "options": options.to_dict(),
        "command": shlex.join(sys.argv),
    }


def _describe_corpus(role: str, corpus: Corpus, output: Path) -> dict[str, str]:
    folder = corpus.folder.resolve()
    return {
        role: str(folder),
        f"{role}_relative": os.path.relpath(folder, output.resolve()),
        f"{role}_manifest_sha256": manifest_sha256(corpus),
    }
