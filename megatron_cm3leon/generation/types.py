"""Types of what generation takes and returns."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

ImageInput = Image.Image | np.ndarray | Sequence[int]
"""A PIL image, or its image codes [h * w], from 0."""


@dataclass(frozen=True, eq=False)
class GeneratedImage:
    """A generated image: its image codes [h * w], from 0, and the pixels that they decode to."""

    caption: str | None
    seed: int
    codes: np.ndarray
    image: Image.Image
    score: float | None = None
    """Inner product of the caption's and the image's embedding, by the encoder that ranked it."""
