"""Held-out loss with and without retrieved documents, on the same tokens both times.

    with      </s> document <break> ... document <break> query </s>
    without   </s> query </s>

Only the tokens of the query document are counted: neither those of retrieved documents nor the last </s>.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from megatron_cm3leon.evaluation.retrieval import Retrieved
from megatron_cm3leon.evaluation.subject import Part, Subject
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.prompts import begin_sample
from megatron_cm3leon.generation.retrieved import keep_nearest
from megatron_cm3leon.tokenizers.vocab import Vocabulary

LOGIT_BYTES = 256 << 20
"""Bytes of fp32 logits that are held at a time."""


def evaluate_loss(subject: Subject, retrieved: Retrieved | None) -> Part:
    """Loss on the reported documents' own tokens, with and without retrieved documents."""
    decoder, queries = subject.generator.decoder, subject.pairs.documents
    without = measure_loss(decoder, queries, [[] for _ in queries], subject.vocabulary)
    figures: dict = {
        "loss_without_retrieval": without["loss"],
        "loss_parts_without_retrieval": without,
        "loss_with_retrieval": None,
    }
    if retrieved:
        with_documents = measure_loss(decoder, queries, retrieved.by_caption, subject.vocabulary)
        figures |= {"loss_with_retrieval": with_documents["loss"], "loss_parts_with_retrieval": with_documents}
    return Part(figures, {})


def build_sequence(
    query: Sequence[int] | np.ndarray, documents: list, vocabulary: Vocabulary, context: int
) -> tuple[list[int], int]:
    """Ids up to the query's last token, and the position at which the query begins.

    If more documents are given than fit, the least similar (first) ones are dropped, as query packing does in training.
    """
    query = list(map(int, query))
    if len(query) > context:
        raise ValueError(
            f"a held-out document of {len(query)} tokens does not fit into the model's context of {context} tokens; "
            f"give shards of shorter documents."
        )
    # The last token is only a target: it occupies no position of the input.
    head = begin_sample(keep_nearest(documents, len(query) - 1, context), vocabulary)
    return head + query, len(head)


def measure_loss(decoder: Decoder, queries: list, documents: list[list], vocabulary: Vocabulary) -> dict[str, float]:
    """Mean loss per token of the queries, each with its `documents` in context.

    Returns `loss`, `loss_text` (with <break>) and `loss_image` in nats per token, and the number of `tokens`.
    """
    built = [build_sequence(q, d, vocabulary, decoder.context) for q, d in zip(queries, documents, strict=True)]
    sums, counts = np.zeros(2), np.zeros(2, np.int64)  # text, image
    longest = max(len(ids) for ids, _ in built)
    size = max(1, min(64, LOGIT_BYTES // (4 * vocabulary.size * longest)))
    for first in range(0, len(built), size):
        part = built[first : first + size]
        ids = torch.full((len(part), max(len(row) for row, _ in part)), vocabulary.pad)
        counted = torch.zeros(ids.shape, dtype=torch.bool)
        for index, (row, start) in enumerate(part):
            ids[index, : len(row)] = torch.tensor(row)
            counted[index, start : len(row)] = True
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
