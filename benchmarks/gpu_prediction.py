"""Predicted performance of a GPU, recorded before a measurement: training TFLOP/s, seconds per image.

    python benchmarks/gpu_prediction.py                       every recorded row, into results/gpu_predicted.jsonl
    python benchmarks/gpu_prediction.py --tree ad3992f --output -
    python benchmarks/gpu_prediction.py --write docs/benchmarks.md

A roofline model over results/operator_record.jsonl (operator_record.py) and the shapes of the models of generation. A
prediction is a range: its low end uses the first value of each pair of constants, its high end the second; the figure
is the middle of the range.

Training. Seconds of a step = micro-batches x (products + attention + rest) + optimizer:

  products    tiles of 128 x 256, 256 x 128, or 128 x 128 at 0.9 of the rate, split over K where this is faster. Each
              tile costs 96 more columns of K for filling its pipeline and writing its result; a partial wave of tiles
              costs as much as a full one. H100 and H200 reach 790 TFLOP/s in cuBLAS at 8192^3, 680 to 740 under the
              power limit of a full load; B200 and A100 reach the same share of their peak. At least the time of the
              bytes
  attention   FLOPs of the causal half at published rates: FlashAttention-3 (arXiv 2407.08608, figures 5 and 6) and
              cuDNN on Hopper, FlashAttention-2 (arXiv 2307.08691) on A100; the rates of B200 are guesses
  rest        bytes over the bandwidth that elementwise kernels reach (0.8 of the data sheet); a launch takes at least
              2.5 microseconds. The host is faster than the device at these sizes: its time is not counted

TFLOP/s are computed with model.flops.flops_per_token. 7b has as many layers as fit into 0.92 of the device's
memory according to model.memory.estimate_memory; recordings of two depths are interpolated linearly. Micro-batches per
step: 8 for 7b, else 4.

Decoding uses the captured step with its own kernels, as designed (not recorded): guidance (two sequences per prompt),
1,024 tokens after a prompt of 26:

  seconds = 1,024 x (bytes / (0.97 x read bandwidth) + launches x 1.5 to 2.5 microseconds (start, ramp and drain))

bytes: every matrix once (2 bytes per weight, or 1 in int8 and fp8, plus fp32 scales of rows), the head's 8,192 rows of
image ids, and the filled part of the cache, on average half of it. Launches: 6 per layer and 8 per step for up to 4
rows (sequences). For more rows 11 per layer, and products take at least the time of their FLOPs at half the rate of
training.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from operator_table import write_between_marks  # noqa: E402

RESERVE = 0.92
MICRO_BATCHES = {"350m": 4, "760m": 4, "7b": 8}
TOKENS, PROMPT, IMAGE_IDS = 1024, 26, 8192
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.9))
FILL = 96
"""Columns of K that take as long as a tile's filling of its pipeline and writing of its result."""
LAUNCH = 2.5e-6
"""Minimum seconds of a kernel of training."""
GRAPH_LAUNCH = (2.5e-6, 1.5e-6)
READ_SHARE = 0.97
DECODED = [("7b", kind, 1) for kind in ("bf16", "int8", "fp8")] + [("760m", "bf16", 1), ("760m", "int8", 1)]
DECODED += [("350m", "bf16", 1), ("350m", "int8", 1), ("7b", "bf16", 8), ("7b", "int8", 8), ("7b", "bf16", 32)]
DECODED += [("350m", "bf16", prompts) for prompts in (8, 32, 64)]


@dataclass(frozen=True)
class Gpu:
    """Constants of a GPU; rates in TFLOP/s, bandwidths in TB/s; pairs are (low, high)."""

    multiprocessors: int
    memory_gib: float
    bandwidth: float
    """Bandwidth of elementwise kernels."""
    read: float
    """Bandwidth of reading alone."""
    product: tuple[float, float]
    fp8: tuple[float, float] | None
    attention: dict[int, tuple[float, float]]
    """Width of a head -> forward, backward."""


_HOPPER = {64: (395, 300), 96: (430, 330), 128: (540, 420)}
GPUS = {
    "H200": Gpu(132, 139.8, 3.8, 4.3, (680, 790), (1150, 1350), _HOPPER),
    "H100": Gpu(132, 79.1, 2.65, 3.0, (680, 790), (1150, 1350), _HOPPER),
    "A100": Gpu(108, 79.3, 1.6, 1.75, (240, 270), None, {64: (180, 130), 96: (190, 145), 128: (215, 170)}),
    "B200": Gpu(148, 178.0, 6.3, 7.0, (1450, 1650), (2600, 3000), {64: (700, 520), 96: (850, 650), 128: (1150, 850)}),
}


# ------------------------------------------------------------------ training


def product_seconds(shape: list[int], gpu: Gpu, rate: float) -> float:
    """Seconds of a product [M, K] x [K, N] at `rate` TFLOP/s of full waves."""
    rows, columns, inner, batch, _, moved = shape
    best = math.inf
    for height, width, share in TILES:
        for split in (1, 2, 4, 8):
            tiles = math.ceil(rows / height) * math.ceil(columns / width) * batch * split
            work = 2 * height * width * (math.ceil(inner / split) + FILL)
            seconds = math.ceil(tiles / gpu.multiprocessors) * work / (rate * share / gpu.multiprocessors * 1e12)
            partial = 8 * split * rows * columns * batch if split > 1 else 0  # fp32, written and read
            best = min(best, seconds + partial / (gpu.bandwidth * 1e12))
    return max(best, moved / (gpu.bandwidth * 1e12), LAUNCH)


def step_seconds(row: dict, gpu: Gpu, end: int) -> dict[str, float]:
    """Seconds per class of a micro-batch, and of the optimizer step; `end`: 0 is the low end of a range, 1 the high."""
    seconds = {}
    for kind, found in row["classes"].items():
        moved = (found["read"] + found["written"]) / (gpu.bandwidth * 1e12)
        seconds[kind] = max(moved, found["launches"] * LAUNCH)
    seconds["gemm"] = 0.0
    for *shape, count in row["shapes"]["gemm"]:
        rates = gpu.fp8 if shape[4] == 1 else gpu.product
        if rates is None:
            raise ValueError(
                f"{row['model']} has products in fp8, which this GPU lacks; choose other GPUs with --gpus."
            )
        seconds["gemm"] += count * product_seconds(shape, gpu, rates[end])
    seconds["attention"] = 0.0
    for batch, heads, _, length, width, direction, count in row["shapes"]["attention"]:
        forward, backward = gpu.attention[min(gpu.attention, key=lambda one: abs(one - width))]
        flops = (2 if direction == "forward" else 5) * batch * heads * length**2 * width
        seconds["attention"] += count * flops / ((forward if direction == "forward" else backward) * 1e12)
    return seconds


def at_depth(rows: list[dict], layers: int, gpu: Gpu, end: int) -> dict[str, float]:
    """`step_seconds` of a model with `layers` layers, from its recordings of one or two depths."""
    first, last = (step_seconds(row, gpu, end) for row in (rows[0], rows[-1]))
    if len(rows) == 1 or rows[0]["layers"] == layers:
        return first
    share = (layers - rows[0]["layers"]) / (rows[-1]["layers"] - rows[0]["layers"])
    return {kind: first[kind] + share * (last[kind] - first[kind]) for kind in first}


def build_config(row: dict, layers: int):
    from megatron_cm3leon.config.loading import load_config
    from megatron_cm3leon.config.validation import validate_config

    count = row["micro_batch"] * MICRO_BATCHES[row["preset"]]
    values = [
        f"preset={row['preset']}", f"model.family={row['family']}", f"data.seq_length={row['sequence']}",
        f"train.micro_batch_size={row['micro_batch']}", f"train.global_batch_size={count}", "train.precision=bf16",
        f"model.layers={layers}", *row["compared"], *row["settings"],
    ]  # fmt: skip
    known = load_config(None, values)
    validate_config(known, 1)
    return known


def fit_layers(row: dict, gpu: Gpu) -> int:
    """Number of layers: of 7b, as many as fit into the device's memory; of other models, those recorded."""
    from megatron_cm3leon.model.memory import estimate_memory

    layers = 32 if row["preset"] == "7b" else row["layers"]
    limit = RESERVE * gpu.memory_gib * 2**30
    while layers > 1 and estimate_memory(build_config(row, layers), row["vocabulary"], 1, 0).total > limit:
        layers -= 1
    return layers


def predict_training(rows: list[dict], name: str, gpu: Gpu) -> dict:
    from megatron_cm3leon.model.flops import flops_per_token

    layers = fit_layers(rows[0], gpu)
    count = MICRO_BATCHES[rows[0]["preset"]]
    tokens = count * rows[0]["micro_batch"] * rows[0]["sequence"]
    work = flops_per_token(build_config(rows[0], layers), rows[0]["vocabulary"]) * tokens / 1e12
    totals, parts = [], []
    for end in (0, 1):
        seconds = at_depth(rows, layers, gpu, end)
        parts.append({kind: part * (1 if kind == "optimizer" else count) for kind, part in seconds.items()})
        totals.append(sum(parts[-1].values()))
    middle = sum(totals) / 2
    shares = {kind: round((parts[0][kind] + parts[1][kind]) / 2 / middle, 4) for kind in parts[0]}
    return {
        "kind": "training", "name": name, "layers": layers, "ms": middle * 1e3, "tokens_per_s": tokens / middle,
        "tflops": work / middle, "tflops_low": work / totals[0], "tflops_high": work / totals[1], "shares": shares,
    }  # fmt: skip


# ------------------------------------------------------------------ decoding


def predict_generation(family: str, size: str, weights: str, prompts: int, gpu: Gpu) -> dict:
    from generate import make_shape, make_vocabulary

    from megatron_cm3leon.export.layouts import stock_weights

    shape = make_shape(size, family, make_vocabulary(size, TOKENS), TOKENS + PROMPT)
    sizes = [one for name, one in stock_weights(shape).items() if "layers." in name and len(one) == 2]
    sizes.append((IMAGE_IDS, shape.hidden))
    numbers, rows = sum(map(math.prod, sizes)), sum(one[0] for one in sizes)
    read = 2 * numbers if weights == "bf16" else numbers + 4 * rows
    sequences = 2 * prompts
    cache = sequences * 4 * shape.layers * shape.kv_heads * shape.width * (PROMPT + TOKENS / 2)
    seconds = []
    for end in (0, 1):
        launches = (6 if sequences <= 4 else 11) * shape.layers + 8
        products = read / (READ_SHARE * gpu.read * 1e12)
        if sequences > 4:
            products = max(products, 2 * numbers * sequences / (gpu.product[end] / 2 * 1e12))
        seconds.append(TOKENS * (products + cache / (READ_SHARE * gpu.read * 1e12) + launches * GRAPH_LAUNCH[end]))
    middle = sum(seconds) / 2
    plural = "s" if prompts > 1 else ""
    return {
        "kind": "generation", "name": f"{family} {size} {weights}, {prompts} prompt{plural}", "seconds": middle,
        "seconds_low": seconds[1], "seconds_high": seconds[0], "images_per_s": prompts / middle, "step_bytes": read,
        "cache_bytes": int(cache),
    }  # fmt: skip


# ------------------------------------------------------------------ the table


def group_recordings(path: Path, tree: str) -> dict[str, list[dict]]:
    """Name of a measured row -> its recordings by depth, ascending; the last one of each model, or that of `tree`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    trees = list(dict.fromkeys(row["tree"] for row in rows))
    if not rows or (tree and tree not in trees):
        raise ValueError(
            f"--tree ({tree}) must be one of those in {path}: {', '.join(trees)}; operator_record.py adds one."
        )
    latest = {(row["model"], tuple(row["settings"])): row for row in rows if tree in ("", row["tree"])}
    groups: dict[str, list[dict]] = {}
    for row in latest.values():
        name = ", ".join([f"{row['family']} {row['preset']}", *row["settings"]])
        groups.setdefault(name, []).append(row)
    for name, found in groups.items():
        if len({row["tree"] for row in found}) > 1:
            raise ValueError(
                f"{path} has recordings of {name} of two trees; record both depths with one "
                f"tree, or select it with --tree."
            )
    return {name: sorted(rows, key=lambda row: row["layers"]) for name, rows in groups.items()}


def predict(groups: dict[str, list[dict]], gpus: list[str]) -> list[dict]:
    rows = []
    for name in gpus:
        for model, recordings in groups.items():
            row = predict_training(recordings, model, GPUS[name])
            rows.append({"gpu": name, "tree": recordings[0]["tree"], **row})
        for size, weights, prompts in DECODED:
            if weights != "fp8" or GPUS[name].fp8:
                rows.append({"gpu": name, **predict_generation("cm3leon", size, weights, prompts, GPUS[name])})
        for size in ("7b", "350m"):
            rows.append({"gpu": name, **predict_generation("llama", size, "bf16", 1, GPUS[name])})
    return rows


def describe_trees(rows: list[dict]) -> str:
    """A sentence on the recorded trees: the most frequent one, then the others with the names of their rows."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row["kind"] == "training":
            names.setdefault(row["tree"], []).append(row["name"])
    first, *others = sorted(names, key=lambda tree: -len(names[tree]))
    exceptions = "".join(f"; of {tree}: {'; '.join(dict.fromkeys(names[tree]))}" for tree in others)
    return f"Training of the tree {first}, as operator_record.py has recorded it{exceptions}.\n\n"


def build_tables(rows: list[dict], gpus: list[str]) -> str:
    """Markdown for docs/benchmarks.md: a column per GPU."""
    cells = {(row["gpu"], row["name"]): show(row) for row in rows}
    lines = []
    for kind, title in (("training", "training: TFLOP/s (low to high)"), ("generation", "decoding: seconds per batch")):
        lines += [f"| {title} | {' | '.join(gpus)} |", f"|---|{'---|' * len(gpus)}"]
        for name in dict.fromkeys(row["name"] for row in rows if row["kind"] == kind):
            lines.append(f"| {name} | {' | '.join(cells.get((gpu, name), '') for gpu in gpus)} |")
        lines.append("")
    return "\n".join(lines)


def show(row: dict) -> str:
    if row["kind"] == "training":
        layers = f", {row['layers']} layers" if " 7b" in row["name"] else ""
        return f"{row['tflops']:.0f} ({row['tflops_low']:.0f} to {row['tflops_high']:.0f}{layers})"
    rate = f"; {row['images_per_s']:.0f} images/s" if row["images_per_s"] > 5 else ""
    return f"{row['seconds']:.2f} ({row['seconds_low']:.2f} to {row['seconds_high']:.2f}{rate})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, default=RESULTS / "operator_record.jsonl", help="recordings")
    parser.add_argument("--tree", default="", help="tree of the recordings (default: the last one of each model)")
    parser.add_argument(
        "--gpus", nargs="+", default=list(GPUS), choices=list(GPUS), help="GPUs to predict (default: all)"
    )
    parser.add_argument(
        "--output", default=str(RESULTS / "gpu_predicted.jsonl"), help="JSON Lines file to write; - writes none"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file with the marks of this script")
    options = parser.parse_args()
    rows = predict(group_recordings(options.recorded, options.tree), options.gpus)
    if options.output != "-":
        Path(options.output).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = build_tables(rows, options.gpus)
    print(tables, end="")
    if options.write:
        write_between_marks(options.write, "benchmarks/gpu_prediction.py", describe_trees(rows) + tables)


if __name__ == "__main__":
    from megatron_cm3leon.common.cli import run_tool

    run_tool(main)
