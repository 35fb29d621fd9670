"""Each weight of a checkpoint and the stock weights that hold it, converted exactly in both directions.

    linear_qkv, rows grouped per head of keys: queries, k, v    q_proj, k_proj, v_proj
    linear_fc1 [2, F, H]: gate, up (llama)                      gate_proj, up_proj
    position_embeddings [S, H] (cm3leon)                        embed_positions [S + 2, H], two zero rows in front
    vocabulary rows                                             the true ones, without the model's padding

Names and shapes come from layouts.py, where the letters are explained.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.export.layouts import POSITION_OFFSET, Targets, layer_weights, outer_weights, shape_of
from megatron_cm3leon.model.weights import FINAL_NORM, OUTPUT_HEAD, POSITION_EMBEDDINGS, canonical_shapes, layer_name


@dataclass(frozen=True)
class Part:
    """One weight of a checkpoint and the stock weights that hold it; `join` is the inverse of `split`."""

    name: str
    """Canonical name."""
    shape: tuple[int, ...]
    targets: Targets
    """Names and shapes in the export, in the order of `split`."""
    split: Callable[[Tensor], tuple[Tensor, ...]] = lambda weight: (weight,)
    join: Callable[..., Tensor] = lambda weight: weight


def list_parts(config: Config, vocabulary_size: int) -> list[Part]:
    """Every weight of the model of a validated configuration, in the order of the export's files."""
    shape = shape_of(config, vocabulary_size)
    targets = outer_weights(shape)
    for layer in range(shape.layers):
        targets |= {layer_name(layer, part): names for part, names in layer_weights(shape, layer).items()}
    first: list[Part] = []
    middle: list[Part] = []
    last: list[Part] = []
    for name, size in canonical_shapes(config, vocabulary_size).items():
        group = middle if name.startswith("decoder.layers.") else last if name in (FINAL_NORM, OUTPUT_HEAD) else first
        group.append(_build_part(name, size, targets[name], config))
    return first + middle + last


def _build_part(name: str, shape: tuple[int, ...], targets: Targets, config: Config) -> Part:
    if name == POSITION_EMBEDDINGS:
        return Part(
            name,
            shape,
            targets,
            lambda weight: (torch.cat([weight.new_zeros(POSITION_OFFSET, shape[1]), weight]),),
            lambda weight: weight[POSITION_OFFSET:],
        )
    if name.endswith("self_attention.linear_qkv.weight"):
        heads, kv_heads = config.model.heads, config.model.kv_heads
        return Part(
            name,
            shape,
            targets,
            lambda weight: split_qkv(weight, heads, kv_heads),
            lambda query, key, value: join_qkv(query, key, value, heads, kv_heads),
        )
    if len(targets) == 2:  # gate and up of linear_fc1
        return Part(name, shape, targets, lambda weight: weight.unbind(0), lambda gate, up: torch.stack([gate, up]))
    return Part(name, shape, targets)


def split_qkv(weight: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Query, key and value matrices of rows grouped per head of keys, [(N + 2 G) D, H]."""
    rows, hidden = weight.shape
    grouped = weight.view(kv_heads, heads // kv_heads + 2, rows // (heads + 2 * kv_heads), hidden)
    parts = grouped.split([heads // kv_heads, 1, 1], dim=1)
    return tuple(part.reshape(-1, hidden) for part in parts)


def join_qkv(query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The inverse of `split_qkv`."""
    width, hidden = query.shape[0] // heads, query.shape[1]
    grouped = [part.view(kv_heads, -1, width, hidden) for part in (query, key, value)]
    return torch.cat(grouped, dim=1).reshape(-1, hidden)
