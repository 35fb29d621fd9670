"""VQA v2, OK-VQA, VizWiz, ScienceQA, and JSON Lines of questions."""

from collections.abc import Iterator

from megatron_cm3leon.data.tasks.annotations import find_image_form, load_json
from megatron_cm3leon.evaluation.questions.base import (
    Question,
    QuestionFiles,
    build_image_path,
    check_choice,
)
from megatron_cm3leon.evaluation.text_files import read_objects


def read_vqa(files: QuestionFiles) -> Iterator[Question]:
    content = load_json(files.questions)
    default = find_image_form(content)
    annotations = None
    if files.annotations:
        annotations = {one["question_id"]: one for one in load_json(files.annotations)["annotations"]}
        _check_same_questions(content["questions"], annotations, files)
    for one in content["questions"]:
        known = annotations[one["question_id"]] if annotations is not None else {}
        answers = [_read_answer(answer, files.raw_answers) for answer in known.get("answers", ())]
        yield Question(
            key=str(one["question_id"]),
            text=one["question"],
            image=build_image_path(files, default, one["image_id"]),
            answers=tuple(answers),
            groups={name: known[name] for name in ("answer_type", "question_type") if name in known},
            submission={"question_id": one["question_id"]},
        )


def _read_answer(answer: dict, raw: bool) -> str:
    if raw and "raw_answer" not in answer:
        raise ValueError("the annotations have no raw_answer, which only OK-VQA has; use --answers processed.")
    return answer["raw_answer" if raw else "answer"]


def _check_same_questions(questions: list[dict], annotations: dict, files: QuestionFiles) -> None:
    """ValueError unless both files are about the same questions and images, as the official script requires."""
    numbers = {one["question_id"] for one in questions}
    without = [one["question_id"] for one in questions if one["question_id"] not in annotations]
    beyond = [number for number in annotations if number not in numbers]
    other = [
        one["question_id"]
        for one in questions
        if one["question_id"] in annotations
        and annotations[one["question_id"]].get("image_id", one["image_id"]) != one["image_id"]
    ]
    for wrong, what in (
        (without, f"of {len(numbers)} questions have no annotation"),
        (beyond, f"of {len(annotations)} annotations have no question"),
        (other, f"of {len(numbers)} questions have another image in their annotation"),
    ):
        if wrong:
            raise ValueError(
                f"{files.questions} and {files.annotations} do not match: {len(wrong)} {what}, the first is "
                f"question_id {wrong[0]}; give the two files of the same split."
            )


def read_vizwiz(files: QuestionFiles) -> Iterator[Question]:
    for one in load_json(files.questions):
        yield Question(
            key=one["image"],
            text=one["question"],
            image=files.image_folder / one["image"],
            answers=tuple(answer["answer"] for answer in one.get("answers", ())),
            groups={name: one[name] for name in ("answer_type",) if name in one},
            submission={"image": one["image"]},
        )


def read_scienceqa(files: QuestionFiles) -> Iterator[Question]:
    problems = load_json(files.questions)
    splits = {one["split"] for one in problems.values()}
    if files.split not in splits:
        raise ValueError(f"split ({files.split!r}) must be one of {files.questions}: {', '.join(sorted(splits))}.")
    for number, one in problems.items():
        if one["split"] != files.split:
            continue
        choices, hint = tuple(one["choices"]), one.get("hint", "").strip()
        image = files.image_folder / one["split"] / number / one["image"] if one.get("image") else None
        context = "image" if image else "text" if hint else "no context"
        yield Question(
            key=number,
            text=one["question"],
            image=image,
            context=f"Context: {hint}" if hint else "",
            candidates=choices,
            correct=check_choice(one.get("answer"), choices, number),
            groups={"subject": one.get("subject", ""), "context": context},
            submission={"question_id": number},
        )


def read_jsonl(files: QuestionFiles) -> Iterator[Question]:
    for number, (_, one) in enumerate(read_objects(files.questions)):
        candidates = tuple(one.get("candidates", ()))
        key = str(one.get("question_id", number))
        answers = one.get("answers", [one["answer"]] if "answer" in one else ())
        if isinstance(answers, str) or not all(isinstance(each, str) for each in (*answers, *candidates)):
            raise ValueError(f"{files.questions}: question {key}: answers and candidates must be lists of texts.")
        yield Question(
            key=key,
            text=one["question"],
            image=files.image_folder / one["image"] if one.get("image") else None,
            answers=tuple(answers),
            candidates=candidates,
            correct=check_choice(one.get("correct"), candidates, key),
            relevance=tuple(map(float, one["relevance"])) if "relevance" in one else None,
            groups={"group": str(one["group"])} if "group" in one else {},
            submission={"question_id": one.get("question_id", number)},
        )
