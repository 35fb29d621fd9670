"""Texts, images and pairs of a raw corpus, to train the tokenizers and CLIP on.

Every format of `open_source` is read. Inputs that cannot be used are skipped, counted and reported with their reasons.
An input that is not a complete document (an image without a caption) still yields the usable part of it.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from megatron_cm3leon.common.cli import user_path
from megatron_cm3leon.data.preprocess.document_reader import read_image
from megatron_cm3leon.data.preprocess.reasons import Reasons
from megatron_cm3leon.data.sources import (
    FORMATS,
    IMAGE_ENDINGS,
    BadInput,
    Entry,
    Fields,
    Filtered,
    FolderSource,
    RawImage,
    RawInstruction,
    RawPair,
    RawTexts,
    Source,
    open_source,
)  # fmt: skip
from megatron_cm3leon.data.sources.documents import decode_text
from megatron_cm3leon.data.sources.files import find_path_kind, list_folder, make_absolute, read_file, resolve_name
from megatron_cm3leon.data.tasks.options import TASK_FORMATS, add_task_options, names_task, open_input

_PART_SIZE = 4096
_CONTENT_BYTES = 4_000_000_000
"""Maximum bytes of images from tars, Parquet files and JSON Lines that are kept in memory."""


def add_input_options(parser: argparse.ArgumentParser, tasks: bool = False) -> None:
    """Add the options that `RawInputs.open` reads, the same as in tools/preprocess_data.py.

    `tasks`: with the options and formats of instruction documents.
    """
    add = parser.add_argument
    add("--input", type=user_path, required=True, nargs="+", help="files of one format, or one folder; paths or URLs")
    formats = (*FORMATS, *(TASK_FORMATS if tasks else ()))
    add("--format", choices=formats, default="auto", help="format of the input; auto: by the file extensions")
    add("--image-field", default="", help='field or column of the image (default: "image", "jpg" ...)')
    add("--caption-field", default="", help='field or column of the caption (default: "caption", "txt")')
    if tasks:
        add_task_options(parser)


class RawInputs:
    """A raw corpus of which the texts, the images or the pairs are read."""

    def __init__(
        self, inputs: str | Path | Sequence[str | Path], form: str = "auto", fields: Fields = Fields(),  # noqa: B008
        part: str = "pairs", source: Source | None = None,
    ) -> None:  # fmt: skip
        """`part`: which of texts, images or pairs will be read; `source`: the opened input, if it is open.

        Raises ValueError if there is no input.
        """
        inputs = [inputs] if isinstance(inputs, str | Path) else list(inputs)
        if form == "auto" and len(inputs) == 1 and source is None:
            form = _choose_form(str(inputs[0]), part)
        self.name = f"--input {inputs[0]}{' ...' if len(inputs) > 1 else ''}"
        self.source = source or open_source(inputs, _PART_SIZE, form, fields)
        self.read = 0
        """Inputs read so far."""
        self.reasons = Reasons()
        """Why inputs were skipped."""

    @classmethod
    def open(cls, arguments: argparse.Namespace, part: str) -> "RawInputs":
        """Open the inputs given by the options of `add_input_options`."""
        fields = Fields(arguments.image_field, arguments.caption_field)
        if hasattr(arguments, "task") and names_task(arguments):
            return cls(arguments.input, source=open_input(arguments, _PART_SIZE))
        return cls(arguments.input, arguments.format, fields, part)

    def texts(self) -> Iterator[str]:
        """Every text and caption; ValueError if there are none."""
        found = False
        for entry in self._entries():
            texts = entry.texts if isinstance(entry, RawTexts) else self._texts_of(entry)
            found = found or bool(texts)
            self._count(entry, bool(texts), "no text")
            yield from texts
        if not found:
            raise self.explain_none("text")

    def images(self, kept_bytes: int = _CONTENT_BYTES) -> list[RawImage]:
        """Every image, as its path or its content; ValueError if there are none.

        Of the images inside tars, Parquet files and JSON Lines, every n-th is kept, at most `kept_bytes` in total. A
        file that several instruction documents show, such as that of several questions, is yielded once: none is both
        trained on and held out.
        """
        found: list[RawImage] = []
        shown: set[str] = set()
        inside: list[RawImage] = []
        size, every, number = 0, 1, 0
        for image in self._images():
            if image.content is None:
                if not (self.source.tasks and image.path in shown):
                    found.append(image)
                    shown.add(image.path)
                continue
            if number % every == 0:
                inside.append(image)
                size += len(image.content)
            number += 1
            while size > kept_bytes and len(inside) > 1:
                inside, every = inside[::2], every * 2
                size = sum(len(image.content or b"") for image in inside)
        if number > len(inside):
            reason = "more images than fit into memory: every n-th of them is used"
            self.reasons.add_many(reason, number - len(inside))
        if not (found or inside):
            raise self.explain_none("image")
        return found + inside

    def pairs(self) -> Iterator[RawPair]:
        """Every pair."""
        for entry in self._entries():
            self._count(entry, isinstance(entry, RawPair), "no pair of caption and image")
            if isinstance(entry, RawPair):
                yield entry

    def explain_skipped(self) -> str:
        """How many inputs were skipped and why, as a sentence; "" if none were."""
        return f"{self.reasons.total} of {self.read} inputs were skipped: {self.reasons}." if self.reasons else ""

    def explain_none(self, what: str) -> ValueError:
        """The error for an input without any usable `what` (text or image)."""
        hint = f" {self.reasons.hint}" if self.reasons.hint else ""
        return ValueError(f"{self.name}: no {what} in its {self.read} inputs: {self.reasons or 'all empty'}.{hint}")

    def _entries(self) -> Iterator[Entry | RawTexts]:
        for part in range(self.source.parts):
            yield from self.source.read_batches(part)

    def _count(self, entry: Entry | RawTexts, used: bool, reason: str) -> None:
        inputs = len(entry) if isinstance(entry, RawTexts) else 1
        self.read += inputs
        if not used:
            self.reasons.add_many(getattr(entry, "reason", reason), inputs)

    def _texts_of(self, entry: Entry) -> list[str]:
        if isinstance(entry, Filtered):
            return []
        segments = entry.join_pieces() if isinstance(entry, RawInstruction) else entry.segments
        texts = [segment for segment in segments if isinstance(segment, str)]
        if isinstance(entry, BadInput) and isinstance(self.source, FolderSource) and entry.source.endswith(".txt"):
            try:  # a caption without an image
                texts = [decode_text(read_file(resolve_name(self.source.folder, entry.source)), entry.source)]
            except (OSError, ValueError):
                return []
        return [text for text in texts if text.strip()]

    def _images(self) -> Iterator[RawImage]:
        if isinstance(self.source, FolderSource):  # with or without captions
            for name in sorted(self.source.names, key=lambda name: name.split("/")):
                used = name.lower().endswith(IMAGE_ENDINGS)
                self._count(BadInput(name, name, "no image beside a caption"), used, "")
                if used:
                    yield RawImage(name, resolve_name(self.source.folder, name))
            return
        for entry in self._entries():
            segments = getattr(entry, "segments", ())
            images = [segment for segment in segments if isinstance(segment, RawImage)]
            self._count(entry, bool(images), "no image")
            yield from images


class ImageLoader:
    """Reads images and records the reasons why some cannot be read."""

    def __init__(self) -> None:
        self.unreadable: dict[str, str] = {}
        """Reason by name."""

    def __call__(self, image: RawImage) -> Image.Image:
        """An image as RGB; ValueError gives the reason why it cannot be read."""
        try:
            return read_image(image)[0]
        except ValueError as error:
            self.unreadable[image.name] = str(error)
            raise

    def add_to(self, reasons: Reasons) -> None:
        """Add the recorded reasons to `reasons`."""
        for name in sorted(self.unreadable):  # threads read in any order
            reasons.add(self.unreadable[name])


def _choose_form(path: str, part: str) -> str:
    """Format of a folder of which only the images or only the texts are used: it may hold no pairs."""
    path = make_absolute(os.path.expanduser(path))
    if find_path_kind(path) != "folder":
        return "auto"
    names = [name.lower() for name in list_folder(path)]
    if any(name.endswith((".tar", ".parquet")) for name in names):
        return "auto"
    images = any(name.endswith(IMAGE_ENDINGS) for name in names)
    if part == "images" and images:
        return "folder"
    return "texts" if part == "texts" and not images and any(name.endswith(".txt") for name in names) else "auto"
