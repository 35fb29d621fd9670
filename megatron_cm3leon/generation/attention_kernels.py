"""Triton kernels of attention in one decoding step: one new position per row over what its cache holds.

`attend_kernel` normalizes and rotates the new queries and keys (QK-norm, RoPE), writes the new key and value to the
cache, and attends over CHUNK positions per program; programs beyond a row's length return immediately.
`combine_kernel` combines the chunks. Both read lengths on the device: only data changes between steps, so a CUDA graph
can replay them.

Layouts: qkv [B, N + 2 G, D] (queries, keys, values of the new token), cache [B, G, C, D], partial results
[B, N, chunks, D] with their maxima and sums [B, N, chunks]. N heads, G heads of keys (N / G queries share one).
"""

import triton
import triton.language as tl

from megatron_cm3leon.generation.kernels import await_previous

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def rotate_heads(
    head_ptr, gain_ptr, cosine_ptr, sine_ptr, present, epsilon,
    D: tl.constexpr, QK_NORM: tl.constexpr, ROPE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """fp32 [M, BLOCK_D] of heads at `head_ptr` [M, 1]: RMS-normalized, then dimensions d and d + D/2 rotated."""
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = present & (d < D)
    x = tl.load(head_ptr + d, mask=inside, other=0.0).to(tl.float32)
    squares = tl.sum(x * x, axis=1)[:, None]
    # 1 without QK-norm, computed from a sum over the head: the sum keeps the loads in rows. Otherwise each thread loads
    # all that its part of the tensor cores' product needs, and the kernel takes 254 registers instead of 80.
    factor = tl.rsqrt(squares / D + epsilon) if QK_NORM else tl.where(squares >= 0, 1.0, squares)
    x *= factor
    if QK_NORM:
        x *= tl.load(gain_ptr + d, mask=inside, other=0.0).to(tl.float32)
    if ROPE:
        other = (d + D // 2) % D
        partner = tl.load(head_ptr + other, mask=inside, other=0.0).to(tl.float32) * factor
        if QK_NORM:
            partner *= tl.load(gain_ptr + other, mask=inside, other=0.0).to(tl.float32)
        x = x * tl.load(cosine_ptr + d, mask=d < D, other=0.0) + partner * tl.load(sine_ptr + d, mask=d < D, other=0.0)
    return x


@triton.jit
def attend_kernel(
    qkv_ptr, keys_ptr, values_ptr, lengths_ptr, gain_ptr, cosine_ptr, sine_ptr, part_ptr, largest_ptr, sum_ptr,
    size, chunks, scale, epsilon,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, QK_NORM: tl.constexpr, ROPE: tl.constexpr,
    M: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One group of heads of one row over one chunk; M is 1, or at least 16 where queries share keys (tensor cores)."""
    await_previous(OVERLAP)
    SHARING: tl.constexpr = HEADS // GROUPS
    row, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    chunk = tl.program_id(1)
    newest = tl.load(lengths_ptr + row)
    if chunk * CHUNK > newest:
        return
    kind = keys_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    qkv_ptr += row * ((HEADS + 2 * GROUPS) * D)
    cosine_ptr += newest * D
    sine_ptr += newest * D
    member = tl.arange(0, M)[:, None]
    head = group * SHARING + member
    shared = member < SHARING
    query = rotate_heads(
        qkv_ptr + head * D, gain_ptr + head * D, cosine_ptr, sine_ptr, shared, epsilon, D, QK_NORM, ROPE, BLOCK_D
    ).to(kind)
    first = tl.zeros([1, 1], dtype=tl.int32) + HEADS + group
    key = rotate_heads(
        qkv_ptr + first * D, gain_ptr + first * D, cosine_ptr, sine_ptr, first >= 0, epsilon, D, QK_NORM, ROPE, BLOCK_D
    ).to(kind)
    value = tl.load(qkv_ptr + (HEADS + GROUPS + group) * D + d, mask=d < D, other=0.0).to(kind)[None, :]

    first_cached = (row * GROUPS + group).to(tl.int64) * size * D
    written = d[None, :] < tl.where(newest // CHUNK == chunk, D, 0)
    tl.store(keys_ptr + first_cached + newest * D + d[None, :], key, mask=written)
    tl.store(values_ptr + first_cached + newest * D + d[None, :], value, mask=written)

    position = chunk * CHUNK + tl.arange(0, CHUNK)
    filled = (position < newest)[:, None] & (d < D)[None, :]
    cached = first_cached + position[:, None] * D + d[None, :]
    new = (position == newest)[:, None]
    keys = tl.where(new, key, tl.load(keys_ptr + cached, mask=filled, other=0.0))
    values = tl.where(new, value, tl.load(values_ptr + cached, mask=filled, other=0.0))

    if M == 1:
        scores = tl.sum(query.to(tl.float32) * keys.to(tl.float32), axis=1)[None, :]
    else:
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
    scores = tl.where((position <= newest)[None, :], scores * (scale * LOG2_E), float("-inf"))
    largest = tl.max(scores, axis=1)
    shares = tl.exp2(scores - largest[:, None])
    if M == 1:
        part = tl.sum(tl.trans(shares) * values.to(tl.float32), axis=0)[None, :]
    else:
        part = tl.dot(shares.to(kind), values, input_precision="ieee")
    index = (row * HEADS + head) * chunks + chunk
    tl.store(part_ptr + index * D + d[None, :], part, mask=shared & (d < D)[None, :])
    tl.store(largest_ptr + index, largest[:, None], mask=shared)
    tl.store(sum_ptr + index, tl.sum(shares, axis=1)[:, None], mask=shared)


@triton.jit
def combine_kernel(
    part_ptr, largest_ptr, sum_ptr, lengths_ptr, y_ptr, chunks,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attention's output [B, N, D] of one head of one row; CHUNKS is a power of two >= `chunks`."""
    await_previous(OVERLAP)
    head = tl.program_id(0)
    used = tl.load(lengths_ptr + head // HEADS) // CHUNK + 1
    chunk, d = tl.arange(0, CHUNKS), tl.arange(0, BLOCK_D)
    index = head * chunks + chunk
    filled = chunk < used
    largest = tl.load(largest_ptr + index, mask=filled, other=float("-inf"))
    weight = tl.exp2(largest - tl.max(largest, axis=0))
    total = tl.sum(weight * tl.load(sum_ptr + index, mask=filled, other=0.0), axis=0)
    inside = filled[:, None] & (d < D)[None, :]
    parts = tl.load(part_ptr + index[:, None] * D + d[None, :], mask=inside, other=0.0)
    y = tl.sum(weight[:, None] * parts, axis=0) / total
    tl.store(y_ptr + head * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)
