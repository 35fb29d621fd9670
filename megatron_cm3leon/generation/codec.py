"""Texts and images as ids of the joint vocabulary, and back, with the tokenizers of a model."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from megatron_cm3leon.generation.types import ImageInput
from megatron_cm3leon.tokenizers.folder import Tokenizers
from megatron_cm3leon.tokenizers.images import from_pixels, to_pixels
from megatron_cm3leon.tokenizers.text import encode_continuation

IMAGES_AT_ONCE = 32
"""Images that the image tokenizer encodes or decodes in one batch."""


class Codec:
    """Encodes what prompts consist of, decodes what was generated."""

    def __init__(self, tokenizers: Tokenizers) -> None:
        self.text, self.image, self.vocabulary = tokenizers.text, tokenizers.image, tokenizers.vocabulary

    # Images

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Image codes [n, h * w], from 0, of PIL images."""
        pixels = torch.stack([to_pixels(image, self.image.image_size) for image in images])
        return torch.cat([self.image.encode(part) for part in pixels.split(IMAGES_AT_ONCE)]).cpu().numpy()

    def decode_images(self, codes: np.ndarray | Sequence) -> list[Image.Image]:
        """PIL images of image codes [n, h * w], from 0."""
        images: list[Image.Image] = []
        for part in torch.as_tensor(np.asarray(codes), dtype=torch.long).split(IMAGES_AT_ONCE):
            images += [from_pixels(pixels) for pixels in self.image.decode(part).cpu()]
        return images

    def encode_image_ids(self, images: Sequence[ImageInput]) -> list[list[int]]:
        """Vocabulary ids [n, h * w] of PIL images or image codes; ValueError for codes that are not an image's."""
        pil_images = {number: image for number, image in enumerate(images) if isinstance(image, Image.Image)}
        rows: dict[int, np.ndarray] = {}
        if pil_images:
            rows = dict(zip(pil_images, self.encode_images(list(pil_images.values())), strict=True))
        vocabulary, ids = self.vocabulary, []
        for number, image in enumerate(images):
            codes = np.asarray(rows.get(number, image), dtype=np.int64)
            if codes.shape != (vocabulary.image_tokens,) or not (
                codes.min() >= 0 and codes.max() < vocabulary.image_size
            ):
                raise ValueError(
                    f"image {number} must be a PIL image or {vocabulary.image_tokens} image codes below "
                    f"{vocabulary.image_size}; its codes have shape {codes.shape}."
                )
            ids.append((codes + vocabulary.image_start).tolist())
        return ids

    # Text

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that continues a sentence: without the word boundary that the beginning of a text gets."""
        return encode_continuation(self.text, text)

    def trim_text(self, row: np.ndarray) -> list[int]:
        """The text pieces of generated ids, without the ending token and the padding (-1) after it."""
        return [int(token) for token in row if 0 <= token < self.vocabulary.text_size]

    # Documents

    def encode_document(self, parts: Sequence[str | ImageInput]) -> list[int]:
        """Ids of texts and images joined by <break>, as in the shards; usable as a retrieved document."""
        ids: list[int] = []
        for number, part in enumerate(parts):
            ids += [self.vocabulary.break_id] if number else []
            ids += self.text.encode(part) if isinstance(part, str) else self.encode_image_ids([part])[0]
        return ids
