"""Held-out pairs: drawn from a corpus of shards, and measures that compare their images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_cm3leon.data.shards.reader import Corpus, split_segments
from megatron_cm3leon.evaluation.judge import Checker


@dataclass(frozen=True)
class Heldout:
    """Held-out pairs, one per entry."""

    captions: list[str]
    codes: np.ndarray
    """Image codes, int64 [pairs, image tokens]."""
    documents: list[np.ndarray]
    """Ids of the stored documents, int64."""
    files: list[Path | None]
    """The original images, if the metadata name them; they may be missing."""

    def select(self, chosen: slice) -> "Heldout":
        """Some of the pairs."""
        return Heldout(self.captions[chosen], self.codes[chosen], self.documents[chosen], self.files[chosen])


def read_heldout(corpus: Corpus, count: int, seed: int, checker: Checker | None = None) -> Heldout:
    """`count` random pairs of a corpus (fewer if it has fewer) whose captions the checker understands.

    Raises ValueError if fewer than two, or none for `count` 1, can be evaluated.
    """
    metadata = corpus.metadata(["caption", "image"]).to_pydict()
    vocabulary, folder = corpus.vocabulary, Path(corpus.manifest.get("input", ""))
    captions: list[str] = []
    codes: list[np.ndarray] = []
    documents: list[np.ndarray] = []
    files: list[Path | None] = []
    for number in np.random.default_rng(seed).permutation(corpus.documents):
        ids = corpus.read(int(number)).astype(np.int64)
        images = [part for part in split_segments(ids, vocabulary) if len(part) and vocabulary.is_image(part[0])]
        caption = metadata["caption"][number]
        if len(images) != 1 or not caption or (checker and checker.parse_caption(caption) is None):
            continue
        captions.append(caption)
        documents.append(ids)
        files.append(folder / metadata["image"][number] if metadata["image"][number] else None)
        codes.append(images[0] - vocabulary.image_start)
        if len(codes) == count:
            break
    if len(codes) < min(count, 2):
        raise ValueError(
            f"{corpus.folder} has {len(codes)} pairs of one image and a caption that can be evaluated; "
            f"{count} were requested."
        )
    return Heldout(captions, np.stack(codes), documents, files)


def measure_psnr(original: Image.Image, reconstruction: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two RGB images of the same size; at most 100."""
    left, right = (np.asarray(image, np.float64) for image in (original, reconstruction))
    return float(min(100.0, 10 * np.log10(255.0**2 / max(((left - right) ** 2).mean(), 1e-9))))


def cover_box(image: Image.Image, box: tuple[int, int, int, int], grid: tuple[int, int]) -> Image.Image:
    """A copy of the image with a checkered pattern over `box` (top, left, bottom, right in tokens of `grid`)."""
    image = image.copy()
    down, across = image.height // grid[0], image.width // grid[1]
    rows, columns = np.mgrid[: (box[2] - box[0]) * down, : (box[3] - box[1]) * across]
    checks = np.where((rows // max(1, down) + columns // max(1, across)) % 2, 165, 205).astype(np.uint8)
    image.paste(Image.fromarray(checks).convert("RGB"), (box[1] * across, box[0] * down))
    return image
