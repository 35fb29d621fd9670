"""A drawing of the corpus before it is rendered: what to render, and the texts and the license that belong to it."""

import hashlib
import re
from dataclasses import dataclass

SHARE_BITS = 64


def draw_share(*key: object) -> float:
    """A number in [0, 1) that depends on `key` alone: the same for every choice of sources and every limit."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[: SHARE_BITS // 8], "big") / 2**SHARE_BITS


@dataclass(frozen=True)
class License:
    """Under which terms, and by whom, a set of drawings was published. `spdx` is an identifier of spdx.org."""

    spdx: str
    url: str = ""
    author: str = ""


@dataclass(frozen=True)
class Drawing:
    """One drawing.

    key: its file below images/, without the ending; source: the package or set it comes from; kind: how `content` is
    rendered ("svg": the text of an SVG, "file": a path of a PNG or SVG, "emoji": characters of the emoji font);
    name: what it shows; style: how it is drawn, as a part of a caption; other_names: further names of the same thing.
    """

    key: str
    source: str
    kind: str
    content: str
    name: str
    style: str
    license: License
    keywords: tuple[str, ...] = ()
    category: str = ""
    other_names: tuple[str, ...] = ()

    @property
    def concept(self) -> str:
        """What the split holds out: drawings of one name in all styles have the same concept."""
        return " ".join(self.name.lower().split())

    def captions(self) -> list[str]:
        """Different captions of the drawing, in an order that depends on its key: the first one is used most."""
        details = self._list_new_keywords()[:3] or [self.category]
        texts = [f"{self.name}, {self.style}", self.name, f"{self.style}: {self.name}"]
        if details != [""]:
            texts.append(f"{self.name} ({', '.join(details)}), {self.style}")
        start = int(draw_share("caption", self.key) * len(texts))
        return texts[start:] + texts[:start]

    def _list_new_keywords(self) -> list[str]:
        """Keywords that say more than the name."""
        known = set(re.findall(r"\w+", self.concept))
        return [text for text in self.keywords if not known.issuperset(re.findall(r"\w+", text.lower()))]

    def references(self) -> list[str]:
        """Texts that describe the drawing, for metrics that compare a caption with several: the name comes first."""
        words = self._list_new_keywords()
        texts = [self.name, *self.other_names, f"{self.name}, {self.style}"]
        if words:
            texts.append(f"{self.name}: {', '.join(words[:5])}")
        if self.category:
            texts.append(f"{self.name}, {self.category}")
        return list({" ".join(text.lower().split()): text for text in reversed(texts)}.values())[::-1]
