"""A training step of this project, of plain PyTorch and of Hugging Face: the same model, interleaved in one run.

    python benchmarks/train_step.py                                       both families, fp32 and bf16, 512 and 2048
    python benchmarks/train_step.py --compile true                        this project with compiled layers; peers
    unchanged python benchmarks/train_step.py --family llama --precision bf16 --sequence 512 --layers 4 --hidden 192
    --heads 4

All contenders have the same shapes and the same batch, AdamW with clipping at 1.0 and fp32 main weights (bf16: the two
peers under autocast). Each runs in its own process: ours with the settings of a training process, the peers with
torch's defaults. A round times one step of each. The ratio is a peer's time divided by ours, so above 1 ours is faster:
of the fastest rounds, and the median of pairs within a round. Start-up includes interpreter, imports, building the
model and two steps.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from peers import Step, hugging_face_step, plain_step

from megatron_cm3leon.common.cli import run_tool
from megatron_cm3leon.config.loading import Config, load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.data.stream.loader import MicroBatch
from megatron_cm3leon.distributed.launch import Rank, choose_device, set_threads
from megatron_cm3leon.engine.groups import destroy_groups, initialize_groups
from megatron_cm3leon.tokenizers.vocab import Vocabulary

OURS, PLAIN, HUGGING_FACE = CONTENDERS = "megatron_cm3leon", "plain PyTorch", "Hugging Face"
WARM_UP = 2


def make_config(options: argparse.Namespace) -> Config:
    values = {
        "model.family": options.family,
        "model.layers": options.layers,
        "model.hidden_size": options.hidden,
        "model.heads": options.heads,
        "model.kv_heads": options.heads // 2 if options.family == "llama" else 0,
        "data.seq_length": options.sequence,
        "train.precision": options.precision,
        "parallel.zero": options.zero,
        "train.compile": {"auto": "null"}.get(options.compile, options.compile),
    }
    config = load_config(None, [f"{name}={value}" for name, value in values.items()])
    validate_config(config, 1)
    return config


def make_vocabulary(size: int) -> Vocabulary:
    return Vocabulary(
        text_size=size - 128, image_size=64, sentinels=32, specials=64, image_height=8, image_width=8,
        text_sha256="", image_sha256="",
    )  # fmt: skip


def build(name: str, config: Config, vocabulary: Vocabulary, device: torch.device) -> Step:
    """The step function of a contender: global batch -> loss."""
    if name == OURS:
        from megatron_cm3leon.engine.megatron import MegatronEngine

        engine = MegatronEngine(config, vocabulary, device)
        return lambda batches: engine.train_step(batches, 0, 1e-4).loss
    arguments = config.model, vocabulary.size, config.data.seq_length, config.train.precision == "bf16", device
    return plain_step(*arguments) if name == PLAIN else hugging_face_step(*arguments)


def make_batches(vocabulary: int, sequences: int, length: int, accumulate: int) -> list[MicroBatch]:
    """`accumulate` micro-batches of random tokens, [sequences, length]."""
    batches = []
    for _ in range(accumulate):
        tokens = torch.randint(0, vocabulary, (sequences, length + 1))
        batches.append(
            MicroBatch(
                tokens=tokens[:, :-1].contiguous(),
                labels=tokens[:, 1:].contiguous(),
                loss_weights=torch.ones(sequences, length),
                position_ids=torch.arange(length).expand(sequences, -1),
                samples=None,
                trimmed=0,
            )
        )
    return batches


def serve(options: argparse.Namespace, name: str) -> None:
    """Build a contender; for every line on standard input, do a step and print its seconds and the peak memory."""
    rank, config, vocabulary = Rank.from_environment(), make_config(options), make_vocabulary(options.vocabulary)
    device = choose_device("auto", rank)
    set_threads(options.threads, rank)
    if name == OURS:
        initialize_groups(config, rank, device)
    step = build(name, config, vocabulary, device)
    sequences = max(1, options.tokens // options.sequence)
    batches = make_batches(vocabulary.size, sequences, options.sequence, options.accumulate)
    for _ in sys.stdin:
        start = time.perf_counter()
        step(batches)
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]), flush=True)
    if name == OURS:
        destroy_groups()


class Contender:
    """A process with one contender, which is idle between the steps."""

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        arguments = [f"--{key.replace('_', '-')}={value}" for key, value in vars(options).items()]
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments, "--serve", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.seconds, self.memory = [], 0
        for _ in range(WARM_UP):
            self.step()
        self.start_up = time.perf_counter() - start
        self.seconds.clear()

    def step(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise ValueError(f"a contender ended with exit status {self.process.wait()}; its error is printed above.")
        seconds, self.memory = json.loads(answer)
        self.seconds.append(seconds)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def print_rows(options: argparse.Namespace) -> list[float]:
    """Measure one configuration and print its rows; returns the lowest ratios, of the fastest rounds and of pairs."""
    contenders = {}
    try:
        for name in CONTENDERS:
            contenders[name] = Contender(options, name)
        for _ in range(options.rounds):
            for contender in contenders.values():
                contender.step()
    finally:
        for contender in contenders.values():
            contender.close()
    tokens = max(1, options.tokens // options.sequence) * options.sequence * options.accumulate
    ours, worst = contenders[OURS].seconds, [float("inf")] * 2
    for name, contender in contenders.items():
        times = contender.seconds
        fastest = min(times) / min(ours)
        pairs = statistics.median(peer / reference for peer, reference in zip(times, ours, strict=True))
        if name != OURS:
            worst = [min(worst[0], fastest), min(worst[1], pairs)]
        print(
            f"| {options.family}, {options.precision}, {options.sequence} | {name} | {min(times) * 1e3:.0f} | "
            f"{statistics.median(times) * 1e3:.0f} | {tokens / min(times):.0f} | {fastest:.3f} | {pairs:.3f} | "
            f"{contender.start_up:.1f} | {contender.memory / 1e6:.0f} |",
            flush=True,
        )
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("cm3leon", "llama"), help="default: both")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: both")
    parser.add_argument("--sequence", type=int, help="tokens per sequence (default: 512 and 2048)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per forward pass (default: 2048)")
    parser.add_argument("--accumulate", type=int, default=1, help="forward passes per step (default: 1)")
    parser.add_argument("--layers", type=int, default=6, help="number of layers (default: 6)")
    parser.add_argument("--hidden", type=int, default=256, help="width of the residual stream (default: 256)")
    parser.add_argument(
        "--heads", type=int, default=8, help="attention heads; llama has half as many for keys and values (default: 8)"
    )
    parser.add_argument("--vocabulary", type=int, default=4096, help="a multiple of 128 (default: 4096)")
    parser.add_argument("--zero", type=int, choices=(0, 1), default=0, help="parallel.zero of ours (default: 0)")
    parser.add_argument(
        "--compile", choices=("auto", "true", "false"), default="auto", help="train.compile of ours (default: auto)"
    )
    parser.add_argument("--rounds", type=int, default=12, help="timed steps per contender (default: 12)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 uses all cores (default: 0)")
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    contender = vars(options).pop("serve")
    if contender:
        serve(options, contender)
        return
    print(f"{options.layers} layers, width {options.hidden}, vocabulary {options.vocabulary}, {options.tokens} tokens")
    print("| model | | fastest, ms | median, ms | tokens/s | / ours, fastest | pairs | start-up, s | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    worst = [float("inf")] * 2
    for family in [options.family] if options.family else ["cm3leon", "llama"]:
        for precision in [options.precision] if options.precision else ["fp32", "bf16"]:
            for sequence in [options.sequence] if options.sequence else [512, 2048]:
                point = argparse.Namespace(
                    **{**vars(options), "family": family, "precision": precision, "sequence": sequence}
                )
                worst = [min(pair) for pair in zip(worst, print_rows(point), strict=True)]
    print(f"lowest ratio of a peer's time to ours: {worst[0]:.3f} fastest, {worst[1]:.3f} median of pairs")


if __name__ == "__main__":
    run_tool(main)
