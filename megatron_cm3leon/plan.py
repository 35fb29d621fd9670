"""What a layout will need, without starting it: ranks and their groups, parameters and bytes of each rank.

Bytes are those of tensors: weights, gradients, optimizer, and the activations that the backward pass needs, with the
head's logits, at the moment when most of them are alive. Not counted are libraries, communication buffers and what an
allocator keeps in reserve.
"""

import math
from dataclasses import dataclass

import torch

from megatron_cm3leon.config import Config
from megatron_cm3leon.config_rules import VOCABULARY_ROW_MULTIPLE
from megatron_cm3leon.model.weights import OUTPUT_HEAD, POSITION_EMBEDDINGS, WORD_EMBEDDINGS, canonical_shapes

PAPER_VOCABULARY = 65_536
"""Rows that are assumed where no shards are given (CM3Leon: 56,320 text, 8,192 image, 1,024 special)."""


@dataclass(frozen=True)
class Place:
    """Coordinates of a rank; neighbours in tensor are neighbours in rank, pipeline stages are farthest apart."""

    rank: int
    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors of one rank."""

    parameters: int
    """Parameters that the rank holds, a number."""
    weights: int
    gradients: int
    optimizer: int
    """Adam's moments and, in bf16, the fp32 weights."""
    activations: int
    """At their peak, logits included."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def place_rank(config: Config, world_size: int, rank: int) -> Place:
    """Where a rank stands, in megatron-core's order: tensor, context, data, pipeline."""
    parallel, data = config.parallel, config.data_parallel_size(world_size)
    rest, tensor = divmod(rank, parallel.tensor)
    rest, context = divmod(rest, parallel.context)
    pipeline, data_rank = divmod(rest, data)
    return Place(rank, tensor, context, data_rank, pipeline)


def count_stage_parameters(config: Config, vocabulary_size: int, stage: int) -> int:
    """Parameters that each tensor-parallel rank of a pipeline stage holds, padded vocabulary rows included."""
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    first, last = stage == 0, stage == pipeline - 1
    rows = -(-vocabulary_size // VOCABULARY_ROW_MULTIPLE) * VOCABULARY_ROW_MULTIPLE
    head_rows = rows // tensor * config.model.hidden_size
    total = 0
    for name, shape in canonical_shapes(config, vocabulary_size).items():
        if name == WORD_EMBEDDINGS:
            copies = first + (last and config.model.tied_embeddings and pipeline > 1)
            total += copies * head_rows
        elif name == OUTPUT_HEAD:
            total += last * head_rows
        elif name == POSITION_EMBEDDINGS:
            total += first * math.prod(shape)
        elif not name.startswith("decoder.layers."):
            total += last * math.prod(shape)  # the final norm
        elif _stage_of_layer(config, int(name.split(".")[2])) == stage:
            total += math.prod(shape) // (tensor if len(shape) > 1 else 1)
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
    """Bytes of a rank of pipeline stage `stage`; with offloading, those that stay on its device.

    Only the megatron engine's were compared with runs. DeepSpeed gathers a layer's weights (zero=3) and reduces
    gradients in buckets: these come on top.
    """
    parameters = count_stage_parameters(config, vocabulary_size, stage)
    bf16, zero, offload = config.train.precision == "bf16", config.parallel.zero, config.deepspeed
    sharers = config.data_parallel_size(world_size) * config.parallel.context
    own = -(-parameters // sharers)
    weights = (own if zero == 3 else parameters) * (2 if bf16 else 4)
    if config.train.fp8 and zero < 3:
        weights += 2 * _count_fp8_weights(config, vocabulary_size, stage)
    return Memory(
        parameters=parameters,
        weights=0 if offload.offload_parameters else weights,
        gradients=(own if zero >= 2 else parameters) * 4,
        optimizer=0 if offload.offload_optimizer else (own if zero else parameters) * (12 if bf16 else 8),
        activations=_activation_bytes(config, vocabulary_size, world_size, stage),
    )


def _activation_bytes(config: Config, vocabulary_size: int, world_size: int, stage: int) -> int:
    """At the start of the backward pass, when the logits are alive, or of a recomputed layer's."""
    model, parallel = config.model, config.parallel
    tokens = config.train.micro_batch_size * config.data.seq_length // parallel.context
    width = 2 if config.train.precision == "bf16" else 4
    layer, layer_input = _layer_bytes(config, tokens, width)
    layers = _chunks_in_flight(config, world_size, stage) * model.layers // (parallel.pipeline * parallel.interleave)
    head = 0
    if stage == parallel.pipeline - 1:
        rows = -(-vocabulary_size // VOCABULARY_ROW_MULTIPLE) * VOCABULARY_ROW_MULTIPLE // parallel.tensor
        # The logits, over which their gradient is written; the norm's input and output.
        head = (_tokens_with_logits(config, tokens) * rows + 2 * tokens * model.hidden_size) * width
    if parallel.recompute == "full":
        return int(layers * layer_input + max(layer, head))
    return int(layers * layer + head)


def _tokens_with_logits(config: Config, tokens: int) -> int:
    return min(tokens, config.train.head_chunk or tokens)


def _chunks_in_flight(config: Config, world_size: int, stage: int) -> int:
    """Chunks of layers whose activations a stage holds at once (1F1B; interleaved: arXiv 2104.04473 section 2.2)."""
    parallel, train = config.parallel, config.train
    blocks = train.micro_batch_size * config.data_parallel_size(world_size)
    micro_batches = train.global_batch_size // blocks
    if parallel.interleave == 1:
        return min(micro_batches, parallel.pipeline - stage)
    warm_up = (parallel.pipeline - stage - 1) * 2 + (parallel.interleave - 1) * parallel.pipeline
    return min(micro_batches * parallel.interleave, warm_up + 1)


def _layer_bytes(config: Config, tokens: int, width: int) -> tuple[float, float]:
    """Bytes that one layer keeps for its backward pass, and those of its input alone."""
    model, parallel, fused = config.model, config.parallel, _has_fused_norms(config)
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    keys = hidden // model.heads * model.kv_heads
    along_sequence = parallel.tensor if parallel.sequence else 1
    attention = hidden + 2 * keys + hidden  # the projection's output and the attention's
    if model.family == "llama":
        # Of each norm: input and output; unless fused the scaled input too, and in bf16 both inputs in fp32.
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
        if model.family == "llama" and _is_compiled(config):  # rotated queries and keys are made again as well
            attention -= hidden + keys
    partitioned = (attention + feed_forward) / parallel.tensor
    layer = width * (residual / along_sequence + partitioned)
    if config.train.fp8:
        layer += _fp8_bytes(config)
    return tokens * layer, tokens * width * hidden / along_sequence


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
    """Whether the layers will be compiled, as far as this machine can tell."""
    return _runs_on_a_gpu(config) if config.train.compile is None else config.train.compile


def _has_fused_norms(config: Config) -> bool:
    """Whether an RMSNorm keeps its input and output alone: as one kernel of a GPU, or compiled."""
    return _runs_on_a_gpu(config) or _is_compiled(config)


def _runs_on_a_gpu(config: Config) -> bool:
    device = config.train.device
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def checkpoint_bytes(config: Config, vocabulary_size: int) -> int:
    """Bytes of the numbers of a checkpoint: every parameter and Adam's two moments, fp32, once."""
    return 12 * sum(math.prod(shape) for shape in canonical_shapes(config, vocabulary_size).values())


def list_groups(config: Config, world_size: int) -> dict[str, list[list[int]]]:
    """Ranks of every group by kind: the ranks that differ in that coordinate alone."""
    places = [place_rank(config, world_size, rank) for rank in range(world_size)]
    groups = {}
    for kind in ("tensor", "context", "data", "pipeline"):
        found: dict[tuple, list[int]] = {}
        for place in places:
            others = tuple(getattr(place, name) for name in ("tensor", "context", "data", "pipeline") if name != kind)
            found.setdefault(others, []).append(place.rank)
        groups[kind] = list(found.values())
    return groups


def describe(config: Config, vocabulary_size: int, world_size: int) -> str:
    """The plan as text: the model, its groups, and a table of each pipeline stage's ranks."""
    parallel, train = config.parallel, config.train
    data = config.data_parallel_size(world_size)
    micro_batches = train.global_batch_size // (train.micro_batch_size * data)
    total = sum(math.prod(shape) for shape in canonical_shapes(config, vocabulary_size).values())
    lines = [
        f"{config.model.family}, {total:,} parameters, vocabulary of {vocabulary_size:,}, {train.precision}",
        f"{world_size} ranks = tensor {parallel.tensor} x context {parallel.context} x data {data} x pipeline "
        f"{parallel.pipeline}" + (f" ({parallel.interleave} chunks a stage)" if parallel.interleave > 1 else ""),
        f"{train.global_batch_size} blocks of {config.data.seq_length} tokens a step: {micro_batches} micro-batches of "
        f"{train.micro_batch_size} a rank",
        "",
    ]
    for kind, groups in list_groups(config, world_size).items():
        shown = "  ".join(show_ranks(group) for group in groups[:4]) + ("  ..." if len(groups) > 4 else "")
        lines.append(f"{kind + ' groups':<16}{len(groups):>5}: {shown}")
    header = ("stage", "layers", "ranks", "parameters", "weights", "gradients", "optimizer", "activations", "all")
    rows = [header]
    for stage in range(parallel.pipeline):
        layers = [number for number in range(config.model.layers) if _stage_of_layer(config, number) == stage]
        memory = estimate_memory(config, vocabulary_size, world_size, stage)
        ranks = [rank for rank in range(world_size) if place_rank(config, world_size, rank).pipeline == stage]
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
        rows.append(
            (str(stage), show_ranks(layers), show_ranks(ranks), f"{memory.parameters:,}", *map(_show_bytes, sizes))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines += ["", *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)]
    lines += ["", "Parameters and bytes are those of one rank; buffers of communication and libraries come on top."]
    return "\n".join(lines)


def show_ranks(numbers: list[int]) -> str:
    """0-3 or 0,4,8-9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ",".join(shown) if len(shown) <= 6 else ",".join([*shown[:5], "...", shown[-1]])


def _show_bytes(number: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number / 1024:.1f} KiB"
