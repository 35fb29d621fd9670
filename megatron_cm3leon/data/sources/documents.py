"""Raw documents: what every reader yields, whatever the input's format.

A document is a row of texts and pictures: a pair (one caption, one picture), a text alone, or an interleaved
document. An input that makes no document is a BadInput (quarantined) or a Filtered one, with the reason.
Keys count inputs, so they are safe names in a tar whatever the user's own keys are.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress

from megatron_cm3leon.data.sources.embedded import shorten

COMMON_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm")
PICTURE_ENDINGS = (
    *COMMON_ENDINGS, ".jfif", ".jpe", ".mpo", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".apng", ".dib", ".ico",
    ".pbm", ".pgm", ".pnm", ".pfm", ".avifs",
)  # fmt: skip
"""Endings of the images that are decoded (tokenizers/images.py)."""
UNREAD_ENDINGS = (
    ".heic", ".heif", ".hif", ".jxl", ".svg", ".svgz", ".psd", ".tga", ".eps", ".icns", ".cur", ".qoi", ".dds", ".pcx",
    ".sgi", ".xbm", ".xpm", ".exr", ".hdr", ".jxr", ".wdp", ".bpg", ".djvu", ".wmf", ".emf", ".xcf",
)  # fmt: skip
"""Endings of images that are not decoded: they are inputs, and the reader says which format they are."""
PICTURE_FIELDS = ("image", *(ending[1:] for ending in COMMON_ENDINGS))
CAPTION_FIELDS = ("caption", "txt")
FILE_NAME = "file_name"
"""Field of the image in Hugging Face's imagefolder, where its value ends as the name of an image does."""
TEXT, PAIR, INTERLEAVED = KINDS = ("text", "pair", "interleaved")
TEXT_BLOCK = 1 << 16
"""Characters of texts that are read, encoded and written together: more of them leave the processor's cache."""


@dataclass(slots=True)
class Picture:
    """A picture of a document: its name in the input, and its file or its bytes."""

    name: str
    path: str = ""
    """Where its file is, a path or URL, unless `content` is given."""
    content: bytes | None = None


@dataclass(slots=True)
class RawDocument:
    """Texts and pictures in the order in which they belong together."""

    key: str
    source: str
    """Where the document was read, such as `pairs.jsonl:13`."""
    segments: list[str | Picture]
    extra: str = "{}"
    """The input's other fields as a JSON object."""

    kind = INTERLEAVED

    @property
    def texts(self) -> list[str]:
        return [segment for segment in self.segments if isinstance(segment, str)]

    @property
    def pictures(self) -> list[Picture]:
        return [segment for segment in self.segments if not isinstance(segment, str)]


class RawText(RawDocument):
    """A text without pictures."""

    __slots__ = ()
    kind = TEXT


class RawPair(RawDocument):
    """A caption and its picture."""

    __slots__ = ()
    kind = PAIR

    @property
    def caption(self) -> str:
        return self.segments[0]

    @property
    def image(self) -> str:
        """Picture's path as the input gives it, relative to the source's folder."""
        return self.segments[1].name


@dataclass(slots=True)
class RawTexts:
    """Consecutive texts without pictures, a list a field: an object for each would cost as much as encoding it."""

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
        self.keys.append(text.key)
        self.sources.append(text.source)
        self.texts.append(text.segments[0])
        self.extras.append(text.extra)

    def choose(self, chosen: Sequence[bool]) -> "RawTexts":
        """Those of them that are `chosen`."""
        columns = (self.keys, self.sources, self.texts, self.extras)
        return RawTexts(*(list(compress(column, chosen)) for column in columns))


@dataclass(frozen=True)
class BadInput:
    """An input that makes no document, and why."""

    key: str
    source: str
    reason: str
    segments: Sequence[str | Picture] = ()
    """Texts and images of it that are sound, for what needs only one of the two."""

    def to_dict(self) -> dict:
        fields = {"key": self.key, "source": shorten(self.source), "reason": shorten(self.reason)}
        return {name: text.encode(errors="replace").decode() for name, text in fields.items()}  # valid Unicode


@dataclass(frozen=True)
class Filtered:
    """An input that is sound and not wanted; counted by its reason."""

    reason: str


Entry = RawDocument | BadInput | Filtered


@dataclass(frozen=True)
class Fields:
    """Names of the fields that hold picture and caption; "" is any of the usual names."""

    image: str = ""
    caption: str = ""

    def find_image(self, fields: dict) -> str:
        """Name of the field of the image, whether `fields` have it or not."""
        if self.image:
            return self.image
        for name in PICTURE_FIELDS:
            if name in fields:
                return name
        return FILE_NAME if names_image(fields.get(FILE_NAME)) else PICTURE_FIELDS[0]

    def find_caption(self, fields: dict) -> str:
        """Name of the field of the caption, whether `fields` have it or not."""
        return self.caption or next((name for name in CAPTION_FIELDS if name in fields), CAPTION_FIELDS[0])

    def are_in(self, names: Iterable[str]) -> bool:
        """Whether one of these names is that of a field which is read."""
        known = {self.image, self.caption, *PICTURE_FIELDS, *CAPTION_FIELDS, FILE_NAME, "text", "segments"}
        return not known.isdisjoint(name for name in names if name)


def names_image(value) -> bool:
    """Whether a value ends as the name of an image file does."""
    return isinstance(value, str) and value[-6:].lower().endswith((*PICTURE_ENDINGS, *UNREAD_ENDINGS))


def gather_texts(entries: Iterable["Entry | RawTexts"]) -> Iterator["Entry | RawTexts"]:
    """The same inputs, with consecutive texts in blocks."""
    texts, characters = RawTexts(), 0
    for entry in entries:
        if type(entry) is RawText:
            texts.append(entry)
            characters += len(entry.segments[0])
            if characters < TEXT_BLOCK:
                continue
        if texts:
            yield texts
            texts, characters = RawTexts(), 0
        if type(entry) is not RawText:
            yield entry
    if texts:
        yield texts


def check_document(document: RawDocument) -> RawDocument | BadInput:
    """Refuse what no document can be made of: an empty text, text that is no Unicode."""
    for segment in document.segments:
        text = segment if isinstance(segment, str) else segment.name
        if text and text.isascii() and not text.isspace():
            continue
        if fault := _find_fault(segment, document.kind):
            sound = [other for other in document.segments if not _find_fault(other, document.kind)]
            return BadInput(document.key, document.source, fault, sound)
    return document


def _find_fault(segment: str | Picture, kind: str) -> str:
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
    """A text file's content without byte-order mark and without the newlines at its end."""
    try:
        return content.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} of {what} cannot be decoded") from error
