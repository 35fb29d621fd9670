"""Continuation of documents: well formed, whatever is drawn, and the same as by whole forward passes."""

import numpy as np
import pytest
import torch

from megatron_cm3leon.generation import documents
from megatron_cm3leon.generation.documents import CompletionOptions
from megatron_cm3leon.generation.grammar import opening_segment
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.generation.types import GeneratedImage

PICTURE = np.arange(12) % 16
DOCUMENTS = [["a red"], ["a", PICTURE], [], [PICTURE], ["x on", "white"]]


def hot(seed=0, longest=5, **options):
    """Settings under which all kinds of parts are drawn."""
    text, image = Sampling(temperature=4.0, seed=seed), Sampling(temperature=3.0, seed=seed)
    return CompletionOptions(text=text, image=image, longest=longest, **options)


def ids_of(generator, document, parts):
    """The document's ids with the new parts behind it: the text that went on is part of the old one."""
    ids = generator.codec.encode_document(document)
    for number, part in enumerate(parts):
        goes_on = number == 0 and document and isinstance(document[-1], str)
        ids += [28] if ids and not goes_on else []
        ids += generator.codec.text.encode(part) if isinstance(part, str) else (10 + part.codes).tolist()
    return ids


def test_every_document_is_well_formed(generator):
    texts = pictures = 0
    for seed in range(8):
        for document, parts in zip(DOCUMENTS, generator.complete(DOCUMENTS, hot(seed)), strict=True):
            assert len(parts) <= 4
            for part in parts:
                if isinstance(part, GeneratedImage):
                    assert part.codes.shape == (12,) and part.codes.min() >= 0 and part.codes.max() < 16
                    pictures += 1
                else:
                    assert len(part.split()) <= 6  # the piece that opened it, and five
                    texts += 1
            assert 1 + len(ids_of(generator, document, parts)) <= generator.decoder.context + 1
    assert texts > 20 and pictures > 8


def continue_greedily(decoder, ids, segments, longest):
    """The document's ids, by a whole forward pass for each, with the grammar written out."""
    ids, made = list(ids), 0
    state = "opening" if len(ids) == 1 else "after" if ids[-1] >= 10 else "text"
    while made < segments:
        if state == "picture":
            for _ in range(11):
                ids.append(most_likely(decoder, ids, range(10, 26)))
            made, state = made + 1, "after"
        elif state == "opening":
            token = most_likely(decoder, ids, [*range(26), 27])
            if token == 27:
                break
            ids.append(token)
            state = "picture" if token >= 10 else "text"
        else:
            token = most_likely(decoder, ids, [27, 28]) if state == "after" else 0
            for left in range(longest, -1, -1) if state == "text" else ():
                token = most_likely(decoder, ids, [*range(10), 27, 28]) if left else 27
                if token >= 10:
                    break
                ids.append(token)
            made += state == "text"
            if token == 27 or made == segments:
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
        assert [27, *ids_of(generator, document, parts)] == continue_greedily(decoder, start, 3, 6)


def most_likely(decoder, ids, allowed):
    allowed = list(allowed)
    return allowed[int(decoder.all_logits(torch.tensor([ids]))[0, -1, allowed].argmax())]


def test_a_document_completes_alike_beside_others(generator):
    together = generator.complete(DOCUMENTS, hot(3))
    for document, parts in zip(DOCUMENTS, together, strict=True):
        alone = generator.complete([document], hot(3))[0]
        assert ids_of(generator, document, alone) == ids_of(generator, document, parts)


def test_a_full_context_ends_the_document(generator):
    long = ["a " * 60]
    parts = generator.complete([long], hot(segments=9, longest=9))[0]
    assert len(ids_of(generator, long, parts)) <= generator.decoder.context


def test_each_part_is_opened_once(generator, monkeypatch):
    """With room for one image and one token more: after the opening token the image no longer counts as fitting."""
    opened = []

    def record(vocabulary, images):
        opened.append(images)
        return opening_segment(vocabulary, images)

    monkeypatch.setattr(documents, "opening_segment", record)
    retrieved = [1] * (generator.decoder.context - 14)
    generator.complete([[]], hot(segments=1), retrieved=[[retrieved]])
    assert opened == [True]


def test_errors(generator):
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
