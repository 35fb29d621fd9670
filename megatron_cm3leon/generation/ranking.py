"""Candidates: several images per caption, of which the nearest to the caption are kept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from PIL import Image

from megatron_cm3leon.generation.types import GeneratedImage


class ImageTextEncoder(Protocol):
    """Embeddings of texts and images in one space, as CLIP's (retrieval/encoder.py)."""

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """[n, width]."""

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """[n, width]."""


@dataclass(frozen=True)
class Candidates:
    """How many images are generated per caption, and how many of them are kept."""

    count: int = 1
    """Images per caption, with the seeds `seed`, `seed` + 1, ..."""
    encoder: ImageTextEncoder | None = None
    """Ranks the candidates by their similarity to the caption; None keeps all, in the order of their seeds."""
    keep: int | None = None
    """Candidates that `encoder` keeps; 1 by default."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"candidates ({self.count}) must be at least 1.")
        if self.keep is None:
            return
        if self.encoder is None:
            raise ValueError(f"keep ({self.keep}) requires an encoder that ranks the candidates; give one as well.")
        if not 1 <= self.keep <= self.count:
            raise ValueError(f"keep ({self.keep}) must be in 1..candidates ({self.count}).")

    @property
    def kept(self) -> int:
        """Images that are returned per caption."""
        return self.count if self.encoder is None else self.keep or 1

    def select(self, images: Iterator[GeneratedImage]) -> Iterator[GeneratedImage]:
        """Of every `count` images of one caption the `kept` best, with scores, the best first."""
        if self.encoder is None:
            yield from images
            return
        for group in zip(*[images] * self.count, strict=True):
            image_vectors = self.encoder.encode_images([one.image for one in group])
            scores = image_vectors @ self.encoder.encode_texts([group[0].caption or ""])[0]
            for number in np.argsort(-scores, kind="stable")[: self.kept]:
                yield replace(group[number], score=float(scores[number]))
