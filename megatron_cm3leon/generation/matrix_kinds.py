"""Which kind of matrix the decoder multiplies by: chosen by device, type and quantization."""

import torch
from torch import Tensor

from megatron_cm3leon.generation.int4 import Int4Matrix
from megatron_cm3leon.generation.matrices import (
    SMALLEST_PACKED,
    Int8CpuMatrix,
    Matrix,
    PackedMatrix,
    ScaledMatrix,
    quantize_rows,
    quantize_rows_fp8,
    uses_triton,
)

QUANTIZED = ("int8", "fp8", "int4")
"""Kinds of quantized matrices."""


def build_matrix(weight: Tensor, quantized: str | None = None) -> Matrix:
    """The fastest kind for a weight [out, in] on its device, in its type or quantized to one of `QUANTIZED`.

    ValueError for int4 on a device that is not a CPU.
    """
    if quantized == "int4":
        return Int4Matrix(weight)
    if quantized == "fp8":
        return ScaledMatrix(*quantize_rows_fp8(weight))
    on_onednn = weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and not uses_triton(weight.device)
    if quantized == "int8":
        return Int8CpuMatrix(weight) if on_onednn else ScaledMatrix(*quantize_rows(weight))
    if on_onednn and _is_packed_faster(weight):
        return PackedMatrix(weight)
    return Matrix(weight)


def _is_packed_faster(weight: Tensor) -> bool:
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 and weight.numel() >= SMALLEST_PACKED
