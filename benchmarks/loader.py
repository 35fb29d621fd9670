"""Rates of the loader and of megatron-core's GPTDataset on the same tokens, interleaved in one run.

    python benchmarks/loader.py --folder scratch/

Pairs of 1,066 tokens on average (a caption and 1,024 image codes; uint16 shards), sequences of 4,096 tokens, int64
batches of 8. Rates are millions of tokens per second. A round times each contender once; the table has the fastest
round, the median, and the ratio to GPTDataset, the median over pairs within a round. `--what` selects the measurements:

    rates    one process, warm page cache: three retrieved documents and CM3 masks, only one of them, none; GPTDataset
    worker   one worker process: ours, and GPTDataset in a torch DataLoader
    cold     the shards are dropped from the page cache before each round
    slow     1 ms is added to every read, to simulate a remote file system; reads may overlap
    memory   private memory of a worker over a million samples of a small corpus
"""

import argparse
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

from megatron_cm3leon.common.atomic_io import write_json
from megatron_cm3leon.common.cli import HelpFormatter, run_tool
from megatron_cm3leon.common.progress import meter
from megatron_cm3leon.config.loading import Config, load_config
from megatron_cm3leon.data.neighbors import Neighbors, checksum_rows
from megatron_cm3leon.data.shards.reader import MANIFEST, Corpus, build_manifest, open_shards
from megatron_cm3leon.data.shards.writer import ShardWriter
from megatron_cm3leon.data.stream.loader import Loader
from megatron_cm3leon.data.stream.stream import Stream
from megatron_cm3leon.tokenizers.vocab import Vocabulary

BATCH, LENGTH = 8, 4096
SHARD_DOCUMENTS = 10_000


def make_corpus(folder: Path, documents: int, vocabulary: Vocabulary, caption: float) -> Corpus:
    """Write random pairs with captions of `caption` tokens on average (geometric), unless they exist; open them."""
    if not (folder / MANIFEST).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        generator, entries = np.random.default_rng(0), []
        row = {"caption": "", "image": "", "source": "random", "picture_sha256": "", "extra": "{}"}
        with meter(documents, f"writing {folder}", "documents") as progress:
            for start in range(0, documents, SHARD_DOCUMENTS):
                writer = ShardWriter(folder, f"shard-000000-{start // SHARD_DOCUMENTS:03d}", vocabulary)
                for number in range(start, min(start + SHARD_DOCUMENTS, documents)):
                    words = generator.integers(0, vocabulary.text_size, generator.geometric(1 / caption))
                    codes = generator.integers(vocabulary.image_start, vocabulary.image_end, vocabulary.image_tokens)
                    writer.add(f"{number:08d}", np.concatenate([words, [vocabulary.break_id], codes]), row)
                entries.append(writer.close())
                progress.advance(entries[-1]["documents"])
        write_json(folder / MANIFEST, build_manifest(vocabulary, entries))
    return open_shards(folder)


def make_neighbors(corpus: Corpus) -> Neighbors:
    """A table of eight random neighbors per document, with checksums as in an index."""
    table = np.random.default_rng(1).integers(0, corpus.documents, (corpus.documents, 8))
    return Neighbors(table=table, bank=corpus, path=corpus.folder / "random", checksums=checksum_rows(table))


def make_config(packing: str, masks: bool, *overrides: str) -> Config:
    settings = [f"data.packing={packing}", f"data.seq_length={LENGTH}", f"train.global_batch_size={BATCH}"]
    return load_config(None, [*settings, f"cm3.probability={int(masks)}", *overrides])


class Ours:
    """Our loader; each call of `take` continues after the previous one."""

    def __init__(self, corpus: Corpus, neighbors, packing: str, masks: bool, workers: int = 0) -> None:
        stream = Stream(make_config(packing, masks), corpus, neighbors)
        self.loader = Loader(stream, micro_batch_size=BATCH, workers=workers, prefetch=8)

    def take(self, batches: int) -> None:
        for _ in range(batches):
            next(self.loader)


class Theirs:
    """GPTDataset over the documents of a corpus; with `workers`, in a torch DataLoader that makes batches."""

    def __init__(self, corpus: Corpus, folder: Path, sequences: int, workers: int = 0) -> None:
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split
        from torch.utils.data import DataLoader

        prefix = write_indexed(corpus, folder)
        config = GPTDatasetConfig(
            random_seed=1, sequence_length=LENGTH, tokenizer=_Tokenizer(corpus.vocabulary), split="1",
            reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        )  # fmt: skip
        documents = np.arange(corpus.documents, dtype=np.int32)
        indexed = IndexedDataset(str(prefix), mmap=True)
        self.dataset = GPTDataset(indexed, None, documents, sequences, Split.train, config)
        self.samples = iter(self.dataset)
        if workers:
            loader = DataLoader(self.dataset, BATCH, num_workers=workers, prefetch_factor=8)
            self.samples = None
            self.batches = iter(loader)

    def take(self, batches: int) -> None:
        if self.samples is None:
            for _ in range(batches):
                next(self.batches)
        else:
            for _ in range(batches * BATCH):
                next(self.samples)


class _Tokenizer:
    """The attributes of a tokenizer that GPTDataset reads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eod = self.pad = vocabulary.eos
        self.vocab_size = vocabulary.size
        self.unique_identifiers = {"class": "none"}


def write_indexed(corpus: Corpus, folder: Path) -> Path:
    """Write the documents of a corpus, each followed by </s>, as megatron-core's .bin and .idx; returns the prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = folder / "indexed"
    if not prefix.with_suffix(".idx").is_file():
        import torch

        builder = IndexedDatasetBuilder(str(prefix.with_suffix(".bin")), dtype=np.uint16)
        for number in range(corpus.documents):
            ids = np.append(corpus.read(number), corpus.vocabulary.eos).astype(np.int64)
            builder.add_item(torch.from_numpy(ids))
            builder.end_document()
        builder.finalize(str(prefix.with_suffix(".idx")))
    return prefix


def time_rounds(contenders: dict, rounds: int, batches: int, before=lambda: None) -> dict[str, list[float]]:
    """Millions of tokens per second of each contender in each round; `before` is called before each timing."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.take(batches)  # page cache, lazily built tables
    for _ in range(rounds):
        for name, contender in contenders.items():
            before()
            started = time.perf_counter()
            contender.take(batches)
            rates[name].append(batches * BATCH * LENGTH / (time.perf_counter() - started) / 1e6)
    return rates


def print_rates(rates: dict[str, list[float]], peer: str) -> None:
    print("| | fastest | median | over GPTDataset |\n|---|---|---|---|")
    for name, values in rates.items():
        ratio = statistics.median(ours / other for ours, other in zip(values, rates[peer], strict=True))
        print(f"| {name} | {max(values):.1f} | {statistics.median(values):.1f} | {ratio:.2f} |", flush=True)


def measure_rates(corpus: Corpus, options: argparse.Namespace) -> None:
    neighbors, sequences = make_neighbors(corpus), (options.rounds + 1) * options.batches * BATCH
    print_rates(
        time_rounds(
            {
                "retrieval, masks (query)": Ours(corpus, neighbors, "query", True),
                "retrieval, masks (stream)": Ours(corpus, neighbors, "stream", True),
                "retrieval (stream)": Ours(corpus, neighbors, "stream", False),
                "masks (stream)": Ours(corpus, None, "stream", True),
                "neither (stream)": Ours(corpus, None, "stream", False),
                "GPTDataset": Theirs(corpus, options.folder, sequences),
            },
            options.rounds,
            options.batches,
        ),
        "GPTDataset",
    )


def measure_worker(corpus: Corpus, options: argparse.Namespace) -> None:
    neighbors, sequences = make_neighbors(corpus), (options.rounds + 2) * options.batches * BATCH + 1000
    contenders = {
        "retrieval, masks (query), 1 worker": Ours(corpus, neighbors, "query", True, workers=1),
        "retrieval, masks (stream), 1 worker": Ours(corpus, neighbors, "stream", True, workers=1),
        "neither (stream), 1 worker": Ours(corpus, None, "stream", False, workers=1),
        "GPTDataset, 1 worker": Theirs(corpus, options.folder, sequences, workers=1),
    }
    print_rates(time_rounds(contenders, options.rounds, options.batches), "GPTDataset, 1 worker")


def drop_from_cache(folder: Path) -> None:
    """Drop the pages of all shards from the page cache, except those that a process has mapped."""
    for path in folder.glob("*.tar"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_cold(corpus: Corpus, options: argparse.Namespace) -> None:
    neighbors = make_neighbors(corpus)
    print("| | fastest | median |\n|---|---|---|")
    for packing in ("query", "stream"):
        rates = []
        for _ in range(options.rounds):
            fresh = open_shards(corpus.folder)  # none of its pages is mapped
            ours = Ours(fresh, replace(neighbors, bank=fresh), packing, True)
            drop_from_cache(corpus.folder)
            started = time.perf_counter()
            ours.take(options.batches)
            rates.append(options.batches * BATCH * LENGTH / (time.perf_counter() - started) / 1e6)
        print(f"| cold, retrieval, masks ({packing}) | {max(rates):.1f} | {statistics.median(rates):.1f} |")


class DistantCorpus(Corpus):
    """A corpus with `delay` seconds more per read; the delays of prefetched reads overlap."""

    delay = 0.001

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.due: dict[int, float] = {}

    def prefetch(self, numbers: np.ndarray) -> None:
        super().prefetch(numbers)
        due = time.perf_counter() + self.delay
        self.due |= dict.fromkeys(numbers.tolist(), due)

    def read_into(self, numbers: np.ndarray, out: np.ndarray, starts: np.ndarray) -> None:
        for number in numbers.tolist():
            wait = self.due.pop(number, time.perf_counter() + self.delay) - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
        super().read_into(numbers, out, starts)


def measure_slow(corpus: Corpus, options: argparse.Namespace) -> None:
    distant = DistantCorpus(corpus.folder)
    neighbors = replace(make_neighbors(corpus), bank=distant)
    contenders = {
        f"1 ms per read ({packing})": Ours(distant, neighbors, packing, True) for packing in ("query", "stream")
    }
    rates = time_rounds(contenders, options.rounds, options.batches)
    print("| | fastest | median |\n|---|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {max(values):.1f} | {statistics.median(values):.1f} |")


def measure_memory(options: argparse.Namespace) -> None:
    small = Vocabulary(
        text_size=56_320, image_size=8192, image_height=8, image_width=8, text_sha256="", image_sha256=""
    )  # fmt: skip
    corpus = make_corpus(options.folder / "small", 20_000, small, 10)
    for packing in ("query", "stream"):
        settings = [f"data.packing={packing}", "data.seq_length=320", "train.global_batch_size=64"]
        stream = Stream(load_config(None, settings), corpus, make_neighbors(corpus))
        with Loader(stream, micro_batch_size=64, workers=1) as loader:
            worker = psutil.Process(loader.workers[0].process.pid)
            print(f"| samples ({packing}) | private memory of the worker, MB |\n|---|---|")
            for batch in range(options.samples // 64 + 1):
                next(loader)
                if batch in (100, *(options.samples * tenth // 640 for tenth in range(1, 11))):
                    print(f"| {batch * 64:,} | {worker.memory_full_info().uss / 1e6:.1f} |", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, about 1 GB; kept for the next run")
    parser.add_argument("--what", nargs="+", default=["rates", "worker", "cold", "slow", "memory"], help="measurements")
    parser.add_argument("--documents", type=int, default=220_000, help="documents of the corpus")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per measurement")
    parser.add_argument("--batches", type=int, default=200, help="batches of 8 sequences per round")
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples of `memory`")
    options = parser.parse_args(arguments)
    vocabulary = Vocabulary(
        text_size=56_320, image_size=8192, image_height=32, image_width=32, text_sha256="", image_sha256=""
    )  # fmt: skip
    corpus = make_corpus(options.folder / "shards", options.documents, vocabulary, 41)
    print(f"{corpus.documents} documents, {corpus.manifest['tokens'] / corpus.documents:.0f} tokens each; Mtokens/s")
    measures = {"rates": measure_rates, "worker": measure_worker, "cold": measure_cold, "slow": measure_slow}
    for what in options.what:
        print(f"\n{what}")
        if what == "memory":
            measure_memory(options)
        else:
            measures[what](corpus, options)
    return 0


if __name__ == "__main__":
    run_tool(main)
