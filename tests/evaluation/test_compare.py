"""The page that compares runs: tables, curves, images, differences."""

import json

import pytest
from PIL import Image

from megatron_cm3leon.evaluation.compare import Column, collect_columns, find_differences, read_runs
from megatron_cm3leon.evaluation.compare_page import write_comparison
from megatron_cm3leon.evaluation.result import Figure, Result
from tests.evaluation.test_report import PageParser


def write(folder, task="clip", value=0.25, settings=None, **fields):
    Result(task=task, figures={"clip_score": Figure(value, value - 0.1, value + 0.1, 40)}, settings=settings or {},
           inputs={"model": str(folder)}, **fields).write(folder)  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    for step, value in ((100, 0.2), (200, 0.3)):
        write(tmp_path / f"base/step-{step:08d}/clip", value=value, settings={"documents": 2})
    write(tmp_path / "large", value=0.5, settings={"documents": 0}, notes=["3 captions <b> were truncated"])
    (tmp_path / "large/other.json").write_text('{"figures": {}}')
    images = tmp_path / "large/images"
    images.mkdir()
    Image.new("RGB", (600, 300), "red").save(images / "a.png")
    write(tmp_path / "large/vqa", task="vqa")
    return read_runs([str(tmp_path / "base"), f"big={tmp_path / 'large'}"])


def test_the_last_step_is_in_the_table_and_all_are_in_the_curve(runs):
    assert [run.name for run in runs] == ["base", "big"]
    clip, vqa = collect_columns(runs)
    assert runs[0].find_figure(clip).value == 0.3 and runs[0].find_figure(vqa) is None
    assert [(step, figure.value) for step, figure in runs[0].find_curve(clip)] == [(100, 0.2), (200, 0.3)]
    assert runs[1].find_curve(clip) == []
    assert ("clip: documents", ["2", "0"]) in find_differences(runs)
    assert not any("model" in name for name, _ in find_differences(runs))


def test_the_page_loads_nothing_and_shows_everything(runs, tmp_path):
    write_comparison(runs, tmp_path / "page")
    page = (tmp_path / "page/report.html").read_text()
    tags = PageParser(page).tags
    assert all(one["src"].startswith("data:image/png;base64,") for tag, one in tags if tag == "img")
    assert len([tag for tag, _ in tags if tag == "img"]) == 1 and "<script" not in page
    for text in ("Text to image", "Image to text", "Over training", "Settings that differ", "Images side by side",
                 "<b>0.5</b>",
                 '<span class="soft">0.4 to 0.6</span><span class="soft">n = 40</span>',
                 'colspan="1">clip</th>', "clip_<wbr>score&nbsp;↑", "3 captions &lt;b&gt; were"):  # fmt: skip
        assert text in page
    report = json.loads((tmp_path / "page/report.json").read_text())
    assert report["runs"]["base"]["clip · clip_score"]["curve"][0][1]["value"] == 0.2


@pytest.mark.parametrize(
    ("task", "figure", "direction"),
    [
        ("fid", "fid-rank0", -1),
        ("fid", "fd-inception-32b06add-kid", -1),
        ("fid", "fd-inception-32b06add-precision", 1),
        ("fd", "cmmd-clip-a4a37c2a", -1),
        ("loss", "image_per_pixel_documents_2", -1),
        ("harness", "kids_qa/acc_norm", 1),
        ("harness", "loss_of_words/exact_match/strict", 1),
        ("harness", "captions/bits_per_byte", -1),
        ("fid", "images", 0),
    ],
)
def test_the_better_direction_is_that_of_the_metric(task, figure, direction):
    assert Column(task, "", figure).direction == direction


def test_a_unit_is_in_the_head_once_and_notes_are_below_images(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name, note in (("one", "read: A"), ("two", "read: B")):
        images = [{"path": str(tmp_path / "a.png"), "caption": "the text A", "note": note}]
        figures = {"clip_score": Figure(1.5, unit="100 * cos")}
        Result(task="clip", figures=figures, settings={}, tables={"images": images}).write(tmp_path / name)
    write_comparison(read_runs([str(tmp_path / "one"), str(tmp_path / "two")]), tmp_path / "page")
    page = (tmp_path / "page/report.html").read_text()
    assert page.count("100 * cos") == 1 and page.count('<td class="n">1.5</td>') == 2
    assert page.count(">the text A</div>") == 1  # a row for both
    assert "<figcaption>read: A</figcaption>" in page and "<figcaption>read: B</figcaption>" in page


def test_bad_arguments_are_named(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "loss.json").write_text('{"format": 1, "task": "loss", "figures": {}}')
    (tmp_path / "text.json").write_text("loss")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/notes.json").write_text("{")  # of another program
    (tmp_path / "cut/loss.json").write_text('{"format": 1, "task": "lo')
    for arguments, fault in (
        ([tmp_path / "empty"], "has no results"),
        ([tmp_path / "nowhere"], "there is no file or folder"),
        (
            [tmp_path / "loss.json"],
            "loss.json is not a result .*, or is damaged: settings is missing",
        ),
        ([tmp_path / "text.json"], "text.json is not a result"),
        ([tmp_path / "cut"], r"cut/loss.json is not a result .*, or is damaged: not valid JSON .*; repeat the command"),
        ([tmp_path / "base", tmp_path / "base"], "two runs named base"),
    ):
        with pytest.raises(ValueError, match=fault):
            read_runs(list(map(str, arguments)))
    write(tmp_path / "base/step-00000100")
    with pytest.raises(ValueError, match="are both results of clip at step 100"):
        read_runs([str(tmp_path / "base")])
