"""int4 weights on a CPU, by torch's kernel: 16 levels, and a scale and a zero per group of 128 weights of a row (64 or
32 if 128 does not divide the row). That is 4.25 bits per weight.

The kernel is fast in bf16 (in fp32 thirty times slower, torch 2.13) and its time grows with the rows of x: 0.14 ms per
row for a 4096 x 1024 matrix on an AVX-512 core. A prompt has many rows, so above `FEW_ROWS` the levels are converted to
bf16, a part of the matrix at a time, and multiplied in bf16. Packing orders the levels of 64 rows for the vector
registers of the CPU; `find_packed_layout` determines that order instead of assuming it.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from megatron_cm3leon.generation.matrices import Matrix

GROUPS = (128, 64, 32)
"""Weights of a row that share a scale and a zero: the first that divides the row; else rows are padded to 32."""
LARGEST_LEVEL = 15
PACKED_ROWS = 64
"""Largest number of rows that are packed together; matrices are padded to a multiple of it."""
FEW_ROWS = 96
"""Largest number of rows of x for which torch's int4 kernel is used."""
ROWS_AT_ONCE = 256
"""Rows of a matrix that are quantized, or converted to bf16, at a time."""


class Int4Matrix(Matrix):
    """Computes x [..., in] -> [..., out] in bf16; the result has the type of x."""

    def __init__(self, weight: Tensor) -> None:
        if weight.device.type != "cpu":
            raise ValueError(f"int4 on {weight.device}: int4 is computed on a CPU only; use int8 or fp8 there.")
        self.units, width = weight.shape
        self.group = choose_group(width)
        self.extra = -width % self.group
        packed, scales = [], []
        for part in weight.split(ROWS_AT_ONCE):
            padded = functional.pad(part.float(), (0, self.extra, 0, -len(part) % PACKED_ROWS))
            levels, scale, zero = quantize_groups(padded, self.group)
            packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1))
            scales.append(torch.stack([scale, zero], -1).transpose(0, 1))
        self.weight = torch.cat(packed)
        self.scales_and_zeros = torch.cat(scales, 1).contiguous()
        """bf16 [groups of a row, out, 2]."""

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        rows = functional.pad(rows, (0, self.extra)) if self.extra else rows
        if len(rows) <= FEW_ROWS:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, self.group, self.scales_and_zeros)
        else:
            starts = range(0, len(self.weight), ROWS_AT_ONCE)
            y = torch.cat([functional.linear(rows, self.convert_rows(slice(n, n + ROWS_AT_ONCE))) for n in starts], -1)
        return y[:, : self.units].to(x.dtype).reshape(*x.shape[:-1], self.units)

    def convert_rows(self, part: slice) -> Tensor:
        """These rows, a multiple of 64, in bf16, with the padding columns."""
        levels = unpack_levels(self.weight[part]).float().unflatten(1, (-1, self.group))
        scale, zero = self.scales_and_zeros[:, part].float().transpose(0, 1).unbind(-1)
        return (levels - 8).mul_(scale[..., None]).add_(zero[..., None]).flatten(1).to(torch.bfloat16)

    @property
    def bytes(self) -> int:
        return self.weight.nbytes + self.scales_and_zeros.nbytes


def choose_group(width: int) -> int:
    """Weights of a row [width] that share a scale."""
    return next((group for group in GROUPS if width % group == 0), GROUPS[-1])


def quantize_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """int32 levels 0-15 of W's shape and bf16 scale and zero [out, groups]: W is about (level - 8) x scale + zero.

    The largest and the smallest weight of a group become levels 15 and 0, with scale and zero as bf16 rounds them.
    """
    grouped = weight.float().unflatten(1, (-1, group))
    lowest, highest = grouped.aminmax(dim=-1)
    scale = ((highest - lowest) / LARGEST_LEVEL).clamp(min=torch.finfo(torch.float32).tiny).to(torch.bfloat16)
    zero = (lowest + 8 * scale.float()).to(torch.bfloat16)
    levels = (grouped - zero.float()[..., None]).div_(scale.float()[..., None]).add_(8).round_()
    return levels.clamp_(0, LARGEST_LEVEL).to(torch.int32).flatten(1), scale, zero


@cache
def find_packed_layout() -> tuple[int, bool]:
    """How torch packs on this CPU: rows per block, and whether a byte holds adjacent rows or one of each half block."""
    rows = torch.arange(PACKED_ROWS, dtype=torch.int32)[:, None].expand(-1, GROUPS[-1]).contiguous()
    low, high = (torch.ops.aten._convert_weight_to_int4pack_for_cpu(part, 1) for part in (rows & 15, rows >> 4))
    for block in (64, 32, 16):  # 64 on AVX-512, 32 elsewhere
        for neighbors in (False, True):
            found = _unpack(low, block, neighbors) + 16 * _unpack(high, block, neighbors)
            if torch.equal(found.int(), rows):
                return block, neighbors
    raise AssertionError("torch packs int4 matrices in an unknown layout")


def unpack_levels(packed: Tensor) -> Tensor:
    """uint8 levels [out, in] of a packed matrix [out, in / 2] of a multiple of 64 rows."""
    return _unpack(packed, *find_packed_layout())


def _unpack(packed: Tensor, block: int, neighbors: bool) -> Tensor:
    rows, half = packed.shape
    columns = packed.view(rows // block, 2 * half, block // 2)
    low, high = columns & 15, columns >> 4
    levels = torch.stack([low, high], -1).flatten(-2) if neighbors else torch.cat([low, high], -1)
    return levels.transpose(1, 2).reshape(rows, 2 * half)
