"""Conversion of a matrix to fp8 on CUDA, in Triton: read once, written in rows and, in the same pass, transposed.

The numbers are those of fp8.py. Also runs in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1), as tests do.
"""

import contextlib

import torch
import triton
import triton.language as tl

TILE = 128
"""Rows and columns of a program: 128 bytes of fp8 along both."""
WARPS = 8


@triton.jit
def _convert(
    matrix, largest, values, transposed, inverse, rows, columns,
    TOP: tl.constexpr, SMALLEST: tl.constexpr, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile. The scale is the power of two at or below TOP / largest: only the bits of its exponent."""
    tile = tl.program_id(0)
    across = tl.cdiv(columns, TILE)
    row = (tile // across * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    column = (tile % across * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :]
    inside = (row < rows) & (column < columns)
    found = tl.load(largest).to(tl.float32)
    is_finite = found < float("inf")  # False for NaN, too
    ratio = tl.div_rn(TOP, tl.where(found < SMALLEST, SMALLEST, found))
    scale = (ratio.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    numbers = tl.load(matrix + row * columns + column, mask=inside, other=0.0).to(tl.float32) * scale
    # The conversion of a GPU would turn infinity into the largest number of the type.
    numbers = tl.where(is_finite, numbers, float("nan"))
    converted = numbers.to(values.dtype.element_ty)  # to the nearest, ties to even
    if ROWS:
        tl.store(values + row * columns + column, converted, mask=inside)
    if TRANSPOSED:
        row, column = tl.trans(row), tl.trans(column)
        tl.store(transposed + column * rows + row, tl.trans(converted), mask=(row < rows) & (column < columns))
    if tile == 0:
        tl.store(inverse, tl.div_rn(1.0, scale))


def convert(
    matrix: torch.Tensor,
    largest: torch.Tensor,
    smallest: float,
    values: torch.Tensor | None,
    transposed: torch.Tensor | None,
    inverse: torch.Tensor,
) -> None:
    """Fill `values` [rows, columns] and `transposed` [columns, rows], one of which may be None, and `inverse`."""
    rows, columns = matrix.shape
    programs = triton.cdiv(rows, TILE) * triton.cdiv(columns, TILE)
    some = transposed if values is None else values
    assert some is not None
    with torch.cuda.device(matrix.device) if matrix.is_cuda else contextlib.nullcontext():
        _convert[(programs,)](
            matrix,
            largest,
            some if values is None else values,
            some if transposed is None else transposed,
            inverse,
            rows,
            columns,
            TOP=torch.finfo(some.dtype).max,
            SMALLEST=smallest,
            ROWS=values is not None,
            TRANSPOSED=transposed is not None,
            TILE=TILE,
            num_warps=WARPS,
        )
