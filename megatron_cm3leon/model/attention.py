"""The attention between the projections: causal or within samples, rotary positions, a sequence spread over ranks.

megatron-core calls it `core_attention`. Layout legend: S sequence, B batch, N heads of this rank, G heads of keys and
values of this rank, D width of a head.

Under parallel.context = C a sequence is 2 C chunks, and rank r holds chunks r and 2 C - 1 - r: each rank then has the
same share of a causal mask. Keys and values are gathered, queries stay.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

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


def context_places(length: int, rank: int, size: int) -> torch.Tensor:
    """Places [length / size] in the whole sequence of the tokens that one context-parallel rank holds."""
    chunks = torch.arange(length).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


@lru_cache(maxsize=8)
def _gathered_order(length: int, size: int) -> torch.Tensor:
    """For each place of the whole sequence, where ranks' parts one behind another hold it."""
    return torch.cat([context_places(length, rank, size) for rank in range(size)]).argsort()


@lru_cache(maxsize=8)
def _causal_angles(length: int, width: int, base: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return _angles(torch.arange(length, device=device)[None], width, base)


def _angles(positions_BS: torch.Tensor, width: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [B, 1, S, D] of the rotary angles; fp32 (RoFormer, arXiv 2104.09864)."""
    rates = base ** (torch.arange(0, width, 2, device=positions_BS.device, dtype=torch.float32) / -width)
    angles = positions_BS[:, None, :, None].float() * rates
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(states_BNSD: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate dimension d with d + D/2, as LLaMA's Hugging Face form pairs them."""
    left, right = states_BNSD.chunk(2, dim=-1)
    turned = torch.cat([-right, left], dim=-1)
    return (states_BNSD * cosine + turned * sine).to(states_BNSD.dtype)


class CoreAttention(torch.nn.Module):
    """megatron-core's `core_attention` by torch's scaled-dot-product attention (flash where there is one).

    Causal without a mask tensor. Where `attention_mask` [2, B, S] is given, it holds each token's sample and its
    position in that sample, over the whole sequence, and a token sees only tokens of its own sample.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        rope_base: float = 0.0,
        **groups,
    ) -> None:
        """`rope_base` 0: queries and keys are not rotated."""
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal, f"attention of type {attn_mask_type} is not built here"
        self.dropout, self.softmax_scale, self.rope_base = config.attention_dropout, softmax_scale, rope_base
        self.context = parallel_state.get_context_parallel_group() if config.context_parallel_size > 1 else None

    def forward(self, query_SBND, key_SBGD, value_SBGD, attention_mask=None, **options) -> torch.Tensor:
        """Attend; queries are [S, B, N, D], keys and values [S, B, G, D], the result [S, B, N x D]."""
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query_SBND, key_SBGD, value_SBGD))
        if self.rope_base:
            query, key = self._rotate(query, key, attention_mask)
        if self.dropout and self.training:
            with get_cuda_rng_tracker().fork():  # each tensor-parallel rank drops in its own heads
                context = self._attend(query, key, value, attention_mask, self.dropout)
        else:
            context = self._attend(query, key, value, attention_mask, 0.0)
        length, batch = query_SBND.shape[:2]
        return context.permute(2, 0, 1, 3).reshape(length, batch, -1)

    def _places(self, local_length: int) -> torch.Tensor:
        """Places of this rank's tokens in the whole sequence."""
        return context_places(local_length * self.context.size(), self.context.rank(), self.context.size())

    def _rotate(self, query, key, mask):
        length, width = query.shape[-2:]
        whole = length * (self.context.size() if self.context else 1)
        if mask is None:
            cosine, sine = _causal_angles(whole, width, self.rope_base, query.device)
        else:
            cosine, sine = _angles(mask[1], width, self.rope_base)
        if self.context:
            places = self._places(length).to(query.device)
            cosine, sine = cosine[:, :, places], sine[:, :, places]
        return rotate(query, cosine, sine), rotate(key, cosine, sine)

    def _attend(self, query, key, value, mask, dropout: float) -> torch.Tensor:
        if self.context:
            return self._attend_across_ranks(query, key, value, mask, dropout)
        grouped = query.shape[1] != key.shape[1]
        if mask is not None:
            allowed = _same_sample(mask[0], mask[0]).tril()
            return self._attend_masked(query, key, value, allowed, dropout)
        on_cpu_in_bf16 = query.dtype == torch.bfloat16 and query.device.type == "cpu"
        if on_cpu_in_bf16 and not grouped and query.shape[2] <= LONGEST_WRITTEN_OUT:
            return attend_written_out(query, key, value, self.softmax_scale, dropout)
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

    def _attend_across_ranks(self, query, key, value, mask, dropout: float) -> torch.Tensor:
        """Each half of this rank's queries against the keys up to its own end."""
        length, size = query.shape[2], self.context.size()
        order = _gathered_order(length * size, size).to(query.device)
        both = torch.stack([key, value]).permute(3, 0, 1, 2, 4).contiguous()
        both = gather_from_sequence_parallel_region(both, group=self.context)
        key, value = both[order].permute(1, 2, 3, 0, 4)
        places = self._places(length).to(query.device)
        halves = []
        for chunk, rows in zip(query.chunk(2, dim=2), places.chunk(2), strict=True):
            end = int(rows[-1]) + 1
            allowed = torch.arange(end, device=query.device) <= rows[:, None]
            if mask is not None:
                allowed = allowed & _same_sample(mask[0][:, rows], mask[0][:, :end])
            halves.append(self._attend_masked(chunk, key[:, :, :end], value[:, :, :end], allowed, dropout))
        return torch.cat(halves, dim=2)


def _same_sample(rows_BS: torch.Tensor, columns_BS: torch.Tensor) -> torch.Tensor:
    """Whether a query and a key are of one sample, bool [B, 1, S, S]."""
    return rows_BS[:, None, :, None] == columns_BS[:, None, None, :]
