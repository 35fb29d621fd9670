"""The report: one file that loads no other, and figures in report.json."""

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from megatron_cm3leon.evaluation.assemble import REQUIRED, collect_report, measure_rate, read_stages, write_report
from megatron_cm3leon.evaluation.charts import smooth

ACCURACY = {"color": 0.9, "shape": 0.5, "all": 0.45}
JUDGED = {"color": ["red", "red", True], "shape": ["ring", "circle", False]}


@pytest.fixture
def folder(tmp_path):
    evaluation, model, run = tmp_path / "evaluation", tmp_path / "model", tmp_path / "run"
    for folder in (evaluation / "pictures", model, run):
        folder.mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(evaluation / "pictures/a.png")
    a = "pictures/a.png"
    caption = 'a <b>"red"</b> & small circle'
    measured = {
        "figures": {"heldout_accuracy": ACCURACY, "checker_ceiling": ACCURACY, "guidance": 3.0, "retrieval": False,
                    "heldout_accuracy_without_guidance": ACCURACY, "heldout_accuracy_with_retrieval": ACCURACY,
                    "caption_accuracy": 0.75, "image_psnr_db": 21.5, "loss_with_retrieval": 1.25,
                    "loss_without_retrieval": 1.5},
        "options": {"pictures": 8},
        "sweep": [{"guidance": 1.0, "retrieval": True, "accuracy": ACCURACY},
                  {"guidance": 3.0, "retrieval": False, "accuracy": ACCURACY}],
        "examples": [{"caption": caption, "original": a, "plain": a, "guided": a, "plain_judged": JUDGED,
                      "guided_judged": JUDGED}],
        "captions": [{"picture": a, "caption": caption, "made": "", "right": False}],
        "infilling": [{"caption": caption, "before": a, "masked": a, "after": a, "kept_codes": 32, "other_codes": 32}],
        "retrieval": [{"caption": caption, "picture": a, "neighbours": [{"caption": "b", "picture": a, "score": 0.8}]}],
        "reconstructions": [{"caption": caption, "original": a, "reconstruction": a, "psnr_db": 21.5}],
        "seconds": {"load": 1.0},
    }  # fmt: skip
    (evaluation / "evaluation.json").write_text(json.dumps(measured))
    (model / "cm3leon.json").write_text(json.dumps({"max_abs_logit_diff": 2e-7}))
    steps = [(1, 1, 100), (1, 2, 100), (1, 3, 100), (2, 3, 900), (2, 4, 1000), (2, 5, 1100)]
    lines = [
        {"attempt": attempt, "step": step, "loss": 5 / step, "loss_text": 4 / step,
         "loss_image": None if step == 2 else 1,
         "tokens_per_second": rate, **({"validation_loss": 2.0} if step == 4 else {})}
        for attempt, step, rate in steps
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + '\n{"attempt": 2, "st')
    (tmp_path / "stages.tsv").write_text("pairs\t2.0\ntraining, two ranks\t60.5\npairs\t1.0\n")
    return tmp_path


def build_report(folder, **options):
    content, figures = collect_report(folder / "evaluation", folder / "model", **options)
    write_report(folder / "report", content, figures, folder / "evaluation")
    return (folder / "report/report.html").read_text(), json.loads((folder / "report/report.json").read_text())


class PageParser(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_has_all_parts_and_loads_no_other_file(folder):
    page, _ = build_report(folder, run=folder / "run", stages=folder / "stages.tsv", title="A & B")
    tags = PageParser(page).tags
    for heading in ("Training", "Does the image show its caption?", "Held-out captions", "Infilling", "Retrieval",
                    "Captions of held-out images", "The image tokenizer", "Time"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in page
    assert "attempt 2 begins" in page and "45 %" in page and "21.5 dB" in page and "training, two ranks" in page
    assert "guidance 3, without retrieved documents" in page
    assert "generated, guidance 3, with retrieved documents" in page
    assert "✗ circle" in page and "✓" in page and "0.80" in page
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) == 3 + 1 + 3 + 2 + 2
    assert all(one["src"].startswith("data:image/png;base64,") and one["alt"] for one in images)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)""", page)
    assert "@import" not in page and "<script" not in page and "http-equiv" not in page
    assert not re.search(r"url\((?!#)", page)
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object"}
    assert "a <b>" not in page and "&lt;b&gt;" in page and "<title>A &amp; B</title>" in page
    assert '<svg role="img" aria-label="Loss by step' in page and "var(--ink)" in page


def test_report_json_has_all_figures(folder):
    _, figures = build_report(folder, run=folder / "run", stages=folder / "stages.tsv")
    assert set(REQUIRED) <= set(figures)
    assert figures["heldout_accuracy"] == ACCURACY and figures["loss_with_retrieval"] == 1.25
    assert figures["stage_seconds"] == {"pairs": 3.0, "training, two ranks": 60.5}
    assert figures["tokens_per_second"] == 1000 and figures["export_max_abs_logit_diff"] == 2e-7


def test_parts_that_were_not_measured_are_omitted(folder):
    minimal = {"figures": {"image_psnr_db": 30.0, "caption_accuracy": None}}
    (folder / "evaluation/evaluation.json").write_text(json.dumps(minimal))
    page, figures = build_report(folder)
    PageParser(page)
    assert figures["heldout_accuracy"] is None and figures["stage_seconds"] == {}
    assert "Held-out captions" not in page and "Training" not in page and "None" not in page and "30.0" in page


def test_without_a_checker_the_sweep_shows_clip_scores(folder):
    path = folder / "evaluation/evaluation.json"
    measured = json.loads(path.read_text())
    for name in [name for name in measured["figures"] if name.startswith(("heldout_", "checker_"))]:
        del measured["figures"][name]
    measured["sweep"] = [{"guidance": 1.5, "retrieval": True, "clip_score": 0.2504}]
    path.write_text(json.dumps(measured))
    page, _ = build_report(folder)
    PageParser(page)
    assert "guidance 1.5, with retrieved documents" in page and "0.250" in page
    assert "Does the image" not in page


def test_missing_and_invalid_inputs_are_named(folder):
    with pytest.raises(ValueError, match=r"no metrics at .*nowhere"):
        build_report(folder, run=folder / "nowhere")
    with pytest.raises(ValueError, match="no stage times at"):
        build_report(folder, stages=folder / "nowhere")
    (folder / "bad.tsv").write_text("pairs 3.0\n")
    with pytest.raises(ValueError, match=r"bad.tsv:1: 'pairs 3.0' is not a name, a tab and seconds"):
        read_stages(folder / "bad.tsv")
    (folder / "model/cm3leon.json").unlink()
    with pytest.raises(ValueError, match="is not an exported model"):
        build_report(folder)
    (folder / "evaluation/evaluation.json").unlink()
    with pytest.raises(ValueError, match="no evaluation at"):
        build_report(folder)


def test_stage_times_may_be_json(folder):
    (folder / "stages.json").write_text('{"a": 1, "b": 2.5}')
    assert read_stages(folder / "stages.json") == {"a": 1.0, "b": 2.5}


def test_smoothing_starts_at_the_first_value():
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([1.0, 3.0])[1] == pytest.approx((0.9 * 0.1 * 1 + 0.1 * 3) / (0.9 * 0.1 + 0.1))
    assert measure_rate([]) is None
