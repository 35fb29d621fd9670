"""Build an index folder: embed bank and queries, index the bank, write every document's neighbours.

index/embeddings/          vectors of the bank and of the queries (embeddings.py)
index/index.faiss          FAISS index over the bank
index/neighbors.npy        what each document may retrieve (neighbors.py), and scores.npy beside it
index/index.json           what it was built from and how, the measured recall; written last
"""

import os
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_cm3leon.data.shards import Corpus, open_shards, write_json
from megatron_cm3leon.progress import meter
from megatron_cm3leon.retrieval.embeddings import encode_corpus, read_source_pictures, read_token_pictures
from megatron_cm3leon.retrieval.encoder import Encoder
from megatron_cm3leon.retrieval.index import (
    build_index,
    choose_factory,
    measure_recall,
    save_index,
    search_index,
)
from megatron_cm3leon.retrieval.neighbors import (
    FORMAT,
    INDEX_FILE,
    NO_NEIGHBOR,
    Bank,
    Queries,
    find_neighbors,
    manifest_sha256,
)
from megatron_cm3leon.tokenizers.vocab import check_same_vocabulary

QUERY_BATCH = 1024


@dataclass(kw_only=True)
class IndexOptions:
    """How an index is built."""

    neighbors: int = 8
    """Neighbours kept for each document, M."""
    threshold: float = 0.9
    """Largest score (cosine) of a neighbour to the query and to another neighbour."""
    query_dropout: float = 0.2
    """Share of the query's text tokens that is left out when searching."""
    pictures: str = "source"
    """source: encode the raw pictures; tokens: pictures decoded from the shards."""
    tokenizer: str = ""
    """Tokenizer folder, which pictures=tokens needs."""
    factory: str = ""
    """FAISS factory string; empty chooses by the size of the bank."""
    search: str = ""
    """FAISS search parameters, such as nprobe=64; empty chooses with the factory."""
    candidates: int = 64
    """Candidates searched first for each document."""
    max_candidates: int = 4096
    """Candidates searched at most where the filters left fewer neighbours than asked for."""
    recall_queries: int = 1000
    """Queries of the sample on which recall@10 is measured against exact search."""
    seed: int = 0
    """Seed of the query dropout, of the index training and of the recall sample."""
    device: str = "cpu"
    """Device of the encoder: cpu or cuda."""

    def validate(self) -> None:
        """Raise ValueError for a value outside its range."""
        if self.neighbors < 1:
            raise ValueError(f"--neighbors ({self.neighbors}) must be at least 1.")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"--threshold ({self.threshold}) must be above 0 and at most 1; the paper has 0.9.")
        if not 0 <= self.query_dropout < 1:
            raise ValueError(f"--query-dropout ({self.query_dropout}) must be in [0, 1); the paper has 0.2.")
        if self.pictures == "tokens" and not self.tokenizer:
            raise ValueError("--pictures tokens needs --tokenizer, the folder the shards were made with.")
        if min(self.candidates, self.max_candidates, self.recall_queries) < 1:
            raise ValueError("--candidates, --max-candidates and --recall-queries must be at least 1.")


def build_index_folder(
    output: str | Path,
    shards: str | Path,
    encoder_folder: str | Path,
    bank: str | Path | None = None,
    options: IndexOptions | None = None,
    overwrite: bool = False,
) -> dict:
    """Build the index of `shards` over the memory bank `bank` (default: the shards themselves).

    Goes on where an interrupted build stopped. Returns the content of index.json; ValueError when the output
    holds a finished index (unless `overwrite`) or one begun with other settings.
    """
    options = options or IndexOptions()
    options.validate()
    output, corpus = Path(output), open_shards(shards)
    bank_corpus = corpus if bank is None else open_shards(bank)
    check_same_vocabulary(corpus.vocabulary, bank_corpus.vocabulary, f"the memory bank at {bank_corpus.folder}")
    _prepare_output(output, overwrite)
    encoder = Encoder.load(encoder_folder, options.device)
    encoder_sha256 = encoder.sha256
    _encode(output / "embeddings", encoder, encoder_sha256, corpus, bank_corpus, options)
    bank_data, queries = _load_embeddings(output / "embeddings", corpus, bank_corpus)

    factory, search = choose_factory(*bank_data.vectors.shape)
    factory, search = options.factory or factory, options.search or ("" if options.factory else search)
    with meter(bank_corpus.documents, f"index {factory}", "documents") as progress:
        index = build_index(bank_data.vectors, factory, search, options.seed, progress.advance)
    save_index(index, output / "index.faiss")
    sample = np.random.default_rng(options.seed).permutation(corpus.documents)[: options.recall_queries]
    recall = measure_recall(index, bank_data.vectors, queries.vectors[np.sort(sample)])
    found = _write_table(output, index, bank_data, queries, options)
    description = {
        "format": FORMAT,
        "encoder": str(Path(encoder_folder).resolve()),
        "encoder_sha256": encoder_sha256,
        **_describe_corpus("shards", corpus, output),
        **_describe_corpus("bank", bank_corpus, output),
        "vocabulary_hash": corpus.vocabulary.hash,
        "documents": corpus.documents,
        "bank_documents": bank_corpus.documents,
        "neighbors": options.neighbors,
        "neighbors_found": found,
        "factory": factory,
        "search": search,
        "recall_at_10": recall,
        "options": asdict(options),
        "command": shlex.join(sys.argv),
    }
    write_json(output / INDEX_FILE, description)
    return description


def _prepare_output(output: Path, overwrite: bool) -> None:
    """Make room: a finished index is kept unless told otherwise, an unfinished one is continued."""
    if overwrite:
        (output / INDEX_FILE).unlink(missing_ok=True)
        if (output / "embeddings").is_dir():
            shutil.rmtree(output / "embeddings")
    elif (output / INDEX_FILE).exists():
        raise ValueError(f"{output} already holds a finished index; give another --output, or --overwrite.")
    output.mkdir(parents=True, exist_ok=True)


def _encode(
    folder: Path, encoder: Encoder, encoder_sha256: str, corpus: Corpus, bank: Corpus, options: IndexOptions
) -> None:
    """Embed the bank whole and the queries with dropout; in one pass when they are the same shards."""

    def settings(documents: Corpus, dropout: float) -> dict:
        return {
            "encoder_sha256": encoder_sha256,
            "manifest_sha256": manifest_sha256(documents),
            "pictures": options.pictures,
            "query_dropout": dropout,
            "seed": options.seed if dropout else 0,
        }

    outputs = {"bank": settings(bank, 0.0), "queries": settings(corpus, options.query_dropout)}
    same = outputs["bank"]["manifest_sha256"] == outputs["queries"]["manifest_sha256"]
    passes = (
        [(corpus, outputs)] if same else [(bank, {"bank": outputs["bank"]}), (corpus, {"queries": outputs["queries"]})]
    )
    for documents, chosen in passes:
        with meter(documents.documents, f"encode {' and '.join(chosen)}", "documents") as progress:
            reader = _picture_reader(documents, options)
            encode_corpus(folder, encoder, documents, reader, chosen, progress.advance)


def _picture_reader(corpus: Corpus, options: IndexOptions):
    if options.pictures == "source":
        return read_source_pictures(corpus)
    from megatron_cm3leon.tokenizers.folder import Tokenizers

    tokenizers = Tokenizers.load(options.tokenizer)
    check_same_vocabulary(corpus.vocabulary, tokenizers.vocabulary, f"the tokenizer at {options.tokenizer}")
    return read_token_pictures(corpus, tokenizers.image)


def _load_embeddings(folder: Path, corpus: Corpus, bank: Corpus) -> tuple[Bank, Queries]:
    """Map what `_encode` wrote."""

    def load(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    same = manifest_sha256(corpus) == manifest_sha256(bank)
    own = np.arange(corpus.documents) if same else np.full(corpus.documents, NO_NEIGHBOR, np.int64)
    queries = Queries(vectors=load("queries"), identities=load("queries_identities"), own=own)
    return Bank(vectors=load("bank"), identities=load("bank_identities")), queries


def _write_table(output: Path, index, bank: Bank, queries: Queries, options: IndexOptions) -> list[int]:
    """Write neighbors.npy and scores.npy; returns how many documents have 0, 1, ... M neighbours."""
    documents = len(queries.vectors)
    arrays = {"neighbors": np.int64, "scores": np.float32}
    shape = (documents, options.neighbors)
    table, scores = (
        np.lib.format.open_memmap(output / f".{name}.tmp", "w+", dtype, shape) for name, dtype in arrays.items()
    )
    found = np.zeros(options.neighbors + 1, np.int64)
    with meter(documents, "neighbours", "documents") as progress:
        for start in range(0, documents, QUERY_BATCH):
            rows = slice(start, min(start + QUERY_BATCH, documents))
            table[rows], scores[rows] = find_neighbors(
                lambda vectors, count: search_index(index, vectors, count),
                bank,
                queries.rows(rows),
                options.neighbors,
                threshold=options.threshold,
                candidates=options.candidates,
                max_candidates=options.max_candidates,
            )
            kept = (table[rows] != NO_NEIGHBOR).sum(axis=1)
            found += np.bincount(kept, minlength=len(found))
            progress.advance(len(kept))
    for array, name in ((table, "neighbors"), (scores, "scores")):
        array.flush()
        os.replace(output / f".{name}.tmp", output / f"{name}.npy")
    return found.tolist()


def _describe_corpus(role: str, corpus: Corpus, output: Path) -> dict[str, str]:
    folder = corpus.folder.resolve()
    return {
        role: str(folder),
        f"{role}_relative": os.path.relpath(folder, output.resolve()),
        f"{role}_manifest_sha256": manifest_sha256(corpus),
    }
