"""Determine the attributes that images and captions of colored shapes show.

An image is compared with all 12,960 templates (1,440 combinations x 9 jitters) by squared error, sharp and blurred
(the reconstructions of a small image tokenizer are blurred). Templates are never stored: a template is one of 1,080
masks, a color inside it and a background outside, so one matrix product scores all of them.

    python examples/shapes/checker.py --input generated.jsonl     accuracy of images against their captions
"""

import argparse
import itertools
import json
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for running this file as a script

from examples.shapes.drawing import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    EXTENTS,
    IMAGE_SIZES,
    JITTERS,
    POSITIONS,
    SHAPES,
    draw_mask,
)
from megatron_cm3leon.common.cli import HelpFormatter, run_tool

BLUR = 1 / 40
"""Standard deviation of the blurred templates as a share of the image size."""

_WORDS = {value: (name, value) for name, values in ATTRIBUTES.items() for value in values}
_PATTERN = re.compile(r"\b(" + "|".join(_WORDS) + r")\b")


def parse_caption(text: str) -> dict[str, str] | None:
    """The attributes that a caption names; None unless it names each of the five exactly once."""
    found = [_WORDS[word] for word in _PATTERN.findall(" ".join(text.lower().split()))]
    attributes = dict(found)
    if len(found) != len(ATTRIBUTES) or len(attributes) != len(ATTRIBUTES):
        return None
    return {name: attributes[name] for name in ATTRIBUTES}


@cache
def _load_masks(image_size: int) -> tuple[list[tuple[str, str, str]], np.ndarray, np.ndarray, np.ndarray]:
    """All masks, sharp and blurred: names (shape, size, position), float32 coverages [masks, pixels], their sums and
    the sums of their squares (both [masks])."""
    names = list(itertools.product(SHAPES, EXTENTS, POSITIONS, JITTERS))
    sharp = [Image.fromarray(draw_mask(*name, image_size).astype(np.uint8) * 255) for name in names]
    blur = ImageFilter.GaussianBlur(BLUR * image_size)
    masks = [np.asarray(mask, np.float32).ravel() / 255 for mask in sharp + [mask.filter(blur) for mask in sharp]]
    masks = np.stack(masks)
    return [name[:3] for name in names] * 2, masks, masks.sum(axis=1), (masks**2).sum(axis=1)


def to_array(image) -> np.ndarray:
    """Convert a PIL image or an array, uint8 in 0..255 or float in 0..1, to float32 [size, size, 3] in 0..255."""
    if isinstance(image, Image.Image):
        image = image.convert("RGB")
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image must have shape [height, width, 3], not {list(array.shape)}.")
    if array.dtype.kind == "f":
        array = np.clip(array * 255, 0, 255).round().astype(np.uint8)
    if array.shape[0] != array.shape[1] or array.shape[0] not in IMAGE_SIZES:
        size = min(IMAGE_SIZES, key=lambda known: abs(known - array.shape[0]))
        array = np.asarray(Image.fromarray(array).resize((size, size), Image.Resampling.BOX))
    return array.astype(np.float32)


def classify_with_error(image) -> tuple[dict[str, str], float]:
    """Attributes of the nearest template, and the root mean square distance to it in levels of 0..255.

    `image`: a PIL image, or an array [height, width, 3] of uint8 or of floats in 0..1; sizes other than 32 and 64 are
    resized to the nearer of the two. A large error (above about 60) means that the image shows no shape.
    """
    array = to_array(image)
    names, masks, sums, squares = _load_masks(array.shape[0])
    pixels = array.reshape(-1, 3)
    colors, backgrounds = np.array(list(COLORS.values())), np.array(list(BACKGROUNDS.values()))
    # A template is b + a (c - b), with a the mask: |x - b|^2 - 2 a (x - b)(c - b) + a^2 |c - b|^2, summed.
    contrast = colors[:, None] - backgrounds[None]  # [colors, backgrounds, 3]
    outside = [((pixels - background) ** 2).sum() for background in backgrounds]
    covered = (masks @ pixels)[:, None] - sums[:, None, None] * backgrounds  # [masks, backgrounds, 3]
    aligned = np.einsum("mbx,cbx->mcb", covered, contrast)
    errors = outside - 2 * aligned + squares[:, None, None] * (contrast**2).sum(axis=2)
    mask, color, background = np.unravel_index(errors.argmin(), errors.shape)
    shape, size, position = names[mask]
    attributes = {
        "colour": list(COLORS)[color],
        "shape": shape,
        "size": size,
        "position": position,
        "background": list(BACKGROUNDS)[background],
    }
    return attributes, float(np.sqrt(max(errors[mask, color, background], 0) / array.size))


def classify(image) -> dict[str, str]:
    """The attributes {colour, shape, size, position, background} that an image shows."""
    return classify_with_error(image)[0]


def measure_agreement(pairs) -> dict[str, float]:
    """Share of (expected, found) attribute pairs that agree: per attribute, and in `all` five.

    `found` None (a caption that does not parse) agrees in no attribute.
    """
    pairs = list(pairs)
    if not pairs:
        raise ValueError(
            "there is nothing to judge: pairs is empty; give at least one pair of expected and found attributes."
        )
    hits = np.array(
        [[bool(found) and found[name] == expected[name] for name in ATTRIBUTES] for expected, found in pairs]
    )
    return {
        **dict(zip(ATTRIBUTES, hits.mean(axis=0).tolist(), strict=True)),
        "all": float(hits.all(axis=1).mean()),
    }


def judge_file(path: str | Path) -> dict[str, float]:
    """Agreement of the images of a JSONL file (one {"image", "caption"} per line) with their captions."""
    path = Path(path)
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = json.loads(line)
        expected = parse_caption(fields["caption"])
        if expected is None:
            raise ValueError(
                f"{path}:{number}: {fields['caption']!r} does not name each of {', '.join(ATTRIBUTES)} exactly once."
            )
        with Image.open(path.parent / fields["image"]) as image:
            pairs.append((expected, classify(image)))
    return measure_agreement(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Share of images that show the attributes of their captions.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--input", required=True, help='JSONL file of {"image", "caption"}, paths relative to it')
    options = parser.parse_args()
    for name, share in judge_file(options.input).items():
        print(f"{name:<10} {100 * share:6.1f} %")


if __name__ == "__main__":
    run_tool(main)
