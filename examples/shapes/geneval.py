"""GenEval's groups on colored shapes: a file of prompts, and a checker that finds several objects in an image.

    python examples/shapes/geneval.py --output prompts.jsonl --per-group 50
    python tools/evaluate.py geneval --model exported/ --prompts prompts.jsonl --checker examples/shapes/geneval.py \\
        --output geneval/

An image is explained by templates (shape, size, color; sharp and blurred), one after the other: the template at the
place where it lowers the squared error most is an object, its pixels become background, and the search goes on until no
template explains half of what it covers. All places are compared by one Fourier transform per mask.
"""

import argparse
import itertools
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for running this file as a script

from examples.shapes.checker import BLUR, classify, parse_caption, to_array
from examples.shapes.drawing import BACKGROUNDS, COLORS, EXTENTS, SHAPES, draw_mask
from megatron_cm3leon.common.cli import HelpFormatter, run_tool
from megatron_cm3leon.evaluation.metrics.geneval import RELATIONS

__all__ = ["classify", "find_objects", "parse_caption"]  # what a checker has

MOST_OBJECTS = 8
"""Objects that are found in an image, at most."""
EXPLAINED = 0.5
"""Share of a template's energy that the image must have in its place."""
BACKGROUND_DISTANCE = 64.0
"""RGB distance, in levels of 0..255, within which a pixel counts for a background color."""


@cache
def _load_masks(image_size: int) -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray, np.ndarray]:
    """Masks around the middle of an image, sharp and blurred: names (shape, size), coverages [masks, size, size],
    their conjugate Fourier transforms, and the sums of their squares."""
    names = list(itertools.product(SHAPES, EXTENTS))
    sharp = [
        Image.fromarray(draw_mask(shape, size, "centre", (0, 0), image_size).astype(np.uint8) * 255)
        for shape, size in names
    ]
    blurred = [mask.filter(ImageFilter.GaussianBlur(BLUR * image_size)) for mask in sharp]
    masks = np.stack([np.asarray(mask, np.float32) / 255 for mask in sharp + blurred])
    middle = image_size // 2
    centered = np.roll(masks, (-middle, -middle), axis=(1, 2))
    # Images are padded to twice their size, so that a mask does not wrap around the edge.
    padded = np.zeros((len(masks), 2 * image_size, 2 * image_size), np.float32)
    for rows, columns in itertools.product((slice(0, middle), slice(-middle, None)), repeat=2):
        padded[:, rows, columns] = centered[:, rows, columns]
    return names * 2, masks, np.conj(np.fft.rfft2(padded)), (masks**2).sum(axis=(1, 2))


def find_background(array: np.ndarray) -> np.ndarray:
    """RGB of the background that most pixels [height, width, 3] are close to."""
    colors = np.array(list(BACKGROUNDS.values()), np.float32)
    distances = np.linalg.norm(array.reshape(-1, 1, 3) - colors, axis=2)
    return colors[(distances < BACKGROUND_DISTANCE).sum(axis=0).argmax()]


def find_objects(image) -> list[dict]:
    """The shapes of an image as evaluation/metrics/geneval.py has them, the most certain one first.

    `image`: as for checker.classify. Boxes are in pixels of the image that is compared, which is 32 or 64 wide.
    """
    array = to_array(image)
    image_size = array.shape[0]
    names, _, transforms, energies = _load_masks(image_size)
    residual = array - find_background(array)
    contrasts = np.array(list(COLORS.values()), np.float32) - find_background(array)  # [colors, 3]
    ideal = energies[:, None] * (contrasts**2).sum(axis=1)  # [masks, colors]
    found = []
    for _ in range(MOST_OBJECTS):
        padded = np.fft.rfft2(residual, (2 * image_size, 2 * image_size), axes=(0, 1))
        aligned = np.fft.irfft2(transforms[..., None] * padded, axes=(1, 2))[:, :image_size, :image_size]
        gains = 2 * aligned @ contrasts.T - ideal[:, None, None]  # [masks, rows, columns, colors]
        mask, row, column, color = np.unravel_index(gains.argmax(), gains.shape)
        share = float(gains[mask, row, column, color] / ideal[mask, color])
        if share < EXPLAINED:
            break
        shape, size = names[mask]
        radius = EXTENTS[size] * image_size / 64
        center = column + 0.5, row + 0.5
        box = tuple(float(middle + side * radius) for side in (-1, 1) for middle in center)
        found.append((share, {"name": shape, "color": list(COLORS)[color], "box": box, "size": size}))
        residual[_shift(_load_covers(image_size)[mask], row - image_size // 2, column - image_size // 2)] = 0
    return [one for _, one in sorted(found, key=lambda pair: -pair[0])]


@cache
def _load_covers(image_size: int) -> list[np.ndarray]:
    """For each mask its pixels with those around them, booleans [size, size]: what an object's edge can reach."""
    widen = ImageFilter.MaxFilter(2 * (image_size // 32) + 1)
    masks = _load_masks(image_size)[1]
    return [np.asarray(Image.fromarray(((mask > 0.1) * 255).astype(np.uint8)).filter(widen)) > 0 for mask in masks]


def _shift(cover: np.ndarray, down: int, right: int) -> np.ndarray:
    """Booleans [size, size], moved; what leaves the image is lost."""
    size = len(cover)
    moved = np.zeros_like(cover)
    rows, columns = np.nonzero(cover)
    inside = (rows + down >= 0) & (rows + down < size) & (columns + right >= 0) & (columns + right < size)
    moved[rows[inside] + down, columns[inside] + right] = True
    return moved


def build_prompts(per_group: int, seed: int) -> list[dict]:
    """`per_group` prompts of each of GenEval's groups, in its format; a group has fewer where it has no more."""
    random = np.random.default_rng((seed, 7))

    def draw(values) -> str:
        return str(random.choice(list(values)))

    def draw_two(values) -> tuple[str, str]:
        first, second = random.choice(list(values), 2, replace=False)
        return str(first), str(second)

    def single() -> dict:
        shape = draw(SHAPES)
        return {"prompt": f"{_article(shape)}", "include": [{"class": shape, "count": 1}]}

    def two() -> dict:
        shapes = draw_two(SHAPES)
        return {"prompt": " and ".join(map(_article, shapes)), "include": [{"class": s, "count": 1} for s in shapes]}

    def counting() -> dict:
        shape, count = draw(SHAPES), int(random.integers(2, 4))
        plural = {"cross": "crosses", "hourglass": "hourglasses"}.get(shape, f"{shape}s")
        return {
            "prompt": f"{('two', 'three')[count - 2]} {plural}",
            "include": [{"class": shape, "count": count}],
            "exclude": [{"class": shape, "count": count + 1}],
        }

    def colors() -> dict:
        shape, color = draw(SHAPES), draw(COLORS)
        return {"prompt": _article(f"{color} {shape}"), "include": [{"class": shape, "count": 1, "color": color}]}

    def position() -> dict:
        (shape, other), relation = draw_two(SHAPES), draw(RELATIONS)
        include = [{"class": other, "count": 1}, {"class": shape, "count": 1, "position": [relation, 0]}]
        return {"prompt": f"{_article(shape)} {relation} {_article(other)}", "include": include}

    def color_attr() -> dict:
        pairs = list(zip(draw_two(COLORS), draw_two(SHAPES), strict=True))
        include = [{"class": shape, "count": 1, "color": color} for color, shape in pairs]
        return {"prompt": " and ".join(_article(" ".join(pair)) for pair in pairs), "include": include}

    groups = {"single_object": single, "two_object": two, "counting": counting, "colors": colors,
              "position": position, "color_attr": color_attr}  # fmt: skip
    prompts = []
    for tag, build in groups.items():
        distinct: dict[str, dict] = {}
        for _ in range(100 * per_group):
            if len(distinct) == per_group:
                break
            made = build()
            distinct.setdefault(made["prompt"], {"tag": tag, **made})
        prompts += distinct.values()
    return prompts


def _article(noun: str) -> str:
    return f"{'an' if noun.startswith((*'aeiou', 'hourglass')) else 'a'} {noun}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write prompts of GenEval's groups.", formatter_class=HelpFormatter)
    parser.add_argument("--output", required=True, help="JSONL file to write")
    parser.add_argument("--per-group", type=int, default=50, help="distinct prompts per group, where there are as many")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts")
    options = parser.parse_args()
    if options.per_group < 1:
        raise ValueError(f"--per-group ({options.per_group}) must be at least 1.")
    prompts = build_prompts(options.per_group, options.seed)
    Path(options.output).write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    print(f"wrote {len(prompts)} prompts to {options.output}")


if __name__ == "__main__":
    run_tool(main)
