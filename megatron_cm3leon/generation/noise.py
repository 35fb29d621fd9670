"""Random numbers of the samplers: functions of (seed, prompt, position, vocabulary id), identical on every device.

gumbel-1   word id % 4 of Philox 4x32-10 (Salmon et al., SC 2011) with the sequence's 64-bit key and the counter
           (position, id // 4, 0, 0). Its upper 23 bits b give u = (b + 0.5) / 2^23, never 0 or 1, and the noise
           -log(-log u), computed in fp64 and rounded to fp32. The integers are identical everywhere; the noise
           differs by at most one unit in the last place where two fp64 logarithms do.
inverse-1  one fp64 uniform number per position, from NumPy's Philox 4x64.

`position` counts the tokens of a segment from 0. Shapes: B sequences, P positions, V vocabulary ids that may be drawn.
"""

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW_32_BITS = 0xFFFFFFFF
GROUPS_AT_ONCE = {"cpu": 1 << 14, "gpu": 1 << 21}
"""Groups of four ids whose noise is computed together: as many as fit a CPU's caches, or occupy a GPU."""


def hash_prompt(seed: int, prompt: Sequence[int]) -> bytes:
    """16 bytes that identify a sequence by its seed and the ids it begins with."""
    data = np.asarray(prompt, dtype=np.int64).tobytes()
    return hashlib.blake2b(data, digest_size=16, key=str(int(seed)).encode()).digest()


def philox_key(seed: int, prompt: Sequence[int]) -> list[int]:
    """The two 32-bit words of the sequence's key."""
    return np.frombuffer(hash_prompt(seed, prompt)[:8], "<u4").tolist()


def uniform_numbers(seed: int, prompt: Sequence[int], count: int) -> np.ndarray:
    """`count` fp64 numbers in [0, 1) of the sequence that begins with the ids `prompt` (inverse-1)."""
    key = np.frombuffer(hash_prompt(seed, prompt), np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def philox(counter: tuple, key: tuple) -> tuple:
    """Four words of Philox 4x32-10: int64 tensors, or arrays, of values below 2^32 that broadcast together."""
    a, right, c, left = counter
    first, second = key
    for number in range(ROUNDS):
        if number:
            first, second = (first + WEYL[0]) & LOW_32_BITS, (second + WEYL[1]) & LOW_32_BITS
        # `right` and `left` are the products of the last round: the mask keeps their low halves, and removes the copies
        # of the sign that the shift of the other products leaves.
        product_a, product_c = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a = ((product_c >> 32) ^ right ^ first) & LOW_32_BITS
        c = ((product_a >> 32) ^ left ^ second) & LOW_32_BITS
        right, left = product_c, product_a
    return a, right & LOW_32_BITS, c, left & LOW_32_BITS


class GumbelNoise:
    """Gumbel noise of the vocabulary ids that may be drawn."""

    def __init__(self, ids: Tensor) -> None:
        """`ids` [V], ascending; the noise is computed on their device."""
        self.groups = torch.unique(ids // 4)
        columns = torch.searchsorted(self.groups, ids // 4) * 4 + ids % 4
        first, last = int(columns[0]), int(columns[-1])
        contiguous = last - first + 1 == len(ids)
        self.columns: slice | Tensor = slice(first, last + 1) if contiguous else columns
        """Those of [4 groups] that are the ids'."""

    def __call__(self, keys: Tensor, positions: Tensor) -> Tensor:
        """fp32 noise [P, B, V] of sequences with these keys [B, 2] at these positions [P]."""
        zero = torch.zeros(1, dtype=torch.long, device=keys.device)
        words = [positions[:, None, None], self.groups, zero, zero, keys[:, :1], keys[:, 1:]]
        if keys.device.type == "cpu":  # NumPy's integer arithmetic takes 0.6 of torch's time there
            words = [word.numpy() for word in words]
        results = [torch.as_tensor(word) for word in philox(tuple(words[:4]), tuple(words[4:]))]
        bits = torch.stack(results, -1).flatten(-2)[..., self.columns]
        uniform = bits.bitwise_right_shift_(9).double().add_(0.5).mul_(2.0**-23)
        return uniform.log_().neg_().log_().neg_().float()


class _KeyedSource:
    """Noise that is keyed by sequence."""

    keys: Tensor
    """[B, 2] int64."""

    def begin(self, seeds: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Set the keys of a batch's sequences."""
        keys = [philox_key(seed, prompt) for seed, prompt in zip(seeds, prompts, strict=True)]
        self.keys.copy_(torch.tensor(keys))


class GumbelSource(_KeyedSource):
    """Noise of a batch, computed for several positions at a time by `prepare`, before the draws read it with `at`."""

    def __init__(self, ids: Tensor, sequences: int, length: int) -> None:
        self.noise = GumbelNoise(ids)
        groups = sequences * len(self.noise.groups)
        most = GROUPS_AT_ONCE["cpu" if ids.device.type == "cpu" else "gpu"]
        self.ahead = max(1, min(length, most // groups))
        self.keys = torch.zeros(sequences, 2, dtype=torch.long, device=ids.device)
        self.buffer = torch.zeros(self.ahead, sequences, len(ids), device=ids.device)
        self.positions = torch.arange(self.ahead, device=ids.device)

    def prepare(self, position: int) -> None:
        """Called by the host before the draw at each position, in order."""
        if position % self.ahead == 0:
            self.buffer.copy_(self.noise(self.keys, self.positions + position))

    def at(self, position: Tensor) -> Tensor:
        """Noise [B, V] at `position`, a tensor [1] on the device."""
        return self.buffer.index_select(0, position % self.ahead)[0]


class KernelSource(_KeyedSource):
    """Noise of a batch, by one launch per position (noise_kernel.py)."""

    def __init__(self, ids: Tensor, sequences: int) -> None:
        self.noise = GumbelNoise(ids)
        self.keys = torch.zeros(sequences, 2, dtype=torch.long, device=ids.device)
        self.buffer = torch.zeros(sequences, 4 * len(self.noise.groups), device=ids.device)

    def prepare(self, position: int) -> None:
        """Nothing to prepare: `at` computes the noise."""

    def at(self, position: Tensor) -> Tensor:
        """Noise [B, V] at `position`, a tensor [1] on the device."""
        from megatron_cm3leon.generation.noise_kernel import write_noise  # needs Triton

        write_noise(self.keys, position, self.noise.groups, self.buffer)
        return self.buffer[:, self.noise.columns]


def build_source(
    ids: Tensor, sequences: int, length: int, sampler: str
) -> "GumbelSource | KernelSource | UniformSource":
    """Random numbers for a batch that draws `length` tokens among `ids` [V], on the device of `ids`."""
    if sampler == "inverse-1":
        return UniformSource(sequences, length, ids.device)
    if ids.device.type == "cuda" and find_spec("triton"):
        return KernelSource(ids, sequences)
    return GumbelSource(ids, sequences, length)


class UniformSource:
    """Uniform numbers of a batch (inverse-1), for all positions of a segment at once."""

    def __init__(self, sequences: int, length: int, device: torch.device) -> None:
        self.buffer = torch.zeros(sequences, length, dtype=torch.float64, device=device)

    def begin(self, seeds: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Draw the numbers of a batch's sequences."""
        length = self.buffer.shape[1]
        rows = [uniform_numbers(seed, prompt, length) for seed, prompt in zip(seeds, prompts, strict=True)]
        self.buffer.copy_(torch.from_numpy(np.stack(rows)))

    def prepare(self, position: int) -> None:
        """Nothing to prepare: `begin` has drawn all numbers."""

    def at(self, position: Tensor) -> Tensor:
        """Numbers [B] at `position`, a tensor [1] on the device."""
        return self.buffer.index_select(1, position)[:, 0]
