"""Matrices of the decoder: how x W^T is computed fastest where few rows of x meet large W.

Reading W is what a step of generation costs. On a CPU oneDNN reads it from a layout of its own (measured on two AVX-512
cores: a 4096 x 1024 matrix in bf16 0.6 ms instead of 0.9, in fp32 and two rows 1.4 instead of 2.6); int8 reads half or
a quarter of the bytes.

int8 keeps one scale an output channel. A GPU multiplies in the type of x (weight-only); a CPU has a fast kernel for
int8 x int8 alone, so there each row of x gets 8 bits and a scale of its own, which no other row of the batch changes.
"""

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST_PACKED = 1 << 19
"""Elements from which an fp32 matrix gains from oneDNN's layout."""
LEVELS = 127


class Matrix:
    """Computes x [..., in] -> [..., out]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)

    @property
    def bytes(self) -> int:
        """What one multiplication reads."""
        return self.weight.nbytes


class PackedMatrix(Matrix):
    """In oneDNN's own layout (CPU)."""

    def __init__(self, weight: Tensor) -> None:
        self.size = weight.nbytes
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")

    @property
    def bytes(self) -> int:
        return self.size


class Int8Matrix(Matrix):
    """Weight-only int8: multiplied in the type of x."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.scale = quantize_rows(weight)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)


class Int8CpuMatrix(Matrix):
    """int8 x int8 by oneDNN. Rows of x are shifted to 0..255, and the bias takes the shift off again."""

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
        # 1 to 255, 128 for 0; the half rounds what the conversion cuts.
        levels = torch.add(self.middle, rows / largest, alpha=LEVELS).to(torch.uint8)
        made = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, 0, self.weight, self.scale, self.zero, self.shift, 1.0, 0, torch.float32, "none", [], ""
        )
        return made.mul_(largest).to(x.dtype).view(*x.shape[:-1], -1)

    @property
    def bytes(self) -> int:
        return self.size


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 levels of W's shape and fp32 scales [out]: W is about levels x scale, the largest of a row 127 levels."""
    weight = weight.float()
    scale = (weight.abs().amax(1) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def build_matrix(weight: Tensor, int8: bool = False) -> Matrix:
    """The fastest form of a matrix [out, in] on its device and in its type."""
    on_cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if int8:
        return Int8CpuMatrix(weight) if on_cpu else Int8Matrix(weight)
    if on_cpu and (
        (weight.dtype == torch.float32 and weight.numel() >= SMALLEST_PACKED)
        or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    ):
        return PackedMatrix(weight)
    return Matrix(weight)
