"""Launches of the Triton products x W^T: for few rows (kernels.py) and for more (product_kernel below).

A matrix is its weight [N, K], fp32, bf16, fp16, int8 or fp8 e4m3, and for the last two a scale [N] per output row.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from megatron_cm3leon.generation.kernels import NO_NORM, STORE, multiply_kernel

MOST_ROWS = 4
"""Largest number of rows that `multiply_rows` takes."""
PROGRAMS = 512
"""Programs per matrix that keep the 132 multiprocessors of an H100 busy."""


@dataclass(frozen=True)
class Tile:
    """What one program reads at a time, and how it is compiled."""

    block_n: int
    """Rows of the weight."""
    block_k: int
    """Columns."""
    warps: int = 4
    unroll: int = 1


def choose_tile(rows: int, units: int, width: int, itemsize: int) -> Tile:
    """A tile for `rows` rows of x and a weight [units, width]: enough bytes in flight, enough programs."""
    block_k = min(1024, triton.next_power_of_2(width))
    block_n = 8 if rows <= 2 else 4
    while block_n > 2 and units // block_n < PROGRAMS:
        block_n //= 2
    return Tile(block_n, block_k, unroll=2 if itemsize == 1 and rows <= 2 and width >= 2 * block_k else 1)


def overlap_options(overlap: bool) -> dict:
    """Options of a launch that may start before the previous one has ended."""
    return {"OVERLAP": True, "launch_pdl": True} if overlap else {"OVERLAP": False}


def lane_width(width: int, itemsize: int) -> int:
    """Adjacent values of a row per load of a thread: at most 8 values and 16 bytes, a divisor of the row."""
    return min(width & -width, 4 if itemsize == 4 else 8)


def multiply_rows(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    out: Tensor,
    *,
    norm: int = NO_NORM,
    weight_sums: Tensor | None = None,
    gain: Tensor | None = None,
    epsilon: float = 0.0,
    epilogue: int = STORE,
    tile: Tile | None = None,
    overlap: bool = False,
) -> Tensor:
    """`out` [R, N] (SWIGLU: [R, N / 2]; ADD: added to) = epilogue(norm(x) W^T) for 1 to 4 rows x [R, K], contiguous."""
    units, width = weight.shape
    tile = tile or choose_tile(len(x), units, width, weight.element_size())
    # A kernel takes no None: x stands for a pointer that is not read.
    scale_or_any, sums_or_any, gain_or_any = (x if one is None else one for one in (scale, weight_sums, gain))
    multiply_kernel[(triton.cdiv(units, tile.block_n),)](
        x, weight, scale_or_any, sums_or_any, gain_or_any, out, units, epsilon, K=width, ROWS=len(x), NORM=norm,
        EPILOGUE=epilogue, SCALED=scale is not None, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        LANE=lane_width(width, x.element_size()), UNROLL=tile.unroll, num_warps=tile.warps,
        **overlap_options(overlap),
    )  # fmt: skip
    return out


@triton.jit
def product_kernel(
    x_ptr, w_ptr, scale_ptr, y_ptr, rows, units,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x W^T by tensor cores; each tile of W is converted to x's type in registers."""
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    unit = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + row.to(tl.int64)[:, None] * K + within[None, :]
    w_tile = w_ptr + unit.to(tl.int64)[None, :] * K + within[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for column in tl.range(0, K, BLOCK_K):
        inside = column + within < K
        x = tl.load(x_tile + column, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_tile + column, mask=(unit < units)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(x, w.to(x.dtype), total, input_precision="ieee")
    total *= tl.load(scale_ptr + unit, mask=unit < units, other=0.0)[None, :]
    y = y_ptr + row.to(tl.int64)[:, None] * units + unit[None, :]
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (unit < units)[None, :])


def product_blocks(rows: int, units: int, width: int) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, warps and stages."""
    block_m = min(128, max(16, triton.next_power_of_2(rows)))
    if block_m < 64:
        return block_m, 32 if units < 64 * 264 else 64, min(256, max(16, triton.next_power_of_2(width))), 4, 3
    return block_m, 128, min(64, max(16, triton.next_power_of_2(width))), 8, 3


def multiply_scaled(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [R, K] times an int8 or fp8 matrix, in the type of x, for any number of rows; W is not copied."""
    x = x.contiguous()
    units, width = weight.shape
    out = x.new_empty(len(x), units)
    if len(x) <= MOST_ROWS:
        return multiply_rows(x, weight, scale, out)
    block_m, block_n, block_k, warps, stages = product_blocks(len(x), units, width)
    product_kernel[(triton.cdiv(units, block_n), triton.cdiv(len(x), block_m))](
        x, weight, scale, out, len(x), units, K=width, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
