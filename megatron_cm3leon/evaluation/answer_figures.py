"""Figures of answered questions: accuracies by group, and the metrics of ranked candidates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_cm3leon.evaluation.metrics.ratio import divide_sums
from megatron_cm3leon.evaluation.metrics.visdial import measure_ndcg, measure_rank
from megatron_cm3leon.evaluation.metrics.vqa_answers import match_any, measure_accuracy, read_letter
from megatron_cm3leon.evaluation.questions.base import Question
from megatron_cm3leon.evaluation.result import Figure, bootstrap

ACCURACIES = {
    "soft": "VQA: mean over the sets that leave one human answer out of min(1, matches / 3)",
    "exact": "1 if the answer equals one of the expected answers",
    "choice": "1 if the chosen candidate is the true one",
}
"""How an answer is judged, as the result's settings describe it."""
SOFT_ANSWERS = 10
"""Human answers per question of VQA, VizWiz and OK-VQA."""
TABLES_ONLY = ("question_type", "dialog")
"""Groups with too many values for a figure each."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """How answers are judged."""

    accuracy: str
    """A key of ACCURACIES."""
    normalizer: str = "official"
    """One of vqa_answers.MODES; of accuracies soft and exact."""
    stem: Callable[[str], str] | None = None

    def measure(self, question: Question, item: dict) -> float | None:
        """Accuracy of one answer, 0 to 1; None if the true answer is not known.

        The item has `answer`, and `choice`, the number of the chosen candidate, if candidates were ranked.
        """
        if self.accuracy == "choice":
            if question.correct is None:
                return None
            choice = item["choice"] if "choice" in item else read_letter(item["answer"], len(question.candidates))
            return float(choice == question.correct)
        if not question.answers:
            return None
        measure = measure_accuracy if self.accuracy == "soft" else match_any
        return measure(item["answer"], question.answers, self.normalizer, self.stem)


def choose_accuracy(questions: Sequence[Question], data_format: str) -> str:
    """A key of ACCURACIES: soft for ten human answers each, choice where true candidates are known, else exact."""
    if any(one.correct is not None for one in questions) or data_format in ("scienceqa", "visdial"):
        return "choice"
    if data_format in ("vqa", "vizwiz") or all(len(one.answers) >= SOFT_ANSWERS for one in questions):
        return "soft"
    return "exact"


def compute_accuracies(
    questions: Sequence[Question], items: Sequence[dict], judge: Judge, seed: int
) -> tuple[dict[str, Figure], dict]:
    """Figures in percent, with intervals over questions, and a table {group: {value: {accuracy, n}}}.

    Questions without a known answer are not counted; there are no figures if there is no other.
    """
    judged = [(one, judge.measure(one, item)) for one, item in zip(questions, items, strict=True)]
    known = [(one, 100 * value) for one, value in judged if value is not None]
    if not known:
        return {}, {}
    figures = {"accuracy": bootstrap([value for _, value in known], seed=seed, unit="%")}
    table: dict[str, dict[str, dict]] = {}
    for name in dict.fromkeys(name for one, _ in known for name in one.groups):
        values: dict[str, list[float]] = {}
        for one, value in known:
            values.setdefault(one.groups.get(name, ""), []).append(value)
        table[name] = {
            group: {"accuracy": round(float(np.mean(found)), 2), "n": len(found)} for group, found in values.items()
        }
        if name not in TABLES_ONLY:
            for group, found in values.items():
                figures[f"accuracy_{name}_{group.replace(' ', '_')}"] = bootstrap(found, seed=seed, unit="%")
    return figures, table


def compute_rank_metrics(questions: Sequence[Question], items: Sequence[dict], seed: int) -> dict[str, Figure]:
    """MRR, R@k and mean rank of the true candidates and NDCG, where they are known; intervals over dialogs.

    The items have `ranks`, the rank of each candidate.
    """
    sums: dict[str, dict[str, list[float]]] = {}
    for question, item in zip(questions, items, strict=True):
        found = {}
        if question.correct is not None:
            found = measure_rank(item["ranks"][question.correct])
        if question.relevance is not None:
            found["ndcg"] = measure_ndcg(item["ranks"], question.relevance)
        dialog = question.groups.get("dialog", question.key)
        for name, value in found.items():
            total = sums.setdefault(name, {}).setdefault(dialog, [0.0, 0.0])
            total[0], total[1] = total[0] + value, total[1] + 1
    return {name: bootstrap(np.array(list(totals.values())), divide_sums, seed=seed) for name, totals in sums.items()}
