"""The TSV for VLMEvalKit, read as it reads it."""

import base64
import json

import pandas
import pytest
from PIL import Image

from megatron_cm3leon.evaluation.vlmevalkit import write_tsv


def test_the_tsv_holds_images_options_and_letters(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "question": 'Which "color"?\tSay it.', "answer": "blue", "options": ["red", "blue"]},
        {"image": "a.png", "question": "Which?", "answer": "A", "options": ["red", "blue", "green"], "category": "x"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write_tsv(tmp_path / "q.jsonl", tmp_path / "set.tsv") == 2
    table = pandas.read_csv(tmp_path / "set.tsv", sep="\t")
    assert list(table.columns) == ["index", "image", "question", "answer", "A", "B", "C", "category"]
    assert list(table["answer"]) == ["B", "A"] and table["question"][0] == lines[0]["question"]
    assert base64.b64decode(table["image"][1]) == (tmp_path / "a.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "q.jsonl", "set.tsv"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"image": "a.png", "question": "x", "answer": "c", "options": ["a"]}', "answer .'c'. must be one of"),
        ('{"image": "a.png", "question": "", "answer": "c"}', "question .''. must be a text"),
        ("[1]", "not a JSON object"),
        ('{"image": "a.png",', "not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, fault):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=f"q.jsonl:1: {fault}"):
        write_tsv(tmp_path / "q.jsonl", tmp_path / "set.tsv")
    with pytest.raises(ValueError, match=r"must end with .tsv"):
        write_tsv(tmp_path / "q.jsonl", tmp_path / "set.csv")
