"""Access to any batch of an epoch of 10^8 documents, resumption there, and the padding of the packings.

    python benchmarks/packing.py seek --documents 100000000 --folder scratch/
    python benchmarks/packing.py waste

`seek` uses a synthetic table of lengths (captions of geometric length, 1,024 image codes; with `--text`, only texts)
and, with `--neighbors`, eight synthetic neighbors per document, three of which are drawn: it measures the arithmetic of
a packing, without tokens. `waste` packs random lengths: padding of packing=documents, and of packing complete samples
in order.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_cm3leon.common.cli import HelpFormatter, run_tool
from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.data.shards.targets import TARGETS_DTYPE
from megatron_cm3leon.data.stream.best_fit import pack_in_order, pack_window
from megatron_cm3leon.data.stream.order import draw_bits
from megatron_cm3leon.data.stream.samples import DataSource
from megatron_cm3leon.data.stream.stream import Stream
from megatron_cm3leon.tokenizers.vocab import Vocabulary

PAPER = Vocabulary(text_size=56_320, image_size=8192, image_height=32, image_width=32, text_sha256="", image_sha256="")
TEXT = "text, log-normal, median 350"


class Lengths:
    """A corpus that has only lengths."""

    identity, folder, vocabulary = "synthetic", "synthetic", PAPER

    def __init__(self, documents: int, text: bool) -> None:
        generator, name = np.random.default_rng(0), TEXT if text else "1024 image tokens"
        self.documents = documents
        self.lengths = np.empty(documents, np.uint32)
        for start in range(0, documents, 1 << 20):
            part = self.lengths[start : start + (1 << 20)]
            part[:] = draw_lengths(name, generator, len(part)) - 2  # without the </s> of a sample

    def all_targets(self) -> tuple[np.ndarray, np.ndarray]:
        """No document has targets."""
        return np.empty(0, TARGETS_DTYPE), np.empty(0, np.int64)


class HashedTable:
    """Eight neighbors per document, computed when a row is read: a table of 10^8 rows would take 6.4 GB."""

    def __init__(self, documents: int) -> None:
        self.shape, self.count = (documents, 8), documents

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        bits = draw_bits(1, rows, np.arange(8)[:, None])
        return (((bits >> np.uint64(32)) * np.uint64(self.count)) >> np.uint64(32)).astype(np.int64).T


class HashedNeighbors:
    def __init__(self, corpus: Lengths) -> None:
        self.table, self.bank = HashedTable(corpus.documents), corpus

    def check(self, rows: np.ndarray) -> None:
        """Nothing to check: no file exists."""


def make_stream(corpus: Lengths, options: argparse.Namespace, folder: Path | None = None) -> Stream:
    config = load_config(None, [f"data.packing={options.packing}", "train.global_batch_size=2048"])
    stream = Stream(config, [DataSource(corpus, HashedNeighbors(corpus) if options.neighbors else None)])
    if folder:
        stream.keep_tables(folder)
    return stream


def timed(label: str, action) -> object:
    started = time.perf_counter()
    result = action()
    print(f"| {label} | {time.perf_counter() - started:.4f} |", flush=True)
    return result


def measure_seek(options: argparse.Namespace) -> None:
    corpus = Lengths(options.documents, options.text)
    tokens = int(corpus.lengths.sum(dtype=np.int64)) * (1 + 3 * options.neighbors)
    last = tokens // 4097 - 2048 * 4  # a batch at the end of the epoch
    print(f"{options.documents:,} documents, {tokens // 4097:,} sequences per epoch\n| | s |\n|---|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        stream = make_stream(corpus, options, Path(folder))
        timed("sequence 0 of a new stream", lambda: stream.plan(np.array([0])))
        timed("a batch at the end of the epoch, the first time", lambda: stream.plan(np.array([last])))
        generator, seconds = np.random.default_rng(2), []
        for number in generator.integers(0, last, 50):
            started = time.perf_counter()
            stream.plan(np.array([number]))
            seconds.append(time.perf_counter() - started)
        print(f"| any other batch, median of 50 (slowest) | {np.median(seconds):.4f} ({max(seconds):.4f}) |")
        cursor = stream.cursor(last - 5000)
        again = make_stream(corpus, options, Path(folder))
        timed("the same batch in another process, from the stored table", lambda: again.plan(np.array([last])))
        resumed = make_stream(corpus, options)
        resumed.resume(cursor)
        plan = timed("the same batch from a checkpoint's cursor", lambda: resumed.plan(np.array([last])))
        assert np.array_equal(plan.layout.documents, stream.plan(np.array([last])).layout.documents)
    if options.packing == "stream":
        far = make_stream(corpus, options)
        far.resume(
            {"start": 200 * tokens, "span": 200, "group": 0}
        )  # an arbitrary position: computing it would take 200 tables
        timed("a batch of epoch 200 from a cursor", lambda: far.plan(np.array([200 * tokens // 4097 + 2048])))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"\npeak memory {peak:.2f} GB, of which lengths {corpus.lengths.nbytes / 1e9:.2f} GB")


def draw_lengths(name: str, generator: np.random.Generator, samples: int) -> np.ndarray:
    """Random lengths of samples in tokens, at most the length of a sequence."""
    if name == TEXT:
        lengths = generator.lognormal(np.log(350), 1.0, samples).astype(np.int64) + 2
    elif name == "30 % of the tokens text":
        texts = draw_lengths(TEXT, generator, samples)
        share = 0.3 / texts.mean() / (0.3 / texts.mean() + 0.7 / 1069)
        pairs = draw_lengths("1024 image tokens", generator, samples)
        lengths = np.where(generator.random(samples) < share, texts, pairs)
    else:
        image, caption = int(name.split()[0]), 41 if name.startswith("1024") else 6
        lengths = generator.geometric(1 / caption, samples) + image + 3
    return np.minimum(lengths, 4097)


def measure_waste(options: argparse.Namespace) -> None:
    """Print the padding of complete samples in sequences of 4,097 tokens, and the rate of packing."""
    generator, windows = np.random.default_rng(0), 20
    names = [f"{image} image tokens" for image in (64, 256, 1024)]
    print("| samples | in order | best fit | documents/s |\n|---|---|---|---|")
    for name in [*names, "30 % of the tokens text", TEXT]:
        drawn = [draw_lengths(name, generator, 4096) for _ in range(windows)]
        least = sum(lengths.sum() for lengths in drawn) / 4097
        started = time.perf_counter()
        fitted = sum(len(pack_window(lengths, 4097)) for lengths in drawn)
        rate = windows * 4096 / (time.perf_counter() - started)
        ordered = sum(len(pack_in_order(lengths.tolist(), 4097)) for lengths in drawn)
        print(f"| {name} | {1 - least / ordered:.2%} | {1 - least / fitted:.2%} | {rate:,.0f} |")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("what", choices=["seek", "waste"], help="measurement")
    parser.add_argument("--documents", type=int, default=100_000_000, help="documents of the epoch")
    parser.add_argument("--packing", choices=["stream", "documents"], default="stream")
    parser.add_argument("--text", action="store_true", help="documents that are only text")
    parser.add_argument("--neighbors", action="store_true", help="three retrieved documents in each sample")
    parser.add_argument(
        "--folder", type=Path, help="folder for a temporary folder with the table (default: the system's)"
    )
    options = parser.parse_args(arguments)
    (measure_seek if options.what == "seek" else measure_waste)(options)
    return 0


if __name__ == "__main__":
    run_tool(main)
