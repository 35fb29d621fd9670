"""Folders: pictures with their captions beside them, and folders of texts."""

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Iterator

from megatron_cm3leon.data.sources.base import Part, Source
from megatron_cm3leon.data.sources.documents import (
    PICTURE_ENDINGS,
    BadInput,
    Entry,
    Picture,
    RawPair,
    RawText,
    check_document,
    decode_text,
)  # fmt: skip
from megatron_cm3leon.data.sources.files import join, list_folder, measure_file, read_file


class _FolderSource(Source):
    external = True

    def __init__(self, folder: str, part_size: int) -> None:
        self.files, self.part_size, self.folder = [folder], part_size, folder
        self.names = self._list()
        """Relative names of the inputs, sorted."""
        self._parts, self.count = [], 0
        self._add_parts(0, list(range(0, len(self.names), part_size)), len(self.names))
        self.identity = self._hash()

    def _read(self, part: Part) -> Iterator[Entry]:
        for number, name in enumerate(self.names[part.number : part.number + part.inputs], part.number):
            yield self._read_input(name, f"{number:08d}")

    def _hash(self) -> str:
        """SHA-256 of names and sizes; the bytes are read once only, when they are encoded."""
        digest = hashlib.sha256()
        for name in self.names:
            for file in self._files_of(name):
                size = measure_file(join(self.folder, file))
                digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    @abstractmethod
    def _list(self) -> list[str]:
        """Names of the inputs in order, relative to the folder."""

    @abstractmethod
    def _files_of(self, name: str) -> list[str]:
        """The files of an input, whose sizes tell it from another."""

    @abstractmethod
    def _read_input(self, name: str, key: str) -> Entry:
        """The input of this name as a document, or why it is none."""


class FolderSource(_FolderSource):
    """img.png beside img.txt (or, as img2dataset writes them, img.json) at any depth, in the order of their names."""

    expects = f"a picture ({', '.join(PICTURE_ENDINGS)}) beside a .txt of the same name"

    def _list(self) -> list[str]:
        """Every picture, and every caption that has no picture."""
        names = list_folder(self.folder)
        pictures = [name for name in names if name.lower().endswith(PICTURE_ENDINGS)]
        stems = {os.path.splitext(name)[0] for name in pictures}
        captions = [name for name in names if name.lower().endswith(".txt")]
        odd = [name for name in captions if not name.endswith(".txt")]
        self._odd = {name[:-4]: name for name in odd}
        """Captions in capitals (.TXT), by stem."""
        plain = (stem for name in captions if (stem := name.removesuffix(".txt")) != name)
        self._several = {stem for stem in plain if stem in self._odd}
        """Stems that have a caption in capitals and another."""
        self._described = {stem for name in names if (stem := name.removesuffix(".json")) != name and stem in stems}
        return sorted(pictures + [name for name in captions if name[:-4] not in stems])

    def _caption_of(self, name: str) -> str:
        stem = os.path.splitext(name)[0]
        return self._odd.get(stem, f"{stem}.txt")

    def _files_of(self, name: str) -> list[str]:
        stem = os.path.splitext(name)[0]
        return [name, self._caption_of(name), *([f"{stem}.json"] if stem in self._described else [])]

    def _read_input(self, name: str, key: str) -> Entry:
        if name.lower().endswith(".txt"):
            return BadInput(key, name, "no picture beside this caption")
        path = self._caption_of(name)
        if os.path.splitext(name)[0] in self._several:
            return BadInput(key, name, f"duplicate captions: {os.path.basename(path)} and one in small letters")
        fields, shown = {}, os.path.basename(path)
        try:
            if os.path.splitext(name)[0] in self._described:
                described = os.path.splitext(name)[0] + ".json"
                fields = json.loads(read_file(join(self.folder, described)))
                if not isinstance(fields, dict):
                    raise ValueError(f"not a JSON object but {type(fields).__name__}")
            caption = fields.pop("caption", None)
            if caption is None or measure_file(join(self.folder, path)) >= 0:
                caption = decode_text(read_file(join(self.folder, path)), shown)
        except FileNotFoundError:
            return BadInput(key, name, f"no caption: {shown} is missing beside the picture")
        except (OSError, ValueError, RecursionError) as error:
            return BadInput(key, name, str(error) if "UTF-8" in str(error) else f"unreadable caption: {error}")
        if not isinstance(caption, str):
            return BadInput(key, name, f"caption is {type(caption).__name__}, not text")
        extra = json.dumps(fields, sort_keys=True) if fields else "{}"
        return check_document(RawPair(key, name, [caption, Picture(name, join(self.folder, name))], extra))


class TextFilesSource(_FolderSource):
    """A folder in which every .txt (or .md) file is a document."""

    expects, endings = "a .txt or .md file", (".txt", ".md")

    def _list(self) -> list[str]:
        return [name for name in list_folder(self.folder) if name.lower().endswith(self.endings)]

    def _files_of(self, name: str) -> list[str]:
        return [name]

    def _read_input(self, name: str, key: str) -> Entry:
        try:
            text = read_file(join(self.folder, name)).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return BadInput(key, name, f"not UTF-8: byte {error.start} cannot be decoded")
        except (OSError, ValueError) as error:
            return BadInput(key, name, f"unreadable text: {error}")
        return check_document(RawText(key, name, [text]))
