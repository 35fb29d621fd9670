"""Captions of images: CIDEr-D, BLEU, ROUGE-L, METEOR, SPICE, of a file or of a model.

    tools/evaluate.py caption --captions results.json --references captions_val2014.json --output out/
    tools/evaluate.py caption --model exported/ --shards heldout/ --index index/ --documents 2 --output out/
    tools/evaluate.py caption --model exported/ --images images.jsonl --output out/

Files: see evaluation/caption_files.py. With a model the captions are also written as COCO results, captions.json; the
ranks of a launch share the images, and an interrupted run continues after its last batch. METEOR and SPICE need Java:
see metrics/java_captions.py.
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from megatron_cm3leon.common.cli import user_path
from megatron_cm3leon.evaluation.caption_files import (
    match_images,
    read_captions,
    read_references,
    write_coco_results,
)
from megatron_cm3leon.evaluation.caption_generation import (
    CaptionSettings,
    ImageSet,
    ShardImages,
    generate_captions,
    open_images,
    select_images,
)
from megatron_cm3leon.evaluation.caption_scores import METRICS, TOKENIZERS, Scores, check_metrics, score_captions
from megatron_cm3leon.evaluation.ranks import Ranks
from megatron_cm3leon.evaluation.result import Result, hash_input
from megatron_cm3leon.generation.decoder import KINDS
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.prompts import CAPTION_FORMS, choose_caption_form
from megatron_cm3leon.generation.retrieved import DocumentSource
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.tokenizers.vocab import check_same_vocabulary

EXAMPLES = 16
"""Images that the result shows."""
CIDER_NOTE = "cider-d: its document frequencies are those of all scored images, in every resample of the interval."
"""What the interval of CIDEr-D is of."""


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """Captions to score, one per image, and where they are from."""

    keys: list[str]
    captions: dict[str, str]
    references: dict[str, list[str]]
    settings: dict
    inputs: dict[str, str]
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class _Generation:
    """Options of captions that a model generates, named as the command's."""

    model: str | Path
    references: str | Path | None
    shards: str | Path | None
    images: str | Path | None
    count: int | None
    index: str | Path | None
    documents: int | None
    encoder: str | Path | None
    form: str
    longest: int
    temperature: float
    top_p: float
    batch_size: int
    seed: int
    dtype: str
    device: str


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`, except `output`."""
    add = parser.add_argument
    add("--references", type=user_path, help="COCO annotations, or JSON Lines with image_id and captions")
    add("--captions", type=user_path, help="captions to score: COCO results, or JSON Lines with image_id and caption")
    add("--allow-missing", action="store_true", help="score only the images that --captions has a caption of")
    add("--model", type=user_path, help="generate captions with it: folder of tools/convert_checkpoint.py export")
    add("--shards", type=user_path, help="shards whose images --model captions")
    add("--images", type=user_path, help="JSON Lines with image and captions, whose images --model captions")
    add("--count", type=int, help="caption this many random images (default: all)")
    add("--index", type=user_path, help="index to retrieve documents from; without it nothing is retrieved")
    add("--documents", type=int, help="retrieved documents per image (default with --index: as in training)")
    add("--encoder", type=user_path, help="CLIP folder, if it was moved since the index recorded its path")
    add("--form", choices=CAPTION_FORMS, default="auto", help="continue after the image, or fill a masked caption")
    add("--longest", type=int, default=64, help="text pieces of a caption, at most")
    add("--temperature", type=float, default=0.0, help="of generated captions; 0 is greedy")
    add("--top-p", type=float, default=1.0, help="draw among the most likely pieces with this total probability")
    add("--batch-size", type=int, default=32, help="images per batch, after which an interrupted run continues")
    add("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="what to compute")
    add("--tokenizer", choices=TOKENIZERS, default="python", help="of the captions: own, or pycocoevalcap's PTB jar")
    add("--seed", type=int, default=0, help="of the intervals, of the choice of images and of sampling")
    add("--dtype", choices=KINDS, default="fp32", help="type of the model's matrices")
    add("--device", default="auto", help="cpu, cuda, or auto: CUDA if there is a device")


def evaluate(
    *,
    output: str | Path,
    references: str | Path | None = None,
    captions: str | Path | None = None,
    allow_missing: bool = False,
    model: str | Path | None = None,
    shards: str | Path | None = None,
    images: str | Path | None = None,
    count: int | None = None,
    index: str | Path | None = None,
    documents: int | None = None,
    encoder: str | Path | None = None,
    form: str = "auto",
    longest: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 32,
    metrics: Sequence[str] = METRICS,
    tokenizer: str = "python",
    seed: int = 0,
    dtype: str = "fp32",
    device: str = "auto",
    ranks: Ranks | None = None,
) -> Result | None:
    """Score captions, x 100: either those of the file `captions`, or those that `model` generates.

    None on ranks other than the first, which only generate. ValueError for options that exclude each other, and for
    files whose images do not match.
    """
    ranks = ranks or Ranks()
    check_metrics(metrics, tokenizer)  # before anything is generated
    if (captions is None) == (model is None):
        raise ValueError("give either --captions FILE to score it, or --model FOLDER to generate captions.")
    subject: _Subject | None
    if captions is not None:
        ranks.require_one("the task caption with --captions")
        given = {"shards": shards, "images": images, "count": count, "index": index, "documents": documents}
        _refuse({**given, "encoder": encoder}, "--model, which generates captions")
        subject = _read_subject(captions, references, allow_missing)
    else:
        _refuse({"allow-missing": allow_missing or None}, "--captions")
        options = _Generation(
            model=model or "", references=references, shards=shards, images=images, count=count, index=index,
            documents=documents, encoder=encoder, form=form, longest=longest, temperature=temperature, top_p=top_p,
            batch_size=batch_size, seed=seed, dtype=dtype, device=device,
        )  # fmt: skip
        subject = _generate_subject(options, Path(output), ranks)
        if subject is None:
            return None
    scores = score_captions(
        [subject.captions[key] for key in subject.keys],
        [subject.references[key] for key in subject.keys],
        metrics,
        tokenizer=tokenizer,
        seed=seed,
    )
    return Result(
        task="caption",
        figures=scores.figures,
        settings={"metrics": list(metrics), "tokenizer": tokenizer, **subject.settings},
        seed=seed,
        inputs=subject.inputs,
        versions=scores.versions,
        notes=[*subject.notes, *scores.notes, *([CIDER_NOTE] if "cider-d" in scores.figures else [])],
        tables={"examples": _choose_examples(subject, scores)},
    )


def _refuse(options: dict, purpose: str) -> None:
    """ValueError if one of `options`, by name, is given, though `purpose` is not."""
    if given := [f"--{name}" for name, value in options.items() if value is not None]:
        verb = "is" if len(given) == 1 else "are"
        raise ValueError(f"{' and '.join(given)} {verb} for {purpose}; remove it, or give that as well.")


def _read_subject(captions: str | Path, references: str | Path | None, allow_missing: bool) -> _Subject:
    """Captions and references of two files."""
    if references is None:
        raise ValueError("--captions needs --references FILE, the references to score them against.")
    scored, targets = read_captions(captions), read_references(references).captions
    keys = match_images(scored, targets, allow_missing)
    skipped = len(targets) - len(keys)
    return _Subject(
        keys=keys,
        captions=scored,
        references=targets,
        settings={"allow_missing": allow_missing},
        inputs={"captions": hash_input(captions), "references": hash_input(references)},
        notes=[f"{skipped} of {len(targets)} images have no caption and are not scored."] if skipped else [],
    )


def _generate_subject(options: _Generation, output: Path, ranks: Ranks) -> _Subject | None:
    """Captions of a model, which are also written to captions.json; None on ranks other than the first."""
    if (options.shards is None) == (options.images is None):
        raise ValueError("--model needs either --shards FOLDER or --images FILE, the images to caption.")
    if options.index is None:
        _refuse({"documents": options.documents or None, "encoder": options.encoder}, "--index, to retrieve from")
    images = open_images(options.shards, options.images, options.references)
    keys = select_images(images, options.count, options.seed)
    inputs = ranks.from_first(lambda: _hash_inputs(options, images))
    generator = Generator.load(options.model, options.dtype, ranks.resolve_device(options.device))
    if isinstance(images, ShardImages):
        check_same_vocabulary(generator.vocabulary, images.corpus.vocabulary, f"the shards at {options.shards}")
    documents = generator.training_documents if options.documents is None else options.documents
    settings = CaptionSettings(
        sampling=Sampling(temperature=options.temperature, top_p=options.top_p, seed=options.seed),
        form=choose_caption_form(options.form, generator.training),
        longest=options.longest,
        documents=documents if options.index else 0,
        batch_size=options.batch_size,
    )
    source = _load_source(options, settings, generator, images)
    recorded = {
        "count": options.count,
        "documents": settings.documents,
        "form": settings.form,
        "longest": settings.longest,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "sampler": settings.sampling.sampler,
        "dtype": options.dtype,
        "device": generator.decoder.words.device.type,
    }
    with closing(ranks.open_items(output, {"settings": recorded, "inputs": inputs, "seed": options.seed})) as finished:
        generate_captions(generator, images, keys, settings, source, finished, ranks)
    if not ranks.first:
        return None
    captions = {key: finished.items[key]["caption"] for key in keys}
    write_coco_results(output / "captions.json", captions)
    fewer = sum(len(finished.items[key]["retrieved"]) < settings.documents for key in keys) if source else 0
    note = (
        f"{fewer} of {len(keys)} images had fewer than {settings.documents} retrieved documents: the context of "
        f"{generator.decoder.context} tokens has no room beside a caption of {settings.longest}; --longest makes room."
    )
    return _Subject(
        keys=keys,
        captions=captions,
        references=images.references,
        settings=recorded,
        inputs=inputs,
        notes=[*images.notes, *([note] if fewer else [])],
    )


def _hash_inputs(options: _Generation, images: ImageSet) -> dict[str, str]:
    """SHA-256 of everything that is read; of shards the identity of their documents, from the manifest's checksums."""
    paths = {"model": options.model, "references": options.references, "images": options.images, "index": options.index}
    inputs = {name: hash_input(path) for name, path in paths.items() if path is not None}
    return inputs | ({"shards": images.corpus.identity} if isinstance(images, ShardImages) else {})


def _load_source(
    options: _Generation, settings: CaptionSettings, generator: Generator, images: ImageSet
) -> DocumentSource | None:
    """The index; None without documents. ValueError if it would retrieve the images' own captions."""
    if options.index is None or not settings.documents:
        return None
    source = DocumentSource.load(options.index, generator.vocabulary, options.encoder)
    if isinstance(images, ShardImages) and images.corpus.identity == source.bank.identity:
        raise ValueError(
            f"--shards ({options.shards}) is the memory bank of {options.index}, so each image would retrieve its own "
            f"caption; give shards that are not in the index."
        )
    return source


def _choose_examples(subject: _Subject, scores: Scores) -> list[dict]:
    """The first images with their captions and scores."""
    return [
        {"image": key, "caption": subject.captions[key], "references": subject.references[key]}
        | {name: round(rows[number], 2) for name, rows in scores.rows.items()}
        for number, key in enumerate(subject.keys[:EXAMPLES])
    ]
