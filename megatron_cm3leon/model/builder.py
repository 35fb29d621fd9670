"""Build this rank's pipeline stage of the megatron-core GPT model from a configuration, with its initial weights.

Every number of a parameter is a function of (seed, canonical name, position), drawn on the CPU in fp32. A rank draws
only its part (initialization.py), and every layout starts from the same values.
"""

import re
from collections.abc import Iterator

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
from torch.nn.attention.flex_attention import BlockMask

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.config.validation import VOCABULARY_ROW_MULTIPLE
from megatron_cm3leon.model.adapters import add_adapters
from megatron_cm3leon.model.attention import context_positions
from megatron_cm3leon.model.fp8 import require_fp8
from megatron_cm3leon.model.head import Head
from megatron_cm3leon.model.layers import build_block_spec
from megatron_cm3leon.model.linear import multiply_in_fp8
from megatron_cm3leon.model.loss import cross_entropy
from megatron_cm3leon.model.rotary import compute_rotary_angles
from megatron_cm3leon.model.sample_attention import LayerInputs, build_sample_mask, uses_flex
from megatron_cm3leon.model.weights import (
    OUTPUT_HEAD,
    WORD_EMBEDDINGS,
    Placement,
    draw_initial_weight,
    layer_name,
    trained_shapes,
    trains_image_rows_only,
)
from megatron_cm3leon.tokenizers.vocab import Vocabulary

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "swiglu": F.silu}


class CM3LeonModel(GPTModel):
    """megatron-core's GPTModel with this project's loss; `forward(..., labels=)` returns losses [batch, seq]."""

    def __init__(
        self,
        *,
        true_vocabulary_size: int,
        z_loss: float,
        head_chunk: int,
        rope_base: float,
        sample_attention: str,
        **options,
    ) -> None:
        """`head_chunk` 0 computes the logits of all tokens at once; `rope_base` 0 means no rotary positions."""
        super().__init__(**options)
        self.true_vocabulary_size, self.z_loss, self.rope_base = true_vocabulary_size, z_loss, rope_base
        self.head_chunk, self.sample_attention = head_chunk, sample_attention
        if self.post_process:
            self.output_layer.__class__ = Head  # megatron-core has no spec for the head

    def forward(self, input_ids, position_ids, attention_mask=None, **options) -> torch.Tensor:
        """GPTModel's forward pass; the inputs that all layers share are in `attention_bias` (LayerInputs)."""
        angles = block_mask = None
        if self.rope_base:
            rows = position_ids[:1] if attention_mask is None else position_ids  # without samples all rows are equal
            angles = compute_rotary_angles(rows, self.config.kv_channels, self.rope_base)
        if attention_mask is not None:
            block_mask = self._build_block_mask(attention_mask[0])
        if angles is not None or block_mask is not None:
            options["extra_block_kwargs"] = {"attention_bias": LayerInputs(angles, block_mask)}
        return super().forward(input_ids, position_ids, attention_mask, **options)

    def _build_block_mask(self, samples_BS: torch.Tensor) -> BlockMask | None:
        """FlexAttention's mask for this rank's tokens, or None where it does not compute the attention per sample."""
        if not uses_flex(self.sample_attention, samples_BS.device, self.config.attention_dropout):
            return None
        group, positions = self.pg_collection.cp, None
        if group.size() > 1:
            positions = context_positions(samples_BS.shape[1], group.rank(), group.size()).to(samples_BS.device)
        return build_sample_mask(samples_BS, positions)

    def _postprocess(self, hidden_states, *, labels=None, **options) -> torch.Tensor:
        """Head and loss: those of GPTModel, or both in chunks of tokens (head.py)."""
        if not (self.post_process and self.head_chunk and labels is not None):
            return super()._postprocess(hidden_states, labels=labels, **options)
        losses_SB, _ = self.output_layer(
            hidden_states,
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None,
            targets_SB=labels.transpose(0, 1),
            vocabulary_size=self.true_vocabulary_size,
            z_loss=self.z_loss,
            chunk=self.head_chunk,
        )
        return losses_SB.transpose(0, 1)

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Token losses [batch, seq] in nats; labels [batch, seq], logits [seq, batch, rows of this rank]."""
        targets_SB = labels.transpose(0, 1)
        group = self.pg_collection.tp
        losses_SB = cross_entropy(logits, targets_SB, self.true_vocabulary_size, group, self.z_loss, overwrite=True)
        return losses_SB.transpose(0, 1)


def padded_vocabulary_size(vocabulary_size: int) -> int:
    """`vocabulary_size` rounded up to the rows of the embedding, the same under every layout."""
    return -(-vocabulary_size // VOCABULARY_ROW_MULTIPLE) * VOCABULARY_ROW_MULTIPLE


def build_transformer_config(config: Config) -> TransformerConfig:
    """megatron-core's TransformerConfig for `config`."""
    model, parallel = config.model, config.parallel
    bf16 = config.train.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=model.activation == "swiglu",
        ffn_hidden_size=model.ffn_hidden_size,
        activation_func=_ACTIVATIONS[model.activation],
        add_bias_linear=False,
        normalization="RMSNorm" if model.family == "llama" else "LayerNorm",
        layernorm_epsilon=model.norm_epsilon,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.interleave if parallel.interleave > 1 else None,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        context_parallel_size=parallel.context,
        # Over gloo, batched messages of the interleaved schedule are mismatched without an error; 1F1B needs batches.
        overlap_p2p_comm=parallel.interleave > 1,
        batch_p2p_comm=parallel.interleave == 1,
        recompute_granularity=None if parallel.recompute == "none" else parallel.recompute,
        recompute_method="uniform" if parallel.recompute == "full" else None,
        recompute_num_layers=1 if parallel.recompute == "full" else None,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=bf16,
        use_cpu_initialization=True,
        perform_initialization=False,  # by initialize_weights(), with the same values under every layout
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        # Over gloo a send may still read tensors that this would free: NaN with the interleaved schedule.
        deallocate_pipeline_outputs=torch.distributed.get_backend() == "nccl",
        calculate_per_token_loss=True,  # gradients are summed over ranks; the engine divides the loss
    )


def build_stage(config: Config, vocabulary: Vocabulary) -> list[CM3LeonModel]:
    """Build this rank's pipeline stage on the CPU with its initial weights: one model, or its interleaved chunks.

    Needs megatron-core's process groups. Raises ValueError where the device cannot compute in fp8 (train.fp8).
    """
    return [_build_chunk(config, vocabulary, number) for number in range(config.parallel.interleave)]


def _build_chunk(config: Config, vocabulary: Vocabulary, number: int) -> CM3LeonModel:
    transformer = build_transformer_config(config)
    stage = number if config.parallel.interleave > 1 else None
    layers = config.model.layers // (config.parallel.pipeline * config.parallel.interleave)
    model = CM3LeonModel(
        config=transformer,
        transformer_layer_spec=build_block_spec(transformer, config.model, layers),
        vocab_size=padded_vocabulary_size(vocabulary.size),
        true_vocabulary_size=vocabulary.size,
        z_loss=config.train.z_loss,
        head_chunk=config.train.head_chunk,
        sample_attention=config.train.sample_attention,
        rope_base=config.model.rope_base if config.model.family == "llama" else 0.0,
        max_sequence_length=config.data.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        parallel_output=True,
        share_embeddings_and_output_weights=config.model.tied_embeddings,
        # CoreAttention applies RoPE, because positions may restart in every sample.
        position_embedding_type="none" if config.model.family == "llama" else "learned_absolute",
        vp_stage=stage,
    )
    if config.train.fp8:
        if torch.distributed.get_backend() == "nccl":
            require_fp8(torch.cuda.get_device_capability())
        multiply_in_fp8(model.decoder)
    _mark_partitions(model)
    add_adapters(model, config, get_transformer_layer_offset(transformer, stage, model.pg_collection.pp.rank()))
    initialize_weights(model, config)
    freeze_parameters(model, config, vocabulary)
    return model


def freeze_parameters(model: CM3LeonModel, config: Config, vocabulary: Vocabulary) -> None:
    """Freeze what lora and train.only do not select.

    Of a weight of which only the rows of the image codes are trained, these rows are the attribute `trained_rows`, a
    range of this rank's rows: the engines set the gradients of the others to 0.
    """
    trained = trained_shapes(config, vocabulary.size)
    for parameter, placement in locate_parameters(model):
        parameter.requires_grad_(placement.name in trained)
        if trains_image_rows_only(config, placement.name) and placement.name in trained:
            first, rows = placement.offset[0], placement.local_shape[0]
            start, stop = (min(max(edge - first, 0), rows) for edge in (vocabulary.image_start, vocabulary.image_end))
            parameter.trained_rows = (start, stop)  # type: ignore[attr-defined]  # ours, beside megatron-core's
    if model.pre_process and config.trains_part:
        # Without it nothing in front of the first trained weight has a gradient, which recomputation requires.
        model.embedding.register_forward_hook(lambda module, inputs, hidden: _require_gradient(hidden))


def _require_gradient(hidden: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden.requires_grad_()
    return hidden


def _mark_partitions(model: CM3LeonModel) -> None:
    """Mark tensor-parallel partitions, as megatron-core's own initialization does, which is not used here.

    Without the mark the gradient norm would count the partition of the first tensor-parallel rank only.
    """
    for module in model.modules():
        if isinstance(module, (VocabParallelEmbedding, ColumnParallelLinear)):
            dim = 0
        elif isinstance(module, RowParallelLinear):
            dim = 1
        else:
            continue
        if module.weight is not None:  # a tied head on the stage of the embedding has none
            set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def locate_parameters(model: CM3LeonModel) -> Iterator[tuple[torch.nn.Parameter, Placement]]:
    """Yield each parameter of this stage with its position in the whole model; tied copies have the same name.

    The first matrix of a gated feed-forward layer is [2, ffn_hidden_size, hidden_size] here: gate, then up. Each
    tensor-parallel rank holds a part of both.
    """
    rank, size = model.pg_collection.tp.rank(), model.pg_collection.tp.size()
    first_layer = get_transformer_layer_offset(model.config, model.vp_stage, model.pg_collection.pp.rank())
    for local_name, parameter in model.named_parameters():
        name = _canonical_name(local_name, first_layer, model.share_embeddings_and_output_weights)
        partitioned = getattr(parameter, "tensor_model_parallel", False)
        dim = parameter.partition_dim if partitioned else None
        local = list(parameter.shape)
        if name.endswith(("linear_fc1.weight", "linear_fc1.lora_B.weight")) and model.config.gated_linear_unit:
            local, dim = [2, local[0] // 2, *local[1:]], 1
        shape, offset = list(local), [0] * len(local)
        if dim is not None:
            offset[dim] = shape[dim] * rank
            shape[dim] *= size
        if name in (WORD_EMBEDDINGS, OUTPUT_HEAD):
            shape[0] = model.true_vocabulary_size
        yield parameter, Placement(name, tuple(shape), tuple(offset), tuple(local))


def _canonical_name(local_name: str, first_layer: int, tied: bool) -> str:
    """Canonical name (weights.py) of a parameter of a stage that begins with layer `first_layer`."""
    if local_name == OUTPUT_HEAD and tied:  # the copy on the last stage
        return WORD_EMBEDDINGS
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)\.weight", local_name.replace(".lora.", "."))
    return layer_name(int(found[1]) + first_layer, found[2]) if found else local_name


@torch.no_grad()
def initialize_weights(model: CM3LeonModel, config: Config) -> None:
    """Fill the stage's parameters with their initial values (CM3Leon section 2.3)."""
    for parameter, placement in locate_parameters(model):
        part = (placement.kept_rows, *placement.local_shape[1:])
        parameter.zero_()  # vocabulary padding stays 0
        if part[0]:
            weight = draw_initial_weight(placement.name, placement.shape, config, placement.offset, part)
            parameter.view(placement.local_shape)[: part[0]].copy_(weight)
