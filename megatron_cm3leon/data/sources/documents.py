"""Raw documents: what every reader yields, for all input formats.

A document is a sequence of texts and images: a pair (one caption, one image), a text alone, an interleaved document,
or an instruction document, whose pieces have roles. An input that is not a valid document is a BadInput (quarantined)
or Filtered, with the reason. Keys are numbers of inputs, so they are safe names in a tar, whatever keys the user has.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import cast

from megatron_cm3leon.data.sources.embedded import shorten

COMMON_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm")
IMAGE_ENDINGS = (
    *COMMON_ENDINGS, ".jfif", ".jpe", ".mpo", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".apng", ".dib", ".ico",
    ".pbm", ".pgm", ".pnm", ".pfm", ".avifs",
)  # fmt: skip
"""File extensions of the images that can be decoded (tokenizers/images.py)."""
UNREAD_ENDINGS = (
    ".heic", ".heif", ".hif", ".jxl", ".svg", ".svgz", ".psd", ".tga", ".eps", ".icns", ".cur", ".qoi", ".dds", ".pcx",
    ".sgi", ".xbm", ".xpm", ".exr", ".hdr", ".jxr", ".wdp", ".bpg", ".djvu", ".wmf", ".emf", ".xcf",
)  # fmt: skip
"""File extensions of images that cannot be decoded: they are inputs, and are quarantined with their format."""
IMAGE_FIELDS = ("image", *(ending[1:] for ending in COMMON_ENDINGS))
CAPTION_FIELDS = ("caption", "txt")
FILE_NAME = "file_name"
"""Field of the image in Hugging Face's imagefolder, if its value has the extension of an image."""
TEXT, PAIR, INTERLEAVED, INSTRUCTION = KINDS = ("text", "pair", "interleaved", "instruction")
PROMPT, TARGET = ROLES = ("prompt", "target")
"""Roles of the pieces of an instruction document: what is given, and what the model is trained to produce."""
TEXT_BATCH_CHARACTERS = 1 << 16
"""Characters of texts that are read, encoded and written together: more would not fit into the processor's cache."""


@dataclass(slots=True)
class RawImage:
    """An image of a document: its name in the input, and its file or its bytes."""

    name: str
    path: str = ""
    """Path or URL of its file, unless `content` is given."""
    content: bytes | None = None


@dataclass(slots=True)
class RawDocument:
    """Texts and images in their order."""

    key: str
    source: str
    """Where the document comes from, such as `pairs.jsonl:13`."""
    segments: list[str | RawImage]
    extra: str = "{}"
    """The input's other fields as a JSON object."""

    kind = INTERLEAVED

    @property
    def texts(self) -> list[str]:
        """The texts in their order."""
        return [segment for segment in self.segments if isinstance(segment, str)]

    @property
    def images(self) -> list[RawImage]:
        """The images in their order."""
        return [segment for segment in self.segments if not isinstance(segment, str)]


class RawText(RawDocument):
    """A text without images."""

    __slots__ = ()
    kind = TEXT


class RawPair(RawDocument):
    """A caption and its image: segments = [caption, image]."""

    __slots__ = ()
    kind = PAIR

    @property
    def caption(self) -> str:
        """The text."""
        return self.texts[0]

    @property
    def image_name(self) -> str:
        """Path of the image as in the input, relative to the source's folder."""
        return self.images[0].name


@dataclass(slots=True)
class RawInstruction(RawDocument):
    """Pieces (texts and images) with a role each; several pieces of text may form one segment.

    `Question: is it red? Answer:` (prompt), ` yes` (target), `.` (prompt) and an image (prompt) are four pieces, of
    which the second and third are joined to the one before them: one <break> precedes the image.
    """

    roles: tuple[str, ...] = ()
    """ROLES, one per piece."""
    joined: tuple[bool, ...] = ()
    """Whether each piece continues the segment of the piece before it, without <break>; only text after text does."""

    kind = INSTRUCTION

    def join_pieces(self) -> list[str | RawImage]:
        """The segments: joined pieces as one text."""
        segments: list[str | RawImage] = []
        for piece, joined in zip(self.segments, self.joined, strict=True):
            if joined:
                segments[-1] = f"{segments[-1]}{piece}"
            else:
                segments.append(piece)
        return segments


@dataclass(slots=True)
class RawTexts:
    """Consecutive texts without images, one list per field: an object per text would cost as much as encoding it."""

    keys: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[RawText]:
        for key, source, text, extra in zip(self.keys, self.sources, self.texts, self.extras, strict=True):
            yield RawText(key, source, [text], extra)

    def append(self, text: RawText) -> None:
        """Add a text at the end."""
        self.keys.append(text.key)
        self.sources.append(text.source)
        self.texts.append(cast(str, text.segments[0]))  # a RawText has one text
        self.extras.append(text.extra)

    def choose(self, chosen: Sequence[bool]) -> "RawTexts":
        """The texts for which `chosen` is true."""
        columns = (self.keys, self.sources, self.texts, self.extras)
        return RawTexts(*(list(compress(column, chosen)) for column in columns))


@dataclass(frozen=True)
class BadInput:
    """An input that is not a valid document, and why."""

    key: str
    source: str
    reason: str
    segments: Sequence[str | RawImage] = ()
    """Its usable texts and images, for training that needs only texts or only images."""

    def to_dict(self) -> dict:
        """The line of quarantine.jsonl."""
        fields = {"key": self.key, "source": shorten(self.source), "reason": shorten(self.reason)}
        return {name: text.encode(errors="replace").decode() for name, text in fields.items()}  # valid Unicode


@dataclass(frozen=True)
class Filtered:
    """A valid input that the filters reject; counted by its reason."""

    reason: str


Entry = RawDocument | BadInput | Filtered


@dataclass(frozen=True)
class Fields:
    """Names of the fields that hold image and caption; "": any of the usual names."""

    image: str = ""
    caption: str = ""

    def find_image(self, fields: dict) -> str:
        """Name of the image field, even if `fields` does not contain it."""
        if self.image:
            return self.image
        for name in IMAGE_FIELDS:
            if name in fields:
                return name
        return FILE_NAME if names_image(fields.get(FILE_NAME)) else IMAGE_FIELDS[0]

    def find_caption(self, fields: dict) -> str:
        """Name of the caption field, even if `fields` does not contain it."""
        return self.caption or next((name for name in CAPTION_FIELDS if name in fields), CAPTION_FIELDS[0])

    def are_in(self, names: Iterable[str]) -> bool:
        """Whether one of these names is a field that is read."""
        known = {self.image, self.caption, *IMAGE_FIELDS, *CAPTION_FIELDS, FILE_NAME, "text", "segments"}
        return not known.isdisjoint(name for name in names if name)


def names_image(value: object) -> bool:
    """Whether a value is a string with the extension of an image file."""
    return isinstance(value, str) and value[-6:].lower().endswith((*IMAGE_ENDINGS, *UNREAD_ENDINGS))


def gather_texts(entries: Iterable["Entry | RawTexts"]) -> Iterator["Entry | RawTexts"]:
    """The same inputs, with consecutive texts in batches of TEXT_BATCH_CHARACTERS."""
    texts, characters = RawTexts(), 0
    for entry in entries:
        if type(entry) is RawText:
            texts.append(entry)
            characters += len(texts.texts[-1])
            if characters < TEXT_BATCH_CHARACTERS:
                continue
        if texts:
            yield texts
            texts, characters = RawTexts(), 0
        if type(entry) is not RawText:
            yield entry
    if texts:
        yield texts


def check_document(document: RawDocument) -> RawDocument | BadInput:
    """The document; or a BadInput if a text is empty or not valid Unicode.

    An instruction document must also have a target, and no role but ROLES.
    """
    if isinstance(document, RawInstruction) and (fault := _find_fault_of_roles(document)):
        return BadInput(document.key, document.source, fault)
    for segment in document.segments:
        text = segment if isinstance(segment, str) else segment.name
        if text and text.isascii() and not text.isspace():
            continue
        if fault := _find_fault(segment, document.kind):
            usable = [other for other in document.segments if not _find_fault(other, document.kind)]
            return BadInput(document.key, document.source, fault, usable)
    return document


def _find_fault_of_roles(document: RawInstruction) -> str:
    pieces, roles, joined = document.segments, document.roles, document.joined
    assert len(pieces) == len(roles) == len(joined) > 0, f"{document.source}: not one role per piece"
    are_texts = [isinstance(piece, str) for piece in pieces]
    after_text = [False, *are_texts[:-1]]
    for number, role in enumerate(roles):
        if role not in ROLES:
            return f"unknown role: {shorten(role, 60)!r} of piece {number + 1}; the roles are {', '.join(ROLES)}"
        assert not joined[number] or (are_texts[number] and after_text[number]), "only text is joined, to text"
        piece = pieces[number]
        if role == TARGET and isinstance(piece, str) and (not piece or piece.isspace()):
            return f"empty answer: piece {number + 1} of {len(pieces)}"
    return "" if TARGET in roles else f"no answer: none of the {len(pieces)} pieces is a target"


def _find_fault(segment: str | RawImage, kind: str) -> str:
    text = segment if isinstance(segment, str) else segment.name
    if not text or text.isspace():
        if text is not segment:
            return "empty picture path"
        return "empty caption" if kind == PAIR else "empty text"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return "not Unicode: an unpaired surrogate in text or picture path"
    return ""


def decode_text(content: bytes, what: str) -> str:
    """The text of a file, without byte-order mark and trailing newlines; ValueError if it is not UTF-8.

    `what`: name of the file, for the message.
    """
    try:
        return content.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} of {what} cannot be decoded") from error
