"""Judge pictures and captions of coloured shapes: which attributes do they show?

Pictures are compared with all 12,960 templates (1,440 combinations x 9 jitters), sharp and blurred as a
small image tokenizer draws them, by squared error. Templates are never stored: a template is one of 1,080
masks, a colour inside it and a background outside, so one matrix product scores them all.

    python examples/shapes/checker.py --input generated.jsonl     accuracy of pictures against their captions
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also runs as a script

from examples.shapes.drawing import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    EXTENTS,
    JITTERS,
    PICTURE_SIZES,
    POSITIONS,
    SHAPES,
    draw_mask,
)
from megatron_cm3leon.common.cli import HelpFormatter, run_tool

BLUR = 1 / 40
"""Standard deviation of the blurred templates as a share of the picture size."""

_WORDS = {value: (name, value) for name, values in ATTRIBUTES.items() for value in values}
_PATTERN = re.compile(r"\b(" + "|".join(_WORDS) + r")\b")


def parse_caption(text: str) -> dict[str, str] | None:
    """Attributes that a caption names; None unless it names each of the five exactly once."""
    found = [_WORDS[word] for word in _PATTERN.findall(" ".join(text.lower().split()))]
    attributes = dict(found)
    if len(found) != len(ATTRIBUTES) or len(attributes) != len(ATTRIBUTES):
        return None
    return {name: attributes[name] for name in ATTRIBUTES}


@cache
def _load_masks(picture_size: int) -> tuple[list[tuple[str, str, str]], np.ndarray, np.ndarray, np.ndarray]:
    """Every mask, sharp and blurred: names (shape, size, position), float32 coverages [1080, pixels], their
    sums and the sums of their squares."""
    names = list(itertools.product(SHAPES, EXTENTS, POSITIONS, JITTERS))
    sharp = [Image.fromarray(draw_mask(*name, picture_size).astype(np.uint8) * 255) for name in names]
    blur = ImageFilter.GaussianBlur(BLUR * picture_size)
    masks = [np.asarray(mask, np.float32).ravel() / 255 for mask in sharp + [mask.filter(blur) for mask in sharp]]
    masks = np.stack(masks)
    return [name[:3] for name in names] * 2, masks, masks.sum(axis=1), (masks**2).sum(axis=1)


def _to_array(picture) -> np.ndarray:
    """PIL picture or array, uint8 0..255 or float 0..1, to float32 [size, size, 3] of 0..255."""
    if isinstance(picture, Image.Image):
        picture = picture.convert("RGB")
    array = np.asarray(picture)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"a picture must have shape [height, width, 3], not {list(array.shape)}.")
    if array.dtype.kind == "f":
        array = np.clip(array * 255, 0, 255).round().astype(np.uint8)
    if array.shape[0] != array.shape[1] or array.shape[0] not in PICTURE_SIZES:
        size = min(PICTURE_SIZES, key=lambda known: abs(known - array.shape[0]))
        array = np.asarray(Image.fromarray(array).resize((size, size), Image.Resampling.BOX))
    return array.astype(np.float32)


def classify_with_error(picture) -> tuple[dict[str, str], float]:
    """Attributes of the nearest template, and the root mean square distance to it in levels of 0..255.

    `picture`: PIL picture, or array [height, width, 3] of uint8 or of floats in 0..1; sizes other than 32
    and 64 are resized to the nearer of them. A large error (above about 60) means that it shows no shape.
    """
    array = _to_array(picture)
    names, masks, sums, squares = _load_masks(array.shape[0])
    pixels = array.reshape(-1, 3)
    colours, backgrounds = np.array(list(COLOURS.values())), np.array(list(BACKGROUNDS.values()))
    # A template is b + a (c - b), with a the mask: |x - b|^2 - 2 a (x - b)(c - b) + a^2 |c - b|^2, summed.
    contrast = colours[:, None] - backgrounds[None]  # [colours, backgrounds, 3]
    outside = [((pixels - background) ** 2).sum() for background in backgrounds]
    covered = (masks @ pixels)[:, None] - sums[:, None, None] * backgrounds  # [masks, backgrounds, 3]
    aligned = np.einsum("mbx,cbx->mcb", covered, contrast)
    errors = outside - 2 * aligned + squares[:, None, None] * (contrast**2).sum(axis=2)
    mask, colour, background = np.unravel_index(errors.argmin(), errors.shape)
    shape, size, position = names[mask]
    attributes = {
        "colour": list(COLOURS)[colour],
        "shape": shape,
        "size": size,
        "position": position,
        "background": list(BACKGROUNDS)[background],
    }
    return attributes, float(np.sqrt(max(errors[mask, colour, background], 0) / array.size))


def classify(picture) -> dict[str, str]:
    """Attributes {colour, shape, size, position, background} that a picture shows."""
    return classify_with_error(picture)[0]


def measure_agreement(pairs) -> dict[str, float]:
    """Share of (expected, found) attribute pairs that agree: by attribute, and `all` five.

    `found` None (a caption that does not parse) agrees in nothing.
    """
    pairs = list(pairs)
    if not pairs:
        raise ValueError("there is nothing to judge: no pairs of expected and found attributes.")
    hits = np.array(
        [[bool(found) and found[name] == expected[name] for name in ATTRIBUTES] for expected, found in pairs]
    )
    return {
        **dict(zip(ATTRIBUTES, hits.mean(axis=0).tolist(), strict=True)),
        "all": float(hits.all(axis=1).mean()),
    }


def judge_file(path: str | Path) -> dict[str, float]:
    """Agreement of the pictures of a JSONL file ({"image", "caption"} a line) with their captions."""
    path = Path(path)
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = json.loads(line)
        expected = parse_caption(fields["caption"])
        if expected is None:
            raise ValueError(
                f"{path}:{number}: {fields['caption']!r} does not name each of {', '.join(ATTRIBUTES)} once."
            )
        with Image.open(path.parent / fields["image"]) as picture:
            pairs.append((expected, classify(picture)))
    return measure_agreement(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Share of pictures that show what their captions say.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--input", required=True, help='JSONL file of {"image", "caption"}, paths relative to it')
    options = parser.parse_args()
    for name, share in judge_file(options.input).items():
        print(f"{name:<10} {100 * share:6.1f} %")


if __name__ == "__main__":
    run_tool(main)
