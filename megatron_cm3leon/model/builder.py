"""Config -> this rank's stage of the megatron-core GPT model, with its initial weights.

Initial weights: every parameter is a function of (seed, its global name), drawn whole on CPU in fp32 and
then sliced for this rank, so that every layout starts from the same values.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_cm3leon.config import Config
from megatron_cm3leon.config_rules import VOCABULARY_ROW_MULTIPLE
from megatron_cm3leon.model.layers import build_block_spec
from megatron_cm3leon.model.loss import cross_entropy
from megatron_cm3leon.tokenizers.vocab import Vocabulary

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}
WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
POSITION_EMBEDDINGS = "embedding.position_embeddings.weight"


class CM3LeonModel(GPTModel):
    """megatron-core's GPTModel with this project's loss; `forward(..., labels=)` gives [batch, seq] losses."""

    def __init__(self, *, true_vocabulary_size: int, **options) -> None:
        super().__init__(**options)
        self.true_vocabulary_size = true_vocabulary_size

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Token losses [batch, seq] in nats; labels [batch, seq], logits [seq, batch, rows of this rank]."""
        losses_SB = cross_entropy(logits, labels.transpose(0, 1), self.true_vocabulary_size, self.pg_collection.tp)
        return losses_SB.transpose(0, 1)


def padded_rows(vocabulary_size: int) -> int:
    """Rows of the model's vocabulary: `vocabulary_size` rounded up, the same under every layout."""
    return -(-vocabulary_size // VOCABULARY_ROW_MULTIPLE) * VOCABULARY_ROW_MULTIPLE


def build_transformer_config(config: Config) -> TransformerConfig:
    """megatron-core's view of `config`."""
    model, parallel = config.model, config.parallel
    bf16 = config.train.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.heads,
        ffn_hidden_size=model.ffn_hidden_size,
        activation_func=_ACTIVATIONS[model.activation],
        add_bias_linear=False,
        normalization="LayerNorm",
        layernorm_epsilon=1e-5,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=bf16,
        use_cpu_initialization=True,
        perform_initialization=False,  # initialize_weights() does it, the same way under every layout
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        deallocate_pipeline_outputs=True,
        calculate_per_token_loss=True,  # gradients are summed over ranks; the engine divides the loss
    )


def build_stage(config: Config, vocabulary: Vocabulary) -> CM3LeonModel:
    """This rank's pipeline stage, on the CPU, with its initial weights."""
    transformer = build_transformer_config(config)
    stage_layers = config.model.layers // config.parallel.pipeline
    model = CM3LeonModel(
        config=transformer,
        transformer_layer_spec=build_block_spec(transformer, stage_layers),
        vocab_size=padded_rows(vocabulary.size),
        true_vocabulary_size=vocabulary.size,
        max_sequence_length=config.data.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=True,
        position_embedding_type="learned_absolute",
    )
    _mark_partitions(model)
    initialize_weights(model, config)
    return model


def _mark_partitions(model: CM3LeonModel) -> None:
    """Tell megatron-core which parameters are partitions: its own initialisation, not used here, would.

    Without the mark the gradient norm counts the first tensor-parallel rank's partition alone.
    """
    for module in model.modules():
        if isinstance(module, (VocabParallelEmbedding, ColumnParallelLinear)):
            dim = 0
        elif isinstance(module, RowParallelLinear):
            dim = 1
        else:
            continue
        if module.weight is not None:  # the tied head of a whole model has none
            set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


@dataclass(frozen=True)
class Placement:
    """Where a local parameter lies in the whole model."""

    name: str
    """Canonical name, independent of the layout."""
    shape: tuple[int, ...]
    """Shape of the whole tensor, true vocabulary rows."""
    offset: tuple[int, ...]
    """Position of the local tensor's first element in the whole one."""
    local_shape: tuple[int, ...]
    """Shape of the local tensor, padded vocabulary rows included."""

    @property
    def kept_rows(self) -> int:
        """Leading rows of the local tensor that are no vocabulary padding."""
        return min(max(self.shape[0] - self.offset[0], 0), self.local_shape[0])


def place_parameters(model: CM3LeonModel) -> Iterator[tuple[torch.nn.Parameter, Placement]]:
    """Each parameter of this stage with its place in the whole model; tied copies have the same name."""
    rank, size = model.pg_collection.tp.rank(), model.pg_collection.tp.size()
    first_layer = get_transformer_layer_offset(model.config, vp_stage=None, pp_rank=model.pg_collection.pp.rank())
    for local_name, parameter in model.named_parameters():
        name = _canonical_name(local_name, first_layer)
        dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        shape, offset = list(parameter.shape), [0] * parameter.dim()
        if dim is not None:
            offset[dim] = shape[dim] * rank
            shape[dim] *= size
        if name == WORD_EMBEDDINGS:
            shape[0] = model.true_vocabulary_size
        yield parameter, Placement(name, tuple(shape), tuple(offset), tuple(parameter.shape))


def _canonical_name(local_name: str, first_layer: int) -> str:
    if local_name == "output_layer.weight":  # the tied copy on the last stage
        return WORD_EMBEDDINGS
    prefix = "decoder.layers."
    if local_name.startswith(prefix):
        number, rest = local_name[len(prefix) :].split(".", 1)
        return f"{prefix}{int(number) + first_layer}.{rest}"
    return local_name


@torch.no_grad()
def initialize_weights(model: CM3LeonModel, config: Config) -> None:
    """Fill the stage's parameters with their initial values (CM3Leon section 2.3)."""
    for parameter, place in place_parameters(model):
        whole = initial_weight(place.name, place.shape, config)
        parameter.zero_()  # padded vocabulary rows stay 0
        slices = tuple(slice(start, start + size) for start, size in zip(place.offset, place.local_shape, strict=True))
        part = whole[slices]
        parameter[: part.shape[0]].copy_(part)


def initial_weight(name: str, shape: tuple[int, ...], config: Config) -> torch.Tensor:
    """Initial value of the whole parameter `name`: fp32, on the CPU.

    A normal of standard deviation model.init_std (positions: position_init_std) cut at 3 of them. The
    matrices that write into the residual stream start at 0: the paper's "output layers".
    """
    weight = torch.empty(shape)
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return weight.zero_()
    std = config.model.position_init_std if name == POSITION_EMBEDDINGS else config.model.init_std
    digest = hashlib.sha256(f"{config.seed}/weights/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)


def count_parameters(config: Config, vocabulary_size: int) -> int:
    """Parameters of the whole model, tied weights counted once, without vocabulary padding."""
    model = config.model
    layer = 4 * model.hidden_size**2 + 2 * model.hidden_size * model.ffn_hidden_size
    return (vocabulary_size + config.data.seq_length) * model.hidden_size + model.layers * layer
