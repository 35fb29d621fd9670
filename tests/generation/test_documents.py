"""Continuation of documents: well formed for every random draw, and the same as by full forward passes."""

import numpy as np
import pytest
import torch

from megatron_cm3leon.generation import documents
from megatron_cm3leon.generation.documents import CompletionOptions
from megatron_cm3leon.generation.grammar import opening_segment
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.generation.types import GeneratedImage

IMAGE = np.arange(12) % 16
DOCUMENTS = [["a red"], ["a", IMAGE], [], [IMAGE], ["x on", "white"]]


def build_options(seed=0, longest=5, **options):
    """Options of a high temperature, with which all kinds of parts are drawn."""
    text, image = Sampling(temperature=4.0, seed=seed), Sampling(temperature=3.0, seed=seed)
    return CompletionOptions(text=text, image=image, longest=longest, **options)


def encode_completed(generator, document, parts):
    """Ids of the document and the new parts after it; a first text continues the last text of the document."""
    ids = generator.codec.encode_document(document)
    for number, part in enumerate(parts):
        continues = number == 0 and document and isinstance(document[-1], str)
        ids += [28] if ids and not continues else []
        ids += generator.codec.text.encode(part) if isinstance(part, str) else (10 + part.codes).tolist()
    return ids


def test_every_document_is_well_formed(generator):
    texts = images = 0
    for seed in range(8):
        for document, parts in zip(DOCUMENTS, generator.complete(DOCUMENTS, build_options(seed)), strict=True):
            assert len(parts) <= 4
            for part in parts:
                if isinstance(part, GeneratedImage):
                    assert part.codes.shape == (12,) and part.codes.min() >= 0 and part.codes.max() < 16
                    images += 1
                else:
                    assert len(part.split()) <= 6  # the piece that opens it, and five
                    texts += 1
            assert 1 + len(encode_completed(generator, document, parts)) <= generator.decoder.context + 1
    assert texts > 20 and images > 8


def continue_greedily(decoder, ids, segments, longest):
    """Ids of the completed document: a full forward pass for each id, and the grammar written out."""
    ids, count = list(ids), 0
    state = "opening" if len(ids) == 1 else "after" if ids[-1] >= 10 else "text"
    while count < segments:
        if state == "image":
            for _ in range(11):
                ids.append(most_likely(decoder, ids, range(10, 26)))
            count, state = count + 1, "after"
        elif state == "opening":
            token = most_likely(decoder, ids, [*range(26), 27])
            if token == 27:
                break
            ids.append(token)
            state = "image" if token >= 10 else "text"
        else:
            token = most_likely(decoder, ids, [27, 28]) if state == "after" else 0
            for remaining in range(longest, -1, -1) if state == "text" else ():
                token = most_likely(decoder, ids, [*range(10), 27, 28]) if remaining else 27
                if token >= 10:
                    break
                ids.append(token)
            count += state == "text"
            if token == 27 or count == segments:
                break
            ids.append(28)
            state = "opening"
    return ids[:-1] if ids[-1] == 28 else ids


def test_greedy_completion_is_the_most_likely_document(generator, decoder):
    greedy = Sampling(temperature=0)
    options = CompletionOptions(text=greedy, image=greedy, segments=3, longest=6)
    for document in DOCUMENTS:
        parts = generator.complete([document], options)[0]
        start = [27, *generator.codec.encode_document(document)]
        assert [27, *encode_completed(generator, document, parts)] == continue_greedily(decoder, start, 3, 6)


def most_likely(decoder, ids, allowed):
    allowed = list(allowed)
    return allowed[int(decoder.all_logits(torch.tensor([ids]))[0, -1, allowed].argmax())]


def test_a_completion_does_not_depend_on_other_documents_of_the_batch(generator):
    batch = generator.complete(DOCUMENTS, build_options(3))
    for document, parts in zip(DOCUMENTS, batch, strict=True):
        single = generator.complete([document], build_options(3))[0]
        assert encode_completed(generator, document, single) == encode_completed(generator, document, parts)


def test_a_full_context_ends_the_document(generator):
    long = ["a " * 60]
    parts = generator.complete([long], build_options(segments=9, longest=9))[0]
    assert len(encode_completed(generator, long, parts)) <= generator.decoder.context


def test_each_part_is_opened_once(generator, monkeypatch):
    """The context has room for one image and one more token: after the opening token there is no room for an image."""
    opened = []

    def record(vocabulary, images):
        opened.append(images)
        return opening_segment(vocabulary, images)

    monkeypatch.setattr(documents, "opening_segment", record)
    retrieved = [1] * (generator.decoder.context - 14)
    generator.complete([[]], build_options(segments=1), retrieved=[[retrieved]])
    assert opened == [True]


def test_invalid_options_and_documents_are_refused(generator):
    for options, message in [
        ({"image": Sampling(guidance=2.0)}, r"guidance \(2.0\) .* of image contrast a prompt with one without its"),
        ({"text": Sampling(contrast_k=2)}, r"of text contrast a prompt"),
        ({"segments": 0}, r"segments \(0\) must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            generator.complete([["a"]], CompletionOptions(**options))
    with pytest.raises(ValueError, match=r"retrieved has documents for 0 of 1 documents"):
        generator.complete([["a"]], retrieved=[])
    with pytest.raises(ValueError, match=r"a prompt of 71 tokens"):
        generator.complete([["a " * 70]])
