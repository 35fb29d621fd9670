"""Records become exactly these tokens and targets, one document per task of table 5."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_cm3leon.data.preprocess.filters import Filters
from megatron_cm3leon.data.preprocess.merge import merge
from megatron_cm3leon.data.preprocess.run import PreprocessOptions, preprocess
from megatron_cm3leon.data.sources import Filtered, RawInstruction
from megatron_cm3leon.data.tasks.template import list_tasks
from tests.data.corpora import ByteTokenizers
from tests.data.runs import check_counts, read_all, read_files, read_quarantine
from tests.data.tasks.instructions import (
    open_rows,
    read_one,
    run_rows,
    show_document,
    show_entry,
    write_gray_images,
    write_rows,
)

QUESTION = {"question": "is it red?", "answer": "yes", "image": "white.png"}
SCIENCE = {"question": "Which is hot?", "options": ["ice", "fire"], "answer": "fire", "solution": "Ice melts."}
CONTROL = {"condition": "black.png", "caption": "a cat", "image": "white.png"}
VQA = "Question: is it red? Answer:[ yes].|<15>"
TASKS = {
    "caption": ({"caption": " a cat\n", "image": "white.png"}, "Describe the given picture.[ a cat]|<15>"),
    "caption_long": (
        {"caption": "a cat", "image": "white.png"},
        "Describe the given picture in very fine detail.[ a cat]|<15>",
    ),
    "vqa": (QUESTION, VQA),
    "vizwiz": (QUESTION, VQA),
    "okvqa": (QUESTION, VQA),
    "scienceqa": (SCIENCE, "Question: Which is hot? Options: A. ice B. fire Answer:[ fire]"),
    "scienceqa_steps": (
        {**SCIENCE, "context": "Heat.", "image": "white.png"},
        "Question: Which is hot? Context: Heat. Options: A. ice B. fire Answer step by step:[ Ice melts.] Answer:"
        "[ fire]|<15>",
    ),
    "edit": (
        {"image": "black.png", "instruction": "make it white", "edited": "white.png"},
        "Edit first image following the instruction|<0>|make it white|[<15>]",
    ),
    "ocr": ({"text": "STOP", "image": "white.png"}, 'draw "STOP"|[<15>]'),
    "ground": (
        {
            "caption": "a cat and a dog",
            "objects": [{"name": "cat", "box": [0, 0, 4, 8]}, {"name": "dog", "bbox": [4, 2, 4, 4]}],
            "width": 8,
            "height": 8,
            "image": "white.png",
        },
        "Generate high quality image of a cat and a dog with segmentations cat at 00 00 50 99, dog at 50 25 99 74|"
        "[<15>]",
    ),
    "control_canny": (CONTROL, "Make high quality image from canny edge features|<0>|a cat|[<15>]"),
    "control_segmentation": (CONTROL, "Make high quality image from a segmentation map|<0>|a cat|[<15>]"),
    "control_hed": (CONTROL, "Make high quality image from hed features|<0>|a cat|[<15>]"),
    "control_pose": (CONTROL, "Make high quality image from openpose features|<0>|a cat|[<15>]"),
    "control_depth": (CONTROL, "Make high quality image from depth features|<0>|a cat|[<15>]"),
    "control_normals": (CONTROL, "Make high quality image from 3D norm features|<0>|a cat|[<15>]"),
    "control_scribble": (CONTROL, "Make high quality image from children's scribbles|<0>|a cat|[<15>]"),
    "control_lines": (CONTROL, "Make high quality image from mlsd lines|<0>|a cat|[<15>]"),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_record_of_each_task_has_these_tokens_and_targets(tmp_path, task):
    record, expected = TASKS[task]
    write_gray_images(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", [{**record, "license": "CC0"}])
    corpus = run_rows(rows, tmp_path / "out", task_options={"task": task, "seed": 2})
    assert show_document(corpus, 0) == expected
    (row,) = corpus.metadata().to_pylist()
    assert row["kind"] == "instruction" and json.loads(row["extra"])["license"] == "CC0"
    assert corpus.manifest["kinds"] == {"instruction": 1}
    (recorded,) = corpus.manifest["options"]["tasks"]
    assert recorded["name"] == task and recorded["templates"]


def test_every_task_has_a_document_above():
    assert {*TASKS, "chat"} == set(list_tasks())


def test_a_document_has_exactly_these_ids(tmp_path):
    write_gray_images(tmp_path)
    corpus = run_rows(write_rows(tmp_path / "rows.jsonl", [QUESTION]), tmp_path / "out", task_options=_chosen(0))
    vocabulary = ByteTokenizers().vocabulary
    text = b"Question: is it red? Answer: yes."
    assert corpus.read(0).tolist() == [*text, vocabulary.break_id, *[vocabulary.image_start + 15] * 4]
    assert corpus.targets(np.array([0]))[0].tolist() == [[28, 32]]
    assert text[28:32] == b" yes"


def _chosen(template):
    """Options with which record 0 of vqa gets this template."""
    return {"task": "vqa", "seed": (0, 3, 5)[template]}


def test_one_template_per_record_is_drawn_by_seed_and_number_or_all_are_written(tmp_path):
    write_gray_images(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", [QUESTION] * 90)
    drawn = [show_entry(entry) for entry in read_all(open_rows(rows, task="vqa", part_size=7))]
    assert drawn == [show_entry(entry) for entry in read_all(open_rows(rows, task="vqa"))]
    counts = [drawn.count(text) for text in sorted(set(drawn))]
    assert len(counts) == 3 and min(counts) > 15
    assert drawn != [show_entry(entry) for entry in read_all(open_rows(rows, task="vqa", seed=1))]
    source = open_rows(rows, task="vqa", all_templates=True, part_size=40)
    every = read_all(source)
    assert source.count == len(every) == 270 and source.parts == 9
    assert len({entry.key for entry in every}) == 270
    assert [show_entry(entry) for entry in every[::90]] == [
        "Question: is it red? Answer:[ yes].|<white.png>",
        "Question: is it red? Short answer:[ yes].|<white.png>",
        "Given the picture, answer the question. is it red?[ yes].|<white.png>",
    ]


def test_image_first_puts_the_images_of_the_prompt_in_front(tmp_path):
    write_gray_images(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", [QUESTION])
    corpus = run_rows(rows, tmp_path / "out", task_options={**_chosen(0), "image_first": True})
    assert show_document(corpus, 0) == "<15>|Question: is it red? Answer:[ yes]."
    assert corpus.manifest["options"]["tasks"][0]["image_first"] is True
    with pytest.raises(ValueError, match=r"task edit: image_first .* the target 'edited' is an image"):
        open_rows(rows, task="edit", image_first=True)


def test_optional_fields_choose_the_template(tmp_path):
    science = [{**SCIENCE, "context": context} for context in ("", None, "Heat.")]
    rows = write_rows(tmp_path / "rows.jsonl", [SCIENCE, *science, {**SCIENCE, "image": "white.png"}])
    documents = read_all(open_rows(rows, task="scienceqa"))
    short, with_context = (
        f"Question: Which is hot?{text} Options: A. ice B. fire Answer:[ fire]" for text in ("", " Context: Heat.")
    )
    assert [show_entry(entry) for entry in documents] == [short] * 3 + [with_context, f"{short}|<white.png>"]
    every = read_all(open_rows(rows, task="scienceqa", all_templates=True))
    assert sum(isinstance(entry, RawInstruction) for entry in every) == 5
    assert {entry.reason for entry in every if isinstance(entry, Filtered)} == {
        "template for records with other fields"
    }


BAD_RECORDS = [
    ({**QUESTION, "answer": " "}, "vqa", 'empty answer: field "answer"'),
    ({**QUESTION, "question": ""}, "vqa", 'empty text: field "question"'),
    ({**QUESTION, "answer": 3}, "vqa", 'field "answer" is int, not text'),
    ({"question": "x", "image": "white.png"}, "vqa", 'field "answer" is missing: the fields are question, image'),
    ([], "vqa", "not a JSON object but list"),
    ({**SCIENCE, "options": []}, "scienceqa", 'no options: field "options" is not a list of texts'),
    (
        {**SCIENCE, "options": ["x"] * 27},
        "scienceqa",
        'too many options: field "options" has 27; letters name up to 26',
    ),
]


def _with_boxes(*objects, **others):
    return {"caption": "x", "image": "white.png", "objects": list(objects), **others}


PIXELS = {"width": 8, "height": 8}
BAD_RECORDS += [
    (
        _with_boxes({"name": "cat", "box": [0, 0, 9, 8]}, **PIXELS),
        "ground",
        "box outside the image: [0, 0, 9, 8] of object 1 (cat), in pixels of 8 x 8",
    ),
    (
        _with_boxes({"name": "cat", "box": [0, 0, 4, 8]}),
        "ground",
        "box outside the image: [0, 0, 4, 8] of object 1 (cat), in fractions of 0 to 1; give width and height for "
        "boxes in pixels",
    ),
    (
        _with_boxes({"name": "cat", "bbox": [4, 4, 5, 1]}, **PIXELS),
        "ground",
        "box outside the image: [4, 4, 5, 1] of object 1 (cat), in pixels of 8 x 8",
    ),
    (
        _with_boxes({"name": "cat", "box": [4, 0, 4, 8]}, **PIXELS),
        "ground",
        "empty box: [4, 0, 4, 8] of object 1 (cat)",
    ),
    (_with_boxes({"name": "cat", "box": [0, 1]}), "ground", "no boxes: object 1 (cat) has no box of four numbers"),
    (
        _with_boxes({"box": [0, 0, 1, 1]}),
        "ground",
        'no boxes: object 1 is not {"name": text, "box": [left, top, right, bottom]}',
    ),
    (_with_boxes(), "ground", "no boxes: the objects are not a list of names and boxes"),
    (
        _with_boxes({"name": "x", "box": [0, 0, 1, 1]}, width=8),
        "ground",
        "box without a unit: the record has only one of width and height",
    ),
    (
        _with_boxes({"name": "x", "box": [0, 0, 1, 1]}, width=0, height=8),
        "ground",
        "box without a unit: width (0) is not a number of pixels",
    ),
    ({**_with_boxes({"name": "x", "box": [0, 0, 1, 1]}), "image": "none.png"}, "ground", "missing picture: none.png"),
]


@pytest.mark.parametrize("record, task, reason", BAD_RECORDS, ids=[reason[:30] for _, _, reason in BAD_RECORDS])
def test_a_record_that_cannot_be_used_has_a_reason(tmp_path, record, task, reason):
    write_gray_images(tmp_path)
    good = TASKS[task][0]
    rows = write_rows(tmp_path / "rows.jsonl", [good, record])
    first, second = read_all(open_rows(rows, task=task))
    assert isinstance(first, RawInstruction)
    assert (second.source, second.reason) == ("rows.jsonl:2", reason)


def test_a_missing_image_is_quarantined_and_every_input_is_counted(tmp_path):
    write_gray_images(tmp_path)
    bad = [{**QUESTION, "image": "none.png"}, {**QUESTION, "answer": ""}]
    rows = write_rows(tmp_path / "rows.jsonl", [QUESTION, *bad, QUESTION])
    corpus = run_rows(rows, tmp_path / "out", task_options={"task": "vqa"}, max_bad_fraction=0.5)
    assert check_counts(corpus.manifest) == (4, 2, 0, 0, 2)
    assert [(bad["source"], bad["reason"]) for bad in read_quarantine(tmp_path / "out")] == [
        ("rows.jsonl:2", "missing picture: none.png"),
        ("rows.jsonl:3", 'empty answer: field "answer"'),
    ]


def test_boxes_move_with_the_image_into_its_square(tmp_path):
    Image.new("RGB", (16, 8), "white").save(tmp_path / "wide.png")
    objects = [{"name": "all", "box": [0, 0, 1, 1]}, {"name": "left", "box": [0, 0, 0.25, 1]}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"caption": "x", "image": "wide.png", "objects": objects}])
    before = "Generate high quality image of x with segmentations "
    assert read_one(rows, task="ground", fit="pad") == f"{before}all at 00 25 99 74, left at 00 25 25 74|[<wide.png>]"
    assert read_one(rows, task="ground") == (
        "box outside the image: left is not in the square that --fit crop keeps of 16 x 8 pixels; --fit pad keeps the "
        "whole image"
    )
    write_rows(
        rows,
        [{"caption": "x", "image": "wide.png", "objects": [{"name": "a", "box": [0.25, 0, 0.5, 0.5]}, objects[0]]}],
    )
    assert read_one(rows, task="ground") == f"{before}a at 00 00 50 50, all at 00 00 99 99|[<wide.png>]"


def test_fields_may_have_other_names_and_records_may_be_an_array_or_a_table(tmp_path):
    write_gray_images(tmp_path)
    image = (tmp_path / "white.png").read_bytes()
    options = {"task": "edit", "names": ("image=original_image", "instruction=edit_prompt", "edited=edited_image")}
    row = {"original_image": "black.png", "edit_prompt": "whiten", "edited_image": "white.png"}
    expected = "Edit first image following the instruction|<{}>|whiten|[<{}>]"
    lines = write_rows(tmp_path / "rows.jsonl", [row])
    assert read_one(lines, **options) == expected.format("black.png", "white.png")
    (tmp_path / "rows.json").write_text(json.dumps([row], indent=1))
    assert read_one(tmp_path / "rows.json", **options) == expected.format("black.png", "white.png")
    row = {**row, "original_image": {"bytes": image, "path": None}, "edited_image": {"bytes": image, "path": None}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    assert read_one(tmp_path / "rows.parquet", **options) == expected.format("00000000.image", "00000000.edited")
    (recorded,) = open_rows(lines, **options).tasks
    assert recorded["fields"]["image"] == "original_image"
    with pytest.raises(ValueError, match=r"--fields foo=x: task edit has no field 'foo'; its fields are edited, image"):
        open_rows(lines, task="edit", names=("foo=x",))
    with pytest.raises(ValueError, match=r"--fields foo must be FIELD=NAME"):
        open_rows(lines, task="edit", names=("foo",))
    with pytest.raises(ValueError, match=r'task edit: no record of the input has one of its fields: field "edited" is'):
        open_rows(lines, task="edit")


def test_workers_tasks_and_interruptions_do_not_change_the_bytes(tmp_path):
    write_gray_images(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", [{**QUESTION, "answer": str(number)} for number in range(9)])
    task_options = {"task": "vqa", "all_templates": True}
    run_rows(rows, tmp_path / "one", task_options=task_options)
    run_rows(rows, tmp_path / "two", task_options=task_options, workers=2)
    first, second = read_files(tmp_path / "one"), read_files(tmp_path / "two")
    del first["manifest.json"], second["manifest.json"]
    assert first == second and sum(file.endswith(".targets.npy") for file in first) == 9
    for changed in ({"task": "okvqa", "all_templates": True}, {"task": "vqa"}):
        with pytest.raises(ValueError, match=r"shards written with other options \(tasks: "):
            run_rows(rows, tmp_path / "one", task_options=changed)
    for task in (1, 0):
        source = open_rows(rows, part_size=4, **task_options)
        options = PreprocessOptions(
            tokenizer=tmp_path, output=tmp_path / "array", load_tokenizers=ByteTokenizers.load, batch_size=3, task=task,
            tasks=2,
        )  # fmt: skip
        preprocess(source, options)
    merge(tmp_path / "array")
    merged = read_files(tmp_path / "array")
    del merged["manifest.json"]
    assert merged == first


def test_a_run_continues_with_the_parts_that_are_missing(tmp_path):
    write_gray_images(tmp_path)
    (tmp_path / "black.png").unlink()
    rows = [{**QUESTION, "image": "white.png" if number < 5 else "black.png"} for number in range(9)]
    rows = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"inputs read are unusable.*missing picture"):
        run_rows(rows, tmp_path / "out", task_options={"task": "vqa"})
    kept = (tmp_path / "out/shard-000000-000.targets.npy").stat().st_mtime_ns
    write_gray_images(tmp_path)
    run_rows(rows, tmp_path / "out", task_options={"task": "vqa"})
    run_rows(rows, tmp_path / "whole", task_options={"task": "vqa"})
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")
    assert (tmp_path / "out/shard-000000-000.targets.npy").stat().st_mtime_ns == kept


def test_captions_are_not_cleaned_in_pieces(tmp_path):
    write_gray_images(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", [QUESTION])
    with pytest.raises(
        ValueError, match="--clean-captions is for captions, not for the pieces of instruction documents"
    ):
        run_rows(rows, tmp_path / "out", task_options={"task": "vqa"}, filters=Filters(clean_captions=True))
