"""Colored shapes: the 1,440 attribute combinations, and the image and the captions of a combination.

An image is one flat shape on a flat background, without anti-aliasing, so that a small image tokenizer encodes the same
shape to the same codes. Sizes are defined for images of 32 x 32 pixels and doubled for 64 x 64.
"""

import itertools
from functools import cache

import numpy as np

COLORS = {
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
"""Width and height of a shape in pixels of a 32-pixel image; odd, so that its center is a pixel."""
POSITIONS = {
    "top left": (8, 8),
    "top right": (8, 23),
    "centre": (16, 16),
    "bottom left": (23, 8),
    "bottom right": (23, 23),
}
"""Row and column of the center in a 32-pixel image."""
ATTRIBUTES = {
    "colour": tuple(COLORS),
    "shape": SHAPES,
    "size": tuple(EXTENTS),
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
}
IMAGE_SIZES = (32, 64)
JITTERS = tuple(itertools.product((-1, 0, 1), repeat=2))
"""Shifts (rows, columns) of the center in pixels, at either image size."""

_POSITION_PHRASES = {
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
def draw_mask(shape: str, size: str, position: str, jitter: tuple[int, int], image_size: int) -> np.ndarray:
    """The pixels of the shape, booleans [image_size, image_size]."""
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"the image size ({image_size}) must be one of {IMAGE_SIZES} pixels.")
    scale = image_size // 32
    row, column = (scale * center + shift for center, shift in zip(POSITIONS[position], jitter, strict=True))
    radius = scale * EXTENTS[size] / 2
    rows, columns = np.mgrid[:image_size, :image_size].astype(np.float64)
    # At 64 the shape is 2 x 9 or 2 x 15 pixels wide, which is even, so its center lies between pixels.
    offset = (scale - 1) / 2
    down, right = (rows - row + offset) / radius, (columns - column + offset) / radius
    return _inside(shape, down, right)


def _inside(shape: str, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether each point is inside the shape, whose bounding box is -1..1 in both directions."""
    box = np.maximum(abs(down), abs(right)) < 1
    distance = np.hypot(down, right)
    if shape == "circle":
        return distance < 0.95  # rounder corners at 9 pixels: easier to distinguish from the square
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


def draw_image(attributes: dict[str, str], jitter: tuple[int, int], image_size: int) -> np.ndarray:
    """One image, uint8 [image_size, image_size, 3]."""
    mask = draw_mask(attributes["shape"], attributes["size"], attributes["position"], jitter, image_size)
    color = np.array(COLORS[attributes["colour"]], np.uint8)
    background = np.array(BACKGROUNDS[attributes["background"]], np.uint8)
    return np.where(mask[..., None], color, background)


def write_caption(attributes: dict[str, str], phrasing: int) -> str:
    """A caption that names all five attributes, in phrasing 0 to PHRASINGS - 1."""
    words = dict(attributes, place=_POSITION_PHRASES[attributes["position"]])
    for name in ("size", "colour", "background"):
        words[f"a_{name}"] = f"{'an' if words[name][0] in 'aeiou' else 'a'} {words[name]}"
    return _PHRASINGS[phrasing].format(**words)
