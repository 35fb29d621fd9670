"""Cache: keys and values of every layer, allocated once and written in place.

B sequences, C positions, G heads of keys and values, D width of a head. Prompts stand at the left; what lies beyond a
sequence's own length is masked, and overwritten as the sequence grows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Cache:
    """Keys and values of every layer [B, G, C, D], contiguous, and how much of them is filled."""

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    """[B] int64: positions that are filled."""
    mask: Tensor
    """[B, 1, 1, C] added to scores: 0 for these, -inf beyond."""
    rows: Tensor
    """[B]: 0, 1, ..."""
    flat: bool
    """Whether `write` goes through a flat view: 5 us instead of 10 on a CPU, where a compiler would copy the cache."""
    longest: int = 0
    """The largest of `lengths`, known to the host."""
    ragged: bool = False
    """Whether lengths differ."""

    @classmethod
    def build(
        cls, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, flat: bool
    ) -> "Cache":
        """An empty cache of this shape [B, G, C, D]."""
        rows, _, size, _ = shape
        zeros = {"dtype": dtype, "device": device}
        return cls(
            [torch.zeros(shape, **zeros) for _ in range(layers)],
            [torch.zeros(shape, **zeros) for _ in range(layers)],
            torch.zeros(rows, dtype=torch.long, device=device),
            torch.zeros(rows, 1, 1, size, **zeros),
            torch.arange(rows, device=device),
            flat,
        )

    @property
    def size(self) -> int:
        """Positions there is room for."""
        return self.mask.shape[-1]

    @property
    def bytes(self) -> int:
        """Of keys and values."""
        return sum(part.nbytes for part in (*self.keys, *self.values))

    def begin(self, lengths: list[int]) -> None:
        """Take sequences of these lengths; their keys and values are still to be written."""
        self.lengths.copy_(torch.tensor(lengths))
        beyond = torch.arange(self.size, device=self.lengths.device) >= self.lengths[:, None]
        self.mask.zero_().view(len(lengths), -1).masked_fill_(beyond, float("-inf"))
        self.longest, self.ragged = max(lengths), min(lengths) < max(lengths)

    def clear(self) -> None:
        """Forget an earlier batch: a masked position has weight 0, and 0 x NaN would not be 0."""
        for part in (*self.keys, *self.values):
            part.zero_()

    def next_places(self) -> Tensor | tuple:
        """Where each sequence's next position is, for `write`."""
        if not self.flat:
            return self.rows, None, self.lengths
        groups = self.keys[0].shape[1]
        first = torch.arange(len(self.rows) * groups, device=self.lengths.device) * self.size
        return first + self.lengths.repeat_interleave(groups)

    def write(self, layer: int, places: Tensor | tuple, key: Tensor, value: Tensor) -> None:
        """Put keys and values [B, G, D] of one position per sequence in place."""
        for part, new in ((self.keys[layer], key), (self.values[layer], value)):
            if self.flat:
                part.view(-1, part.shape[-1]).index_copy_(0, places, new.reshape(-1, part.shape[-1]))
            else:
                torch.ops.aten.index_put_(part, places, new)
