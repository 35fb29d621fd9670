"""Layer specs: which modules megatron-core builds the transformer from.

Layout legend: S sequence, B batch, N heads of this rank, D width of a head, H = N x D.
"""

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules


class LayerNormWithoutParameters(torch.nn.Module):
    """LayerNorm with neither weight nor bias (CM3Leon section 2.3)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.shape, self.eps = (hidden_size,), eps

    def forward(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(hidden_SBH, self.shape, eps=self.eps)


LONGEST_WRITTEN_OUT = 256
"""Longest sequence for which bf16 on a CPU takes `attend_written_out`: forward and backward of 16 x 160 tokens
take 16 ms instead of 38 (4 heads of 48), of 16 x 256 tokens 46 instead of 63; from 512 on torch's is faster."""


def attend_written_out(query, key, value, scale: float | None = None, dropout: float = 0.0) -> torch.Tensor:
    """Causal attention by two matrix products around an fp32 softmax; arguments and result are [B, N, S, D].

    `dropout` is the probability that a weight behind the softmax is dropped.
    """
    length, width = query.shape[-2:]
    future = torch.full((length, length), -torch.inf, device=query.device).triu(1)
    scores = (query * (scale or width**-0.5)) @ key.transpose(-1, -2)
    weights = (scores.float() + future).softmax(-1).to(value.dtype)
    return F.dropout(weights, dropout) @ value if dropout else weights @ value


class CausalAttention(torch.nn.Module):
    """megatron-core's `core_attention` by torch's scaled-dot-product attention (flash where there is one).

    The mask is causal and implied: no mask tensor is made or read.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **groups,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal, f"attention of type {attn_mask_type} is not built here"
        self.dropout, self.softmax_scale = config.attention_dropout, softmax_scale

    def forward(self, query_SBND, key_SBND, value_SBND, attention_mask=None, **options) -> torch.Tensor:
        """Attend; every argument is [S, B, N, D], the result [S, B, N x D]."""
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query_SBND, key_SBND, value_SBND))
        if self.dropout and self.training:
            with get_cuda_rng_tracker().fork():  # each tensor-parallel rank drops in its own heads
                context = self._attend(query, key, value, self.dropout)
        else:
            context = self._attend(query, key, value, 0.0)
        length, batch = query_SBND.shape[:2]
        return context.permute(2, 0, 1, 3).reshape(length, batch, -1)

    def _attend(self, query, key, value, dropout: float) -> torch.Tensor:
        on_cpu_in_bf16 = query.dtype == torch.bfloat16 and query.device.type == "cpu"
        if on_cpu_in_bf16 and query.shape[2] <= LONGEST_WRITTEN_OUT:
            return attend_written_out(query, key, value, self.softmax_scale, dropout)
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=self.softmax_scale
        )


def build_block_spec(config: TransformerConfig, layers: int) -> TransformerBlockSubmodules:
    """Submodules of one stage of `layers` layers for family cm3leon."""
    norm = LayerNormWithoutParameters
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=CausalAttention,
            linear_proj=RowParallelLinear,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)
