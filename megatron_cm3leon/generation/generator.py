"""Generator: captions to images, images to text, infilling and whole documents, from an exported folder.

    generator = Generator.load("exported/")
    for made in generator.images(["a red circle", "a blue square"], Sampling(temperature=0.7, guidance=2.0, seed=1)):
        made.image.save(f"{made.caption}.png")
    generator.captions([made.image])
    generator.answers([made.image], ["what color is it?"])
    generator.complete([["a red circle", made.image, "a green"]])
    generator.score(prefixes, targets)      # log-probabilities of ids

All prompts of a call are decoded in batches, with both streams of classifier-free guidance in the same batch. The
result for a prompt depends on the prompt, the sampling and its seed, not on the other prompts of the call, except at
near-ties, which rounding decides (near_ties.py): rare in fp32; in bf16 a different batch size may change one.

`retrieved` gives each prompt its retrieved documents, each a list of ids as in the shards (`Codec.encode_document`),
the most similar one last.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_cm3leon.distributed.device import resolve_device
from megatron_cm3leon.export.reader import read_shape, read_training_facts
from megatron_cm3leon.generation import prompts
from megatron_cm3leon.generation.batch import decode_batches, decode_segments
from megatron_cm3leon.generation.codec import Codec
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.documents import CompletionOptions, complete_documents
from megatron_cm3leon.generation.grammar import image_segment, text_segment
from megatron_cm3leon.generation.precompile import compile_in_background, compile_steps
from megatron_cm3leon.generation.ranking import Candidates
from megatron_cm3leon.generation.sampling import IMAGE_SAMPLING, TEXT_SAMPLING, Sampling
from megatron_cm3leon.generation.scoring import Ids, score_targets
from megatron_cm3leon.generation.step_graph import BUCKET, round_up
from megatron_cm3leon.generation.types import GeneratedImage, ImageInput
from megatron_cm3leon.tokenizers.folder import Tokenizers

Documents = Sequence[Sequence[Sequence[int] | np.ndarray]]
"""Retrieved documents (ids) of each prompt."""
Box = tuple[int, int, int, int]
"""(top, left, bottom, right) in image tokens; bottom and right are exclusive."""


class Generator:
    """A decoder with the tokenizers it was trained with."""

    def __init__(self, decoder: Decoder, tokenizers: Tokenizers, training: dict | None = None) -> None:
        """`training` is that part of cm3leon.json: see `read_training_facts`."""
        self.decoder, self.codec, self.training = decoder, Codec(tokenizers), training or {}
        self.vocabulary = tokenizers.vocabulary
        if decoder.vocabulary_size != self.vocabulary.size:
            raise ValueError(
                f"the model has {decoder.vocabulary_size} vocabulary rows, its tokenizers {self.vocabulary.size} "
                f"ids; export the checkpoint again with the tokenizer folder it was trained with."
            )

    @classmethod
    def load(cls, folder: str | Path, dtype: str = "fp32", device: str = "auto") -> "Generator":
        """Load what tools/convert_checkpoint.py export wrote; ValueError for any other folder.

        `dtype` is one of decoder.KINDS, `device` one of torch's or "auto".
        """
        folder, device = Path(folder), resolve_device(device)
        shape, tokenizers = read_shape(folder), Tokenizers.load(folder, device)
        segment = image_segment(tokenizers.vocabulary)
        compile_all = partial(
            compile_steps,
            shape,
            dtype,
            torch.device(device),
            head_rows=len(segment.allowed),
            positions=round_up(segment.length + BUCKET),
            streams=(1, 2),
        )
        with compile_in_background(compile_all, torch.device(device)):
            decoder = Decoder.load(folder, dtype, device)
        return cls(decoder, tokenizers, read_training_facts(folder))

    @property
    def training_documents(self) -> int:
        """Retrieved documents per sample in training; 2, as in the paper, if the model was trained without."""
        return self.training.get("retrieved_documents") or 2

    def images(
        self,
        captions: Sequence[str],
        sampling: Sampling = IMAGE_SAMPLING,
        *,
        retrieved: Documents | None = None,
        candidates: Candidates | None = None,
        unconditional: str = "auto",
        advance: Callable[[int], None] | None = None,
    ) -> Iterator[GeneratedImage]:
        """Images of captions, in their order, yielded batch by batch.

        `candidates` asks for several images per caption. `unconditional` is the form of the prompt without the
        caption, for guidance and CD-K: see prompts.py. `advance(n)` is called when n more tokens are generated, of
        captions x candidates x image tokens. ValueError, before anything is generated, for an empty caption with
        guidance, and for a prompt that does not fit into the context.
        """
        candidates = candidates or Candidates()
        documents = _check_retrieved(retrieved, captions, "captions")
        texts = [self.codec.text.encode(caption) for caption in captions]
        if sampling.needs_unconditional and not all(texts):
            raise ValueError(
                f"caption {texts.index([])} is empty: guidance and contrast_k need a condition; set guidance to 1."
            )
        conditional_prompts = [
            prompts.image_prompt(t, d, self.vocabulary) for t, d in zip(texts, documents, strict=True)
        ]
        forms = [prompts.choose_unconditional_form(unconditional, docs, self.training) for docs in documents]
        unconditional_prompts = [
            prompts.unconditional_prompt(docs, form, self.vocabulary)
            for docs, form in zip(documents, forms, strict=True)
        ]
        # One job per image: the number of its caption, and its seed.
        jobs = [(n, sampling.seed + extra) for n in range(len(captions)) for extra in range(candidates.count)]
        batches = decode_batches(
            self.decoder,
            [conditional_prompts[number] for number, _ in jobs],
            image_segment(self.vocabulary),
            sampling,
            [seed for _, seed in jobs],
            unconditional=[unconditional_prompts[number] for number, _ in jobs],
            advance=advance,
        )
        return candidates.select(
            image
            for part, ids in batches
            for image in self._decode_images(
                [captions[number] for number, _ in jobs[part]], [seed for _, seed in jobs[part]], ids
            )
        )

    def captions(
        self,
        images: Sequence[ImageInput],
        sampling: Sampling = TEXT_SAMPLING,
        *,
        retrieved: Documents | None = None,
        form: str = "auto",
        longest: int = 64,
    ) -> list[str]:
        """A caption of each image, of at most `longest` text pieces.

        `form`: "image_first" continues `image <break>`; "masked" fills a masked caption, as CM3 does; "auto" is the
        first if the model was trained on pairs that begin with their image.
        """
        form = prompts.choose_caption_form(form, self.training)
        documents = _check_retrieved(retrieved, images, "images")
        given = [
            prompts.caption_prompt(ids, docs, form, self.vocabulary)
            for ids, docs in zip(self.codec.encode_image_ids(images), documents, strict=True)
        ]
        rows = self._generate_text(given, sampling, longest, infill=form == "masked")
        return [self.codec.text.decode(row) for row in rows]

    def answers(
        self,
        images: Sequence[ImageInput | None],
        questions: Sequence[str],
        sampling: Sampling = TEXT_SAMPLING,
        *,
        contexts: Sequence[str] | None = None,
        retrieved: Documents | None = None,
        longest: int = 16,
    ) -> list[str]:
        """An answer to the question about each image, of at most `longest` text pieces.

        It is the masked part of CM3Leon's template (table 5): `Question: {question} Answer: {answer}. <break> image`.
        A question that is not about an image has None as its image. `contexts` are texts in front of the questions.
        """
        if len(images) != len(questions):
            raise ValueError(f"there are {len(questions)} questions for {len(images)} images; give one for each.")
        contexts = [""] * len(questions) if contexts is None else contexts
        if len(contexts) != len(questions):
            raise ValueError(f"there are {len(contexts)} contexts for {len(questions)} questions; give one for each.")
        texts = [prompts.split_answer_template(*each) for each in zip(questions, contexts, strict=True)]
        ids = iter(self.codec.encode_image_ids([image for image in images if image is not None]))
        shown = [None if image is None else next(ids) for image in images]
        filled = self._infill(texts, shown, retrieved, sampling, longest)
        return [self.codec.text.decode(span) for _, span, _ in filled]

    def score(self, prefixes: Sequence[Ids], targets: Sequence[Ids]) -> np.ndarray:
        """Summed log-probabilities in nats, float64 [n], of the ids of each target after those of its prefix.

        A prefix begins with </s> (`vocabulary.eos`), as a sample does; prompts.py builds the forms that the model has
        seen, `codec` encodes texts and images. The rows are computed in batches, and targets of one prefix together:
        give the candidates of a question in one call. ValueError unless there is a prefix for each target, none is
        empty, all ids are the vocabulary's, and each prefix with its target fits into the context.
        """
        return score_targets(self.decoder, prefixes, targets)

    def infill_text(
        self,
        texts: Sequence[tuple[str, str]],
        sampling: Sampling = TEXT_SAMPLING,
        *,
        images: Sequence[ImageInput] | None = None,
        retrieved: Documents | None = None,
        longest: int = 32,
    ) -> list[str]:
        """Complete captions from (text before, text after) a masked span of at most `longest` text pieces.

        `images` are the captions' images, if given.
        """
        shown: Sequence[list[int] | None] = [None] * len(texts)
        if images is not None:
            shown = self.codec.encode_image_ids(images)
        if len(shown) != len(texts):
            raise ValueError(f"there are {len(shown)} images for {len(texts)} texts; give one for each.")
        filled = self._infill(texts, shown, retrieved, sampling, longest)
        return [self.codec.text.decode([*left, *span, *right]) for left, span, right in filled]

    def infill_images(
        self,
        images: Sequence[ImageInput],
        box: Box,
        sampling: Sampling | None = None,
        *,
        captions: Sequence[str] | None = None,
        retrieved: Documents | None = None,
        form: str = "auto",
    ) -> list[GeneratedImage]:
        """Images whose codes inside `box` are generated again; all others stay as they are.

        The span from the first to the last code of the box is generated; its codes outside the box keep their values.
        `form`: "masked" generates it after the codes on both sides of a mask, as CM3 does; "raster" after the codes in
        front of it alone, as an image is generated; "auto": see prompts.choose_box_form. Guidance and CD-K require
        `captions`. The default of `sampling` is `Sampling()`. ValueError for a box outside the image, an unknown form,
        another number of captions than images, and a prompt that does not fit into the context.
        """
        form = prompts.choose_box_form(form, self.training)
        sampling = sampling or Sampling()
        if sampling.needs_unconditional and captions is None:
            name = "contrast_k" if sampling.contrast_k else "guidance"
            raise ValueError(f"{name} ({getattr(sampling, name)}) requires captions; give them, or no {name}.")
        inside = self._mask_box(box)
        positions = np.flatnonzero(inside)
        start, end = int(positions[0]), int(positions[-1]) + 1
        documents = _check_retrieved(retrieved, images, "images")
        shown = [None] * len(images) if captions is None else list(captions)
        if len(shown) != len(images):
            raise ValueError(f"there are {len(shown)} captions for {len(images)} images; give one for each.")
        texts = [None if caption is None else self.codec.text.encode(caption) for caption in shown]
        image_ids = self.codec.encode_image_ids(images)

        def build_prompts(texts: Sequence[list[int] | None]) -> list[list[int]]:
            given = zip(image_ids, texts, documents, strict=True)
            if form == "masked":
                return [
                    prompts.infill_image_prompt(ids, start, end, text, docs, self.vocabulary)
                    for ids, text, docs in given
                ]
            forms = [prompts.choose_unconditional_form("auto", docs, self.training) for docs in documents]
            return [
                prompts.continue_image_prompt(ids, start, text, docs, unconditional, self.vocabulary)
                for (ids, text, docs), unconditional in zip(given, forms, strict=True)
            ]

        ids = np.array(image_ids)
        ids[:, start:end] = decode_segments(
            self.decoder,
            build_prompts(texts),
            image_segment(self.vocabulary, end - start),
            sampling,
            [sampling.seed] * len(images),
            unconditional=None if captions is None else build_prompts([None] * len(images)),
            forced=np.where(inside[start:end], -1, ids[:, start:end]),
        )
        return list(self._decode_images(shown, [sampling.seed] * len(images), ids))

    def complete(
        self,
        documents: Sequence[Sequence[str | ImageInput]],
        options: CompletionOptions | None = None,
        *,
        retrieved: Documents | None = None,
    ) -> list[list[str | GeneratedImage]]:
        """The texts and images that continue each document, a list of texts and images.

        If a document ends with a text, that text is continued first; then the model chooses between a text, an image
        and the end of the document.
        """
        given = _check_retrieved(retrieved, documents, "documents")
        return complete_documents(self.decoder, self.codec, documents, given, options or CompletionOptions())

    def _generate_text(
        self, given: Sequence[list[int]], sampling: Sampling, longest: int, *, infill: bool
    ) -> list[list[int]]:
        """Text pieces after each prompt, without the ending token."""
        segment = text_segment(self.vocabulary, self.decoder.fit_text(longest, given), infill=infill)
        ids = decode_segments(self.decoder, given, segment, sampling, [sampling.seed] * len(given))
        return [self.codec.trim_text(row) for row in ids]

    def _infill(
        self,
        texts: Sequence[tuple[str, str]],
        images: Sequence[list[int] | None],
        retrieved: Documents | None,
        sampling: Sampling,
        longest: int,
    ) -> list[tuple[list[int], list[int], list[int]]]:
        """Ids of the text before, of the span, and of the text after, of each text with its image's ids."""
        documents = _check_retrieved(retrieved, texts, "texts")
        parts = [
            (self.codec.text.encode(before.rstrip()), self.codec.encode_continuation(after)) for before, after in texts
        ]
        given = [
            prompts.infill_text_prompt(left, right, ids, docs, self.vocabulary)
            for (left, right), ids, docs in zip(parts, images, documents, strict=True)
        ]
        spans = self._generate_text(given, sampling, longest, infill=True)
        return [(left, span, right) for (left, right), span in zip(parts, spans, strict=True)]

    def _decode_images(
        self, captions: Sequence[str | None], seeds: Sequence[int], ids: np.ndarray
    ) -> Iterator[GeneratedImage]:
        """Images of vocabulary ids [n, h * w]."""
        codes = ids - self.vocabulary.image_start
        for caption, seed, row, image in zip(captions, seeds, codes, self.codec.decode_images(codes), strict=True):
            yield GeneratedImage(caption, seed, row, image)

    def _mask_box(self, box: Box) -> np.ndarray:
        """Whether each image token [h * w], in raster order, is inside `box`."""
        top, left, bottom, right = box
        height, width = self.vocabulary.image_height, self.vocabulary.image_width
        if not (0 <= top < bottom <= height and 0 <= left < right <= width):
            raise ValueError(
                f"box (top {top}, left {left}, bottom {bottom}, right {right}) must be within the image's {height} "
                f"rows and {width} columns of image tokens and contain at least one."
            )
        inside = np.zeros((height, width), bool)
        inside[top:bottom, left:right] = True
        return inside.reshape(-1)


def _check_retrieved(retrieved: Documents | None, items: Sequence, name: str) -> Documents:
    """The documents of each item; ValueError unless there are as many lists of documents as items."""
    if isinstance(items, str):
        raise ValueError(f"{name} ({items!r}) must be a list, even of one.")
    if retrieved is None:
        return [[] for _ in items]
    if len(retrieved) != len(items):
        raise ValueError(
            f"retrieved has documents for {len(retrieved)} of {len(items)} {name}; give documents for all or none."
        )
    return retrieved
