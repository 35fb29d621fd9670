"""Held-out loss with and without retrieved documents, on the same tokens both times.

    with      </s> document <break> ... document <break> query </s>
    without   </s> query </s>

Only the tokens of the query document are counted: neither those of retrieved documents nor the last </s>.
"""

from collections.abc import Sequence

import numpy as np

from megatron_cm3leon.evaluation.retrieval import Retrieved
from megatron_cm3leon.evaluation.subject import Part, Subject
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.prompts import begin_sample
from megatron_cm3leon.generation.retrieved import keep_nearest
from megatron_cm3leon.generation.scoring import score_tokens
from megatron_cm3leon.tokenizers.vocab import Vocabulary

KINDS = 3
TEXT, BREAK, IMAGE = range(KINDS)
"""Kinds of tokens: text pieces, special tokens (<break>), image codes."""


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
    losses, tokens = (part.sum(0) for part in measure_documents(decoder, queries, documents, vocabulary))
    text, image = [TEXT, BREAK], [IMAGE]
    return {
        "loss": float(losses.sum() / tokens.sum()),
        "loss_text": float(losses[text].sum() / max(tokens[text].sum(), 1)),
        "loss_image": float(losses[image].sum() / max(tokens[image].sum(), 1)),
        "tokens": int(tokens.sum()),
    }


def measure_documents(
    decoder: Decoder, queries: list, documents: list[list], vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """Losses of each query, each with its `documents` in context, by the kind of token.

    Returns summed losses in nats, float64 [queries, 3], and numbers of tokens, int64 [queries, 3]. The columns are
    TEXT (text pieces), BREAK (<break> and other special tokens) and IMAGE.
    """
    built = [build_sequence(q, d, vocabulary, decoder.context) for q, d in zip(queries, documents, strict=True)]
    targets = [np.array(ids[start:], np.int64) for ids, start in built]
    scores = score_tokens(decoder, [ids[:start] for ids, start in built], targets)
    losses, tokens = np.zeros((len(built), KINDS)), np.zeros((len(built), KINDS), np.int64)
    for number, (ids, row) in enumerate(zip(targets, scores, strict=True)):
        kinds = np.where(vocabulary.is_image(ids), IMAGE, np.where(vocabulary.is_text(ids), TEXT, BREAK))
        losses[number] = np.bincount(kinds, -row.log_probabilities, KINDS)
        tokens[number] = np.bincount(kinds, minlength=KINDS)
    return losses, tokens
