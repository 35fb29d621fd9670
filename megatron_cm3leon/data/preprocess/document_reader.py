"""Read one document: load its images, encode its texts, apply the filters; or give the reason why it is unusable."""

import hashlib
from dataclasses import dataclass

import torch
from PIL import Image

from megatron_cm3leon.data.preprocess.filters import Filters, clean_caption
from megatron_cm3leon.data.sources import (
    BadInput,
    Entry,
    Filtered,
    RawDocument,
    RawImage,
    RawInstruction,
    RawText,
    RawTexts,
    read_image_bytes,
    shorten,
)  # fmt: skip
from megatron_cm3leon.tokenizers.images import load_image, to_pixels
from megatron_cm3leon.tokenizers.text_cache import TextEncoder

NO_TOKEN = "empty caption: it encodes to no token"
NOT_CLEANED = "instruction document: --clean-captions is for captions, not for pieces"


@dataclass(slots=True)
class Loaded:
    """A document ready to be encoded."""

    raw: RawDocument
    texts: list[str]
    payloads: list[bytes]
    """Ids of its texts, as bytes."""
    pixels: list[torch.Tensor]
    sha256: list[str]
    """SHA-256 of its image files, hexadecimal."""


def read_image(image: RawImage) -> tuple[Image.Image, bytes]:
    """An image as RGB, and the bytes of its file; ValueError gives the reason why it cannot be read."""
    try:
        content = read_image_bytes(image)
        return load_image(content), content
    except FileNotFoundError as error:
        remedy = ": its path has backslashes, where this system has /" if "\\" in image.name else ""
        raise ValueError(f"missing picture: {shorten(image.name, 240)}{remedy}") from error
    except (ValueError, OSError) as error:  # load_image converts every error of a decoder to ValueError
        reason = f"{error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"unreadable picture: {shorten(image.name, 240)}: {reason}") from error


class DocumentReader:
    """Reads the images of raw documents and applies the filters."""

    def __init__(self, tokenizers, filters: Filters) -> None:
        self.filters, self.size = filters, tokenizers.image.image_size
        self.text = TextEncoder(tokenizers.text, tokenizers.vocabulary.dtype)

    def read(self, entry: Entry) -> Loaded | BadInput | Filtered:
        """Texts as ids and images as pixels; or the entry with the reason why it is unusable or not wanted."""
        if not isinstance(entry, RawDocument):
            return entry
        texts = entry.texts
        if isinstance(entry, RawInstruction):
            if self.filters.clean_captions:
                return BadInput(entry.key, entry.source, NOT_CLEANED)
            payloads = self._encode_pieces(entry)
            if not all(payloads):
                return BadInput(entry.key, entry.source, NO_TOKEN)
            return self._load_images(Loaded(entry, texts, payloads, [], []))
        if self.filters.clean_captions:
            texts = list(map(clean_caption, texts))
            if not all(texts):
                return Filtered("caption empty after clean-up")
        payloads = list(map(self.text.encode, texts))
        if not all(payloads):
            return BadInput(entry.key, entry.source, NO_TOKEN)
        return self._load_images(Loaded(entry, texts, payloads, [], []))

    def _encode_pieces(self, document: RawInstruction) -> list[bytes]:
        """Ids of each text; a joined one continues the text before it."""
        pieces = zip(document.segments, document.joined, strict=True)
        return [
            self.text.encode_continuation(piece) if joined else self.text.encode(piece)
            for piece, joined in pieces
            if isinstance(piece, str)
        ]

    def _load_images(self, loaded: Loaded) -> Loaded | BadInput | Filtered:
        for image in loaded.raw.images:
            fault = self._load_image(loaded.raw, image, loaded)
            if fault:
                return fault
        return loaded

    def _load_image(self, entry: RawDocument, raw_image: RawImage, loaded: Loaded) -> BadInput | Filtered | None:
        try:
            image, content = read_image(raw_image)
        except ValueError as error:
            return BadInput(entry.key, entry.source, str(error))
        reason = self.filters.find_fault(image.size)
        if reason:
            return Filtered(reason)
        loaded.pixels.append(to_pixels(image, self.size, self.filters.fit))
        loaded.sha256.append(hashlib.sha256(content).hexdigest())
        return None


def describe_document(loaded: Loaded) -> dict:
    """A document's row in the shard's Parquet file, without its key."""
    raw = loaded.raw
    row = {"caption": "", "image": "", "source": raw.source, "picture_sha256": "", "extra": raw.extra, "kind": raw.kind}
    if loaded.sha256:
        row["image"] = "\n".join(image.name for image in raw.images)
        row["picture_sha256"] = "\n".join(loaded.sha256)
        row["caption"] = loaded.texts[0] if raw.kind == "pair" else ""
    return row


def describe_texts(texts: RawTexts) -> dict[str, list]:
    """Rows of texts without images as in `describe_document`, one list per column."""
    empty = [""] * len(texts)
    return {
        "caption": empty,
        "image": empty,
        "source": texts.sources,
        "picture_sha256": empty,
        "extra": texts.extras,
        "kind": [RawText.kind] * len(texts),
    }
