"""Held-out loss with and without retrieved documents, on the same tokens both times.

    with      </s> document <break> ... document <break> query </s>
    without   </s> query </s>

Counted are the tokens of the query document alone: neither those of retrieved documents nor the last </s>.
"""

import numpy as np
import torch
from torch.nn import functional

from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.prompts import begin_sample
from megatron_cm3leon.generation.retrieved import keep_nearest
from megatron_cm3leon.tokenizers.vocab import Vocabulary

LOGIT_BYTES = 256 << 20
"""fp32 logits that are held at a time."""


def build_sequence(query, documents: list, vocabulary: Vocabulary, context: int) -> tuple[list[int], int]:
    """Ids up to the query's last token, and where the query begins.

    Of more documents than fit, the farthest (first) ones are left out, as query packing does in training.
    """
    query = [int(token) for token in query]
    if len(query) > context:
        raise ValueError(
            f"a held-out document of {len(query)} tokens does not fit into the model's context of {context} tokens."
        )
    # The last token is a target alone: it takes no place.
    head = begin_sample(keep_nearest(documents, len(query) - 1, context), vocabulary)
    return head + query, len(head)


def measure_loss(decoder: Decoder, queries: list, documents: list[list], vocabulary: Vocabulary) -> dict[str, float]:
    """Mean loss a token, in nats: `loss`, and apart `loss_text` (<break> included) and `loss_image`."""
    built = [build_sequence(q, d, vocabulary, decoder.context) for q, d in zip(queries, documents, strict=True)]
    sums, counts = np.zeros(2), np.zeros(2, np.int64)  # text, image
    longest = max(len(ids) for ids, _ in built)
    size = max(1, min(64, LOGIT_BYTES // (4 * vocabulary.size * longest)))
    for first in range(0, len(built), size):
        part = built[first : first + size]
        ids = torch.full((len(part), max(len(row) for row, _ in part)), vocabulary.pad)
        counted = torch.zeros(ids.shape, dtype=torch.bool)
        for place, (row, start) in enumerate(part):
            ids[place, : len(row)] = torch.tensor(row)
            counted[place, start : len(row)] = True
        ids, counted = ids.to(decoder.device), counted[:, 1:].to(decoder.device)
        with torch.inference_mode():
            targets = ids[:, 1:][counted]
            losses = functional.cross_entropy(
                decoder.logits(decoder.states(ids[:, :-1])[counted]), targets, reduction="none"
            )
            image = vocabulary.is_image(targets)
            for kind, chosen in enumerate((~image, image)):
                sums[kind] += losses[chosen].double().sum().item()
                counts[kind] += int(chosen.sum())
    return {
        "loss": float(sums.sum() / counts.sum()),
        "loss_text": float(sums[0] / max(counts[0], 1)),
        "loss_image": float(sums[1] / max(counts[1], 1)),
        "tokens": int(counts.sum()),
    }
