"""Sequences as readable text.

    </s>⟦0.25: a red kite<break>[image: 64 codes]<break>⟧a <sentinel:0> kite ... </s><sentinel:0> blue<eoss>
    </s>⟦0: Question: what color? Answer:<sentinel:0>.<break>[image: 64 codes]</s><sentinel:0>⟧⟪ red⟫<eoss>

An image that is cut by spans, sentinels or the ends of the sequence is shown with the number of codes left; `⟦ ⟧`
encloses tokens whose loss weight is not 1, after the weight, and `⟪ ⟫` the targets of instruction documents; padding is
counted.
"""

import re
from typing import Protocol

import numpy as np

from megatron_cm3leon.data.stream.stream import Stream, TokenSequence
from megatron_cm3leon.tokenizers.vocab import NAMED_SPECIALS, Vocabulary

_SPECIAL, _IMAGE, _DIM, _PLAIN = "\033[35m", "\033[36m", "\033[2m", "\033[0m"

_SPELLED_SPECIAL = re.compile(r"<(/s|pad|break|eoss|(sentinel|reserved):\d+)>")


def name_special(token: int, vocabulary: Vocabulary) -> str:
    """Readable name of a special token."""
    index = token - vocabulary.image_end
    if index < len(NAMED_SPECIALS):
        return NAMED_SPECIALS[index]
    index -= len(NAMED_SPECIALS)
    return f"<sentinel:{index}>" if index < vocabulary.sentinels else f"<reserved:{index - vocabulary.sentinels}>"


class TextDecoder(Protocol):
    """Decodes text ids, such as tokenizers.text.TextTokenizer."""

    def decode(self, ids: list[int]) -> str:
        """The text of these ids."""


class SequencePrinter:
    """Describes sequences of a stream as text; `text` decodes text ids (None: the ids are shown)."""

    def __init__(self, stream: Stream, text: TextDecoder | None = None, color: bool = False) -> None:
        self.stream, self.text, self.color = stream, text, color
        self.vocabulary = stream.vocabulary

    def describe(self, number: int) -> str:
        """Header, sources and tokens of sequence `number`."""
        sequence = self.stream.sequence(number)
        padding = int((sequence.tokens == self.vocabulary.pad).sum())
        codes = int(self.vocabulary.is_image(sequence.tokens).sum())
        spans = int((sequence.tokens == self.vocabulary.eoss).sum())
        lines = [
            f"sequence {number}  epoch {sequence.epoch}  {len(sequence.tokens) - padding} tokens ({codes} of images), "
            f"{padding} padding, {sequence.trimmed} trimmed, {spans} spans moved, "
            f"loss weight {sequence.weights[1:].sum():g}{self._describe_targets(sequence)}"
        ]
        for role, numbers in (("retrieved", sequence.retrieved), ("query", sequence.documents)):
            for number in numbers.tolist():
                corpus, document = self.stream.corpus.locate(number)
                row = corpus.metadata_row(document)
                image = f" ({row['image']})" if row["image"] not in ("", row["source"]) else ""
                shards = f" of {corpus.folder}" if len(self.stream.corpus.corpora) > 1 else ""
                lines.append(_escape(f"  {role} {document}{shards}: {row['source']}{image}"))
        return "\n".join([*lines, self.show_tokens(sequence.tokens, sequence.weights, sequence.targets)])

    def _describe_targets(self, sequence: TokenSequence) -> str:
        """How many tokens are targets, and the loss weight on them; "" for data without targets."""
        if sequence.targets is None:
            return ""
        weight = sequence.weights[1:][sequence.targets[1:]].sum()
        return f" ({int(sequence.targets.sum())} tokens of targets with {weight:g} of it)"

    def show_tokens(self, tokens: np.ndarray, weights: np.ndarray, targets: np.ndarray | None = None) -> str:
        """The tokens of a sequence as one text; `targets`: which ones belong to targets (bool)."""
        targets = np.zeros(len(tokens), bool) if targets is None else targets
        kinds = np.where(self.vocabulary.is_text(tokens), 0, np.where(self.vocabulary.is_image(tokens), 1, 2))
        kinds = np.where(kinds == 2, tokens + 2, kinds)  # each special is a run of its own kind
        changes = np.flatnonzero((np.diff(kinds) != 0) | (np.diff(weights) != 0) | np.diff(targets)) + 1
        parts, weight, inside = [], 1.0, False
        for start, end in zip([0, *changes.tolist()], [*changes.tolist(), len(tokens)], strict=True):
            new = float(weights[start])
            new = 1.0 if new == 0 and tokens[start] == self.vocabulary.pad else new
            is_target = bool(targets[start])
            if inside and (new != weight or not is_target):
                parts.append("⟫")
                inside = False
            if new != weight:
                parts.append("⟧" if weight != 1 else "")
                parts.append(f"⟦{new:g}: " if new != 1 else "")
                weight = new
            if is_target and not inside:
                parts.append("⟪")
                inside = True
            parts.append(self._show_run(tokens[start:end]))
        return "".join([*parts, "⟫" if inside else "", "⟧" if weight != 1 else ""])

    def _show_run(self, run: np.ndarray) -> str:
        first, vocabulary = int(run[0]), self.vocabulary
        if vocabulary.is_text(first):
            return _escape(self.text.decode(run.tolist())) if self.text else " ".join(map(str, ["", *run.tolist(), ""]))
        if vocabulary.is_image(first):
            return self._paint(_IMAGE, f"[image: {len(run)} codes]")
        name = name_special(first, vocabulary)
        if first == vocabulary.pad and len(run) > 1:
            return self._paint(_DIM, f"{name} x {len(run)}")
        return self._paint(_SPECIAL, name) * len(run)

    def _paint(self, code: str, text: str) -> str:
        return f"{code}{text}{_PLAIN}" if self.color else text


def find_images(tokens: np.ndarray, vocabulary: Vocabulary) -> list[tuple[int, np.ndarray]]:
    """Complete images of a sequence: position of the first token, and codes, int64 [image_tokens]."""
    image = np.concatenate([[False], vocabulary.is_image(tokens), [False]])
    edges = np.flatnonzero(image[1:] != image[:-1]).tolist()
    return [
        (start, tokens[start:end].astype(np.int64) - vocabulary.image_start)
        for start, end in zip(edges[::2], edges[1::2], strict=True)
        if end - start == vocabulary.image_tokens
    ]


def _escape(text: str) -> str:
    """`text` with control characters as Python escapes, and with `\\<break>` if it spells a special token."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return _SPELLED_SPECIAL.sub(r"\\\g<0>", text)
