"""Collect the results of a run into the content of the report, and write report.html and report.json."""

import json
import statistics
from pathlib import Path

from megatron_cm3leon.evaluation.report import build_report, percent

REQUIRED = (
    "stage_seconds",
    "heldout_accuracy",
    "checker_ceiling",
    "caption_accuracy",
    "image_psnr_db",
    "tokens_per_second",
    "export_max_abs_logit_diff",
    "loss_with_retrieval",
    "loss_without_retrieval",
)
"""Keys that report.json always has; null if not measured."""


def read_records(run: str | Path) -> list[dict]:
    """Lines of metrics.jsonl in order, without those of skipped batches, which have no loss.

    A step that was run twice has two lines.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"no metrics at {path}; give the run folder of the training.")
    # A killed run can leave a partial line at the end of an attempt.
    lines = [line for line in path.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
    return [record for record in map(json.loads, lines) if "loss" in record]


def read_stages(path: str | Path) -> dict[str, float]:
    """Seconds per stage from `name<TAB>seconds` lines, or from a JSON object; times of the same name are added."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no stage times at {path}.")
    text = path.read_text()
    if text.lstrip().startswith("{"):
        return {name: float(seconds) for name, seconds in json.loads(text).items()}
    stages: dict[str, float] = {}
    for number, line in enumerate(text.splitlines(), 1):
        name, _, seconds = line.rpartition("\t")
        try:
            stages[name] = stages.get(name, 0.0) + float(seconds)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {line!r} is not a name, a tab and seconds.") from error
    return stages


def measure_rate(records: list[dict]) -> float | None:
    """Median tokens per second of the last attempt; None if there is none."""
    last = records[-1].get("attempt") if records else None
    rates = [
        record["tokens_per_second"]
        for record in records
        if record.get("attempt") == last and record.get("tokens_per_second")
    ]
    return statistics.median(rates) if rates else None


def collect_report(
    evaluation: str | Path,
    model: str | Path,
    run: str | Path | None = None,
    stages: str | Path | None = None,
    title: str = "Report",
    subtitle: str = "",
) -> tuple[dict, dict]:
    """The content of the page, and that of report.json.

    `evaluation` is the folder that tools/evaluate.py wrote, `model` the export, `run` the run folder of the training,
    `stages` a file for `read_stages`. Raises ValueError for a folder that lacks the expected file.
    """
    path = Path(evaluation) / "evaluation.json"
    if not path.is_file():
        raise ValueError(f"no evaluation at {path}; tools/evaluate.py writes one.")
    measured = json.loads(path.read_text())
    export = Path(model) / "cm3leon.json"
    if not export.is_file():
        raise ValueError(
            f"{model} is not an exported model: it has no cm3leon.json; tools/convert_checkpoint.py writes it."
        )
    records = read_records(run) if run else []
    figures = {name: None for name in REQUIRED} | measured["figures"]
    figures["stage_seconds"] = read_stages(stages) if stages else {}
    figures["tokens_per_second"] = measure_rate(records)
    figures["export_max_abs_logit_diff"] = json.loads(export.read_text())["max_abs_logit_diff"]
    figures["evaluation_seconds"] = measured.get("seconds")
    content = {name: measured.get(name) for name in
               ("sweep", "examples", "captions", "infilling", "retrieval", "reconstructions")}  # fmt: skip
    content |= {
        "title": title,
        "subtitle": subtitle,
        "figures": figures,
        "numbers": _headline(figures),
        "curves": records,
        "accuracy": _accuracy_rows(figures),
        "accuracy_note": _accuracy_note(measured),
        "stage_seconds": figures["stage_seconds"],
    }
    return content, figures


def _headline(figures: dict) -> list[dict]:
    """The few numbers at the top; those that were not measured are not shown."""

    def all_of(name: str) -> float | None:
        return (figures.get(name) or {}).get("all")

    def number(value, form: str) -> str | None:
        return None if value is None else format(value, form)

    clip = figures.get("clip_score") or {}
    without = "" if figures["loss_with_retrieval"] is None else " without retrieved documents"
    heldout_score = number(clip.get("heldout"), ".3f")
    rows = [
        (percent(all_of("heldout_accuracy")), "of generated images show every attribute of their held-out caption"),
        (percent(all_of("checker_ceiling")), "of reconstructions are read correctly by the checker: the upper bound"),
        (percent(figures["caption_accuracy"]), "of held-out images are correctly captioned"),
        (number(figures.get("caption_word_f1"), ".2f"), "F1 of the words of those captions"),
        (number(figures["image_psnr_db"], ".1f"), "dB PSNR of the image tokenizer"),
        (number(figures["loss_with_retrieval"], ".3f"), "held-out loss with retrieved documents in context"),
        (number(figures["loss_without_retrieval"], ".3f"), f"held-out loss{without}"),
        (number(clip.get("generated"), ".3f"), f"CLIP score of generated images ({heldout_score} of held-out images)"),
        (number(figures["tokens_per_second"], ",.0f"), "training tokens per second"),
        (number(figures["export_max_abs_logit_diff"], ".2g"), "largest logit difference of the export"),
    ]  # fmt: skip
    return [{"value": value, "label": label} for value, label in rows if value not in (None, "–")]


def _accuracy_rows(figures: dict) -> list[dict]:
    guidance, retrieval = figures.get("guidance", 1), figures.get("retrieval", False)
    context = {True: "with retrieved documents", False: "without retrieved documents"}
    rows = [
        ("checker_ceiling", "held-out, reconstructed"),
        ("heldout_accuracy", f"generated, guidance {guidance:g}, {context[retrieval]}"),
        ("heldout_accuracy_without_guidance", f"generated, no guidance, {context[retrieval]}"),
        (
            "heldout_accuracy_without_retrieval" if retrieval else "heldout_accuracy_with_retrieval",
            f"generated, guidance {guidance:g}, {context[not retrieval]}",
        ),
    ]
    if guidance == 1:
        del rows[2]
    return [{"name": label, "shares": figures[name]} for name, label in rows if figures.get(name)]


def _accuracy_note(measured: dict) -> str:
    options = measured.get("options", {})
    return (
        f"Share of {options.get('pictures', '')} held-out captions whose image shows, by the checker, what the caption "
        "says. The first line is measured on the reconstructions of the held-out images by the image tokenizer: the "
        "upper bound for any model."
    )


def write_report(output: str | Path, content: dict, figures: dict, images: str | Path) -> None:
    """Write report.html and report.json; `images` is the folder that image paths in `content` are relative to."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.html").write_text(build_report(content, images))
    (output / "report.json").write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
