"""The cm3leon model in plain torch, straight from its canonical weights: the yardstick of a conversion.

Layout of a tensor is in its name: B batch, S sequence, H hidden, N heads, D head width.
It knows nothing of megatron-core and of transformers, so that a mistake in either shows up as a difference.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from megatron_cm3leon.config import Config
from megatron_cm3leon.model.weights import POSITION_EMBEDDINGS, WORD_EMBEDDINGS, layer_name

LAYER_NORM_EPSILON = 1e-5
"""Megatron-core's default and OPT's only value."""


@torch.no_grad()
def reference_logits(read: Callable[[str], Tensor], config: Config, ids_BS: Tensor) -> Tensor:
    """Logits [B, S, vocabulary] of the trained model; `read(name)` gives one canonical weight at a time."""
    model = config.model
    activation = {"relu": functional.relu, "gelu": functional.gelu}[model.activation]
    words = read(WORD_EMBEDDINGS)
    state_BSH = words[ids_BS] + read(POSITION_EMBEDDINGS)[: ids_BS.shape[1]]
    for layer in range(model.layers):
        qkv = read(layer_name(layer, "self_attention.linear_qkv"))
        attended = _attend(_normalise(state_BSH), qkv, model.heads)
        state_BSH = state_BSH + attended @ read(layer_name(layer, "self_attention.linear_proj")).T
        inner = activation(_normalise(state_BSH) @ read(layer_name(layer, "mlp.linear_fc1")).T)
        state_BSH = state_BSH + inner @ read(layer_name(layer, "mlp.linear_fc2")).T
    return _normalise(state_BSH) @ words.T


def _normalise(state_BSH: Tensor) -> Tensor:
    return functional.layer_norm(state_BSH, state_BSH.shape[-1:], eps=LAYER_NORM_EPSILON)


def _attend(state_BSH: Tensor, qkv_weight: Tensor, heads: int) -> Tensor:
    """Causal attention; rows of `qkv_weight` are grouped per head: q k v of head 0, q k v of head 1 ..."""
    batch, length, hidden = state_BSH.shape
    qkv_BSN3D = (state_BSH @ qkv_weight.T).view(batch, length, heads, 3, hidden // heads)
    query, key, value = qkv_BSN3D.permute(3, 0, 2, 1, 4)
    scores = (query * (hidden // heads) ** -0.5) @ key.transpose(-1, -2)
    future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2).reshape(batch, length, hidden)
