"""Attention per sample by FlexAttention: skips tiles of queries and keys that share no sample; stores no S x S mask.

`build_sample_mask` finds, once per micro-batch for all layers, the tiles of 128 x 128 that contain an allowed pair and
those in which all pairs are allowed; in the other tiles FlexAttention's kernel compares the samples of query and key.
torch's variable-length attention (torch.nn.attention.varlen) requires the tokens of a sample to be contiguous, which
they are not after CM3 masking: it moves spans of every sample to the end of the sequence.

FlexAttention has no backward pass on a CPU and no dropout: the masked form (attention.py) is used there.

Layout legend: B batch, S sequence, L queries of this rank (all S, or its part with parallel.context), N heads, G heads
of keys and values, D width of a head, Q tiles of queries, K tiles of keys.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BACKEND = "inductor"
"""Backend of torch.compile; tests without a GPU replace it."""
TILE = 128
"""Queries, and keys, of a tile: FlexAttention's default."""


class LayerInputs(NamedTuple):
    """Inputs of all layers in addition to the hidden states; megatron-core passes them on as `attention_bias`."""

    angles: torch.Tensor | None
    """Rotary angles (rotary.compute_rotary_angles); None without rotary positions."""
    block_mask: BlockMask | None
    """Mask of attention per sample by FlexAttention; None for any other attention."""


def uses_flex(setting: str, device: torch.device, dropout: float) -> bool:
    """Whether train.sample_attention selects FlexAttention on `device`; raises ValueError where it cannot run."""
    if setting == "flex":
        require_backward_pass(device)
    return setting == "flex" or (setting == "auto" and device.type == "cuda" and not dropout)


def require_backward_pass(device: torch.device) -> None:
    """Raise ValueError on a CPU, where FlexAttention has no backward pass."""
    if device.type == "cpu":
        raise ValueError(
            "train.sample_attention (flex) requires a GPU: FlexAttention has no backward pass on a CPU; use "
            "train.sample_attention=auto, which uses the masked form on a CPU."
        )


def build_sample_mask(samples_BS: torch.Tensor, positions_L: torch.Tensor | None = None) -> BlockMask:
    """Mask of attention per sample, built without a wait for the device and without an S x S tensor.

    samples_BS: sample of each token of the whole sequence, from -1 (padding) to S; positions_L: position in the
    sequence of each query of this rank, None for 0, 1, 2 ...
    """
    samples_BS = samples_BS.int()
    length = samples_BS.shape[1]
    positions_S = torch.arange(length, device=samples_BS.device, dtype=torch.int32)
    positions_L = positions_S if positions_L is None else positions_L.int()
    rows_BL = samples_BS if positions_L is positions_S else samples_BS[:, positions_L]
    of_queries, of_keys = _mark_samples_of_tiles(rows_BL, length), _mark_samples_of_tiles(samples_BS, length)
    shared_BQK = of_queries @ of_keys.transpose(1, 2) > 0
    (first_Q, last_Q), (first_K, last_K) = _find_ends_of_tiles(positions_L), _find_ends_of_tiles(positions_S)
    visited = shared_BQK & (last_Q[:, None] >= first_K)
    single_BQ, single_BK = (each.sum(-1) == 1 for each in (of_queries, of_keys))  # all tokens are of one sample
    full = visited & single_BQ[:, :, None] & single_BK[:, None, :] & (first_Q[:, None] >= last_K)
    if len(positions_L) % TILE:
        full[:, -1] = False
    if length % TILE:
        full[:, :, -1] = False
    return BlockMask.from_kv_blocks(
        *_order_tiles(visited & ~full),
        *_order_tiles(full),
        BLOCK_SIZE=TILE,
        mask_mod=_build_mask_function(rows_BL, samples_BS, positions_L),
        seq_lengths=(len(positions_L), length),
    )


def attend_samples(query_BNLD, key_BGSD, value_BGSD, block_mask: BlockMask, scale: float | None) -> torch.Tensor:
    """Attention [B, N, L, D] over the pairs that `block_mask` allows; G divides N."""
    # Within a compiled layer it is compiled with the layer.
    attend = flex_attention if torch.compiler.is_compiling() else _compile_attention(BACKEND)
    grouped = query_BNLD.shape[1] != key_BGSD.shape[1]
    return attend(query_BNLD, key_BGSD, value_BGSD, block_mask=block_mask, scale=scale, enable_gqa=grouped)


@lru_cache
def _compile_attention(backend: str):
    """Compile FlexAttention, which otherwise computes all S x S scores."""
    return torch.compile(flex_attention, backend=backend, dynamic=False)


def _mark_samples_of_tiles(samples_BL: torch.Tensor, largest: int) -> torch.Tensor:
    """1 where a tile contains a token of a sample, else 0; float [B, tiles, samples]."""
    tiles = torch.arange(samples_BL.shape[1], device=samples_BL.device) // TILE
    marks = torch.zeros(len(samples_BL), -(-samples_BL.shape[1] // TILE), largest + 2, device=samples_BL.device)
    batch = torch.arange(len(samples_BL), device=samples_BL.device)[:, None]
    marks[batch, tiles, samples_BL.long() + 1] = 1.0
    return marks


def _find_ends_of_tiles(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest position of the tokens of each tile."""
    padding = -len(positions) % TILE
    padded = torch.cat([positions, positions[-1:].expand(padding)]).view(-1, TILE)
    return padded.amin(1), padded.amax(1)


def _order_tiles(selected_BQK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FlexAttention's form of a selection: number of tiles [B, 1, Q]; all tiles, the selected first [B, 1, Q, K]."""
    counts = selected_BQK.sum(-1, dtype=torch.int32)
    order = selected_BQK.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts[:, None], order[:, None]


def _build_mask_function(rows_BL: torch.Tensor, columns_BS: torch.Tensor, positions_L: torch.Tensor):
    """FlexAttention's mask_mod: whether query and key are of one sample and the key is not after the query."""

    def is_allowed(batch, head, query, key):
        return (rows_BL[batch, query] == columns_BS[batch, key]) & (key <= positions_L[query])

    return is_allowed
