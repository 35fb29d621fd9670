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
    # A line separator within a text is white space, and does not end the line of the file.
    lines = [{"image": "a.png", "text": "Hello\u2028"}, {"image": "b.png", "text": "Toffee"}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "list.jsonl").write_text(text, encoding="utf-8")
    result = evaluate(images=tmp_path / "list.jsonl", output=tmp_path / "out", case="ignore")
    assert result.figures["character_error_rate"].value == pytest.approx(1 / 11)
    assert result.figures["word_error_rate"].value == 0.5 and len(result.inputs["ocr_weights"]) == 64
    assert result.tables["images"][1]["note"] == "read: coffee"
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
    (tmp_path / "list.jsonl").write_text('{"image": "images/a.png"}\n')
    with pytest.raises(ValueError, match=r"list.jsonl:1: .* text \(None\) must be texts; give both"):
        evaluate(images=tmp_path / "list.jsonl", output=tmp_path / "out")
    (folder / "b.txt").unlink()
    (folder / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8: its byte 3 cannot be decoded"):
        evaluate(images=folder, output=tmp_path / "out")
    (folder / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"the text of .*a.png .* is empty; give the text that the image shows"):
        evaluate(images=folder, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()  # nothing was read before
    (folder / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"--shortest-side \(100000\) it has more than 89,478,485 pixels; lower"):
        evaluate(images=folder, output=tmp_path / "out", shortest_side=100_000)
