"""The model families as stock transformers classes have them: config.json, and the names and shapes of all weights.

    model.family cm3leon                OPTForCausalLM      family "opt"
    model.family llama                  LlamaForCausalLM    family "llama"
    model.family llama, qk_norm: true   Qwen3ForCausalLM    family "qwen3"

The paper's layers (pre-LayerNorm without parameters, no bias, learned positions, tied embeddings) are exactly OPT's
with `enable_bias=False, layer_norm_elementwise_affine=False`; family llama is LLaMA's, with RMSNorm of queries and
keys Qwen3's.

Export, import and generation use these tables, in both directions: a run's configuration becomes a `Shape` and its
config.json (`shape_of`, `config_fields`), a config.json becomes a `Shape` (`parse_shape`). `outer_weights` and
`layer_weights` map canonical names of weights (model/weights.py) to those of the stock class.

Shapes: V vocabulary, H hidden, N heads, G heads of keys and values, D width of a head, F feed-forward, S positions.
"""

from dataclasses import dataclass

import torch

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.model.weights import FINAL_NORM, OUTPUT_HEAD, POSITION_EMBEDDINGS, WORD_EMBEDDINGS
from megatron_cm3leon.tokenizers.vocab import Vocabulary

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of the weights in the files, by the name that --dtype has for them."""
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
INDEX = "model.safetensors.index.json"
REMEDY = "give a folder that tools/convert_checkpoint.py export wrote."
POSITION_OFFSET = 2
"""OPT's learned positions begin at row 2; the rows before it are never read."""
LAYER_NORM_EPSILON = 1e-5
"""OPT's, which its config.json does not contain."""
STOCK_CLASSES = {"opt": "OPTForCausalLM", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
REQUIRED_FIELDS: dict[str, dict[str, bool | str]] = {
    "opt": {"enable_bias": False, "layer_norm_elementwise_affine": False, "do_layer_norm_before": True},
    "llama": {"hidden_act": "silu", "attention_bias": False},
    "qwen3": {"hidden_act": "silu", "attention_bias": False},
}
"""Fields of config.json that have one value in every export of a family; with another the model is a different one."""

_SHARED_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "context": "max_position_embeddings",
    "vocabulary": "vocab_size",
    "tied": "tie_word_embeddings",
}
_LLAMA_KEYS = _SHARED_KEYS | {
    "kv_heads": "num_key_value_heads",
    "width": "head_dim",
    "inner": "intermediate_size",
    "epsilon": "rms_norm_eps",
    "rope_base": "rope_theta",
}
_KEYS = {
    "opt": _SHARED_KEYS | {"inner": "ffn_dim", "activation": "activation_function"},
    "llama": _LLAMA_KEYS,
    "qwen3": _LLAMA_KEYS,
}
"""Field of `Shape` -> field of config.json."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The part of config.json that decides the model's function."""

    family: str
    """"opt", "llama" or "qwen3"."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    """Heads of keys and values; each is shared by `heads` / `kv_heads` heads of queries."""
    width: int
    """Width of a head."""
    inner: int
    """Width of the feed-forward layer."""
    context: int
    """Positions."""
    vocabulary: int
    """Rows of the embedding."""
    tied: bool
    """Whether the output head is the embedding."""
    activation: str = "silu"
    epsilon: float = LAYER_NORM_EPSILON
    rope_base: float = 0.0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "width", "inner", "context", "vocabulary"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} {value!r} is not a positive whole number")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads are not a multiple of {self.kv_heads} heads of keys")

    @property
    def learned_positions(self) -> bool:
        return self.family == "opt"


def stock_family(config: Config) -> str:
    """The key of `STOCK_CLASSES` for a run's configuration."""
    if config.model.family == "cm3leon":
        return "opt"
    return "qwen3" if config.model.qk_norm else "llama"


def stock_class(config: Config) -> str:
    """Name of the transformers class that computes the family's function."""
    return STOCK_CLASSES[stock_family(config)]


def shape_of(config: Config, vocabulary_size: int) -> Shape:
    """Shape of the model of a validated configuration."""
    model, family = config.model, stock_family(config)
    opt = family == "opt"
    return Shape(
        family=family,
        layers=model.layers,
        hidden=model.hidden_size,
        heads=model.heads,
        kv_heads=model.kv_heads,
        width=model.hidden_size // model.heads,
        inner=model.ffn_hidden_size,
        context=config.data.seq_length,
        vocabulary=vocabulary_size,
        tied=bool(model.tied_embeddings),  # never None after validation
        activation=model.activation if opt else "silu",
        epsilon=LAYER_NORM_EPSILON if opt else model.norm_epsilon,
        rope_base=0.0 if opt else model.rope_base,
    )


def config_fields(config: Config, vocabulary: Vocabulary, dtype: torch.dtype) -> dict:
    """config.json in plain fields, which any version of the class reads."""
    shape = shape_of(config, vocabulary.size)
    fields = {
        "architectures": [STOCK_CLASSES[shape.family]],
        "model_type": shape.family,
        **{key: getattr(shape, name) for name, key in _KEYS[shape.family].items()},
        **REQUIRED_FIELDS[shape.family],
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **special_ids(vocabulary),
    }
    if shape.family == "opt":
        other = {"word_embed_proj_dim": shape.hidden, "dropout": 0.0, "layerdrop": 0.0}
        return fields | other | {"init_std": config.model.init_std}
    bias = {"use_sliding_window": False} if shape.family == "qwen3" else {"mlp_bias": False}
    return fields | bias | {"initializer_range": config.model.init_std}


def special_ids(vocabulary: Vocabulary) -> dict[str, int]:
    """The special ids in config.json and generation_config.json."""
    return {"bos_token_id": vocabulary.eos, "eos_token_id": vocabulary.eos, "pad_token_id": vocabulary.pad}


def parse_shape(fields: dict) -> Shape:
    """Shape of a config.json whose model_type is a family; KeyError, TypeError or ValueError for a wrong field.

    Fields that versions of transformers omit at their defaults may be missing.
    """
    family = fields["model_type"]
    values = {name: fields[key] for name, key in _KEYS[family].items() if fields.get(key) is not None}
    values.setdefault("tied", family == "opt")
    values.setdefault("kv_heads", fields["num_attention_heads"])
    values.setdefault("width", fields["hidden_size"] // fields["num_attention_heads"])
    if family == "opt":
        if values.get("activation") not in ("relu", "gelu"):
            raise ValueError(f"activation_function {values.get('activation')!r} is neither relu nor gelu")
    else:
        values["rope_base"] = _parse_rope_base(fields)
    missing = [key for name, key in _KEYS[family].items() if name not in values]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    return Shape(family=family, **values)


def _parse_rope_base(fields: dict) -> float:
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}  # the former is of transformers 5
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r} is not supported")
    return float(rope.get("rope_theta") or fields["rope_theta"])


# Weights

Targets = dict[str, tuple[int, ...]]
"""Names and shapes of the stock class's weights that hold one canonical weight."""


def outer_weights(shape: Shape) -> dict[str, Targets]:
    """Canonical name -> stock weights, outside the layers."""
    embedding = (shape.vocabulary, shape.hidden)
    prefix = model_prefix(shape)
    weights: dict[str, Targets] = {WORD_EMBEDDINGS: {f"{prefix}embed_tokens.weight": embedding}}
    if shape.learned_positions:
        rows = shape.context + POSITION_OFFSET
        weights[POSITION_EMBEDDINGS] = {f"{prefix}embed_positions.weight": (rows, shape.hidden)}
    else:
        weights[FINAL_NORM] = {f"{prefix}norm.weight": (shape.hidden,)}
    if not shape.tied:
        weights[OUTPUT_HEAD] = {"lm_head.weight": embedding}
    return weights


def layer_weights(shape: Shape, layer: int) -> dict[str, Targets]:
    """Canonical part of a layer, such as `mlp.linear_fc1` -> stock weights."""
    hidden, inner, width = shape.hidden, shape.inner, shape.width
    rows = {"q": shape.heads * width, "k": shape.kv_heads * width, "v": shape.kv_heads * width}
    parts: dict[str, Targets] = {
        "self_attention.linear_qkv": {f"self_attn.{side}_proj": (count, hidden) for side, count in rows.items()}
    }
    if shape.family == "opt":
        parts |= {
            "self_attention.linear_proj": {"self_attn.out_proj": (hidden, rows["q"])},
            "mlp.linear_fc1": {"fc1": (inner, hidden)},
            "mlp.linear_fc2": {"fc2": (hidden, inner)},
        }
    else:
        parts |= {
            "self_attention.linear_proj": {"self_attn.o_proj": (hidden, rows["q"])},
            "mlp.linear_fc1": {f"mlp.{side}_proj": (inner, hidden) for side in ("gate", "up")},
            "mlp.linear_fc2": {"mlp.down_proj": (hidden, inner)},
            "input_layernorm": {"input_layernorm": (hidden,)},
            "pre_mlp_layernorm": {"post_attention_layernorm": (hidden,)},
        }
    if shape.family == "qwen3":
        parts["self_attention.q_layernorm"] = {"self_attn.q_norm": (width,)}
        parts["self_attention.k_layernorm"] = {"self_attn.k_norm": (width,)}
    prefix = f"{model_prefix(shape)}layers.{layer}."
    return {part: {f"{prefix}{name}.weight": size for name, size in targets.items()} for part, targets in parts.items()}


def model_prefix(shape: Shape) -> str:
    """What the names of all weights but the output head's begin with."""
    return "model.decoder." if shape.family == "opt" else "model."


def stock_weights(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of the stock class."""
    groups = [outer_weights(shape), *(layer_weights(shape, layer) for layer in range(shape.layers))]
    return {name: size for group in groups for targets in group.values() for name, size in targets.items()}
