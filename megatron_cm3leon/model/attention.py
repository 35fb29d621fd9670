"""Attention between the projections: causal or per sample, with rotary positions and context parallelism.

megatron-core calls it `core_attention`. Layout legend: S sequence, B batch, N heads of this rank, G heads of keys and
values of this rank, D width of a head.

With parallel.context = C a sequence is divided into 2 C chunks, and rank r holds chunks r and 2 C - 1 - r, so that all
ranks have the same share of a causal mask. Keys and values are gathered, queries are not.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.attention.flex_attention import BlockMask

from megatron_cm3leon.model.collectives import gather_sequence
from megatron_cm3leon.model.rotary import rotate
from megatron_cm3leon.model.sample_attention import attend_samples

LONGEST_UNFUSED = 256
"""Longest sequence for which bf16 on a CPU uses `attend_unfused`. Forward and backward of 16 x 160 tokens take 16 ms
instead of 38 (4 heads of 48), of 16 x 256 tokens 46 instead of 63; from 512 tokens on torch's kernel is faster."""


def attend_unfused(query, key, value, scale: float | None = None, dropout: float = 0.0) -> torch.Tensor:
    """Causal attention as two matrix products and an fp32 softmax; arguments and result are [B, N, S, D].

    `dropout` is the probability that an attention weight is dropped.
    """
    length, width = query.shape[-2:]
    future = torch.full((length, length), -torch.inf, device=query.device).triu(1)
    scores = (query * (scale or width**-0.5)) @ key.transpose(-1, -2)
    weights = (scores.float() + future).softmax(-1).to(value.dtype)
    return F.dropout(weights, dropout) @ value if dropout else weights @ value


WIDTH_FOR_BF16_GRADIENT = 64
"""Below this head width the gradient of bf16 attention on a CPU is computed in fp32. With 8 x 512 tokens: 48 ms instead
of 104 for a width of 16, 32 instead of 50 for 32, 28 instead of 33 for 48; equal for 64, slower above."""


class _AttentionWithFp32Gradient(torch.autograd.Function):
    """Causal attention by torch's flash kernels for CPUs: forward in bf16, backward in fp32."""

    @staticmethod
    def forward(ctx, query, key, value, scale):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, log_sums = flash(query, key, value, 0.0, True, scale=scale)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx, gradient):
        *states, log_sums = ctx.saved_tensors
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        in_fp32 = [state.float() for state in (gradient, *states)]
        gradients = flash(*in_fp32, log_sums, 0.0, True, scale=ctx.scale)
        return *(each.to(gradient.dtype) for each in gradients), None


def context_positions(length: int, rank: int, size: int) -> torch.Tensor:
    """Positions [length / size] in the whole sequence of the tokens that one context-parallel rank holds."""
    chunks = torch.arange(length).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


class CoreAttention(torch.nn.Module):
    """megatron-core's `core_attention` on torch's scaled-dot-product attention (a flash kernel where one exists).

    Causal without a mask tensor. `attention_mask` [2, B, S], if given, holds the sample of each token and its position
    in that sample, over the whole sequence; a token then attends only to tokens of its own sample.

    `attention_bias` are the LayerInputs of sample_attention.py: among the arguments that megatron-core passes through
    its layers, it is the only one that recomputation does not save again and that need not be a tensor.
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
        assert attn_mask_type == AttnMaskType.causal, f"mask type {attn_mask_type} is not supported"
        self.dropout, self.softmax_scale = config.attention_dropout, softmax_scale
        self.sequence_parallel = config.sequence_parallel
        self.context = config.context_parallel_size
        """Number of ranks that share a sequence."""
        if self.context > 1:
            group = parallel_state.get_context_parallel_group()
            self.context_rank, self.context_name = group.rank(), group.group_name

    def forward(
        self, query_SBND, key_SBGD, value_SBGD, attention_mask=None, attention_bias=None, **options
    ) -> torch.Tensor:
        """Attend; queries are [S, B, N, D], keys and values [S, B, G, D], the result [S, B, N x D]."""
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query_SBND, key_SBGD, value_SBGD))
        angles, block_mask = attention_bias or (None, None)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        if block_mask is not None:
            context = self._attend_samples(query, key, value, block_mask)
        elif self.dropout and self.training:
            context = self._attend_with_dropout(query, key, value, attention_mask)
        else:
            context = self._attend(query, key, value, attention_mask, 0.0)
        length, batch = query_SBND.shape[:2]
        return context.permute(2, 0, 1, 3).reshape(length, batch, -1)

    @torch.compiler.disable
    def _attend_with_dropout(self, query, key, value, mask) -> torch.Tensor:
        """Attend with dropout masks that differ between tensor-parallel ranks.

        Not compiled, because a graph cannot contain generator states. With sequence parallelism the whole layer draws
        from the model-parallel generator already. Entering it again would give other masks on recomputation, which
        restores the generator but not megatron-core's name for it.
        """
        with nullcontext() if self.sequence_parallel else get_cuda_rng_tracker().fork():
            return self._attend(query, key, value, mask, self.dropout)

    def _attend_samples(self, query, key, value, block_mask: BlockMask) -> torch.Tensor:
        if self.context > 1:
            key, value = self._gather_keys(key, value)
        return attend_samples(query, key, value, block_mask, self.softmax_scale)

    def _attend(self, query, key, value, mask, dropout: float) -> torch.Tensor:
        if self.context > 1:
            return self._attend_across_ranks(query, key, value, mask, dropout)
        grouped = query.shape[1] != key.shape[1]
        if mask is not None:
            allowed = _same_sample(mask[0], mask[0]).tril()
            return self._attend_masked(query, key, value, allowed, dropout)
        on_cpu_in_bf16 = query.dtype == torch.bfloat16 and query.device.type == "cpu"
        if on_cpu_in_bf16 and not grouped and query.shape[2] <= LONGEST_UNFUSED:
            return attend_unfused(query, key, value, self.softmax_scale, dropout)
        if on_cpu_in_bf16 and not dropout and query.shape[3] < WIDTH_FOR_BF16_GRADIENT:
            key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
            return _AttentionWithFp32Gradient.apply(query, key, value, self.softmax_scale)
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
        )

    def _attend_masked(self, query, key, value, allowed, dropout: float) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=allowed,
            dropout_p=dropout,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _gather_keys(self, key, value) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather the keys and values of the whole sequence, in the order of the sequence."""
        both = torch.stack([key, value]).permute(3, 0, 1, 2, 4).contiguous()
        chunks = gather_sequence(both, self.context_name).chunk(2 * self.context)  # rank 0's two, rank 1's two ...
        key, value = torch.cat([*chunks[::2], *chunks[1::2][::-1]]).permute(1, 2, 3, 0, 4)
        return key, value

    def _attend_across_ranks(self, query, key, value, mask, dropout: float) -> torch.Tensor:
        """Attend with each of this rank's two chunks of queries to the keys up to the end of that chunk."""
        key, value = self._gather_keys(key, value)
        length, results = query.shape[2] // 2, []
        numbers = self.context_rank, 2 * self.context - 1 - self.context_rank
        for number, chunk in zip(numbers, query.chunk(2, dim=2), strict=True):
            start, end = number * length, (number + 1) * length
            columns = torch.arange(end, device=query.device)
            allowed = columns <= columns[start:, None]
            if mask is not None:
                allowed = allowed & _same_sample(mask[0][:, start:end], mask[0][:, :end])
            results.append(self._attend_masked(chunk, key[:, :, :end], value[:, :, :end], allowed, dropout))
        return torch.cat(results, dim=2)


def _same_sample(rows_BS: torch.Tensor, columns_BS: torch.Tensor) -> torch.Tensor:
    """Whether a query and a key belong to the same sample, bool [B, 1, S, S]."""
    return rows_BS[:, None, :, None] == columns_BS[:, None, None, :]
