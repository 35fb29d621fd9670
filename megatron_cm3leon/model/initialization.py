"""Initial weights: every number is a function of (seed, parameter name, position), the same on every machine.

Parameters are drawn in blocks of 2^20 consecutive numbers of the flattened parameter. The generator of a block is PCG64
with a key of 128 bits from (seed, name, block), so that any part of a parameter can be drawn without the rest, and by
several threads. The halves of its 64-bit integers become numbers in (-1, 1), and these a truncated normal by the
inverse error function. Integers and IEEE 754 operations give the same bits everywhere, and so does torch's `erfinv`:
with torch 2.11 and 2.13 and with each value of ATEN_CPU_CAPABILITY. (`trunc_normal_` and `uniform_(a, b)` do not.)
"""

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

VERSION = "pcg64-erfinv-1"
"""Name of this method, which a run records; a change of the numbers for a (seed, name) requires another version."""
BLOCK = 1 << 20
"""Numbers drawn by one generator."""
CUT = 3.0
"""Standard deviations at which the normal is truncated."""
_CHUNK = 1 << 15
"""Numbers transformed at once: few enough for the cache, and for torch to use one thread."""


def draw_truncated_normal(seed: int, name: str, start: int, stop: int, std: float) -> torch.Tensor:
    """Draw the numbers [start, stop) of the flattened parameter `name`; fp32 [stop - start], on the CPU.

    Normal distribution with standard deviation `std`, truncated at CUT x std. Uses torch.get_num_threads() threads.
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
    """Fill `out` [n] with the numbers of a block from position `skipped` on."""
    for begin in range(0, skipped + len(out), _CHUNK):
        end = min(begin + _CHUNK, skipped + len(out))
        words = generator.integers(0, 1 << 64, (end - begin + 1) // 2, dtype=np.uint64)  # two numbers per word
        if end <= skipped:
            continue
        bits = torch.from_numpy(words.view(np.int32))[max(0, skipped - begin) : end - begin]
        numbers = out[max(0, begin - skipped) : end - skipped]
        # 24 bits, centered: odd multiples of 2^-24 in (-1, 1), all of them exact in fp32.
        numbers.copy_(bits.bitwise_and_(0xFFFFFF)).sub_(2**23 - 0.5)
        numbers.mul_(math.erf(CUT / math.sqrt(2)) / 2**23).erfinv_().mul_(math.sqrt(2) * std)


def compute_sinusoids(first: int, rows: int, width: int, root_mean_square: float) -> torch.Tensor:
    """Embeddings of positions first .. first + rows - 1 (Vaswani et al., 2017, section 3.5); fp32 [rows, width].

    Sines in the first half of the columns, cosines in the second; wavelengths from 2 pi to 10,000 x 2 pi positions.
    """
    frequencies = [10_000 ** (-2 * index / width) for index in range((width + 1) // 2)]
    table = torch.empty(rows, width)
    for row in range(rows):
        angles = [(first + row) * frequency for frequency in frequencies]
        values = [*map(math.sin, angles), *map(math.cos, angles)]  # of libm: the same on machines with one C library
        table[row] = torch.tensor(values[:width], dtype=torch.float64) * (math.sqrt(2) * root_mean_square)
    return table


def list_runs(shape: tuple[int, ...], offset: tuple[int, ...], part: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of the runs of consecutive numbers, in the flattened tensor, that make up a part of it."""
    if not shape or part[1:] == shape[1:]:
        row = math.prod(shape[1:])
        yield (offset[0] * row if shape else 0), (part[0] * row if shape else 1)
        return
    row = math.prod(shape[1:])
    for index in range(offset[0], offset[0] + part[0]):
        for start, length in list_runs(shape[1:], offset[1:], part[1:]):
            yield index * row + start, length
