"""Training loss with train.fp8 and with bf16: the quickstart's model and batches, one row per finished run.

The mean loss of all steps is compared, because the mean of the last steps alone differs by 3 % between two bf16 runs
that round differently. A third kind of run shows the spread of such runs: the same batches in micro-batches of 16
instead of 8. train.fp8 passes if the mean difference over the seeds is within 0.5 %.

    python benchmarks/fp8_loss.py                     500 steps, 4 seeds of each kind; continues an interrupted run
    python benchmarks/fp8_loss.py --seeds 1 --steps 100 --results /tmp/rows.jsonl

The corpus (colored shapes, without retrieval) and its tokenizers are created in the folder --work if they do not exist.
On a CPU, fp8 products are emulated: the losses are meaningful, the speed is not.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "examples/quickstart/train.yaml"
KINDS = {  # differences from the quickstart's configuration
    "bf16": {},
    "fp8": {"train.fp8": True},
    "bf16, other rounding": {"train.micro_batch_size": 16},
}
LAST = 100
"""Number of last steps in the second mean."""


def run(*command: object) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)


def prepare(work: Path, pairs: int) -> Path:
    """Write shards of `pairs` pairs, unless they exist; by default about an eighth of the quickstart's."""
    shards, tokenizer, source = work / "shards", work / "tokenizer", work / "pairs"
    if (shards / "manifest.json").exists():
        return shards
    specials = "--specials", 32, "--sentinels", 16
    run("examples/shapes/generate.py", "--pairs", pairs, "--size", 32, "--output", source)
    tool, given = "tools/train_tokenizer.py", ("--input", source / "train.jsonl", "--output", tokenizer)
    run(tool, "text", *given, "--vocab-size", 480, *specials)
    image = "--image-size", 32, "--downsample", 4, "--codebook-size", 256, "--steps", 150
    run(tool, "image", *given, *image, *specials)
    run("tools/preprocess_data.py", "--input", source / "train.jsonl", "--tokenizer", tokenizer, "--output", shards)
    return shards


def train(work: Path, shards: Path, kind: str, seed: int, steps: int) -> dict:
    """Execute one run; returns its row."""
    output = work / f"{kind.replace(', ', '-').replace(' ', '-')}-{seed}-{steps}"
    settings = {
        "data.shards": shards, "output": output, "seed": seed, "train.steps": steps, "train.precision": "bf16",
        "checkpoint.interval": max(1, steps // 5), "checkpoint.keep_last": 1, **KINDS[kind],
    }  # fmt: skip
    run("-m", "megatron_cm3leon.train", CONFIG, *(f"{name}={value}" for name, value in settings.items()))
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert len(losses) == steps, f"{output} has {len(losses)} of {steps} steps"
    return {
        "kind": kind, "seed": seed, "steps": steps, "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, emulated",
        "mean_loss": statistics.fmean(losses.values()),
        "loss_of_last_steps": statistics.fmean(losses[step] for step in range(steps - LAST + 1, steps + 1)),
        "losses": {step: losses[step] for step in range(50, steps + 1, 50)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help=f"steps per run, at least {LAST} (default: 500)")
    parser.add_argument("--seeds", type=int, default=4, help="runs per kind (default: 4)")
    parser.add_argument("--pairs", type=int, default=1200, help="pairs of the corpus (default: 1200)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs/fp8_loss", help="folder of corpus and runs (default: runs/fp8_loss)"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks/results/fp8_loss.jsonl", help="JSON Lines of the rows"
    )
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    rows = [row for row in map(json.loads, lines) if row["steps"] == options.steps]
    shards = prepare(options.work, options.pairs)
    for seed in range(options.seeds):
        for kind in KINDS:
            if any((row["kind"], row["seed"]) == (kind, seed) for row in rows):
                continue
            rows.append(train(options.work, shards, kind, seed, options.steps))
            with open(options.results, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    show(rows, options.seeds)


def show(rows: list[dict], seeds: int) -> None:
    """Print both mean losses of each run, and their differences from those of bf16."""
    for name in ("mean_loss", "loss_of_last_steps"):
        print(f"\n{name}, and its relative difference from bf16")
        print(f"| seed | {' | '.join(KINDS)} |\n|---{'|---' * len(KINDS)}|")
        differences = {kind: [] for kind in KINDS}
        for seed in range(seeds):
            found = {row["kind"]: row[name] for row in rows if row["seed"] == seed}
            for kind in KINDS:
                differences[kind].append(found[kind] / found["bf16"] - 1)
            cells = [f"{found[kind]:.4f} ({differences[kind][-1]:+.2%})" for kind in KINDS]
            print(f"| {seed} | {' | '.join(cells)} |")
        print(f"| mean | {' | '.join(f'{statistics.fmean(differences[kind]):+.2%}' for kind in KINDS)} |")


if __name__ == "__main__":
    main()
