"""Blocks as text a person can read.

    </s>⟦a red kite⟧<break>[picture: 64 codes]<break>a <sentinel:0> kite ... </s><sentinel:0> blue<eoss>

A picture that spans, sentinels or the block's ends cut is shown with the codes it has; `⟦ ⟧` encloses
tokens whose loss weight is not 1, with the weight; padding is counted.
"""

import re

import numpy as np

from megatron_cm3leon.data.stream.stream import Stream
from megatron_cm3leon.tokenizers.vocab import NAMED_SPECIALS, Vocabulary

_SPECIAL, _PICTURE, _DIM, _PLAIN = "\033[35m", "\033[36m", "\033[2m", "\033[0m"

_SPELLED_SPECIAL = re.compile(r"<(/s|pad|break|eoss|(sentinel|reserved):\d+)>")


def name_special(token: int, vocabulary: Vocabulary) -> str:
    """Readable name of a special token."""
    index = token - vocabulary.image_end
    if index < len(NAMED_SPECIALS):
        return NAMED_SPECIALS[index]
    index -= len(NAMED_SPECIALS)
    return f"<sentinel:{index}>" if index < vocabulary.sentinels else f"<reserved:{index - vocabulary.sentinels}>"


class BlockPrinter:
    """Describes blocks of a stream; `text` decodes text ids (None shows the ids themselves)."""

    def __init__(self, stream: Stream, text=None, colour: bool = False) -> None:
        self.stream, self.text, self.colour = stream, text, colour
        self.vocabulary = stream.vocabulary

    def describe(self, number: int) -> str:
        """Header, sources and tokens of block `number`."""
        block = self.stream.block(number)
        padding = int((block.tokens == self.vocabulary.pad).sum())
        pictures = int(self.vocabulary.is_image(block.tokens).sum())
        spans = int((block.tokens == self.vocabulary.eoss).sum())
        lines = [
            f"block {number}  epoch {block.epoch}  {len(block.tokens) - padding} tokens ({pictures} of pictures), "
            f"{padding} padding, {block.trimmed} trimmed, {spans} spans moved, loss weight {block.weights[1:].sum():g}"
        ]
        for role, numbers in (("retrieved", block.retrieved), ("query", block.documents)):
            for number in numbers.tolist():
                corpus, document = self.stream.library.locate(number)
                row = corpus.metadata_row(document)
                picture = f" ({row['image']})" if row["image"] not in ("", row["source"]) else ""
                shards = f" of {corpus.folder}" if len(self.stream.library.corpora) > 1 else ""
                lines.append(_escape(f"  {role} {document}{shards}: {row['source']}{picture}"))
        return "\n".join([*lines, self.show_tokens(block.tokens, block.weights)])

    def show_tokens(self, tokens: np.ndarray, weights: np.ndarray) -> str:
        """The tokens of a block as one text."""
        kinds = np.where(self.vocabulary.is_text(tokens), 0, np.where(self.vocabulary.is_image(tokens), 1, 2))
        kinds = np.where(kinds == 2, tokens + 2, kinds)  # each special is a run of its own kind
        changes = np.flatnonzero((np.diff(kinds) != 0) | (np.diff(weights) != 0)) + 1
        parts, weight = [], 1.0
        for start, end in zip([0, *changes.tolist()], [*changes.tolist(), len(tokens)], strict=True):
            new = float(weights[start])
            new = 1.0 if new == 0 and tokens[start] == self.vocabulary.pad else new
            if new != weight:
                parts.append("⟧" if weight != 1 else "")
                parts.append(f"⟦{new:g}: " if new != 1 else "")
                weight = new
            parts.append(self._show_run(tokens[start:end]))
        return "".join([*parts, "⟧" if weight != 1 else ""])

    def _show_run(self, run: np.ndarray) -> str:
        first, vocabulary = int(run[0]), self.vocabulary
        if vocabulary.is_text(first):
            return _escape(self.text.decode(run.tolist())) if self.text else " ".join(map(str, ["", *run.tolist(), ""]))
        if vocabulary.is_image(first):
            return self._paint(_PICTURE, f"[picture: {len(run)} codes]")
        name = name_special(first, vocabulary)
        if first == vocabulary.pad and len(run) > 1:
            return self._paint(_DIM, f"{name} x {len(run)}")
        return self._paint(_SPECIAL, name) * len(run)

    def _paint(self, code: str, text: str) -> str:
        return f"{code}{text}{_PLAIN}" if self.colour else text


def find_pictures(tokens: np.ndarray, vocabulary: Vocabulary) -> list[tuple[int, np.ndarray]]:
    """Whole pictures of a block: where each begins, and its codes, int64 [image_tokens]. Cut ones are left out."""
    image = np.concatenate([[False], vocabulary.is_image(tokens), [False]])
    edges = np.flatnonzero(image[1:] != image[:-1]).tolist()
    return [
        (start, tokens[start:end].astype(np.int64) - vocabulary.image_start)
        for start, end in zip(edges[::2], edges[1::2], strict=True)
        if end - start == vocabulary.image_tokens
    ]


def _escape(text: str) -> str:
    """Control characters as Python writes them; `\\<break>` for a caption that spells a special."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return _SPELLED_SPECIAL.sub(r"\\\g<0>", text)
