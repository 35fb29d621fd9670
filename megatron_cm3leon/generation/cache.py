"""Cache: keys and values of every layer, allocated once and written in place.

B sequences, C positions, G heads of keys and values, D width of a head. Prompts begin at position 0; positions beyond
a sequence's length are masked, and overwritten as the sequence grows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Cache:
    """Keys and values of every layer [B, G, C, D], contiguous, and how many positions are filled."""

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    """[B] int64: filled positions of each sequence."""
    mask: Tensor
    """[B, 1, 1, C], added to attention scores: 0 at filled positions, -inf beyond."""
    rows: Tensor
    """[B]: 0, 1, ..."""
    flat: bool
    """Whether `write` uses a flat view: 5 us instead of 10 on a CPU."""
    longest: int = 0
    """The largest of `lengths`, on the host."""
    ragged: bool = False
    """Whether lengths differ."""

    @classmethod
    def build(
        cls, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, flat: bool
    ) -> "Cache":
        """An empty cache of this shape [B, G, C, D]."""
        rows, _, size, _ = shape
        return cls(
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)],
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)],
            torch.zeros(rows, dtype=torch.long, device=device),
            torch.zeros(rows, 1, 1, size, dtype=dtype, device=device),
            torch.arange(rows, device=device),
            flat,
        )

    @property
    def size(self) -> int:
        """Positions per sequence."""
        return self.mask.shape[-1]

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(part.nbytes for part in (*self.keys, *self.values))

    def begin(self, lengths: list[int]) -> None:
        """Begin a batch with prompts of these lengths; the caller writes their keys and values."""
        self.lengths.copy_(torch.tensor(lengths))
        beyond = torch.arange(self.size, device=self.lengths.device) >= self.lengths[:, None]
        self.mask.zero_().view(len(lengths), -1).masked_fill_(beyond, float("-inf"))
        self.longest, self.ragged = max(lengths), min(lengths) < max(lengths)

    def clear(self) -> None:
        """Zero the keys and values of an earlier batch: a masked position has weight 0, but 0 x NaN is NaN."""
        for part in (*self.keys, *self.values):
            part.zero_()

    def next_positions(self) -> Tensor | tuple:
        """Indices of each sequence's next position, for `write`."""
        if not self.flat:
            return self.rows, None, self.lengths
        groups = self.keys[0].shape[1]
        first = torch.arange(len(self.rows) * groups, device=self.lengths.device) * self.size
        return first + self.lengths.repeat_interleave(groups)

    def write(self, layer: int, positions: Tensor | tuple, key: Tensor, value: Tensor) -> None:
        """Write keys and values [B, G, D] of one position per sequence."""
        for part, new in ((self.keys[layer], key), (self.values[layer], value)):
            if isinstance(positions, Tensor):
                part.view(-1, part.shape[-1]).index_copy_(0, positions, new.reshape(-1, part.shape[-1]))
            else:
                torch.ops.aten.index_put_(part, positions, new)
