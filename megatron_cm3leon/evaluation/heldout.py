"""Held-out pairs: what evaluation draws from a corpus of shards, and how pictures of them are compared."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_cm3leon.data.shards.reader import Corpus, split_segments


@dataclass
class Heldout:
    """Held-out pairs: caption, image codes, the stored document and where its picture is."""

    captions: list[str]
    codes: np.ndarray
    documents: list[np.ndarray]
    files: list[Path | None]

    def part(self, chosen: slice) -> "Heldout":
        return Heldout(self.captions[chosen], self.codes[chosen], self.documents[chosen], self.files[chosen])


def read_heldout(corpus: Corpus, count: int, seed: int, checker=None) -> Heldout:
    """`count` pairs drawn from a corpus, of those whose captions the checker understands."""
    metadata = corpus.metadata(["caption", "image"]).to_pydict()
    vocabulary, folder = corpus.vocabulary, Path(corpus.manifest.get("input", ""))
    pairs = Heldout([], np.empty((0, vocabulary.image_tokens), np.int64), [], [])
    codes = []
    for number in np.random.default_rng(seed).permutation(corpus.documents):
        ids = corpus.read(int(number)).astype(np.int64)
        pictures = [part for part in split_segments(ids, vocabulary) if len(part) and vocabulary.is_image(part[0])]
        caption = metadata["caption"][number]
        if len(pictures) != 1 or not caption or (checker and checker.parse_caption(caption) is None):
            continue
        pairs.captions.append(caption)
        pairs.documents.append(ids)
        pairs.files.append(folder / metadata["image"][number] if metadata["image"][number] else None)
        codes.append(pictures[0] - vocabulary.image_start)
        if len(codes) == count:
            break
    if len(codes) < min(count, 2):
        raise ValueError(
            f"{corpus.folder} has {len(codes)} pairs of one picture and a caption that can be evaluated; "
            f"{count} were asked for."
        )
    pairs.codes = np.stack(codes)
    return pairs


def measure_psnr(original: Image.Image, reconstruction: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two RGB pictures of one size; at most 100."""
    left, right = (np.asarray(picture, np.float64) for picture in (original, reconstruction))
    return float(min(100.0, 10 * np.log10(255.0**2 / max(((left - right) ** 2).mean(), 1e-9))))


def cover_box(picture: Image.Image, box: tuple[int, int, int, int], grid: tuple[int, int]) -> Image.Image:
    """The picture with the part that is to be made anew checkered."""
    picture = picture.copy()
    down, across = picture.height // grid[0], picture.width // grid[1]
    rows, columns = np.mgrid[: (box[2] - box[0]) * down, : (box[3] - box[1]) * across]
    checks = np.where((rows // max(1, down) + columns // max(1, across)) % 2, 165, 205).astype(np.uint8)
    picture.paste(Image.fromarray(checks).convert("RGB"), (box[1] * across, box[0] * down))
    return picture
