"""Layer specs: the modules from which megatron-core builds the transformer of each family.

Layout legend: S sequence, B batch, H width of the residual stream.
"""

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.utils.checkpoint import checkpoint

from megatron_cm3leon.config.schema import ModelConfig
from megatron_cm3leon.model.attention import CoreAttention
from megatron_cm3leon.model.linear import ColumnLinear, RowLinear

_LINEAR_LAYERS = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)


class LayerNormWithoutParameters(torch.nn.Module):
    """LayerNorm without weight and bias (CM3Leon section 2.3)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.shape, self.eps = (hidden_size,), eps

    def forward(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(hidden_SBH, self.shape, eps=self.eps)


class RMSNorm(torch.nn.Module):
    """Division by the root mean square, times a weight (arXiv 1910.07467)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # With sequence parallelism each rank has the gradient of its part of the sequence; megatron-core sums them.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron-core's name
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) x up of [..., 2 F]; saves only its input for the backward pass."""

    @staticmethod
    def forward(ctx, both):
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, gradient):
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        of_both = torch.empty_like(both)
        of_gate, of_up = of_both.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return of_both


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """silu(gate) x up [..., F] of gate and up, which are concatenated in the last dimension."""
    if torch.compiler.is_compiling():
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up  # compiled to one kernel per pass, which saves only the input, too
    return _SwiGLU.apply(both)


class RecomputedAttention(SelfAttention):
    """megatron-core's attention, with selective recomputation that the compiler can trace."""

    def _checkpointed_attention_forward(
        self, query, key, value, attention_mask, attention_bias=None, **options
    ) -> torch.Tensor:
        if torch.compiler.is_compiling() and not self.config.attention_dropout:
            arguments = query, key, value, attention_mask, attention_bias
            return checkpoint(self.core_attention, *arguments, use_reentrant=False, preserve_rng_state=False)
        return self._checkpoint_uncompiled(query, key, value, attention_mask, attention_bias=attention_bias, **options)

    @torch.compiler.disable
    def _checkpoint_uncompiled(self, *arguments, **options) -> torch.Tensor:
        return super()._checkpointed_attention_forward(*arguments, **options)


class GatedMLP(MLP):
    """megatron-core's MLP with SwiGLU (arXiv 2002.05202); megatron-core's own form saves two more tensors."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, _LINEAR_LAYERS)

    def forward(self, hidden_SBH: torch.Tensor, **options) -> tuple[torch.Tensor, None]:
        both, _ = self.linear_fc1(hidden_SBH)
        return self.linear_fc2(swiglu(both))


def build_block_spec(config: TransformerConfig, model: ModelConfig, layers: int) -> TransformerBlockSubmodules:
    """Submodules of a stage (or chunk) of `layers` layers."""
    llama = model.family == "llama"
    norm = RMSNorm if llama else LayerNormWithoutParameters
    attention = ModuleSpec(
        module=RecomputedAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnLinear,
            core_attention=CoreAttention,
            linear_proj=RowLinear,
            q_layernorm=RMSNorm if model.qk_norm else None,
            k_layernorm=RMSNorm if model.qk_norm else None,
        ),
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            # Not a ModuleSpec for GatedMLP: megatron-core warns about every spec of a class that it does not know.
            mlp=GatedMLP if llama else ModuleSpec(module=MLP, submodules=_LINEAR_LAYERS),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)
