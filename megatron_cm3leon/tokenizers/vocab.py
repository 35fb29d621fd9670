"""The joint vocabulary: text pieces, image codes and special tokens as one range of ids.

Ids are contiguous, in this order:

    [0, T)          text pieces of the SentencePiece model
    [T, T + K)      codes of the image tokenizer
    [T + K, size)   specials: <pad> </s> <break> <eoss> <sentinel:0> ... and reserved ones

At the paper's size T = 56,320, K = 8,192 and 1,024 specials make 65,536 (CM3Leon, section 2.1).
Captions are never parsed for specials: the text "<break>" becomes ordinary text pieces.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NAMED_SPECIALS = ("<pad>", "</s>", "<break>", "<eoss>")
_KEYS = (
    "text_size", "image_size", "sentinels", "specials", "image_height", "image_width", "text_sha256", "image_sha256",
)  # fmt: skip
"""The fields of vocab.json, in its order; the hash covers them."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Id ranges of one text tokenizer and one image tokenizer, and the hash that identifies them."""

    text_size: int
    """Text pieces, T."""
    image_size: int
    """Image codes, K (the codebook size)."""
    sentinels: int = 512
    """Sentinel tokens, which name the spans that CM3 masking moves."""
    specials: int = 1024
    """All special tokens: four named ones, the sentinels, the rest reserved."""
    image_height: int
    """Image tokens per column of an image."""
    image_width: int
    """Image tokens per row of an image."""
    text_sha256: str
    """SHA-256 of the SentencePiece model file, hexadecimal."""
    image_sha256: str
    """SHA-256 of the image tokenizer's config and weights, hexadecimal."""

    def __post_init__(self) -> None:
        for name in ("text_size", "image_size", "sentinels", "image_height", "image_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"vocabulary.{name} ({getattr(self, name)}) must be at least 1.")
        needed = len(NAMED_SPECIALS) + self.sentinels
        if self.specials < needed:
            raise ValueError(
                f"vocabulary.specials ({self.specials}) must hold {len(NAMED_SPECIALS)} named tokens and "
                f"{self.sentinels} sentinels; give at least {needed} or lower the number of sentinels."
            )

    @property
    def size(self) -> int:
        """Number of ids; the model pads its rows beyond this, files never do."""
        return self.text_size + self.image_size + self.specials

    @property
    def image_tokens(self) -> int:
        """Image tokens per image."""
        return self.image_height * self.image_width

    @property
    def image_start(self) -> int:
        """Id of image code 0."""
        return self.text_size

    @property
    def image_end(self) -> int:
        """One past the id of the last image code."""
        return self.text_size + self.image_size

    @property
    def pad(self) -> int:
        """<pad>: fills the end of a sequence; never a target."""
        return self.image_end

    @property
    def eos(self) -> int:
        """</s>: begins a sample and ends it."""
        return self.image_end + 1

    @property
    def break_id(self) -> int:
        """<break>: separates the segments (modalities) of a sample."""
        return self.image_end + 2

    @property
    def eoss(self) -> int:
        """<eoss>: ends a span that CM3 masking moved."""
        return self.image_end + 3

    def sentinel(self, index: int) -> int:
        """Id of <sentinel:index>; ValueError beyond the last sentinel."""
        if not 0 <= index < self.sentinels:
            raise ValueError(f"sentinel {index} is outside this vocabulary's 0..{self.sentinels - 1}.")
        return self.image_end + len(NAMED_SPECIALS) + index

    def is_image(self, ids):
        """Elementwise: whether an id is an image code. `ids` is an int, an array or a tensor."""
        return (ids >= self.image_start) & (ids < self.image_end)

    def is_text(self, ids):
        """Elementwise: whether an id is a text piece."""
        return (ids >= 0) & (ids < self.text_size)

    def is_sentinel(self, ids):
        """Elementwise: whether an id is a sentinel."""
        first = self.sentinel(0)
        return (ids >= first) & (ids < first + self.sentinels)

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type of the shards that holds every id: uint16 or uint32."""
        return np.dtype(np.uint16 if self.size <= 1 << 16 else np.uint32)

    @property
    def hash(self) -> str:
        """Identity of the vocabulary: text model, image tokenizer and ranges; 16 hexadecimal digits."""
        text = json.dumps(self._describe(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict:
        """Plain JSON form, as in `vocab.json` and the manifests."""
        return {**self._describe(), "size": self.size, "hash": self.hash}

    def _describe(self) -> dict:
        return {key: getattr(self, key) for key in _KEYS}

    @classmethod
    def from_dict(cls, fields: dict) -> "Vocabulary":
        """Read `to_dict`'s form; ValueError if the recorded hash does not match the fields."""
        known = {key: fields[key] for key in _KEYS if key in fields}
        try:
            vocabulary = cls(**known)
        except TypeError as error:
            raise ValueError(f"this is not a vocabulary: {error}") from error
        recorded = fields.get("hash", vocabulary.hash)
        if recorded != vocabulary.hash:
            raise ValueError(
                f"vocabulary hash {recorded} does not match its own fields ({vocabulary.hash}): the file was "
                f"edited or damaged; write it again with tools/train_tokenizer.py."
            )
        return vocabulary

    def save(self, path: str | Path) -> None:
        """Write `vocab.json`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Read `vocab.json`, or the one inside a tokenizer folder."""
        path = Path(path)
        if path.is_dir():
            path = path / "vocab.json"
        if not path.is_file():
            raise ValueError(f"no vocabulary at {path}; tools/train_tokenizer.py writes one.")
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a valid vocab.json ({error}); give a tokenizer folder with an undamaged one."
            ) from error


def check_same_vocabulary(expected: Vocabulary, found: Vocabulary, what: str) -> None:
    """Raise ValueError if `what` (a shard folder, an index, a checkpoint ...) was made with another vocabulary."""
    if expected.hash == found.hash:
        return
    differing = [
        f"{key}: {getattr(found, key)} instead of {getattr(expected, key)}"
        for key in _KEYS
        if getattr(expected, key) != getattr(found, key)
    ]
    raise ValueError(
        f"{what} was made with another vocabulary ({found.hash}, expected {expected.hash}; "
        f"{'; '.join(differing)}). Use the tokenizer folder it was made with, or make it again with this one."
    )
