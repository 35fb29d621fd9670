"""Each model family in Hugging Face's form: the stock class, its config.json, and the names of its weights.

The paper's layers (pre-LayerNorm without parameters, no bias, learned positions, tied embeddings) are exactly OPT's
with `enable_bias=False, layer_norm_elementwise_affine=False`; family llama is LLaMA's, with RMSNorm of queries and
keys Qwen3's. What changes is the arrangement:

    linear_qkv, rows grouped per head of keys: queries, k, v    q_proj, k_proj, v_proj
    linear_fc1 [2, F, H]: gate, up (llama)                      gate_proj, up_proj
    position_embeddings [S, H] (cm3leon)                        embed_positions [S + 2, H], two zero rows in front
    vocabulary rows                                             the true ones, without the model's padding
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.model.weights import (
    FINAL_NORM,
    OUTPUT_HEAD,
    POSITION_EMBEDDINGS,
    WORD_EMBEDDINGS,
    canonical_shapes,
    layer_name,
)
from megatron_cm3leon.tokenizers.vocab import Vocabulary

POSITION_OFFSET = 2
"""OPT's learned positions begin at row 2; the rows before it are never read."""


@dataclass(frozen=True)
class Part:
    """One weight of a checkpoint and what it is in an export: `join` undoes `split`."""

    name: str
    """Canonical name."""
    shape: tuple[int, ...]
    targets: dict[str, tuple[int, ...]]
    """Names and shapes in the export, in the order of `split`."""
    split: Callable[[Tensor], tuple[Tensor, ...]] = lambda weight: (weight,)
    join: Callable[..., Tensor] = lambda weight: weight


def stock_class(config: Config) -> str:
    """Name of the transformers class that computes the family's function."""
    if config.model.family == "cm3leon":
        return "OPTForCausalLM"
    return "Qwen3ForCausalLM" if config.model.qk_norm else "LlamaForCausalLM"


def split_qkv(weight: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value matrices from rows grouped per head of keys, [(N + 2 G) D, H]."""
    rows, hidden = weight.shape
    grouped = weight.view(kv_heads, heads // kv_heads + 2, rows // (heads + 2 * kv_heads), hidden)
    parts = grouped.split([heads // kv_heads, 1, 1], dim=1)
    return tuple(part.reshape(-1, hidden) for part in parts)


def join_qkv(query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The rows of `split_qkv` back in their groups."""
    width, hidden = query.shape[0] // heads, query.shape[1]
    grouped = [part.view(kv_heads, -1, width, hidden) for part in (query, key, value)]
    return torch.cat(grouped, dim=1).reshape(-1, hidden)


def list_parts(config: Config, vocabulary_size: int) -> list[Part]:
    """Every weight of the model, in the order of the export's files; `config` is validated."""
    shapes = canonical_shapes(config, vocabulary_size)
    build = _opt_part if config.model.family == "cm3leon" else _llama_part
    first, middle, last = [], [], []
    for name, shape in shapes.items():
        where = middle if name.startswith("decoder.layers.") else last if name in (FINAL_NORM, OUTPUT_HEAD) else first
        where.append(build(name, shape, config))
    return first + middle + last


def _opt_part(name: str, shape: tuple[int, ...], config: Config) -> Part:
    if name == POSITION_EMBEDDINGS:
        return Part(
            name,
            shape,
            {"model.decoder.embed_positions.weight": (shape[0] + POSITION_OFFSET, shape[1])},
            lambda weight: (torch.cat([weight.new_zeros(POSITION_OFFSET, shape[1]), weight]),),
            lambda weight: weight[POSITION_OFFSET:],
        )
    if name == WORD_EMBEDDINGS:
        return Part(name, shape, {"model.decoder.embed_tokens.weight": shape})
    layer, part = _layer_and_part(name)
    prefix = f"model.decoder.layers.{layer}."
    if part == "self_attention.linear_qkv":
        return _qkv_part(name, shape, config, prefix)
    renamed = {"self_attention.linear_proj": "self_attn.out_proj", "mlp.linear_fc1": "fc1", "mlp.linear_fc2": "fc2"}
    return Part(name, shape, {f"{prefix}{renamed[part]}.weight": shape})


_LLAMA_OUTSIDE = {
    WORD_EMBEDDINGS: "model.embed_tokens.weight",
    FINAL_NORM: "model.norm.weight",
    OUTPUT_HEAD: "lm_head.weight",
}
_LLAMA_INSIDE = {
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "mlp.linear_fc2": "mlp.down_proj",
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
}


def _llama_part(name: str, shape: tuple[int, ...], config: Config) -> Part:
    if name in _LLAMA_OUTSIDE:
        return Part(name, shape, {_LLAMA_OUTSIDE[name]: shape})
    layer, part = _layer_and_part(name)
    prefix = f"model.layers.{layer}."
    if part == "self_attention.linear_qkv":
        return _qkv_part(name, shape, config, prefix)
    if part == "mlp.linear_fc1":
        targets = {f"{prefix}mlp.{side}_proj.weight": shape[1:] for side in ("gate", "up")}
        return Part(name, shape, targets, lambda weight: weight.unbind(0), lambda *sides: torch.stack(sides))
    return Part(name, shape, {f"{prefix}{_LLAMA_INSIDE[part]}.weight": shape})


def _qkv_part(name: str, shape: tuple[int, ...], config: Config, prefix: str) -> Part:
    heads, kv_heads = config.model.heads, config.model.kv_heads
    width = config.model.hidden_size // heads
    rows = {"q": heads * width, "k": kv_heads * width, "v": kv_heads * width}
    return Part(
        name,
        shape,
        {f"{prefix}self_attn.{side}_proj.weight": (count, shape[1]) for side, count in rows.items()},
        lambda weight: split_qkv(weight, heads, kv_heads),
        lambda query, key, value: join_qkv(query, key, value, heads, kv_heads),
    )


def _layer_and_part(name: str) -> tuple[int, str]:
    layer, part = name.removeprefix("decoder.layers.").removesuffix(".weight").split(".", 1)
    assert name == layer_name(int(layer), part), f"{name} is no layer's weight"
    return int(layer), part


def config_fields(config: Config, vocabulary: Vocabulary, dtype: torch.dtype) -> dict:
    """config.json in plain fields, which any version of the class reads."""
    model = config.model
    shared = {
        "architectures": [stock_class(config)],
        "vocab_size": vocabulary.size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "max_position_embeddings": config.data.seq_length,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tied_embeddings,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **special_ids(vocabulary),
    }
    if model.family == "cm3leon":
        return shared | {
            "model_type": "opt",
            "word_embed_proj_dim": model.hidden_size,
            "ffn_dim": model.ffn_hidden_size,
            "activation_function": model.activation,
            "do_layer_norm_before": True,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "dropout": 0.0,
            "layerdrop": 0.0,
            "init_std": model.init_std,
        }
    shared |= {
        "model_type": "qwen3" if model.qk_norm else "llama",
        "intermediate_size": model.ffn_hidden_size,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.hidden_size // model.heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_base,
        "attention_bias": False,
        "initializer_range": model.init_std,
    }
    return shared | ({"use_sliding_window": False} if model.qk_norm else {"mlp_bias": False})


def special_ids(vocabulary: Vocabulary) -> dict[str, int]:
    """The ids that config.json and generation_config.json name."""
    return {"bos_token_id": vocabulary.eos, "eos_token_id": vocabulary.eos, "pad_token_id": vocabulary.pad}
