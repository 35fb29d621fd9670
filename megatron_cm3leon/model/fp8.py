"""Matrix products in 8-bit floating point (train.fp8): operands with a scale per tensor, sums in fp32.

The recipe is torchao's default for training ("tensorwise": torchao/float8/config.py, which torchtitan uses too): inputs
and weights in e4m3, gradients in e5m2, each scaled so that its largest number is near the type's; fast accumulation in
the forward product alone. Scales are powers of two (torchao's round_scales_to_power_of_2): scaling rounds nothing, and
a number's 8 bits do not depend on which rank's part of a tensor it is in, but for the smallest and largest numbers.

On CUDA (sm_89 or later) the product is torch._scaled_mm; on a CPU, whose _scaled_mm is a thousand times slower, the
same numbers are multiplied in bf16, so that a training run can be tried there.

Layout legend: M, N, K rows of both operands and the dimension summed over.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
"""Types of inputs and weights, and of gradients."""
MULTIPLE = 16
"""torch._scaled_mm's kernels need sizes divisible by this."""
_SMALLEST = 2.0**-64
"""Tensors whose largest number is below it are scaled as if it were this."""


class Quantized(NamedTuple):
    """A matrix: `values` x `inverse`."""

    values: torch.Tensor
    """fp8, row-major."""
    inverse: torch.Tensor
    """fp32, a scalar and a power of two."""

    def transposed(self) -> "Quantized":
        """The same numbers with rows and columns exchanged; a copy of one byte per number."""
        return Quantized(self.values.t().contiguous(), self.inverse)


def quantize(matrix: torch.Tensor, dtype: torch.dtype) -> Quantized:
    """A bf16 or fp32 matrix in fp8; infinities and NaN stay no numbers."""
    scale = _quantize if not matrix.is_cuda or torch.compiler.is_compiling() else _compiled_quantize()
    return Quantized(*scale(matrix, dtype))


def multiply(left_MK: Quantized, right_NK: Quantized, dtype: torch.dtype, fast: bool = False) -> torch.Tensor:
    """left x right transposed, [M, N] of `dtype`; `fast`: Hopper's sums of fewer bits."""
    if left_MK.values.is_cuda:
        scales = {"scale_a": left_MK.inverse, "scale_b": right_NK.inverse}
        return torch._scaled_mm(
            left_MK.values, right_NK.values.t(), **scales, out_dtype=dtype, use_fast_accum=fast
        )  # its second operand must be column-major
    product = _decode(left_MK.values) @ _decode(right_NK.values).t()
    return (product.float() * (left_MK.inverse * right_NK.inverse)).to(dtype)


def require_fp8(capability: tuple[int, int]) -> None:
    """ValueError for a GPU whose compute capability has no fp8 products."""
    if capability < (8, 9):
        raise ValueError(
            f"train.fp8 (True) needs a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell); this one has "
            f"{capability[0]}.{capability[1]}: use train.fp8=false."
        )


def _quantize(matrix: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    largest = matrix.abs().amax().float().clamp(min=_SMALLEST)
    # The power of two at or below the ratio: its exponent's bits alone. Of an infinite number the scale is 0, of NaN
    # infinite, so that the values become NaN.
    scale = ((torch.finfo(dtype).max / largest).view(torch.int32) & 0x7F800000).view(torch.float32)
    return (matrix * scale.to(matrix.dtype)).to(dtype), scale.reciprocal()


def _decode(values: torch.Tensor) -> torch.Tensor:
    """fp8 as bf16; looked up, which on a CPU takes a sixth of torch's conversion of e4m3."""
    if torch.compiler.is_compiling():
        return values.bfloat16()
    numbers = values.contiguous().view(torch.uint8).view(-1).int()
    return _all_numbers(values.dtype).index_select(0, numbers).view(values.shape)


@lru_cache
def _all_numbers(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).bfloat16()


@lru_cache(maxsize=1)
def _compiled_quantize():
    """One kernel for the largest number, one for scaling and conversion; of any shape."""
    return torch.compile(_quantize, dynamic=True)
