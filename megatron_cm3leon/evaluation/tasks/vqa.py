"""Answers to questions about images: VQA v2, OK-VQA, VizWiz, ScienceQA, VisDial, or a file of JSON Lines.

    --method generate    free answers, by VQA's official accuracy; letters of the options for scienceqa
    --method rank        the candidate of the highest likelihood: of each question, or of the file --candidates; visdial

Beside vqa.json, submission.json holds the answers in the form in which the leaderboards take them: for test sets, whose
answers are not public, it is the only result. The ranks of a launch share the questions.
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from megatron_cm3leon.common.cli import user_path
from megatron_cm3leon.evaluation.answer_figures import (
    ACCURACIES,
    Judge,
    choose_accuracy,
    compute_accuracies,
    compute_rank_metrics,
)
from megatron_cm3leon.evaluation.answering import Answerer, list_choices
from megatron_cm3leon.evaluation.metrics.visdial import rank_candidates
from megatron_cm3leon.evaluation.metrics.vqa_answers import FEWEST_ANSWERS, MODES, build_stemmer, read_letter
from megatron_cm3leon.evaluation.questions import READERS, read_questions
from megatron_cm3leon.evaluation.questions.base import Question, QuestionFiles
from megatron_cm3leon.evaluation.ranks import Ranks
from megatron_cm3leon.evaluation.result import Result, hash_input, read_versions
from megatron_cm3leon.generation.decoder import KINDS
from megatron_cm3leon.generation.generator import Generator

METHODS = ("generate", "rank")
MOST_SHOTS = 8
AT_ONCE = 32
"""Questions that are answered in one call."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of tools/evaluate.py vqa."""
    add = parser.add_argument
    add("--model", type=user_path, required=True, help="folder that tools/convert_checkpoint.py export wrote")
    add("--format", choices=list(READERS), required=True, help="of the questions")
    add("--questions", type=user_path, required=True, help="file of the questions")
    add("--annotations", type=user_path, help="human answers of vqa, dense relevances of visdial")
    add("--images", type=user_path, help="folder of the images (default: the folder of the questions)")
    add("--image-name", help="name of an image file by its id, such as COCO_val2014_{image_id:012d}.jpg")
    add("--split", default="test", help="part of scienceqa")
    add("--method", choices=METHODS, help="free answers or ranked candidates (default: rank for visdial)")
    add("--candidates", type=user_path, help="answers to rank for every question, one per line")
    add("--choices", choices=("letters", "texts"), default="letters", help="what is ranked of scienceqa's options")
    add("--length-normalized", action="store_true", help="rank by log-probability per token, not by its sum")
    add("--normalizer", choices=MODES, default="official", help="of answers: VQA's, or that of lmms-eval")
    add("--answers", choices=("processed", "raw"), default="processed", help="answers of OK-VQA that are compared")
    add("--stemmed", action="store_true", help="compare Porter stems, for OK-VQA")
    add("--shots", type=int, default=0, help=f"in-context examples, 0 to {MOST_SHOTS}")
    add("--examples", type=user_path, help="JSON Lines of questions with images and answers, to take examples from")
    add("--longest", type=int, default=16, help="text pieces of a free answer, at most")
    add("--count", type=int, help="questions, the first ones of the file (default: all)")
    add("--seed", type=int, default=0, help="of the choice of examples and of the intervals")
    add("--dtype", choices=KINDS, default="fp32", help="type of the model's matrices")
    add("--device", default="auto", help="cpu, cuda, or auto: CUDA if there is a device")


# Longer than a screen: its arguments are the options of the command, and each of them is a line.
def evaluate(
    *,
    output: str | Path,
    model: str | Path,
    format: str,
    questions: str,
    annotations: str | None = None,
    images: str | None = None,
    image_name: str | None = None,
    split: str = "test",
    method: str | None = None,
    candidates: str | None = None,
    choices: str = "letters",
    length_normalized: bool = False,
    normalizer: str = "official",
    answers: str = "processed",
    stemmed: bool = False,
    shots: int = 0,
    examples: str | None = None,
    longest: int = 16,
    count: int | None = None,
    seed: int = 0,
    dtype: str = "fp32",
    device: str = "auto",
    ranks: Ranks | None = None,
) -> Result | None:
    """Answer the questions and measure the answers; an interrupted evaluation continues from `output`.

    None on ranks other than the first. ValueError for files that do not match, missing images, questions that do not
    fit into the context, and options that do not belong together.
    """
    ranks = ranks or Ranks()
    method = method or ("rank" if format == "visdial" else "generate")
    _check_options(format, method, shots, examples, longest, count)
    read = {"questions": questions, "annotations": annotations, "examples": examples, "candidates": candidates}
    inputs = ranks.from_first(
        lambda: {name: hash_input(path) for name, path in ({"model": model} | read).items() if path}
    )
    files = QuestionFiles(
        format=format,
        questions=questions,
        annotations=annotations,
        images=images,
        image_name=image_name,
        split=split,
        raw_answers=answers == "raw",
    )
    asked = _prepare(read_questions(files)[:count], method, format, choices, candidates)
    accuracy = choose_accuracy(asked, format)
    _check_answers(asked, accuracy)
    judge = Judge(accuracy=accuracy, normalizer=normalizer, stem=build_stemmer() if stemmed else None)
    settings = {
        "format": format, "method": method, "split": split if format == "scienceqa" else None, "count": count,
        "accuracy": ACCURACIES[accuracy], "normalizer": normalizer, "answers": answers,
        "stemmed": "Porter stems of both sides" if stemmed else False, "choices": choices,
        "score": f"log-probability of the answer and <eoss>{' per token' if length_normalized else ', summed'}",
        "shots": shots, "longest": longest, "dtype": dtype,
    }  # fmt: skip
    shown = _read_examples(examples, format, choices)
    generator = Generator.load(model, dtype, ranks.resolve_device(device))
    answerer = Answerer(generator, shown, shots, seed, longest, length_normalized)
    answerer.check_lengths(asked, ranked=method == "rank")
    with closing(ranks.open_items(output, {"settings": settings, "inputs": inputs, "seed": seed})) as finished:
        ranks.finish_items(
            {one.key: one for one in asked},
            partial(_answer, answerer, method),
            finished,
            batch_size=AT_ONCE,
            label="vqa",
            unit="questions",
        )
    if not ranks.first:
        return None
    items = [finished.items[one.key] for one in asked]
    return _build_result(asked, items, judge, output, settings=settings, inputs=inputs, seed=seed)


def _read_examples(path: str | None, format: str, choices: str) -> list[Question]:
    """Questions that in-context examples are drawn from, in the form of those that are asked."""
    if not path:
        return []
    examples = read_questions(QuestionFiles(format="jsonl", questions=path))
    if format == "scienceqa" and choices == "letters":
        return [list_choices(one) if one.correct is not None else one for one in examples]
    return examples


def _check_options(format: str, method: str, shots: int, examples: str | None, longest: int, count: int | None) -> None:
    if format == "visdial" and method != "rank":
        raise ValueError(f"method ({method}) must be rank for the format visdial, which has candidates.")
    if not 0 <= shots <= MOST_SHOTS:
        raise ValueError(f"shots ({shots}) must be 0 to {MOST_SHOTS}.")
    if shots and not examples:
        raise ValueError(f"shots ({shots}) requires a file to take examples from; give --examples.")
    for name, value in (("longest", longest), ("count", count)):
        if value is not None and value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1.")


def _prepare(
    questions: Sequence[Question], method: str, format: str, choices: str, candidates: str | None
) -> list[Question]:
    """Questions as the model reads them, with the candidates that are ranked."""
    if candidates and method != "rank":
        raise ValueError(f"candidates ({candidates}) requires --method rank.")
    if candidates:
        lines = Path(candidates).read_text(encoding="utf-8").splitlines()
        listed = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if not listed:
            raise ValueError(f"candidates ({candidates}) has no answers; write one per line.")
        return [replace(one, candidates=listed, correct=None, relevance=None) for one in questions]
    without = next((one for one in questions if not one.candidates), None)
    if method == "rank" and without:
        raise ValueError(f"method (rank): question {without.key} has no candidates; give --candidates.")
    if format == "scienceqa" and (method == "generate" or choices == "letters"):
        return [list_choices(one) for one in questions]
    return list(questions)


def _check_answers(questions: Sequence[Question], accuracy: str) -> None:
    few = [one for one in questions if 0 < len(one.answers) < FEWEST_ANSWERS]
    if accuracy == "soft" and few:
        raise ValueError(
            f"question {few[0].key} has {len(few[0].answers)} human answers; VQA's accuracy needs at least "
            f"{FEWEST_ANSWERS}. Give the data set as jsonl, whose answers are compared exactly."
        )


def _answer(answerer: Answerer, method: str, questions: list[Question]) -> list[dict]:
    """The items of questions: generated answers, or the best candidates."""
    if method == "generate":
        return [{"answer": answer} for answer in answerer.generate(questions)]
    return [_describe_ranks(*each) for each in zip(questions, answerer.score(questions), strict=True)]


def _describe_ranks(question: Question, scores: np.ndarray) -> dict:
    """The item of a question: its best candidate, and all ranks where metrics or submissions need them."""
    ranks = rank_candidates(scores).tolist()
    best = ranks.index(1)
    item = {"answer": question.candidates[best], "choice": best}
    needed = question.relevance is not None or "dialog" in question.groups
    return item | {"ranks": ranks} if needed else item


def _build_result(
    questions: Sequence[Question],
    items: Sequence[dict],
    judge: Judge,
    output: str | Path,
    *,
    settings: dict,
    inputs: dict[str, str],
    seed: int,
) -> Result:
    """Figures of the answers; writes submission.json."""
    figures, table = compute_accuracies(questions, items, judge, seed)
    if settings["format"] == "visdial":
        figures, table = {}, {}  # r@1 is the accuracy
    ranked = [(one, item) for one, item in zip(questions, items, strict=True) if "ranks" in item]
    if ranked:
        figures |= compute_rank_metrics([one for one, _ in ranked], [item for _, item in ranked], seed)
    answer = "ranks" if settings["format"] == "visdial" else "answer"
    submission = [{**one.submission, answer: item[answer]} for one, item in zip(questions, items, strict=True)]
    (Path(output) / "submission.json").write_text(json.dumps(submission, ensure_ascii=False) + "\n")
    notes = ["submission.json has the answers in the form of the leaderboards."]
    if not figures:
        notes.append("the questions have no answers, so there are no figures.")
    if judge.accuracy == "choice" and settings["method"] == "generate":
        letters = [read_letter(item["answer"], len(one.candidates)) for one, item in zip(questions, items, strict=True)]
        unread = letters.count(None)
        notes.append(f"{unread} of {len(items)} answers are not a letter of their options, and count as wrong.")
    examples = [{"question": one.text, **items[number]} for number, one in enumerate(questions[:8])]
    return Result(
        task="vqa",
        figures=figures,
        settings=settings,
        seed=seed,
        inputs=inputs,
        versions=read_versions(["snowballstemmer"]) if judge.stem else {},
        notes=notes,
        tables={"groups": table, "examples": examples},
    )
