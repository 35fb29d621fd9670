"""Texts, images and pairs of a raw corpus, for what is trained on them: the tokenizers and CLIP.

Every format of `open_source` is read. What cannot be used is skipped, counted and reported with its reasons; an input
that makes no document (an image without a caption) still gives what is needed of it.
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
    PICTURE_ENDINGS,
    BadInput,
    Entry,
    Fields,
    Filtered,
    FolderSource,
    Picture,
    RawPair,
    RawTexts,
    open_source,
)  # fmt: skip
from megatron_cm3leon.data.sources.documents import decode_text
from megatron_cm3leon.data.sources.files import find_kind, join, list_folder, make_absolute, read_file

_PART_SIZE = 4096
_CONTENT_BYTES = 4_000_000_000
"""Bytes of images inside tars, Parquet files and lines that are kept in memory."""


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """The options that `RawInputs.open` takes, as tools/preprocess_data.py has them."""
    add = parser.add_argument
    add("--input", type=user_path, required=True, nargs="+", help="files of one format, or one folder; paths or URLs")
    add("--format", choices=FORMATS, default="auto", help="of the input; auto goes by names' endings")
    add("--image-field", default="", help='field or column of the image (else "image", "jpg" ...)')
    add("--caption-field", default="", help='field or column of the caption (else "caption", "txt")')


class RawInputs:
    """A raw corpus, read for one purpose."""

    def __init__(
        self, inputs: str | Path | Sequence[str | Path], form: str = "auto", fields: Fields = Fields(),  # noqa: B008
        part: str = "pairs",
    ) -> None:  # fmt: skip
        """`part`: texts, images or pairs, what will be read; ValueError where there is nothing to read."""
        inputs = [inputs] if isinstance(inputs, str | Path) else list(inputs)
        if form == "auto" and len(inputs) == 1:
            form = _choose_form(str(inputs[0]), part)
        self.name = f"--input {inputs[0]}{' ...' if len(inputs) > 1 else ''}"
        self.source = open_source(inputs, _PART_SIZE, form, fields)
        self.read = 0
        """Inputs so far."""
        self.reasons = Reasons()
        """Why inputs were skipped."""

    @classmethod
    def open(cls, arguments: argparse.Namespace, part: str) -> "RawInputs":
        """What `add_input_options` were given."""
        fields = Fields(arguments.image_field, arguments.caption_field)
        return cls(arguments.input, arguments.format, fields, part)

    def texts(self) -> Iterator[str]:
        """Every text and caption; ValueError where there is none."""
        found = False
        for entry in self._entries():
            texts = entry.texts if isinstance(entry, RawTexts) else self._texts_of(entry)
            found = found or bool(texts)
            self._count(entry, bool(texts), "no text")
            yield from texts
        if not found:
            raise self.explain_none("text")

    def images(self, kept_bytes: int = _CONTENT_BYTES) -> list[Picture]:
        """Every image, as its path or its content; ValueError where there is none.

        Of those inside tars, Parquet files and lines an even share stays, `kept_bytes` at most.
        """
        found, inside, size, every, number = [], [], 0, 1, 0
        for picture in self._images():
            if picture.content is None:
                found.append(picture)
                continue
            if number % every == 0:
                inside.append(picture)
                size += len(picture.content)
            number += 1
            while size > kept_bytes and len(inside) > 1:
                inside, every = inside[::2], every * 2
                size = sum(len(picture.content) for picture in inside)
        if number > len(inside):
            reason = "more images than fit into memory: an even share of them is used"
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
        """How many inputs were skipped and why, as a sentence; "" where none was."""
        return f"{self.reasons.total} of {self.read} inputs were skipped: {self.reasons}." if self.reasons else ""

    def explain_none(self, what: str) -> ValueError:
        """The error of an input in which no `what` can be used."""
        hint = f" {self.reasons.hint}" if self.reasons.hint else ""
        return ValueError(f"{self.name}: no {what} in its {self.read} inputs: {self.reasons or 'all empty'}.{hint}")

    def _entries(self) -> Iterator[Entry | RawTexts]:
        for part in range(self.source.parts):
            yield from self.source.read_blocks(part)

    def _count(self, entry: Entry | RawTexts, used: bool, reason: str) -> None:
        inputs = len(entry) if isinstance(entry, RawTexts) else 1
        self.read += inputs
        if not used:
            self.reasons.add_many(getattr(entry, "reason", reason), inputs)

    def _texts_of(self, entry: Entry) -> list[str]:
        if isinstance(entry, Filtered):
            return []
        texts = [segment for segment in entry.segments if isinstance(segment, str)]
        if isinstance(entry, BadInput) and isinstance(self.source, FolderSource) and entry.source.endswith(".txt"):
            try:  # a caption without an image
                texts = [decode_text(read_file(join(self.source.folder, entry.source)), entry.source)]
            except (OSError, ValueError):
                return []
        return [text for text in texts if text.strip()]

    def _images(self) -> Iterator[Picture]:
        if isinstance(self.source, FolderSource):  # whatever captions there are
            for name in sorted(self.source.names, key=lambda name: name.split("/")):
                used = name.lower().endswith(PICTURE_ENDINGS)
                self._count(BadInput(name, name, "no image beside a caption"), used, "")
                if used:
                    yield Picture(name, join(self.source.folder, name))
            return
        for entry in self._entries():
            segments = getattr(entry, "segments", ())
            pictures = [segment for segment in segments if isinstance(segment, Picture)]
            self._count(entry, bool(pictures), "no image")
            yield from pictures


class ImageLoader:
    """Reads images, and keeps the reasons of those that cannot be read."""

    def __init__(self) -> None:
        self.unreadable: dict[str, str] = {}
        """Reason by name."""

    def __call__(self, picture: Picture) -> Image.Image:
        """An image as RGB; ValueError says why there is none."""
        try:
            return read_image(picture)[0]
        except ValueError as error:
            self.unreadable[picture.name] = str(error)
            raise

    def add_to(self, reasons: Reasons) -> None:
        for name in sorted(self.unreadable):  # threads read in any order
            reasons.add(self.unreadable[name])


def _choose_form(path: str, part: str) -> str:
    """A folder in which only images, or only texts, count needs no pairs."""
    path = make_absolute(os.path.expanduser(path))
    if find_kind(path) != "folder":
        return "auto"
    names = [name.lower() for name in list_folder(path)]
    if any(name.endswith((".tar", ".parquet")) for name in names):
        return "auto"
    images = any(name.endswith(PICTURE_ENDINGS) for name in names)
    if part == "images" and images:
        return "folder"
    return "texts" if part == "texts" and not images and any(name.endswith(".txt") for name in names) else "auto"
