"""Rows of the table of layouts: settings and ranks of each, and which rows resume which runs."""

from dataclasses import dataclass, replace

from tests.distributed.launch import ROOT

CONFIG = """
model: {layers: 4, hidden_size: 64, heads: 4, init_std: 0.02}
data: {seq_length: 48, packing: stream, workers: 0}
train: {steps: 20, global_batch_size: 8, micro_batch_size: 2, precision: fp32}
optimizer: {learning_rate: 6e-4, epsilon: 1e-6}  # with 1e-8 Adam amplifies rounding errors of gradients near 0
schedule: {warmup_steps: 20}
checkpoint: {interval: 10}
"""
LLAMA = ("model.family=llama", "model.kv_heads=2", "model.qk_norm=true", "train.z_loss=1e-4")
SAMPLES = ("data.attention=sample",)
BF16 = ("train.precision=bf16",)
DEEPSPEED = ("train.engine=deepspeed",)
COMPILE = ("train.compile=true",)
SEQUENCE = ("parallel.tensor=2", "parallel.sequence=true")
# With DeepSpeed's defaults, stage 3 does not partition weights as small as these, and its buckets are never full.
SMALL = (f"deepspeed.json={ROOT / 'tests' / 'distributed' / 'deepspeed.json'}",)


@dataclass(frozen=True)
class Layout:
    """One row: overrides of CONFIG. Its losses must equal those of the row `reference`, which is one process."""

    name: str
    ranks: int
    overrides: tuple[str, ...] = ()
    reference: str = "one process"
    in_suite: bool = True
    """Whether the tests run it, beside the command that runs all rows."""
    loss_tolerance: float = 1e-6
    """Largest allowed relative difference of a loss."""
    norm_tolerance: float = 1e-5
    """Largest allowed relative difference of a gradient norm."""
    shards: str = "shards"
    """Folder of its data: shards, or instructions."""

    @property
    def folder(self) -> str:
        """Name of the run folder."""
        return self.name.replace(" ", "_").replace(",", "")


def _build_row(name: str, ranks: int, text: str, in_suite: bool = True, **more) -> Layout:
    return Layout(name, ranks, tuple(f"parallel.{item}" for item in text.split()), in_suite=in_suite, **more)


def _variant_rows() -> list[Layout]:
    """Rows of other models, masks and precisions, each compared with its own row of one process."""
    layouts = [("tensor=2 sequence=true", 2), ("context=2", 2), ("tensor=2 pipeline=2 sequence=true", 4)]
    layouts += [("tensor=2 context=2 zero=1", 4), ("pipeline=2 interleave=2", 2), ("zero=1 recompute=full", 2)]
    models = [  # label, overrides, numbers of the layouts in the default suite, tolerances
        ("llama", LLAMA, (0, 4), {}),
        ("by sample", SAMPLES, (2,), {}),
        ("llama by sample", LLAMA + SAMPLES, (3,), {}),
        ("bf16", BF16, (3,), {"loss_tolerance": 2e-3, "norm_tolerance": 0.1}),
        ("llama bf16", LLAMA + BF16, (), {"loss_tolerance": 2e-3, "norm_tolerance": 0.1}),
    ]
    rows = []
    for label, extra, default_numbers, tolerances in models:
        reference = f"{label}, one process"
        rows.append(Layout(reference, 1, extra, reference, bool(default_numbers)))
        for number, (text, ranks) in enumerate(layouts):
            overrides = extra + tuple(f"parallel.{item}" for item in text.split())
            rows.append(
                Layout(f"{label}, {text}", ranks, overrides, reference, number in default_numbers, **tolerances)
            )
    return rows


def _instruction_rows() -> list[Layout]:
    """Rows of packed instruction documents, compared with one sample per sequence in one process.

    A step is an epoch: the samples of tests.distributed.layouts.make_instructions, two of which fit into a sequence.
    """
    forms = ("sft.mask_targets=0.5", "sft.drop_condition_probability=0.5", "cm3.probability=0")
    alone = (*forms, "data.packing=query", "train.global_batch_size=16")
    packed = (*forms, "data.packing=documents", *SAMPLES)
    layouts = [  # in the default suite with a loss on targets, ranks, overrides
        (True, 1, ()),
        (True, 4, ("parallel.pipeline=4",)),
        (False, 4, ("parallel.pipeline=2", "parallel.interleave=2", *SEQUENCE)),
        (False, 4, ("parallel.tensor=2", "parallel.context=2")),
    ]
    rows = []
    for label, extra in (("instructions", ()), ("instructions, loss=target", ("sft.loss=target",))):
        reference = Layout(f"{label}, one sample per sequence", 1, alone + extra, shards="instructions")
        rows.append(replace(reference, reference=reference.name, in_suite=bool(extra)))
        for in_suite, ranks, overrides in layouts:
            names = " ".join(each.split(".", 1)[1] for each in overrides) or "one process"
            rows.append(
                Layout(
                    f"{label}, packed, {names}", ranks, packed + extra + overrides, reference.name,
                    in_suite and bool(extra), shards="instructions",
                )
            )  # fmt: skip
    return rows


def _deepspeed_rows() -> list[Layout]:
    """Rows of the DeepSpeed engine, compared with the megatron engine in one process; in bf16 with DeepSpeed."""
    layouts = [  # in the default suite, label, ranks, overrides
        (False, "zero=0", 1, ("parallel.zero=0",)),
        (False, "zero=1", 1, ("parallel.zero=1",)),
        (False, "data 2 zero=0", 2, ("parallel.zero=0",)),
        (False, "data 2 zero=1", 2, ("parallel.zero=1",)),
        (True, "data 2 zero=2", 2, ("parallel.zero=2", *SMALL)),
        (True, "data 2 zero=3", 2, ("parallel.zero=3", *SMALL)),
        (False, "data 2 zero=3, small weights whole", 2, ("parallel.zero=3",)),
        (False, "data 2 zero=2, not overlapped", 2, ("parallel.zero=2", "parallel.overlap=false")),
        (False, "data 2 zero=2, micro-batches of 1", 2, ("parallel.zero=2", "train.micro_batch_size=1")),
        (False, "data 2 zero=3, micro-batches of 4", 2, ("parallel.zero=3", "train.micro_batch_size=4", *SMALL)),
        (False, "data 2 zero=1 offload", 2, ("parallel.zero=1", "deepspeed.offload_optimizer=true")),
        (False, "data 2 zero=2 offload", 2, ("parallel.zero=2", "deepspeed.offload_optimizer=true")),
        (
            False,
            "data 2 zero=3 offload",
            2,
            ("parallel.zero=3", "deepspeed.offload_optimizer=true", "deepspeed.offload_parameters=true", *SMALL),
        ),
        (False, "data 2 zero=1 recompute=full", 2, ("parallel.zero=1", "parallel.recompute=full")),
        (False, "data 2 zero=3 recompute=full", 2, ("parallel.zero=3", "parallel.recompute=full", *SMALL)),
        (False, "data 4 zero=1", 4, ("parallel.zero=1",)),
        (False, "data 4 zero=3", 4, ("parallel.zero=3", *SMALL)),
        (False, "tensor=2 data 2 zero=0", 4, ("parallel.tensor=2", "parallel.zero=0")),
        (False, "tensor=2 data 2 zero=1", 4, ("parallel.tensor=2", "parallel.zero=1")),
        (False, "tensor=2 data 2 zero=2", 4, ("parallel.tensor=2", "parallel.zero=2")),
        (False, "tensor=2 data 2 zero=3", 4, ("parallel.tensor=2", "parallel.zero=3", *SMALL)),
    ]
    variants = [
        (False, "llama", LLAMA, "tensor=2 zero=1", 2, ("parallel.tensor=2", "parallel.zero=1")),
        (False, "llama", LLAMA, "tensor=2 data 2 zero=0", 4, ("parallel.tensor=2", "parallel.zero=0")),
        (False, "llama", LLAMA, "tensor=2 data 2 zero=3", 4, ("parallel.tensor=2", "parallel.zero=3", *SMALL)),
        (False, "by sample", SAMPLES, "data 2 zero=3", 2, ("parallel.zero=3", *SMALL)),
        (False, "llama by sample", LLAMA + SAMPLES, "tensor=2 zero=2", 2, ("parallel.tensor=2", "parallel.zero=2")),
    ]
    reference = "deepspeed bf16, one process"
    bf16_rows = [
        ("data 2 zero=0", 2, ("parallel.zero=0",)),
        ("data 2 zero=1", 2, ("parallel.zero=1",)),
        ("data 2 zero=2", 2, ("parallel.zero=2", *SMALL)),
        ("data 2 zero=3", 2, ("parallel.zero=3", *SMALL)),
        ("data 2 zero=2 offload", 2, ("parallel.zero=2", "deepspeed.offload_optimizer=true")),
        ("tensor=2 data 2 zero=0", 4, ("parallel.tensor=2", "parallel.zero=0")),
        ("tensor=2 data 2 zero=3", 4, ("parallel.tensor=2", "parallel.zero=3", *SMALL)),
    ]
    rows = [Layout(f"deepspeed, {name}", *row, in_suite=in_suite) for in_suite, name, *row in layouts]
    for in_suite, label, extra, name, ranks, more in variants:
        rows.append(Layout(f"deepspeed {label}, {name}", ranks, extra + more, f"{label}, one process", in_suite))
    rows.append(Layout(reference, 1, (*BF16, "parallel.zero=1"), reference, False))
    for name, ranks, more in bf16_rows:  # one extra Adam step at stage 0 changes the loss by 2e-3, the norm by 6e-2
        in_suite = name == "data 2 zero=0"
        rows.append(Layout(f"deepspeed bf16, {name}", ranks, BF16 + more, reference, in_suite, 5e-4, 1e-2))
    return [replace(row, overrides=DEEPSPEED + row.overrides) for row in rows]


def _compiled_rows() -> list[Layout]:
    """Rows with compiled layers, compared with the uncompiled model in one process."""
    layouts = [  # in the default suite, label of the model, ranks, layout
        (False, "", 1, ""),
        (False, "", 1, "recompute=selective"),
        (False, "", 2, "tensor=2"),
        (False, "", 2, "zero=1"),
        (False, "", 2, "pipeline=2"),
        (False, "", 2, "context=2"),
        (False, "", 4, "tensor=2 pipeline=2 interleave=2 sequence=true"),
        (False, "llama", 1, ""),
        (False, "llama", 1, "recompute=full"),
        (True, "llama", 2, "tensor=2 sequence=true recompute=selective"),
        (False, "llama", 2, "pipeline=2 interleave=2"),
        (False, "llama", 4, "tensor=2 context=2 zero=1"),
        (False, "by sample", 1, ""),
        (False, "by sample", 2, "context=2"),
        (False, "llama by sample", 1, "recompute=full"),
    ]
    extra = {"": (), "llama": LLAMA, "by sample": SAMPLES, "llama by sample": LLAMA + SAMPLES}
    rows = []
    for in_suite, label, ranks, text in layouts:
        overrides = COMPILE + extra[label] + tuple(f"parallel.{item}" for item in text.split())
        name = ", ".join(filter(None, (f"compiled {label}".strip(), text or "one process")))
        rows.append(Layout(name, ranks, overrides, f"{label}, one process" if label else "one process", in_suite))
    for label, more in (("zero=0", ()), ("data 2 zero=2", SMALL)):
        ranks, zero = (1, 0) if not more else (2, 2)
        overrides = COMPILE + DEEPSPEED + (f"parallel.zero={zero}", *more)
        rows.append(Layout(f"compiled deepspeed, {label}", ranks, overrides, in_suite=False))
    overrides = COMPILE + DEEPSPEED + LLAMA + ("parallel.tensor=2", "parallel.zero=1")
    rows.append(Layout("compiled deepspeed llama, tensor=2 zero=1", 2, overrides, "llama, one process", False))
    rows.append(
        Layout("compiled bf16, zero=1", 2, (*COMPILE, *BF16, "parallel.zero=1"), "bf16, one process", False, 2e-3, 0.1)
    )
    return rows


def _flex_rows() -> list[Layout]:
    """Rows with attention per sample by FlexAttention, compared with masked attention in one process."""
    layouts = [  # in the default suite, label of the model, ranks, overrides
        (True, "llama by sample", 2, (*SEQUENCE, "parallel.recompute=selective", "train.head_chunk=20")),
        (False, "by sample", 1, ("parallel.recompute=selective",)),
        (False, "by sample", 2, ("parallel.context=2",)),
        (False, "by sample", 1, ("train.compile=true", "parallel.recompute=full")),
        (False, "llama by sample", 2, ("parallel.pipeline=2", "parallel.interleave=2", "parallel.recompute=full")),
        (False, "llama by sample", 4, (*SEQUENCE, "parallel.context=2")),
    ]
    rows = []
    for in_suite, label, ranks, overrides in layouts:
        names = " ".join(each.split(".", 1)[1] for each in overrides)
        extra = (*SAMPLES, *(LLAMA if "llama" in label else ()), "train.sample_attention=flex")
        rows.append(Layout(f"flex {label}, {names}", ranks, extra + overrides, f"{label}, one process", in_suite))
    return rows


def _fp8_rows() -> list[Layout]:
    """Rows with fp8 matrix products: two compared with bf16, the others with fp8 in one process."""
    layouts = [
        (1, COMPILE),
        (2, ("parallel.tensor=2", *COMPILE)),
        (2, ("parallel.pipeline=2",)),
        (2, ("parallel.zero=1",)),
        (2, (*DEEPSPEED, "parallel.zero=2", *SMALL)),
    ]
    extra, fp8, bf16 = (*BF16, "train.fp8=true"), "fp8, one process", "bf16, one process"
    rows = [Layout(fp8, 1, extra, bf16, False, 1e-3, 5e-2)]
    rows.append(Layout("fp8, tensor=2 sequence=true", 2, extra + SEQUENCE, bf16, True, 1e-3, 5e-2))
    for ranks, overrides in layouts:
        names = " ".join(each.split(".", 1)[1] for each in overrides if not each.startswith("deepspeed."))
        rows.append(Layout(f"fp8, {names}", ranks, extra + overrides, fp8, False, 5e-4, 2e-2))
    return rows


def _head_chunk_rows() -> list[Layout]:
    """Rows that compute head and loss in chunks of 20 tokens, with a remainder in every row."""
    layouts = [  # in the default suite, label of the model, ranks, overrides
        (False, "", 1, ()),
        (False, "", 2, ("parallel.pipeline=2",)),
        (False, "", 2, ("parallel.zero=1",)),
        (False, "", 2, (*DEEPSPEED, "parallel.zero=3", *SMALL)),
        (False, "llama", 2, SEQUENCE),
        (False, "llama", 2, ("parallel.zero=1",)),
        (False, "llama", 4, ("parallel.tensor=2", "parallel.pipeline=2", "parallel.interleave=2")),
        (False, "llama", 2, (*DEEPSPEED, "parallel.tensor=2", "parallel.zero=1")),
    ]
    rows = []
    for in_suite, label, ranks, overrides in layouts:
        names = [each.split(".", 1)[1] for each in overrides if not each.startswith("deepspeed.")]
        name = f"head in chunks{', ' + label if label else ''}, {' '.join(names) or 'one process'}"
        reference = f"{label}, one process" if label else "one process"
        overrides = (LLAMA if label else ()) + overrides + ("train.head_chunk=20",)
        rows.append(Layout(name, ranks, overrides, reference, in_suite))
    return rows


LORA = (
    "model.activation=gelu",  # a ReLU that rounding switches changes gradient norms by 1e-4
    "lora.rank=4",
    "lora.alpha=8",
    "lora.layers=[attention,layers.2-3.mlp]",
    "optimizer.learning_rate=0.003",
)
LORA_AND_PARTS = (*LLAMA, "lora.rank=4", "train.only=[image_rows,norms,layers.1.mlp]", "optimizer.learning_rate=0.003")

LORA_REFERENCE, PARTS_REFERENCE = "lora, one process", "lora and parts, one process"


def _lora_rows() -> list[Layout]:
    """Rows that train adapters of a frozen model of random weights, and parts of it, compared with one process."""
    small = (*DEEPSPEED, *SMALL)
    layouts = [  # in the default suite, model, ranks, overrides, name
        (False, LORA, 1, ("parallel.recompute=full",), "recompute=full"),
        (False, LORA, 2, ("parallel.tensor=2",), "tensor=2"),
        (False, LORA, 2, SEQUENCE, "tensor=2 sequence=true"),
        (False, LORA, 2, ("parallel.pipeline=2",), "pipeline=2"),
        (False, LORA, 2, ("parallel.context=2",), "context=2"),
        (False, LORA, 2, ("parallel.zero=1",), "zero=1"),
        (False, LORA, 4, ("parallel.pipeline=4",), "pipeline=4"),
        (True, LORA, 4, (*SEQUENCE, "parallel.pipeline=2", "parallel.interleave=2", "parallel.recompute=full"),
         "tensor=2 pipeline=2 interleave=2 sequence=true recompute=full"),
        (False, LORA, 4, (*SEQUENCE, "parallel.zero=1"), "tensor=2 zero=1 sequence=true"),
        (False, LORA, 2, (*COMPILE, *SEQUENCE, "parallel.recompute=selective"), "compiled, tensor=2 sequence=true"),
        (False, LORA, 1, (*DEEPSPEED, "parallel.zero=0"), "deepspeed, zero=0"),
        (False, LORA, 2, (*DEEPSPEED, "parallel.zero=1"), "deepspeed, zero=1"),
        (False, LORA, 2, (*small, "parallel.zero=2"), "deepspeed, zero=2"),
        (False, LORA, 2, (*DEEPSPEED, "parallel.zero=3"), "deepspeed, zero=3, small weights whole"),
        (True, LORA, 4, (*small, "parallel.tensor=2", "parallel.zero=3"), "deepspeed, tensor=2 zero=3"),
        (False, LORA_AND_PARTS, 2, ("parallel.tensor=2",), "tensor=2"),
        (False, LORA_AND_PARTS, 2, SEQUENCE, "tensor=2 sequence=true"),
        (False, LORA_AND_PARTS, 2, ("parallel.pipeline=2", "train.head_chunk=20"), "pipeline=2 head_chunk=20"),
        (False, LORA_AND_PARTS, 2, ("parallel.pipeline=2", "parallel.interleave=2", "parallel.recompute=full"),
         "pipeline=2 interleave=2 recompute=full"),
        (True, LORA_AND_PARTS, 4, ("parallel.tensor=2", "parallel.context=2", "parallel.zero=1"),
         "tensor=2 context=2 zero=1"),
        (False, LORA_AND_PARTS, 2, (*DEEPSPEED, "parallel.tensor=2", "parallel.zero=1"), "deepspeed, tensor=2 zero=1"),
        (False, LORA_AND_PARTS, 2, (*small, "parallel.zero=3"), "deepspeed, zero=3"),
    ]  # fmt: skip
    labels = {LORA: "lora", LORA_AND_PARTS: "lora and parts"}
    rows = [
        Layout(LORA_REFERENCE, 1, LORA, LORA_REFERENCE),
        Layout(PARTS_REFERENCE, 1, LORA_AND_PARTS, PARTS_REFERENCE),
    ]
    for in_suite, model, ranks, overrides, name in layouts:
        reference = LORA_REFERENCE if model == LORA else PARTS_REFERENCE
        rows.append(Layout(f"{labels[model]}, {name}", ranks, model + overrides, reference, in_suite))
    return rows


DROPOUT = 0.1
MASK_OVERRIDES = (f"model.dropout={DROPOUT}", "model.hidden_size=128", "data.seq_length=96", "train.stop_after=12")
"""Dropout, and sizes with which every rank draws a million entries per kind of mask in the recorded steps."""


def _dropout_rows() -> list[Layout]:
    """Rows with dropout. The masks of several ranks differ from those of one process, so these rows compare masks."""
    dropout, reference = (f"model.dropout={DROPOUT}",), "dropout, one process"
    rows = [Layout(reference, 1, dropout, reference, False)]
    for kind in ("selective", "full"):  # recomputation must draw the same masks
        recompute = (*dropout, f"parallel.recompute={kind}")
        rows.append(Layout(f"dropout, recompute={kind}", 1, recompute, reference, False, 0.0, 0.0))
    layouts = [  # in the default suite, ranks, layout
        (False, 2, "zero=1"),  # data parallel
        (False, 2, "tensor=2"),
        (False, 2, "tensor=2 sequence=true recompute=selective"),
        (False, 2, "pipeline=2"),
        (False, 2, "pipeline=2 interleave=2 recompute=full"),
        (False, 2, "context=2"),
        (True, 4, "tensor=2 pipeline=2 interleave=2 recompute=selective"),
        (True, 4, "tensor=2 context=2 sequence=true recompute=full"),
        (False, 4, "tensor=2 pipeline=2 sequence=true recompute=full"),
        (False, 4, "pipeline=2 context=2 recompute=selective"),
        (False, 4, "pipeline=2 zero=1 overlap=false"),
        (False, 4, "context=2 zero=1 recompute=full"),
    ]
    for in_suite, ranks, text in layouts:
        rows.append(_build_mask_row(f"dropout, {text}", ranks, text, (), in_suite))
    others = [  # in the default suite, label, ranks, other overrides, layout
        (True, "deepspeed, data 2", 2, DEEPSPEED, "zero=2 recompute=selective"),
        (False, "deepspeed, data 2", 2, (*DEEPSPEED, *SMALL), "zero=3 recompute=full"),
        (False, "deepspeed", 2, DEEPSPEED, "tensor=2 zero=1"),
        (False, "deepspeed, data 2", 4, DEEPSPEED, "tensor=2 zero=2 recompute=full"),
        (False, "llama by sample", 4, LLAMA + SAMPLES, "tensor=2 pipeline=2 sequence=true recompute=selective"),
    ]
    for in_suite, label, ranks, extra, text in others:
        rows.append(_build_mask_row(f"dropout, {label} {text}", ranks, text, extra, in_suite))
    return rows


def _build_mask_row(name: str, ranks: int, text: str, extra: tuple[str, ...], in_suite: bool = False) -> Layout:
    overrides = MASK_OVERRIDES + extra + tuple(f"parallel.{item}" for item in text.split())
    return Layout(name, ranks, overrides, name, in_suite)


LAYOUTS = [
    Layout("one process", 1),
    Layout("micro-batches of 1", 1, ("train.micro_batch_size=1",), in_suite=False),
    Layout("micro-batches of 8", 1, ("train.micro_batch_size=8",), in_suite=False),
    _build_row("zero=1", 1, "zero=1", in_suite=False),
    _build_row("recompute=selective", 1, "recompute=selective", in_suite=False),
    _build_row("recompute=full", 1, "recompute=full"),
    _build_row("data 2", 2, "overlap=false", in_suite=False),
    _build_row("data 2, overlapped", 2, "", in_suite=False),
    _build_row("data 2, zero=1", 2, "zero=1"),
    _build_row("data 2, zero=1, not overlapped", 2, "zero=1 overlap=false", in_suite=False),
    _build_row("tensor=2", 2, "tensor=2", in_suite=False),
    _build_row("tensor=2 sequence=true", 2, "tensor=2 sequence=true"),
    _build_row("pipeline=2", 2, "pipeline=2"),
    _build_row("pipeline=2 interleave=2", 2, "pipeline=2 interleave=2"),
    _build_row("context=2", 2, "context=2"),
    _build_row("context=2 zero=1", 2, "context=2 zero=1", in_suite=False),
    _build_row("tensor=2 pipeline=2", 4, "tensor=2 pipeline=2"),
    _build_row("tensor=2 pipeline=2 interleave=2 sequence=true", 4, "tensor=2 pipeline=2 interleave=2 sequence=true"),
    _build_row("tensor=2 data 2 zero=1 sequence=true", 4, "tensor=2 zero=1 sequence=true"),
    _build_row("pipeline=2 data 2 zero=1", 4, "pipeline=2 zero=1", in_suite=False),
    _build_row("pipeline=2 interleave=2 data 2 zero=1", 4, "pipeline=2 interleave=2 zero=1", in_suite=False),
    _build_row("tensor=2 context=2 sequence=true", 4, "tensor=2 context=2 sequence=true", in_suite=False),
    _build_row("pipeline=2 context=2", 4, "pipeline=2 context=2", in_suite=False),
    _build_row("context=2 data 2 zero=1 recompute=full", 4, "context=2 zero=1 recompute=full", in_suite=False),
    _build_row("tensor=4 sequence=true", 4, "tensor=4 sequence=true", in_suite=False),
    _build_row("pipeline=4", 4, "pipeline=4", in_suite=False),
    _build_row("data 4 zero=1", 4, "zero=1", in_suite=False),
    *_dropout_rows(),
    *_variant_rows(),
    Layout("by sample, pipeline=4", 4, (*SAMPLES, "parallel.pipeline=4"), "by sample, one process", False),
    *_instruction_rows(),
    *_deepspeed_rows(),
    *_compiled_rows(),
    *_flex_rows(),
    *_fp8_rows(),
    *_head_chunk_rows(),
    *_lora_rows(),
]


BY_NAME = {layout.name: layout for layout in LAYOUTS}


@dataclass(frozen=True)
class Resume:
    """A run that resumes from step 10 of the row `source` under the layout of the row `target`."""

    source: str
    target: str
    in_suite: bool = False

    @property
    def name(self) -> str:
        return f"{self.source} -> {self.target}"


MASKS = [layout for layout in LAYOUTS if layout.overrides[: len(MASK_OVERRIDES)] == MASK_OVERRIDES]
"""Rows in which the dropout masks of the ranks are compared."""

RESUMES = [
    Resume("one process", "one process", True),
    Resume("tensor=2 pipeline=2", "data 2, zero=1", True),
    Resume("data 2, zero=1", "tensor=2", True),
    Resume("data 2, zero=1", "data 2, zero=1", True),
    Resume("tensor=2", "pipeline=2"),
    Resume("pipeline=2 interleave=2", "context=2", True),
    Resume("context=2", "tensor=2 data 2 zero=1 sequence=true", True),
    Resume("tensor=2 data 2 zero=1 sequence=true", "tensor=2 pipeline=2 interleave=2 sequence=true"),
    Resume("tensor=2 pipeline=2 interleave=2 sequence=true", "one process"),
    Resume("pipeline=2 interleave=2 data 2 zero=1", "pipeline=2 context=2"),
    Resume("tensor=2 context=2 sequence=true", "pipeline=2 interleave=2"),
    Resume("llama, tensor=2 sequence=true", "llama, pipeline=2 interleave=2", True),
    Resume("llama, tensor=2 pipeline=2 sequence=true", "llama, context=2"),
    Resume("llama, context=2", "llama, tensor=2 pipeline=2 sequence=true"),
    Resume("bf16, zero=1 recompute=full", "bf16, zero=1 recompute=full"),
    Resume("deepspeed, data 2 zero=3", "tensor=2", True),
    Resume("pipeline=2", "deepspeed, data 2 zero=2", True),
    Resume("deepspeed, data 2 zero=1", "deepspeed, zero=1"),
    Resume("deepspeed, data 2 zero=1", "deepspeed, data 4 zero=1"),
    Resume("deepspeed, tensor=2 data 2 zero=3", "deepspeed, data 2 zero=1"),
    Resume("deepspeed, data 2 zero=3", "deepspeed, data 2 zero=3"),
    Resume("deepspeed, data 2 zero=0", "deepspeed, data 4 zero=3"),
    Resume("deepspeed, data 2 zero=2", "deepspeed, data 2 zero=3 offload"),
    Resume("tensor=2 pipeline=2", "deepspeed, data 2 zero=0"),
    Resume("deepspeed llama, tensor=2 data 2 zero=3", "llama, context=2"),
    Resume("llama, tensor=2 sequence=true", "deepspeed llama, tensor=2 data 2 zero=0"),
    Resume("deepspeed bf16, data 2 zero=1", "deepspeed bf16, data 2 zero=1"),
    Resume("instructions, loss=target, packed, one process", "instructions, loss=target, packed, one process", True),
    Resume("lora, one process", "lora, one process"),
    Resume("lora, deepspeed, tensor=2 zero=3", "lora, one process", True),
    Resume("lora, tensor=2 sequence=true", "lora, deepspeed, zero=2"),
    Resume("lora and parts, tensor=2 context=2 zero=1", "lora and parts, pipeline=2 interleave=2 recompute=full"),
    Resume("lora and parts, deepspeed, zero=3", "lora and parts, tensor=2 context=2 zero=1"),
    *[Resume(layout.name, layout.name, layout.in_suite) for layout in MASKS],
]
