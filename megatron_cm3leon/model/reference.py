"""Reference model of both families in plain torch, computed from canonical weights; a conversion is checked against it.

It does not use megatron-core or transformers, so that an error in either shows as a difference.

Layout legend: B batch, S sequence, H width of the residual stream, N heads, G heads of keys and values, X rows of
linear_qkv per head of keys, D width of a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.config.schema import ModelConfig
from megatron_cm3leon.model.rotary import compute_rotary_angles, rotate_pairs
from megatron_cm3leon.model.weights import FINAL_NORM, OUTPUT_HEAD, POSITION_EMBEDDINGS, WORD_EMBEDDINGS, layer_name

Read = Callable[[str], Tensor]
"""Canonical name -> the whole weight."""


@torch.no_grad()
def reference_logits(read: Read, config: Config, ids_BS: Tensor, advance: Callable[[], None] = lambda: None) -> Tensor:
    """Logits [B, S, vocabulary] of the trained model, computed in the dtype of the weights.

    `read` returns one weight at a time; `advance` is called after each layer, for a progress bar.
    """
    model = config.model
    words = read(WORD_EMBEDDINGS)
    state_BSH = words[ids_BS]
    if not model.tied_embeddings:
        del words
    if model.family == "cm3leon":
        state_BSH = state_BSH + read(POSITION_EMBEDDINGS)[: ids_BS.shape[1]]
    for layer in range(model.layers):
        state_BSH = state_BSH + _attend(state_BSH, read, model, layer)
        state_BSH = state_BSH + _feed_forward(state_BSH, read, model, layer)
        advance()
    state_BSH = _normalize(state_BSH, read, model, FINAL_NORM)
    return state_BSH @ (words if model.tied_embeddings else read(OUTPUT_HEAD)).T


def _normalize(state: Tensor, read: Read, model: ModelConfig, name: str) -> Tensor:
    """LayerNorm without parameters, or RMSNorm with the weight `name`."""
    if model.family == "cm3leon":
        return functional.layer_norm(state, state.shape[-1:], eps=model.norm_epsilon)
    mean_square = state.square().mean(-1, keepdim=True)
    return state * torch.rsqrt(mean_square + model.norm_epsilon) * read(name)


def _attend(state_BSH: Tensor, read: Read, model: ModelConfig, layer: int) -> Tensor:
    """Causal attention; rows of linear_qkv are grouped per head of keys: its queries, key, value."""
    batch, length, hidden = state_BSH.shape
    heads, groups, width = model.heads, model.kv_heads, hidden // model.heads
    inner = _normalize(state_BSH, read, model, layer_name(layer, "input_layernorm"))
    qkv = inner @ read(layer_name(layer, "self_attention.linear_qkv")).T
    qkv_BSGXD = qkv.view(batch, length, groups, heads // groups + 2, width)
    query, key, value = qkv_BSGXD.split([heads // groups, 1, 1], dim=3)
    if model.qk_norm:
        query = _normalize(query, read, model, layer_name(layer, "self_attention.q_layernorm"))
        key = _normalize(key, read, model, layer_name(layer, "self_attention.k_layernorm"))
    # [B, G, queries of a group, S, D]; the key and value of a group are broadcast to its queries.
    query, key, value = (part.permute(0, 2, 3, 1, 4) for part in (query, key, value))
    if model.family == "llama":
        query, key = _rotate(query, model.rope_base), _rotate(key, model.rope_base)
    scores = (query * width**-0.5) @ key.transpose(-1, -2)
    future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    attended = (weights @ value).permute(0, 3, 1, 2, 4).reshape(batch, length, hidden)
    return attended @ read(layer_name(layer, "self_attention.linear_proj")).T


def _rotate(state: Tensor, base: float) -> Tensor:
    """Rotary positions of states [..., S, D]."""
    length, width = state.shape[-2:]
    # The angles are computed in fp32, as in training and in stock classes, whatever the dtype of the states.
    cosine, sine = compute_rotary_angles(torch.arange(length)[None], width, base)[:, 0].to(state)
    return rotate_pairs(state, cosine, sine)


def _feed_forward(state_BSH: Tensor, read: Read, model: ModelConfig, layer: int) -> Tensor:
    """SwiGLU, or one hidden layer with ReLU or GELU."""
    inner = _normalize(state_BSH, read, model, layer_name(layer, "pre_mlp_layernorm"))
    first = read(layer_name(layer, "mlp.linear_fc1"))
    if model.activation == "swiglu":
        gate, up = first
        inner = functional.silu(inner @ gate.T) * (inner @ up.T)
    else:
        activate = functional.relu if model.activation == "relu" else functional.gelu
        inner = activate(inner @ first.T)
    return inner @ read(layer_name(layer, "mlp.linear_fc2")).T
