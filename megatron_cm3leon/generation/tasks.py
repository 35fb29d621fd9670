"""What tools/generate.py can be asked for: one class per command, which reads files by path and fills `Results`.

`load` reads the input files and raises ValueError for wrong input, before the model is loaded. It returns the queries
by which documents are retrieved, one per prompt, and the function that generates and adds an entry per result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from PIL import Image

from megatron_cm3leon.common.paths import expand_path
from megatron_cm3leon.common.progress import meter
from megatron_cm3leon.data.sources.documents import decode_text
from megatron_cm3leon.generation.documents import CompletionOptions
from megatron_cm3leon.generation.generator import Box, Generator
from megatron_cm3leon.generation.prompts import choose_box_form
from megatron_cm3leon.generation.ranking import Candidates
from megatron_cm3leon.generation.results import Results
from megatron_cm3leon.generation.retrieved import Queries, Retrieved
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.tokenizers.images import load_image

MASK = "<mask>"
"""The span to fill in a text."""


@dataclass(frozen=True)
class LoadedTask:
    """A task whose input is read and checked."""

    queries: Queries
    """What documents are retrieved by, one query per prompt."""
    generate: Callable[[Generator, Retrieved, Results], None]
    """Generates, and adds the results."""


class Task(Protocol):
    """What one call of tools/generate.py generates."""

    def load(self) -> LoadedTask:
        """Read and check the input; ValueError for wrong input."""


@dataclass(frozen=True, kw_only=True)
class ImageTask:
    """Images of captions."""

    captions: Sequence[str]
    file: str | None = None
    """Text file with more captions, one per line."""
    sampling: Sampling
    candidates: int = 1
    """Images per caption; seeds count up."""
    keep: int | None = None
    """Candidates that `rank_with` keeps per caption; 1 by default."""
    rank_with: str | None = None
    """CLIP folder."""
    unconditional: str = "auto"

    def load(self) -> LoadedTask:
        captions = [*self.captions, *(read_captions(self.file) if self.file else [])]
        if not captions:
            raise ValueError("there are no captions; give some, or --from FILE with one per line.")
        encoder = None
        if self.rank_with:
            from megatron_cm3leon.retrieval.encoder import Encoder  # imports transformers

            encoder = Encoder.load(self.rank_with)
        candidates = Candidates(self.candidates, encoder, self.keep)
        return LoadedTask(Queries(texts=captions), partial(self._generate, captions, candidates))

    def _generate(
        self,
        captions: list[str],
        candidates: Candidates,
        generator: Generator,
        retrieved: Retrieved,
        results: Results,
    ) -> None:
        tokens = len(captions) * candidates.count * generator.vocabulary.image_tokens
        with meter(tokens, "generating", "tokens") as progress:
            images = generator.images(
                captions,
                self.sampling,
                retrieved=retrieved.documents,
                candidates=candidates,
                unconditional=self.unconditional,
                advance=progress.advance,
            )
            for number, made in enumerate(images):
                entry = results.save_generated(made, made.caption or "")
                results.entries.append(retrieved.describe(entry, number // candidates.kept))


@dataclass(frozen=True, kw_only=True)
class CaptionTask:
    """A caption of each image file."""

    images: Sequence[str]
    sampling: Sampling
    form: str = "auto"
    longest: int = 64
    """Text pieces of a caption, at most."""

    def load(self) -> LoadedTask:
        images = [load_image(path) for path in self.images]
        return LoadedTask(Queries(images=images), partial(self._generate, images))

    def _generate(
        self, images: list[Image.Image], generator: Generator, retrieved: Retrieved, results: Results
    ) -> None:
        texts = generator.captions(
            images, self.sampling, retrieved=retrieved.documents, form=self.form, longest=self.longest
        )
        for number, (path, text) in enumerate(zip(self.images, texts, strict=True)):
            results.entries.append(retrieved.describe({"picture": path, "caption": text}, number))


@dataclass(frozen=True, kw_only=True)
class AnswerTask:
    """An answer to each question about one image file."""

    image: str
    questions: Sequence[str]
    sampling: Sampling
    longest: int = 16
    """Text pieces of an answer, at most."""

    def load(self) -> LoadedTask:
        images = [load_image(self.image)] * len(self.questions)
        return LoadedTask(Queries(images=images), partial(self._generate, images))

    def _generate(
        self, images: list[Image.Image], generator: Generator, retrieved: Retrieved, results: Results
    ) -> None:
        texts = generator.answers(
            images, self.questions, self.sampling, retrieved=retrieved.documents, longest=self.longest
        )
        for number, (question, text) in enumerate(zip(self.questions, texts, strict=True)):
            results.entries.append(retrieved.describe({"question": question, "answer": text}, number))


@dataclass(frozen=True, kw_only=True)
class InfillTask:
    """The span that a mask hides, in a caption (`text`) or in an image (`box`)."""

    text: str | None = None
    """Caption that contains `MASK` once."""
    image: str | None = None
    """Image file: the one that `text` describes, or the one to change."""
    box: Box | None = None
    """Part of the image to generate again, in image tokens."""
    caption: str | None = None
    """What the changed image should show."""
    form: str = "auto"
    """How a box is generated: prompts.BOX_FORMS."""
    sampling: Sampling
    longest: int = 32
    """Text pieces of the span, at most."""

    def load(self) -> LoadedTask:
        self._check()
        images = [load_image(self.image)] if self.image else None
        if self.text is not None:
            queries = Queries(images=images) if images else Queries(texts=[self.text.replace(MASK, " ")])
            return LoadedTask(queries, partial(self._fill_text, self.text, images))
        assert images is not None and self.box is not None  # see `_check`
        return LoadedTask(Queries(images=images), partial(self._fill_image, images, self.box))

    def _check(self) -> None:
        if (self.text is None) == (self.box is None):
            raise ValueError(f'give either --text "... {MASK} ..." or --image with --box TOP LEFT BOTTOM RIGHT.')
        if self.box is not None and self.image is None:
            raise ValueError("--box requires the --image it is a part of.")
        if self.text is None:
            return
        if self.text.count(MASK) != 1:
            raise ValueError(f"--text ({self.text!r}) must contain {MASK} exactly once, where the span is.")
        if self.caption is not None:
            raise ValueError("--caption is for an image with --box; --text is the caption itself: give one of them.")
        if self.sampling.needs_unconditional:
            raise ValueError("--guidance and --contrast-k are for an image with --caption; --text takes neither.")
        if self.form != "auto":
            raise ValueError(f"--form ({self.form}) is for an image with --box; a text is always masked: remove it.")

    def _fill_text(
        self,
        text: str,
        images: list[Image.Image] | None,
        generator: Generator,
        retrieved: Retrieved,
        results: Results,
    ) -> None:
        before, after = text.split(MASK)
        [filled] = generator.infill_text(
            [(before, after)], self.sampling, images=images, retrieved=retrieved.documents, longest=self.longest
        )
        results.entries.append(retrieved.describe({"text": text, "filled": filled}, 0))

    def _fill_image(
        self, images: list[Image.Image], box: Box, generator: Generator, retrieved: Retrieved, results: Results
    ) -> None:
        captions = None if self.caption is None else [self.caption]
        form = choose_box_form(self.form, generator.training)
        [made] = generator.infill_images(
            images, box, self.sampling, captions=captions, retrieved=retrieved.documents, form=form
        )
        [decoded] = generator.codec.decode_images(generator.codec.encode_images(images))
        results.save_image(decoded, "before, as the tokenizer decodes it")
        results.entries.append(results.save_generated(made, "infilled") | {"form": form})


@dataclass(frozen=True, kw_only=True)
class CompletionTask:
    """The texts and images that continue one document."""

    parts: Sequence[str]
    """Texts, and image files as @FILE; a text that begins with @ is written with two."""
    options: CompletionOptions = field(default_factory=CompletionOptions)

    def load(self) -> LoadedTask:
        document = [read_part(part) for part in self.parts]
        text = " ".join(part for part in document if isinstance(part, str))
        return LoadedTask(Queries(texts=[text]), partial(self._generate, document))

    def _generate(
        self,
        document: list[str | Image.Image],
        generator: Generator,
        retrieved: Retrieved,
        results: Results,
    ) -> None:
        [parts] = generator.complete([document], self.options, retrieved=retrieved.documents)
        for part in parts:
            entry = {"text": part} if isinstance(part, str) else results.save_generated(part, "")
            results.entries.append(retrieved.describe(entry, 0))


def read_captions(path: str | Path) -> list[str]:
    """Captions of a UTF-8 text file, one per line; blank lines are skipped."""
    text = decode_text(Path(path).read_bytes(), f"--from {path}")
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def read_part(part: str) -> str | Image.Image:
    """The image of @FILE; else the text, without the first @ of a text that begins with @@."""
    if not part.startswith("@") or part.startswith("@@"):
        return part.removeprefix("@")
    try:
        return load_image(expand_path(part[1:]))
    except ValueError as error:
        raise ValueError(
            f"{part!r} begins with @ and so names an image file. {str(error).rstrip('.')}. "
            f"If it is a text, begin it with @@."
        ) from error
