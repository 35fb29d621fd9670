"""Generator: captions to pictures, pictures to captions, and infilling, from an exported folder alone.

    generator = Generator.load("exported/")
    made = generator.images(["a red circle"], guidance=2.0, seed=1)
    made[0].picture.save("circle.png")
    generator.captions([made[0].picture])

All prompts of a call are decoded in batches, with both streams of classifier-free guidance in the same batch. A
sequence's result depends on its own prompt and seed, not on what else is in the call (in bf16 a batch of another size
rounds differently, which may flip a close draw).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_cm3leon.generation import prompts
from megatron_cm3leon.generation.batch import decode_segments
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.grammar import Segment, picture_segment, text_segment
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.tokenizers.pixels import from_pixels, to_pixels


@dataclass(frozen=True, eq=False)
class MadePicture:
    """A generated picture: its image codes [h*w] from 0, and the pixels they decode to."""

    caption: str | None
    seed: int
    codes: np.ndarray
    picture: Image.Image


class Generator:
    """A decoder with the tokenizers it was trained with."""

    def __init__(self, decoder: Decoder, tokenizers, training: dict | None = None) -> None:
        """`tokenizers` has .text, .image and .vocabulary; `training` is that part of cm3leon.json."""
        self.decoder, self.text, self.image = decoder, tokenizers.text, tokenizers.image
        self.vocabulary = tokenizers.vocabulary
        self.training = training or {}
        if decoder.vocabulary_size != self.vocabulary.size:
            raise ValueError(
                f"the model has {decoder.vocabulary_size} vocabulary rows, its tokenizers {self.vocabulary.size} "
                f"ids; export the checkpoint again with the tokenizer folder it was trained with."
            )

    @classmethod
    def load(cls, folder: str | Path, dtype: str = "fp32", device: str = "auto") -> "Generator":
        """Open what tools/convert_checkpoint.py export wrote; ValueError for any other folder."""
        from megatron_cm3leon.tokenizers.folder import Tokenizers

        folder = Path(folder)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        decoder = Decoder.load(folder, dtype, device)
        account = folder / "cm3leon.json"
        training = json.loads(account.read_text())["training"] if account.is_file() else {}
        return cls(decoder, Tokenizers.load(folder, device), training)

    @property
    def training_documents(self) -> int:
        """Retrieved documents that stood in front of a query in training; 2, as in the paper, where none did."""
        return self.training.get("retrieved_documents") or 2

    # Captions to pictures

    def images(
        self,
        captions: list[str],
        retrieved: list | None = None,
        *,
        guidance: float = 2.0,
        temperature: float = 0.7,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        candidates: int = 1,
        unconditional: str = "auto",
        advance: Callable[[int], None] | None = None,
    ) -> list[MadePicture]:
        """`candidates` pictures of each caption, with seeds `seed`, `seed` + 1 ..., in the captions' order.

        `retrieved` gives each caption its retrieved documents (ids as stored, the most similar last). Temperature
        0 is greedy. `unconditional` is the form of the prompt without the caption: see prompts.py. `advance(n)`
        is told how many more tokens are done, of captions x candidates x image tokens.
        """
        if candidates < 1:
            raise ValueError(f"candidates ({candidates}) must be at least 1.")
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance)
        documents = _per_item(retrieved, captions, "captions")
        jobs = [(number, seed + turn) for number in range(len(captions)) for turn in range(candidates)]
        given = [
            prompts.picture_prompt(self.text.encode(c), d, self.vocabulary)
            for c, d in zip(captions, documents, strict=True)
        ]
        forms = [prompts.choose_unconditional_form(unconditional, d, self.training) for d in documents]
        without = [
            prompts.unconditional_prompt(d, form, self.vocabulary) for d, form in zip(documents, forms, strict=True)
        ]
        codes = decode_segments(
            self.decoder,
            [given[number] for number, _ in jobs],
            picture_segment(self.vocabulary),
            sampling,
            [seed for _, seed in jobs],
            unconditional=[without[number] for number, _ in jobs],
            advance=advance,
        )
        codes -= self.vocabulary.image_start
        pictures = self.decode_pictures(codes)
        return [
            MadePicture(captions[number], seed, row, picture)
            for (number, seed), row, picture in zip(jobs, codes, pictures, strict=True)
        ]

    # Pictures to captions

    def captions(
        self,
        pictures: list,
        retrieved: list | None = None,
        *,
        form: str = "auto",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        longest: int = 64,
        advance: Callable[[int], None] | None = None,
    ) -> list[str]:
        """A caption of each picture (PIL, or image codes), of at most `longest` text pieces.

        `form`: "image_first" continues `picture <break>`; "masked" asks for a masked caption, CM3's way; "auto" takes
        the first where the model was trained on pairs that begin with their picture.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        form = prompts.choose_caption_form(form, self.training)
        documents = _per_item(retrieved, pictures, "pictures")
        given = [
            prompts.caption_prompt(ids, docs, form, self.vocabulary)
            for ids, docs in zip(self._picture_ids(pictures), documents, strict=True)
        ]
        ids = decode_segments(
            self.decoder,
            given,
            self._text_segment(longest, given, infill=form == "masked"),
            sampling,
            [seed] * len(given),
            advance=advance,
        )
        return [self.text.decode(self._pieces(row)) for row in ids]

    # Infilling

    def infill_text(
        self,
        texts: list[tuple[str, str]],
        pictures: list | None = None,
        retrieved: list | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        longest: int = 32,
    ) -> list[str]:
        """Whole captions from (what stands before, what stands after) a masked span; `pictures` may help."""
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        documents = _per_item(retrieved, texts, "texts")
        shown = self._picture_ids(pictures) if pictures is not None else [None] * len(texts)
        if len(shown) != len(texts):
            raise ValueError(f"there are {len(shown)} pictures for {len(texts)} texts; give one for each.")
        parts = [(self.text.encode(before.rstrip()), self._encode_rest(after)) for before, after in texts]
        given = [
            prompts.infill_text_prompt(left, right, ids, docs, self.vocabulary)
            for (left, right), ids, docs in zip(parts, shown, documents, strict=True)
        ]
        ids = decode_segments(
            self.decoder, given, self._text_segment(longest, given, infill=True), sampling, [seed] * len(given)
        )
        return [
            self.text.decode([*left, *self._pieces(row), *right]) for (left, right), row in zip(parts, ids, strict=True)
        ]

    def infill_pictures(
        self,
        pictures: list,
        box: tuple[int, int, int, int],
        captions: list[str] | None = None,
        retrieved: list | None = None,
        *,
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[MadePicture]:
        """Pictures (PIL, or image codes) whose codes inside `box` are made anew and no other is changed.

        `box` is (top, left, bottom, right) in image tokens, bottom and right exclusive. The span from its first to
        its last code is masked; codes of the span outside the box are put back as they were while it is generated.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance)
        inside = self._box_mask(box)
        places = np.flatnonzero(inside)
        start, end = int(places[0]), int(places[-1]) + 1
        documents = _per_item(retrieved, pictures, "pictures")
        texts = [None] * len(pictures) if captions is None else [self.text.encode(text) for text in captions]
        if len(texts) != len(pictures):
            raise ValueError(f"there are {len(texts)} captions for {len(pictures)} pictures; give one for each.")
        shown = self._picture_ids(pictures)

        def build(texts: list) -> list[list[int]]:
            return [
                prompts.infill_picture_prompt(ids, start, end, text, docs, self.vocabulary)
                for ids, text, docs in zip(shown, texts, documents, strict=True)
            ]

        ids = np.array(shown)
        ids[:, start:end] = decode_segments(
            self.decoder,
            build(texts),
            picture_segment(self.vocabulary, end - start),
            sampling,
            [seed] * len(pictures),
            unconditional=build([None] * len(pictures)) if captions is not None else None,
            forced=np.where(inside[start:end], -1, ids[:, start:end]),
        )
        codes = ids - self.vocabulary.image_start
        captions = captions or [None] * len(pictures)
        made = zip(captions, codes, self.decode_pictures(codes), strict=True)
        return [MadePicture(caption, seed, row, picture) for caption, row, picture in made]

    # Pictures and codes

    def encode_pictures(self, pictures: list) -> np.ndarray:
        """Image codes [n, h*w], from 0, of PIL pictures."""
        pixels = torch.stack([to_pixels(picture, self.image.image_size) for picture in pictures])
        return torch.cat([self.image.encode(part) for part in pixels.split(32)]).cpu().numpy()

    def decode_pictures(self, codes: np.ndarray) -> list[Image.Image]:
        """PIL pictures of image codes [n, h*w]."""
        made = []
        for part in torch.as_tensor(np.asarray(codes), dtype=torch.long).split(32):
            made += [from_pixels(pixels) for pixels in self.image.decode(part).cpu()]
        return made

    def _picture_ids(self, pictures: list) -> list[list[int]]:
        """Vocabulary ids of pictures given as PIL pictures or as codes."""
        files = [number for number, picture in enumerate(pictures) if isinstance(picture, Image.Image)]
        encoded = self.encode_pictures([pictures[number] for number in files]) if files else []
        rows = {number: row for number, row in zip(files, encoded, strict=True)}
        ids = []
        for number, picture in enumerate(pictures):
            codes = np.asarray(rows.get(number, picture), dtype=np.int64)
            if codes.shape != (self.vocabulary.image_tokens,) or not (
                codes.min() >= 0 and codes.max() < self.vocabulary.image_size
            ):
                raise ValueError(
                    f"picture {number} must be a PIL picture or {self.vocabulary.image_tokens} image codes below "
                    f"{self.vocabulary.image_size}; its codes have shape {codes.shape}."
                )
            ids.append((codes + self.vocabulary.image_start).tolist())
        return ids

    def _box_mask(self, box: tuple[int, int, int, int]) -> np.ndarray:
        """Which image tokens, in raster order, lie inside `box`."""
        top, left, bottom, right = box
        height, width = self.vocabulary.image_height, self.vocabulary.image_width
        if not (0 <= top < bottom <= height and 0 <= left < right <= width):
            raise ValueError(
                f"box (top {top}, left {left}, bottom {bottom}, right {right}) must lie within the picture's "
                f"{height} rows and {width} columns of image tokens and hold at least one."
            )
        inside = np.zeros((height, width), bool)
        inside[top:bottom, left:right] = True
        return inside.reshape(-1)

    # Text

    def _encode_rest(self, text: str) -> list[int]:
        """Ids of text that continues a sentence: without the word boundary that a beginning is given."""
        anchor = self.text.encode("x")
        whole = self.text.encode("x" + text)
        return whole[len(anchor) :] if whole[: len(anchor)] == anchor else self.text.encode(text)

    def _text_segment(self, longest: int, given: list[list[int]], *, infill: bool) -> Segment:
        if longest < 1:
            raise ValueError(f"longest ({longest}) must be at least 1 text piece.")
        room = self.decoder.context - max(map(len, given), default=0)  # a prompt that leaves none is refused later
        return text_segment(self.vocabulary, max(1, min(longest, room)), infill=infill)

    def _pieces(self, row: np.ndarray) -> list[int]:
        """The text pieces of a generated row: without the ending token and what follows it."""
        return [int(token) for token in row if 0 <= token < self.vocabulary.text_size]


def _per_item(retrieved: list | None, items: list, name: str) -> list:
    if retrieved is None:
        return [[] for _ in items]
    if len(retrieved) != len(items):
        raise ValueError(
            f"there are retrieved documents for {len(retrieved)} of {len(items)} {name}; give all or none."
        )
    return retrieved
