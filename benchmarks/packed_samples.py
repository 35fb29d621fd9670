"""Training rate of packed instruction documents with attention per sample, beside causal packing; one run, interleaved.

    python benchmarks/packed_samples.py                      sequences of 512 and 2,048 tokens, samples of 100 to 400

Contenders: packing=documents with attention=sample, and with attention=causal; packing=stream with attention=causal.
All train the same model on the same shards, from the loader to the optimizer, each in its own process. A round times
the same number of steps of each. Rates count tokens of documents per second, without padding; the ratio is the rate
divided by that of packing=stream: of the fastest rounds, and the median over the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_cm3leon.common.atomic_io import write_json
from megatron_cm3leon.common.cli import HelpFormatter, run_tool
from megatron_cm3leon.config.loading import Config, load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.data.shards.reader import MANIFEST, build_manifest
from megatron_cm3leon.data.shards.writer import ShardWriter
from megatron_cm3leon.data.stream.loader import Loader
from megatron_cm3leon.data.stream.stream import build_stream
from megatron_cm3leon.distributed.launch import Rank, choose_device, set_threads
from megatron_cm3leon.engine.groups import destroy_groups, ignore_library_warnings, initialize_groups
from megatron_cm3leon.tokenizers.vocab import Vocabulary

CONTENDERS = {
    "documents, attention=sample": ("data.packing=documents", "data.attention=sample"),
    "documents, attention=causal": ("data.packing=documents", "data.attention=causal"),
    "stream, attention=causal": ("data.packing=stream", "data.attention=causal"),
}
REFERENCE = "stream, attention=causal"
WARM_UP = 2
VOCABULARY = Vocabulary(
    text_size=3968, image_size=64, sentinels=32, specials=64, image_height=8, image_width=8, text_sha256="",
    image_sha256="",
)  # fmt: skip


def write_documents(folder: Path, count: int, shortest: int, longest: int) -> None:
    """Questions with an answer and an image; as samples they have `shortest` to `longest` tokens, uniformly."""
    draws, v = np.random.default_rng(0), VOCABULARY
    writer = ShardWriter(folder, "shard-000000-000", v)
    for number in range(count):
        answer = int(draws.integers(1, 9))
        # </s> question, answer, "." <break> image </s>, and the three tokens that moving the answer adds
        words = int(draws.integers(shortest, longest + 1)) - v.image_tokens - 3 - 3
        text = draws.integers(0, v.text_size, words)
        image = draws.integers(v.image_start, v.image_end, v.image_tokens)
        metadata = {
            "image": "",
            "source": f"random:{number}",
            "extra": "{}",
            "picture_sha256": "",
            "kind": "instruction",
        }
        ids = np.concatenate([text, [v.break_id], image])
        writer.add(f"{number:08d}", ids, metadata, [(words - 1 - answer, words - 1)])
    write_json(folder / MANIFEST, build_manifest(v, [writer.close()]))


def make_config(options: argparse.Namespace, name: str) -> Config:
    values = {
        "model.layers": options.layers,
        "model.hidden_size": options.hidden,
        "model.heads": options.heads,
        "data.shards": options.shards,
        "data.seq_length": options.sequence,
        "train.precision": "fp32",
        "train.global_batch_size": options.tokens // options.sequence,
        "train.micro_batch_size": options.tokens // options.sequence,
        "cm3.probability": 0,
        "sft.loss": "target",
        "output": f"{options.shards}/no-run",
    }
    config = load_config(None, [*(f"{field}={value}" for field, value in values.items()), *CONTENDERS[name]])
    validate_config(config, 1)
    return config


def serve(options: argparse.Namespace, name: str) -> None:
    """For every line on standard input, do a round and print its seconds and its tokens of documents."""
    from megatron_cm3leon.engine.megatron import MegatronEngine

    ignore_library_warnings()
    rank, config = Rank.from_environment(), make_config(options, name)
    device = choose_device("auto", rank)
    set_threads(options.threads, rank)
    initialize_groups(config, rank, device)
    stream = build_stream(config)
    engine, size = MegatronEngine(config, stream.vocabulary, device), config.train.micro_batch_size
    with Loader(stream, micro_batch_size=size, workers=1) as loader:
        for _ in sys.stdin:
            start, tokens = time.perf_counter(), 0
            for _ in range(options.steps):
                _, micro_batches = next(loader)
                engine.train_step(micro_batches, 0, 1e-4)
                tokens += sum(int((batch.tokens != VOCABULARY.pad).sum()) for batch in micro_batches)
            print(json.dumps([time.perf_counter() - start, tokens]), flush=True)
    destroy_groups()


class Contender:
    """A process with one contender, which is idle between its rounds."""

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        arguments = [f"--{key}={value}" for key, value in vars(options).items() if key != "serve"]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments, "--serve", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.rates: list[float] = []
        for _ in range(WARM_UP):
            self.run_round()
        self.rates.clear()

    def run_round(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise ValueError(f"a contender ended with exit status {self.process.wait()}; its error is printed above.")
        seconds, tokens = json.loads(answer)
        self.rates.append(tokens / seconds)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def print_rows(options: argparse.Namespace) -> None:
    """Measure one length of sequences and print its rows."""
    contenders: dict[str, Contender] = {}
    try:
        for name in CONTENDERS:
            contenders[name] = Contender(options, name)
        for _ in range(options.rounds):
            for contender in contenders.values():
                contender.run_round()
    finally:
        for contender in contenders.values():
            contender.close()
    reference = contenders[REFERENCE].rates
    for name, contender in contenders.items():
        pairs = statistics.median(rate / other for rate, other in zip(contender.rates, reference, strict=True))
        print(
            f"| {options.sequence} | {name} | {max(contender.rates):.0f} | {statistics.median(contender.rates):.0f} | "
            f"{max(contender.rates) / max(reference):.3f} | {pairs:.3f} |",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--sequence", type=int, default=0, help="tokens per sequence; 0: 512 and 2,048")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step, a multiple of --sequence")
    parser.add_argument("--shortest", type=int, default=100, help="tokens of the shortest sample")
    parser.add_argument("--longest", type=int, default=400, help="tokens of the longest sample")
    parser.add_argument("--documents", type=int, default=4096, help="documents of the shards")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256, help="width of the residual stream")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="steps per round")
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds per contender")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--shards", default="", help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options, options.serve)
        return 0
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{options.layers} layers, width {options.hidden}, {options.tokens} tokens per step; load average {load}")
    print("| sequence | | fastest, tokens/s | median, tokens/s | / stream, fastest | / stream, rounds |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_documents(Path(folder), options.documents, options.shortest, options.longest)
        options.shards = folder
        for sequence in [options.sequence] if options.sequence else [512, 2048]:
            print_rows(argparse.Namespace(**{**vars(options), "sequence": sequence}))
    return 0


if __name__ == "__main__":
    run_tool(main)
