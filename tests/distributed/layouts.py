"""The table of layouts: what each runs, under how many ranks, and which of them resume each other's checkpoints."""

from dataclasses import dataclass, field

import numpy as np

from tests.data.corpora import make_vocabulary

CONFIG = """
model: {layers: 4, hidden_size: 64, heads: 4, init_std: 0.02}
data: {seq_length: 48, packing: stream, workers: 0}
train: {steps: 20, global_batch_size: 8, micro_batch_size: 2, precision: fp32}
optimizer: {learning_rate: 6e-4}
schedule: {warmup_steps: 20}
checkpoint: {interval: 10}
"""
LLAMA = ["model.family=llama", "model.kv_heads=2", "model.qk_norm=true", "train.z_loss=1e-4"]
SAMPLES = ["data.attention=sample"]


@dataclass(frozen=True)
class Layout:
    """One row: overrides of CONFIG, against `reference`, the row of one process that it must equal."""

    name: str
    ranks: int
    overrides: list[str] = field(default_factory=list)
    reference: str = "one process"
    covering: bool = True
    """Whether the default suite runs it; all rows run under the marker `slow`."""


def _row(name: str, ranks: int, text: str, covering: bool = True, **more) -> Layout:
    return Layout(name, ranks, [f"parallel.{item}" for item in text.split()], covering=covering, **more)


def _variants() -> list[Layout]:
    """Rows of other models and masks, each with its own one-process reference."""
    rows = []
    for label, extra in (("llama", LLAMA), ("by sample", SAMPLES), ("llama by sample", LLAMA + SAMPLES)):
        reference = f"{label}, one process"
        rows.append(Layout(reference, 1, extra, reference))
        layouts = [("tensor=2 sequence=true", 2), ("context=2", 2), ("tensor=2 pipeline=2 sequence=true", 4)]
        layouts += [("tensor=2 context=2 zero=1", 4), ("pipeline=2 interleave=2", 2), ("zero=1 recompute=full", 2)]
        for number, (text, ranks) in enumerate(layouts):
            overrides = extra + [f"parallel.{item}" for item in text.split()]
            covering = label == "llama" or (label == "by sample" and number in (1, 2))
            rows.append(Layout(f"{label}, {text}", ranks, overrides, reference, covering))
    return rows


LAYOUTS = [
    Layout("one process", 1),
    Layout("micro-batches of 1", 1, ["train.micro_batch_size=1"], covering=False),
    Layout("micro-batches of 8", 1, ["train.micro_batch_size=8"], covering=False),
    _row("zero=1", 1, "zero=1", covering=False),
    _row("recompute=selective", 1, "recompute=selective"),
    _row("recompute=full", 1, "recompute=full"),
    _row("data 2", 2, "overlap=false", covering=False),
    _row("data 2, overlapped", 2, ""),
    _row("data 2, zero=1", 2, "zero=1"),
    _row("data 2, zero=1, not overlapped", 2, "zero=1 overlap=false", covering=False),
    _row("tensor=2", 2, "tensor=2"),
    _row("tensor=2 sequence=true", 2, "tensor=2 sequence=true"),
    _row("pipeline=2", 2, "pipeline=2"),
    _row("pipeline=2 interleave=2", 2, "pipeline=2 interleave=2"),
    _row("context=2", 2, "context=2"),
    _row("context=2 zero=1", 2, "context=2 zero=1", covering=False),
    _row("tensor=2 pipeline=2", 4, "tensor=2 pipeline=2"),
    _row("tensor=2 pipeline=2 interleave=2 sequence=true", 4, "tensor=2 pipeline=2 interleave=2 sequence=true"),
    _row("tensor=2 data 2 zero=1 sequence=true", 4, "tensor=2 zero=1 sequence=true"),
    _row("pipeline=2 data 2 zero=1", 4, "pipeline=2 zero=1", covering=False),
    _row("pipeline=2 interleave=2 data 2 zero=1", 4, "pipeline=2 interleave=2 zero=1"),
    _row("tensor=2 context=2 sequence=true", 4, "tensor=2 context=2 sequence=true"),
    _row("pipeline=2 context=2", 4, "pipeline=2 context=2"),
    _row("context=2 data 2 zero=1 recompute=full", 4, "context=2 zero=1 recompute=full", covering=False),
    _row("tensor=4 sequence=true", 4, "tensor=4 sequence=true", covering=False),
    _row("pipeline=4", 4, "pipeline=4", covering=False),
    _row("data 4 zero=1", 4, "zero=1", covering=False),
    *_variants(),
]


def learnable_pairs(count: int = 64) -> list[np.ndarray]:
    """Pairs whose picture follows from their text, so that there is something to learn."""
    vocabulary, random = make_vocabulary(), np.random.default_rng(0)
    pairs = []
    for _ in range(count):
        text = random.integers(0, vocabulary.text_size, random.integers(3, 9))
        codes = (np.arange(vocabulary.image_tokens) * (text[0] % 5 + 1) + text[1]) % vocabulary.image_size
        pairs.append(np.concatenate([text, [vocabulary.break_id], vocabulary.image_start + codes]))
    return pairs
