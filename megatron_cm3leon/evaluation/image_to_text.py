"""Captions generated for held-out images."""

import numpy as np
from PIL import Image

from megatron_cm3leon.evaluation.judge import judge_captions, measure_word_f1, parse_captions
from megatron_cm3leon.evaluation.retrieval import Retrieved
from megatron_cm3leon.evaluation.subject import Part, Subject


def evaluate_captions(subject: Subject, display_images: list[Image.Image], retrieved: Retrieved | None) -> Part:
    """Caption the held-out images, given by their codes in the shards; share of correct captions, F1 of the words.

    A caption is correct if the checker reads all attributes from it; without a checker, if it equals the held-out one.
    """
    captions = subject.pairs.captions
    generated = subject.generator.captions(
        list(subject.pairs.codes), retrieved=retrieved.by_image if retrieved else None
    )
    if subject.checker:
        judged = judge_captions(subject.checker, generated, parse_captions(subject.checker, captions))
        correct = [all(entry[2] for entry in attributes.values()) for attributes in judged]
    else:
        correct = [text == caption for text, caption in zip(generated, captions, strict=True)]
    overlaps = [measure_word_f1(text, caption) for text, caption in zip(generated, captions, strict=True)]
    figures = {"caption_accuracy": sum(correct) / len(correct), "caption_word_f1": float(np.mean(overlaps))}
    examples = [
        {
            "picture": subject.save_image(display_images[number], f"original-{number}"),
            "caption": captions[number],
            "made": generated[number],
            "right": correct[number],
        }
        for number in subject.examples
    ]
    return Part(figures, {"captions": examples})
