"""Where the encoder's images come from: the raw files (in folders, stores or tars), or the image tokens."""

import hashlib
import os
import re
import tarfile
from collections import OrderedDict
from threading import Lock

import numpy as np
import torch
from PIL import Image

from megatron_cm3leon.data.shards.reader import Corpus
from megatron_cm3leon.data.sources import RawImage, read_image_bytes
from megatron_cm3leon.data.sources.files import open_file, resolve_name
from megatron_cm3leon.data.sources.tar_members import Member, TarReader
from megatron_cm3leon.retrieval.contents import Content, ReadImages
from megatron_cm3leon.tokenizers.image import ImageTokenizer
from megatron_cm3leon.tokenizers.images import from_pixels, load_image

_REMEDY = (
    "restore it, or decode images from the image tokens (required if the input held them as bytes): "
    "--images tokens --tokenizer FOLDER."
)
_MAX_OPEN_TARS = 4
_INSIDE_TAR = re.compile(r"\.tar/", re.IGNORECASE)


class SourceImages:
    """Reads the raw images of documents from the input of the shards, and compares their checksums."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.input = corpus, str(corpus.manifest["input"]).rstrip("/")
        self._tars: OrderedDict[str, dict[str, Member]] = OrderedDict()
        self._lock = Lock()

    def __call__(self, content: Content) -> list[Image.Image]:
        """The images of a document as RGB; ValueError if one is missing or is not the tokenized one any more."""
        if not len(content.image_files) == len(content.image_sha256) == len(content.image_codes):
            raise ValueError(
                f"{content.name} has {len(content.image_codes)} images, but its metadata name "
                f"{len(content.image_files)} files; {_REMEDY}"
            )
        files = zip(content.image_files, content.image_sha256, strict=True)
        return [self._read(name, sha256) for name, sha256 in files]

    def _read(self, name: str, sha256: str) -> Image.Image:
        path = resolve_name(self.input, name)
        try:
            content = self._read_bytes(path)
        except (OSError, tarfile.TarError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"{path}, an image of {self.corpus.folder}, cannot be read ({reason}); {_REMEDY}"
            ) from error
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(
                f"{path} is not the image that {self.corpus.folder} was made from (its sha256 differs); {_REMEDY}"
            )
        return load_image(content)

    def _read_bytes(self, path: str) -> bytes:
        inside = _INSIDE_TAR.search(path)
        if inside is None or os.path.isdir(path[: inside.end() - 1]):
            return read_image_bytes(RawImage(path, path))
        archive, name = path[: inside.end() - 1], path[inside.end() :]
        with self._lock:
            members = self._tars.get(archive) or self._list_members(archive)
        if name not in members:
            raise FileNotFoundError(2, "the tar has no such member")
        with open_file(archive) as file:
            return TarReader(file).read(members[name])

    def _list_members(self, archive: str) -> dict[str, Member]:
        """The files in a tar by name, with lower-case extensions; links are followed."""
        with open_file(archive) as file:
            reader = TarReader(file)
            found = {_lower_extension(member.name): member for member in reader}
            members = {name: target for name, member in found.items() if (target := reader.follow(member))}
        self._tars[archive] = members
        if len(self._tars) > _MAX_OPEN_TARS:
            self._tars.popitem(last=False)
        return members


def _lower_extension(name: str) -> str:
    """A member's name as the metadata hold it: WebDataset's key, up to the first dot of the base name, is unchanged."""
    folder, slash, base = name.rpartition("/")
    key, dot, extension = base.partition(".")
    return f"{folder}{slash}{key}{dot}{extension.lower()}"


def build_token_image_reader(image_tokenizer: ImageTokenizer) -> ReadImages:
    """A reader that decodes images from the image tokens of the shards."""

    def read(content: Content) -> list[Image.Image]:
        pixels = image_tokenizer.decode(torch.from_numpy(np.stack(content.image_codes)))
        return [from_pixels(image) for image in pixels]

    return read
