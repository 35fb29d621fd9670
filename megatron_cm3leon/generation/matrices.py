"""Matrices of the decoder: x W^T for few rows of x and a large W. matrix_kinds.py chooses one; int4 is in int4.py.

Reading W dominates the time of a generation step. On a CPU, oneDNN reads it from its own layout (measured on two
AVX-512 cores: a 4096 x 1024 matrix in bf16 0.6 ms instead of 0.9, in fp32 and two rows 1.4 instead of 2.6); int8 reads
half or a quarter of the bytes.

int8 and fp8 (e4m3) have one scale per output row. A GPU multiplies in the type of x (weight-only) with Triton kernels
that read the 8-bit matrix once and convert it in registers. A CPU has a fast kernel for int8 x int8 only, so there each
row of x is quantized to 8 bits with its own scale, which does not depend on other rows of the batch. fp8 on a CPU
converts the matrix for each product: as exact as on a GPU, and slow; it is there to measure the quality of fp8.
"""

import os

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST_PACKED = 1 << 19
"""Elements of the smallest fp32 matrix that is faster in oneDNN's layout."""
LEVELS = 127
"""Largest int8 level."""
FP8_LARGEST = 448.0
"""Largest value of e4m3."""


class Matrix:
    """Computes x [..., in] -> [..., out]."""

    scale: Tensor | None = None
    """fp32 [out] where `weight` is 8-bit levels."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)

    @property
    def bytes(self) -> int:
        """Bytes that one multiplication reads."""
        return self.weight.nbytes


class PackedMatrix(Matrix):
    """A matrix in oneDNN's layout (CPU)."""

    def __init__(self, weight: Tensor) -> None:
        self.size = weight.nbytes
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")

    @property
    def bytes(self) -> int:
        return self.size


class ScaledMatrix(Matrix):
    """int8 or fp8 levels with a scale per output row, multiplied in the type of x (weight-only)."""

    scale: Tensor

    def __init__(self, levels: Tensor, scale: Tensor) -> None:
        self.weight, self.scale = levels, scale

    def __call__(self, x: Tensor) -> Tensor:
        if uses_triton(x.device):
            from megatron_cm3leon.generation.products import multiply_scaled  # Triton is installed only with CUDA

            rows = multiply_scaled(x.reshape(-1, x.shape[-1]), self.weight, self.scale)
            return rows.view(*x.shape[:-1], -1)
        return functional.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)


class Int8CpuMatrix(Matrix):
    """int8 x int8 by oneDNN. Rows of x are shifted to 0..255; the bias subtracts the shift again."""

    def __init__(self, weight: Tensor) -> None:
        levels, scale = quantize_rows(weight)
        self.size, self.scale = levels.nbytes, scale / LEVELS
        self.shift = -(LEVELS + 1) * levels.sum(1, dtype=torch.int32).float() * self.scale
        self.zero = torch.zeros(len(levels), dtype=torch.int32)
        self.middle = torch.tensor(LEVELS + 1.5)
        self.weight = torch.ops.onednn.qlinear_prepack(levels, [1, levels.shape[1]])

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        largest = torch.linalg.vector_norm(rows, float("inf"), 1, keepdim=True, dtype=torch.float32)
        largest.clamp_(min=torch.finfo(torch.float32).tiny)
        # 1 to 255, 128 for 0; the half makes the conversion, which truncates, round.
        levels = torch.add(self.middle, rows / largest, alpha=LEVELS).to(torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, 0, self.weight, self.scale, self.zero, self.shift, 1.0, 0, torch.float32, "none", [], ""
        )
        return y.mul_(largest).to(x.dtype).view(*x.shape[:-1], -1)

    @property
    def bytes(self) -> int:
        return self.size


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 levels of W's shape and fp32 scales [out]: W is about levels x scale, the largest of a row 127 levels."""
    weight = weight.float()
    scale = (weight.abs().amax(1) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def quantize_rows_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp8 e4m3 levels of W's shape and fp32 scales [out]: the largest of a row becomes e4m3's largest number."""
    weight = weight.float()
    scale = (weight.abs().amax(1) / FP8_LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).to(torch.float8_e4m3fn), scale


def uses_triton(device: torch.device) -> bool:
    """Whether products on this device run in Triton: on a GPU, or on a CPU in Triton's interpreter (tests)."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
