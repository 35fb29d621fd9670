"""Measures one unit: the loss of its items with the arm's documents, and the images generated for their captions.

A unit works in parts of CHUNK items, whose arrays are kept in the work folder; an interrupted unit continues after its
last part. Arrays of a unit, for its n items:

    losses, tokens    [n, 3] summed nats and numbers of tokens of the query document: text, <break>, image
    codes             [n, image tokens] of the generated image; [n, candidates, ...] for a pool, and so the next ones
    vectors           [n, width] of the image by the second CLIP
    right             [n] whether the second CLIP finds the name (the style, for items of a held-out style)
    score             [n] CLIP score by the second CLIP
    rank              [n, candidates] cosine of image and caption by the encoder of retrieval, for pools alone
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from claims.infill import has_context, measure_infilling
from claims.items import Documents, Drawings, Items
from claims.judge import Distance, Judge
from claims.plan import CANDIDATES, CHUNK, STYLE_ARMS, Unit, choose_sampling
from claims.references import choose_references
from claims.results import load_parts, pack_values, save_part
from claims.train import find_model
from PIL import Image

from megatron_cm3leon.common.atomic_io import sha256_file
from megatron_cm3leon.common.progress import meter
from megatron_cm3leon.distributed.device import resolve_device
from megatron_cm3leon.evaluation.loss import BREAK, IMAGE, TEXT, measure_documents
from megatron_cm3leon.evaluation.result import Figure, bootstrap
from megatron_cm3leon.generation.codec import Codec
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.ranking import Candidates
from megatron_cm3leon.generation.retrieved import keep_nearest
from megatron_cm3leon.retrieval.encoder import Encoder
from megatron_cm3leon.tokenizers.folder import Tokenizers

Arrays = dict[str, np.ndarray]
WITHOUT_LOSS = ("decoding",)
"""Studies whose arms have the loss of another arm: only the sampling differs."""


@dataclass
class Bench:
    """What all units share, loaded once: items, encoders, true images."""

    work: Path
    count: int
    n_names: int
    identity: str
    """Of the settings: parts of other settings are not continued."""
    device: str = "auto"

    def __post_init__(self) -> None:
        self.device = resolve_device(self.device)
        self.ranker = Encoder.load(self.work / "clip", self.device)
        self.items = Items(self.work, self.count, self.n_names, self.ranker)
        names = [self.items.titles[name] for name in self.items.names]
        self.judge = Judge(self.work / "judge", names, self.items.styles, self.device)
        self.codec = Codec(Tokenizers.load(self.work / "tokenizer", self.device))
        self._generator: tuple[Path | None, Generator | None] = (None, None)

    @property
    def image_size(self) -> int:
        """Pixels of a generated image."""
        return self.codec.image.image_size

    @cached_property
    def distances(self) -> dict[bool, Distance]:
        """Distance to all true drawings of held-out names (False) and of held-out styles (True)."""
        heldout, kinds = self.items.heldout, np.array(self.items.heldout.heldout)
        chosen = {styled: np.flatnonzero((kinds == "style") == styled).tolist() for styled in (False, True)}
        images = {styled: heldout.select(numbers).load_images(self.image_size) for styled, numbers in chosen.items()}
        return {styled: Distance(self.judge.encode_images(found)) for styled, found in images.items()}

    def folder(self, unit: Unit) -> Path:
        """Where a unit's parts are kept."""
        return self.work / "units" / self.identity / unit.name

    def generator(self, unit: Unit) -> Generator:
        """The model of a unit; the last one is kept."""
        folder = find_model(self.work, unit.training) / "exported"
        if self._generator[0] != folder:
            self._generator = folder, Generator.load(folder, "fp32", self.device)
        generator = self._generator[1]
        assert generator is not None
        return generator

    def measure(self, unit: Unit) -> dict:
        """Content of the unit's line."""
        if unit.arm.startswith("best-"):
            return self._choose_best(unit)
        if unit.study == "cm3":
            return self._measure_infilling(unit)
        if not unit.model:
            items, images = choose_references(unit.arm, self.items, self.codec, self.ranker)
            arrays = self._run_parts(unit, len(items), lambda part: self._judge(items, part, images(part)))
            return self._describe_images(unit, arrays, {})
        items, documents = self.items.choose_documents(unit.arm)
        settings = {"temperature": choose_sampling(unit.arm).temperature, "documents": max(map(len, documents))}
        arrays = self._run_parts(unit, len(items), lambda part: self._generate(unit, items, documents, part))
        content = self._describe_images(unit, arrays, settings)
        if unit.arm == "bank-2":
            found = self.items.count_found(self.items.bank_rows, 2)
            content["figures"]["found"] = list_figure(bootstrap(100.0 * found))
        return content

    def _measure_infilling(self, unit: Unit) -> dict:
        """The line of an arm of the study cm3."""
        generator, queries = self.generator(unit), self.items.queries
        items = queries.select(n for n, caption in enumerate(queries.captions) if has_context(caption))
        masked = unit.model != "causal"
        arrays = self._run_parts(unit, len(items), lambda part: measure_infilling(generator, items, part, masked))
        content = describe_values(arrays, {"text_right": 100, "box_right": 100, "box_nats": 1, "text_nats": 1})
        return content | {"settings": {"temperature": 0}, "hashes": {"parts": hash_parts(self.folder(unit))}}

    def _run_parts(self, unit: Unit, count: int, measure: Callable[[slice], Arrays]) -> Arrays:
        """Measure what is not finished of `count` items, and return the arrays of all."""
        folder = self.folder(unit)
        with meter(count, str(unit), "items") as progress:
            for start in range(0, count, CHUNK):
                part, path = slice(start, min(start + CHUNK, count)), folder / f"part-{start:06d}.npz"
                if not path.is_file():
                    save_part(path, measure(part))
                progress.advance(part.stop - part.start)
        return load_parts(folder)

    def _generate(self, unit: Unit, items: Drawings, documents: Documents, part: slice) -> Arrays:
        """Losses and generated images of some items."""
        generator, queries = self.generator(unit), items.read(part)
        context, vocabulary = generator.decoder.context, generator.vocabulary
        # A prompt has as many tokens as the document that it stands for.
        given = [keep_nearest(docs, len(q), context) for docs, q in zip(documents[part], queries, strict=True)]
        arrays: Arrays = {"kept": np.array([len(docs) for docs in given])}
        if unit.study not in WITHOUT_LOSS:
            arrays["losses"], arrays["tokens"] = measure_documents(generator.decoder, queries, given, vocabulary)
        pool = unit.arm.startswith("pool-")
        made = generator.images(
            items.captions[part],
            replace(choose_sampling(unit.arm), seed=unit.seed),
            retrieved=given,
            candidates=Candidates(CANDIDATES if pool else 1),
        )
        generated = list(made)
        arrays["codes"] = np.stack([one.codes for one in generated]).astype(np.uint16)
        images = [one.image for one in generated]
        if not pool:
            return arrays | self._judge(items, part, images)
        each = [number for number in range(part.start, part.stop) for _ in range(CANDIDATES)]
        arrays |= self._judge(items.select(each), slice(None), images)
        texts = self.ranker.encode_texts(items.captions[part])
        vectors = self.ranker.encode_images(images).reshape(len(texts), CANDIDATES, -1)
        split = {name: values for name, values in arrays.items() if name in ("codes", "vectors", "right", "score")}
        arrays |= {name: values.reshape(len(texts), CANDIDATES, *values.shape[1:]) for name, values in split.items()}
        return arrays | {"rank": np.einsum("nd,ncd->nc", texts, vectors)}

    def _judge(self, items: Drawings, part: slice, images: Sequence[Image.Image]) -> Arrays:
        """What the second CLIP finds in images of some items."""
        vectors = self.judge.encode_images(images)
        names, styles = [self.items.titles[name] for name in items.names[part]], items.styles[part]
        styled = items.heldout[part][0] == "style"
        right = self.judge.find_styles(vectors, names, styles) if styled else self.judge.find_names(vectors, names)
        return {"vectors": vectors, "right": right, "score": self.judge.score_captions(vectors, items.captions[part])}

    def _describe_images(self, unit: Unit, arrays: Arrays, settings: dict) -> dict:
        """The line of an arm with images; of a pool, its first candidate."""
        if unit.arm.startswith("pool-"):
            arrays = arrays | {name: arrays[name][:, 0] for name in ("vectors", "right", "score", "codes")}
        content = describe_values(arrays, {"right": 100, "score": 1})
        distance, found = self.distances[unit.arm.startswith(STYLE_ARMS)].measure(arrays["vectors"])
        content["figures"]["fd"] = list_figure(distance)
        content["fd_resamples"] = [float(f"{value:.5g}") for value in found]
        content["settings"] = settings
        if "kept" in arrays and settings.get("documents"):
            content["settings"] = settings | {"documents_kept": round(float(arrays["kept"].mean()), 3)}
        content["hashes"] = {"parts": hash_parts(folder)} if (folder := self.folder(unit)).is_dir() else {}
        return content

    def _choose_best(self, unit: Unit) -> dict:
        """The line of best-of-n: the candidate of each item that the encoder of retrieval ranks first.

        `best-together` takes half of the candidates of each pool.
        """
        pools = [each for each in unit.requires if each.study == unit.study]
        loaded = [load_parts(self.folder(pool)) for pool in pools]
        best, curve, count = {}, {}, 1
        while count <= CANDIDATES:
            share = max(1, count // len(loaded))
            arrays = {n: np.concatenate([pool[n][:, :share] for pool in loaded], 1) for n in loaded[0] if n in POOLED}
            rows, chosen = np.arange(len(arrays["rank"])), arrays["rank"].argmax(axis=1)
            best = {name: values[rows, chosen] for name, values in arrays.items()}
            figures = self._describe_images(unit, best, {})["figures"]
            curve[arrays["rank"].shape[1]] = {name: figures[name][0] for name in ("right", "score", "fd")}
            count *= 2
        return self._describe_images(unit, best, {"candidates": CANDIDATES}) | {"curve": curve}


POOLED = ("vectors", "right", "score", "rank")
"""Arrays with a value for each candidate."""


def describe_values(arrays: Arrays, factors: dict[str, float]) -> dict:
    """Figures and packed values of a unit's arrays; a figure is a mean times its factor."""
    figures, values = {}, {}
    if "losses" in arrays:
        losses, tokens = arrays["losses"], arrays["tokens"]
        text, image = losses[:, [TEXT, BREAK]].sum(1), losses[:, IMAGE]
        for name, nats, count in (
            ("loss", losses.sum(1), tokens.sum(1)),
            ("loss_text", text, tokens[:, [TEXT, BREAK]].sum(1)),
            ("loss_image", image, tokens[:, IMAGE]),
        ):
            # Nats of a document over the mean number of tokens: the mean over documents is the loss per token.
            values[name] = nats / count.mean()
            figures[name] = list_figure(bootstrap(values[name]))
    for name, factor in factors.items():
        values[name] = arrays[name]
        figures[name] = list_figure(bootstrap(factor * arrays[name].astype(np.float64)))
    return {"figures": figures, "values": {name: pack_values(each) for name, each in values.items()}}


def list_figure(figure: Figure) -> list[float]:
    """[value, low, high], with 5 digits."""
    return [float(f"{number:.5g}") for number in (figure.value, figure.low, figure.high) if number is not None]


def hash_parts(folder: Path) -> str:
    """SHA-256 of the hashes of a unit's parts, in their order."""
    return hashlib.sha256("".join(map(sha256_file, sorted(folder.glob("part-*.npz")))).encode()).hexdigest()
