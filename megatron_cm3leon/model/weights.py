"""Parameters of the whole model: canonical names, shapes, initial values; the same under every layout and engine.

embedding.word_embeddings.weight                   [vocabulary, H]
embedding.position_embeddings.weight               [seq_length, H]                        cm3leon
decoder.layers.0.self_attention.linear_qkv.weight  [(N + 2 G) D, H], grouped per head of keys: its queries, k, v
decoder.layers.0.self_attention.linear_proj.weight [H, N D]
decoder.layers.0.mlp.linear_fc1.weight             [F, H], or [2, F, H]: gate, up         llama
decoder.layers.0.mlp.linear_fc2.weight             [H, F]
decoder.layers.0.input_layernorm.weight ...        [H], with qk_norm q_layernorm [D] ...  llama
decoder.final_layernorm.weight                     [H]                                    llama
output_layer.weight                                [vocabulary, H]                        untied
decoder.layers.0.self_attention.linear_qkv.lora_A.weight  [rank, inputs]                  lora
decoder.layers.0.self_attention.linear_qkv.lora_B.weight  [outputs of the layer, rank]    lora
"""

import math
from dataclasses import dataclass

import torch

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.config.patterns import LINEAR_LAYERS, NORMS, list_selected
from megatron_cm3leon.model.initialization import compute_sinusoids, draw_truncated_normal, list_runs

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
POSITION_EMBEDDINGS = "embedding.position_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT_HEAD = "output_layer.weight"


def layer_name(layer: int, part: str) -> str:
    """Canonical name of one weight of one layer, `part` such as `mlp.linear_fc1`."""
    return f"decoder.layers.{layer}.{part}.weight"


def canonical_shapes(config: Config, vocabulary_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, without vocabulary padding; `config` must be validated."""
    model = config.model
    hidden, ffn, llama = model.hidden_size, model.ffn_hidden_size, model.family == "llama"
    head = hidden // model.heads
    shapes: dict[str, tuple[int, ...]] = {WORD_EMBEDDINGS: (vocabulary_size, hidden)}
    if not llama:
        shapes[POSITION_EMBEDDINGS] = (config.data.seq_length, hidden)
    for layer in range(model.layers):
        parts: dict[str, tuple[int, ...]] = {
            "self_attention.linear_qkv": ((model.heads + 2 * model.kv_heads) * head, hidden),
            "self_attention.linear_proj": (hidden, hidden),
            "mlp.linear_fc1": (2, ffn, hidden) if llama else (ffn, hidden),
            "mlp.linear_fc2": (hidden, ffn),
        }
        if llama:
            parts |= {"input_layernorm": (hidden,), "pre_mlp_layernorm": (hidden,)}
        if model.qk_norm:
            parts |= {"self_attention.q_layernorm": (head,), "self_attention.k_layernorm": (head,)}
        shapes |= {layer_name(layer, part): shape for part, shape in parts.items()}
    if llama:
        shapes[FINAL_NORM] = (hidden,)
    if not model.tied_embeddings:
        shapes[OUTPUT_HEAD] = (vocabulary_size, hidden)
    return shapes


def list_adapted(config: Config) -> set[tuple[int, str]]:
    """(layer, key of LINEAR_LAYERS) of the linear layers with an adapter (lora)."""
    return list_selected("lora.layers", config.lora.layers, config.model.layers) if config.lora.rank else set()


def adapter_shapes(config: Config, vocabulary_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the matrices A and B of every adapter; the rows of B are those of the layer's weight."""
    base = canonical_shapes(config, vocabulary_size)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, word in sorted(list_adapted(config)):
        shape = base[layer_name(layer, LINEAR_LAYERS[word])]
        shapes[layer_name(layer, f"{LINEAR_LAYERS[word]}.lora_A")] = (config.lora.rank, shape[-1])
        shapes[layer_name(layer, f"{LINEAR_LAYERS[word]}.lora_B")] = (*shape[:-1], config.lora.rank)
    return shapes


def is_adapter(name: str) -> bool:
    """Whether a canonical name is that of an adapter's matrix."""
    return name.endswith(("lora_A.weight", "lora_B.weight"))


def trained_shapes(config: Config, vocabulary_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter that is trained: all, or what lora and train.only select."""
    shapes = canonical_shapes(config, vocabulary_size)
    if not config.trains_part:
        return shapes
    words, selected = set(config.train.only), list_selected("train.only", config.train.only, config.model.layers)
    outer = set()
    if "embeddings" in words:
        outer |= {WORD_EMBEDDINGS, POSITION_EMBEDDINGS}
    if "image_rows" in words:
        outer |= {WORD_EMBEDDINGS, OUTPUT_HEAD}
    if "output" in words:
        outer.add(OUTPUT_HEAD)
    if NORMS in words:
        outer.add(FINAL_NORM)

    def is_selected(name: str) -> bool:
        if not name.startswith("decoder.layers."):
            return name in outer
        part = name.split(".")[-2]
        return (int(name.split(".")[2]), part if part in LINEAR_LAYERS else NORMS) in selected

    chosen = {name: shape for name, shape in shapes.items() if is_selected(name)}
    return chosen | adapter_shapes(config, vocabulary_size)


def trains_image_rows_only(config: Config, name: str) -> bool:
    """Whether of the parameter `name` only the rows of the image codes are trained (train.only)."""
    words = set(config.train.only)
    whole = "embeddings" if name == WORD_EMBEDDINGS else "output"
    return "image_rows" in words and name in (WORD_EMBEDDINGS, OUTPUT_HEAD) and whole not in words


def count_trained(config: Config, vocabulary_size: int, image_size: int) -> int:
    """Number of parameters of the whole model that are trained; `image_size`: number of image codes."""
    total = 0
    for name, shape in trained_shapes(config, vocabulary_size).items():
        rows = image_size if trains_image_rows_only(config, name) else shape[0]
        total += rows * math.prod(shape[1:])
    return total


def count_parameters(config: Config, vocabulary_size: int) -> int:
    """Number of parameters of the whole model; tied weights count once, vocabulary padding does not."""
    return sum(math.prod(shape) for shape in canonical_shapes(config, vocabulary_size).values())


def draw_initial_weight(
    name: str,
    shape: tuple[int, ...],
    config: Config,
    offset: tuple[int, ...] | None = None,
    part: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Draw the initial value of the parameter `name` of shape `shape`: fp32, on the CPU, from (config.seed, name).

    `offset` and `part` (a shape) select a part, which is drawn without the rest; the default is the whole parameter.

    A normal distribution with standard deviation model.init_std (positions: position_init_std), truncated at 3
    standard deviations; positions under model.position_init=sinusoidal as compute_sinusoids(). The matrices that write
    to the residual stream start at 0: the "output layers" of CM3Leon section 2.3. Norm weights start at 1. Of an
    adapter, B starts at 0 and A with variance 1 / (3 x inputs), as in peft.
    """
    offset, part = offset or (0,) * len(shape), shape if part is None else part
    if len(shape) == 1:
        return torch.ones(part)
    if name.endswith("lora_B.weight"):
        return torch.zeros(part)
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return torch.zeros(part)
    std = config.model.init_std
    if name == POSITION_EMBEDDINGS:
        std = config.model.position_init_std
        if config.model.position_init == "sinusoidal":
            assert part[1:] == shape[1:], "positions are divided by rows only"
            return compute_sinusoids(offset[0], part[0], shape[1], std)
    if name.endswith("lora_A.weight"):
        std = (3 * shape[1]) ** -0.5
    runs = [
        draw_truncated_normal(config.seed, name, start, start + length, std)
        for start, length in list_runs(shape, offset, part)
    ]
    return torch.cat(runs).view(part) if len(runs) > 1 else runs[0].view(part)


@dataclass(frozen=True)
class Placement:
    """Position of a local parameter in the whole model."""

    name: str
    """Canonical name, independent of the layout."""
    shape: tuple[int, ...]
    """Shape of the whole tensor, without vocabulary padding."""
    offset: tuple[int, ...]
    """Index of the local tensor's first element in the whole tensor."""
    local_shape: tuple[int, ...]
    """Shape of the local tensor with vocabulary padding; it may split the parameter's first dimension."""

    @property
    def kept_rows(self) -> int:
        """Leading rows of the local tensor that are not vocabulary padding."""
        return min(max(self.shape[0] - self.offset[0], 0), self.local_shape[0])
