"""Memory plan of a layout, without starting it: ranks and their groups, parameters and bytes per rank.

Bytes are those of tensors: weights, gradients, optimizer state, and activations, including the logits of the head, at
their peak. Libraries, communication buffers and memory that the allocator caches are not included.
"""

import copy
import math
from dataclasses import dataclass

import torch

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.config.schema import LoraConfig
from megatron_cm3leon.config.validation import VOCABULARY_ROW_MULTIPLE
from megatron_cm3leon.model.weights import (
    OUTPUT_HEAD,
    POSITION_EMBEDDINGS,
    WORD_EMBEDDINGS,
    adapter_shapes,
    canonical_shapes,
    count_parameters,
    count_trained,
    list_adapted,
    trained_shapes,
)

PAPER_IMAGE_CODES = 8_192
PAPER_VOCABULARY = 65_536
"""Sizes when no shards are given (CM3Leon: 56,320 text, 8,192 image, 1,024 special tokens)."""


@dataclass(frozen=True)
class RankCoordinates:
    """Coordinates of a rank in the layout. Ranks of a tensor-parallel group are adjacent, pipeline stages far apart."""

    rank: int
    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Memory:
    """Bytes of the tensors on one rank."""

    parameters: int
    """Number of parameters on the rank (not bytes)."""
    weights: int
    gradients: int
    optimizer: int
    """Adam's moments and, in bf16, the fp32 weights."""
    activations: int
    """Activations at their peak, with the logits."""

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return self.weights + self.gradients + self.optimizer + self.activations


def locate_rank(config: Config, world_size: int, rank: int) -> RankCoordinates:
    """Coordinates of a rank in megatron-core's order: tensor, context, data, pipeline."""
    parallel, data = config.parallel, config.data_parallel_size(world_size)
    rest, tensor = divmod(rank, parallel.tensor)
    rest, context = divmod(rest, parallel.context)
    pipeline, data_rank = divmod(rest, data)
    return RankCoordinates(rank, tensor, context, data_rank, pipeline)


def count_stage_parameters(config: Config, vocabulary_size: int, stage: int) -> int:
    """Parameters on each tensor-parallel rank of a pipeline stage, with adapters and vocabulary padding."""
    shapes = canonical_shapes(config, vocabulary_size) | adapter_shapes(config, vocabulary_size)
    return _count_on_stage(config, vocabulary_size, stage, shapes)


def count_stage_trained(config: Config, vocabulary_size: int, stage: int) -> int:
    """Those of count_stage_parameters() that are trained: with gradients and optimizer state."""
    return _count_on_stage(config, vocabulary_size, stage, trained_shapes(config, vocabulary_size))


def _count_on_stage(config: Config, vocabulary_size: int, stage: int, shapes: dict[str, tuple[int, ...]]) -> int:
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    first, last = stage == 0, stage == pipeline - 1
    rows = -(-vocabulary_size // VOCABULARY_ROW_MULTIPLE) * VOCABULARY_ROW_MULTIPLE
    head_rows = rows // tensor * config.model.hidden_size
    total = 0
    for name, shape in shapes.items():
        if name == WORD_EMBEDDINGS:
            copies = first + bool(last and config.model.tied_embeddings and pipeline > 1)
            total += copies * head_rows
        elif name == OUTPUT_HEAD:
            total += last * head_rows
        elif name == POSITION_EMBEDDINGS:
            total += first * math.prod(shape)
        elif not name.startswith("decoder.layers."):
            total += last * math.prod(shape)  # the final norm
        elif _stage_of_layer(config, int(name.split(".")[2])) == stage:
            # Beside a column-parallel layer A is whole on every rank, beside a row-parallel one B.
            whole = "lora_A" if "linear_qkv" in name or "linear_fc1" in name else "lora_B"
            total += math.prod(shape) // (1 if len(shape) == 1 or whole in name else tensor)
    return total


def _count_fp8_weights(config: Config, vocabulary_size: int, stage: int) -> int:
    """Weights of the stage's layers that are kept in fp8, and transposed in fp8, on each tensor-parallel rank."""
    return sum(
        math.prod(shape) // config.parallel.tensor
        for name, shape in canonical_shapes(config, vocabulary_size).items()
        if name.startswith("decoder.layers.")
        and len(shape) > 1
        and _stage_of_layer(config, int(name.split(".")[2])) == stage
    )


def _stage_of_layer(config: Config, layer: int) -> int:
    chunk = config.model.layers // (config.parallel.pipeline * config.parallel.interleave)
    return layer // chunk % config.parallel.pipeline


def estimate_memory(config: Config, vocabulary_size: int, world_size: int, stage: int) -> Memory:
    """Estimate the bytes on the device of a rank of pipeline stage `stage`; offloaded tensors are not included.

    Compared with runs of the megatron engine only. DeepSpeed needs more for the gathered weights of a layer (zero=3)
    and for the buckets in which it reduces gradients.
    """
    parameters = count_stage_parameters(config, vocabulary_size, stage)
    trained = count_stage_trained(config, vocabulary_size, stage)
    bf16, zero, offload = config.train.precision == "bf16", config.parallel.zero, config.deepspeed
    shards = config.data_parallel_size(world_size) * config.parallel.context
    shard, trained_shard = -(-parameters // shards), -(-trained // shards)
    weights = (shard if zero == 3 else parameters) * (2 if bf16 else 4)
    if config.train.fp8 and zero < 3:
        weights += 2 * _count_fp8_weights(config, vocabulary_size, stage)
    return Memory(
        parameters=parameters,
        weights=0 if offload.offload_parameters else weights,
        gradients=(trained_shard if zero >= 2 else trained) * 4,
        optimizer=0 if offload.offload_optimizer else (trained_shard if zero else trained) * (12 if bf16 else 8),
        activations=_activation_bytes(config, vocabulary_size, world_size, stage),
    )


def _activation_bytes(config: Config, vocabulary_size: int, world_size: int, stage: int) -> int:
    """Peak: at the start of the backward pass, with the logits, or in the backward pass of a recomputed layer."""
    model, parallel = config.model, config.parallel
    tokens = config.train.micro_batch_size * config.data.seq_length // parallel.context
    width = 2 if config.train.precision == "bf16" else 4
    layer, layer_input = _layer_bytes(config, tokens, width)
    layers = _chunks_in_flight(config, world_size, stage) * model.layers // (parallel.pipeline * parallel.interleave)
    head = 0
    if stage == parallel.pipeline - 1:
        rows = -(-vocabulary_size // VOCABULARY_ROW_MULTIPLE) * VOCABULARY_ROW_MULTIPLE // parallel.tensor
        # The logits, which their gradient overwrites; input and output of the final norm.
        head = (_tokens_with_logits(config, tokens) * rows + 2 * tokens * model.hidden_size) * width
    if parallel.recompute == "full":
        return int(layers * layer_input + max(layer, head))
    return int(layers * layer + head)


def _tokens_with_logits(config: Config, tokens: int) -> int:
    return min(tokens, config.train.head_chunk or tokens)


def _chunks_in_flight(config: Config, world_size: int, stage: int) -> int:
    """Chunks of layers whose activations are in memory at once (1F1B; interleaved: arXiv 2104.04473 section 2.2)."""
    parallel, train = config.parallel, config.train
    sequences = train.micro_batch_size * config.data_parallel_size(world_size)
    micro_batches = train.global_batch_size // sequences
    if parallel.interleave == 1:
        return min(micro_batches, parallel.pipeline - stage)
    warm_up = (parallel.pipeline - stage - 1) * 2 + (parallel.interleave - 1) * parallel.pipeline
    return min(micro_batches * parallel.interleave, warm_up + 1)


def _layer_bytes(config: Config, tokens: int, width: int) -> tuple[float, float]:
    """(bytes that one layer saves for its backward pass, bytes of its input); `width` bytes per number."""
    model, parallel, fused = config.model, config.parallel, _has_fused_norms(config)
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    keys = hidden // model.heads * model.kv_heads
    along_sequence = parallel.tensor if parallel.sequence else 1
    attention = hidden + 2 * keys + hidden  # the projection's output and the attention's
    if model.family == "llama":
        # Per norm: input and output; unless fused also the scaled input, and in bf16 both inputs in fp32.
        extra = 0 if fused else 1 if width == 4 else 3
        residual = (4 + 2 * extra) * hidden
        attention += 2 * hidden + keys  # rotated queries and keys; the attention's output in the projection's order
        if model.qk_norm and not fused:
            attention += (1 if width == 4 else 4) * (hidden + keys)
        feed_forward = 3 * ffn
    else:
        residual = 4 * hidden  # input and output of each norm
        feed_forward = ffn if model.activation == "relu" else 2 * ffn
    if parallel.recompute == "selective":
        attention -= hidden
        if model.family == "llama" and _is_compiled(config):  # rotated queries and keys are recomputed, too
            attention -= hidden + keys
    partitioned = (attention + feed_forward) / parallel.tensor
    layer = width * (residual / along_sequence + partitioned)
    if config.train.fp8:
        layer += _fp8_bytes(config)
    layer += _adapter_bytes(config, width)
    return tokens * layer, tokens * width * hidden / along_sequence


def _adapter_bytes(config: Config, width: int) -> float:
    """Bytes per token that the adapters keep of a layer, as a mean of the layers; `width` bytes per number.

    The scaled output of A, and with dropout the input of A and its mask: a byte per number.
    """
    model, parallel, lora = config.model, config.parallel, config.lora
    inputs = {"linear_fc2": model.ffn_hidden_size / parallel.tensor, "linear_proj": model.hidden_size / parallel.tensor}
    along_sequence = parallel.tensor if parallel.sequence else 1
    total = 0.0
    for _, word in list_adapted(config):
        total += lora.rank * width / (along_sequence if word in inputs else 1)
        if lora.dropout:
            total += inputs.get(word, model.hidden_size / along_sequence) * (width + 1)
    return total / model.layers


def _fp8_bytes(config: Config) -> float:
    """Bytes per token that a layer keeps more with train.fp8 (fewer if negative): its products keep inputs in fp8.

    Where nothing else keeps the input in bf16, its two bytes go.
    """
    model, parallel = config.model, config.parallel
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    norms = 0 if parallel.sequence and parallel.tensor > 1 else -2 * hidden  # gathered again, from bf16
    attention = -hidden if model.family == "llama" else hidden  # the attention keeps its output
    feed_forward = -ffn
    if model.activation == "relu":
        feed_forward = 0 if _is_compiled(config) else ffn  # ReLU keeps its output, or compiled one byte of it
    return norms + (attention + feed_forward) / parallel.tensor


def _is_compiled(config: Config) -> bool:
    """Whether the layers will be compiled, judged on this machine."""
    return _runs_on_a_gpu(config) if config.train.compile is None else config.train.compile


def _has_fused_norms(config: Config) -> bool:
    """Whether an RMSNorm saves only its input and output: as one GPU kernel, or compiled."""
    return _runs_on_a_gpu(config) or _is_compiled(config)


def _runs_on_a_gpu(config: Config) -> bool:
    device = config.train.device
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def estimate_checkpoint_bytes(config: Config, vocabulary_size: int) -> int:
    """Bytes of the tensors in a checkpoint: every trained parameter and Adam's two moments, fp32, once."""
    return 12 * sum(math.prod(shape) for shape in trained_shapes(config, vocabulary_size).values())


def list_groups(config: Config, world_size: int) -> dict[str, list[list[int]]]:
    """Kind of group -> the ranks of every such group, which differ in that coordinate only."""
    all_coordinates = [locate_rank(config, world_size, rank) for rank in range(world_size)]
    groups = {}
    for kind in ("tensor", "context", "data", "pipeline"):
        members: dict[tuple, list[int]] = {}
        for each in all_coordinates:
            others = tuple(getattr(each, name) for name in ("tensor", "context", "data", "pipeline") if name != kind)
            members.setdefault(others, []).append(each.rank)
        groups[kind] = list(members.values())
    return groups


EXAMPLE_RANK = 16
"""Rank of the adapters that full tuning is compared with."""


def _compare_tuning(config: Config, vocabulary_size: int, world_size: int, image_size: int) -> list[str]:
    """Lines of a table: bytes of full tuning and of the run's own form, or of adapters of EXAMPLE_RANK."""
    full, tuned = copy.deepcopy(config), copy.deepcopy(config)
    full.lora, full.train.only = LoraConfig(), []
    if not config.trains_part:
        rank = min(EXAMPLE_RANK, config.model.hidden_size, config.model.ffn_hidden_size)
        tuned.lora = LoraConfig(rank=rank, alpha=rank)
    label = f"lora.rank={tuned.lora.rank}" if tuned.lora.rank else "train.only"
    rows: list[tuple[str, ...]] = [
        ("tuning", "trained", "weights", "gradients", "optimizer", "activations", "total", "checkpoint")
    ]
    total = count_parameters(config, vocabulary_size)
    for name, each in (("full", full), (label, tuned)):
        stages = range(config.parallel.pipeline)
        memory = max(
            (estimate_memory(each, vocabulary_size, world_size, stage) for stage in stages), key=lambda m: m.total
        )
        sizes = memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total
        share = count_trained(each, vocabulary_size, image_size) / total
        checkpoint = estimate_checkpoint_bytes(each, vocabulary_size)
        rows.append((name, f"{share:.2%}", *map(_format_bytes, (*sizes, checkpoint))))
    return [*_align(rows), "", "Bytes per rank of the largest stage; of a checkpoint: of all ranks together."]


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows in right-aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def describe_memory(config: Config, vocabulary_size: int, world_size: int, image_size: int = PAPER_IMAGE_CODES) -> str:
    """Memory plan as text: model, groups, and a table with one row per pipeline stage.

    With train.init also a table that compares full tuning with adapters. `image_size`: number of image codes.
    """
    parallel, train = config.parallel, config.train
    data = config.data_parallel_size(world_size)
    micro_batches = train.global_batch_size // (train.micro_batch_size * data)
    total = count_parameters(config, vocabulary_size)
    trained = count_trained(config, vocabulary_size, image_size)
    lines = [
        f"{config.model.family}, {total:,} parameters, vocabulary of {vocabulary_size:,}, {train.precision}",
        *([f"training {describe_share(config, trained, total)}"] * config.trains_part),
        f"{world_size} ranks = tensor {parallel.tensor} x context {parallel.context} x data {data} x pipeline "
        f"{parallel.pipeline}" + (f" ({parallel.interleave} chunks per stage)" if parallel.interleave > 1 else ""),
        f"{train.global_batch_size} sequences of {config.data.seq_length} tokens per step: {micro_batches} "
        f"micro-batches of {train.micro_batch_size} per rank",
        "",
    ]
    for kind, groups in list_groups(config, world_size).items():
        shown = "  ".join(format_ranks(group) for group in groups[:4]) + ("  ..." if len(groups) > 4 else "")
        lines.append(f"{kind + ' groups':<16}{len(groups):>5}: {shown}")
    header = ("stage", "layers", "ranks", "parameters", "weights", "gradients", "optimizer", "activations", "total")
    rows: list[tuple[str, ...]] = [header]
    for stage in range(parallel.pipeline):
        layers = [number for number in range(config.model.layers) if _stage_of_layer(config, number) == stage]
        memory = estimate_memory(config, vocabulary_size, world_size, stage)
        ranks = [rank for rank in range(world_size) if locate_rank(config, world_size, rank).pipeline == stage]
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
        rows.append(
            (
                str(stage),
                format_ranks(layers),
                format_ranks(ranks),
                f"{memory.parameters:,}",
                *map(_format_bytes, sizes),
            )
        )
    lines += ["", *_align(rows)]
    lines += ["", "Parameters and bytes are per rank, without communication buffers and libraries."]
    if config.train.init:
        lines += ["", *_compare_tuning(config, vocabulary_size, world_size, image_size)]
    return "\n".join(lines)


def describe_share(config: Config, trained: int, total: int) -> str:
    """How many of `total` parameters of the base, and which, are trained."""
    lora, only = config.lora, config.train.only
    adapters = f"adapters of rank {lora.rank}, alpha {lora.alpha:g}, of {', '.join(lora.layers)}"
    parts = [adapters] * bool(lora.rank) + [", ".join(only)] * bool(only)
    return f"{trained:,} parameters, {trained / total:.2%} of the model's {total:,}: {'; '.join(parts)}"


def format_ranks(numbers: list[int]) -> str:
    """Short form of sorted numbers: 0-3 or 0,4,8-9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ",".join(shown) if len(shown) <= 6 else ",".join([*shown[:5], "...", shown[-1]])


def _format_bytes(number: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number / 1024:.1f} KiB"
