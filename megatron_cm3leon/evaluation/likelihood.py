"""Summed log-probabilities of ids after given ids, and whether greedy decoding gives them.

B rows of a batch, S positions, N scored ids, V ids of the vocabulary.
"""

from collections.abc import Sequence

import torch

from megatron_cm3leon.generation.decoder import Decoder

LOGIT_BYTES = 256 << 20
"""Bytes of fp32 logits that are held at a time."""
LARGEST_BATCH = 64
"""Rows of one forward pass."""
Row = tuple[list[int], list[int]]
"""Ids that are read, at least one, and ids that are scored after them, at least one."""


def score_rows(decoder: Decoder, rows: Sequence[Row]) -> list[tuple[float, bool]]:
    """(summed log-probability in nats, whether every scored id is the most likely one) of each row."""
    found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
    order = sorted(range(len(rows)), key=lambda number: -sum(map(len, rows[number])))
    while order:
        longest = sum(map(len, rows[order[0]]))
        size = max(1, min(LARGEST_BATCH, LOGIT_BYTES // (8 * decoder.vocabulary_size * longest)))
        _score_batch(decoder, [(number, *rows[number]) for number in order[:size]], found)
        del order[:size]
    return found


@torch.inference_mode()
def _score_batch(
    decoder: Decoder, rows: list[tuple[int, list[int], list[int]]], found: list[tuple[float, bool]]
) -> None:
    """Scores of rows (number, read ids, scored ids), put into `found`."""
    longest = max(len(context) + len(scored) for _, context, scored in rows)
    ids_BS = torch.zeros(len(rows), longest, dtype=torch.long)
    counted_BS = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (_, context, scored) in enumerate(rows):
        end = len(context) + len(scored)
        ids_BS[row, :end] = torch.tensor(context + scored)
        counted_BS[row, len(context) : end] = True
    ids_BS, counted_BS = ids_BS.to(decoder.device), counted_BS[:, 1:].to(decoder.device)
    targets = ids_BS[:, 1:][counted_BS]
    logits_NV = decoder.logits(decoder.states(ids_BS[:, :-1])[counted_BS])
    values = torch.log_softmax(logits_NV, -1).gather(1, targets[:, None])[:, 0].double()
    greedy = logits_NV.argmax(-1) == targets
    lengths = [len(scored) for _, _, scored in rows]
    for (number, _, _), value, match in zip(rows, values.split(lengths), greedy.split(lengths), strict=True):
        found[number] = (float(value.sum()), bool(match.all()))
