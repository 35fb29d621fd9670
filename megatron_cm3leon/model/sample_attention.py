"""Attention per sample by FlexAttention: tiles of queries and keys that share no sample are skipped, no mask is stored.

`build_sample_blocks` finds, once for each micro-batch and for all layers, which tiles of 128 x 128 hold an allowed pair
and in which all pairs are allowed; inside the others FlexAttention's kernel compares the samples of query and key.
torch's variable-length attention (torch.nn.attention.varlen) needs the tokens of a sample to be contiguous, which CM3
masking does not give: it moves spans of every sample to the end of the sequence.

FlexAttention has no backward pass on a CPU and drops no weights: there the masked form (attention.py) is used.

Layout legend: B batch, S sequence, L queries of this rank (all S, or its part under parallel.context), N heads, D width
of a head; Q and K number tiles of queries and keys.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BACKEND = "inductor"
"""Of torch.compile: what tests without a GPU replace."""
TILE = 128
"""Queries and keys of a tile, FlexAttention's own default."""


class LayerInputs(NamedTuple):
    """What all layers need beside the hidden states: megatron-core hands it through as `attention_bias`."""

    angles: torch.Tensor | None
    """Of rotary positions, as rotary.compute_rotary_angles gives them; None without."""
    blocks: BlockMask | None
    """Of attention per sample by FlexAttention; None for any other."""


def uses_flex(setting: str, device: torch.device, dropout: float) -> bool:
    """Whether train.sample_attention means FlexAttention on `device`; ValueError where it cannot be."""
    if setting == "flex":
        require_backward_pass(device)
    return setting == "flex" or (setting == "auto" and device.type == "cuda" and not dropout)


def require_backward_pass(device: torch.device) -> None:
    """ValueError on a CPU."""
    if device.type == "cpu":
        raise ValueError(
            "train.sample_attention (flex) needs a GPU: FlexAttention has no backward pass on a CPU; use "
            "train.sample_attention=auto, which takes the masked form here."
        )


def build_sample_blocks(samples_BS: torch.Tensor, places_L: torch.Tensor | None = None) -> BlockMask:
    """The tiles that attention per sample visits, without a wait for the device and without an S x S tensor.

    samples_BS: sample of each token of the whole sequence, from -1 (padding) to S; places_L: place in the sequence of
    each of this rank's queries, None for 0, 1, 2 ...
    """
    samples_BS = samples_BS.int()
    length = samples_BS.shape[1]
    places_S = torch.arange(length, device=samples_BS.device, dtype=torch.int32)
    places_L = places_S if places_L is None else places_L.int()
    rows_BL = samples_BS if places_L is places_S else samples_BS[:, places_L]
    of_queries, of_keys = _samples_in_tiles(rows_BL, length), _samples_in_tiles(samples_BS, length)
    shared_BQK = of_queries @ of_keys.transpose(1, 2) > 0
    (first_Q, last_Q), (first_K, last_K) = _ends_of_tiles(places_L), _ends_of_tiles(places_S)
    visited = shared_BQK & (last_Q[:, None] >= first_K)
    alone_BQ, alone_BK = (each.sum(-1) == 1 for each in (of_queries, of_keys))
    full = visited & alone_BQ[:, :, None] & alone_BK[:, None, :] & (first_Q[:, None] >= last_K)
    if len(places_L) % TILE:
        full[:, -1] = False
    if length % TILE:
        full[:, :, -1] = False
    return BlockMask.from_kv_blocks(
        *_order_tiles(visited & ~full),
        *_order_tiles(full),
        BLOCK_SIZE=TILE,
        mask_mod=_compare_samples(rows_BL, samples_BS, places_L),
        seq_lengths=(len(places_L), length),
    )


def attend_samples(query_BNLD, key_BGSD, value_BGSD, blocks: BlockMask, scale: float | None) -> torch.Tensor:
    """Attention [B, N, L, D] of the pairs that `blocks` allows; G heads of keys and values divide N."""
    # Inside a compiled layer it is compiled with the layer.
    attend = flex_attention if torch.compiler.is_compiling() else _compiled_attention(BACKEND)
    grouped = query_BNLD.shape[1] != key_BGSD.shape[1]
    return attend(query_BNLD, key_BGSD, value_BGSD, block_mask=blocks, scale=scale, enable_gqa=grouped)


@lru_cache
def _compiled_attention(backend: str):
    """Without compilation FlexAttention computes the whole square of scores."""
    return torch.compile(flex_attention, backend=backend, dynamic=False)


def _samples_in_tiles(samples_BL: torch.Tensor, largest: int) -> torch.Tensor:
    """1 where a tile holds a token of a sample, else 0; float [B, tiles, samples]."""
    tiles = torch.arange(samples_BL.shape[1], device=samples_BL.device) // TILE
    found = torch.zeros(len(samples_BL), -(-samples_BL.shape[1] // TILE), largest + 2, device=samples_BL.device)
    batch = torch.arange(len(samples_BL), device=samples_BL.device)[:, None]
    found[batch, tiles, samples_BL.long() + 1] = 1.0
    return found


def _ends_of_tiles(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest place of each tile's tokens."""
    padding = -len(places) % TILE
    padded = torch.cat([places, places[-1:].expand(padding)]).view(-1, TILE)
    return padded.amin(1), padded.amax(1)


def _order_tiles(chosen_BQK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FlexAttention's form of a choice of tiles: how many [B, 1, Q], and all tiles with those first [B, 1, Q, K]."""
    counts = chosen_BQK.sum(-1, dtype=torch.int32)
    order = chosen_BQK.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts[:, None], order[:, None]


def _compare_samples(rows_BL: torch.Tensor, columns_BS: torch.Tensor, places_L: torch.Tensor):
    """FlexAttention's mask_mod: whether the pair is of one sample and the key is not after the query."""

    def allowed(batch, head, query, key):
        return (rows_BL[batch, query] == columns_BS[batch, key]) & (key <= places_L[query])

    return allowed
