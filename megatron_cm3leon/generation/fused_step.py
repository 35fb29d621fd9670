"""One decoding step of 1 to 4 rows as six Triton launches per layer, with the results of `Decoder.advance`.

    norm + qkv | attention over chunks, with QK-norm, RoPE and the cache's new entry | combination of the chunks |
    out + residual | norm + fc1 + activation | fc2 + residual

A step reads each weight once and computes little: its time is bytes over bandwidth, plus launches. Rows are sequences,
including those of guidance's second stream. Nothing waits for the host and lengths are read on the device, so that a
CUDA graph can replay a step. On a CPU it runs in Triton's interpreter (TRITON_INTERPRET=1): slow, for tests.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from megatron_cm3leon.generation.attention_kernels import attend_kernel, combine_kernel
from megatron_cm3leon.generation.cache import Cache
from megatron_cm3leon.generation.decoder import Decoder, Layer
from megatron_cm3leon.generation.kernels import (
    ADD,
    GELU,
    LAYER_NORM,
    RELU,
    RMS_NORM,
    STORE,
    SWIGLU,
    embed_kernel,
    finish_step_kernel,
)
from megatron_cm3leon.generation.matrices import Matrix
from megatron_cm3leon.generation.products import MOST_ROWS, Tile, multiply_rows, overlap_options

CHUNK = 64
"""Positions of the cache per program of attention."""
_ACTIVATIONS = {"relu": RELU, "gelu": GELU, "silu": SWIGLU}


@dataclass(frozen=True)
class AttentionConstants:
    """Constants of the two kernels of attention for a shape."""

    members: int
    """Rows of queries per program: 1, or at least 16 (for tensor cores) if queries share keys."""
    block_d: int
    warps: int

    @classmethod
    def of(cls, heads: int, kv_heads: int, width: int) -> "AttentionConstants":
        sharing = heads // kv_heads
        members = 1 if sharing == 1 else max(16, triton.next_power_of_2(sharing))
        return cls(members, max(16, triton.next_power_of_2(width)), 4 if members == 1 else 8)


class _Buffers:
    """What a step of `rows` rows over a cache of `chunks` chunks writes; a CUDA graph keeps using them."""

    def __init__(self, decoder: Decoder, rows: int, chunks: int) -> None:
        shape, empty = decoder.shape, decoder.words.new_empty
        self.state, self.final = empty(rows, shape.hidden), empty(rows, shape.hidden)
        self.qkv = empty(rows, (shape.heads + 2 * shape.kv_heads) * shape.width)
        self.attended = empty(rows, shape.heads * shape.width)
        self.inner = empty(rows, shape.inner)
        self.part = empty(rows, shape.heads, chunks, shape.width, dtype=torch.float32)
        self.largest = empty(rows, shape.heads, chunks, dtype=torch.float32)
        self.sum = empty(rows, shape.heads, chunks, dtype=torch.float32)


class FusedStep:
    """`advance(ids, cache)` appends one token to each of at most 4 sequences."""

    def __init__(self, decoder: Decoder, tile: Tile | None = None, overlap: bool = False) -> None:
        """`tile` is used for every matrix (see products.py); None chooses one for each. With `overlap` (sm_90) a kernel
        starts before the previous one has ended."""
        self.decoder, self.tile, self.overlap = decoder, tile, overlap
        self.launch_options = overlap_options(overlap)
        shape = decoder.shape
        self.norm = LAYER_NORM if shape.learned_positions else RMS_NORM
        self.activation = _ACTIVATIONS[shape.activation if shape.learned_positions else "silu"]
        self.constants = AttentionConstants.of(shape.heads, shape.kv_heads, shape.width)
        self.weight_sums = [(sum_rows(one.qkv), sum_rows(one.inner)) for one in decoder.layers]
        self._buffers: dict[tuple[int, int], _Buffers] = {}

    @staticmethod
    def fits(rows: int) -> bool:
        """Whether these kernels take a step of `rows` sequences; for more, cuBLAS reads W as fast."""
        return rows <= MOST_ROWS

    def advance(self, ids_B: Tensor, cache: Cache) -> Tensor:
        """`Decoder.advance` over the filled positions of each sequence; returns the final hidden states [B, H], which
        the next step overwrites. Only `cache.keys`, `values` and `lengths` are read and written.
        """
        rows, size = len(ids_B), cache.keys[0].shape[2]
        if not self.fits(rows):
            raise ValueError(f"a fused step takes at most {MOST_ROWS} sequences, not {rows}; use Decoder.advance.")
        chunks = triton.cdiv(size, CHUNK)
        if (rows, chunks) not in self._buffers:
            self._buffers[rows, chunks] = _Buffers(self.decoder, rows, chunks)
        buffers = self._buffers[rows, chunks]
        self._embed(ids_B, cache.lengths, buffers)
        for number, layer in enumerate(self.decoder.layers):
            self._attend(layer, number, cache, buffers)
            self._feed_forward(layer, number, buffers)
        self._finish(cache.lengths, buffers)
        return buffers.final

    def logits(self, state_BH: Tensor, head: Matrix | None = None) -> Tensor:
        """fp32 logits of final hidden states; see `Decoder.logits`."""
        head = self.decoder.head() if head is None else head
        out = torch.empty(len(state_BH), len(head.weight), dtype=torch.float32, device=state_BH.device)
        return multiply_rows(state_BH, head.weight, head.scale, out, tile=self.tile, overlap=self.overlap)

    def _embed(self, ids_B: Tensor, lengths: Tensor, buffers: _Buffers) -> None:
        decoder, hidden = self.decoder, self.decoder.shape.hidden
        block = min(1024, triton.next_power_of_2(hidden))
        learned = decoder.positions is not None
        embed_kernel[(len(ids_B), triton.cdiv(hidden, block))](
            ids_B, decoder.words, decoder.positions if learned else decoder.words, lengths, buffers.state, hidden,
            LEARNED=learned, BLOCK=block, **self.launch_options,
        )  # fmt: skip

    def _attend(self, layer: Layer, number: int, cache: Cache, buffers: _Buffers) -> None:
        shape, constants, rows = self.decoder.shape, self.constants, len(buffers.state)
        self._normed_product(layer.qkv, layer.norms[0], self.weight_sums[number][0], buffers, buffers.qkv, STORE)
        keys, chunks = cache.keys[number], buffers.part.shape[2]
        rotary = self.decoder.angles is not None
        cosine, sine = self.decoder.angles or (buffers.part, buffers.part)
        shared = {"HEADS": shape.heads, "D": shape.width, "BLOCK_D": constants.block_d, "CHUNK": CHUNK}
        attend_kernel[(rows * shape.kv_heads, chunks)](
            buffers.qkv, keys, cache.values[number], cache.lengths, keys if layer.qk_norm is None else layer.qk_norm,
            cosine, sine, buffers.part, buffers.largest, buffers.sum, keys.shape[2], chunks, shape.width**-0.5,
            shape.epsilon, GROUPS=shape.kv_heads, QK_NORM=layer.qk_norm is not None, ROPE=rotary, M=constants.members,
            num_warps=constants.warps, **shared, **self.launch_options,
        )  # fmt: skip
        combine_kernel[(rows * shape.heads,)](
            buffers.part, buffers.largest, buffers.sum, cache.lengths, buffers.attended, chunks,
            CHUNKS=triton.next_power_of_2(chunks), **shared, **self.launch_options,
        )  # fmt: skip
        self._added_product(layer.out, buffers.attended, buffers)

    def _feed_forward(self, layer: Layer, number: int, buffers: _Buffers) -> None:
        sums = self.weight_sums[number][1]
        self._normed_product(layer.inner, layer.norms[1], sums, buffers, buffers.inner, self.activation)
        self._added_product(layer.outer, buffers.inner, buffers)

    def _normed_product(
        self,
        matrix: Matrix,
        gain: Tensor | None,
        weight_sums: Tensor,
        buffers: _Buffers,
        out: Tensor,
        epilogue: int,
    ) -> None:
        multiply_rows(
            buffers.state, matrix.weight, matrix.scale, out, norm=self.norm, weight_sums=weight_sums, gain=gain,
            epsilon=self.decoder.shape.epsilon, epilogue=epilogue, tile=self.tile, overlap=self.overlap,
        )  # fmt: skip

    def _added_product(self, matrix: Matrix, x: Tensor, buffers: _Buffers) -> None:
        multiply_rows(x, matrix.weight, matrix.scale, buffers.state, epilogue=ADD, tile=self.tile, overlap=self.overlap)

    def _finish(self, lengths: Tensor, buffers: _Buffers) -> None:
        shape, gain = self.decoder.shape, self.decoder.norm
        finish_step_kernel[(len(buffers.state),)](
            buffers.state, buffers.state if gain is None else gain, buffers.final, lengths, shape.epsilon,
            K=shape.hidden, NORM=self.norm, BLOCK=triton.next_power_of_2(shape.hidden), **self.launch_options,
        )  # fmt: skip


def sum_rows(matrix: Matrix, at_once: int = 4096) -> Tensor:
    """fp32 sums [N] over the rows of the weight, scaled: what LayerNorm subtracts from a product, per mean of x."""
    sums = torch.cat([part.float().sum(1) for part in matrix.weight.split(at_once)])
    return sums if matrix.scale is None else sums * matrix.scale
