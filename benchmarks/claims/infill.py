"""Infilling by models with and without CM3 masking, each in the form that it was trained for.

    with CM3     text and box are generated between their left and right context, behind the sentinel
    without      in the order of the sequence: from the left context alone, which is all that a causal model can read.
                 The caption follows the image, so that it sees the whole image.

Text: one word of a caption (never the first) with the image given; right if greedy decoding gives its pieces, and with
CM3 also the end of the span: the causal model need not know where to stop. Box: the middle quarter of the image's codes
with the caption given, generated greedily; codes outside the box are kept. Its loss is that of the true codes inside
the box, each after the true codes before it. tools/evaluate.py infill measures further forms.
"""

import numpy as np
from claims.items import Drawings

from megatron_cm3leon.evaluation.loss import measure_documents
from megatron_cm3leon.evaluation.tasks.infill import place_boxes
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.prompts import image_prompt, infill_image_prompt, infill_text_prompt
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.generation.scoring import score_tokens

GREEDY = Sampling(temperature=0.0)
CENTER = 2
"""Which of the boxes of the task infill is hidden: the one that both families must fill from all sides."""


def has_context(caption: str) -> bool:
    """Whether a caption has a word that `choose_word` can take."""
    return len(caption.split()) > 1


def choose_word(caption: str, number: int) -> tuple[str, str, str]:
    """(before, word, after): a word of a caption that has others before it, chosen by the number of its document."""
    words = caption.split()
    place = 1 + int(np.random.default_rng((5, number)).integers(len(words) - 1))
    return " ".join(words[:place]), words[place], " ".join(words[place + 1 :])


def measure_infilling(generator: Generator, items: Drawings, part: slice, masked: bool) -> dict[str, np.ndarray]:
    """Arrays of some items: losses, tokens, text_right, text_nats, box_right (share of the codes), box_nats.

    `masked`: the model was trained with CM3 masking.
    """
    queries, codes = items.read(part), items.read_codes(generator.vocabulary, part)
    losses, tokens = measure_documents(generator.decoder, queries, [[] for _ in queries], generator.vocabulary)
    texts = [choose_word(*each) for each in zip(items.captions[part], items.numbers[part], strict=True)]
    arrays = {"losses": losses, "tokens": tokens}
    arrays["text_right"], arrays["text_nats"] = _infill_texts(generator, texts, codes, masked)
    arrays["box_right"], arrays["box_nats"] = _infill_boxes(generator, items.captions[part], codes, masked)
    return arrays


def _infill_texts(
    generator: Generator, texts: list[tuple[str, str, str]], codes: np.ndarray, masked: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Whether the word is filled in by greedy decoding, and its nats: bool and float64 [n]."""
    codec, vocabulary = generator.codec, generator.vocabulary
    words = [codec.encode_continuation(f" {word}") for _, word, _ in texts]
    left = [codec.text.encode(before) for before, _, _ in texts]
    right = [codec.encode_continuation(f" {after}") if after else [] for _, _, after in texts]
    rows = zip(left, right, codec.encode_image_ids(list(codes)), strict=True)
    if masked:
        prefixes = [infill_text_prompt(before, after, image, [], vocabulary) for before, after, image in rows]
        targets = [[*word, vocabulary.eoss] for word in words]
    else:
        prefixes = [[vocabulary.eos, *image, vocabulary.break_id, *before] for before, _, image in rows]
        targets = words
    found = score_tokens(generator.decoder, prefixes, targets)
    nats = [-row.log_probabilities[: len(word)].sum() for row, word in zip(found, words, strict=True)]
    return np.array([row.is_greedy for row in found]), np.array(nats)


def _infill_boxes(
    generator: Generator, captions: list[str], codes: np.ndarray, masked: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Share of the generated codes in the box that are the true ones, and nats per true code in the box."""
    codec, vocabulary, decoder = generator.codec, generator.vocabulary, generator.decoder
    box = place_boxes(vocabulary.image_height, vocabulary.image_width)[CENTER]
    inside = np.zeros((vocabulary.image_height, vocabulary.image_width), bool)
    inside[box[0] : box[2], box[1] : box[3]] = True
    inside = inside.reshape(-1)
    texts = [codec.text.encode(caption) for caption in captions]
    ids = codec.encode_image_ids(list(codes))
    start, end = np.flatnonzero(inside)[[0, -1]] + (0, 1)
    made = generator.infill_images(list(codes), box, GREEDY, captions=captions, form="masked" if masked else "raster")
    generated = np.stack([one.codes for one in made])
    if masked:
        rows = zip(ids, texts, strict=True)
        prefixes = [infill_image_prompt(row, start, end, text, [], vocabulary) for row, text in rows]
        targets = [row[start:end] for row in ids]
    else:
        prefixes = [image_prompt(text, [], vocabulary) for text in texts]
        targets = [row[:end] for row in ids]
    assert (generated[:, ~inside] == codes[:, ~inside]).all(), "codes outside the box were changed"
    kept = inside[start:end] if masked else inside[:end]
    scores = score_tokens(decoder, prefixes, targets)
    nats = np.array([-row.log_probabilities[kept].mean() for row in scores])
    return (generated[:, inside] == codes[:, inside]).mean(axis=1), nats
