"""Log-probabilities of given ids after given prefixes: ranking of candidates, held-out loss, log-likelihoods of texts.

    prefix   ids that are read, at least one; a sample begins with </s>
    target   ids whose log-probabilities are computed, each after the prefix and the target's earlier ids

Log-probabilities are natural logarithms (nats), over all ids of the vocabulary. Targets of the same prefix, such as the
candidate answers to one question, share the prefix's keys and values: it is read once, and the targets are read step by
step. All others are read in one pass each. Rows of similar length are in the same batch, and logits are computed for
the positions of targets alone, a bounded number of them at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from megatron_cm3leon.generation.batch import CPU_CACHE_BYTES, LARGEST_BATCH
from megatron_cm3leon.generation.decoder import Decoder

Ids = Sequence[int] | np.ndarray
LOGIT_BYTES = 256 << 20
"""Bytes of logits that are held at a time."""
ID_BYTES = 4 + 4
"""Bytes for each id of the vocabulary: a logit in fp32, and its log-softmax."""
BATCH_TOKENS = 16384
"""Positions of one batch; a longer row is a batch of its own."""
SHARED_PREFIX = 4
"""Targets of a prefix are read step by step if the prefix is this many times as long as the longest of them: a step
costs more per token than a pass over complete sequences."""


@dataclass(frozen=True)
class ScoredTarget:
    """The ids of one target, each after the prefix and the target's earlier ids."""

    log_probabilities: np.ndarray
    """float64 [ids]."""
    most_likely: np.ndarray
    """bool [ids]: whether greedy decoding would take the id there."""

    @property
    def total(self) -> float:
        """Summed log-probability."""
        return float(self.log_probabilities.sum())

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding after the prefix gives the target."""
        return bool(self.most_likely.all())


def score_targets(decoder: Decoder, prefixes: Sequence[Ids], targets: Sequence[Ids]) -> np.ndarray:
    """Summed log-probabilities, float64 [n], of each target after its prefix; errors as `score_tokens`."""
    return np.array([row.total for row in score_tokens(decoder, prefixes, targets)], np.float64)


def score_tokens(decoder: Decoder, prefixes: Sequence[Ids], targets: Sequence[Ids]) -> list[ScoredTarget]:
    """Score every id of each target; a row for each target, in their order.

    ValueError unless there is a prefix for each target, none is empty, all ids are the model's, and each prefix with
    its target fits into the context.
    """
    rows = _check_rows(decoder, prefixes, targets)
    found: dict[int, ScoredTarget] = {}
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (prefix, _) in enumerate(rows):
        groups.setdefault(tuple(prefix), []).append(number)
    single: list[int] = []
    for shared, numbers in groups.items():
        longest = max(len(rows[number][1]) for number in numbers)
        if len(numbers) > 1 and len(shared) >= SHARED_PREFIX * longest:
            _score_shared(decoder, list(shared), [(number, rows[number][1]) for number in numbers], found)
        else:
            single += numbers
    lengths = {number: sum(map(len, rows[number])) for number in single}
    single.sort(key=lengths.__getitem__)
    while single:
        # Each row of a batch takes as many positions as the longest one, which is the last.
        size = 1
        while size < len(single) and (size + 1) * lengths[single[size]] <= BATCH_TOKENS:
            size += 1
        _score_batch(decoder, [(number, *rows[number]) for number in single[:size]], found)
        del single[:size]
    return [found[number] for number in range(len(rows))]


def _check_rows(decoder: Decoder, prefixes: Sequence[Ids], targets: Sequence[Ids]) -> list[tuple[list[int], list[int]]]:
    if len(prefixes) != len(targets):
        raise ValueError(f"there are {len(prefixes)} prefixes for {len(targets)} targets; give one for each.")
    rows = []
    for number, row in enumerate(zip(prefixes, targets, strict=True)):
        parts = []
        for name, ids in zip(("prefix", "target"), row, strict=True):
            array = np.asarray(ids)
            if array.size == 0:
                remedy = "begin it with </s>" if name == "prefix" else "give at least one id"
                raise ValueError(f"{name} {number} is empty; {remedy}.")
            if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
                raise ValueError(
                    f"{name} {number} must be a list of ids; encode texts and images with Generator.codec."
                )
            if array.min() < 0 or array.max() >= decoder.vocabulary_size:
                wrong = int(array[(array < 0) | (array >= decoder.vocabulary_size)][0])
                raise ValueError(f"{name} {number} has the id {wrong}; the model's ids are 0 to "
                                 f"{decoder.vocabulary_size - 1}.")  # fmt: skip
            parts.append(array.tolist())
        needed = len(parts[0]) + len(parts[1]) - 1  # the last id is only a target
        if needed > decoder.context:
            raise ValueError(
                f"prefix {number} ({len(parts[0])} tokens) and its target ({len(parts[1])}) need {needed} positions; "
                f"the model's context has {decoder.context}. Shorten one of them."
            )
        rows.append((parts[0], parts[1]))
    return rows


def _score_batch(
    decoder: Decoder, rows: list[tuple[int, list[int], list[int]]], found: dict[int, ScoredTarget]
) -> None:
    """Scores of rows (number, prefix, target), put into `found`; one pass over all of them."""
    longest = max(len(prefix) + len(target) for _, prefix, target in rows)
    ids_BS = torch.zeros(len(rows), longest, dtype=torch.long)
    counted_BS = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, (_, prefix, target) in enumerate(rows):
        end = len(prefix) + len(target)
        ids_BS[index, :end] = torch.tensor(prefix + target)
        counted_BS[index, len(prefix) : end] = True
    ids_BS, counted_BS = ids_BS.to(decoder.device), counted_BS[:, 1:].to(decoder.device)
    with torch.inference_mode():
        scores_N, most_likely_N = _score_states(
            decoder, decoder.states(ids_BS[:, :-1])[counted_BS], ids_BS[:, 1:][counted_BS]
        )
    ends = np.cumsum([len(target) for _, _, target in rows])[:-1]
    parts = zip(*(np.split(values.cpu().numpy(), ends) for values in (scores_N, most_likely_N)), strict=True)
    for (number, _, _), part in zip(rows, parts, strict=True):
        found[number] = ScoredTarget(*part)


def _score_shared(
    decoder: Decoder, prefix: list[int], targets: list[tuple[int, list[int]]], found: dict[int, ScoredTarget]
) -> None:
    """Scores of targets (number, ids) of one prefix, put into `found`; the prefix is read once per batch."""
    targets = sorted(targets, key=lambda row: len(row[1]))
    positions = len(prefix) + len(targets[-1][1])
    size = max(1, min(LARGEST_BATCH, CPU_CACHE_BYTES // decoder.cache_bytes(positions)))
    for first in range(0, len(targets), size):
        part = targets[first : first + size]
        longest = len(part[-1][1])
        ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids in part], device=decoder.device)
        state_BH, cache = decoder.start([prefix] * len(part), longest)
        columns = []
        for place in range(longest):
            # Targets that have ended are read on with id 0, and cut off below.
            columns.append(_score_states(decoder, state_BH, ids_BT[:, place]))
            if place < longest - 1:
                state_BH = decoder.step(ids_BT[:, place], cache)
        scores_BT, most_likely_BT = (torch.stack(each, 1).cpu().numpy() for each in zip(*columns, strict=True))
        for row, (number, ids) in enumerate(part):
            found[number] = ScoredTarget(scores_BT[row, : len(ids)], most_likely_BT[row, : len(ids)])


def _score_states(decoder: Decoder, states_NH: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """float64 [N], bool [N]: log-probability of one id after each final hidden state, and whether it is the largest."""
    rows = max(1, LOGIT_BYTES // (ID_BYTES * decoder.vocabulary_size))
    parts = [_score_logits(decoder, *part) for part in zip(states_NH.split(rows), ids_N.split(rows), strict=True)]
    scores, most_likely = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(most_likely)


def _score_logits(decoder: Decoder, states_NH: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """`_score_states` of as many states as ID_BYTES per id of the vocabulary allow; the logits end with this call."""
    logits_NV = decoder.logits(states_NH)
    return -functional.cross_entropy(logits_NV, ids_N, reduction="none").double(), logits_NV.argmax(-1) == ids_N
