"""The task ocr: drawn words are read by the real model; wrong input is named."""

import json

import pytest
from PIL import Image, ImageDraw, ImageFont

from megatron_cm3leon.evaluation.tasks.ocr import evaluate


def draw(path, text):
    image = Image.new("RGB", (130, 90), "white")
    ImageDraw.Draw(image).text((14, 26), text, fill="black", font=ImageFont.load_default(28))
    image.save(path)


def test_drawn_words_are_read_and_wrong_ones_counted(tmp_path):
    draw(tmp_path / "a.png", "HELLO")
    draw(tmp_path / "b.png", "Coffee")
    lines = [{"image": "a.png", "text": "Hello"}, {"image": "b.png", "text": "Toffee"}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = evaluate(images=tmp_path / "list.jsonl", output=tmp_path / "out", case="ignore")
    assert result.figures["character_error_rate"].value == pytest.approx(1 / 11)
    assert result.figures["word_error_rate"].value == 0.5 and len(result.inputs["ocr_weights"]) == 64
    items = (tmp_path / "out/items.jsonl").read_text()
    assert evaluate(images=tmp_path / "list.jsonl", output=tmp_path / "out", case="ignore").figures == result.figures
    assert (tmp_path / "out/items.jsonl").read_text() == items


def test_bad_input_is_named(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    with pytest.raises(ValueError, match="has no images"):
        evaluate(images=folder, output=tmp_path / "out")
    draw(folder / "a.png", "x")
    with pytest.raises(ValueError, match=r"there is no a.txt beside it"):
        evaluate(images=folder, output=tmp_path / "out")
    (folder / "a.txt").write_text("x")
    (folder / "b.txt").write_text("y")
    with pytest.raises(ValueError, match=r"b.txt is a text without an image"):
        evaluate(images=folder, output=tmp_path / "out")
    (tmp_path / "list.jsonl").write_text('{"image": "none.png", "text": "x"}\n')
    with pytest.raises(ValueError, match=r"list.jsonl:1: there is no image at"):
        evaluate(images=tmp_path / "list.jsonl", output=tmp_path / "out")
