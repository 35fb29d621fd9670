"""Questions about images as the TSV that VLMEvalKit reads (github.com/open-compass/VLMEvalKit, docs/en/Development.md).

A line of the JSON Lines input:

    {"image": "images/1.png", "question": "What color is it?", "answer": "B", "options": ["red", "blue"],
     "category": "color"}

`image` is a path relative to the file. With `options` the answer is a letter or one of the options, and the columns
A, B ... hold the options: a multiple-choice set. Otherwise the answer is a text. The file holds the images, in base64.
"""

import base64
import csv
import os
import string
from pathlib import Path

from megatron_cm3leon.evaluation.metrics.image_folder import read_image
from megatron_cm3leon.evaluation.text_files import read_objects

COLUMNS = ("index", "image", "question", "answer", "category")


def read_questions(path: str | Path) -> list[dict]:
    """The questions of a file, with absolute image paths, and letters as answers where there are options.

    ValueError names the line and the fault.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no questions at {path}; give a JSON Lines file of image, question and answer.")
    questions = []
    for number, entry in read_objects(path):
        fault = _find_fault(entry)
        if fault:
            raise ValueError(f"{path}:{number}: {fault}.")
        options = entry.get("options", [])
        answer = (
            string.ascii_uppercase[options.index(entry["answer"])] if entry["answer"] in options else entry["answer"]
        )
        questions.append(entry | {"image": str(path.parent / entry["image"]), "answer": answer, "options": options})
    if not questions:
        raise ValueError(f"{path} has no questions; give at least one line.")
    if len({bool(one["options"]) for one in questions}) > 1:
        raise ValueError(
            f"{path} has questions with and without options; VLMEvalKit reads each kind from its own file."
        )
    return questions


def _find_fault(entry: dict) -> str:
    """What is wrong with a line; empty if nothing is."""
    for key in ("image", "question", "answer"):
        if not isinstance(entry.get(key), str) or not entry[key]:
            return f"{key} ({entry.get(key)!r}) must be a text"
    options = entry.get("options", [])
    if not isinstance(options, list) or not all(isinstance(one, str) and one for one in options):
        return f"options ({options!r}) must be a list of texts"
    if len(options) > len(string.ascii_uppercase):
        return f"options ({len(options)}) must be at most {len(string.ascii_uppercase)}"
    if options and entry["answer"] not in [*options, *string.ascii_uppercase[: len(options)]]:
        return f"answer ({entry['answer']!r}) must be one of the options or its letter"
    return ""


def write_tsv(questions: str | Path, output: str | Path) -> int:
    """Write the TSV of a questions file; returns the number of questions. ValueError for a bad line or image.

    The name must end with .tsv: VLMEvalKit takes the name before it as that of the data set.
    """
    output = Path(output)
    if output.suffix != ".tsv":
        raise ValueError(f"--vlmevalkit ({output}) must end with .tsv, as VLMEvalKit's files do.")
    entries = read_questions(questions)
    letters = string.ascii_uppercase[: max(len(entry["options"]) for entry in entries)]
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow([*COLUMNS[:4], *letters, *COLUMNS[4:]])
            for number, entry in enumerate(entries):
                read_image(Path(entry["image"]))  # refuses what cannot be read
                image = base64.b64encode(Path(entry["image"]).read_bytes()).decode()
                options = [*entry["options"], *[""] * (len(letters) - len(entry["options"]))]
                writer.writerow(
                    [number, image, entry["question"], entry["answer"], *options, entry.get("category", "")]
                )
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return len(entries)
