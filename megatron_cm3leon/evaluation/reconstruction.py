"""The image tokenizer alone: the PSNR of its reconstructions, and how well the checker reads them."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_cm3leon.evaluation.heldout import measure_psnr
from megatron_cm3leon.evaluation.judge import compute_accuracy, judge_images, parse_captions
from megatron_cm3leon.evaluation.subject import Part, Subject
from megatron_cm3leon.tokenizers.images import from_pixels, load_image, to_pixels


@dataclass(frozen=True)
class Reconstructed:
    """Images of the reported pairs."""

    reconstructions: list[Image.Image]
    """Decoded from the image tokens."""
    display_images: list[Image.Image]
    """The original images; the reconstruction where the original file is missing."""


def evaluate_reconstruction(subject: Subject) -> tuple[Part, Reconstructed]:
    """PSNR in dB against the original files, and the checker's accuracy: the upper bound of generated images."""
    pairs = subject.pairs
    reconstructions = subject.generator.codec.decode_images(pairs.codes)
    size = subject.generator.codec.image.image_size
    display_images = list(reconstructions)
    scores, examples = [], []
    for number, file in enumerate(pairs.files):
        if file is None or not file.is_file():
            continue
        original = from_pixels(to_pixels(load_image(file), size))
        display_images[number] = original
        scores.append(measure_psnr(original, reconstructions[number]))
        if number in subject.examples:
            example = {
                "caption": pairs.captions[number],
                "original": subject.save_image(original, f"original-{number}"),
                "reconstruction": subject.save_image(reconstructions[number], f"reconstruction-{number}"),
                "psnr_db": scores[-1],
            }
            examples.append(example)
    figures: dict = {"image_psnr_db": float(np.mean(scores)) if scores else None}
    if subject.checker:
        expected = parse_captions(subject.checker, pairs.captions)
        figures["checker_ceiling"] = compute_accuracy(judge_images(subject.checker, reconstructions, expected))
    return Part(figures, {"reconstructions": examples}), Reconstructed(reconstructions, display_images)
