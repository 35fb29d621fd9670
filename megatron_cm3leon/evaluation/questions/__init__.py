"""Questions about images, read from the files of VQA data sets.

| format | questions | annotations | image files, in the folder `images` |
|---|---|---|---|
| `vqa` | VQA v2, OK-VQA: `{"questions": [{question_id, image_id, question}]}` | `{"annotations": [{question_id,
  answers, question_type, answer_type}]}` | `COCO_val2014_000000000123.jpg` |
| `vizwiz` | `[{image, question, answers, answer_type}]` | in the same file | `image` |
| `scienceqa` | problems.json: `{id: {question, choices, answer, hint, image, split, subject}}` | in the same file |
  `SPLIT/id/image.png` |
| `visdial` | `{"data": {questions, answers, dialogs}, "split"}` (visdial.py) | dense: `[{image_id, round_id,
  gt_relevance}]` | `VisualDialog_val2018_000000000123.jpg` |
| `jsonl` | a line per question: `question`, and `image`, `question_id`, `answers` or `answer`, `candidates`, `correct`,
  `relevance`, `group`, each optional | in the same file | `image` |

Test sets come without answers.
"""

from collections.abc import Callable, Iterator, Sequence

from megatron_cm3leon.evaluation.questions.base import Question, QuestionFiles
from megatron_cm3leon.evaluation.questions.visdial import read_visdial
from megatron_cm3leon.evaluation.questions.vqa import read_jsonl, read_scienceqa, read_vizwiz, read_vqa

READERS: dict[str, Callable[[QuestionFiles], Iterator[Question]]] = {
    "vqa": read_vqa,
    "vizwiz": read_vizwiz,
    "scienceqa": read_scienceqa,
    "visdial": read_visdial,
    "jsonl": read_jsonl,
}
"""Format -> reader."""


def read_questions(files: QuestionFiles) -> list[Question]:
    """Questions in the order of the file, their images present.

    ValueError for a file of another format, questions and annotations that do not match, and images that are missing.
    """
    if files.format not in READERS:
        raise ValueError(f"format ({files.format!r}) must be one of: {', '.join(READERS)}.")
    if files.annotations and files.format not in ("vqa", "visdial"):
        raise ValueError(
            f"annotations ({files.annotations}) are for the formats vqa and visdial; {files.format} has the answers in "
            f"the file of its questions."
        )
    try:
        found = list(READERS[files.format](files))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{files.questions} is not a file of format {files.format}, or lacks a field of it "
            f"({type(error).__name__}: {error}); give a file of that format, or another --format."
        ) from error
    if not found:
        raise ValueError(f"{files.questions} has no questions of format {files.format}.")
    _check(found, files)
    return found


def _check(questions: Sequence[Question], files: QuestionFiles) -> None:
    keys: set[str] = set()
    for question in questions:
        if question.key in keys:
            raise ValueError(f"{files.questions} has two questions {question.key}; remove one of them.")
        keys.add(question.key)
        if not question.text.strip():
            raise ValueError(f"{files.questions}: question {question.key} is empty; remove it or write its text.")
    missing = [one for one in questions if one.image is not None and not one.image.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(questions)} questions of {files.questions} have no image file, the first is "
            f"{missing[0].image} of question {missing[0].key}; give the folder of the images with --images, or the "
            f"form of their names with --image-name."
        )
