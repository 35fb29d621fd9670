"""Training on one GPU: TFLOP/s, MFU and peak memory of this project and of Hugging Face's models with SDPA.

    python benchmarks/gpu/training.py --seconds 300 --output training.jsonl
    python benchmarks/gpu/training.py --only "cm3leon 7b" --seconds 120
    python benchmarks/gpu/training.py --device cpu            tiny sizes, to check that it runs

bf16 with fp32 main weights, random tokens, AdamW and clipping; 7b has as many layers as fit into the device's memory
according to model.memory.estimate_memory. A row of PLAN is this project with overrides of its configuration, or a peer
at the same sizes. Peers have no z-loss, so no row that is compared with them has one. Weights are drawn on the device,
and no memory is page-locked for checkpoints.

A row has the step's time (median and fastest), tokens/s, TFLOP/s computed with model.flops.flops_per_token, MFU
relative to the dense bf16 peak (also for fp8), the allocator's peak and the estimated bytes, the losses, and for this
project the kernels that take most of a step. runner.py describes how rows are run and written.
"""

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator

from runner import parse_options, run_driver

MODULES = ("torch._dynamo", "train_step", "megatron_cm3leon.engine.megatron")

OURS, SDPA, COMPILED, ALL_COMPILED = CONTENDERS = (
    "megatron_cm3leon",
    "Hugging Face, SDPA",
    "Hugging Face, SDPA, compiled",
    "Hugging Face, SDPA, compiled with its loss",
)
SEQUENCE, VOCABULARY = 4096, 65_536
MICRO_BATCH = {"350m": 4, "760m": 4, "7b": 1}
MICRO_BATCHES = {"350m": 4, "760m": 4, "7b": 8}
STEPS = {"350m": 6, "760m": 6, "7b": 4}
WARM_UP = 2
SAMPLE_TOKENS = 1066
"""Tokens per sample under data.attention=sample: a pair of the paper. TFLOP/s count attention over the sequence."""
DENSE_BF16_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "B200": 2250}
"""Peak rates of NVIDIA's data sheets (SXM), without sparsity."""
RESERVE = 0.92
"""Share of the device's memory that the estimate may fill; buffers and fragmentation are not part of it."""
RETRY_SHARE = 0.85
"""Share of the layers with which a row that ran out of memory is repeated."""
COMPARED = ("model.dropout=0", "train.z_loss=0", "checkpoint.asynchronous=false", "optimizer.rule=none")
TINY = ("model.layers=2", "model.hidden_size=64", "model.heads=4", "model.ffn_hidden_size=0")


def _row(family: str, model: str, limit_s: float, *overrides: str, contender: str = OURS) -> dict:
    name = ", ".join([f"{family} {model}", *([contender] if contender != OURS else []), *overrides])
    return {
        "name": name, "kind": "training", "family": family, "model": model, "contender": contender,
        "overrides": list(overrides), "limit_s": limit_s,
    }  # fmt: skip


PLAN = [
    _row("cm3leon", "7b", 100),
    _row("cm3leon", "760m", 80),
    _row("cm3leon", "350m", 70),
    _row("llama", "7b", 100),
    _row("llama", "350m", 80),
    _row("cm3leon", "7b", 110, "train.fp8=true"),
    _row("cm3leon", "760m", 110, contender=COMPILED),
    _row("cm3leon", "7b", 130, contender=COMPILED),
    _row("cm3leon", "350m", 100, contender=COMPILED),
    _row("cm3leon", "7b", 80, "train.compile=false"),
    _row("cm3leon", "350m", 110, contender=ALL_COMPILED),
    _row("llama", "350m", 100, contender=COMPILED),
    _row("cm3leon", "350m", 60, contender=SDPA),
    _row("cm3leon", "350m", 60, "train.compile=false"),
    _row("cm3leon", "760m", 60, "train.compile=false"),
    _row("cm3leon", "350m", 80, "data.attention=sample"),
    _row("cm3leon", "350m", 70, "train.kernels=torch"),
    _row("llama", "350m", 70, "train.z_loss=1e-5"),
    _row("cm3leon", "350m", 80, "train.fp8=true"),
    _row("llama", "760m", 80),
    _row("cm3leon", "760m", 60, contender=SDPA),
    _row("cm3leon", "7b", 80, contender=SDPA),
]


def make_rows(device: str) -> list[dict]:
    """PLAN with the sizes of every row."""
    tiny = {"sequence": 128, "vocabulary": 1024, "micro_batch": 2, "micro_batches": 2, "steps": 2, "tiny": True}
    rows = []
    for row in PLAN:
        model = row["model"]
        sizes = {
            "sequence": SEQUENCE, "vocabulary": VOCABULARY, "micro_batch": MICRO_BATCH[model],
            "micro_batches": MICRO_BATCHES[model], "steps": STEPS[model],
        }  # fmt: skip
        rows.append({**row, **(tiny if device == "cpu" else sizes), "device": device})
    return rows


# ------------------------------------------------------------------ in the worker


def build_config(row: dict):
    """The validated configuration of a row; ValueError for an unknown field in its overrides."""
    from megatron_cm3leon.config.loading import load_config
    from megatron_cm3leon.config.validation import validate_config

    values = [
        f"preset={row['model']}",
        f"model.family={row['family']}",
        f"data.seq_length={row['sequence']}",
        f"train.micro_batch_size={row['micro_batch']}",
        f"train.global_batch_size={row['micro_batch'] * row['micro_batches']}",
        f"train.device={row['device']}",
        *COMPARED,
    ]
    if row.get("tiny"):
        values += [*TINY, *(["model.kv_heads=2"] if row["family"] == "llama" else [])]
    values += [f"model.layers={row['layers']}"] if row.get("layers") else []
    config = load_config(None, [*values, *row["overrides"]])
    validate_config(config, 1)
    return config


def fit_layers(row: dict, memory: int) -> int:
    """The number of layers of the model, or as many as fit into `memory` bytes according to the estimate."""
    from megatron_cm3leon.model.memory import estimate_memory

    config = build_config(row)
    while estimate_memory(config, row["vocabulary"], 1, 0).total > RESERVE * memory and config.model.layers > 1:
        config.model.layers -= 1
    return config.model.layers


@contextlib.contextmanager
def weights_drawn_on(device) -> Iterator[None]:
    """The engine builds its model on `device` with normally distributed weights: one CPU thread takes 30 s for 7b."""
    import torch

    from megatron_cm3leon.engine import megatron
    from megatron_cm3leon.model import builder

    @torch.no_grad()
    def draw(model, config) -> None:
        for parameter in model.parameters():
            parameter.fill_(1) if parameter.dim() == 1 else parameter.normal_(std=config.model.init_std)

    def build_on_device(config, vocabulary):
        with torch.device(device):
            return build(config, vocabulary)

    build, initialize = megatron.build_stage, builder.initialize_weights
    megatron.build_stage, builder.initialize_weights = build_on_device, draw
    try:
        yield
    finally:
        megatron.build_stage, builder.initialize_weights = build, initialize


def build_step(row: dict, config, vocabulary, device) -> Callable:
    """The step function of a contender: global batch -> (loss, gradient norm or None)."""
    if row["contender"] == OURS:
        from megatron_cm3leon.distributed.launch import Rank
        from megatron_cm3leon.engine.groups import initialize_groups
        from megatron_cm3leon.engine.megatron import MegatronEngine

        initialize_groups(config, Rank.from_environment(), device)
        with weights_drawn_on(device):
            engine = MegatronEngine(config, vocabulary, device)

        def step(batches) -> tuple[float, float | None]:
            metrics = engine.train_step(batches, 0, 1e-4)
            return metrics.loss, metrics.grad_norm

        return step
    from peers import hugging_face_step

    compiled, with_loss = row["contender"] != SDPA, row["contender"] == ALL_COMPILED
    peer = hugging_face_step(config.model, vocabulary.size, row["sequence"], True, device, compiled, with_loss)
    return lambda batches: (peer(batches), None)


def measure(row: dict) -> Iterator[dict]:
    """States of a row: its sizes, then the rates so far after each measured step, then the kernels."""
    import torch
    from timing import list_kernels
    from train_step import make_batches, make_vocabulary

    from megatron_cm3leon.distributed.launch import Rank, choose_device

    begin = time.perf_counter()
    device = choose_device(row["device"], Rank.from_environment())
    cuda = device.type == "cuda"
    if cuda and row["model"] == "7b" and not row.get("layers"):
        row = {**row, "layers": fit_layers(row, torch.cuda.get_device_properties(device).total_memory)}
    config, vocabulary = build_config(row), make_vocabulary(row["vocabulary"])
    result = {**row, **describe(config, row)}
    yield result
    torch.manual_seed(1)
    step = build_step(row, config, vocabulary, device)
    torch.manual_seed(0)
    batches = make_batches(vocabulary.size, row["micro_batch"], row["sequence"], row["micro_batches"])
    if config.data.attention == "sample":
        batches = [divide_into_samples(batch) for batch in batches]
    result |= {"build_s": time.perf_counter() - begin, "warm_up_s": [], "losses": []}
    seconds = []
    for number in range(WARM_UP + row["steps"]):
        start = time.perf_counter()
        loss, result["grad_norm"] = step(batches)  # reading floats waits for the device
        spent = time.perf_counter() - start
        result["losses"].append(loss)
        if number < WARM_UP:
            result["warm_up_s"].append(spent)
        else:
            seconds.append(spent)
            result |= compute_rates(result, seconds)
        if cuda:
            result["peak_bytes"] = torch.cuda.max_memory_allocated()
            result["reserved_bytes"] = torch.cuda.max_memory_reserved()
            result["mfu"] = model_flops_utilization(result.get("tflops"), torch.cuda.get_device_name(device))
        yield result
    if cuda and row["contender"] == OURS:
        yield result | list_kernels(lambda: step(batches))


def divide_into_samples(batch):
    """The same batch, divided into samples of SAMPLE_TOKENS, or of half a sequence if that is shorter."""
    length = min(SAMPLE_TOKENS, batch.tokens.shape[1] // 2)
    samples, positions = batch.position_ids // length, batch.position_ids % length
    return dataclasses.replace(batch, samples=samples.contiguous(), position_ids=positions.contiguous())


def describe(config, row: dict) -> dict:
    """Sizes of a row, its operations per step, and for this project the estimated bytes."""
    from megatron_cm3leon.model.flops import flops_per_token
    from megatron_cm3leon.model.memory import estimate_memory
    from megatron_cm3leon.model.weights import canonical_shapes

    tokens = row["micro_batch"] * row["micro_batches"] * row["sequence"]
    found = {
        "layers": config.model.layers,
        "parameters": sum(math.prod(shape) for shape in canonical_shapes(config, row["vocabulary"]).values()),
        "tokens": tokens,
        "tera_operations": flops_per_token(config, row["vocabulary"]) * tokens / 1e12,
    }
    if row["contender"] == OURS:
        found["planned_bytes"] = estimate_memory(config, row["vocabulary"], 1, 0).total
    return found


def compute_rates(result: dict, seconds: list[float]) -> dict:
    """The fields of a row that follow from the seconds of its steps."""
    middle = statistics.median(seconds)
    return {
        "ms": middle * 1e3, "ms_fastest": min(seconds) * 1e3, "steps_measured": len(seconds),
        "tokens_per_s": result["tokens"] / middle, "tflops": result["tera_operations"] / middle,
    }  # fmt: skip


def model_flops_utilization(tflops: float | None, gpu: str) -> float | None:
    """Share of the GPU's dense bf16 peak; None if the peak is not known."""
    known = [peak for name, peak in DENSE_BF16_TFLOPS.items() if name in gpu]
    return tflops / known[0] if tflops and known else None


def fewer_layers(result: dict) -> dict | None:
    """The row to try after a row that ran out of memory, or None."""
    if not result.get("out_of_memory") or result["model"] != "7b" or result.get("layers", 0) < 2:
        return None
    sizes = ("sequence", "vocabulary", "micro_batch", "micro_batches", "steps", "device")
    row = {key: result[key] for key in ("name", "kind", "family", "model", "contender", "overrides", *sizes)}
    return row | {"layers": int(RETRY_SHARE * result["layers"]), "limit_s": 100}


def show(result: dict) -> str:
    """One line that describes a result."""
    if "tflops" not in result:
        reason = result.get("skipped") or result.get("cut") or result.get("failed", "").strip().splitlines()[-1][:300]
        return f"{result['name']}: {'out of memory' if result.get('out_of_memory') else reason}"
    memory = f", peak {result['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in result else ""
    cut = f" ({result['cut']})" if "cut" in result else ""
    return (
        f"{result['name']}: {result['layers']} layers, {result['ms']:.0f} ms, {result['tokens_per_s']:.0f} tokens/s, "
        f"{result['tflops']:.1f} TFLOP/s{memory}{cut}"
    )


def main() -> int:
    options = parse_options(__doc__, 300, "training.jsonl")
    return run_driver(__file__, options, make_rows(options.device), MODULES, measure, show=show, again=fewer_layers)


if __name__ == "__main__":
    raise SystemExit(main())
