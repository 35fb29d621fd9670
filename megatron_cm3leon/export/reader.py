"""The model of an exported folder: its shape from config.json, and its weights, checked strictly.

Three stock classes, as tools/convert_checkpoint.py writes them: OPTForCausalLM (family cm3leon), LlamaForCausalLM and
Qwen3ForCausalLM (family llama, without and with RMS QK-norm). Names and shapes of all weights follow from config.json:
one that is missing, unknown, of another shape, or has a value that is no number is refused.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

POSITION_OFFSET = 2
"""Rows in front of the learned positions that OPT never reads."""
LAYER_NORM_EPSILON = 1e-5
"""OPT's, which its config.json does not name."""
INDEX = "model.safetensors.index.json"
_REMEDY = "give a folder that tools/convert_checkpoint.py export wrote."
_AGAIN = "export the checkpoint again."
_TYPES = ("F32", "BF16", "F16")
_REQUIRED = {
    "opt": {"enable_bias": False, "layer_norm_elementwise_affine": False, "do_layer_norm_before": True},
    "llama": {"hidden_act": "silu", "attention_bias": False},
    "qwen3": {"hidden_act": "silu", "attention_bias": False},
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What config.json says about the model."""

    family: str
    """"opt", "llama" or "qwen3"."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    """Heads of keys and values; `heads` divided by it share one."""
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
                raise ValueError(f"{name} {value!r} is no positive whole number")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} heads of keys do not divide {self.heads} heads")

    @property
    def learned_positions(self) -> bool:
        return self.family == "opt"


def read_shape(folder: Path) -> Shape:
    """Read config.json; ValueError names what makes a folder unfit."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no exported model: it has no config.json; {_REMEDY}")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder}/config.json is not valid JSON ({error}); {_REMEDY}") from error
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in _REQUIRED:
        known = ", ".join(_REQUIRED)
        raise ValueError(f"{folder} is no exported model: model_type is {family!r}, not one of {known}; {_REMEDY}")
    for name, value in _REQUIRED[family].items():
        if config.get(name) != value:
            raise ValueError(f"{folder} is no exported model: {name} is {config.get(name)!r}, not {value!r}; {_REMEDY}")
    try:
        return _opt_shape(config) if family == "opt" else _llama_shape(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{folder}/config.json lacks a field or has a wrong one ({error}); {_AGAIN}") from error


def _opt_shape(config: dict) -> Shape:
    if config["activation_function"] not in ("relu", "gelu"):
        raise ValueError(f"activation_function {config['activation_function']!r} is neither relu nor gelu")
    return Shape(
        family="opt",
        kv_heads=config["num_attention_heads"],
        width=config["hidden_size"] // config["num_attention_heads"],
        inner=config["ffn_dim"],
        activation=config["activation_function"],
        **_shared_fields(config, tied=True),
    )


def _llama_shape(config: dict) -> Shape:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # the former is transformers 5's
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r} is not built here")
    return Shape(
        family=config["model_type"],
        kv_heads=config.get("num_key_value_heads") or heads,
        width=config.get("head_dim") or config["hidden_size"] // heads,
        inner=config["intermediate_size"],
        epsilon=config["rms_norm_eps"],
        rope_base=float(rope.get("rope_theta") or config["rope_theta"]),
        **_shared_fields(config, tied=False),
    )


def _shared_fields(config: dict, tied: bool) -> dict:
    return {
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "context": config["max_position_embeddings"],
        "vocabulary": config["vocab_size"],
        "tied": config.get("tie_word_embeddings", tied),
    }


def expected_weights(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of the stock class."""
    hidden, inner, width = shape.hidden, shape.inner, shape.width
    rows = {"q": shape.heads * width, "k": shape.kv_heads * width, "v": shape.kv_heads * width}
    opt = shape.family == "opt"
    prefix = "model.decoder." if opt else "model."
    weights = {f"{prefix}embed_tokens.weight": (shape.vocabulary, hidden)}
    if opt:
        weights[f"{prefix}embed_positions.weight"] = (shape.context + POSITION_OFFSET, hidden)
    else:
        weights[f"{prefix}norm.weight"] = (hidden,)
    if not shape.tied:
        weights["lm_head.weight"] = (shape.vocabulary, hidden)
    parts = {f"self_attn.{side}_proj": (count, hidden) for side, count in rows.items()}
    if opt:
        parts |= {"self_attn.out_proj": (hidden, rows["q"]), "fc1": (inner, hidden), "fc2": (hidden, inner)}
    else:
        parts |= {"self_attn.o_proj": (hidden, rows["q"])}
        parts |= {f"mlp.{side}_proj": (inner, hidden) for side in ("gate", "up")} | {"mlp.down_proj": (hidden, inner)}
        parts |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    if shape.family == "qwen3":
        parts |= {"self_attn.q_norm": (width,), "self_attn.k_norm": (width,)}
    for number in range(shape.layers):
        weights |= {f"{prefix}layers.{number}.{part}.weight": size for part, size in parts.items()}
    return weights


class WeightFiles:
    """The weights of an exported folder by the stock class's names: checked at once, each read when it is taken.

    So a model is never in memory twice, and quantising one needs room for the result and a layer.
    """

    def __init__(self, folder: Path, shape: Shape, dtype: torch.dtype, device: str | torch.device) -> None:
        """ValueError where a weight is missing, unknown or of another shape; `dtype` is what `pop` returns."""
        self.folder, self.dtype, self._files = folder, dtype, {}
        expected = expected_weights(shape)
        for path in _weight_files(folder):
            try:
                file = safe_open(path, framework="pt", device=str(device))
                self._files |= dict.fromkeys(file.keys(), (path, file))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read ({error}); {_AGAIN}") from error
        for what, names in (
            ("lacks", [name for name in expected if name not in self._files]),
            ("has unknown", [name for name in self._files if name not in expected]),
        ):
            if names:
                more = " ..." if len(names) > 1 else ""
                raise ValueError(f"{folder} {what} {len(names)} weights ({names[0]}{more}); {_AGAIN}")
        for name, (_, file) in self._files.items():
            part = file.get_slice(name)
            if part.get_dtype() not in _TYPES:
                raise ValueError(f"{folder}: {name} has type {part.get_dtype()}, not {', '.join(_TYPES)}; {_AGAIN}")
            found = part.get_shape()
            if found != list(expected[name]):
                raise ValueError(
                    f"{folder}: {name} has shape {found}, config.json asks for {list(expected[name])}; {_AGAIN}"
                )

    def pop(self, name: str, default: Tensor | None = None) -> Tensor | None:
        """Take a weight out, as `dict.pop` does; ValueError where it has a value that is no number."""
        if name not in self._files:
            return default
        path, file = self._files.pop(name)
        try:
            weight = file.get_tensor(name).to(self.dtype)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}); {_AGAIN}") from error
        if not all(torch.isfinite(bound) for bound in weight.aminmax()):
            kind = str(self.dtype).removeprefix("torch.")
            raise ValueError(
                f"{self.folder}: {name} has NaN or infinite values as {kind}; export an earlier checkpoint"
                f"{'' if self.dtype == torch.float32 else ', or load it as fp32'}."
            )
        return weight


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX} cannot be read ({error!r}); {_AGAIN}") from error
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; {_AGAIN}")
    return [folder / name for name in names]
