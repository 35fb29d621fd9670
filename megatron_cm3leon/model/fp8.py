"""Matrix products in 8-bit floating point (train.fp8): operands with a scale per tensor, sums in fp32.

The recipe is torchao's default for training ("tensorwise": torchao/float8/config.py, which torchtitan uses too): inputs
and weights in e4m3, gradients in e5m2, each scaled so that its largest number is near the type's; fast accumulation in
the forward product alone. Scales are powers of two (torchao's round_scales_to_power_of_2): scaling rounds nothing, and
a number's 8 bits do not depend on which rank's part of a tensor it is in, except for the smallest and largest numbers.

On CUDA (sm_89 or later) the product is torch._scaled_mm; on a CPU, whose _scaled_mm is a thousand times slower, the
same numbers are multiplied in bf16, so that a training run can be tried there.

A matrix is read twice: for its largest number, which inside a compiled layer is computed by the kernel that writes the
matrix, and by the conversion, one kernel (fp8_kernels.py), which also writes the transposed copy where it is needed.
_scaled_mm sums along contiguous rows of both operands: each of a layer's three matrices is needed in both forms.

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
"""Tensors whose largest number is smaller are scaled as if it were this."""
_CHUNK = 1 << 20


class Quantized(NamedTuple):
    """A matrix: `values` x `inverse`."""

    values: torch.Tensor
    """fp8, row-major."""
    inverse: torch.Tensor
    """fp32, a scalar and a power of two."""


def quantize(matrix: torch.Tensor, dtype: torch.dtype, largest: torch.Tensor | None = None) -> Quantized:
    """A bf16 or fp32 matrix in fp8; infinities and NaN become NaN. `largest`: find_largest() of `matrix`."""
    largest = find_largest(matrix) if largest is None else largest
    values, _, inverse = _convert(matrix.contiguous(), largest, dtype, True, False)
    return Quantized(values, inverse)


def quantize_transposed(matrix: torch.Tensor, dtype: torch.dtype) -> Quantized:
    """quantize() of the matrix with rows and columns exchanged."""
    _, transposed, inverse = _convert(matrix.contiguous(), find_largest(matrix), dtype, False, True)
    return Quantized(transposed, inverse)


def quantize_both_ways(
    matrix: torch.Tensor, dtype: torch.dtype, largest: torch.Tensor | None = None
) -> tuple[Quantized, Quantized]:
    """quantize() and quantize_transposed(), written in one pass."""
    largest = find_largest(matrix) if largest is None else largest
    values, transposed, inverse = _convert(matrix.contiguous(), largest, dtype, True, True)
    return Quantized(values, inverse), Quantized(transposed, inverse)


def find_largest(matrix: torch.Tensor) -> torch.Tensor:
    """The largest absolute value, a scalar; NaN if there is a NaN."""
    if torch.compiler.is_compiling():  # by rows first: this form is fused with the kernel of a norm or activation
        return matrix.abs().amax(-1).amax()
    return torch.linalg.vector_norm(matrix, torch.inf)


def multiply(left_MK: Quantized, right_NK: Quantized, dtype: torch.dtype, fast: bool = False) -> torch.Tensor:
    """left x right transposed, [M, N] of `dtype`; `fast`: accumulation with fewer bits (Hopper)."""
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


@torch.library.custom_op("megatron_cm3leon::convert_to_fp8", mutates_args=())
def _convert(
    matrix: torch.Tensor, largest: torch.Tensor, dtype: torch.dtype, rows: bool, columns: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp8 in rows, fp8 transposed, and the inverse of the scale; what is not requested is empty."""
    values, transposed, inverse = _allocate(matrix, largest, dtype, rows, columns)
    if matrix.is_cuda:
        from megatron_cm3leon.model import fp8_kernels

        outputs = values if rows else None, transposed if columns else None
        fp8_kernels.convert(matrix, largest, _SMALLEST, *outputs, inverse)
        return values, transposed, inverse
    # The power of two at or below the ratio: only the bits of its exponent. For infinity the scale is 0, for NaN
    # infinite, so that the values become NaN.
    ratio = torch.finfo(dtype).max / largest.float().clamp(min=_SMALLEST)
    scale = (ratio.view(torch.int32) & 0x7F800000).view(torch.float32)
    converted = (matrix * scale.to(matrix.dtype)).to(dtype)
    if columns:
        transposed.copy_(converted.t())
    return converted if rows else values, transposed, scale.reciprocal()


@_convert.register_fake
def _allocate(matrix, largest, dtype, rows, columns):
    height, width = matrix.shape
    values = matrix.new_empty((height, width) if rows else (0, 0), dtype=dtype)
    transposed = matrix.new_empty((width, height) if columns else (0, 0), dtype=dtype)
    return values, transposed, largest.new_empty((), dtype=torch.float32)


def _decode(values: torch.Tensor) -> torch.Tensor:
    """fp8 as bf16, by table look-up: on a CPU this takes a sixth of the time of torch's conversion of e4m3."""
    if torch.compiler.is_compiling():
        return values.bfloat16()
    numbers = values.contiguous().view(torch.uint8).view(-1)
    decoded = torch.empty(numbers.shape, dtype=torch.bfloat16)
    for start in range(0, len(numbers), _CHUNK):  # indices take four times the memory
        part = slice(start, start + _CHUNK)
        torch.index_select(_all_numbers(values.dtype), 0, numbers[part].int(), out=decoded[part])
    return decoded.view(values.shape)


@lru_cache
def _all_numbers(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).bfloat16()
