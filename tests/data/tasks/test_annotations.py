"""Official files of data sets: VQA v2, VizWiz, COCO captions, easy-vqa, ScienceQA, InstructPix2Pix."""

import json
import re

import pytest

from megatron_cm3leon.data.sources import BadInput, RawImage
from tests.data.runs import check_counts, read_all
from tests.data.tasks.instructions import open_rows, run_rows, show_document, show_entry, write_gray_images, write_rows


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def show_all(source):
    """Each input of a source: where it is, and its text or reason."""
    return [(entry.source, show_entry(entry)) for entry in read_all(source)]


def ask(number, image=1, text="is it red?"):
    return {"question_id": number, "image_id": image, "question": text}


def annotate(number, image=1, **others):
    return {"question_id": number, "image_id": image, **others}


def test_questions_are_joined_with_their_annotations(tmp_path):
    content = {
        "data_type": "mscoco",
        "data_subtype": "train2014",
        "questions": [ask(10), ask(11, 2), ask(12), ask(13), ask(10)],
    }
    questions = write_json(tmp_path / "questions.json", content)
    answers = [
        annotate(10, multiple_choice_answer="yes", answers=[{"answer": "no"}], question_type="is"),
        annotate(11, 3, multiple_choice_answer="yes"),
        annotate(12, answers=[{"answer": "no"}, {"answer": "yes"}, {"answer": "yes"}]),
        annotate(14),
        annotate(12, answers=[]),
    ]
    write_json(tmp_path / "annotations.json", {"annotations": answers[:4]})
    options = {"annotations": str(tmp_path / "annotations.json"), "images": str(tmp_path / "train2014"), "seed": 2}
    first, second, third, fourth, fifth, sixth = show_all(open_rows(questions, "vqa", **options))
    image = "train2014/COCO_train2014_000000000001.jpg"
    assert first == ("questions.json:question_id 10", f"Question: is it red? Answer:[ yes].|<{image}>")
    assert second == ("questions.json:question_id 11", "other image: 2 of the question, 3 of its answer")
    assert "[ yes]" in third[1]
    assert fourth[1] == f"no annotation: {tmp_path}/annotations.json has none of question_id 13"
    assert fifth[1] == "two questions: both are question_id 10"
    assert sixth == ("questions.json:annotation of 14", "no question: question_id 14 of an annotation")
    write_json(tmp_path / "annotations.json", {"annotations": answers})
    assert show_all(open_rows(questions, "vqa", **options))[5][1] == "two annotations: both are of question_id 12"
    named = read_all(open_rows(questions, "vqa", **options, image_name="{image_id}.png"))[0]
    assert next(piece for piece in named.segments if isinstance(piece, RawImage)).name == "train2014/1.png"
    assert json.loads(named.extra) == {"image_id": 1, "question_id": 10, "question_type": "is"}


def test_vizwiz_has_its_answers_in_one_file(tmp_path):
    rows = [
        {"image": "1.jpg", "question": "what?", "answers": [{"answer": "a cup"}, {"answer": "cup"}, {"answer": "cup"}]},
        {"image": "2.jpg", "question": "what?", "answers": []},
    ]
    source = open_rows(write_json(tmp_path / "train.json", rows), "vqa", task="vizwiz")
    (_, good), (where, bad) = show_all(source)
    assert "[ cup]" in good and (where, bad) == ("train.json:item 2", 'empty answer: field "answer"')
    assert source.tasks[0]["name"] == "vizwiz"


def test_captions_are_joined_with_their_images(tmp_path):
    images = [{"id": 1, "file_name": "white.png"}, {"id": 2, "file_name": "gray.png"}]
    captions = [
        {"id": 7, "image_id": 1, "caption": "A cat."},
        {"id": 8, "image_id": 3, "caption": "A dog."},
        {"id": 9, "image_id": 1, "caption": " "},
    ]
    path = write_json(tmp_path / "captions.json", {"images": images, "annotations": captions})
    assert show_all(open_rows(path, "coco")) == [
        ("captions.json:annotation 7", "Describe the given picture.[ A cat.]|<white.png>"),
        ("captions.json:annotation 8", "no image: image_id 3 of a caption is not among the images"),
        ("captions.json:annotation 9", 'empty answer: field "caption"'),
        ("captions.json:image 2", "no caption: image gray.png has no annotation"),
    ]
    write_gray_images(tmp_path)
    corpus = run_rows(path, tmp_path / "out", "coco", max_bad_fraction=0.75)
    assert check_counts(corpus.manifest) == (4, 1, 0, 0, 3)
    assert show_document(corpus, 0) == "Describe the given picture.[ A cat.]|<15>"


def test_easy_vqa_has_its_images_beside_its_questions(tmp_path):
    write_gray_images(tmp_path / "train/images")
    (tmp_path / "train/images/white.png").rename(tmp_path / "train/images/0.png")
    rows = [["what is the blue shape?", "rectangle", 0], ["what?", "x"], ["is it red?", "", 0]]
    write_json(tmp_path / "train/questions.json", rows)
    write_json(tmp_path / "train/other.json", [])
    corpus = run_rows(tmp_path / "train", tmp_path / "out", "easy-vqa", task_options={"seed": 2}, max_bad_fraction=0.7)
    assert show_document(corpus, 0) == "Question: what is the blue shape? Answer:[ rectangle].|<15>"
    assert [entry[1] for entry in show_all(open_rows(tmp_path / "train", "easy-vqa"))[1:]] == [
        "not a question: the item is not [question, answer, image]",
        'empty answer: field "answer"',
    ]


def test_scienceqa_takes_options_context_and_image_from_its_problems(tmp_path):
    problem = {
        "question": "Which?",
        "choices": ["ice", "fire"],
        "answer": 1,
        "hint": "",
        "split": "train",
        "image": None,
    }
    problems = {
        "1": {**problem, "solution": "Ice melts."},
        "2": {**problem, "image": "image.png", "hint": "Heat."},
        "3": {**problem, "answer": 2},
        "4": {**problem, "split": "test"},
    }
    path = write_json(tmp_path / "problems.json", problems)
    entries = show_all(open_rows(path, "scienceqa", split="train"))
    assert entries == [
        ("problems.json:problem 1", "Question: Which? Options: A. ice B. fire Answer:[ fire]"),
        (
            "problems.json:problem 2",
            "Question: Which? Context: Heat. Options: A. ice B. fire Answer:[ fire]|<train/2/image.png>",
        ),
        ("problems.json:problem 3", "no answer: 2 is not a number of its 2 choices"),
    ]
    assert len(read_all(open_rows(path, "scienceqa"))) == 4
    steps = show_all(open_rows(path, "scienceqa", split="train", task="scienceqa_steps"))
    assert steps[0][1].endswith("Answer step by step:[ Ice melts.] Answer:[ fire]")
    with pytest.raises(ValueError, match=r"--split \('val'\) must be one of the file's: test, train."):
        open_rows(path, "scienceqa", split="val")


def test_folders_of_instructpix2pix(tmp_path):
    for name, prompt in (("0001", '{"edit": "whiten", "input": "a"}'), ("0002", '{"caption": "x"}'), ("0003", None)):
        write_gray_images(tmp_path / "data" / name)
        for brightness, number in (("black", "0"), ("white", "1")):
            (tmp_path / "data" / name / f"{brightness}.png").rename(tmp_path / "data" / name / f"12_{number}.png")
        if prompt:
            (tmp_path / "data" / name / "prompt.json").write_text(prompt)
    (tmp_path / "data/0001/13_1.png").write_bytes((tmp_path / "data/0001/gray.png").read_bytes())
    corpus = run_rows(tmp_path / "data", tmp_path / "out", "pix2pix", max_bad_fraction=0.75)
    assert show_document(corpus, 0) == "Edit first image following the instruction|<0>|whiten|[<15>]"
    assert json.loads(corpus.metadata().to_pylist()[0]["extra"]) == {"input": "a"}
    assert corpus.metadata().to_pylist()[0]["image"] == "0001/12_0.png\n0001/12_1.png"
    listed = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    assert [(bad["source"], bad["reason"]) for bad in map(json.loads, listed)] == [
        ("0001/13_0.png", "missing picture: 0001/13_0.png"),
        ("0002/12_0.png", 'no instruction: 0002/prompt.json has no field "edit"'),
        ("0003/12_0.png", "no instruction: 0003/prompt.json is missing beside the image"),
    ]


def test_files_of_another_format_are_refused(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "x"}])
    other = write_json(tmp_path / "other.json", {"rows": []})
    for form, path, options, message in (
        ("coco", other, {}, "other.json is not a file of --format coco, or lacks a field of it (KeyError: 'images'); "),
        ("vqa", other, {}, "--format vqa reads the answers from another file; give it: --annotations FILE.json."),
        ("vqa", other, {"annotations": "none.json"}, "none.json: no such file."),
        ("coco", tmp_path / "none.json", {}, "none.json does not exist; give a file of --format coco."),
        ("coco", other, {"annotations": "x"}, "--annotations has the answers of one file of questions of --format vqa"),
        ("pix2pix", other, {}, "--format pix2pix reads one folder, but --input "),
        ("pix2pix", tmp_path, {}, "holds no row; expected a folder with prompt.json, SEED_0.jpg and SEED_1.jpg."),
        (
            "llava",
            rows,
            {"split": "x"},
            "--annotations, --image-name and --split are for: vqa, coco, easy-vqa, scienceqa;",
        ),
        (
            "tar",
            rows,
            {"task": "vqa"},
            "--task reads records as JSON Lines, a JSON array or Parquet, not --format tar; ",
        ),
        ("easy-vqa", tmp_path, {}, "holds no file of --format easy-vqa; give the file itself."),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            open_rows(path, form, **options)


def test_an_annotated_source_reads_its_file_again_in_a_worker(tmp_path):
    import pickle

    path = write_json(tmp_path / "questions.json", [["a?", "b", number] for number in range(5)])
    source = open_rows(path, "easy-vqa", part_size=2)
    again = pickle.loads(pickle.dumps(source))
    assert read_all(again) == read_all(source) and not any(isinstance(entry, BadInput) for entry in read_all(again))
    assert [source.part_inputs(part) for part in range(source.parts)] == [2, 2, 1]
