"""Generator: captions to pictures, pictures to text, infilling and whole documents, from an exported folder alone.

    generator = Generator.load("exported/")
    for made in generator.images(["a red circle", "a blue square"], guidance=2.0, seed=1):
        made.picture.save(f"{made.caption}.png")
    generator.captions([made.picture])
    generator.answers([made.picture], ["what colour is it?"])
    generator.complete([["a red circle", made.picture, "a green"]])

All prompts of a call are decoded in batches, with both streams of classifier-free guidance in the same batch. A
sequence's result depends on its own prompt and seed, not on what else is in the call, except at near-ties, which
rounding decides (near_ties.py): in fp32 they are rare, in bf16 a batch of another size may turn one.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_cm3leon.distributed.device import resolve_device
from megatron_cm3leon.export.reader import read_shape
from megatron_cm3leon.generation import prompts
from megatron_cm3leon.generation.batch import decode_batches, decode_segments
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.documents import complete_documents
from megatron_cm3leon.generation.grammar import Segment, picture_segment, text_segment
from megatron_cm3leon.generation.precompile import compile_steps, compiling_beside
from megatron_cm3leon.generation.sampling import SAMPLERS, Sampling, default_guidance
from megatron_cm3leon.generation.step_graph import BUCKET, round_up
from megatron_cm3leon.generation.types import MadePicture
from megatron_cm3leon.tokenizers.images import from_pixels, to_pixels


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

        folder, device = Path(folder), resolve_device(device)
        shape, tokenizers = read_shape(folder), Tokenizers.load(folder, device)
        image = picture_segment(tokenizers.vocabulary)
        sizes = {"head_rows": len(image.allowed), "positions": round_up(image.length + BUCKET), "streams": (1, 2)}
        torch_device = torch.device(device)
        with compiling_beside(partial(compile_steps, shape, dtype, torch_device, **sizes), torch_device):
            decoder = Decoder.load(folder, dtype, device)
        return cls(decoder, tokenizers, read_training(folder))

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
        guidance: float | None = None,
        temperature: float = 0.7,
        top_k: int = 0,
        top_p: float = 1.0,
        contrast_k: int = 0,
        contrast_alpha: float = 0.5,
        sampler: str = SAMPLERS[0],
        seed: int = 0,
        candidates: int = 1,
        keep: int | None = None,
        encoder=None,
        unconditional: str = "auto",
        advance: Callable[[int], None] | None = None,
    ) -> Iterator[MadePicture]:
        """Yields `candidates` pictures of each caption, seeds `seed`, `seed` + 1 ..., batch by batch, in order.

        With an `encoder` (retrieval/encoder.py) the `keep` best (by default one) of a caption's candidates, the best
        first. `retrieved` gives each caption its retrieved documents (ids, the most similar last). Guidance is 2 by
        default, 1 (none) under `contrast_k`, see sampling.py, also for `sampler`; temperature 0 is greedy.
        `unconditional` is the form of the prompt without the caption: see prompts.py. `advance(n)` is told how many
        more tokens are done, of captions x candidates x image tokens. ValueError, before anything is drawn, for what
        cannot be.
        """
        if candidates < 1:
            raise ValueError(f"candidates ({candidates}) must be at least 1.")
        if keep is not None and not (encoder is not None and 1 <= keep <= candidates):
            raise ValueError(f"keep ({keep}) needs an encoder that ranks, and must be in 1..candidates ({candidates}).")
        if guidance is None:
            guidance = default_guidance(contrast_k)
        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance, contrast_k=contrast_k,
            contrast_alpha=contrast_alpha, sampler=sampler,
        )  # fmt: skip
        documents = _per_item(retrieved, captions, "captions")
        texts = [self.text.encode(caption) for caption in captions]
        if sampling.contrasted and not all(texts):
            raise ValueError(
                f"caption {texts.index([])} is empty: guidance and contrast_k need a condition; set guidance to 1."
            )
        jobs = [(number, seed + turn) for number in range(len(captions)) for turn in range(candidates)]
        given = [prompts.picture_prompt(t, d, self.vocabulary) for t, d in zip(texts, documents, strict=True)]
        forms = [prompts.choose_unconditional_form(unconditional, d, self.training) for d in documents]
        without = [
            prompts.unconditional_prompt(d, form, self.vocabulary) for d, form in zip(documents, forms, strict=True)
        ]
        batches = decode_batches(
            self.decoder,
            [given[number] for number, _ in jobs],
            picture_segment(self.vocabulary),
            sampling,
            [seed for _, seed in jobs],
            unconditional=[without[number] for number, _ in jobs],
            advance=advance,
        )
        made = (
            MadePicture(captions[number], seed, row, picture)
            for part, ids in batches
            for (number, seed), row, picture in self._with_pixels(jobs[part], ids - self.vocabulary.image_start)
        )
        return made if encoder is None else _rank(made, candidates, keep or 1, encoder)

    def _with_pixels(self, jobs: list, codes: np.ndarray) -> Iterator[tuple]:
        return zip(jobs, codes, self.decode_pictures(codes), strict=True)

    # Pictures to text

    def captions(
        self,
        pictures: list,
        retrieved: list | None = None,
        *,
        form: str = "auto",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        sampler: str = SAMPLERS[0],
        seed: int = 0,
        longest: int = 64,
        advance: Callable[[int], None] | None = None,
    ) -> list[str]:
        """A caption of each picture (PIL, or image codes), of at most `longest` text pieces.

        `form`: "image_first" continues `picture <break>`; "masked" asks for a masked caption, CM3's way; "auto" takes
        the first where the model was trained on pairs that begin with their picture.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, sampler=sampler)
        form = prompts.choose_caption_form(form, self.training)
        documents = _per_item(retrieved, pictures, "pictures")
        given = [
            prompts.caption_prompt(ids, docs, form, self.vocabulary)
            for ids, docs in zip(self.picture_ids(pictures), documents, strict=True)
        ]
        rows = self._write(given, sampling, seed, longest, infill=form == "masked", advance=advance)
        return [self.text.decode(row) for row in rows]

    def answers(
        self, pictures: list, questions: list[str], retrieved: list | None = None, *, seed: int = 0, longest: int = 16,
        temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, sampler: str = SAMPLERS[0],
    ) -> list[str]:  # fmt: skip
        """An answer to the question about each picture: the masked part of CM3Leon's template (table 5).

        `Question: {question} Answer: {answer}. <break> picture`, the answer of at most `longest` text pieces.
        """
        if len(pictures) != len(questions):
            raise ValueError(f"there are {len(questions)} questions for {len(pictures)} pictures; give one for each.")
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, sampler=sampler)
        texts = [(f"Question: {question.strip()} Answer:", ".") for question in questions]
        filled = self._fill(texts, self.picture_ids(pictures), retrieved, sampling, seed, longest)
        return [self.text.decode(row) for _, row, _ in filled]

    def _write(self, given: list, sampling: Sampling, seed: int, longest: int, *, infill: bool, advance=None) -> list:
        """Text pieces after each prompt, without the ending token."""
        segment = self.text_segment(longest, given, infill=infill)
        ids = decode_segments(self.decoder, given, segment, sampling, [seed] * len(given), advance=advance)
        return [self.pieces(row) for row in ids]

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
        sampler: str = SAMPLERS[0],
        seed: int = 0,
        longest: int = 32,
    ) -> list[str]:
        """Whole captions from (what stands before, what stands after) a masked span; `pictures` may help."""
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, sampler=sampler)
        shown = self.picture_ids(pictures) if pictures is not None else [None] * len(texts)
        if len(shown) != len(texts):
            raise ValueError(f"there are {len(shown)} pictures for {len(texts)} texts; give one for each.")
        filled = self._fill(texts, shown, retrieved, sampling, seed, longest)
        return [self.text.decode([*left, *row, *right]) for left, row, right in filled]

    def _fill(self, texts: list, shown: list, retrieved: list | None, sampling: Sampling, seed: int, longest: int):
        """Ids of what stands before, of the span, and of what stands after, of each text."""
        documents = _per_item(retrieved, texts, "texts")
        parts = [(self.text.encode(before.rstrip()), self._encode_rest(after)) for before, after in texts]
        given = [
            prompts.infill_text_prompt(left, right, ids, docs, self.vocabulary)
            for (left, right), ids, docs in zip(parts, shown, documents, strict=True)
        ]
        rows = self._write(given, sampling, seed, longest, infill=True)
        return [(left, row, right) for (left, right), row in zip(parts, rows, strict=True)]

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
        contrast_k: int = 0,
        contrast_alpha: float = 0.5,
        sampler: str = SAMPLERS[0],
        seed: int = 0,
    ) -> list[MadePicture]:
        """Pictures (PIL, or image codes) whose codes inside `box` are made anew and no other is changed.

        `box` is (top, left, bottom, right) in image tokens, bottom and right exclusive. The span from its first to
        its last code is masked; codes of the span outside the box are put back as they were while it is generated.
        """
        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance, contrast_k=contrast_k,
            contrast_alpha=contrast_alpha, sampler=sampler,
        )  # fmt: skip
        if sampling.contrasted and captions is None:
            setting = f"contrast_k ({contrast_k})" if contrast_k else f"guidance ({guidance})"
            raise ValueError(f"{setting} needs captions to strengthen; give them, or leave it out.")
        inside = self._box_mask(box)
        places = np.flatnonzero(inside)
        start, end = int(places[0]), int(places[-1]) + 1
        documents = _per_item(retrieved, pictures, "pictures")
        texts = [None] * len(pictures) if captions is None else [self.text.encode(text) for text in captions]
        if len(texts) != len(pictures):
            raise ValueError(f"there are {len(texts)} captions for {len(pictures)} pictures; give one for each.")
        shown = self.picture_ids(pictures)

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

    # Documents

    def complete(
        self,
        documents: list[list],
        retrieved: list | None = None,
        *,
        text: Sampling | None = None,
        image: Sampling | None = None,
        seed: int = 0,
        segments: int = 4,
        longest: int = 64,
    ) -> list[list]:
        """What follows each document, a list of texts and pictures: at most `segments` more of them.

        A last text goes on where it stops; the model then decides between texts, pictures and the end. Texts (at most
        `longest` pieces) and choices are drawn by `text`, greedily unless given, codes by `image`, of temperature 0.7.
        """
        text = text or Sampling(temperature=0.0)
        image = image or Sampling(temperature=0.7)
        return complete_documents(
            self, documents, _per_item(retrieved, documents, "documents"), text, image, seed, segments, longest
        )

    def encode_document(self, parts: list) -> list[int]:
        """Ids of texts and pictures joined by <break>, as the shards hold them; fit for `retrieved`."""
        ids = []
        for number, part in enumerate(parts):
            ids += [self.vocabulary.break_id] if number else []
            ids += self.text.encode(part) if isinstance(part, str) else self.picture_ids([part])[0]
        return ids

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

    def picture_ids(self, pictures: list) -> list[list[int]]:
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

    def text_segment(self, longest: int, given: list[list[int]], *, infill: bool) -> Segment:
        if longest < 1:
            raise ValueError(f"longest ({longest}) must be at least 1 text piece.")
        room = self.decoder.context - max(map(len, given), default=0)  # a prompt that leaves none is refused later
        return text_segment(self.vocabulary, max(1, min(longest, room)), infill=infill)

    def pieces(self, row: np.ndarray) -> list[int]:
        """The text pieces of a generated row: without the ending token and what follows it."""
        return [int(token) for token in row if 0 <= token < self.vocabulary.text_size]


def _rank(made: Iterator[MadePicture], candidates: int, keep: int, encoder) -> Iterator[MadePicture]:
    """The best `keep` of every `candidates` pictures of one caption, with their scores, the best first."""
    for group in zip(*[made] * candidates, strict=True):
        scores = encoder.encode_images([one.picture for one in group]) @ encoder.encode_texts([group[0].caption])[0]
        for place in np.argsort(-scores, kind="stable")[:keep]:
            yield replace(group[place], score=float(scores[place]))


def read_training(folder: Path) -> dict:
    """How the exported model was trained, for the forms of prompts that it knows; ValueError where that is not told."""
    account = folder / "cm3leon.json"
    try:
        training = json.loads(account.read_text())["training"]
    except FileNotFoundError:
        fault = "is missing"
    except (ValueError, KeyError, TypeError) as error:
        fault = f"cannot be read ({type(error).__name__}: {error})"
    else:
        return training
    raise ValueError(f"{account} {fault}: it tells how the model was trained; export the checkpoint again.")


def _per_item(retrieved: list | None, items: list, name: str) -> list:
    if isinstance(items, str):
        raise ValueError(f"{name} ({items!r}) must be a list, also where there is one only.")
    if retrieved is None:
        return [[] for _ in items]
    if len(retrieved) != len(items):
        raise ValueError(
            f"there are retrieved documents for {len(retrieved)} of {len(items)} {name}; give all or none."
        )
    return retrieved
