"""Decoding of prompts in batches: one segment after each, both streams of guidance side by side."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from megatron_cm3leon.generation.captured import CapturedTurn
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.grammar import Segment
from megatron_cm3leon.generation.noise import GumbelSource, UniformSource
from megatron_cm3leon.generation.sampling import Sampling, contrast, draw

CPU_CACHE_BYTES = 4 << 30
"""Keys and values of one batch on a CPU; more prompts are decoded one batch after the other."""
GPU_CACHE_SHARE = 0.6
"""Share of a GPU's free memory that they may take there."""
LARGEST_BATCH = 128
"""Streams in a batch on the CPU, where larger ones gain nothing."""


def decode_segments(decoder: Decoder, given: list[list[int]], segment: Segment, *arguments, **options) -> np.ndarray:
    """Ids [prompts, segment.length] that follow each prompt, -1 after an ending token; see `decode_batches`."""
    made = np.full((len(given), segment.length), -1, np.int64)
    for part, ids in decode_batches(decoder, given, segment, *arguments, **options):
        made[part] = ids
    return made


def decode_batches(
    decoder: Decoder,
    given: list[list[int]],
    segment: Segment,
    sampling: Sampling,
    seeds: list[int],
    *,
    unconditional: list[list[int]] | None = None,
    forced: np.ndarray | None = None,
    advance: Callable[[int], None] | None = None,
) -> Iterator[tuple[slice, np.ndarray]]:
    """Which prompts, and the ids [prompts of the batch, segment.length] that follow them, batch after batch.

    `unconditional` are the prompts of guidance's other stream. Ids of `forced` [prompts, segment.length] that are
    not -1 stand instead of drawn ones. `advance(n)` is told how many more ids are there. Raises ValueError, at once,
    where the longest prompt and the segment do not fit into the decoder's context.
    """
    if not given:
        return iter(())
    without = unconditional if unconditional is not None and sampling.contrasted else []
    longest = max(map(len, given + without))
    decoder.check_length(longest, segment.length)
    size = _batch_size(decoder, longest + segment.length, 2 if without else 1)

    def batches() -> Iterator[tuple[slice, np.ndarray]]:
        for start in range(0, len(given), size):
            part = slice(start, start + size)
            batch = _Batch(decoder, given[part], without[part], segment, sampling, seeds[part])
            yield part, batch.decode(None if forced is None else forced[part], advance)

    return batches()


def _batch_size(decoder: Decoder, length: int, streams: int) -> int:
    if decoder.device.type == "cuda":
        space = GPU_CACHE_SHARE * torch.cuda.mem_get_info(decoder.device)[0]
    else:
        space = CPU_CACHE_BYTES
    fitting = int(space // (streams * decoder.cache_bytes(length)))
    return max(1, min(fitting, LARGEST_BATCH // streams) if decoder.device.type == "cpu" else fitting)


class _Batch:
    """Prompts that are decoded together; the streams without the condition stand behind the others."""

    @torch.inference_mode()
    def __init__(
        self, decoder: Decoder, given: list, without: list, segment: Segment, sampling: Sampling, seeds: list[int]
    ) -> None:
        self.decoder, self.segment, self.sampling, self.guided = decoder, segment, sampling, bool(without)
        self.allowed, self.head = segment.allowed.to(decoder.device), decoder.head(segment.allowed)
        self.count, self.chance = len(given), None
        if sampling.temperature > 0:
            if sampling.sampler == "gumbel-1":
                self.chance = GumbelSource(self.allowed, len(given), segment.length)
            else:
                self.chance = UniformSource(len(given), segment.length, decoder.device)
            self.chance.begin(seeds, given)
        # Equal prompts (candidates, or a common unconditional one) are read once.
        place = {tuple(prompt): None for prompt in given + without}
        place = {prompt: number for number, prompt in enumerate(place)}
        which = torch.tensor([place[tuple(prompt)] for prompt in given + without], device=decoder.device)
        state, cache = decoder.start(list(place), segment.length)
        several = len(place) < len(which)
        self.state, self.cache = (state[which], cache.select(which)) if several else (state, cache)

    @torch.inference_mode()
    def decode(self, forced: np.ndarray | None, advance: Callable[[int], None] | None) -> np.ndarray:
        """Ids [prompts, segment.length]."""
        segment, count, device = self.segment, self.count, self.decoder.device
        kept = None if forced is None else torch.from_numpy(forced).to(device)
        ends = torch.tensor(segment.ends, device=device)
        ids = torch.full((count, segment.length), -1, device=device)
        done = torch.zeros(count, dtype=torch.bool, device=device)
        go_on = CapturedTurn(self.decoder, self.cache) if device.type == "cuda" else self._step
        for turn in range(segment.length):
            token = self.choose(self.state, turn)
            if kept is not None:
                token = torch.where(kept[:, turn] >= 0, kept[:, turn], token)
            ids[:, turn] = token.masked_fill(done, -1)
            finished = False
            if segment.ends:
                done |= torch.isin(token, ends)
                finished = bool(done.all())
            if advance:
                advance(count * (segment.length - turn if finished else 1))
            if finished or turn + 1 == segment.length:
                break
            self.state = go_on(torch.cat([token, token]) if self.guided else token)
        return _ended(ids, segment).cpu().numpy()

    def choose(self, state: Tensor, turn: int) -> Tensor:
        """Ids [B] of the next tokens."""
        logits = self.decoder.logits(state, self.head)
        if self.guided:
            logits = contrast(*logits.chunk(2), self.sampling)
        chance = None
        if self.chance is not None:
            self.chance.prepare(turn)
            chance = self.chance.at(torch.tensor([turn], device=logits.device))
        return self.allowed[draw(logits, self.sampling, chance)]

    def _step(self, ids: Tensor) -> Tensor:
        return self.decoder.step(ids, self.cache)


def _ended(ids: Tensor, segment: Segment) -> Tensor:
    """Text that reached its length without an ending token gets one: what is returned is well formed."""
    if segment.ends:
        last = ids[:, -1]
        ids[:, -1] = torch.where(last >= 0, segment.ends[0], last)
    return ids
