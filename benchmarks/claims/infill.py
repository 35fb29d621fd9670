"""Infilling by models with and without CM3 masking, each in the form that it was trained for.

    with CM3     text and box are generated between their left and right context, behind the sentinel
    without      in the order of the sequence: from the left context alone, which is all that a causal model can read.
                 The caption follows the image, so that it sees the whole image.

Text: one word of a caption (never the first) with the image given; right if the generated word is the same. Of what the
causal model continues with, the first word counts, so it need not know where to stop. Box: the middle quarter of the
image's codes with the caption given, generated greedily; codes outside the box are kept. Its loss is that of the true
codes inside the box, each after the true codes before it.
"""

import numpy as np
from claims.items import Drawings

from megatron_cm3leon.evaluation.loss import measure_documents
from megatron_cm3leon.generation.batch import decode_segments
from megatron_cm3leon.generation.documents import CompletionOptions
from megatron_cm3leon.generation.generator import Box, Generator
from megatron_cm3leon.generation.grammar import image_segment
from megatron_cm3leon.generation.prompts import image_prompt, infill_image_prompt, infill_text_prompt
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.generation.scoring import score_tokens

GREEDY = Sampling(temperature=0.0)
LONGEST_WORD = 12
"""Text pieces of a generated word, at most."""


def has_context(caption: str) -> bool:
    """Whether a caption has a word that `choose_word` can take."""
    return len(caption.split()) > 1


def choose_word(caption: str, number: int) -> tuple[str, str, str]:
    """(before, word, after): a word of a caption that has others before it, chosen by the number of its document."""
    words = caption.split()
    place = 1 + int(np.random.default_rng((5, number)).integers(len(words) - 1))
    return " ".join(words[:place]), words[place], " ".join(words[place + 1 :])


def choose_box(height: int, width: int) -> Box:
    """The middle quarter of an image, in codes."""
    return height // 4, width // 4, height - height // 4, width - width // 4


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
    """Whether the generated word is right, and the nats of the right one: bool and float64 [n]."""
    codec, vocabulary = generator.codec, generator.vocabulary
    ids = codec.encode_image_ids(list(codes))
    words = [codec.encode_continuation(f" {word}") for _, word, _ in texts]
    left = [codec.text.encode(before) for before, _, _ in texts]
    if masked:
        after = [f" {text}" if text else "" for _, _, text in texts]
        pairs = [(before, text) for (before, _, _), text in zip(texts, after, strict=True)]
        found = generator.infill_text(pairs, GREEDY, images=list(codes), longest=LONGEST_WORD)
        right = [text.split() == " ".join(parts).split() for text, parts in zip(found, texts, strict=True)]
        rest = [codec.encode_continuation(text) if text else [] for text in after]
        rows = zip(left, rest, ids, strict=True)
        prefixes = [infill_text_prompt(before, text, image, [], vocabulary) for before, text, image in rows]
    else:
        options = CompletionOptions(text=GREEDY, segments=1, longest=LONGEST_WORD)
        documents = [[image, before] for image, (before, _, _) in zip(codes, texts, strict=True)]
        continued = [str(parts[0]) if parts else "" for parts in generator.complete(documents, options)]
        right = [text.split()[:1] == [word] for text, (_, word, _) in zip(continued, texts, strict=True)]
        rows = zip(ids, left, strict=True)
        prefixes = [[vocabulary.eos, *image, vocabulary.break_id, *before] for image, before in rows]
    nats = [-row.total for row in score_tokens(generator.decoder, prefixes, words)]
    return np.array(right), np.array(nats)


def _infill_boxes(
    generator: Generator, captions: list[str], codes: np.ndarray, masked: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Share of the generated codes in the box that are the true ones, and nats per true code in the box."""
    codec, vocabulary, decoder = generator.codec, generator.vocabulary, generator.decoder
    box = choose_box(vocabulary.image_height, vocabulary.image_width)
    inside = np.zeros((vocabulary.image_height, vocabulary.image_width), bool)
    inside[box[0] : box[2], box[1] : box[3]] = True
    inside = inside.reshape(-1)
    texts = [codec.text.encode(caption) for caption in captions]
    ids = codec.encode_image_ids(list(codes))
    start, end = np.flatnonzero(inside)[[0, -1]] + (0, 1)
    if masked:
        made = generator.infill_images(list(codes), box, GREEDY, captions=captions)
        generated = np.stack([one.codes for one in made])
        rows = zip(ids, texts, strict=True)
        prefixes = [infill_image_prompt(row, start, end, text, [], vocabulary) for row, text in rows]
        targets = [row[start:end] for row in ids]
    else:
        prompts = [image_prompt(text, [], vocabulary) for text in texts]
        forced = np.where(inside, -1, np.array(ids))
        seeds = [0] * len(ids)
        found = decode_segments(decoder, prompts, image_segment(vocabulary), GREEDY, seeds, forced=forced)
        generated = found - vocabulary.image_start
        prefixes, targets = prompts, [row[:end] for row in ids]
    assert (generated[:, ~inside] == codes[:, ~inside]).all(), "codes outside the box were changed"
    kept = inside[start:end] if masked else inside[:end]
    scores = score_tokens(decoder, prefixes, targets)
    nats = np.array([-row.log_probabilities[kept].mean() for row in scores])
    return (generated[:, inside] == codes[:, inside]).mean(axis=1), nats
