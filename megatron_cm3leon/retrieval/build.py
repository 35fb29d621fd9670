"""Build an index folder: embed bank and queries, index the bank, write every document's neighbours.

index/embeddings/          vectors of the bank and of the queries (embeddings.py)
index/index.faiss          FAISS index over the bank, and index.faiss.json: how it was made, the measured recall
index/neighbors.npy        what each document may retrieve (neighbors.py), scores.npy and table.json beside it
index/index.json           what it was built from and how; written last

Three stages, each going on where an interrupted run stopped: encode, index, neighbors. The first and the last can be
shared by tasks. An index over a bank that another index folder has embedded takes its files from there.
"""

import json
import logging
import os
import shlex
import shutil
import sys
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
from megatron_cm3leon.retrieval.embeddings import DOCUMENTS, QUERIES, Wanted, encode_corpus, open_embeddings
from megatron_cm3leon.retrieval.encoder import Encoder
from megatron_cm3leon.retrieval.filters import NO_NEIGHBOR, Bank, Queries
from megatron_cm3leon.retrieval.index import (
    Recall,
    build_index,
    check_finite,
    choose_factory,
    load_index,
    place_for_search,
    require_faiss,
    save_index,
    tune_search,
)
from megatron_cm3leon.retrieval.options import IndexOptions
from megatron_cm3leon.retrieval.part_arrays import Rows
from megatron_cm3leon.retrieval.pictures import SourcePictures, read_token_pictures
from megatron_cm3leon.retrieval.table import (
    TABLE_FILES,
    count_neighbors,
    count_shared_pictures,
    open_table,
    write_table,
)
from megatron_cm3leon.tokenizers.vocab import check_same_vocabulary

logger = logging.getLogger(__name__)

LOW_RECALL = 0.9
_BANK_FILES = ("embeddings/bank.npy", "embeddings/bank_identities.npy", "embeddings/bank.json")
_INDEX_FILES = ("index.faiss", "index.faiss.json")


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

    `stage` encode or neighbors does that alone, as task `task` of `tasks`, and index what stands between them;
    "" does everything, or as one of several tasks encodes. Returns the content of index.json, None where the folder
    is not finished; ValueError when it holds a finished index (unless `overwrite`) or one begun with other settings.
    """
    options = options or IndexOptions()
    options.validate()
    if stage == "index" and tasks > 1:
        raise ValueError("--stage index is the work of one task; run it without --task-id and --num-tasks.")
    if overwrite and (tasks > 1 or stage):
        raise ValueError(f"--overwrite would remove what other tasks or stages wrote; remove {output} first.")
    encodes_only = stage == "encode" or (not stage and tasks > 1)
    if not encodes_only:
        require_faiss()
    build = _Build(Path(output), shards, Path(encoder_folder), bank, options)
    build.prepare(overwrite)
    if stage in ("", "encode"):
        build.encode(task, tasks)
    if encodes_only:
        return None
    build.join_embeddings()
    if stage in ("", "index"):
        build.index()
    if stage == "index":
        return None
    build.find(task, tasks)
    return None if stage else build.finish()


class _Build:
    """One index folder being built."""

    def __init__(self, output: Path, shards, encoder_folder: Path, bank, options: IndexOptions) -> None:
        self.output, self.options, self.encoder_folder = output, options, encoder_folder
        self.corpus = open_shards(shards)
        self.from_index = Path(bank) if bank and (Path(bank) / INDEX_FILE).is_file() else None
        if self.from_index:
            self.bank = open_bank(self.from_index, load_description(self.from_index))
        else:
            self.bank = self.corpus if bank is None else open_shards(bank)
        if manifest_sha256(self.bank) == manifest_sha256(self.corpus):
            self.bank = self.corpus
        check_same_vocabulary(self.corpus.vocabulary, self.bank.vocabulary, f"the memory bank at {self.bank.folder}")
        self.encoder = Encoder.load(encoder_folder, resolve_device(options.device))
        self.encoder_sha256 = self.encoder.sha256

    def prepare(self, overwrite: bool) -> None:
        """Make room: a finished index is kept unless told otherwise, an unfinished one is continued."""
        if overwrite:
            (self.output / INDEX_FILE).unlink(missing_ok=True)
            for name in ("embeddings", ".table"):
                shutil.rmtree(self.output / name, ignore_errors=True)
            for name in _INDEX_FILES + TABLE_FILES:
                (self.output / name).unlink(missing_ok=True)
        elif (self.output / INDEX_FILE).exists():
            raise ValueError(f"{self.output} already holds a finished index; give another --output, or --overwrite.")
        elif self.output.exists() and (others := _list_others(self.output)):
            raise ValueError(
                f"--output {self.output} holds other files ({', '.join(others[:3])}"
                f"{' ...' if len(others) > 3 else ''}); give a new or empty folder."
            )
        (self.output / "embeddings").mkdir(parents=True, exist_ok=True)
        if self.from_index:
            self._take_bank()
        open_here = lambda *which, **more: open_embeddings(self.output / "embeddings", *which, **more)  # noqa: E731
        dropout, seed = self.options.query_dropout, self.options.seed
        self.whole = open_here("bank", DOCUMENTS, self.bank, self._settings(self.bank))
        self.asking = open_here(
            "queries", QUERIES, self.corpus, self._settings(self.corpus), dropout=dropout, seed=seed
        )
        self.own = self.whole
        if self.bank is not self.corpus:
            self.own = open_here("queries", DOCUMENTS, self.corpus, self._settings(self.corpus))

    def _settings(self, corpus: Corpus) -> dict:
        return {
            "encoder_sha256": self.encoder_sha256,
            "manifest_sha256": manifest_sha256(corpus),
            "pictures": self.options.pictures,
        }

    def _take_bank(self) -> None:
        """Link (copy, where the file system has no links) what another index holds of the bank."""
        missing = [name for name in _BANK_FILES + _INDEX_FILES if not (self.from_index / name).is_file()]
        if missing:
            raise ValueError(
                f"the index at {self.from_index} lacks {missing[0]}: it is of an earlier version, or incomplete. "
                f"Give its shards as --bank, {self.bank.folder}, to make these files again."
            )
        for name in _BANK_FILES + _INDEX_FILES:
            if not (self.output / name).exists():
                _link(self.from_index / name, self.output / name)

    def encode(self, task: int, tasks: int) -> None:
        """Embed this task's parts; in one pass when bank and queries are the same shards."""
        for corpus, wanted in (
            (self.bank, [self.whole] + ([self.asking] if self.own is self.whole else [])),
            (self.corpus, [self.own, self.asking] if self.own is not self.whole else []),
        ):
            if any(each.rows.missing(task, tasks) for each in wanted):
                self._encode(corpus, wanted, task, tasks)

    def _encode(self, corpus: Corpus, wanted: list[Wanted], task: int, tasks: int) -> None:
        rows = wanted[0].rows
        total = sum(len(rows.range(part)) for part in range(task, rows.parts, tasks))
        label = "encode bank" if corpus is self.bank else "encode queries"
        tokenizers = self._load_tokenizers(corpus)
        reader = ContentReader(corpus, tokenizers.text.decode if tokenizers else None)
        read = read_token_pictures(tokenizers.image) if self.options.pictures == "tokens" else SourcePictures(corpus)
        with meter(total, label, "documents") as progress:
            encode_corpus(self.encoder, reader, read, wanted, task, tasks, progress.advance)

    def _load_tokenizers(self, corpus: Corpus):
        if not self.options.tokenizer:
            return None
        from megatron_cm3leon.tokenizers.folder import Tokenizers

        tokenizers = Tokenizers.load(self.options.tokenizer)
        check_same_vocabulary(corpus.vocabulary, tokenizers.vocabulary, f"the tokenizer at {self.options.tokenizer}")
        return tokenizers

    def join_embeddings(self) -> None:
        """Make whole files of the parts; ValueError while a task has not ended."""
        for rows in {id(each.rows): each.rows for each in (self.whole, self.own, self.asking)}.values():
            rows.join()
        vectors, identities = (self.whole.rows.load(name) for name in self.whole.rows.arrays)
        self.bank_data = Bank(vectors=vectors, identities=identities)
        own_vectors, own_identities = (self.own.rows.load(name) for name in self.own.rows.arrays)
        documents = self.corpus.documents
        self.queries = Queries(
            vectors=own_vectors,
            identities=own_identities,
            own=np.arange(documents) if self.own is self.whole else np.full(documents, NO_NEIGHBOR, np.int64),
            views=tuple(self.asking.rows.load(name) for name in self.asking.rows.arrays),
        )

    def index(self) -> None:
        """Build index.faiss unless it is there, choose its search parameters, measure its recall."""
        options, vectors = self.options, self.bank_data.vectors
        factory = options.factory or choose_factory(*vectors.shape)
        made = {
            "encoder_sha256": self.encoder_sha256,
            "bank_manifest_sha256": manifest_sha256(self.bank),
            "factory": factory,
            "seed": options.seed,
        }
        chosen = {"wanted_search": options.search, "wanted_recall": options.recall}
        note, path = self.output / "index.faiss.json", self.output / "index.faiss"
        written = json.loads(note.read_text()) if note.is_file() and path.is_file() else {}
        if written.items() >= {**made, **chosen}.items():
            return
        if written.items() >= made.items():
            index = load_index(path, options.search)
        else:
            note.unlink(missing_ok=True)
            with meter(len(vectors), f"index {factory}", "documents") as progress:
                index = build_index(vectors, factory, options.search, options.seed, progress.advance)
            save_index(index, path)
        order = np.random.default_rng(options.seed).permutation(self.corpus.documents)
        tuning, testing = (
            self._read_views(np.sort(part))
            for part in (order[: options.recall_queries], order[-options.recall_queries :])
        )
        search = options.search or tune_search(index, Recall(vectors, tuning), options.recall)
        recall = float(Recall(vectors, testing).measure(index).mean())
        if recall < LOW_RECALL:
            logger.warning(
                "recall@10 of the index is %.3f, below %.1f: %s (search %r) misses neighbours that exact search finds. "
                "Give a larger --search value, or another --factory.", recall, LOW_RECALL, factory, search,
            )  # fmt: skip
        measured = {"search": search, "recall_at_10": recall, "recall_queries": len(testing)}
        write_json(note, {**made, **chosen, **measured})

    def _read_views(self, documents: np.ndarray) -> np.ndarray:
        """What the bank is searched by for these documents: the text of one, the pictures of the next."""
        chosen = [documents[place :: len(self.queries.views)] for place in range(len(self.queries.views))]
        vectors = np.concatenate([view[part] for view, part in zip(self.queries.views, chosen, strict=True)])
        check_finite(vectors, np.concatenate(chosen))
        return np.asarray(vectors[vectors.any(axis=1)], np.float32)

    def find(self, task: int, tasks: int) -> None:
        """Write this task's parts of the table."""
        rows = self._open_table()
        missing = rows.missing(task, tasks)
        if missing:
            index = load_index(self.output / "index.faiss", self._describe_index()["search"])
            write_table(rows, missing, place_for_search(index), self.bank_data, self.queries, self.options)

    def _open_table(self) -> Rows:
        made = self._describe_index()
        settings = {name: made[name] for name in ("encoder_sha256", "bank_manifest_sha256", "factory", "search")}
        settings |= {
            "queries_manifest_sha256": manifest_sha256(self.corpus),
            "query_dropout": self.options.query_dropout,
        }
        return open_table(self.output, self.corpus.documents, self.options, settings)

    def _describe_index(self) -> dict:
        note = self.output / "index.faiss.json"
        if not note.is_file():
            raise ValueError(f"{self.output} has no index.faiss yet; run --stage index (as one task) first.")
        return json.loads(note.read_text())

    def finish(self) -> dict:
        """Join the table and write index.json."""
        rows, made = self._open_table(), self._describe_index()
        rows.join()
        np.save(self.output / CHECKSUMS, checksum_rows(rows.load("neighbors")))
        description = {
            "format": FORMAT,
            "encoder": str(self.encoder_folder.resolve()),
            "encoder_sha256": self.encoder_sha256,
            **_describe_corpus("shards", self.corpus, self.output),
            **_describe_corpus("bank", self.bank, self.output),
            "vocabulary_hash": self.corpus.vocabulary.hash,
            "documents": self.corpus.documents,
            "bank_documents": self.bank.documents,
            "neighbors": self.options.neighbors,
            "neighbors_found": count_neighbors(rows.load("neighbors")),
            **{name: made[name] for name in ("factory", "search", "recall_at_10")},
            "options": self.options.to_dict(),
            "command": shlex.join(sys.argv),
        }
        if self.own is not self.whole:
            description["pictures_in_bank"] = count_shared_pictures(self.queries, self.bank_data)
        write_json(self.output / INDEX_FILE, seal(description))
        return description


def _list_others(folder: Path) -> list[str]:
    """Names in a folder that no index has; hidden ones are not looked at."""
    if not folder.is_dir():
        return [f"{folder.name}, a file"]
    own = {"embeddings", "table", "table.json", "neighbors.npy", "scores.npy", CHECKSUMS, INDEX_FILE, *_INDEX_FILES}
    return sorted(path.name for path in folder.iterdir() if path.name not in own and not path.name.startswith("."))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileExistsError:
        return  # another task was quicker
    except OSError:
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)


def _describe_corpus(role: str, corpus: Corpus, output: Path) -> dict[str, str]:
    folder = corpus.folder.resolve()
    return {
        role: str(folder),
        f"{role}_relative": os.path.relpath(folder, output.resolve()),
        f"{role}_manifest_sha256": manifest_sha256(corpus),
    }
