"""The items that all arms share, and the documents that an arm puts in front of each.

An item is a held-out drawing: of a held-out name that is drawn in at least two styles, or (study `memory`,
demonstrations) of a held-out style. They are drawn once, for all seeds, so that arms can be compared item by item.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from claims.prepare import list_styles, simplify_name
from PIL import Image

from megatron_cm3leon.data.shards.reader import Corpus, open_shards
from megatron_cm3leon.generation.retrieved import DocumentSource
from megatron_cm3leon.retrieval.encoder import Encoder
from megatron_cm3leon.retrieval.filters import NO_NEIGHBOR
from megatron_cm3leon.tokenizers.images import load_image
from megatron_cm3leon.tokenizers.vocab import Vocabulary

CANDIDATES = 16
"""Documents of the bank that are searched for those that an item may retrieve."""
Documents = list[list[np.ndarray]]
"""Ids of the documents in front of each item, the most similar last."""


@dataclass(frozen=True)
class Drawings:
    """Drawings of shards, in their order."""

    corpus: Corpus
    numbers: list[int]
    """Documents of the corpus."""
    captions: list[str]
    names: list[str]
    """Simplified, to be compared."""
    titles: list[str]
    """Names as captions have them."""
    styles: list[str]
    heldout: list[str]
    images: list[str]
    """Paths."""

    @classmethod
    def load(cls, folder: Path) -> "Drawings":
        """All drawings of a shard folder."""
        corpus = open_shards(folder)
        rows = corpus.metadata(["caption", "image", "extra"]).to_pydict()
        extra = [json.loads(text) for text in rows["extra"]]
        titles, styles, heldout = ([each[name] for each in extra] for name in ("name", "style", "heldout"))
        names, numbers = list(map(simplify_name, titles)), list(range(corpus.documents))
        return cls(corpus, numbers, rows["caption"], names, titles, styles, heldout, rows["image"])

    def select(self, chosen: Iterable[int]) -> "Drawings":
        """Drawings by their place in the lists."""
        chosen = list(chosen)
        fields = ("numbers", "captions", "names", "titles", "styles", "heldout", "images")
        return Drawings(self.corpus, *([getattr(self, name)[place] for place in chosen] for name in fields))

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, part: slice = slice(None)) -> list[np.ndarray]:
        """Ids of the documents, as stored: text <break> image."""
        return [self.corpus.read(number).astype(np.int64) for number in self.numbers[part]]

    def read_codes(self, vocabulary: Vocabulary, part: slice = slice(None)) -> np.ndarray:
        """Image codes, from 0: int64 [n, image tokens]."""
        return np.stack([ids[vocabulary.is_image(ids)] - vocabulary.image_start for ids in self.read(part)])

    def load_images(self, size: int, part: slice = slice(None)) -> list[Image.Image]:
        """The true images as the image tokenizer sees them."""
        files = self.images[part]
        return [load_image(path).resize((size, size), Image.Resampling.BICUBIC) for path in files]


@dataclass
class Items:
    """Items of both kinds, and the lists of names and styles that the second CLIP chooses among."""

    work: Path
    count: int
    n_names: int
    encoder: Encoder
    """Of retrieval."""
    heldout: Drawings = field(init=False)
    queries: Drawings = field(init=False)
    styled: Drawings = field(init=False)

    def __post_init__(self) -> None:
        self.heldout = Drawings.load(self.work / "shards/heldout")
        kinds = np.array(self.heldout.heldout)
        named = np.flatnonzero(kinds != "style")
        lines = [{"name": self.heldout.names[n], "style": self.heldout.styles[n]} for n in named]
        several = {name for name, styles in list_styles(lines).items() if len(styles) > 1}
        random = np.random.default_rng(0)
        pool = random.permutation([n for n in named if self.heldout.names[n] in several])
        self.queries = self.heldout.select(pool[: self.count].tolist())
        self.styled = self.heldout.select(random.permutation(np.flatnonzero(kinds == "style"))[: self.count].tolist())

    @cached_property
    def names(self) -> list[str]:
        """Names that a generated image is classified among: those of the items, then further held-out names."""
        chosen = dict.fromkeys(self.queries.names)
        others = sorted({name for name, kind in self._named() if kind != "style"} - set(chosen))
        others = np.random.default_rng(1).permutation(others).tolist() if others else []
        return [*chosen, *others][: max(self.n_names, len(chosen))]

    def _named(self) -> Iterable[tuple[str, str]]:
        return zip(self.heldout.names, self.heldout.heldout, strict=True)

    @cached_property
    def titles(self) -> dict[str, str]:
        """Name -> the form in which captions have it."""
        return dict(zip(self.heldout.names[::-1], self.heldout.titles[::-1], strict=True))

    @cached_property
    def training(self) -> Drawings:
        return Drawings.load(self.work / "shards/train")

    @cached_property
    def memory(self) -> Drawings:
        return Drawings.load(self.work / "shards/memory")

    @cached_property
    def styles(self) -> list[str]:
        """All styles of the corpus."""
        return sorted({*self.training.styles, *self.heldout.styles})

    def choose_documents(self, arm: str) -> tuple[Drawings, Documents]:
        """The items of an arm, and the documents in front of each."""
        kind, _, number = arm.rpartition("-")
        if kind == "demonstrations":
            return self.styled, self._draw_demonstrations(int(number))
        if kind == "random":
            return self.queries, self._draw_random(int(number))
        if kind == "bank":
            return self.queries, self._read(self.memory, [row[: int(number)] for row in self.bank_rows])
        if kind == "given":
            return self.queries, self._read(self.memory, [row[: int(number)] for row in self._list_other_styles()])
        count = {"trained-without": 0}.get(arm, int(number) if kind == "documents" else 2)
        return self.queries, self._read(self.training, [row[:count] for row in self.training_rows])

    @cached_property
    def training_rows(self) -> list[list[int]]:
        """Numbers of training documents by the caption of each query, the most similar first."""
        source = DocumentSource.load(self.work / "index/train", self.heldout.corpus.vocabulary, self.work / "clip")
        return [row[::-1] for row in source.find(CANDIDATES, texts=self.queries.captions)]

    @cached_property
    def bank_rows(self) -> list[list[int]]:
        """The same of the memory bank, without drawings of the query's name in the query's style."""
        source = DocumentSource.load(self.work / "index/memory", self.heldout.corpus.vocabulary, self.work / "clip")
        memory, queries = self.memory, self.queries
        place = {path: number for number, path in enumerate(memory.images)}
        own = [place[path] for path in queries.images]
        found = source.retriever.search(texts=queries.captions, k=CANDIDATES, bank_numbers=own)
        rows = []
        for row, name, style in zip(found, queries.names, queries.styles, strict=True):
            allowed = [
                n for n in row.tolist() if n != NO_NEIGHBOR and (memory.names[n], memory.styles[n]) != (name, style)
            ]
            rows.append(allowed)
        return rows

    def count_found(self, rows: list[list[int]], count: int) -> np.ndarray:
        """Whether one of the first `count` documents of the memory bank has the query's name: bool [queries]."""
        names = self.memory.names
        return np.array(
            [name in [names[n] for n in row[:count]] for row, name in zip(rows, self.queries.names, strict=True)]
        )

    def _list_other_styles(self) -> list[list[int]]:
        """Numbers in the memory bank of the drawings of each query's name in other styles, in random order."""
        drawn: dict[str, list[int]] = defaultdict(list)
        for number, name in enumerate(self.memory.names):
            drawn[name].append(number)
        random, rows = np.random.default_rng(2), []
        for name, style in zip(self.queries.names, self.queries.styles, strict=True):
            others = [n for n in drawn[name] if self.memory.styles[n] != style]
            rows.append(random.permutation(others).tolist())
        return rows

    def _draw_random(self, count: int) -> Documents:
        random, total = np.random.default_rng(3), len(self.training)
        rows = [random.choice(total, count, replace=False).tolist() for _ in range(len(self.queries))]
        return self._read(self.training, rows)

    def _draw_demonstrations(self, count: int) -> Documents:
        """Drawings of each item's style with other names; those of a smaller number are among those of a larger one."""
        heldout, random = self.heldout, np.random.default_rng(4)
        by_style: dict[str, list[int]] = defaultdict(list)
        for number, (style, kind) in enumerate(zip(heldout.styles, heldout.heldout, strict=True)):
            if kind == "style":
                by_style[style].append(number)
        rows = []
        for name, style in zip(self.styled.names, self.styled.styles, strict=True):
            drawn = random.permutation(by_style[style]).tolist()
            rows.append([number for number in drawn if heldout.names[number] != name][:count])
        return self._read(heldout, rows)

    def _read(self, drawings: Drawings, rows: list[list[int]]) -> Documents:
        """Ids of documents by their numbers; the first of a row, the most similar, comes last."""
        return [[drawings.corpus.read(number).astype(np.int64) for number in row[::-1]] for row in rows]
