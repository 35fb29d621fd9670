"""Text to ids word by word; each word is encoded once and cached.

A BPE merge joins two adjacent pieces into a piece of the vocabulary. If no piece has a space after another character,
no merge crosses the start of a run of spaces, and the ids of a text are exactly those of its chunks (spaces and the
word after them), concatenated. Unigram models choose among segmentations of the whole text, with ties that rounding
decides: their texts are not split.
"""

import re
import sys
from array import array
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from megatron_cm3leon.tokenizers.text import SPACE_MARK, TextTokenizer, encode_continuation

_model_pb2: Any = sentencepiece_model_pb2  # generated at run time, without annotations
MAX_WORDS = 300_000
"""Most chunks in a cache (about 70 MB); a full cache is cleared."""
MAX_CHARACTERS = 64
"""Longest chunk that is cached."""
_CHUNKS = re.compile(r" *[^ ]+| +")
_FIRST = "\0"
"""Marks the first word of a text, among words that follow a space."""


class TextEncoder:
    """Encodes texts as the bytes of their ids, as in the shards: little-endian `dtype`."""

    def __init__(self, tokenizer: Any, dtype: np.dtype) -> None:
        """`tokenizer`: a TextTokenizer, or any object with its `encode`, which is then called for every text."""
        self.tokenizer, self.dtype = tokenizer, np.dtype(dtype).newbyteorder("<")
        self._code = {2: "H", 4: "I"}[self.dtype.itemsize]
        self.divides = is_divisible(tokenizer)
        """Whether texts are split and their words cached."""
        self._chunks = _Cache(self._encode_whole)
        self._words = _Cache(lambda word: self._encode_whole(_chunk_of(word)))
        self.divides = self.divides and not any(map(self._differs, _PROBES))

    def encode(self, text: str) -> bytes:
        """Bytes of the ids of a text; an empty text has none."""
        if not self.divides:
            return self._encode_whole(text)
        if "  " in text or _FIRST in text:
            return b"".join(map(self._chunks.__getitem__, _CHUNKS.findall(text)))
        words = text.split(" ")
        return self._chunks[words.pop(0)] + b"".join(map(self._words.__getitem__, words))

    def encode_continuation(self, text: str) -> bytes:
        """Ids of a text that continues another one, as `text.encode_continuation` gives them."""
        return self._to_bytes(encode_continuation(self.tokenizer, text))

    def encode_many(self, texts: Sequence[str]) -> list[bytes]:
        """Like `encode` for each text, but all words are looked up together and new words are encoded in one call."""
        if not self.divides:
            return list(map(self.encode, texts))
        irregular = {}
        joined = f" {_FIRST}".join(texts)
        if "  " in joined or joined.count(_FIRST) >= len(texts):
            irregular = {
                number: self.encode(text) for number, text in enumerate(texts) if "  " in text or _FIRST in text
            }
            texts = ["" if number in irregular else text for number, text in enumerate(texts)]
            joined = f" {_FIRST}".join(texts)
        words = (_FIRST + joined).split(" ")
        ids: list[Any] = list(map(self._words.get, words))  # None for a word that is not cached, until it is filled in
        if not all(ids):
            unknown = [position for position, cached in enumerate(ids) if cached is None]
            self._add_words([words[position] for position in unknown])
            for position in unknown:
                ids[position] = self._words[words[position]]
        remaining = iter(ids)
        encoded = [b"".join(islice(remaining, text.count(" ") + 1)) for text in texts]
        for number, text_ids in irregular.items():
            encoded[number] = text_ids
        return encoded

    def _add_words(self, words: list[str]) -> None:
        """Encode words in one call and cache them; words that are skipped here are encoded when they are looked up."""
        words = [word for word in dict.fromkeys(words) if len(word) <= MAX_CHARACTERS]
        if len(self._words) + len(words) > MAX_WORDS:
            self._words.clear()
            words = words[:MAX_WORDS]
        for word, ids in zip(words, self.tokenizer.encode_many(list(map(_chunk_of, words))), strict=True):
            self._words[word] = self._to_bytes(ids)

    def _encode_whole(self, text: str) -> bytes:
        return self._to_bytes(self.tokenizer.encode(text))

    def _to_bytes(self, ids: list[int]) -> bytes:
        packed = array(self._code, ids)
        if sys.byteorder == "big":
            packed.byteswap()
        return packed.tobytes()

    def _differs(self, text: str) -> bool:
        return self.encode(text) != self._encode_whole(text)


def _chunk_of(word: str) -> str:
    """The chunk of a word: a space and the word, or the first word of a text alone."""
    return word[1:] if word.startswith(_FIRST) else " " + word


class _Cache(dict[str, bytes]):
    """Chunk -> bytes of its ids, encoded when it is first looked up."""

    def __init__(self, encode: Callable[[str], bytes]) -> None:
        self.encode = encode

    def __missing__(self, chunk: str) -> bytes:
        ids = self.encode(chunk)
        if len(chunk) <= MAX_CHARACTERS:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[chunk] = ids
        return ids


def is_divisible(tokenizer: Any) -> bool:
    """Whether a text's ids are its chunks' ids: a BPE model without normalization or pieces across words."""
    if not isinstance(tokenizer, TextTokenizer):
        return False
    model = _model_pb2.ModelProto.FromString(tokenizer.model)
    normal = model.normalizer_spec
    return (
        model.trainer_spec.model_type == _model_pb2.TrainerSpec.BPE
        and not (normal.precompiled_charsmap or normal.normalization_rule_tsv)
        and not (normal.add_dummy_prefix or normal.remove_extra_whitespaces)
        and normal.escape_whitespaces
        and not model.trainer_spec.treat_whitespace_as_suffix
        and all(piece.type != piece.USER_DEFINED for piece in model.pieces)
        and not any(SPACE_MARK in piece.piece.lstrip(SPACE_MARK) for piece in model.pieces)
    )


_PROBES = (
    " leading", "trailing ", "two  spaces   three ", "tab\tline\nreturn\r\n  indented\n\n", "▁mark▁▁ in ▁ text ▁",
    "漢字 🙂👩‍👩‍👧 \u00a0no-break e\u0301", "<0x41> <unk> </s> <break> \x00 zero",
    "it's well-known, isn't it? 3.14 (yes)",
)  # fmt: skip
"""Texts that would reveal an error first: spaces of all kinds, the mark that represents them, bytes."""
