"""Raw documents: what every reader yields, whatever the input's format.

A document is a row of texts and pictures: a pair (one caption, one picture), a text alone, or an interleaved
document. An input that makes no document is a BadInput (quarantined) or a Filtered one, with the reason.
Keys count inputs, so they are safe names in a tar whatever the user's own keys are.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import compress

from megatron_cm3leon.data.sources.embedded import decode_image, describe_binary, is_image, shorten, shorten_values

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
        return FILE_NAME if _names_image(fields.get(FILE_NAME)) else PICTURE_FIELDS[0]

    def find_caption(self, fields: dict) -> str:
        """Name of the field of the caption, whether `fields` have it or not."""
        return self.caption or next((name for name in CAPTION_FIELDS if name in fields), CAPTION_FIELDS[0])

    def are_in(self, names: Iterable[str]) -> bool:
        """Whether one of these names is that of a field which is read."""
        known = {self.image, self.caption, *PICTURE_FIELDS, *CAPTION_FIELDS, FILE_NAME, "text", "segments"}
        return not known.isdisjoint(name for name in names if name)


_to_json = json.JSONEncoder(sort_keys=True, default=describe_binary).encode
_SHORT_EXTRA = 512
"""Characters of JSON in which nothing is looked for that is too long."""


@lru_cache(1024)
def _find_names(image: str, caption: str, present: tuple[str, ...]) -> tuple[str, str]:
    """Names of the fields of image and caption where these are `present`; a corpus has few kinds of rows."""
    fields, names = dict.fromkeys(present), Fields(image, caption)
    return names.find_image(fields), names.find_caption(fields)


class _Unusable(Exception):
    """Why a row of fields makes no document."""

    def __init__(self, reason: str, segments: Sequence[str | Picture] = ()) -> None:
        super().__init__(reason)
        self.segments = segments


def make_document(
    fields: dict, key: str, source: str, names: Fields, locate: Callable[[str], tuple[str, str]]
) -> Entry:
    """A document from a row of fields.

    {"image": .., "caption": ..} is a pair, {"text": ..} a text, {"segments": [{"text": ..}, {"image": ..}]} an
    interleaved document. An image is a path, bytes, base64, a data: URI or {"bytes": .., "path": ..}. `locate` turns
    a path as the input gives it into (name relative to the source's folder, place to read it from).
    """
    if len(fields) == 1 and isinstance(text := fields.get("text"), str) and names.caption != "text":
        # The common row of a text corpus.
        document = RawText(key, source, [text])
        return document if text.isascii() and text and not text.isspace() else check_document(document)
    image, caption = _find_names(names.image, names.caption, tuple(fields))
    if image == PICTURE_FIELDS[0] and FILE_NAME in fields:
        image = names.find_image(fields)
    try:
        if "segments" in fields:
            used, cls = ("segments",), RawDocument
            segments = _read_segments(fields["segments"], key, locate)
        elif "text" in fields and image not in fields and caption not in fields:
            used, cls, segments = ("text",), RawText, [_read_text(fields, "text")]
            if not names.image:
                _check_holds_no_image(fields, segments)
        else:
            if names.caption == "" and caption not in fields and "text" in fields:
                caption = "text"
            if fields.get(image) is None and fields.get("status") not in (None, "success"):
                return Filtered("not downloaded")  # img2dataset's Parquet keeps rows that it could not fetch
            used, cls = (image, caption), RawPair
            segments = _read_pair(fields, image, caption, key, locate)
    except _Unusable as error:
        return BadInput(key, source, str(error), error.segments)
    extra = {name: value for name, value in fields.items() if name not in used}
    return check_document(cls(key, source, segments, write_extra(extra) if extra else "{}"))


def write_extra(extra: dict) -> str:
    """Fields as a JSON object; long binary values, images in base64 and long lists of numbers as their checksum."""
    text = _to_json(extra)
    return text if len(text) < _SHORT_EXTRA else _to_json(shorten_values(extra))


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


def _read_pair(fields: dict, image: str, caption: str, key: str, locate) -> list[str | Picture]:
    segments, reasons = [], []
    try:
        segments.append(_read_text(fields, caption))
    except _Unusable as error:
        reasons.append(str(error))
    try:
        segments.append(_read_image(fields, image, f"{key}.{image}", locate))
    except _Unusable as error:
        reasons.append(str(error))
    if reasons:
        raise _Unusable(reasons[-1], segments)
    return segments


def _read_text(fields: dict, name: str) -> str:
    value = fields.get(name)
    if isinstance(value, bytes):  # Parquet's binary columns
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise _Unusable(f'not UTF-8: byte {error.start} of field "{name}" cannot be decoded') from error
    if isinstance(value, str):
        return value
    raise _Unusable(_explain_field(fields, name, value))


def _explain_field(fields: dict, name: str, value) -> str:
    if name in fields:
        return f'field "{name}" is {type(value).__name__}, not text'
    there = shorten(", ".join(map(str, fields)) or "none", 200)
    return f'field "{name}" is missing: the fields are {there}'


def _read_image(fields: dict, name: str, shown: str, locate) -> Picture:
    """The image of a field; `shown` is its name where the input holds it without one."""
    value = fields.get(name)
    if isinstance(value, dict) and value.keys() & {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return Picture(shown, content=value)
    if not isinstance(value, str):
        raise _Unusable(_explain_field(fields, name, value))
    if not value:
        raise _Unusable("empty picture path")
    try:
        content = decode_image(value)
    except ValueError as error:
        raise _Unusable(f'field "{name}" {error}') from error
    return Picture(*locate(value)) if content is None else Picture(shown, content=content)


def _check_holds_no_image(fields: dict, segments: list[str]) -> None:
    """Refuse a text beside an image under another name, which would be lost without a word."""
    for name, value in fields.items():
        if name != "text" and _holds_image(name, value):
            raise _Unusable(
                f'field "image" is missing: field "{name}" holds an image; give --image-field {name} --caption-field '
                f"text for pairs, or --image-field image for the texts alone",
                segments,
            )


def _holds_image(name: str, value) -> bool:
    if isinstance(value, str):
        return (_names_image(value) and _may_be_path(name)) or value.startswith("data:image/")
    if isinstance(value, bytes):
        return is_image(value)
    if isinstance(value, list):
        return bool(value) and _holds_image(name, value[0])
    return isinstance(value, dict) and _holds_image(name, value.get("bytes") or value.get("path"))


def _names_image(value) -> bool:
    return isinstance(value, str) and value[-6:].lower().endswith(PICTURE_ENDINGS)


@lru_cache(1024)
def _may_be_path(name: str) -> bool:
    """Whether a field of this name may hold the path of an image; a URL or a title may end as one does."""
    return bool(re.search("image|img|pic|photo|file|path", name, re.IGNORECASE))


def _read_segments(rows, key: str, locate) -> list[str | Picture]:
    if not isinstance(rows, list) or not rows:
        what = type(rows).__name__ if rows != [] else "empty"
        raise _Unusable(f'field "segments" is {what}, not a list of texts and pictures')
    segments = []
    for number, row in enumerate(rows):
        given = {name: row[name] for name in row if row[name] is not None} if isinstance(row, dict) else {}
        if given.keys() not in ({"text"}, {"image"}):
            raise _Unusable(f'segment {number} is no {{"text": ...}} and no {{"image": ...}}')
        try:
            if "text" in given:
                segments.append(_read_text(given, "text"))
            else:
                segments.append(_read_image(given, "image", f"{key}.{number}", locate))
        except _Unusable as error:
            raise _Unusable(f"segment {number}: {error}") from error
    return segments


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
