"""Preprocessing: text compared with Megatron's approach, the image tokenizer's share, memory by corpus size.

    python benchmarks/preprocess.py --work /tmp/preprocess text
    python benchmarks/preprocess.py --work /tmp/preprocess pictures
    python benchmarks/preprocess.py --work /tmp/preprocess memory

text: MB of text per second of CPU time, all processes added up, from the same JSONL file to ids on the disk. Megatron's
approach is a pool whose workers call SentencePiece once per document and whose parent writes .bin and .idx. Ours is
one worker of tools/preprocess_data.py, which also checks every line and writes checksums and metadata. Neither includes
loading. The text is prose from this machine: paragraphs of docstrings, documentation and manual pages, each once.
Captions are its sentences of 20 to 100 bytes, documents are 2 kB of its paragraphs; the BPE model is trained on all of
it. `cold`: the first half of the file, with an empty word cache; `warm`: the second half, after the first.

pictures: time of a pair of image and caption by step, from a JPEG of 683 x 512 pixels to the shard, in one worker on
one core, with the shape of the public VQGAN (f8, 8,192 codes) or a smaller one.

memory: largest resident set of a separate process, for corpora of two sizes.
"""

import argparse
import ast
import functools
import gzip
import json
import multiprocessing
import random
import re
import shutil
import statistics
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import sentencepiece
import torch
from PIL import Image

from megatron_cm3leon.common.cli import run_tool
from megatron_cm3leon.data.preprocess.encoder import WorkerSettings
from megatron_cm3leon.data.preprocess.worker import WORK, SharedCounters, Worker
from megatron_cm3leon.data.sources import open_source
from megatron_cm3leon.tokenizers.folder import write_vocabulary
from megatron_cm3leon.tokenizers.image import ImageTokenizer
from megatron_cm3leon.tokenizers.text import SPACE_MARK, TextTokenizer, train_text
from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig

PIECES = 56_320
TEXT_MB, CAPTION_MB = 24, 10
KINDS = ("captions", "documents")


# Text of this machine


def read_paragraphs() -> Iterator[str]:
    """Prose from this machine, one paragraph per line: docstrings, documentation and manual pages."""
    for text in read_files():
        for paragraph in re.split(r"\n\s*\n|\n\.[A-Z].*|\n[ \t]*[-*] ", text):
            words = " ".join(paragraph.split())
            plain = len(re.findall(r"[A-Za-z ,.']", words))
            if len(words) > 60 and plain > 0.95 * len(words) and words[0].isupper():
                yield words


def read_files() -> Iterator[str]:
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(folder).rglob("*.py")):
            yield from read_docstrings(path)
    for folder in ("/usr/share/doc", "/usr/share/man"):
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and path.suffix in (".gz", ".txt", ".md", ".html", ".rst", ""):
                content = path.read_bytes()
                content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
                yield re.sub(r"<[^<>]*>|\\f.|\\", "", content.decode("utf-8", "ignore"))


def read_docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # some packages contain templates and tests of syntax errors
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


def write_texts(work: Path) -> None:
    """Write captions.jsonl, documents.jsonl and text.model to `work`, unless they exist."""
    if (work / "text.model").is_file():
        return
    seen, size, paragraphs = set(), 0, []
    for paragraph in read_paragraphs():
        if paragraph not in seen and size < 1e6 * TEXT_MB:
            seen.add(paragraph)
            paragraphs.append(paragraph)
            size += len(paragraph)
    random.Random(0).shuffle(paragraphs)
    sentences = [s for p in paragraphs for s in re.split(r"(?<=[.;:]) ", p) if 20 <= len(s) <= 100]
    documents, document = [], []
    for paragraph in paragraphs:
        document.append(paragraph)
        if sum(map(len, document)) >= 2000:
            documents.append("\n".join(document)[:3000])
            document = []
    for name, texts, limit in (("captions", sentences, CAPTION_MB), ("documents", documents, TEXT_MB)):
        size = 0
        with open(work / f"{name}.jsonl", "w") as file:
            for text in texts:
                file.write(json.dumps({"text": text}) + "\n")
                size += len(text.encode())
                if size > limit * 1e6:
                    break
    print(f"{len(sentences)} sentences, {len(documents)} documents; training {PIECES} pieces ...", flush=True)
    train_text(paragraphs, PIECES).save(work / "text.model")


def write_tokenizer(work: Path, config: VQGANConfig) -> Path:
    folder = work / f"tokenizer-{config.image_size}-{config.base_channels}"
    if not (folder / "vocab.json").is_file():
        folder.mkdir(exist_ok=True)
        shutil.copy(work / "text.model", folder)
        torch.manual_seed(0)
        ImageTokenizer(VQGAN(config)).save(folder / "image")
        write_vocabulary(folder)
    return folder


TINY = VQGANConfig(
    image_size=32, codebook_size=256, embed_dim=8, latent_channels=32, base_channels=32,
    channel_multiplier=(1, 1, 1), num_res_blocks=1, mid_attention=False,
)  # fmt: skip


# Megatron's approach

_INDEX_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of uint16, number of sequences, number of documents."""
_processor: sentencepiece.SentencePieceProcessor


def start_megatron(model: str) -> None:
    global _processor
    _processor = sentencepiece.SentencePieceProcessor(model_file=model)


def encode_megatron(line: str) -> tuple[list[int], int]:
    return _processor.encode(json.loads(line)["text"]), len(line)


def run_megatron(lines: Path, model: Path, output: Path, workers: int) -> float:
    """CPU seconds of parent and workers: Pool.imap in chunks of 32; the parent writes uint16 .bin and .idx."""
    with multiprocessing.get_context("fork").Pool(workers, start_megatron, (str(model),)) as pool:
        pool.map(encode_megatron, ['{"text": "ready"}'] * workers)
        started = time.process_time() + children_seconds()
        lengths = []
        with open(lines, encoding="utf-8") as file, open(f"{output}.bin", "wb") as binary:
            for ids, _ in pool.imap(encode_megatron, file, 32):
                binary.write(np.array(ids, np.uint16).tobytes(order="C"))
                lengths.append(len(ids))
        with open(f"{output}.idx", "wb") as index:
            index.write(_INDEX_HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, len(lengths), len(lengths) + 1))
            sizes = np.array(lengths, np.int32)
            index.write(sizes.tobytes())
            index.write((np.cumsum(sizes, dtype=np.int64) * 2).tobytes())
        return time.process_time() + children_seconds() - started


def children_seconds() -> float:
    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


# Ours


class QuietMeter:
    def advance(self, units: int = 1, note: str = "") -> None:
        pass


def start_worker(source, folder: Path, output: Path, batch_size: int = 32) -> Worker:
    """Start a worker of tools/preprocess_data.py in this process."""
    shared = SharedCounters.create(multiprocessing.get_context("spawn"))
    shutil.rmtree(output, ignore_errors=True)
    (output / WORK).mkdir(parents=True)
    return Worker(WorkerSettings(source, output, batch_size, tokenizer=folder), shared, QuietMeter())


def run_ours(halves: list[Path], folder: Path, output: Path) -> list[float]:
    """CPU seconds of each half, both in one worker."""
    seconds = []
    for number, half in enumerate(halves):
        started = time.process_time()
        source = open_source(half, 100_000)
        scanned = time.process_time() - started
        if number == 0:
            worker = start_worker(source, folder, output)
        else:
            worker.settings.source = source
            shutil.rmtree(output)
            (output / WORK).mkdir(parents=True)
        started = time.process_time()
        for part in range(source.parts):
            worker.encode_part(part)
        seconds.append(scanned + time.process_time() - started)
    return seconds


def halve(path: Path) -> list[Path]:
    lines = path.read_bytes().splitlines(keepends=True)
    middle = len(lines) // 2
    halves = [path.with_name(f"{path.stem}-{number}.jsonl") for number in (1, 2)]
    halves[0].write_bytes(b"".join(lines[:middle]))
    halves[1].write_bytes(b"".join(lines[middle:]))
    return halves


def time_text(work: Path, rounds: int, workers: int) -> None:
    folder = write_tokenizer(work, TINY)
    print("\n| MB/s per core | Megatron's approach | ours cold | ours warm | cold / Megatron | warm / Megatron |")
    print("|---|---|---|---|---|---|")
    for name in KINDS:
        halves = halve(work / f"{name}.jsonl")
        sizes = [sum(len(json.loads(line)["text"].encode()) for line in half.open()) / 1e6 for half in halves]
        rates = []
        for _ in range(rounds):
            megatron = [run_megatron(half, work / "text.model", work / "megatron", workers) for half in halves]
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # a new process, like a worker
                ours = pool.submit(run_ours, halves, folder, work / "ours").result()
            check_same_ids(work, halves[1])
            rates.append([sum(sizes) / sum(megatron), sizes[0] / ours[0], sizes[1] / ours[1]])
        middle = [statistics.median(column) for column in zip(*rates, strict=True)]
        cold, warm = (statistics.median(row[n] / row[0] for row in rates) for n in (1, 2))
        print(
            f"| {name}, {sum(sizes):.0f} MB | {middle[0]:.1f} | {middle[1]:.1f} | {middle[2]:.1f} | {cold:.2f} "
            f"| {warm:.2f} |",
            flush=True,
        )


def check_same_ids(work: Path, half: Path) -> None:
    """Assert that the ids of both approaches on the disk are identical, document by document.

    SentencePiece replaces its space marker (U+2581) in a text by a space. This project's tokenizer keeps it, so a
    document that contains it is compared with TextTokenizer's ids.
    """
    tokenizer = TextTokenizer.load(work / "text.model")
    lengths = np.fromfile(work / "megatron.idx", np.int32, offset=_INDEX_HEADER.size)
    lengths = lengths[: _INDEX_HEADER.unpack((work / "megatron.idx").read_bytes()[: _INDEX_HEADER.size])[3]]
    theirs = np.split(np.fromfile(work / "megatron.bin", np.uint16), np.cumsum(lengths)[:-1])
    ours = []
    for tar in sorted((work / "ours").glob("*.tar")):
        content = np.fromfile(tar, np.uint8)
        for offset, tokens, _ in np.load(tar.with_suffix(".idx.npy")).tolist():
            ours.append(content[offset : offset + 2 * tokens].view(np.uint16))
    texts = [json.loads(line)["text"] for line in half.open(encoding="utf-8")]
    for number, (text, found, expected) in enumerate(zip(texts, ours, theirs, strict=True)):
        if SPACE_MARK in text:
            expected = np.array(tokenizer.encode(text), np.uint16)
        assert np.array_equal(found, expected), f"the ids of document {number} of {half} differ from SentencePiece's"


# Images


def write_images(folder: Path, count: int, side: int = 512) -> Path:
    """Write JPEG images with detail at all scales, unless they exist, and a JSONL file of pairs; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, lines = np.random.default_rng(0), []
    for number in range(count):
        path = folder / f"{number}.jpg"
        if not path.is_file():
            coarse = Image.fromarray(generator.integers(0, 255, (12, 16, 3), np.uint8)).resize((side * 4 // 3, side))
            noise = generator.normal(0, 12, (side, side * 4 // 3, 3))
            Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)
        lines.append(json.dumps({"image": path.name, "caption": f"picture number {number} of many, in colours"}))
    pairs = folder / f"pairs-{count}.jsonl"
    pairs.write_text("\n".join(lines) + "\n")
    return pairs


def time_images(work: Path, count: int, size: int, batch_size: int, channels: int) -> None:
    config = VQGANConfig(image_size=size, base_channels=channels)
    folder = write_tokenizer(work, config)
    pairs = write_images(work / "pictures", count)
    source = open_source(pairs, 10_000)
    worker = start_worker(source, folder, work / "ours", batch_size)
    tokenizer, forward = worker.tokenizers.image, []
    encode = tokenizer.encode

    def timed(pixels):
        started = time.perf_counter()
        codes = encode(pixels)
        forward.append(time.perf_counter() - started)
        return codes

    encode(torch.zeros(batch_size, 3, size, size))
    tokenizer.encode = timed
    started = time.perf_counter()
    worker.encode_part(0)
    total = time.perf_counter() - started
    print("\n| pairs | size | s per pair | forward's share |\n|---|---|---|---|")
    print(f"| {count} | {size} | {total / count:.3f} | {sum(forward) / total:.1%} |")


# Memory


def measure_memory(work: Path, counts: list[int]) -> None:
    folder = write_tokenizer(work, TINY)
    captions = (work / "captions.jsonl").read_text().splitlines(keepends=True)
    images = write_images(work / "pictures", 64).read_text().splitlines(keepends=True)
    print("\n| input | inputs | largest resident set, MB |\n|---|---|---|")
    for name, lines, factor in (("text", captions, 1), ("pairs", images, 1 / 200)):
        for count in counts:
            corpus = (work if name == "text" else work / "pictures") / f"memory-{name}.jsonl"
            n_inputs = int(count * factor)
            with corpus.open("w") as file:
                for number in range(n_inputs):
                    file.write(lines[number % len(lines)])
            output = work / "memory"
            shutil.rmtree(output, ignore_errors=True)
            arguments = ["--input", str(corpus), "--tokenizer", str(folder), "--output", str(output), "--device", "cpu"]
            tool = Path(__file__).parents[1] / "tools" / "preprocess_data.py"
            program = f"import resource, runpy, sys; sys.argv[0] = {str(tool)!r}\n" + (
                "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
                "finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
            )
            command = [sys.executable, "-c", program, *arguments, "--part-size", str(min(10_000, counts[0]))]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"| {name} | {n_inputs} | {int(result.stdout.split()[-1]) / 1024:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("text", "pictures", "memory"), help="measurement")
    parser.add_argument("--work", type=Path, required=True, help="folder of inputs and outputs; inputs are reused")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="workers of Megatron's pool")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--size", type=int, default=256, help="size of the images, pixels")
    parser.add_argument("--channels", type=int, default=128, help="channels of the VQGAN's first level")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[50_000, 500_000], help="numbers of inputs of `memory`"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    write_texts(args.work)
    {
        "text": functools.partial(time_text, args.work, args.rounds, args.workers),
        "pictures": functools.partial(time_images, args.work, args.pairs, args.size, args.batch_size, args.channels),
        "memory": functools.partial(measure_memory, args.work, args.counts),
    }[args.what]()


if __name__ == "__main__":
    run_tool(main)
