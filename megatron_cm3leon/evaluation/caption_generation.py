"""Captions generated for the images of a shard folder or of a JSON Lines file, by all ranks, resumable."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from megatron_cm3leon.data.shards.reader import open_shards, split_segments
from megatron_cm3leon.evaluation.caption_files import References, read_references
from megatron_cm3leon.evaluation.metrics.image_folder import REPLACE, read_image
from megatron_cm3leon.evaluation.ranks import Ranks
from megatron_cm3leon.evaluation.result import FinishedItems
from megatron_cm3leon.evaluation.retrieval import PROMPT_TOKENS
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.retrieved import DocumentSource, keep_nearest
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.generation.types import ImageInput


class ImageSet(Protocol):
    """Images to caption, by id, with their references."""

    references: dict[str, list[str]]
    """In the order in which the images are captioned."""
    notes: list[str]

    def load_inputs(self, keys: Sequence[str]) -> list[ImageInput]:
        """What the model reads: PIL images or image codes."""

    def load_queries(self, keys: Sequence[str], generator: Generator) -> list[Image.Image]:
        """RGB images, to retrieve documents by."""


class ListedImages:
    """The images of a JSON Lines file: see caption_files.py."""

    def __init__(self, path: str | Path) -> None:
        """ValueError if an image has no file."""
        listed = read_references(path)
        self.references, self.files = listed.captions, listed.images
        self.notes: list[str] = []
        unnamed = [key for key in self.references if key not in self.files]
        if unnamed:
            raise ValueError(
                f"{len(unnamed)} of {len(self.references)} entries of {path} have no image, the first is "
                f"{unnamed[0]!r}; JSON Lines with a path as image are required."
            )
        missing = [file for file in self.files.values() if not file.is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self.files)} images of {path} do not exist, the first is {missing[0]}; paths "
                f"are relative to the file's folder."
            )

    def load_inputs(self, keys: Sequence[str]) -> list[ImageInput]:
        return [read_image(self.files[key], REPLACE) for key in keys]

    def load_queries(self, keys: Sequence[str], generator: Generator) -> list[Image.Image]:
        return [read_image(self.files[key], REPLACE) for key in keys]


class ShardImages:
    """The images of a shard folder; documents with the same image codes are one image with several references.

    The references of a document are the field `references` of its input, as the corpus of examples/icons has it, where
    that is a list of texts; else its caption.
    """

    def __init__(self, folder: str | Path) -> None:
        """ValueError if there is no document with one image and a caption."""
        self.corpus = open_shards(folder)
        metadata = self.corpus.metadata(["key", "caption", "image", "extra"]).to_pydict()
        names = metadata["key"]
        if len(set(names)) < len(names):  # shards of several inputs
            names = [str(number) for number in range(len(names))]
        self._root, self._paths = Path(self.corpus.manifest.get("input", "")), metadata["image"]
        self.numbers: dict[str, int] = {}
        """Number of the first document of each image."""
        self.references: dict[str, list[str]] = {}
        by_codes: dict[bytes, str] = {}
        skipped = 0
        for number, (caption, extra) in enumerate(zip(metadata["caption"], metadata["extra"], strict=True)):
            codes = self._read_codes(number)
            if codes is None or not caption:
                skipped += 1
                continue
            key = by_codes.setdefault(codes.tobytes(), names[number])
            self.numbers.setdefault(key, number)
            texts = _read_extra_references(extra)
            known = self.references.setdefault(key, [])
            known += [caption] if texts is None else [text for text in texts if text not in known]
        if not self.references:
            raise ValueError(f"{folder} has no document with one image and a caption; give shards of pairs.")
        self.notes = [f"{skipped} documents without exactly one image and a caption were skipped."] if skipped else []

    def _read_codes(self, number: int) -> np.ndarray | None:
        """Codes of the document's image, int64 [image tokens]; None if it has not exactly one."""
        vocabulary = self.corpus.vocabulary
        parts = split_segments(self.corpus.read(number).astype(np.int64), vocabulary)
        images = [part for part in parts if len(part) and vocabulary.is_image(part[0])]
        return images[0] - vocabulary.image_start if len(images) == 1 else None

    def load_inputs(self, keys: Sequence[str]) -> list[ImageInput]:
        rows = [self._read_codes(self.numbers[key]) for key in keys]
        return [row for row in rows if row is not None]

    def load_queries(self, keys: Sequence[str], generator: Generator) -> list[Image.Image]:
        """The original files; the tokenizer's reconstruction where a file is missing."""
        images: list[Image.Image] = []
        for key, codes in zip(keys, self.load_inputs(keys), strict=True):
            name = self._paths[self.numbers[key]]
            file = self._root / name if name else None
            found = file is not None and file.is_file()
            images.append(read_image(file, REPLACE) if file and found else generator.codec.decode_images([codes])[0])
        return images


def _read_extra_references(extra: str) -> list[str] | None:
    """The field `references` of a document's input, from the metadata `extra` (JSON); None unless it holds texts."""
    fields = json.loads(extra or "{}")
    texts = fields.get("references") if isinstance(fields, dict) else None
    valid = isinstance(texts, list) and texts and all(isinstance(text, str) and text for text in texts)
    return texts if valid else None


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """How captions are generated."""

    sampling: Sampling
    form: str
    longest: int
    """Text pieces of a caption, at most."""
    documents: int
    """Retrieved documents per image; 0 for none."""
    batch_size: int
    """Images per call of the generator."""


def open_images(shards: str | Path | None, images: str | Path | None, references: str | Path | None) -> ImageSet:
    """The images to caption; `references` replaces the captions that the shards or the file have."""
    opened: ImageSet = ShardImages(shards) if shards else ListedImages(images or "")
    if references:
        others: References = read_references(references)
        missing = [key for key in opened.references if key not in others.captions]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(opened.references)} images have no references in {references}, the first is "
                f"{missing[0]!r}; its ids must be those of {shards or images}."
            )
        opened.references = {key: others.captions[key] for key in opened.references}
    return opened


def select_images(images: ImageSet, count: int | None, seed: int) -> list[str]:
    """Ids of `count` random images, or of all, in their order."""
    keys = list(images.references)
    if count is None or count >= len(keys):
        return keys
    if count < 1:
        raise ValueError(f"--count ({count}) must be at least 1.")
    return [keys[number] for number in sorted(np.random.default_rng(seed).permutation(len(keys))[:count])]


def generate_captions(
    generator: Generator,
    images: ImageSet,
    keys: Sequence[str],
    settings: CaptionSettings,
    source: DocumentSource | None,
    finished: FinishedItems,
    ranks: Ranks,
) -> None:
    """Add the captions of the images `keys`, by id, that are not in `finished`, batch by batch."""

    def caption(batch: list[str]) -> Iterator[dict]:
        numbers, documents = _retrieve(generator, images, batch, settings, source)
        texts = generator.captions(
            images.load_inputs(batch),
            settings.sampling,
            retrieved=documents,
            form=settings.form,
            longest=settings.longest,
        )
        for text, used in zip(texts, numbers, strict=True):
            yield {"caption": text, "retrieved": used}

    ranks.finish_items(
        {key: key for key in keys},
        caption,
        finished,
        batch_size=settings.batch_size,
        label="captioning",
        unit="images",
    )


def _retrieve(
    generator: Generator,
    images: ImageSet,
    keys: Sequence[str],
    settings: CaptionSettings,
    source: DocumentSource | None,
) -> tuple[list[list[int]], list[list[np.ndarray]] | None]:
    """Numbers in the bank and ids of the documents of each image: as many as fit into the context with the caption."""
    if source is None:
        return [[] for _ in keys], None
    numbers = source.find(settings.documents, images=images.load_queries(keys, generator))
    needed = generator.vocabulary.image_tokens + settings.longest + PROMPT_TOKENS
    documents = [keep_nearest(row, needed, generator.decoder.context) for row in source.read(numbers)]
    kept = [row[len(row) - len(ids) :] for row, ids in zip(numbers, documents, strict=True)]
    return kept, documents
