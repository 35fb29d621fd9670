"""Triton kernels of one decoding step of a few rows (1-4): six launches per layer, see fused_step.py.

Each program of `multiply_kernel` reads BLOCK_N rows of a weight matrix once and multiplies them by all rows of x, in
fp32. The norm before a matrix needs no pass of its own, because the statistics of x are summed in the same loop:

    LayerNorm without parameters   W (x - mean) / std = (W x - mean W 1) / std     (W 1: sums of the weight's rows)
    RMSNorm                        W (g x) / rms

Weights are fp32, bf16, fp16, int8 or fp8 e4m3, the last two with one fp32 scale per output row. Layouts: x [ROWS, K],
W [N, K], cache [B, G, C, D] (sequences, heads of keys, positions, width of a head), all contiguous.

With OVERLAP (sm_90: programmatic dependent launch) a kernel starts before the previous one has ended, and waits for it
before it accesses memory.

Loop bounds are compile-time constants: the interpreter (TRITON_INTERPRET=1) of Triton 3.6 cannot loop to a number
known only at run time under NumPy >= 2.4.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

NO_NORM, LAYER_NORM, RMS_NORM = 0, 1, 2
STORE, RELU, GELU, SWIGLU, ADD = 0, 1, 2, 3, 4
"""What happens to a product: stored, activation, gate and up rows combined, or added to the output."""


@triton.jit
def await_previous(OVERLAP: tl.constexpr):
    """Let the next kernel start, and wait until everything that the previous one wrote is visible."""
    if OVERLAP:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()


@triton.jit
def embed_kernel(
    ids_ptr, words_ptr, positions_ptr, lengths_ptr, state_ptr, hidden,
    LEARNED: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Embedding of each row's token, plus its learned position if LEARNED; ids and lengths are int64."""
    await_previous(OVERLAP)
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden
    state = tl.load(words_ptr + tl.load(ids_ptr + row) * hidden + columns, mask=inside).to(tl.float32)
    if LEARNED:
        position = tl.load(lengths_ptr + row)
        state += tl.load(positions_ptr + position * hidden + columns, mask=inside).to(tl.float32)
    tl.store(state_ptr + row * hidden + columns, state.to(state_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_lanes(values, SIZE: tl.constexpr, LANE: tl.constexpr):
    """Sums of LANE adjacent values of [SIZE]: one accumulator for each load of a thread."""
    return tl.sum(tl.reshape(values, [SIZE // LANE, LANE]), axis=1)


@triton.jit
def accumulate(
    sums, w, x_ptr, gain_ptr, columns, inside,
    NORM: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """Add one tile and one row of x to `sums` (products, x, squares of x)."""
    products, plain, squares = sums
    x = (tl.load(x_ptr + columns, mask=inside, other=0.0) if MASKED else tl.load(x_ptr + columns)).to(tl.float32)
    if NORM == 1:
        plain += sum_lanes(x, BLOCK_K, LANE)
    if NORM != 0:
        squares += sum_lanes(x * x, BLOCK_K, LANE)
    if NORM == 2:
        gain = tl.load(gain_ptr + columns, mask=inside, other=0.0) if MASKED else tl.load(gain_ptr + columns)
        x *= gain.to(tl.float32)
    tile = tl.reshape(w * x[None, :], [BLOCK_N, BLOCK_K // LANE, LANE])
    return products + tl.sum(tile, axis=2), plain, squares


@triton.jit
def finish(
    sums, scale, weight_sums, epsilon, y_ptr, start, N,
    K: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, EPILOGUE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Reduce the sums of a row, apply norm and epilogue, and write the row at `y_ptr`."""
    products, plain, squares = sums
    values = tl.sum(products, axis=1)
    if SCALED:
        values *= scale
    if NORM == 1:
        mean = tl.sum(plain, axis=0) / K
        variance = tl.maximum(tl.sum(squares, axis=0) / K - mean * mean, 0.0)
        values = (values - mean * weight_sums) * tl.rsqrt(variance + epsilon)
    if NORM == 2:
        values *= tl.rsqrt(tl.sum(squares, axis=0) / K + epsilon)
    if EPILOGUE == 3:
        gate, up = tl.split(tl.reshape(values, [BLOCK_N // 2, 2]))
        units = start // 2 + tl.arange(0, BLOCK_N // 2)
        tl.store(y_ptr + units, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=units < N // 2)
    else:
        units = start + tl.arange(0, BLOCK_N)
        if EPILOGUE == 1:
            values = tl.maximum(values, 0.0)
        if EPILOGUE == 2:
            values = 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))
        if EPILOGUE == 4:
            values += tl.load(y_ptr + units, mask=units < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + units, values.to(y_ptr.dtype.element_ty), mask=units < N)


@triton.jit(do_not_specialize_on_alignment=["w_ptr"])
def multiply_kernel(
    x_ptr, w_ptr, scale_ptr, weight_sums_ptr, gain_ptr, y_ptr, N, epsilon,
    K: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LANE: tl.constexpr, UNROLL: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """y = epilogue(norm(x) W^T); `weight_sums` are W 1 (LAYER_NORM), `gain` is RMS_NORM's weight, N rows of W.

    A thread loads LANE adjacent values of a row of x and of W at a time, so that x does not go through shared memory:
    that is why the alignment of W (16 int8 values) is not used.
    """
    await_previous(OVERLAP)
    start = tl.program_id(0) * BLOCK_N
    rows = start + tl.arange(0, BLOCK_N)
    present = rows < N
    if EPILOGUE == 3:  # gate and up of a unit are adjacent in the tile
        rows = rows // 2 + (rows % 2) * (N // 2)
    rows = tl.where(present, rows, 0)
    within = tl.arange(0, BLOCK_K)
    MASKED: tl.constexpr = K % BLOCK_K != 0
    BYTES: tl.constexpr = LANE * w_ptr.dtype.element_ty.primitive_bitwidth // 8
    weights = tl.multiple_of(w_ptr + rows.to(tl.int64)[:, None] * K + within[None, :], [BYTES, BYTES])
    lanes = tl.zeros([BLOCK_K // LANE], dtype=tl.float32)
    none = (tl.zeros([BLOCK_N, BLOCK_K // LANE], dtype=tl.float32), lanes, lanes)
    sums0 = none
    sums1 = none
    sums2 = none
    sums3 = none
    for column in tl.range(0, K, BLOCK_K, loop_unroll_factor=UNROLL):
        columns = column + within
        inside = columns < K
        tile = tl.multiple_of(weights + column, [BYTES, BYTES])
        if MASKED:
            w = tl.load(tile, mask=inside[None, :], other=0.0, eviction_policy="evict_first").to(tl.float32)
        else:
            w = tl.load(tile, eviction_policy="evict_first").to(tl.float32)
        sums0 = accumulate(sums0, w, x_ptr, gain_ptr, columns, inside, NORM, MASKED, BLOCK_N, BLOCK_K, LANE)
        if ROWS > 1:
            x1_ptr = x_ptr + K
            sums1 = accumulate(sums1, w, x1_ptr, gain_ptr, columns, inside, NORM, MASKED, BLOCK_N, BLOCK_K, LANE)
        if ROWS > 2:
            x2_ptr = x_ptr + 2 * K
            sums2 = accumulate(sums2, w, x2_ptr, gain_ptr, columns, inside, NORM, MASKED, BLOCK_N, BLOCK_K, LANE)
        if ROWS > 3:
            x3_ptr = x_ptr + 3 * K
            sums3 = accumulate(sums3, w, x3_ptr, gain_ptr, columns, inside, NORM, MASKED, BLOCK_N, BLOCK_K, LANE)
    scale = tl.load(scale_ptr + rows) if SCALED else 1.0
    weight_sums = tl.load(weight_sums_ptr + rows) if NORM == 1 else 0.0
    width = N // 2 if EPILOGUE == 3 else N
    finish(sums0, scale, weight_sums, epsilon, y_ptr, start, N, K, NORM, SCALED, EPILOGUE, BLOCK_N)
    if ROWS > 1:
        finish(sums1, scale, weight_sums, epsilon, y_ptr + width, start, N, K, NORM, SCALED, EPILOGUE, BLOCK_N)
    if ROWS > 2:
        finish(sums2, scale, weight_sums, epsilon, y_ptr + 2 * width, start, N, K, NORM, SCALED, EPILOGUE, BLOCK_N)
    if ROWS > 3:
        finish(sums3, scale, weight_sums, epsilon, y_ptr + 3 * width, start, N, K, NORM, SCALED, EPILOGUE, BLOCK_N)


@triton.jit
def finish_step_kernel(
    state_ptr, gain_ptr, y_ptr, lengths_ptr, epsilon,
    K: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """y = norm(state), one row per program; adds one to the row's length."""
    await_previous(OVERLAP)
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    x = tl.load(state_ptr + row * K + columns, mask=inside, other=0.0).to(tl.float32)
    if NORM == 1:
        x = tl.where(inside, x - tl.sum(x, axis=0) / K, 0.0)
    x *= tl.rsqrt(tl.sum(x * x, axis=0) / K + epsilon)
    if NORM == 2:
        x *= tl.load(gain_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * K + columns, x.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(lengths_ptr + row, tl.load(lengths_ptr + row) + 1)
