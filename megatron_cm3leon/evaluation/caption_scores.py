"""Scores of generated captions against references: each metric with its bootstrap interval, and what could not be run.

All scores are x 100, as papers print them: CIDEr-D 120 is what pycocoevalcap prints as 1.2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from megatron_cm3leon.common.progress import track
from megatron_cm3leon.evaluation.metrics.bleu import compute_bleu, count_matches
from megatron_cm3leon.evaluation.metrics.cider import Cider
from megatron_cm3leon.evaluation.metrics.java_captions import (
    align_meteor,
    compute_spice,
    explain_missing,
    read_java_version,
    score_meteor,
    tokenize_with_java,
)
from megatron_cm3leon.evaluation.metrics.ngrams import LONGEST
from megatron_cm3leon.evaluation.metrics.ptb_tokenizer import tokenize
from megatron_cm3leon.evaluation.metrics.rouge import compute_rouge
from megatron_cm3leon.evaluation.result import Figure, bootstrap, read_versions

METRICS = ("bleu", "cider", "rouge", "meteor", "spice")
JAVA_METRICS = ("meteor", "spice")
TOKENIZERS = ("python", "java")
_SCALE = 100.0
_UNIT = "x 100"

Tokens = list[str]


@dataclass
class Scores:
    """Figures of captions, and what a reader must know about them."""

    figures: dict[str, Figure] = field(default_factory=dict)
    rows: dict[str, list[float]] = field(default_factory=dict)
    """Score of each image, x 100, for the metrics that have one per image."""
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


def check_metrics(metrics: Sequence[str], tokenizer: str) -> tuple[list[str], list[str]]:
    """The metrics that can run on this machine, and a note about the others; ValueError if none can."""
    if tokenizer == "java" and (reason := explain_missing("tokenizer")):
        raise ValueError(f"--tokenizer java cannot run: {reason}. The tokenizer python needs no Java.")
    reasons: dict[str, list[str]] = {}
    for name in metrics:
        if name in JAVA_METRICS and (reason := explain_missing(name)):
            reasons.setdefault(reason, []).append(name)
    notes = [f"{' and '.join(names)} {_is(names)} off: {reason}." for reason, names in reasons.items()]
    runnable = [name for name in METRICS if name in metrics and not any(name in names for names in reasons.values())]
    if not runnable:
        raise ValueError(" ".join(notes) or "--metrics names no metric.")
    return runnable, notes


def score_captions(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str] = METRICS,
    *,
    tokenizer: str = "python",
    seed: int = 0,
) -> Scores:
    """Score the caption of each image against its references.

    A metric that this machine cannot run is named in the notes, with the reason. Intervals are over resampled images;
    CIDEr-D's document frequencies stay those of all images. ValueError if no metric can be computed.
    """
    runnable, notes = check_metrics(metrics, tokenizer)
    if len(captions) == 1 and "cider" in runnable:
        notes.append("cider is off: its weights are 0 in a set of one image; at least 2 images are required.")
        runnable.remove("cider")
        if not runnable:
            raise ValueError(notes[-1])
    tokens, reference_tokens = _tokenize(captions, references, tokenizer)
    scores = Scores(notes=notes, versions=_read_java_versions(runnable, tokenizer))
    if empty := sum(not each for each in tokens):
        scores.notes.append(f"{empty} of {len(tokens)} captions have no words; their scores are 0.")
    for name in runnable:
        _SCORERS[name](scores, tokens, reference_tokens, seed)
    if len(captions) == 1:
        scores.figures = {name: Figure(each.value, n=1, unit=each.unit) for name, each in scores.figures.items()}
    return scores


def _tokenize(
    captions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str
) -> tuple[list[Tokens], list[list[Tokens]]]:
    """Tokens of each caption and of the references of each image."""
    texts = [*captions, *(text for group in references for text in group)]
    if tokenizer == "java":
        tokens = iter(tokenize_with_java(texts))
    else:
        tokens = iter([tokenize(text) for text in track(texts, label="tokenizing", unit="captions")])
    return [next(tokens) for _ in captions], [[next(tokens) for _ in group] for group in references]


def _score_bleu(scores: Scores, captions: list[Tokens], references: list[list[Tokens]], seed: int) -> None:
    counts = np.stack([count_matches(*pair) for pair in zip(captions, references, strict=True)])
    for n in range(1, LONGEST + 1):
        statistic = partial(_compute_scaled_bleu, n=n)
        scores.figures[f"bleu-{n}"] = bootstrap(counts, statistic, seed=seed, unit=_UNIT)


def _compute_scaled_bleu(counts: np.ndarray, n: int) -> float:
    return _SCALE * compute_bleu(counts, n)


def _score_cider(scores: Scores, captions: list[Tokens], references: list[list[Tokens]], seed: int) -> None:
    cider = Cider(references)
    pairs = track(list(zip(captions, references, strict=True)), label="CIDEr-D", unit="captions")
    _add_mean(scores, "cider-d", [cider.score(*pair) for pair in pairs], seed)


def _score_rouge(scores: Scores, captions: list[Tokens], references: list[list[Tokens]], seed: int) -> None:
    rows = [compute_rouge(*pair) for pair in zip(captions, references, strict=True)]
    _add_mean(scores, "rouge-l", rows, seed)


def _score_meteor(scores: Scores, captions: list[Tokens], references: list[list[Tokens]], seed: int) -> None:
    counts = align_meteor(captions, references)
    scores.figures["meteor"] = bootstrap(counts, lambda rows: _SCALE * score_meteor(rows), seed=seed, unit=_UNIT)


def _score_spice(scores: Scores, captions: list[Tokens], references: list[list[Tokens]], seed: int) -> None:
    _add_mean(scores, "spice", compute_spice(captions, references), seed)


_SCORERS: dict[str, Callable[[Scores, list[Tokens], list[list[Tokens]], int], None]] = {
    "bleu": _score_bleu,
    "cider": _score_cider,
    "rouge": _score_rouge,
    "meteor": _score_meteor,
    "spice": _score_spice,
}


def _add_mean(scores: Scores, name: str, rows: Sequence[float] | np.ndarray, seed: int) -> None:
    """A metric whose corpus score is the mean over the images."""
    scaled = _SCALE * np.asarray(rows, np.float64)
    scores.figures[name] = bootstrap(scaled, seed=seed, unit=_UNIT)
    scores.rows[name] = scaled.tolist()


def _read_java_versions(metrics: Sequence[str], tokenizer: str) -> dict[str, str]:
    """Versions of what METEOR, SPICE and the PTB tokenizer ran on, if one of them did."""
    if tokenizer != "java" and not set(metrics) & set(JAVA_METRICS):
        return {}
    return {"java": read_java_version()} | read_versions(["pycocoevalcap"])


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
