"""Raw documents: what every reader yields, whatever the input's format.

A document is a row of texts and pictures: a pair (one caption, one picture), a text alone, or an interleaved
document. An input that makes no document is a BadInput (quarantined) or a Filtered one, with the reason.
Keys count inputs, so they are safe names in a tar whatever the user's own keys are.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress

COMMON_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm")
PICTURE_ENDINGS = (
    *COMMON_ENDINGS, ".jfif", ".jpe", ".mpo", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".apng", ".dib", ".ico",
    ".pbm", ".pgm", ".pnm", ".pfm", ".avifs",
)  # fmt: skip
"""Endings of the images that are decoded (tokenizers/pixels.py)."""
UNREAD_ENDINGS = (
    ".heic", ".heif", ".hif", ".jxl", ".svg", ".svgz", ".psd", ".tga", ".eps", ".icns", ".cur", ".qoi", ".dds", ".pcx",
    ".sgi", ".xbm", ".xpm", ".exr", ".hdr", ".jxr", ".wdp", ".bpg", ".djvu", ".wmf", ".emf", ".xcf",
)  # fmt: skip
"""Endings of images that are not decoded: they are inputs, and the reader says which format they are."""
PICTURE_FIELDS = ("image", *(ending[1:] for ending in COMMON_ENDINGS))
CAPTION_FIELDS = ("caption", "txt")
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

    def to_dict(self) -> dict:
        fields = {"key": self.key, "source": self.source, "reason": self.reason}
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

    def find(self, fields: dict, given: str, usual: tuple[str, ...]) -> str:
        return given or next((name for name in usual if name in fields), usual[0])


def make_document(
    fields: dict, key: str, source: str, names: Fields, locate: Callable[[str], tuple[str, str]]
) -> Entry:
    """A document from a row of fields.

    {"image": .., "caption": ..} is a pair, {"text": ..} a text, {"segments": [{"text": ..}, {"image": ..}]} an
    interleaved document. A picture is a path, bytes, or {"bytes": .., "path": ..}. `locate` turns a path as the
    input gives it into (name relative to the source's folder, place to read it from).
    """
    if len(fields) == 1 and isinstance(text := fields.get("text"), str) and names.caption != "text":
        # The common row of a text corpus.
        document = RawText(key, source, [text])
        return document if text.isascii() and text and not text.isspace() else check_document(document)
    image = names.find(fields, names.image, PICTURE_FIELDS)
    caption = names.find(fields, names.caption, CAPTION_FIELDS)
    if "segments" in fields:
        used, cls = ("segments",), RawDocument
        segments = _read_segments(fields["segments"], key, locate)
    elif "text" in fields and image not in fields and caption not in fields:
        used, cls, segments = ("text",), RawText, _read_text(fields["text"], "text")
    else:
        if names.caption == "" and caption not in fields and "text" in fields:
            caption = "text"
        if fields.get(image) is None and fields.get("status") not in (None, "success"):
            return Filtered("not downloaded")  # img2dataset's Parquet keeps rows that it could not fetch
        used, cls = (image, caption), RawPair
        segments = _read_pair(fields, image, caption, key, locate)
    if isinstance(segments, str):
        return BadInput(key, source, segments)
    extra = {name: value for name, value in fields.items() if name not in used}
    text = json.dumps(extra, sort_keys=True, default=str) if extra else "{}"
    return check_document(cls(key, source, segments, text))


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


def _read_pair(fields: dict, image: str, caption: str, key: str, locate) -> list | str:
    picture = _read_picture(fields.get(image), image, f"{key}.{image}", locate, image in fields)
    text = _read_text(fields.get(caption), caption, caption in fields)
    if isinstance(picture, str):
        return picture
    return text if isinstance(text, str) else [*text, picture]


def _read_text(value, name: str, there: bool = True) -> list[str] | str:
    """The text as the only one of a list, or what is wrong."""
    if isinstance(value, str):
        return [value]
    return f'field "{name}" is {type(value).__name__}, not text' if there else f'field "{name}" is missing'


def _read_picture(value, field: str, name: str, locate, there: bool = True) -> Picture | str:
    if isinstance(value, dict) and value.keys() & {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return Picture(name, content=value)
    if not isinstance(value, str):
        what = f"is {type(value).__name__}, not text" if there else "is missing"
        return f'field "{field}" {what}'
    if not value:
        return "empty picture path"
    return Picture(*locate(value))


def _read_segments(rows, key: str, locate) -> list | str:
    if not isinstance(rows, list) or not rows:
        return f'field "segments" is {type(rows).__name__ if rows != [] else "empty"}, not a list of texts and pictures'
    segments = []
    for number, row in enumerate(rows):
        given = {name: row[name] for name in row if row[name] is not None} if isinstance(row, dict) else {}
        if given.keys() not in ({"text"}, {"image"}):
            return f'segment {number} is no {{"text": ...}} and no {{"image": ...}}'
        if "text" in given:
            found = _read_text(given["text"], "text")
            segments += found if isinstance(found, list) else []
        else:
            found = _read_picture(given["image"], "image", f"{key}.{number}", locate)
            segments.append(found)
        if isinstance(found, str):
            return f"segment {number}: {found}"
    return segments


def check_document(document: RawDocument) -> RawDocument | BadInput:
    """Refuse what no document can be made of: an empty text, text that is no Unicode."""
    for segment in document.segments:
        text = segment if isinstance(segment, str) else segment.name
        if not text or text.isspace():
            what = "empty picture path" if text is not segment else "empty caption"
            what = "empty text" if document.kind != PAIR and text is segment else what
            return BadInput(document.key, document.source, what)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                reason = "not Unicode: an unpaired surrogate in text or picture path"
                return BadInput(document.key, document.source, reason)
    return document


def decode_text(content: bytes, what: str) -> str:
    """A text file's content without byte-order mark and without the newlines at its end."""
    try:
        return content.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} of {what} cannot be decoded") from error
