"""A step of the decoder as one CUDA graph: a small model's step is launches, not arithmetic.

Not run on a GPU yet. What it replays, `Decoder.advance` with the whole cache and a mask, gives the tokens of the
ordinary step (tests/generation/test_decoder.py, on a CPU, also through torch.compile).
"""

import torch
from torch import Tensor

from megatron_cm3leon.generation.decoder import Cache, Decoder

WARM_UP = 3


class CapturedTurn:
    """`turn(ids)` appends one token to each sequence and gives the final hidden states, as `Decoder.step` does."""

    def __init__(self, decoder: Decoder, cache: Cache) -> None:
        self.ids = torch.zeros_like(cache.lengths)
        width, advance = cache.mask.shape[-1], torch.compile(decoder.advance, dynamic=False)
        lengths, mask = cache.lengths.clone(), cache.mask.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                advance(self.ids, cache, width, True)
                cache.lengths.copy_(lengths)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.state = advance(self.ids, cache, width, True)
        # What the warm-up wrote into the cache stands behind each sequence's end: the next step overwrites it.
        cache.lengths.copy_(lengths)
        cache.mask.copy_(mask)

    def __call__(self, ids: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.graph.replay()
        return self.state
