"""Decoding of prompts in batches: one segment after each, both streams of guidance side by side."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.grammar import Segment
from megatron_cm3leon.generation.sampling import Sampling, apply_guidance, draw, uniform_numbers

CACHE_BYTES = {"cpu": 1 << 29, "cuda": 16 << 30}
"""Keys and values of one batch; more prompts are decoded one batch after the other."""
LARGEST_BATCH = 128
"""Streams in a batch on the CPU, where larger ones gain nothing."""


def decode_segments(
    decoder: Decoder,
    given: list[list[int]],
    segment: Segment,
    sampling: Sampling,
    seeds: list[int],
    *,
    unconditional: list[list[int]] | None = None,
    forced: np.ndarray | None = None,
    advance: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Ids [prompts, segment.length] that follow each prompt, -1 after an ending token.

    `unconditional` are the prompts of guidance's other stream. Ids of `forced` [prompts, segment.length] that are
    not -1 stand instead of drawn ones. `advance(n)` is told how many more ids are there. Raises ValueError where the
    longest prompt and the segment do not fit into the decoder's context.
    """
    made = np.full((len(given), segment.length), -1, np.int64)
    guided = unconditional is not None and sampling.guidance != 1
    if not given:
        return made
    longest = max(map(len, given + (unconditional if guided else [])))
    decoder.check_length(longest, segment.length)
    size = _batch_size(decoder, longest + segment.length, 2 if guided else 1)
    for start in range(0, len(given), size):
        part = slice(start, start + size)
        made[part] = _decode_batch(
            decoder,
            given[part],
            unconditional[part] if guided else [],
            segment,
            sampling,
            seeds[part],
            None if forced is None else forced[part],
            advance,
        )
    return made


def _batch_size(decoder: Decoder, length: int, streams: int) -> int:
    device = decoder.device.type
    fitting = CACHE_BYTES.get(device, CACHE_BYTES["cpu"]) // (streams * decoder.cache_bytes(length))
    most = LARGEST_BATCH // streams if device == "cpu" else fitting
    return max(1, min(fitting, most))


@torch.inference_mode()
def _decode_batch(
    decoder: Decoder, given: list, unconditional: list, segment: Segment, sampling: Sampling, seeds: list[int],
    forced: np.ndarray | None, advance: Callable[[int], None] | None,
) -> np.ndarray:  # fmt: skip
    count = len(given)
    allowed = segment.allowed.to(decoder.device)
    head = decoder.head(segment.allowed)
    # Equal prompts (candidates, or a common unconditional one) are read once.
    unique = {tuple(prompt): None for prompt in given + unconditional}
    place = {prompt: number for number, prompt in enumerate(unique)}
    which = torch.tensor([place[tuple(prompt)] for prompt in given + unconditional], device=decoder.device)
    state, cache = decoder.start(list(unique), segment.length)
    state, cache = state[which], cache.select(which) if len(unique) < len(which) else cache
    noise = np.stack([uniform_numbers(s, p, segment.length) for s, p in zip(seeds, given, strict=True)])
    noise = torch.from_numpy(noise).to(decoder.device)
    kept = None if forced is None else torch.from_numpy(forced).to(decoder.device)
    ends = torch.tensor(segment.ends, device=decoder.device)
    ids = torch.full((count, segment.length), -1, device=decoder.device)
    done = torch.zeros(count, dtype=torch.bool, device=decoder.device)
    for turn in range(segment.length):
        logits = decoder.logits(state, head)
        if unconditional:
            logits = apply_guidance(logits[:count], logits[count:], sampling.guidance)
        token = allowed[draw(logits, sampling, noise[:, turn])]
        if kept is not None:
            token = torch.where(kept[:, turn] >= 0, kept[:, turn], token)
        ids[:, turn] = token.masked_fill(done, -1)
        if segment.ends:
            done |= torch.isin(token, ends)
        finished = bool(segment.ends) and bool(done.all())
        if advance:
            advance(count * (segment.length - turn if finished else 1))
        if finished:
            break
        if turn + 1 < segment.length:
            state = decoder.step(torch.cat([token, token]) if unconditional else token, cache)
    return _ended(ids, segment).cpu().numpy()


def _ended(ids: Tensor, segment: Segment) -> Tensor:
    """Text that reached its length without an ending token gets one: what is returned is well formed."""
    if segment.ends:
        last = ids[:, -1]
        ids[:, -1] = torch.where(last >= 0, segment.ends[0], last)
    return ids
