"""Texts and images with roles, in the order of a document -> the pieces of a RawInstruction.

Adjacent texts form one segment. In a segment, texts of the same role are one piece; the spaces before a target belong
to the target (` yes`, not `Answer: `), as the tokens of a text have them; a segment has no white space at its ends.
"""

from dataclasses import dataclass, field

from megatron_cm3leon.data.sources.documents import (
    PROMPT,
    TARGET,
    BadInput,
    Entry,
    RawImage,
    RawInstruction,
    check_document,
)  # fmt: skip


@dataclass
class PieceBuilder:
    """Collects the texts and images of one document."""

    _segments: list[list[tuple[str, str | RawImage]]] = field(default_factory=list)
    """(role, text) of each text of a segment, or one (role, image)."""
    _in_text: bool = False

    def add_text(self, role: str, text: str) -> None:
        """Append a text, to the current segment if that is a text."""
        if not self._in_text:
            self._segments.append([])
        self._in_text = True
        self._segments[-1].append((role, text))

    def add_image(self, role: str, image: RawImage) -> None:
        """Append an image."""
        self._segments.append([(role, image)])
        self._in_text = False

    def end_segment(self) -> None:
        """Let the next text begin a segment."""
        self._in_text = False

    def build(self, key: str, source: str, extra: str) -> Entry:
        """The document, or a BadInput with the reason."""
        pieces: list[str | RawImage] = []
        roles: list[str] = []
        joined: list[bool] = []
        for segment in self._segments:
            for number, (role, piece) in enumerate(_join_runs(segment)):
                pieces.append(piece)
                roles.append(role)
                joined.append(number > 0)
        if not pieces:
            return BadInput(key, source, "empty text: the document has no text and no image")
        return check_document(RawInstruction(key, source, pieces, extra, tuple(roles), tuple(joined)))


def _join_runs(segment: list[tuple[str, str | RawImage]]) -> list[tuple[str, str | RawImage]]:
    """The pieces of a segment."""
    runs: list[tuple[str, str]] = []
    for role, piece in segment:
        if not isinstance(piece, str):
            return [(role, piece)]
        if role == TARGET and runs and runs[-1][0] == PROMPT:
            before = runs.pop()[1]
            kept = before.rstrip(" ")
            piece = before[len(kept) :] + piece
            _append(runs, PROMPT, kept)
        _append(runs, role, piece)
    if runs:
        runs[0] = (runs[0][0], runs[0][1].lstrip())
        runs[-1] = (runs[-1][0], runs[-1][1].rstrip())
    return [(role, text) for role, text in runs if text or role == TARGET]


def _append(runs: list[tuple[str, str]], role: str, text: str) -> None:
    """Append a text, as part of the last one if that has the same role."""
    if not text and role == PROMPT:
        return
    if runs and runs[-1][0] == role:
        text = runs.pop()[1] + text
    runs.append((role, text))
