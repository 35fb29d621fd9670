"""What generation makes."""

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True, eq=False)
class MadePicture:
    """A generated picture: its image codes [h*w] from 0, and the pixels they decode to."""

    caption: str | None
    seed: int
    codes: np.ndarray
    picture: Image.Image
    score: float | None = None
    """Inner product of caption and picture by the encoder that ranked it."""
