"""Text tokenizer: SentencePiece BPE with byte fallback, such that decode(encode(text)) == text.

Nothing is normalized, trimmed or prefixed, and text that no piece covers becomes bytes. The model has no bos, eos or
pad: the special tokens belong to the joint vocabulary (vocab.py), and captions never contain them.
"""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

SPACE_MARK = "▁"
"""U+2581: SentencePiece writes spaces as this, so the character itself would come back as a space. It is encoded as its
three UTF-8 bytes instead, in the exported tokenizer.json too. Training sees it as a space."""

MAX_CAPTIONS = 10_000_000
"""Most captions that training uses, sampled evenly; more would need memory and change little."""


class TextTokenizer:
    """Text to ids [0, size) and back."""

    def __init__(self, model: bytes) -> None:
        """`model`: content of a SentencePiece model file."""
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor()
        self.processor.LoadFromSerializedProto(model)
        self.mark_ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        special = [self.processor.bos_id(), self.processor.eos_id(), self.processor.pad_id()]
        if max(special) >= 0 or not all(map(self.processor.is_byte, self.mark_ids)):
            raise ValueError(
                "a text model must have byte fallback and no bos, eos or pad pieces of its own; "
                "train one with tools/train_tokenizer.py text."
            )

    @classmethod
    def load(cls, path: str | Path) -> "TextTokenizer":
        """Read a `text.model` file."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no text tokenizer at {path}; tools/train_tokenizer.py text writes one.")
        try:
            return cls(path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model, or is damaged: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a `text.model` file."""
        Path(path).write_bytes(self.model)

    @property
    def size(self) -> int:
        """Pieces, T."""
        return self.processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text; an empty text has none. ValueError for a string that is not valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text {text!r} is not valid Unicode: character {error.start} is half of a pair."
            ) from error
        if SPACE_MARK not in text:
            return self.processor.encode(text)
        first, *rest = (self.processor.encode(part) for part in text.split(SPACE_MARK))
        for part in rest:
            first += self.mark_ids + part
        return first

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, in one call, which is faster than one call per text."""
        if any(SPACE_MARK in text for text in texts):
            return list(map(self.encode, texts))
        return self.processor.encode(texts, num_threads=1)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not valid UTF-8, which a model can generate, become U+FFFD."""
        ids = [int(i) for i in ids]
        outside = [i for i in ids if not 0 <= i < self.size]
        if outside:
            raise ValueError(f"id {outside[0]} is not a text piece; text ids are 0 to {self.size - 1}.")
        return self.processor.decode(ids)


def encode_continuation(tokenizer: Any, text: str) -> list[int]:
    """Ids of text that continues a sentence: without the word boundary that the beginning of a text may get.

    `tokenizer`: a TextTokenizer, or any object with its `encode`.
    """
    anchor, anchored = tokenizer.encode("x"), tokenizer.encode("x" + text)
    return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else tokenizer.encode(text)


def train_text(captions: Iterable[str], vocab_size: int, *, coverage: float = 0.9995) -> TextTokenizer:
    """Train a tokenizer of `vocab_size` pieces: unknown, 256 bytes, characters, then merges.

    `coverage`: share of the characters in the text that get a piece; rarer ones are spelled in bytes.
    """
    counted = _CountedText(captions)
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(counted),
            model_writer=writer,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            unk_surface="\ufffd",
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 20,
            input_sentence_size=MAX_CAPTIONS,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size, counted.captions)) from error
    return TextTokenizer(writer.getvalue())


class _CountedText:
    """Iterates over the captions that are not empty, and counts them."""

    def __init__(self, captions: Iterable[str]) -> None:
        self.source, self.captions = captions, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.source:
            if text.strip():
                self.captions += 1
                yield text


def _explain(message: str, vocab_size: int, captions: int) -> str:
    """SentencePiece's error as a sentence with a remedy."""
    if captions == 0:
        return "the text tokenizer cannot be trained: all captions of the input are empty."
    largest = re.search(r"Vocabulary size too high \(\d+\).*?<= (\d+)", message)
    if largest:
        return (
            f"vocab_size ({vocab_size}) is more than the {captions} captions can fill; the largest possible "
            f"is {largest[1]}. Lower it, or give more text."
        )
    smallest = re.search(r"smaller than required_chars. \d+ vs (\d+)", message)
    if smallest:
        return (
            f"vocab_size ({vocab_size}) must be at least {smallest[1]} for this text: 1 unknown piece, 256 "
            f"bytes and one for each frequent character. Raise it, or lower the character coverage."
        )
    return f"SentencePiece could not train a text tokenizer: {message}"
