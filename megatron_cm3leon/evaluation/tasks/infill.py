"""Infilling of held-out pairs: hidden words of a caption given its image, a hidden box of an image given its caption.

    text_word    captions in which one hidden word is filled in exactly; with a checker, a word that it needs
    text_span    the same with 2 to 4 consecutive hidden words
    box_codes    share of equal image codes inside the box
    box_all      images of which the checker finds all attributes correct after the box was filled
    box_hidden   the same, of the images that need the box: with the box filled by background they are not correct

Each box is half as high and wide as the image, in one of the corners or in the center. Other figures to compare with:

    text_word_commonest   the hidden word is always the commonest one
    _background           the box has the commonest code outside it
    _generated            the box is filled in the image's order, without a mask and guidance ("raster"): possible
                          without CM3, but blind for what comes after the box
    box_all_original      the original codes: the upper bound

Text is filled greedily. With an index, documents are retrieved by the image for a text, by the caption for a box. The
ranks of a launch share the pairs, and an interrupted run continues after its last batch.
"""

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_cm3leon.common.cli import user_path
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.evaluation.heldout import Heldout, read_heldout
from megatron_cm3leon.evaluation.judge import Checker, judge_images, load_checker, parse_captions
from megatron_cm3leon.evaluation.ranks import Ranks
from megatron_cm3leon.evaluation.result import Figure, Result, bootstrap, hash_input
from megatron_cm3leon.evaluation.retrieval import PROMPT_TOKENS
from megatron_cm3leon.generation.decoder import KINDS
from megatron_cm3leon.generation.generator import Box, Generator
from megatron_cm3leon.generation.retrieved import DocumentSource, keep_nearest
from megatron_cm3leon.generation.sampling import SAMPLERS, Sampling
from megatron_cm3leon.generation.tasks import MASK
from megatron_cm3leon.tokenizers.vocab import check_same_vocabulary

SPAN_WORDS = (2, 4)
"""Fewest and most words of a hidden span."""
SHOWN = 24
"""Filled texts that the result keeps."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`."""
    add = parser.add_argument
    add("--model", type=user_path, required=True, help="folder that tools/convert_checkpoint.py export wrote")
    add("--shards", type=user_path, required=True, help="shards of held-out pairs")
    add("--checker", type=user_path, help="Python file with classify(image) and parse_caption(text); it is executed")
    add("--count", type=int, default=192, help="held-out pairs, drawn at random")
    add("--index", type=user_path, help="index to retrieve documents from; without it nothing is retrieved")
    add("--documents", type=int, help="retrieved documents per prompt (default: as in training)")
    add("--encoder", type=user_path, help="CLIP folder, if it was moved since the index recorded its path")
    add("--guidance", type=float, default=1.0, help="weight of classifier-free guidance of a box; 1: none")
    add("--temperature", type=float, default=0.3, help="of the sampled image tokens; 0 is greedy")
    add("--batch-size", type=int, default=48, help="pairs per batch, after which an interrupted run continues")
    add("--sampler", choices=SAMPLERS, default=SAMPLERS[0], help="how random numbers select an image token")
    add("--seed", type=int, default=0, help="of the choice of pairs, of what is hidden, and of the images")
    add("--dtype", choices=KINDS, default="fp32", help="type of the model's matrices")
    add("--device", default="auto", help="cpu, cuda, or auto: CUDA if there is a device")


@dataclass(frozen=True)
class _Hidden:
    """What is hidden of one pair."""

    word: tuple[int, int]
    """Characters of the caption."""
    span: tuple[int, int]
    box: Box


def evaluate(
    *,
    model: str | Path,
    shards: str | Path,
    output: str | Path,
    checker: str | Path | None = None,
    count: int = 192,
    index: str | Path | None = None,
    documents: int | None = None,
    encoder: str | Path | None = None,
    guidance: float = 1.0,
    temperature: float = 0.3,
    batch_size: int = 48,
    sampler: str = SAMPLERS[0],
    seed: int = 0,
    dtype: str = "fp32",
    device: str = "auto",
    ranks: Ranks | None = None,
) -> Result | None:
    """Hide, fill and compare; an interrupted evaluation continues from `output`.

    The options are those of `add_options`, the figures those of the module's docstring; without a checker there are no
    figures of attributes. None on ranks other than the first. ValueError for shards of another vocabulary and for no
    pairs that can be evaluated.
    """
    ranks = ranks or Ranks()
    if count < 1:
        raise ValueError(f"--count ({count}) must be at least 1.")
    if index is None and (documents or encoder):
        name = "documents" if documents else "encoder"
        raise ValueError(f"--{name} ({documents or encoder}) requires an index to retrieve from; give --index.")
    sampling = Sampling(guidance=guidance, temperature=temperature, sampler=sampler, seed=seed)
    judge = load_checker(checker) if checker else None
    generator = Generator.load(model, dtype, ranks.resolve_device(device))
    corpus = open_shards(shards)
    check_same_vocabulary(generator.vocabulary, corpus.vocabulary, f"the shards at {shards}")
    pairs = read_heldout(corpus, count, seed, judge)
    wanted = generator.training_documents if documents is None else documents
    source = DocumentSource.load(index, generator.vocabulary, encoder) if index and wanted else None
    settings = {
        "count": count, "guidance": guidance, "temperature": temperature, "sampler": sampler, "dtype": dtype,
        "documents": wanted if source else 0,
    }  # fmt: skip
    read = {"model": Path(model), "shards": Path(shards) / "manifest.json"}
    read |= {"checker": Path(checker)} if checker else {}
    read |= {"index": Path(str(index)) / "index.json"} if source else {}
    inputs = ranks.from_first(lambda: {name: hash_input(path) for name, path in read.items()})
    evaluation = _Evaluation(generator, judge, source, wanted, sampling, pairs)
    chosen = evaluation.choose_pairs()
    with closing(ranks.open_items(output, {"settings": settings, "inputs": inputs, "seed": seed})) as finished:
        ranks.finish_items(
            {str(number): number for number in chosen},
            evaluation.fill,
            finished,
            batch_size=batch_size,
            label="infilling",
            unit="pairs",
        )
    if not ranks.first:
        return None
    items = [finished.items[str(number)] for number in chosen]
    n_skipped = len(pairs.captions) - len(items)
    return Result(
        task="infill",
        figures=compute_figures(items, seed),
        settings=settings,
        seed=seed,
        inputs=inputs,
        notes=[f"{n_skipped} captions without a word to hide were skipped."] if n_skipped else [],
        tables={"texts": [item[name] for item in items[:SHOWN] for name in ("word", "span")]},
    )


class _Evaluation:
    """What is hidden of the pairs, and what fills it."""

    def __init__(
        self,
        generator: Generator,
        checker: Checker | None,
        source: DocumentSource | None,
        documents: int,
        sampling: Sampling,
        pairs: Heldout,
    ) -> None:
        self.generator, self.checker, self.source, self.documents = generator, checker, source, documents
        self.sampling, self.pairs = sampling, pairs
        boxes = place_boxes(generator.vocabulary.image_height, generator.vocabulary.image_width)
        self.hidden: list[_Hidden | None] = []
        """None for a caption without words."""
        for number, caption in enumerate(pairs.captions):
            random = np.random.default_rng((sampling.seed, number))
            words = choose_words(caption, checker, random)
            self.hidden.append(_Hidden(*words, boxes[number % len(boxes)]) if words else None)

    def choose_pairs(self) -> list[int]:
        """Numbers of the pairs whose caption has a word to hide; ValueError if there are none."""
        chosen = [number for number, hidden in enumerate(self.hidden) if hidden]
        if not chosen:
            raise ValueError("no caption has a word to hide; give shards of pairs with captions of words.")
        return chosen

    def fill(self, part: list[int]) -> list[dict]:
        """The items of these pairs: the filled word, span and box of each."""
        words, spans = self._fill_texts(part)
        rows = zip(words, spans, self._fill_boxes(part), strict=True)
        return [{"word": word, "span": span, "box": box} for word, span, box in rows]

    def _fill_texts(self, part: list[int]) -> tuple[list[dict], list[dict]]:
        """For each pair, the caption with a hidden word, and with a hidden span, filled."""
        text = self.generator.codec.text
        rows, expected = [], []
        for number in part:
            hidden, caption = self.hidden[number], self.pairs.captions[number]
            assert hidden is not None
            rows += [(caption, start, end) for start, end in (hidden.word, hidden.span)]
            expected += [text.decode(text.encode(caption))] * 2
        codes = [self.pairs.codes[number] for number in part for _ in range(2)]
        images = self.generator.codec.decode_images(np.stack(codes)) if self.source else []
        filled = self.generator.infill_text(
            [(caption[:start], caption[end:]) for caption, start, end in rows],
            images=codes,
            retrieved=self._retrieve(part=[number for number in part for _ in range(2)], images=images),
        )
        items = [
            {
                "text": f"{caption[:start]}{MASK}{caption[end:]}",
                "hidden": caption[start:end],
                "filled": found,
                "right": found.split() == whole.split(),
            }
            for (caption, start, end), found, whole in zip(rows, filled, expected, strict=True)
        ]
        return items[::2], items[1::2]

    def _fill_boxes(self, part: list[int]) -> list[dict]:
        """For each pair, how the filled box compares with the original codes and with background."""
        filled: dict[int, np.ndarray] = {}
        generated: dict[int, np.ndarray] = {}
        background: dict[int, np.ndarray] = {}
        for box in dict.fromkeys(hidden.box for number in part if (hidden := self.hidden[number])):
            chosen = [number for number in part if (hidden := self.hidden[number]) and hidden.box == box]
            captions = [self.pairs.captions[number] for number in chosen]
            images = [self.pairs.codes[number] for number in chosen]
            documents = self._retrieve(part=chosen, texts=captions)
            masked, raster = (
                self.generator.infill_images(images, box, sampling, captions=captions, retrieved=documents, form=form)
                for form, sampling in (("masked", self.sampling), ("raster", replace(self.sampling, guidance=1.0)))
            )
            mask = self._mask(chosen[0])
            for number, codes, one, other in zip(chosen, images, masked, raster, strict=True):
                commonest = np.bincount(codes[~mask]).argmax() if not mask.all() else 0
                filled[number], generated[number] = one.codes, other.codes
                background[number] = np.where(mask, commonest, codes)
        items: list[dict] = []
        for number in part:
            codes, where = self.pairs.codes[number], self._mask(number)
            hidden = self.hidden[number]
            assert hidden is not None
            items.append(
                {
                    "box": hidden.box,
                    "codes": float((filled[number] == codes)[where].mean()),
                    "codes_background": float((background[number] == codes)[where].mean()),
                    "codes_generated": float((generated[number] == codes)[where].mean()),
                }
            )
        if self.checker:
            expected = parse_captions(self.checker, [self.pairs.captions[number] for number in part])
            original = dict(enumerate(self.pairs.codes))
            rows = {"": filled, "_background": background, "_generated": generated, "_original": original}
            for name, codes_of in rows.items():
                decoded = self.generator.codec.decode_images(np.stack([codes_of[number] for number in part]))
                for item, judged in zip(items, judge_images(self.checker, decoded, expected), strict=True):
                    item[f"all{name}"] = all(entry[2] for entry in judged.values())
        return items

    def _mask(self, number: int) -> np.ndarray:
        """Whether each code of a pair's image is inside its box, bool [image tokens]."""
        hidden = self.hidden[number]
        assert hidden is not None
        mask = np.zeros((self.generator.vocabulary.image_height, self.generator.vocabulary.image_width), bool)
        top, left, bottom, right = hidden.box
        mask[top:bottom, left:right] = True
        return mask.reshape(-1)

    def _retrieve(self, part: list[int], **queries: list) -> list[list[np.ndarray]] | None:
        """Documents for each of these pairs, by their texts or images; as many as fit into the context."""
        if self.source is None:
            return None
        found = self.source.read(self.source.find(self.documents, **queries))
        context = self.generator.decoder.context
        return [
            keep_nearest(documents, len(self.pairs.documents[number]) + PROMPT_TOKENS, context)
            for number, documents in zip(part, found, strict=True)
        ]


def place_boxes(height: int, width: int) -> list[Box]:
    """Boxes of half the height and width of an image of `height` x `width` tokens: the corners and the center."""
    rows, columns = max(1, height // 2), max(1, width // 2)
    down, across = height - rows, width - columns
    starts = [(0, 0), (0, across), (down // 2, across // 2), (down, 0), (down, across)]
    return [(top, left, top + rows, left + columns) for top, left in starts]


def choose_words(
    caption: str, checker: Checker | None, random: np.random.Generator
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Characters (start, end) of a word to hide and of a span of words; None for a caption without words.

    With a checker, the word is one of those without which the caption says something else to it, if there are any.
    """
    words = [match.span() for match in re.finditer(r"\w+", caption)]
    if not words:
        return None
    needed = words
    if checker:
        attributes = checker.parse_caption(caption)
        needed = [
            (start, end) for start, end in words if checker.parse_caption(caption[:start] + caption[end:]) != attributes
        ]
    word = (needed or words)[random.integers(len(needed or words))]
    size = min(int(random.integers(SPAN_WORDS[0], SPAN_WORDS[1] + 1)), len(words))
    first = int(random.integers(len(words) - size + 1))
    return word, (words[first][0], words[first + size - 1][1])


def compute_figures(items: Sequence[dict], seed: int) -> dict[str, Figure]:
    """The figures of filled pairs, with intervals over the pairs."""
    commonest, _ = Counter(item["word"]["hidden"] for item in items).most_common(1)[0]
    rows = {
        "text_word": [item["word"]["right"] for item in items],
        "text_word_commonest": [item["word"]["hidden"] == commonest for item in items],
        "text_span": [item["span"]["right"] for item in items],
        "box_codes": [item["box"]["codes"] for item in items],
        "box_codes_background": [item["box"]["codes_background"] for item in items],
        "box_codes_generated": [item["box"]["codes_generated"] for item in items],
    }
    if "all" in items[0]["box"]:
        for name in ("all", "all_background", "all_generated", "all_original"):
            rows[f"box_{name}"] = [item["box"][name] for item in items]
        needing = [item["box"] for item in items if not item["box"]["all_background"]]
        if needing:
            rows["box_hidden"] = [box["all"] for box in needing]
            rows["box_hidden_generated"] = [box["all_generated"] for box in needing]
    return {name: bootstrap(row, seed=seed) for name, row in rows.items()}
