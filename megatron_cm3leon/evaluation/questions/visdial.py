"""Visual Dialog (visdial_1.0_*.json): each round of a dialog is a question with 100 candidate answers.

    {"split": "val2018",
     "data": {"questions": [text], "answers": [text],
              "dialogs": [{"image_id", "caption", "dialog": [{"question", "answer", "answer_options", "gt_index"}]}]}}

`question`, `answer` and `answer_options` are numbers in the lists of texts. The dense annotations,
[{"image_id", "round_id", "gt_relevance" or "relevance"}], have the relevance of every candidate of one round of each
dialog; rounds are counted from 1. Before a question the model reads the caption and the earlier rounds with their true
answers. Rounds of a test set have candidates in the last round only.
"""

from collections.abc import Iterator
from pathlib import Path

from megatron_cm3leon.data.tasks.annotations import load_json
from megatron_cm3leon.evaluation.questions.base import (
    Question,
    QuestionFiles,
    build_image_path,
    check_choice,
)
from megatron_cm3leon.generation.prompts import split_answer_template


def read_visdial(files: QuestionFiles) -> Iterator[Question]:
    """Rounds that have candidates, dialog by dialog; ValueError for dense annotations of other dialogs."""
    content = load_json(files.questions)
    data, split = content["data"], str(content.get("split", "val2018"))
    form = "COCO_train2014_{image_id:012d}.jpg" if split == "train" else f"VisualDialog_{split}_{{image_id:012d}}.jpg"
    relevances = _read_relevances(files.annotations) if files.annotations else {}
    _check_rounds(relevances, data["dialogs"], files)
    for dialog in data["dialogs"]:
        image = build_image_path(files, form, dialog["image_id"])
        for number in range(len(dialog["dialog"])):
            relevance = relevances.get((dialog["image_id"], number + 1))
            yield from _read_round(data, dialog, number, image, relevance)


def _read_round(
    data: dict, dialog: dict, number: int, image: Path, relevance: tuple[float, ...] | None
) -> Iterator[Question]:
    one = dialog["dialog"][number]
    if "answer_options" not in one:
        return
    history = [f"{dialog['caption'].strip().rstrip('.')}."]
    for earlier in dialog["dialog"][:number]:
        before, after = split_answer_template(add_mark(data["questions"][earlier["question"]]))
        history.append(f"{before} {data['answers'][earlier['answer']]}{after}")
    candidates = tuple(data["answers"][option] for option in one["answer_options"])
    key = f"{dialog['image_id']}/{number + 1}"
    if relevance is not None and len(relevance) != len(candidates):
        raise ValueError(
            f"round {key} has {len(candidates)} candidates, but {len(relevance)} relevances; give the dense "
            f"annotations of the same split."
        )
    yield Question(
        key=key,
        text=add_mark(data["questions"][one["question"]]),
        image=image,
        context=" ".join(history),
        candidates=candidates,
        correct=check_choice(one.get("gt_index"), candidates, key),
        relevance=relevance,
        groups={"dialog": str(dialog["image_id"])},
        submission={"image_id": dialog["image_id"], "round_id": number + 1},
    )


def add_mark(question: str) -> str:
    """The question with a question mark, which VisDial's lack."""
    question = question.strip()
    return question if question.endswith("?") else f"{question}?"


def _read_relevances(path: str) -> dict[tuple[int, int], tuple[float, ...]]:
    return {
        (one["image_id"], one["round_id"]): tuple(map(float, one.get("gt_relevance") or one["relevance"]))
        for one in load_json(path)
    }


def _check_rounds(relevances: dict, dialogs: list[dict], files: QuestionFiles) -> None:
    rounds = {dialog["image_id"]: len(dialog["dialog"]) for dialog in dialogs}
    wrong = [(image, number) for image, number in relevances if not 1 <= number <= rounds.get(image, 0)]
    if wrong:
        raise ValueError(
            f"{files.questions} and {files.annotations} do not match: {len(wrong)} of {len(relevances)} annotated "
            f"rounds are not in the dialogs, the first is round {wrong[0][1]} of image_id {wrong[0][0]}; give the two "
            f"files of the same split."
        )
