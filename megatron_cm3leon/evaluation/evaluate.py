"""Evaluation of an exported model on held-out shards; what tools/report.py shows.

Held-out documents are drawn once: some to choose guidance and retrieval on, others, reported, for all else. Measured:

    the checker's accuracy on generated pictures (and on the image tokenizer's reconstructions: its ceiling),
    the accuracy of generated captions, the reconstructions' PSNR, the loss with and without retrieved documents,

and examples of each are written as pictures, beside evaluation.json:

    figures           the numbers
    sweep             accuracy (or CLIP score) by guidance, with and without retrieved documents
    examples          captions with their pictures: held-out, generated at guidance 1 and at the best one
    reconstructions   originals and what the image tokenizer makes of them
    retrieval         queries and their retrieved documents
    infilling         pictures with a part made anew
    captions          pictures and the captions made of them
    seconds           time of each part
"""

import json
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_cm3leon.common.progress import track
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.evaluation.heldout import Heldout, cover_box, measure_psnr, read_heldout
from megatron_cm3leon.evaluation.judge import judge_captions, judge_pictures, load_checker, share_right, word_f1
from megatron_cm3leon.evaluation.loss import measure_loss
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.retrieved import DocumentSource, keep_nearest
from megatron_cm3leon.generation.sampling import SAMPLERS
from megatron_cm3leon.tokenizers.images import from_pixels, load_image, to_pixels
from megatron_cm3leon.tokenizers.vocab import check_same_vocabulary

PROMPT_TOKENS = 8
"""What the forms of prompts.py add to a pair at most, with some room for a caption longer than its picture's."""


@dataclass(kw_only=True)
class EvaluationOptions:
    """What is measured, and on how much."""

    pictures: int = 144
    """Held-out documents that are reported on."""
    sweep_pictures: int = 48
    """Other held-out documents, on which guidance and retrieval are chosen."""
    guidance: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0, 3.0])
    """Guidance weights that are tried."""
    temperature: float = 0.5
    """Temperature of generated pictures; 0 is greedy."""
    top_p: float = 1.0
    """Share of the probability that pictures are drawn from."""
    sampler: str = SAMPLERS[0]
    """Sampler of pictures: see generation/sampling.py."""
    documents: int | None = None
    """Retrieved documents of a prompt; by default as many as the model was trained with."""
    examples: int = 8
    """Examples of each kind that are shown."""
    seed: int = 0
    """Seed of the choice of documents and of the pictures."""

    def to_dict(self) -> dict:
        """The options as evaluation.json has them."""
        return {
            "pictures": self.pictures,
            "sweep_pictures": self.sweep_pictures,
            "guidance": self.guidance,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "sampler": self.sampler,
            "documents": self.documents,
            "examples": self.examples,
            "seed": self.seed,
        }


def evaluate_model(
    model: str | Path,
    shards: str | Path,
    output: str | Path,
    options: EvaluationOptions,
    *,
    checker: str | Path | None = None,
    index: str | Path | None = None,
    encoder: str | Path | None = None,
    dtype: str = "fp32",
    device: str = "auto",
) -> dict:
    """Evaluate; write evaluation.json and pictures/ to `output` and return the former's content."""
    return _Evaluation(model, shards, Path(output), options, checker, index, encoder, dtype, device).run()


class _Evaluation:
    def __init__(self, model, shards, output, options, checker, index, encoder, dtype, device) -> None:
        self.options, self.output, self.seconds = options, output, {}
        with self._timed("load"):
            self.checker = load_checker(checker) if checker else None
            self.generator = Generator.load(model, dtype, device)
            self.vocabulary = self.generator.vocabulary
            corpus = open_shards(shards)
            check_same_vocabulary(self.vocabulary, corpus.vocabulary, f"the shards at {shards}")
            wanted = options.pictures + options.sweep_pictures
            pairs = read_heldout(corpus, wanted, options.seed, self.checker)
            held_back = min(options.sweep_pictures, len(pairs.captions) // 3)
            self.sweep_pairs, self.pairs = pairs.part(slice(0, held_back)), pairs.part(slice(held_back, None))
            self.count = options.documents
            if self.count is None:
                self.count = self.generator.training_documents
            self.source = DocumentSource.load(index, self.vocabulary, encoder) if index and self.count else None
        self.result = {
            "format": 1,
            "figures": {},
            "sweep": [],
            "options": options.to_dict() | {"documents": self.count},
        }
        (output / "pictures").mkdir(parents=True, exist_ok=True)

    def run(self) -> dict:
        parts = {
            "reconstruct": self.reconstruct,
            "retrieve": self.retrieve,
            "generate": self.generate,
            "caption": self.caption,
            "infill": self.infill,
            "lose": self.lose,
        }
        for name in track(parts, label="evaluating", unit="parts"):
            with self._timed(name):
                parts[name]()
        self.result["seconds"] = self.seconds
        text = json.dumps(self.result, indent=1, ensure_ascii=False)
        (self.output / "evaluation.json").write_text(text + "\n")
        return self.result

    @contextmanager
    def _timed(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)

    def _save(self, picture: Image.Image, name: str) -> str:
        path = f"pictures/{name}.png"
        picture.save(self.output / path)
        return path

    def _wanted(self, pairs: Heldout) -> list[dict]:
        return [self.checker.parse_caption(caption) for caption in pairs.captions]

    @property
    def shown(self) -> int:
        return min(self.options.examples, len(self.pairs.captions))

    def reconstruct(self) -> None:
        """The image tokenizer alone: PSNR, and how well the checker reads its pictures."""
        self.reconstructions = self.generator.decode_pictures(self.pairs.codes)
        size = self.generator.image.image_size
        self.originals = [
            from_pixels(to_pixels(load_image(file), size)) if file is not None and file.is_file() else None
            for file in self.pairs.files
        ]
        # What a reader sees of a held-out pair: its picture or, where that is no longer there, its tokens'.
        both = zip(self.originals, self.reconstructions, strict=True)
        self.seen = [made if original is None else original for original, made in both]
        scores = [
            None if original is None else measure_psnr(original, made)
            for original, made in zip(self.originals, self.reconstructions, strict=True)
        ]
        known = [score for score in scores if score is not None]
        self.result["figures"]["image_psnr_db"] = float(np.mean(known)) if known else None
        if self.checker:
            judged = judge_pictures(self.checker, self.reconstructions, self._wanted(self.pairs))
            self.result["figures"]["checker_ceiling"] = share_right(judged)
        self.result["reconstructions"] = [
            {
                "caption": self.pairs.captions[number],
                "original": self._save(self.originals[number], f"original-{number}"),
                "reconstruction": self._save(self.reconstructions[number], f"reconstruction-{number}"),
                "psnr_db": scores[number],
            }
            for number in range(self.shown)
            if self.originals[number] is not None
        ]

    def retrieve(self) -> None:
        """Documents for captions (which generate pictures) and for pictures (which get captions)."""
        self.by_text = self.by_picture = self.sweep_by_text = None
        if self.source is None:
            return
        numbers = self.source.find(self.count, texts=self.pairs.captions)
        self.by_text = self._read_documents(numbers, self.pairs)
        self.sweep_by_text = self._read_documents(
            self.source.find(self.count, texts=self.sweep_pairs.captions), self.sweep_pairs
        )
        self.by_picture = self._read_documents(self.source.find(self.count, pictures=self.seen), self.pairs)
        encoder = self.source.retriever.encoder
        shown = [self._describe_retrieved(number, numbers[number], encoder) for number in range(min(3, self.shown))]
        self.result["retrieval"] = shown

    def _read_documents(self, numbers: list[list[int]], pairs: Heldout) -> list[list[np.ndarray]]:
        """Ids of as many of the documents as leave room for the pair and what a prompt adds."""
        context = self.generator.decoder.context
        return [
            keep_nearest(documents, len(own) + PROMPT_TOKENS, context)
            for documents, own in zip(self.source.read(numbers), pairs.documents, strict=True)
        ]

    def _describe_retrieved(self, number: int, found: list[int], encoder) -> dict:
        captions = self.source.bank.metadata(["caption"])["caption"]
        query = encoder.encode_texts([self.pairs.captions[number]])[0]
        vectors = self.source.retriever.data.vectors
        neighbours = []
        for bank_number in reversed(found):  # the most similar first
            picture = self._document_picture(self.source.bank.read(bank_number))
            neighbours.append(
                {
                    "caption": captions[bank_number].as_py(),
                    "picture": self._save(picture, f"bank-{bank_number}"),
                    "score": float(np.asarray(vectors[bank_number], np.float32) @ query),
                }
            )
        picture = self._save(self.seen[number], f"original-{number}")
        return {"caption": self.pairs.captions[number], "picture": picture, "neighbours": neighbours}

    def _document_picture(self, ids: np.ndarray) -> Image.Image:
        ids = ids.astype(np.int64)
        codes = ids[self.vocabulary.is_image(ids)][: self.vocabulary.image_tokens] - self.vocabulary.image_start
        return self.generator.decode_pictures(codes[None])[0]

    def _images(self, pairs: Heldout, documents, guidance: float) -> list:
        options = self.options
        made = self.generator.images(
            pairs.captions,
            documents,
            guidance=guidance,
            temperature=options.temperature,
            top_p=options.top_p,
            sampler=options.sampler,
            seed=options.seed,
        )
        return [one.picture for one in made]

    def generate(self) -> None:
        """Choose guidance and retrieval on the sweep's captions; then draw all reported ones, so and unguided."""
        best = self._sweep()
        documents = self.by_text if best["retrieval"] else None
        plain = self._images(self.pairs, documents, 1.0)
        guided = plain if best["guidance"] == 1 else self._images(self.pairs, documents, best["guidance"])
        figures = self.result["figures"]
        figures["guidance"], figures["retrieval"] = best["guidance"], best["retrieval"]
        judged = {}
        if self.checker:
            wanted = self._wanted(self.pairs)
            judged = {
                "plain": judge_pictures(self.checker, plain, wanted),
                "guided": judge_pictures(self.checker, guided, wanted),
            }
            figures["heldout_accuracy"] = share_right(judged["guided"])
            figures["heldout_accuracy_without_guidance"] = share_right(judged["plain"])
            if self.source is not None:
                other = self._images(self.pairs, None if best["retrieval"] else self.by_text, best["guidance"])
                arms = [figures["heldout_accuracy"], share_right(judge_pictures(self.checker, other, wanted))]
                with_, without = arms if best["retrieval"] else reversed(arms)
                figures["heldout_accuracy_with_retrieval"] = with_
                figures["heldout_accuracy_without_retrieval"] = without
        if self.source is not None:
            figures["clip_score"] = {
                "generated": self._clip_score(self.pairs, guided),
                "heldout": self._clip_score(self.pairs, self.seen),
            }
        self.result["examples"] = [
            {
                "caption": self.pairs.captions[number],
                "original": self._save(self.seen[number], f"original-{number}"),
                "plain": self._save(plain[number], f"plain-{number}"),
                "guided": self._save(guided[number], f"guided-{number}"),
                **{f"{name}_judged": rows[number] for name, rows in judged.items()},
            }
            for number in range(self.shown)
        ]

    def _sweep(self) -> dict:
        """The best of guidance x retrieval by the checker's mean accuracy, else by the CLIP score; of equals the first.

        With neither checker nor index there is nothing to choose by: the last guidance asked for.
        """
        if not self.checker and self.source is None:
            return {"guidance": self.options.guidance[-1], "retrieval": False}
        for guidance in sorted(set(self.options.guidance)):
            for retrieval in (True, False) if self.source is not None else (False,):
                pictures = self._images(self.sweep_pairs, self.sweep_by_text if retrieval else None, guidance)
                row = {"guidance": guidance, "retrieval": retrieval}
                if self.checker:
                    row["accuracy"] = share_right(
                        judge_pictures(self.checker, pictures, self._wanted(self.sweep_pairs))
                    )
                else:
                    row["clip_score"] = self._clip_score(self.sweep_pairs, pictures)
                self.result["sweep"].append(row)
        return max(
            self.result["sweep"],
            key=lambda row: sum(row["accuracy"].values()) if self.checker else row["clip_score"],
        )

    def _clip_score(self, pairs: Heldout, pictures: list) -> float:
        """Mean inner product of captions and their pictures by the index's own encoder."""
        encoder = self.source.retriever.encoder
        return float((encoder.encode_pictures(pictures) * encoder.encode_texts(pairs.captions)).sum(1).mean())

    def caption(self) -> None:
        """Captions of the held-out pictures, as their codes stand in the shards."""
        texts = self.generator.captions(list(self.pairs.codes), self.by_picture)
        if self.checker:
            judged = judge_captions(self.checker, texts, self._wanted(self.pairs))
            right = [all(entry[2] for entry in one.values()) for one in judged]
        else:
            right = [text == caption for text, caption in zip(texts, self.pairs.captions, strict=True)]
        self.result["figures"]["caption_accuracy"] = sum(right) / len(right)
        overlaps = [word_f1(text, caption) for text, caption in zip(texts, self.pairs.captions, strict=True)]
        self.result["figures"]["caption_word_f1"] = float(np.mean(overlaps))
        self.result["captions"] = [
            {
                "picture": self._save(self.seen[number], f"original-{number}"),
                "caption": self.pairs.captions[number],
                "made": texts[number],
                "right": right[number],
            }
            for number in range(self.shown)
        ]

    def infill(self) -> None:
        """The lower half of pictures made anew under their captions."""
        height, width = self.vocabulary.image_height, self.vocabulary.image_width
        box = (height // 2, 0, height, width)
        count = min(4, self.shown)
        codes, captions = self.pairs.codes[:count], self.pairs.captions[:count]
        documents = None if self.by_text is None else self.by_text[:count]
        made = self.generator.infill_pictures(
            list(codes),
            box,
            captions,
            documents,
            temperature=self.options.temperature,
            sampler=self.options.sampler,
            seed=self.options.seed,
        )
        self.result["infilling"] = [
            {
                "caption": captions[number],
                "before": self._save(self.reconstructions[number], f"reconstruction-{number}"),
                "masked": self._save(cover_box(self.reconstructions[number], box, (height, width)), f"masked-{number}"),
                "after": self._save(made[number].picture, f"infilled-{number}"),
                "kept_codes": int((made[number].codes == codes[number])[: box[0] * width].sum()),
                "other_codes": box[0] * width,
            }
            for number in range(count)
        ]

    def lose(self) -> None:
        """Loss on the reported documents' own tokens, with and without retrieved ones."""
        decoder, queries = self.generator.decoder, self.pairs.documents
        without = measure_loss(decoder, queries, [[] for _ in queries], self.vocabulary)
        figures = self.result["figures"]
        figures["loss_without_retrieval"], figures["loss_parts_without_retrieval"] = without["loss"], without
        figures["loss_with_retrieval"] = None
        if self.by_text is not None:
            found = measure_loss(decoder, queries, self.by_text, self.vocabulary)
            figures["loss_with_retrieval"], figures["loss_parts_with_retrieval"] = found["loss"], found
