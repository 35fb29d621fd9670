"""Text to ids a word at a time, each word encoded once and remembered.

A BPE merge joins two neighbouring pieces into a piece of the vocabulary. Where no piece has a space behind
another character, no merge crosses the place in front of a run of spaces, and a text's ids are those of its
chunks (spaces and the word behind them) one after the other, exactly. Unigram models choose among whole
segmentations, with ties that rounding decides: they are not cut.
"""

import re
import sys
from array import array
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from megatron_cm3leon.tokenizers.text import SPACE_MARK, TextTokenizer

MAX_WORDS = 300_000
"""Chunks that a memo holds (some 70 MB); then it starts anew."""
LONGEST = 64
"""Characters of a chunk that is remembered."""
_CHUNKS = re.compile(r" *[^ ]+| +")
_FIRST = "\0"
"""In front of a text's first word, among words that have a space in front."""


class TextEncoder:
    """Texts to the bytes of their ids, as the shards hold them: little-endian `dtype`."""

    def __init__(self, tokenizer, dtype: np.dtype) -> None:
        """`tokenizer`: a TextTokenizer, or anything with its `encode`, which is then called for every text."""
        self.tokenizer, self.dtype = tokenizer, np.dtype(dtype).newbyteorder("<")
        self._code = {2: "H", 4: "I"}[self.dtype.itemsize]
        self.divides = is_divisible(tokenizer)
        """Whether texts are cut and their words remembered."""
        self._chunks = _Memo(self._encode_whole)
        self._words = _Memo(lambda word: self._encode_whole(_chunk_of(word)))
        self.divides = self.divides and not any(map(self._differs, _PROBES))

    def encode(self, text: str) -> bytes:
        """Ids of a text; an empty one has none."""
        if not self.divides:
            return self._encode_whole(text)
        if "  " in text or _FIRST in text:
            return b"".join(map(self._chunks.__getitem__, _CHUNKS.findall(text)))
        words = text.split(" ")
        return self._chunks[words.pop(0)] + b"".join(map(self._words.__getitem__, words))

    def encode_many(self, texts: Sequence[str]) -> list[bytes]:
        """As `encode` of each: of a thousand texts at once, words are looked up together and new ones encoded so."""
        if not self.divides:
            return list(map(self.encode, texts))
        odd = {}
        words = f" {_FIRST}".join(texts)
        if "  " in words or words.count(_FIRST) >= len(texts):
            odd = {number: self.encode(text) for number, text in enumerate(texts) if "  " in text or _FIRST in text}
            texts = ["" if number in odd else text for number, text in enumerate(texts)]
            words = f" {_FIRST}".join(texts)
        words = (_FIRST + words).split(" ")
        ids = list(map(self._words.get, words))
        if not all(ids):
            unknown = [place for place, known in enumerate(ids) if known is None]
            self._learn([words[place] for place in unknown])
            for place in unknown:
                ids[place] = self._words[words[place]]
        rest = iter(ids)
        found = [b"".join(islice(rest, text.count(" ") + 1)) for text in texts]
        for number, own in odd.items():
            found[number] = own
        return found

    def _learn(self, words: list[str]) -> None:
        """Encode words in one call and remember them; those that are left out are encoded when they are looked up."""
        words = [word for word in dict.fromkeys(words) if len(word) <= LONGEST]
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
    """What a word stands for: a space and the word, or a text's first word."""
    return word[1:] if word.startswith(_FIRST) else " " + word


class _Memo(dict):
    """Chunk -> bytes of its ids, encoded when it is asked for the first time."""

    def __init__(self, encode: Callable[[str], bytes]) -> None:
        self.encode = encode

    def __missing__(self, chunk: str) -> bytes:
        ids = self.encode(chunk)
        if len(chunk) <= LONGEST:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[chunk] = ids
        return ids


def is_divisible(tokenizer) -> bool:
    """Whether a text's ids are its chunks' ids: a BPE model without normalisation or pieces across words."""
    if not isinstance(tokenizer, TextTokenizer):
        return False
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    normal = model.normalizer_spec
    return (
        model.trainer_spec.model_type == sentencepiece_model_pb2.TrainerSpec.BPE
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
"""What a fault would show on first: spaces of all sorts, the mark that stands for them, bytes."""
