"""CLIP score of images and their captions, and of the best of N candidates that another encoder chose.

    python tools/evaluate.py clip --images generated/ --captions heldout.jsonl --encoder clip/ --output results/
    python tools/evaluate.py clip --images candidates/ --captions heldout.jsonl --encoder clip/ --ranker other-clip/ \\
        --rank-folders ranked/ --output results/

The encoder is a CLIP folder: a published CLIPModel, or what tools/train_clip.py writes. Its name is part of the number.
candidates/ has folders 0..N-1 with an image of each caption. The ranker chooses, the encoder measures: a score by the
encoder that chose would be circular. --rank-folders writes the candidates as ranked/0 (best) to ranked/N-1, of which
the task fid measures each. The ranks of a launch share the captions.
"""

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from megatron_cm3leon.common.cli import user_path
from megatron_cm3leon.evaluation.metrics.captions import CaptionedImage, check_candidates, read_captions
from megatron_cm3leon.evaluation.metrics.image_folder import find_rank_folders, hash_images, read_image
from megatron_cm3leon.evaluation.ranks import Ranks
from megatron_cm3leon.evaluation.result import Figure, Result, bootstrap, hash_input, read_versions
from megatron_cm3leon.retrieval.encoder import Encoder

SHOWN = 24
"""Images that a report shows."""
FORMULAS = {"torchmetrics": 100.0, "hessel": 2.5}
"""Name -> factor w of w * max(cos, 0): torchmetrics' CLIPScore, and CLIPScore of Hessel et al. (2104.08718)."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the task."""
    add = parser.add_argument
    add("--images", type=user_path, required=True, help="folder of images, or of candidate folders 0..N-1")
    add("--captions", type=user_path, help="JSON Lines with image and caption, or generated.json (default: NAME.txt)")
    add("--encoder", type=user_path, required=True, help="CLIP folder that measures")
    add("--ranker", type=user_path, help="another CLIP folder, which chooses among the candidates")
    add("--rank-folders", type=user_path, help="new folder to write the candidates to, by rank")
    add("--formula", choices=FORMULAS, default="torchmetrics", help="100 * max(cos, 0), or 2.5 * max(cos, 0)")
    add("--prefix", default="", help='before each caption the encoder reads; Hessel et al. use "A photo depicts "')
    add("--batch-size", type=int, default=64, help="captions per batch")
    add("--seed", type=int, default=0, help="of the bootstrap resamples")
    add("--device", default="auto", help="cpu, cuda, or auto: CUDA if there is a device")


def evaluate(
    *,
    output: str | Path,
    images: str | Path,
    encoder: str | Path,
    captions: str | Path | None = None,
    ranker: str | Path | None = None,
    rank_folders: str | Path | None = None,
    formula: str = "torchmetrics",
    prefix: str = "",
    batch_size: int = 64,
    seed: int = 0,
    device: str = "auto",
    ranks: Ranks | None = None,
) -> Result | None:
    """Score captioned images; None on ranks other than the first.

    ValueError for input that cannot be scored, and for a ranker that is the encoder.
    """
    ranks = ranks or Ranks()
    folders = find_rank_folders(images) or [Path(images)]
    _check_ranking(folders, images, ranker, rank_folders)
    pairs, without = read_captions(folders[0], captions)
    check_candidates(folders, pairs)
    device = ranks.resolve_device(device)
    measuring = Encoder.load(encoder, device)
    ranking = Encoder.load(ranker, device) if ranker else None
    files = [folder / pair.name for folder in folders for pair in pairs]
    inputs = {"images": ranks.from_first(lambda: hash_images(Path(images), files)), "encoder": measuring.sha256}
    inputs |= {"captions": hash_input(captions)} if captions else {}
    if ranking:
        inputs["ranker"] = ranking.sha256
        if ranking.sha256 == measuring.sha256:
            raise ValueError(
                f"--ranker ({ranker}) and --encoder are the same encoder; give another one to measure with."
            )
    with closing(ranks.open_items(output, {"task": "clip", "inputs": inputs, "prefix": prefix})) as finished:
        ranks.finish_items(
            {pair.name: pair for pair in pairs},
            partial(_score, folders, measuring, ranking, prefix),
            finished,
            batch_size=batch_size,
            label="CLIP score",
            unit="captions",
        )
    if not ranks.first:
        return None
    items = [finished.items[pair.name] for pair in pairs]
    figures, best = _figures(items, FORMULAS[formula], formula, seed)
    if rank_folders and ranking:
        _write_rank_folders(Path(rank_folders), folders, pairs, best)
    return Result(
        task="clip",
        figures=figures,
        settings={
            "formula": f"{FORMULAS[formula]:g} * max(cos, 0)",
            "prefix": prefix,
            "candidates": len(folders),
            "positions": measuring.positions,
        },
        seed=seed,
        inputs=inputs,
        versions=read_versions(("transformers",)),
        notes=_notes(items, measuring, without),
        tables={"images": _list_images(folders, pairs, items, best, FORMULAS[formula])},
    )


def _check_ranking(
    folders: Sequence[Path], images: str | Path, ranker: object, rank_folders: str | Path | None
) -> None:
    if ranker and len(folders) < 2:
        raise ValueError(
            f"--ranker chooses among candidates, but {images} has no candidate folders 0..N-1; write them."
        )
    if rank_folders and not ranker:
        raise ValueError(f"--rank-folders ({rank_folders}) requires --ranker, which ranks the candidates.")
    if rank_folders and Path(rank_folders).exists():
        raise ValueError(f"--rank-folders ({rank_folders}) exists; give a new folder.")


def _score(
    folders: Sequence[Path], measuring: Encoder, ranking: Encoder | None, prefix: str, batch: list[CaptionedImage]
) -> Iterator[dict]:
    """One item per caption: cosines of its candidates by each encoder, and whether it was truncated."""
    texts = [prefix + pair.caption for pair in batch]
    images = [[read_image(folder / pair.name) for folder in folders] for pair in batch]
    cosines = _compute_cosines(measuring, texts, images)
    ranked = _compute_cosines(ranking, texts, images) if ranking else None
    for number, text in enumerate(texts):
        item = {"cosines": cosines[number].tolist()}
        item["truncated"] = measuring.count_tokens(text) > measuring.positions - 2
        if ranked is not None:
            item["ranker"] = ranked[number].tolist()
        yield item


def _compute_cosines(encoder: Encoder, texts: Sequence[str], images: Sequence[Sequence]) -> np.ndarray:
    """Cosines [captions, candidates]; ValueError for vectors that are not finite."""
    text_vectors = encoder.encode_texts(texts)
    image_vectors = encoder.encode_images([image for row in images for image in row])
    cosines = np.einsum("td,tcd->tc", text_vectors, image_vectors.reshape(len(texts), -1, encoder.width))
    if not np.isfinite(cosines).all():
        raise ValueError(f"{encoder.folder} has vectors that are not finite numbers (NaN); check its weights.")
    return cosines.astype(np.float64)


def _figures(items: Sequence[dict], factor: float, formula: str, seed: int) -> tuple[dict[str, Figure], np.ndarray]:
    """Figures, and the candidates of each caption from best to worst [captions, candidates]."""
    scores = factor * np.array([item["cosines"] for item in items]).clip(0)
    name, unit = f"clip-score-{formula}", f"{factor:g} * max(cos, 0)"
    figures = {name: bootstrap(scores.mean(axis=1), seed=seed, unit=unit)}
    if "ranker" not in items[0]:
        return figures, np.zeros((len(items), 1), np.int64)
    order = np.argsort(-np.array([item["ranker"] for item in items]), axis=1, kind="stable")
    chosen = np.take_along_axis(scores, order[:, :1], axis=1)[:, 0]
    figures[f"{name}-best-of-{scores.shape[1]}"] = bootstrap(chosen, seed=seed, unit=unit)
    return figures, order


def _list_images(
    folders: Sequence[Path], pairs: Sequence[CaptionedImage], items: Sequence[dict], order: np.ndarray, factor: float
) -> list[dict[str, str]]:
    """The first images with their captions and scores; of several candidates the one that the ranker chose."""
    rows = []
    for pair, item, candidates in zip(pairs[:SHOWN], items, order, strict=False):
        score = factor * max(0.0, item["cosines"][candidates[0]])
        path = (folders[candidates[0]] / pair.name).resolve()
        rows.append({"path": str(path), "caption": pair.caption, "note": f"score {score:.4g}"})
    return rows


def _notes(items: Sequence[dict], encoder: Encoder, without: int) -> list[str]:
    truncated = sum(item["truncated"] for item in items)
    notes = []
    if truncated:
        notes.append(
            f"{truncated:,} of {len(items):,} captions have more than {encoder.positions - 2} tokens and were "
            f"truncated; their end token was kept."
        )
    if without:
        notes.append(f"{without:,} images without a caption were not scored.")
    return notes


def _write_rank_folders(
    output: Path, folders: Sequence[Path], pairs: Sequence[CaptionedImage], order: np.ndarray
) -> None:
    """Link candidate order[i, r] of caption i as output/r/NAME, or copy it where there are no links."""
    for source, target in _ranked_files(output, folders, pairs, order):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


def _ranked_files(
    output: Path, folders: Sequence[Path], pairs: Sequence[CaptionedImage], order: np.ndarray
) -> Iterator[tuple[Path, Path]]:
    """(file of a candidate, file of its rank)."""
    for pair, candidates in zip(pairs, order, strict=True):
        for rank, candidate in enumerate(candidates):
            yield folders[candidate] / pair.name, output / str(rank) / pair.name
