"""Folders: images with their captions next to them, and folders of texts."""

import hashlib
import json
import logging
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from unicodedata import normalize

from megatron_cm3leon.data.sources.base import Part, Source
from megatron_cm3leon.data.sources.documents import (
    IMAGE_ENDINGS,
    UNREAD_ENDINGS,
    BadInput,
    Entry,
    RawImage,
    RawPair,
    RawText,
    check_document,
    decode_text,
)  # fmt: skip
from megatron_cm3leon.data.sources.files import join_path, measure_file, read_file

logger = logging.getLogger(__name__)


class FolderInputs(Source):
    """A folder in which some of the files are inputs."""

    external = True

    def __init__(self, folder: str, part_size: int, names: Sequence[str]) -> None:
        """`names`: the files in the folder, from list_folder."""
        self.files, self.part_size, self.folder = [folder], part_size, folder
        self.names = self._list(names)
        """Relative names of the inputs, sorted."""
        self._parts = []
        self.count = 0
        self._add_parts(0, list(range(0, len(self.names), part_size)), len(self.names))
        self.identity = self._hash()

    def _read(self, part: Part) -> Iterator[Entry]:
        stop = None if part.inputs is None else part.number + part.inputs
        for number, name in enumerate(self.names[part.number : stop], part.number):
            yield self._read_input(name, f"{number:08d}")

    def _hash(self) -> str:
        """SHA-256 of names and sizes; the bytes are read only once, when they are encoded."""
        digest = hashlib.sha256()
        for name in self.names:
            for file in self._files_of(name):
                size = measure_file(join_path(self.folder, file))
                digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    @abstractmethod
    def _list(self, names: Sequence[str]) -> list[str]:
        """The inputs among `names`, relative to the folder, in order."""

    @abstractmethod
    def _files_of(self, name: str) -> list[str]:
        """The files of an input, whose sizes identify it."""

    @abstractmethod
    def _read_input(self, name: str, key: str) -> Entry:
        """The input of this name as a document, or a BadInput with the reason."""


class FolderSource(FolderInputs):
    """img.png next to img.txt (or, as img2dataset writes them, img.json) at any depth, in the order of their names."""

    expects = f"an image ({', '.join(IMAGE_ENDINGS)}) next to a .txt of the same name"

    def _list(self, names: Sequence[str]) -> list[str]:
        """Every image, and every caption that has no image.

        An image that cannot be decoded (such as HEIC) counts only if no other image has its stem.
        """
        images = [name for name in names if name.lower().endswith(IMAGE_ENDINGS)]
        decoded = set(map(_stem, images))
        images += [name for name in names if name.lower().endswith(UNREAD_ENDINGS) and _stem(name) not in decoded]
        stems = set(map(_stem, images))
        captions = [name for name in names if name.lower().endswith(".txt")]
        described = {_stem(name) for name in names if name.endswith(".json")}
        self._uppercase = {_stem(name): name for name in captions if not name.endswith(".txt")}
        """Captions with an upper-case extension (.TXT), by stem."""
        self._ambiguous = {stem for stem, count in Counter(map(_stem, captions)).items() if count > 1}
        """Stems that have captions with an upper-case and with a lower-case extension."""
        self._caption_stems = _match_forms(stems, set(map(_stem, captions)))
        self._described = {stem: stem for stem in described & stems} | _match_forms(stems, described)
        """Stem of the image -> stem of its .json."""
        if matched := len(self._caption_stems):
            logger.info(
                "%s: %d captions are read although their names differ from the images' in Unicode form.",
                self.folder,
                matched,
            )
        with_image = stems | set(self._caption_stems.values())
        unpaired = [name for name in captions if _stem(name) not in with_image]
        self._notes = _describe_other_files(unpaired, names)
        return sorted(images + unpaired)

    def _caption_of(self, name: str) -> str:
        stem = self._caption_stems.get(_stem(name), _stem(name))
        return self._uppercase.get(stem, f"{stem}.txt")

    def _files_of(self, name: str) -> list[str]:
        described = self._described.get(_stem(name))
        return [name, self._caption_of(name), *([f"{described}.json"] if described else [])]

    def _read_input(self, name: str, key: str) -> Entry:
        if name.lower().endswith(".txt"):
            note = self._notes.get(name, "")
            return BadInput(key, name, f"no image with the name of this caption{note}")
        path = self._caption_of(name)
        if self._caption_stems.get(_stem(name), _stem(name)) in self._ambiguous:
            return BadInput(key, name, f"duplicate captions: {os.path.basename(path)} and one in small letters")
        fields, shown = {}, os.path.basename(path)
        try:
            if _stem(name) in self._described:
                described = self._described[_stem(name)] + ".json"
                fields = json.loads(read_file(join_path(self.folder, described)))
                if not isinstance(fields, dict):
                    raise ValueError(f"not a JSON object but {type(fields).__name__}")
            caption = fields.pop("caption", None)
            if caption is None or measure_file(join_path(self.folder, path)) >= 0:
                caption = decode_text(read_file(join_path(self.folder, path)), shown)
        except FileNotFoundError:
            return BadInput(key, name, f"no caption: {shown} is missing beside the image")
        except (OSError, ValueError, RecursionError) as error:
            return BadInput(key, name, str(error) if "UTF-8" in str(error) else f"unreadable caption: {error}")
        if not isinstance(caption, str):
            return BadInput(key, name, f"caption is {type(caption).__name__}, not text")
        extra = json.dumps(fields, sort_keys=True) if fields else "{}"
        return check_document(RawPair(key, name, [caption, RawImage(name, join_path(self.folder, name))], extra))


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _match_forms(images: Collection[str], others: Collection[str]) -> dict[str, str]:
    """Stem of an image -> the stem among `others` that differs only in its Unicode form (NFC, NFD).

    Only for images without a stem of the same form. A name that two images or two other files share in this way is not
    matched.
    """
    unmatched, free = (
        [stem for stem in a if not stem.isascii() and stem not in b] for a, b in ((images, others), (others, images))
    )
    counts = Counter(normalize("NFC", stem) for stem in free)
    forms = {form: stem for stem in free if counts[form := normalize("NFC", stem)] == 1}
    counts = Counter(normalize("NFC", stem) for stem in unmatched)
    return {stem: forms[form] for stem in unmatched if (form := normalize("NFC", stem)) in forms and counts[form] == 1}


def _describe_other_files(captions: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Addition to the reason of captions without an image: the other file with the same stem, if there is one."""
    stems = {_stem(name): name for name in captions}
    others = {
        _stem(name): name for name in names if _stem(name) in stems and not name.lower().endswith((".txt", ".json"))
    }
    return {stems[stem]: f": {os.path.basename(name)} is not in a format of images" for stem, name in others.items()}


class TextFilesSource(FolderInputs):
    """A folder in which every .txt or .md file is a document."""

    expects, endings = "a .txt or .md file", (".txt", ".md")

    def _list(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name.lower().endswith(self.endings)]

    def _files_of(self, name: str) -> list[str]:
        return [name]

    def _read_input(self, name: str, key: str) -> Entry:
        try:
            text = read_file(join_path(self.folder, name)).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return BadInput(key, name, f"not UTF-8: byte {error.start} cannot be decoded")
        except (OSError, ValueError) as error:
            return BadInput(key, name, f"unreadable text: {error}")
        return check_document(RawText(key, name, [text]))
