"""The second CLIP, which judges images: their names among a list, their styles, their captions, their distance.

It was trained on all drawings, so it has seen every name and style, and it is never used to retrieve or to rank.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_cm3leon.evaluation.metrics.distances import FrechetDistance, make_figure
from megatron_cm3leon.evaluation.metrics.statistics import compute_statistics
from megatron_cm3leon.evaluation.result import Figure
from megatron_cm3leon.evaluation.tasks.clip import FORMULAS
from megatron_cm3leon.retrieval.encoder import Encoder

RESAMPLES = 200
"""Resampled sets of images of a distance."""
AT_ONCE = 512
"""Texts or images that are encoded together."""


class Judge:
    """Compares images with names, styles and captions."""

    def __init__(self, folder: Path, names: Sequence[str], styles: Sequence[str], device: str = "cpu") -> None:
        self.encoder = Encoder.load(folder, device)
        self.names, self.styles = list(names), list(styles)
        self.name_vectors = self.encode_texts(self.names)
        self._style_vectors: dict[str, np.ndarray] = {}

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 [n, width]."""
        parts = [texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE)]
        return np.concatenate([self.encoder.encode_texts(part) for part in parts])

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors float32 [n, width]."""
        parts = [images[start : start + AT_ONCE] for start in range(0, len(images), AT_ONCE)]
        return np.concatenate([self.encoder.encode_images(part) for part in parts])

    def find_names(self, vectors: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """Whether the nearest of all names is the right one: bool [n] for vectors of images [n, width]."""
        found = (vectors @ self.name_vectors.T).argmax(axis=1)
        return np.array([self.names[number] == name for number, name in zip(found, names, strict=True)])

    def find_styles(self, vectors: np.ndarray, names: Sequence[str], styles: Sequence[str]) -> np.ndarray:
        """Whether, of the captions `name, style` with all styles, the right one is the nearest: bool [n]."""
        for name in set(names) - set(self._style_vectors):
            self._style_vectors[name] = self.encode_texts([f"{name}, {style}" for style in self.styles])
        found = [
            int((self._style_vectors[name] @ vector).argmax()) for name, vector in zip(names, vectors, strict=True)
        ]
        return np.array([self.styles[number] == style for number, style in zip(found, styles, strict=True)])

    def score_captions(self, vectors: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """CLIP score, 100 x max(cosine, 0), of each image and its caption: float64 [n]."""
        cosines = np.einsum("nd,nd->n", vectors, self.encode_texts(captions)).astype(np.float64)
        return FORMULAS["torchmetrics"] * cosines.clip(0)


class Distance:
    """Fréchet distance of the judge's vectors to those of true images, at the size of the generated ones."""

    def __init__(self, reference: np.ndarray) -> None:
        """reference: vectors [n, width] of the true images."""
        self.distance = FrechetDistance(compute_statistics(reference))

    def measure(self, vectors: np.ndarray) -> tuple[Figure, np.ndarray]:
        """The distance with its interval, and its values for resampled items, the same items in every arm."""
        value, found = self.distance.resample(vectors, RESAMPLES, seed=0)
        return make_figure(value, found, len(vectors), minimum=0), found
