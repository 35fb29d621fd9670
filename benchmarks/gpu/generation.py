"""Generation on one GPU: seconds per image, images per second, and the share of memory bandwidth of a step.

    python benchmarks/gpu/generation.py --seconds 220 --output generation.jsonl
    python benchmarks/gpu/generation.py --only "7b bf16" --seconds 120
    python benchmarks/gpu/generation.py --device cpu            a tiny size, to check that it runs

1,024 image tokens after a caption of 24, guidance 3 (two sequences per prompt), random weights drawn on the device;
decoding to pixels is not included. A row has the seconds of the first call in its process (`first_s`, including capture
and compilation) and of a later call (`seconds`); `graph_ms`, the time of the replayed CUDA graphs per token; `tb_s`,
the bytes that a step must read (weights, the rows of the head that may be sampled, half of the final cache) divided by
that time; and `read_tb_s`, the rate of a plain sum on this GPU. runner.py describes how rows are run and written.
"""

import statistics
import time
from collections.abc import Iterator

from runner import parse_options, run_driver

MODULES = ("generate",)

TOKENS, CONTEXT, GUIDANCE = 1024, 4096, 3.0
TINY_TOKENS, TINY_CONTEXT = 16, 160
PROFILED_TOKENS = 16
REPEAT_BELOW = 5.0
"""Calls of fewer seconds are measured three times, longer ones once."""


def _row(family: str, model: str, weights: str, prompts: int, limit_s: float) -> dict:
    name = f"{family} {model} {weights}, {prompts} prompt{'s' if prompts > 1 else ''}"
    return {
        "name": name, "kind": "generation", "family": family, "model": model, "weights": weights, "prompts": prompts,
        "limit_s": limit_s,
    }  # fmt: skip


PLAN = [
    _row("cm3leon", "7b", "bf16", 1, 60),
    _row("cm3leon", "7b", "int8", 1, 60),
    _row("cm3leon", "350m", "bf16", 1, 40),
    _row("cm3leon", "350m", "bf16", 64, 50),
    _row("cm3leon", "7b", "fp8", 1, 60),
    _row("cm3leon", "7b", "bf16", 8, 60),
    _row("llama", "7b", "bf16", 1, 60),
    _row("cm3leon", "350m", "bf16", 8, 40),
    _row("cm3leon", "7b", "int8", 8, 60),
    _row("cm3leon", "760m", "bf16", 1, 40),
    _row("cm3leon", "350m", "int8", 1, 40),
    _row("cm3leon", "350m", "bf16", 32, 40),
    _row("cm3leon", "7b", "bf16", 32, 90),
    _row("llama", "350m", "bf16", 1, 40),
    _row("cm3leon", "760m", "int8", 1, 40),
]


def make_rows(device: str) -> list[dict]:
    """PLAN with the sizes of every row."""
    sizes = {"tokens": TOKENS, "context": CONTEXT, "guidance": GUIDANCE, "device": device}
    if device == "cpu":
        sizes |= {"tokens": TINY_TOKENS, "context": TINY_CONTEXT, "tiny": True}
    return [{**row, **sizes} for row in PLAN]


# ------------------------------------------------------------------ in the worker


def build_decoder(row: dict, device: str):
    """A decoder with random weights, and its vocabulary; ValueError for an unknown type of weights."""
    import torch
    from generate import make_shape, make_vocabulary, make_weights

    from megatron_cm3leon.generation.decoder import DTYPES, KINDS, Decoder

    if row["weights"] not in KINDS:
        raise ValueError(f"weights ({row['weights']}) must be one of: {', '.join(KINDS)}.")
    size = "quickstart" if row.get("tiny") else row["model"]
    vocabulary = make_vocabulary(size, row["tokens"])
    shape = make_shape(size, row["family"], vocabulary, row["context"])
    weights = make_weights(shape, torch.bfloat16, device)
    return Decoder(weights, shape, None if row["weights"] in DTYPES else row["weights"]), vocabulary


class ReplayTimer:
    """Milliseconds on the device of every replay of a CUDA graph inside a `with` block, in order.

    Create it before the first graph is recorded, because the recording code may keep a reference to `replay`.
    """

    def __init__(self) -> None:
        import torch

        self.events, self.times = None, []
        replay = torch.cuda.CUDAGraph.replay

        def timed(graph) -> None:
            if self.events is None:
                replay(graph)
                return
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay(graph)
            end.record()
            self.events.append((begin, end))

        torch.cuda.CUDAGraph.replay = timed

    def __enter__(self) -> "ReplayTimer":
        self.events = []
        return self

    def __exit__(self, *_) -> None:
        import torch

        torch.cuda.synchronize()
        self.times = [begin.elapsed_time(end) for begin, end in self.events]
        self.events = None


def measure(row: dict) -> Iterator[dict]:
    """States of a row: after building, after the first call, after the measured calls, and with the kernels."""
    import torch
    from generate import CAPTION_TOKENS, sample_images
    from timing import list_kernels, measure_read_rate

    cuda = row["device"] == "cuda"
    timer = ReplayTimer() if cuda else None
    result = {**row, "read_tb_s": measure_read_rate(torch.device(row["device"])) / 1e12}
    begin = time.perf_counter()
    decoder, vocabulary = build_decoder(row, row["device"])
    weights = decoder.step_bytes(torch.arange(vocabulary.image_start, vocabulary.image_end))
    sequences = 2 * row["prompts"]
    cache = sequences * decoder.cache_bytes(CAPTION_TOKENS + 2 + row["tokens"])
    result |= {"build_s": time.perf_counter() - begin, "step_bytes": weights, "cache_bytes": cache}
    yield result

    def time_sampling(tokens: int = 0) -> float:
        begin = time.perf_counter()
        sample_images(decoder, vocabulary, row["prompts"], row["guidance"], tokens or None)  # waits for the device
        return time.perf_counter() - begin

    result["first_s"] = time_sampling()
    yield result
    if cuda:
        with timer:
            time_sampling()
        if timer.times:
            result |= {"graph_ms": sum(timer.times) / row["tokens"], "replays": len(timer.times)}
            result["tb_s"] = (weights + cache / 2) / result["graph_ms"] / 1e9
            result["bandwidth_share"] = result["tb_s"] / result["read_tb_s"]
    calls = [time_sampling()]
    while len(calls) < 3 and calls[0] < REPEAT_BELOW:
        calls.append(time_sampling())
    result |= compute_rates(row, calls)
    if cuda:
        result |= {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    yield result
    if cuda:
        yield result | list_kernels(lambda: time_sampling(PROFILED_TOKENS), PROFILED_TOKENS)


def compute_rates(row: dict, calls: list[float]) -> dict:
    """The fields of a row that follow from the seconds of its calls."""
    seconds = statistics.median(calls)
    return {
        "seconds": seconds,
        "seconds_fastest": min(calls),
        "calls": len(calls),
        "seconds_per_image": seconds / row["prompts"],
        "images_per_s": row["prompts"] / seconds,
        "ms_per_token": seconds / row["tokens"] * 1e3,
    }


def show(result: dict) -> str:
    """One line that describes a result."""
    if "first_s" not in result:
        reason = result.get("skipped") or result.get("cut") or result.get("failed", "").strip().splitlines()[-1][:300]
        return f"{result['name']}: {'out of memory' if result.get('out_of_memory') else reason}"
    parts = [f"first {result['first_s']:.2f} s"]
    if "seconds" in result:
        parts += [f"{result['seconds']:.3f} s", f"{result['images_per_s']:.2f} images/s"]
    if "graph_ms" in result:
        parts.append(
            f"{result['graph_ms']:.3f} ms per step, {result['bandwidth_share']:.2f} of {result['read_tb_s']:.2f} TB/s"
        )
    return f"{result['name']}: {', '.join(parts)}" + (f" ({result['cut']})" if "cut" in result else "")


def main() -> int:
    options = parse_options(__doc__, 220, "generation.jsonl")
    return run_driver(__file__, options, make_rows(options.device), MODULES, measure, show=show)


if __name__ == "__main__":
    raise SystemExit(main())
