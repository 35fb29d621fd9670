"""Counts of the reasons why inputs were not used, for messages."""

import re
from collections import Counter

from megatron_cm3leon.data.sources.embedded import shorten

_SHOWN = 3
_HINTS = (
    (
        'field ".*" is missing',
        "If image and caption have other names, give --image-field and --caption-field.",
    ),
    ("missing picture", "Paths of images are relative to the file that lists them."),
)


class Reasons:
    """Counts of reasons, grouped by their text up to the first colon; the first reason of a group is kept in full."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, reason: str) -> None:
        """Add one input with this `reason`."""
        self.add_many(reason, 1)

    def add_many(self, reason: str, count: int) -> None:
        """Add `count` inputs with this `reason`."""
        group, _, detail = reason.partition(":")
        self.counts[group] += count
        self._first.setdefault(group, detail.strip())

    def __bool__(self) -> bool:
        return bool(self.counts)

    @property
    def total(self) -> int:
        """Inputs in total."""
        return self.counts.total()

    def __str__(self) -> str:
        """The most common reasons, such as `12 x missing picture (the first: images/0.jpg)`."""
        shown = [self._describe(group, count) for group, count in self.counts.most_common(_SHOWN)]
        rest = len(self.counts) - _SHOWN
        return "; ".join(shown) + (f"; and {rest} other reasons" if rest > 0 else "")

    def _describe(self, group: str, count: int) -> str:
        detail = shorten(self._first[group], 240)
        return f"{count} x {group}" + (f" (the first: {detail})" if detail else "")

    @property
    def hint(self) -> str:
        """A remedy for the most common reason: a sentence, or ""."""
        for group, _ in self.counts.most_common(1):
            return next((hint for pattern, hint in _HINTS if re.match(pattern, group)), "")
        return ""
