"""Coloured shapes: the 1,440 attribute combinations, how one is drawn and how it is said.

A picture is one flat shape on a flat background, without anti-aliasing, so that a small image tokenizer
gives the same shape the same codes. Sizes are set on a grid of 32 pixels and doubled for 64.
"""

import itertools
from functools import cache

import numpy as np

COLOURS = {
    "red": (220, 0, 0),
    "orange": (255, 135, 0),
    "yellow": (255, 240, 0),
    "green": (0, 150, 30),
    "cyan": (0, 225, 235),
    "blue": (0, 30, 235),
    "purple": (120, 0, 150),
    "pink": (255, 90, 205),
}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (128, 128, 128), "black": (0, 0, 0)}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "hourglass")
EXTENTS = {"small": 9, "large": 15}
"""Width and height of a shape in pixels of a 32-pixel picture; odd, so that a pixel is its centre."""
POSITIONS = {
    "top left": (8, 8),
    "top right": (8, 23),
    "centre": (16, 16),
    "bottom left": (23, 8),
    "bottom right": (23, 23),
}
"""Row and column of the centre in a 32-pixel picture."""
ATTRIBUTES = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(EXTENTS),
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
}
PICTURE_SIZES = (32, 64)
JITTERS = tuple(itertools.product((-1, 0, 1), repeat=2))
"""Shifts (rows, columns) of the centre in pixels, at either picture size."""

_PLACES = {
    "top left": "in the top left corner",
    "top right": "in the top right corner",
    "centre": "in the centre",
    "bottom left": "in the bottom left corner",
    "bottom right": "in the bottom right corner",
}
_PHRASINGS = (
    "{a_size} {colour} {shape} {place} on {a_background} background",
    "{size} {colour} {shape}, {position}, {background} background",
    "{a_background} background with {a_size} {colour} {shape} {place}",
    "on {background}, {a_size} {colour} {shape} {place}",
    "{a_colour} {shape}, {size}, {place} of {a_background} picture",
)
PHRASINGS = len(_PHRASINGS)


def all_combinations() -> list[dict[str, str]]:
    """Every combination of attribute values, 1,440 of them, in a fixed order."""
    return [dict(zip(ATTRIBUTES, values, strict=True)) for values in itertools.product(*ATTRIBUTES.values())]


@cache
def draw_mask(shape: str, size: str, position: str, jitter: tuple[int, int], picture_size: int) -> np.ndarray:
    """Pixels of the shape as booleans [picture_size, picture_size]."""
    if picture_size not in PICTURE_SIZES:
        raise ValueError(f"the picture size ({picture_size}) must be one of {PICTURE_SIZES} pixels.")
    scale = picture_size // 32
    row, column = (scale * centre + shift for centre, shift in zip(POSITIONS[position], jitter, strict=True))
    radius = scale * EXTENTS[size] / 2
    rows, columns = np.mgrid[:picture_size, :picture_size].astype(np.float64)
    # At 64 the shape is 2 x 9 or 2 x 15 pixels, even, so its centre lies between pixels.
    offset = (scale - 1) / 2
    down, right = (rows - row + offset) / radius, (columns - column + offset) / radius
    return _inside(shape, down, right)


def _inside(shape: str, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Is a point inside the shape whose bounding box is -1..1 both ways?"""
    box = np.maximum(abs(down), abs(right)) < 1
    distance = np.hypot(down, right)
    if shape == "circle":
        return distance < 0.95  # rounder corners at 9 pixels: farther from the square
    if shape == "square":
        return box
    if shape == "triangle":
        return box & (abs(right) <= (down + 1) / 2)
    if shape == "cross":
        return box & (np.minimum(abs(down), abs(right)) < 1 / 3)
    if shape == "ring":
        return (distance < 0.98) & (distance > 0.55)
    if shape == "hourglass":
        return box & (abs(right) <= abs(down) + 0.15)
    raise ValueError(f"shape ({shape!r}) must be one of: {', '.join(SHAPES)}.")


def draw_picture(attributes: dict[str, str], jitter: tuple[int, int], picture_size: int) -> np.ndarray:
    """One picture, uint8 [picture_size, picture_size, 3]."""
    mask = draw_mask(attributes["shape"], attributes["size"], attributes["position"], jitter, picture_size)
    colour = np.array(COLOURS[attributes["colour"]], np.uint8)
    background = np.array(BACKGROUNDS[attributes["background"]], np.uint8)
    return np.where(mask[..., None], colour, background)


def write_caption(attributes: dict[str, str], phrasing: int) -> str:
    """Caption that names all five attributes, in phrasing 0 to PHRASINGS - 1."""
    words = dict(attributes, place=_PLACES[attributes["position"]])
    for name in ("size", "colour", "background"):
        words[f"a_{name}"] = f"{'an' if words[name][0] in 'aeiou' else 'a'} {words[name]}"
    return _PHRASINGS[phrasing].format(**words)
