"""Gumbel noise of one position in one Triton launch: the numbers of noise.py, computed inside a recorded step.

The integers are those of `noise.philox`; the noise is rounded from fp64 as there. On a CPU it runs in Triton's
interpreter (TRITON_INTERPRET=1), for tests.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
"""Groups of four ids per program."""


@triton.jit
def gumbel(bits):
    """fp32 noise of a 32-bit integer."""
    uniform = ((bits >> 9).to(tl.float64) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def gumbel_kernel(keys_ptr, position_ptr, groups_ptr, noise_ptr, count, BLOCK: tl.constexpr):
    """Noise [B, G, 4] of B keys [B, 2] and G groups at one position; keys and position are int64, below 2^32."""
    row = tl.program_id(1)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < count
    first = tl.load(keys_ptr + 2 * row).to(tl.uint32)
    second = tl.load(keys_ptr + 2 * row + 1).to(tl.uint32)
    b = tl.load(groups_ptr + number, mask=inside, other=0).to(tl.uint32)
    c = b * 0  # not tl.zeros: Triton's interpreter cannot run Triton's own compiled functions
    d = b * 0
    a = tl.load(position_ptr).to(tl.uint32) + c
    for _ in tl.static_range(10):
        high_a, low_a = tl.umulhi(a, 0xD2511F53), a * 0xD2511F53
        high_c, low_c = tl.umulhi(c, 0xCD9E8D57), c * 0xCD9E8D57
        a = high_c ^ b ^ first
        b = low_c
        c = high_a ^ d ^ second
        d = low_a
        first += 0x9E3779B9
        second += 0xBB67AE85
    noise_ptr += (row.to(tl.int64) * count + number) * 4
    tl.store(noise_ptr, gumbel(a), mask=inside)
    tl.store(noise_ptr + 1, gumbel(b), mask=inside)
    tl.store(noise_ptr + 2, gumbel(c), mask=inside)
    tl.store(noise_ptr + 3, gumbel(d), mask=inside)


def write_noise(keys: Tensor, position: Tensor, groups: Tensor, noise: Tensor) -> None:
    """Write Gumbel noise for one position into `noise` [B, 4 G].

    keys [B, 2]: one per sequence; groups [G]: of 4 ids each; position: a tensor [1].
    """
    count = len(groups)
    gumbel_kernel[(triton.cdiv(count, BLOCK), len(keys))](keys, position, groups, noise, count, BLOCK=BLOCK)
