"""Small folders of images for the tests of metrics: shapes on noise, so that features differ."""

import numpy as np
from PIL import Image


def write_images(folder, count, seed=0, size=16, suffix=".png"):
    """Write `count` images of random colored squares; returns the folder."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        pixels = random.integers(0, 60, (size, size, 3)).astype(np.uint8)
        left, top = random.integers(0, size // 2, 2)
        pixels[top : top + size // 2, left : left + size // 2] = random.integers(0, 256, 3)
        Image.fromarray(pixels).save(folder / f"{number:03d}{suffix}")
    return folder
