"""Collect what a run left behind into the report's content, and write report.html and report.json."""

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
"""Keys that report.json always has; null where nothing was measured."""


def read_records(run: str | Path) -> list[dict]:
    """Lines of metrics.jsonl in order, but those of batches that were left out: they have no loss.

    Where a step was run twice, both are there.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"no metrics at {path}; give the run folder of the training.")
    # A killed run can leave half a line at the end of an attempt.
    lines = [line for line in path.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
    return [record for record in map(json.loads, lines) if "loss" in record]


def read_stages(path: str | Path) -> dict[str, float]:
    """`name<TAB>seconds` lines, or a JSON object; times of one name add up."""
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
    """Median tokens a second of the last attempt."""
    last = records[-1].get("attempt") if records else None
    rates = [one["tokens_per_second"] for one in records if one.get("attempt") == last and one.get("tokens_per_second")]
    return statistics.median(rates) if rates else None


def collect_report(
    evaluation: str | Path,
    model: str | Path,
    run: str | Path | None = None,
    stages: str | Path | None = None,
    title: str = "Report",
    subtitle: str = "",
) -> tuple[dict, dict]:
    """The page's content, and report.json's."""
    path = Path(evaluation) / "evaluation.json"
    if not path.is_file():
        raise ValueError(f"no evaluation at {path}; tools/evaluate.py writes one.")
    measured = json.loads(path.read_text())
    account = Path(model) / "cm3leon.json"
    if not account.is_file():
        raise ValueError(
            f"{model} is no exported model: it has no cm3leon.json; tools/convert_checkpoint.py writes it."
        )
    records = read_records(run) if run else []
    figures = {name: None for name in REQUIRED} | measured["figures"]
    figures["stage_seconds"] = read_stages(stages) if stages else {}
    figures["tokens_per_second"] = measure_rate(records)
    figures["export_max_abs_logit_diff"] = json.loads(account.read_text())["max_abs_logit_diff"]
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
    """The few numbers at the top; what was not measured is not shown."""

    def all_of(name: str) -> float | None:
        return (figures.get(name) or {}).get("all")

    def number(value, form: str) -> str | None:
        return None if value is None else format(value, form)

    clip = figures.get("clip_score") or {}
    alone = "" if figures["loss_with_retrieval"] is None else " without them"
    real = number(clip.get("heldout"), ".3f")
    rows = [
        (percent(all_of("heldout_accuracy")), "of held-out captions drawn right in every attribute"),
        (percent(all_of("checker_ceiling")), "of reconstructions read right by the checker: the ceiling"),
        (percent(figures["caption_accuracy"]), "of held-out pictures captioned right"),
        (number(figures.get("caption_word_f1"), ".2f"), "F1 of the words of those captions"),
        (number(figures["image_psnr_db"], ".1f"), "dB PSNR of the image tokenizer"),
        (number(figures["loss_with_retrieval"], ".3f"), "held-out loss behind retrieved documents"),
        (number(figures["loss_without_retrieval"], ".3f"), f"held-out loss{alone}"),
        (number(clip.get("generated"), ".3f"), f"CLIP score of generated pictures ({real} of held-out ones)"),
        (number(figures["tokens_per_second"], ",.0f"), "training tokens a second"),
        (number(figures["export_max_abs_logit_diff"], ".2g"), "largest logit difference of the export"),
    ]  # fmt: skip
    return [{"value": value, "label": label} for value, label in rows if value not in (None, "–")]


def _accuracy_rows(figures: dict) -> list[dict]:
    guidance, retrieval = figures.get("guidance", 1), figures.get("retrieval", False)
    behind = {True: "behind retrieved documents", False: "no retrieved documents"}
    rows = [
        ("checker_ceiling", "held-out, reconstructed"),
        ("heldout_accuracy", f"generated, guidance {guidance:g}, {behind[retrieval]}"),
        ("heldout_accuracy_without_guidance", f"generated, no guidance, {behind[retrieval]}"),
        (
            "heldout_accuracy_without_retrieval" if retrieval else "heldout_accuracy_with_retrieval",
            f"generated, guidance {guidance:g}, {behind[not retrieval]}",
        ),
    ]
    if guidance == 1:
        del rows[2]
    return [{"name": label, "shares": figures[name]} for name, label in rows if figures.get(name)]


def _accuracy_note(measured: dict) -> str:
    options = measured.get("options", {})
    return (
        f"Share of {options.get('pictures', '')} held-out captions whose pictures the checker reads as the caption "
        "says. The first line is what the checker makes of the held-out pictures themselves, behind the image "
        "tokenizer: no model can do better."
    )


def write_report(output: str | Path, content: dict, figures: dict, pictures: str | Path) -> None:
    """Write report.html and report.json."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.html").write_text(build_report(content, pictures))
    (output / "report.json").write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
