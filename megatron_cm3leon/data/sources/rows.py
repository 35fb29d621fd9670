"""A row of fields (a line of JSON Lines, a record of a table) -> a document, or the reason why it is unusable."""

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from megatron_cm3leon.data.sources.documents import (
    FILE_NAME,
    IMAGE_FIELDS,
    BadInput,
    Entry,
    Fields,
    Filtered,
    RawDocument,
    RawImage,
    RawInstruction,
    RawPair,
    RawText,
    check_document,
    names_image,
)  # fmt: skip
from megatron_cm3leon.data.sources.embedded import decode_image, describe_binary, is_image, shorten, shorten_values

Locate = Callable[[str], tuple[str, str]]
_to_json = json.JSONEncoder(sort_keys=True, default=describe_binary).encode
_SHORT_EXTRA = 512
"""Characters of JSON up to which no value is checked for its length."""


@lru_cache(1024)
def _find_names(image: str, caption: str, present: tuple[str, ...]) -> tuple[str, str]:
    """Names of the image and caption fields in a row with the fields `present`; cached, as most rows have the same."""
    fields, names = dict.fromkeys(present), Fields(image, caption)
    return names.find_image(fields), names.find_caption(fields)


class Unusable(Exception):
    """Why a row of fields is not a valid document."""

    def __init__(self, reason: str, segments: Sequence[str | RawImage] = ()) -> None:
        super().__init__(reason)
        self.segments = segments


def make_document(fields: dict, key: str, source: str, names: Fields, locate: Locate) -> Entry:
    """A document from a row of fields.

    {"image": .., "caption": ..} is a pair, {"text": ..} a text, {"segments": [{"text": ..}, {"image": ..}]} an
    interleaved document; with a role in each segment, an instruction document. An image is a path, bytes, base64, a
    data: URI or {"bytes": .., "path": ..}. `locate` turns a path of the input into (name relative to the source's
    folder, path to read).
    """
    if len(fields) == 1 and isinstance(text := fields.get("text"), str) and names.caption != "text":
        # The usual row of a text corpus.
        document = RawText(key, source, [text])
        return document if text.isascii() and text and not text.isspace() else check_document(document)
    image, caption = _find_names(names.image, names.caption, tuple(fields))
    if image == IMAGE_FIELDS[0] and FILE_NAME in fields:
        image = names.find_image(fields)
    used: tuple[str, ...]
    cls: type[RawDocument]
    try:
        if "segments" in fields:
            used, cls = ("segments",), RawDocument
            if _have_roles(fields["segments"]):
                return _make_instruction(fields, key, source, locate)
            segments = _read_segments(fields["segments"], key, locate)
        elif "text" in fields and image not in fields and caption not in fields:
            used, cls, segments = ("text",), RawText, [read_text_field(fields, "text")]
            if not names.image:
                _check_holds_no_image(fields, segments)
        else:
            if names.caption == "" and caption not in fields and "text" in fields:
                caption = "text"
            if fields.get(image) is None and fields.get("status") not in (None, "success"):
                return Filtered("not downloaded")  # img2dataset keeps rows in Parquet that it could not download
            used, cls = (image, caption), RawPair
            segments = _read_pair(fields, image, caption, key, locate)
    except Unusable as error:
        return BadInput(key, source, str(error), error.segments)
    extra = {name: value for name, value in fields.items() if name not in used}
    return check_document(cls(key, source, segments, write_extra(extra) if extra else "{}"))


def _have_roles(rows: object) -> bool:
    """Whether one of the segments has a role."""
    return isinstance(rows, list) and any(isinstance(row, dict) and row.get("role") is not None for row in rows)


def _make_instruction(fields: dict, key: str, source: str, locate: Locate) -> Entry:
    """The document of {"segments": [{"role": .., "text" or "image": .., "joined": true}]}; may raise Unusable."""
    rows = [row if isinstance(row, dict) else {} for row in fields["segments"]]
    roles, joined = ([row.get(name) for row in rows] for name in ("role", "joined"))
    contents = [{name: value for name, value in row.items() if name not in ("role", "joined")} for row in rows]
    pieces = _read_segments(contents, key, locate)
    for number, piece in enumerate(pieces):
        if joined[number] and (number == 0 or not isinstance(piece, str) or not isinstance(pieces[number - 1], str)):
            raise Unusable(f"segment {number} is joined, which only a text after a text can be")
    extra = {name: value for name, value in fields.items() if name != "segments"}
    document = RawInstruction(
        key, source, pieces, write_extra(extra) if extra else "{}", tuple(map(str, roles)), tuple(map(bool, joined))
    )
    return check_document(document)


def write_extra(extra: dict) -> str:
    """Fields as a JSON object; long binary values, base64 images and long lists of numbers as length and checksum."""
    text = _to_json(extra)
    return text if len(text) < _SHORT_EXTRA else _to_json(shorten_values(extra))


def _read_pair(fields: dict, image: str, caption: str, key: str, locate: Locate) -> list[str | RawImage]:
    segments: list[str | RawImage] = []
    reasons: list[str] = []
    try:
        segments.append(read_text_field(fields, caption))
    except Unusable as error:
        reasons.append(str(error))
    try:
        segments.append(read_image_field(fields, image, f"{key}.{image}", locate))
    except Unusable as error:
        reasons.append(str(error))
    if reasons:
        raise Unusable(reasons[-1], segments)
    return segments


def read_text_field(fields: dict, name: str) -> str:
    value = fields.get(name)
    if isinstance(value, bytes):  # Parquet's binary columns
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise Unusable(f'not UTF-8: byte {error.start} of field "{name}" cannot be decoded') from error
    if isinstance(value, str):
        return value
    raise Unusable(_explain_field(fields, name, value))


def _explain_field(fields: dict, name: str, value: object) -> str:
    if name in fields:
        return f'field "{name}" is {type(value).__name__}, not text'
    there = shorten(", ".join(map(str, fields)) or "none", 200)
    return f'field "{name}" is missing: the fields are {there}'


def read_image_field(fields: dict, name: str, shown: str, locate: Locate) -> RawImage:
    """The image of a field; `shown`: its name if the input holds its bytes."""
    value = fields.get(name)
    if isinstance(value, dict) and value.keys() & {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return RawImage(shown, content=value)
    if not isinstance(value, str):
        raise Unusable(_explain_field(fields, name, value))
    if not value:
        raise Unusable("empty picture path")
    try:
        content = decode_image(value)
    except ValueError as error:
        raise Unusable(f'field "{name}" {error}') from error
    return RawImage(*locate(value)) if content is None else RawImage(shown, content=content)


def _check_holds_no_image(fields: dict, segments: Sequence[str | RawImage]) -> None:
    """Raise Unusable for a text with an image in a field of another name, which would be ignored otherwise."""
    for name, value in fields.items():
        if name != "text" and _holds_image(name, value):
            raise Unusable(
                f'field "image" is missing: field "{name}" holds an image; give --image-field {name} --caption-field '
                f"text for pairs, or --image-field image for the texts alone",
                segments,
            )


def _holds_image(name: str, value: object) -> bool:
    if isinstance(value, str):
        return (names_image(value) and _may_be_path(name)) or value.startswith("data:image/")
    if isinstance(value, bytes):
        return is_image(value)
    if isinstance(value, list):
        return bool(value) and _holds_image(name, value[0])
    return isinstance(value, dict) and _holds_image(name, value.get("bytes") or value.get("path"))


@lru_cache(1024)
def _may_be_path(name: str) -> bool:
    """Whether a field of this name may hold the path of an image; URLs and titles may end like one."""
    return bool(re.search("image|img|pic|photo|file|path", name, re.IGNORECASE))


def _read_segments(rows: object, key: str, locate: Locate) -> list[str | RawImage]:
    if not isinstance(rows, list) or not rows:
        what = type(rows).__name__ if rows != [] else "empty"
        raise Unusable(f'field "segments" is {what}, not a list of texts and pictures')
    segments: list[str | RawImage] = []
    for number, row in enumerate(rows):
        given = {name: row[name] for name in row if row[name] is not None} if isinstance(row, dict) else {}
        if given.keys() not in ({"text"}, {"image"}):
            raise Unusable(f'segment {number} is no {{"text": ...}} and no {{"image": ...}}')
        try:
            if "text" in given:
                segments.append(read_text_field(given, "text"))
            else:
                segments.append(read_image_field(given, "image", f"{key}.{number}", locate))
        except Unusable as error:
            raise Unusable(f"segment {number}: {error}") from error
    return segments
