"""Initial weights: every number is a function of (seed, parameter name, position), the same on every machine.

Parameters are drawn in blocks of 2^20 consecutive numbers of the flattened parameter. A block's generator is PCG64
with a key of 128 bits from (seed, name, block): any part of a parameter can be drawn without the rest, and by several
threads. The halves of its 64-bit integers become numbers in (-1, 1), and these a truncated normal by the inverse error
function. Integers and the operations of IEEE 754 are the same everywhere, and so is torch's `erfinv`: torch 2.11 and
2.13 and each value of ATEN_CPU_CAPABILITY give the same bits. (`trunc_normal_` and `uniform_(a, b)` do not.)
"""

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

VERSION = "pcg64-erfinv-1"
"""Names how weights are drawn; a run records it. Other numbers for the same (seed, name) need another version."""
BLOCK = 1 << 20
"""Numbers with one generator."""
CUT = 3.0
"""Standard deviations at which the normal is cut."""
_CHUNK = 1 << 15
"""Numbers transformed at once: they stay in the cache, and torch uses no further threads."""


def draw_truncated_normal(seed: int, name: str, start: int, stop: int, std: float) -> torch.Tensor:
    """Numbers [stop - start] of the flattened parameter `name`, from position `start` on; fp32, on the CPU.

    A normal distribution of standard deviation `std`, cut at CUT of them. Uses torch.get_num_threads() threads.
    """
    numbers = torch.empty(stop - start)
    blocks = range(start // BLOCK, -(-stop // BLOCK))

    def fill(block: int) -> None:
        first = block * BLOCK
        begin, end = max(start, first), min(stop, first + BLOCK)
        _fill_block(numbers[begin - start : end - start], _generator(seed, name, block), begin - first, std)

    with ThreadPoolExecutor(max(1, min(len(blocks), torch.get_num_threads()))) as pool:
        list(pool.map(fill, blocks))
    return numbers


def _generator(seed: int, name: str, block: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}/weights/{name}/{block}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def _fill_block(out: torch.Tensor, generator: np.random.Generator, skipped: int, std: float) -> None:
    """Fill `out` [n] with the numbers of a block from the position `skipped` on."""
    for begin in range(0, skipped + len(out), _CHUNK):
        end = min(begin + _CHUNK, skipped + len(out))
        words = generator.integers(0, 1 << 64, (end - begin + 1) // 2, dtype=np.uint64)  # two numbers in each
        if end <= skipped:
            continue
        bits = torch.from_numpy(words.view(np.int32))[max(0, skipped - begin) : end - begin]
        numbers = out[max(0, begin - skipped) : end - skipped]
        # 24 bits, centered: odd multiples of 2^-24 in (-1, 1), all of them exact in fp32.
        numbers.copy_(bits.bitwise_and_(0xFFFFFF)).sub_(2**23 - 0.5)
        numbers.mul_(math.erf(CUT / math.sqrt(2)) / 2**23).erfinv_().mul_(math.sqrt(2) * std)


def list_runs(shape: tuple[int, ...], offset: tuple[int, ...], part: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, length) of the runs of consecutive numbers that a part of a tensor is, in the flattened tensor."""
    if not shape or part[1:] == shape[1:]:
        row = math.prod(shape[1:])
        yield (offset[0] * row if shape else 0), (part[0] * row if shape else 1)
        return
    row = math.prod(shape[1:])
    for index in range(offset[0], offset[0] + part[0]):
        for start, length in list_runs(shape[1:], offset[1:], part[1:]):
            yield index * row + start, length
