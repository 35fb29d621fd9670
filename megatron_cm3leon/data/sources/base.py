"""Base of all sources: files cut into parts, and an identity.

A part is read by one process at a time and is the unit of resuming. Its limits depend only on the input and the part
size.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_cm3leon.data.sources.documents import Entry, Fields, RawTexts, gather_texts
from megatron_cm3leon.data.sources.files import find_common_folder, is_url, resolve_name


@dataclass(frozen=True)
class Part:
    """Some consecutive inputs of one file."""

    file: int
    """Index of the file among the source's files."""
    begin: int
    """Its start in the file: a byte, or a row."""
    number: int
    """Inputs before it in its file."""
    first: int
    """Inputs before it in the source."""
    inputs: int | None
    """Inputs in it, including blank lines; None: unknown until it is read."""


class Source(ABC):
    """Inputs of one format."""

    expects = ""
    """Description of a usable input, for messages."""
    external = True
    """Whether inputs refer to other files, which the user may fix while a run is interrupted."""
    files: list[str]
    """Absolute paths or URLs, in order."""
    part_size: int
    folder: str
    """Paths in the shards' metadata are relative to this."""
    count: int | None
    """Inputs in total, including blank lines; None: unknown until they are read."""
    identity: str
    """SHA-256 of everything in the input that the bytes of the shards depend on."""
    tasks: Sequence[dict] = ()
    """Descriptions of the tasks of its instruction documents, for the manifest."""
    _parts: list[Part]

    @property
    def parts(self) -> int:
        """Number of parts."""
        return len(self._parts)

    def part_inputs(self, part: int) -> int | None:
        """Inputs of a part, including blank lines; None: unknown until it is read."""
        return self._parts[part].inputs

    def read_part(self, part: int) -> Iterator[Entry]:
        """The inputs of a part in order."""
        for entry in self._read(self._parts[part]):
            if isinstance(entry, RawTexts):
                yield from entry
            else:
                yield entry

    def read_batches(self, part: int) -> Iterator[Entry | RawTexts]:
        """As `read_part`, with consecutive texts in batches, which take a fraction of the time of single texts."""
        return gather_texts(self._read(self._parts[part]))

    def name_of(self, file: int) -> str:
        """A file's name relative to the source's folder."""
        return self.files[file][len(self.folder) :].lstrip("/")

    @abstractmethod
    def _read(self, part: Part) -> Iterator[Entry | RawTexts]:
        """The inputs of a part in order; a reader may yield texts in batches."""

    def _add_parts(self, file: int, begins: list[int], inputs: int) -> None:
        """Parts of `part_size` inputs that begin at `begins`; the last one may have fewer."""
        first = self.count or 0
        for index, begin in enumerate(begins):
            number = index * self.part_size
            size = min(self.part_size, inputs - number)
            self._parts.append(Part(file, begin, number, first + number, size))
        self.count = first + inputs


class FileSource(Source):
    """Files that are cut into parts one after another."""

    def __init__(self, files: list[str], part_size: int, fields: Fields = Fields(), folder: str = "") -> None:  # noqa: B008
        """`files`: absolute paths or URLs, in order; `folder` contains them all ("": their deepest common folder)."""
        self.files, self.part_size, self.fields = files, part_size, fields
        self.folder = folder or find_common_folder(files)
        self._parts = []
        self.count = 0
        digests = [self._cut(number) for number in range(len(files))]
        self.identity = self._identify(digests)

    @abstractmethod
    def _cut(self, file: int) -> str:
        """Append the parts of a file, and add its inputs to `count`; returns a hash of the file."""

    def _identify(self, digests: list[str]) -> str:
        if len(digests) == 1 and self.fields == Fields():
            return digests[0]
        names = [self.name_of(number) for number in range(len(self.files))]
        content = [names, digests, self.fields.image, self.fields.caption]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _image_folder(self, file: int) -> str:
        """Folder to which the paths of images in this file are relative."""
        return self.files[file].rpartition("/")[0]

    def _locator(self, file: int) -> Callable[[str], tuple[str, str]]:
        """Function that turns an image's path in this file into (name relative to the source's folder, path)."""
        folder = self._image_folder(file)
        inside = folder == self.folder or folder.startswith(f"{self.folder.rstrip('/')}/")
        prefix = folder[len(self.folder) :].lstrip("/") if inside else folder

        def locate(name: str) -> tuple[str, str]:
            shown = f"{prefix}/{name}" if prefix and not is_url(name) and not os.path.isabs(name) else name
            return shown, resolve_name(folder, name)

        return locate
