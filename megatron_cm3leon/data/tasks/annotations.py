"""Official files of data sets -> records: questions with their annotations, captions with their images.

    vqa        VQA v2, OK-VQA: {"questions": [{question_id, image_id, question}]} with --annotations, {"annotations":
               [{question_id, image_id, answers, multiple_choice_answer}]}; VizWiz: [{image, question, answers}]
    coco       captions: {"images": [{id, file_name}], "annotations": [{id, image_id, caption}]}
    easy-vqa   [[question, answer, image]], with images/IMAGE.png beside the file
    scienceqa  problems.json: {id: {question, choices, answer, hint, image, split, lecture, solution}}, with
               SPLIT/id/IMAGE

The answer of a question is `multiple_choice_answer`, or the one that most people gave (of several, the first). What
has no counterpart in the other file is a row with the reason.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cm3leon.data.sources.files import open_file


@dataclass(frozen=True)
class Row:
    """A record, or the reason why there is none."""

    label: str
    """Where it is in its file."""
    record: dict[str, Any] | None = None
    reason: str = ""


@dataclass(frozen=True)
class AnnotationFiles:
    """What belongs to an input file."""

    annotations: str = ""
    """Path of the answers of vqa."""
    image_name: str = ""
    """Name of an image file as a format string of `image_id`, where it is not the data set's."""
    split: str = ""
    """Part of scienceqa; "": all."""


def load_json(path: str) -> Any:
    """Content of a JSON file or URL; ValueError if it is missing or not valid."""
    try:
        with open_file(path) as file:
            return json.loads(file.read().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error


def find_image_form(content: dict) -> str:
    """Form of the image names of a file of VQA questions, with {image_id}."""
    subset = str(content.get("data_subtype", "val2014"))
    kind = content.get("data_type", "mscoco")
    # test-dev2015 is a part of the images of test2015.
    form = f"{'COCO' if kind == 'mscoco' else kind}_{subset.replace('test-dev', 'test')}_{{image_id:012d}}"
    return f"{form}.jpg" if kind == "mscoco" else f"{form}.png"


def write_image_name(form: str, image_id: object) -> str:
    """Name of an image file by its id; ValueError if the form does not suit the id."""
    try:
        return form.format(image_id=image_id)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"image_name ({form!r}) must be a name with {{image_id}}, such as COCO_val2014_{{image_id:012d}}.jpg; it "
            f"does not suit the image_id {image_id!r} ({error})."
        ) from error


def choose_answer(annotation: dict) -> str:
    """The answer of a question that training shows; "" if it has none."""
    if "multiple_choice_answer" in annotation:
        return str(annotation["multiple_choice_answer"])
    answers = [str(one["answer"]) for one in annotation.get("answers", ())]
    return Counter(answers).most_common(1)[0][0] if answers else ""


def read_vqa(content: Any, files: AnnotationFiles) -> Iterator[Row]:
    if isinstance(content, list):  # VizWiz
        for number, one in enumerate(content, 1):
            record = {name: value for name, value in one.items() if name != "answers"}
            yield Row(f"item {number}", {**record, "answer": choose_answer(one)})
        return
    form = files.image_name or find_image_form(content)
    if not files.annotations:
        raise ValueError("--format vqa reads the answers from another file; give it: --annotations FILE.json.")
    annotations: dict[Any, dict] = {}
    repeated = []
    for one in load_json(files.annotations)["annotations"]:
        if one["question_id"] in annotations:
            repeated.append(one["question_id"])
        annotations[one["question_id"]] = one
    asked = set()
    for one in content["questions"]:
        key, label = one["question_id"], f"question_id {one['question_id']}"
        known = annotations.get(key)
        if key in asked:
            yield Row(label, reason=f"two questions: both are question_id {key}")
        elif known is None:
            yield Row(label, reason=f"no annotation: {files.annotations} has none of question_id {key}")
        elif known.get("image_id", one["image_id"]) != one["image_id"]:
            yield Row(
                label, reason=f"other image: {one['image_id']} of the question, {known['image_id']} of its answer"
            )
        else:
            named = {name: known[name] for name in ("answer_type", "question_type") if name in known}
            image = {"image": write_image_name(form, one["image_id"])}
            yield Row(label, {**one, **named, **image, "answer": choose_answer(known)})
        asked.add(key)
    for key in repeated:
        yield Row(f"annotation of {key}", reason=f"two annotations: both are of question_id {key}")
    for key in annotations:
        if key not in asked:
            yield Row(f"annotation of {key}", reason=f"no question: question_id {key} of an annotation")


def read_coco(content: Any, files: AnnotationFiles) -> Iterator[Row]:
    images = {one["id"]: one for one in content["images"]}
    used = set()
    for number, one in enumerate(content["annotations"], 1):
        image = images.get(one["image_id"])
        label = f"annotation {one.get('id', number)}"
        if image is None:
            yield Row(label, reason=f"no image: image_id {one['image_id']} of a caption is not among the images")
            continue
        used.add(one["image_id"])
        size = {name: image[name] for name in ("width", "height") if name in image}
        name = write_image_name(files.image_name, image["id"]) if files.image_name else image["file_name"]
        yield Row(label, {"image": name, "caption": one.get("caption"), "image_id": one["image_id"], **size})
    for key, image in images.items():
        if key not in used:
            yield Row(f"image {key}", reason=f"no caption: image {image.get('file_name', key)} has no annotation")


def read_easy_vqa(content: Any, files: AnnotationFiles) -> Iterator[Row]:
    form = files.image_name or "images/{image_id}.png"
    for number, one in enumerate(content, 1):
        if not isinstance(one, list) or len(one) != 3:
            yield Row(f"item {number}", reason="not a question: the item is not [question, answer, image]")
            continue
        question, answer, image = one
        name = write_image_name(form, image)
        yield Row(f"item {number}", {"question": question, "answer": answer, "image": name, "image_id": image})


def read_scienceqa(content: Any, files: AnnotationFiles) -> Iterator[Row]:
    splits = {one["split"] for one in content.values()}
    if files.split and files.split not in splits:
        raise ValueError(f"--split ({files.split!r}) must be one of the file's: {', '.join(sorted(splits))}.")
    for key, one in content.items():
        if files.split and one["split"] != files.split:
            continue
        label, choices, answer = f"problem {key}", one["choices"], one.get("answer")
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            yield Row(label, reason=f"no answer: {answer!r} is not a number of its {len(choices)} choices")
            continue
        others = {name: value for name, value in one.items() if name not in ("choices", "hint", "image")}
        image = {"image": f"{one['split']}/{key}/{one['image']}"} if one.get("image") else {}
        options = {"options": choices, "answer": choices[answer], "context": one.get("hint", "").strip()}
        yield Row(label, {**others, **options, **image, "problem": key})


READERS: dict[str, Callable[[Any, AnnotationFiles], Iterator[Row]]] = {
    "vqa": read_vqa,
    "coco": read_coco,
    "easy-vqa": read_easy_vqa,
    "scienceqa": read_scienceqa,
}
"""Format -> reader of a file's content."""
TASKS = {"vqa": "vqa", "coco": "caption", "easy-vqa": "vqa", "scienceqa": "scienceqa"}
"""Format -> its task, unless `--task` gives another."""


def read_rows(form: str, path: str, files: AnnotationFiles) -> Sequence[Row]:
    """The rows of a file; ValueError if it is not of this format."""
    content = load_json(path)
    try:
        return list(READERS[form](content, files))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path} is not a file of --format {form}, or lacks a field of it ({type(error).__name__}: {error}); "
            f"docs/instruction_data.md shows what each format has."
        ) from error
