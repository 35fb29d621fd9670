"""Retrieved documents of the held-out pairs, which every later measurement puts in front of its prompts."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_cm3leon.evaluation.heldout import Heldout
from megatron_cm3leon.evaluation.subject import Part, Subject
from megatron_cm3leon.generation.retrieved import DocumentSource, keep_nearest

PROMPT_TOKENS = 8
"""Most tokens that the forms of prompts.py add to a pair; includes a few for a caption longer than the held-out one."""
_SHOWN_QUERIES = 3

Documents = list[list[np.ndarray]]
"""Ids of the retrieved documents of each pair, the most similar last."""


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """Retrieved documents, and the index they are from."""

    source: DocumentSource
    by_caption: Documents
    """For the reported captions, which images are generated from."""
    by_image: Documents
    """For the reported images, which captions are generated from."""
    sweep_by_caption: Documents
    """For the captions of the sweep."""

    def measure_clip_score(self, captions: list[str], images: list[Image.Image]) -> float:
        """Mean cosine of captions and their images by the encoder of the index."""
        encoder = self.source.retriever.encoder
        return float((encoder.encode_images(images) * encoder.encode_texts(captions)).sum(1).mean())


def retrieve_documents(subject: Subject, images: list[Image.Image]) -> tuple[Part, Retrieved | None]:
    """Retrieve for captions and for `images`, those of the reported pairs; None without an index."""
    source, pairs = subject.source, subject.pairs
    if source is None:
        return Part({}, {}), None
    numbers = source.find(subject.documents, texts=pairs.captions)
    sweep_numbers = source.find(subject.documents, texts=subject.sweep_pairs.captions)
    context = subject.generator.decoder.context
    retrieved = Retrieved(
        source=source,
        by_caption=_read_documents(source, numbers, pairs, context),
        sweep_by_caption=_read_documents(source, sweep_numbers, subject.sweep_pairs, context),
        by_image=_read_documents(source, source.find(subject.documents, images=images), pairs, context),
    )
    shown = subject.examples[:_SHOWN_QUERIES]
    examples = [_describe_query(subject, source, number, numbers[number], images[number]) for number in shown]
    return Part({}, {"retrieval": examples}), retrieved


def _read_documents(source: DocumentSource, numbers: list[list[int]], pairs: Heldout, context: int) -> Documents:
    """Ids of as many documents as fit into the context together with the pair and the tokens of a prompt."""
    return [
        keep_nearest(documents, len(query) + PROMPT_TOKENS, context)
        for documents, query in zip(source.read(numbers), pairs.documents, strict=True)
    ]


def _describe_query(
    subject: Subject, source: DocumentSource, number: int, found: list[int], image: Image.Image
) -> dict:
    """A reported pair and the documents that its caption retrieves, as evaluation.json shows them."""
    captions = source.bank.metadata(["caption"])["caption"]
    query = source.retriever.encoder.encode_texts([subject.pairs.captions[number]])[0]
    vectors = source.retriever.data.vectors
    neighbors = []
    for bank_number in reversed(found):  # the most similar first
        bank_image = _decode_first_image(subject, source.bank.read(bank_number))
        neighbor = {
            "caption": captions[bank_number].as_py(),
            "picture": subject.save_image(bank_image, f"bank-{bank_number}"),
            "score": float(np.asarray(vectors[bank_number], np.float32) @ query),
        }
        neighbors.append(neighbor)
    return {
        "caption": subject.pairs.captions[number],
        "picture": subject.save_image(image, f"original-{number}"),
        "neighbours": neighbors,
    }


def _decode_first_image(subject: Subject, ids: np.ndarray) -> Image.Image:
    vocabulary = subject.vocabulary
    ids = ids.astype(np.int64)
    codes = ids[vocabulary.is_image(ids)][: vocabulary.image_tokens] - vocabulary.image_start
    return subject.generator.codec.decode_images(codes[None])[0]
