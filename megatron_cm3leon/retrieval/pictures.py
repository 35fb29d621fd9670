"""Where the encoder's pictures come from: the raw files (in folders, stores or tars), or the image tokens."""

import hashlib
import os
import re
import tarfile
from collections import OrderedDict
from threading import Lock

import numpy as np
from PIL import Image

from megatron_cm3leon.data.shards.reader import Corpus
from megatron_cm3leon.data.sources import RawImage, read_image_bytes
from megatron_cm3leon.data.sources.files import open_file, resolve_name
from megatron_cm3leon.data.sources.tar_members import Member, TarReader
from megatron_cm3leon.retrieval.contents import Content, ReadPictures
from megatron_cm3leon.tokenizers.images import load_picture

_REMEDY = (
    "put it back, or decode pictures from the image tokens (the way for an input that held them as bytes): "
    "--pictures tokens --tokenizer FOLDER."
)
_TARS_KEPT = 4
_INSIDE_TAR = re.compile(r"\.tar/", re.IGNORECASE)


class SourcePictures:
    """Reads the raw pictures of documents from where the shards were made from, and compares their checksums."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.input = corpus, str(corpus.manifest["input"]).rstrip("/")
        self._tars: OrderedDict[str, dict[str, Member]] = OrderedDict()
        self._lock = Lock()

    def __call__(self, content: Content) -> list[Image.Image]:
        """The pictures of a document; ValueError where one is gone or no longer the one that was tokenised."""
        if not len(content.image) == len(content.sha256) == len(content.codes):
            raise ValueError(
                f"{content.name} has {len(content.codes)} pictures, but its metadata name {len(content.image)} files; "
                f"{_REMEDY}"
            )
        return [self._read(name, sha256) for name, sha256 in zip(content.image, content.sha256, strict=True)]

    def _read(self, name: str, checksum: str) -> Image.Image:
        place = resolve_name(self.input, name)
        try:
            content = self._read_bytes(place)
        except (OSError, tarfile.TarError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"{place}, a picture of {self.corpus.folder}, cannot be read ({reason}); {_REMEDY}"
            ) from error
        if hashlib.sha256(content).hexdigest() != checksum:
            raise ValueError(
                f"{place} is not the picture that {self.corpus.folder} was made from (its sha256 differs); {_REMEDY}"
            )
        return load_picture(content)

    def _read_bytes(self, place: str) -> bytes:
        inside = _INSIDE_TAR.search(place)
        archive, member = (place[: inside.end() - 1], place[inside.end() :]) if inside else ("", "")
        if not inside or os.path.isdir(archive):
            return read_image_bytes(RawImage(place, place))
        with self._lock:
            members = self._tars.get(archive) or self._list_members(archive)
        if member not in members:
            raise FileNotFoundError(2, "the tar has no such member")
        with open_file(archive) as file:
            return TarReader(file).read(members[member])

    def _list_members(self, archive: str) -> dict[str, Member]:
        """The files in a tar, links followed, by their names with the ending in small letters."""
        with open_file(archive) as file:
            reader = TarReader(file)
            found = {_lower_ending(member.name): member for member in reader}
            members = {name: place for name, member in found.items() if (place := reader.follow(member))}
        self._tars[archive] = members
        if len(self._tars) > _TARS_KEPT:
            self._tars.popitem(last=False)
        return members


def _lower_ending(name: str) -> str:
    """A member's name as the metadata have it: WebDataset's key, which ends at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, dot, ending = base.partition(".")
    return f"{folder}{slash}{stem}{dot}{ending.lower()}"


def read_token_pictures(image_tokenizer) -> ReadPictures:
    """Reader that decodes pictures from the image tokens of the shards."""
    import torch

    from megatron_cm3leon.tokenizers.images import from_pixels

    def read(content: Content) -> list[Image.Image]:
        pixels = image_tokenizer.decode(torch.from_numpy(np.stack(content.codes)))
        return [from_pixels(picture) for picture in pixels]

    return read
