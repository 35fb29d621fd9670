"""Images inside a row of fields: bytes, base64 and data: URIs; and shortened long values for metadata and messages."""

import base64
import binascii
import hashlib
import json
import re
from typing import Any

_SIGNATURES = (
    b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P6", b"\0\0\x01\0", b"\0\0\0\x0cjP",
)  # fmt: skip
_DATA_URI = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[^;,]*?)*?(;base64)?,", re.IGNORECASE)
_MAX_PATH = 4096
"""Maximum characters of a file path."""
_MIN_BASE64 = 64
"""Minimum characters of base64; shorter values are paths."""
_LIST_CHARACTERS = 4096
"""Maximum characters of JSON of a list of numbers; a longer one, such as an embedding or a mask, is not kept."""
_NUMBERS = re.compile(r"[\[\], .\d+\-eEInfinityNa]+")
_HEX_BYTES = 32
"""Maximum bytes of a binary value that is kept, such as a checksum."""


def is_image(content: bytes) -> bool:
    """Whether bytes begin with the signature of an image file."""
    container = (content[:4] == b"RIFF" and content[8:12] == b"WEBP") or content[4:12] in (b"ftypavif", b"ftypavis")
    return container or content.startswith(_SIGNATURES)


def decode_image(value: str) -> bytes | None:
    """The bytes of an image given as a data: URI or base64; None for a path; ValueError if it is damaged."""
    if value[:5].lower() == "data:" and (head := _DATA_URI.match(value)):
        content = _decode(value[head.end() :]) if head[1] else None
        if content is None:
            fault = "whose base64 is damaged" if head[1] else "that is not base64"
            raise ValueError(f"is a data: URI {fault}: {shorten(value, 60)}")
        return content
    if len(value) < _MIN_BASE64 or ("." in value and len(value) <= _MAX_PATH):
        return None
    content = _decode(value)
    if content is not None and is_image(content):
        return content
    if len(value) > _MAX_PATH:
        raise ValueError(
            f"has {len(value):,} characters, too many for a path, and is not base64 of an image: {shorten(value, 60)}"
        )
    return None


def _decode(text: str) -> bytes | None:
    """Bytes of base64 in either alphabet, with or without newlines and padding; None if it is damaged."""
    text = re.sub(r"\s+", "", text).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def describe_binary(value: object) -> str:
    """For json.dumps: short bytes as hexadecimal digits, longer ones as length and checksum; other values as str."""
    if not isinstance(value, bytes):
        return str(value)
    return value.hex() if len(value) <= _HEX_BYTES else _describe(len(value), "bytes", value)


def shorten_values(value: Any) -> Any:
    """`value` with base64 images and long lists of numbers, at any depth, replaced by length and checksum."""
    if isinstance(value, dict):
        return {name: shorten_values(item) for name, item in value.items()}
    if isinstance(value, list):
        text = json.dumps(value, default=describe_binary)
        if len(text) > _LIST_CHARACTERS and _NUMBERS.fullmatch(text):
            return _describe(text.count(",") + 1, "numbers", text.encode())
        return [shorten_values(item) for item in value]
    if not isinstance(value, str) or len(value) < _MIN_BASE64:
        return value
    try:
        content = decode_image(value)
    except ValueError:  # another long text
        return value
    return value if content is None else describe_binary(content)


def _describe(count: int, unit: str, content: bytes) -> str:
    return f"{count} {unit}, sha256 {hashlib.sha256(content).hexdigest()}"


def shorten(text: str, limit: int = 400) -> str:
    """`text` without its middle if it has more than `limit` characters."""
    if len(text) <= limit:
        return text
    return f"{text[: limit * 2 // 3]} [...] {text[-(limit // 4) :]}"
