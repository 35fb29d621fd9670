"""Training on one GPU: TFLOP/s, MFU and peak memory of ours beside Hugging Face with SDPA, plain and compiled.

    python benchmarks/gpu.py                          350m, 760m, 7b (as many of its layers as fit), both families
    python benchmarks/gpu.py --models 350m --families llama --steps 5

bf16 with fp32 main weights, random tokens, AdamW and clipping. Every contender of a point is a process of its own,
since memory is part of the answer, and each is measured twice, in the order A B C A B C; out of memory is a row.
Without a GPU this runs on the CPU, which shows that it runs and nothing else (give --layers and --sequence).
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time

import torch
from peers import hugging_face_step
from train_step import make_batches, make_vocabulary

from megatron_cm3leon.cli import run_tool
from megatron_cm3leon.config import Config, load_config
from megatron_cm3leon.engine.parallel import Rank, choose_device, destroy_groups, initialize_groups
from megatron_cm3leon.metrics import flops_per_token
from megatron_cm3leon.model.weights import canonical_shapes
from megatron_cm3leon.plan import estimate_memory

OURS, SDPA, COMPILED = CONTENDERS = "megatron_cm3leon", "Hugging Face, SDPA", "Hugging Face, SDPA, compiled"
MICRO_BATCHES = {"350m": 4, "760m": 4, "7b": 1}
DENSE_BF16_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "B200": 2250}
"""Peak rates of NVIDIA's data sheets (SXM), without sparsity."""
RESERVE = 0.92
"""Share of the device's memory that the plan may fill: buffers and fragmentation come on top."""


def make_config(options: argparse.Namespace) -> Config:
    values = [
        f"model.family={options.family}",
        "model.dropout=0",
        f"data.seq_length={options.sequence}",
        f"train.micro_batch_size={options.micro_batch}",
        f"train.global_batch_size={options.micro_batch * options.accumulate}",
        "train.precision=bf16",
        f"parallel.recompute={options.recompute}",
        "optimizer.rule=none",
    ]
    values += [f"model.layers={options.layers}"] if options.layers else []
    config = load_config(None, [f"preset={options.model}", *values])
    config.validate(1)
    return config


def fit_layers(options: argparse.Namespace) -> int:
    """The model's layers, or as many as the plan lets into this device's memory."""
    config = make_config(options)
    if not torch.cuda.is_available():
        return config.model.layers
    room = RESERVE * torch.cuda.get_device_properties(0).total_memory
    while estimate_memory(config, options.vocabulary, 1, 0).total > room and config.model.layers > 1:
        config.model.layers -= 1
    return config.model.layers


def measure(options: argparse.Namespace) -> dict:
    """Seconds of each step of one contender in this process, and its peak memory in bytes."""
    rank = Rank.from_environment()
    config, vocabulary = make_config(options), make_vocabulary(options.vocabulary)
    device = choose_device("auto", rank)
    if options.alone == OURS:
        from megatron_cm3leon.engine.megatron import MegatronEngine

        initialize_groups(config, rank, device)
        engine = MegatronEngine(config, vocabulary, device)

        def step(batches):
            return engine.train_step(batches, 0, 1e-4).loss
    else:
        compiled = options.alone == COMPILED
        step = hugging_face_step(config.model, vocabulary.size, config.data.seq_length, True, device, compiled)
    batches = make_batches(vocabulary.size, options.micro_batch, options.sequence, options.accumulate)
    seconds = []
    for number in range(options.warm_up + options.steps):
        start = time.perf_counter()
        loss = step(batches)  # a float: the device has finished
        if number >= options.warm_up:
            seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    if options.alone == OURS:
        destroy_groups()
    return {"seconds": seconds, "memory": memory, "loss": loss}


def in_a_new_process(options: argparse.Namespace, contender: str) -> dict | None:
    """`measure` of a contender; None when it runs out of memory."""
    names = ("model", "family", "layers", "sequence", "micro_batch", "accumulate", "vocabulary", "recompute")
    given = {name: getattr(options, name) for name in (*names, "steps", "warm_up")} | {"alone": contender}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode and "OutOfMemoryError" in done.stderr:
        return None
    if done.returncode:
        raise ValueError(f"{contender} failed at {given}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def print_point(options: argparse.Namespace, peak: float) -> None:
    """Measure every contender of one model and print a row for each."""
    config = make_config(options)
    tokens = options.micro_batch * options.accumulate * options.sequence
    work = flops_per_token(config, options.vocabulary) * tokens / 1e12
    count = sum(math.prod(shape) for shape in canonical_shapes(config, options.vocabulary).values())
    found: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    failed = set()
    for _ in range(2):
        for name in CONTENDERS:
            result = None if name in failed else in_a_new_process(options, name)
            found[name] += [result] if result else []
            failed |= set() if result else {name}
    label = f"{options.family} {options.model}, {config.model.layers} layers, {count / 1e6:.0f}M"
    for name, results in found.items():
        if name in failed:
            print(f"| {label} | {name} | out of memory | | | | |", flush=True)
            continue
        seconds = statistics.median(second for result in results for second in result["seconds"])
        rate = work / seconds
        mfu = f"{rate / peak:.3f}" if peak else "unknown"
        print(
            f"| {label} | {name} | {seconds * 1e3:.0f} | {tokens / seconds:.0f} | {rate:.1f} | {mfu} | "
            f"{max(result['memory'] for result in results) / 2**30:.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MICRO_BATCHES), choices=list(MICRO_BATCHES), metavar="M")
    parser.add_argument("--families", nargs="+", default=["cm3leon", "llama"], metavar="F")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens a block (default: 4096)")
    parser.add_argument("--micro-batch", type=int, default=0, help="blocks in a forward pass (default: by model)")
    parser.add_argument("--accumulate", type=int, default=4, help="forward passes a step (default: 4)")
    parser.add_argument("--vocabulary", type=int, default=65_536, help="a multiple of 128 (default: 65536)")
    parser.add_argument("--layers", type=int, default=0, help="instead of the model's (default: as many as fit)")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none", help="default: none")
    parser.add_argument("--steps", type=int, default=8, help="measured steps (default: 8)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them (default: 3)")
    parser.add_argument("--peak", type=float, default=0, help="the device's dense bf16 TFLOP/s (default: by its name)")
    for name in ("--alone", "--model", "--family"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measure(options)))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU: no measurement of a GPU"
    known = [rate for name, rate in DENSE_BF16_TFLOPS.items() if name in device]
    peak = options.peak or (known[0] if known else 0)
    print(f"{device}, torch {torch.__version__}, CUDA {torch.version.cuda}, bf16, sequence {options.sequence}")
    print("FLOP a token = 6 x weights of its matrices (head included) + 6 x layers x sequence x width (causal: half)")
    rate = f"{peak:.0f} TFLOP/s" if peak else "the peak rate (give --peak)"
    print(f"MFU = FLOP a token x tokens/s / {rate}; ms a step\n")
    print("| model | | ms | tokens/s | TFLOP/s | MFU | peak GiB |\n|---|---|---|---|---|---|---|")
    for family in options.families:
        for model in options.models:
            micro_batch = options.micro_batch or MICRO_BATCHES[model]
            given = {**vars(options), "family": family, "model": model, "micro_batch": micro_batch}
            point = argparse.Namespace(**given)
            point.layers = point.layers or fit_layers(point)
            print_point(point, peak)


if __name__ == "__main__":
    run_tool(main)
