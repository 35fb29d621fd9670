"""The page that compares runs: tables in the form of the paper's tables 1 and 2, curves over training, images.

write_comparison(runs, output)    writes report.html and report.json; nothing on the page is loaded from elsewhere
"""

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from itertools import groupby
from pathlib import Path

from PIL import Image

from megatron_cm3leon.evaluation.charts import draw_curves
from megatron_cm3leon.evaluation.compare import (
    Column,
    Run,
    ShownImage,
    collect_columns,
    collect_images,
    find_differences,
)
from megatron_cm3leon.evaluation.report import STYLE
from megatron_cm3leon.evaluation.result import Figure
from megatron_cm3leon.tokenizers.images import load_image

TABLES = (
    ("Text to image", "In the form of table 1 of CM3Leon (arXiv 2309.02591).", ("fid", "fd", "clip", "geneval", "ocr")),
    ("Image to text", "In the form of its table 2.", ("caption", "vqa")),
    ("Infilling", "Hidden words of captions and hidden boxes of images.", ("infill",)),
    ("Language and loss", "Tasks of text alone, and held-out losses.", ("loss", "harness")),
)
"""Title, note and tasks of each table; tasks that are in none follow in a table of their own."""
MAIN = {"geneval": ("score", "correct_prompts"), "ocr": ("character_error_rate", "word_error_rate")}
"""Figures of a task that the tables and curves show, where they do not show all."""
EXAMPLES = 12
"""Rows of images per result."""
IMAGE_SIDE = 256
"""Pixels to which larger images are reduced on the page."""
MOST_BESIDE = 3
"""Runs whose images are shown in two grids beside each other."""
SHORT_NAME = 16
"""Characters of a name that is not broken at hyphens."""
_STYLE = """
main { max-width: 88rem; }
.compare th.n, .compare td.n { padding: .35rem .6rem; }
.compare .task { text-align: center; border-left: 1px solid var(--line); }
.compare .soft { font-size: .8rem; display: block; }
.compare td b { font-weight: 700; }
.compare thead th { vertical-align: bottom; max-width: 8.5rem; white-space: normal; line-height: 1.3; }
.compare tbody th { white-space: nowrap; }
.wide { table-layout: auto; } .wide td { overflow-wrap: anywhere; max-width: 22rem; font-size: .85rem; }
.grids { display: flex; flex-wrap: wrap; gap: .5rem 3rem; align-items: start; }
.sides { display: grid; gap: .5rem .8rem; align-items: start; }
.sides .head { font-weight: 600; font-size: .9rem; overflow-wrap: anywhere; }
.sides .text { font-size: .88rem; line-height: 1.35; overflow-wrap: anywhere; }
.sides figure { max-width: 7rem; } .sides .none { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1rem; }
"""


def write_comparison(
    runs: Sequence[Run], output: str | Path, title: str = "Comparison of runs", examples: int = EXAMPLES
) -> None:
    """Write report.html and report.json; ValueError for an image that cannot be read."""
    output = Path(output)
    page = build_page(runs, title, examples)
    columns = collect_columns(runs)
    figures = {
        run.name: {
            column.name: asdict(figure) | {"curve": [[step, asdict(one)] for step, one in run.find_curve(column)]}
            for column in columns
            if (figure := run.find_figure(column)) is not None
        }
        for run in runs
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.html").write_text(page, encoding="utf-8")
    (output / "report.json").write_text(json.dumps({"runs": figures}, indent=2, ensure_ascii=False) + "\n")


def build_page(runs: Sequence[Run], title: str, examples: int) -> str:
    """The page's HTML."""
    columns = collect_columns(runs)
    shown = [column for column in columns if column.figure in MAIN.get(column.task, (column.figure,))]
    known = [task for _, _, tasks in TABLES for task in tasks]
    others = tuple(dict.fromkeys(column.task for column in shown if column.task not in known))
    parts = [
        _draw_table(name, note, runs, [column for task in tasks for column in shown if column.task == task])
        for name, note, tasks in (*TABLES, ("Other tasks", "", others))
    ]
    parts += [_draw_curves(runs, shown), _draw_images(runs, examples), _draw_differences(runs)]
    parts += [_draw_all(runs, columns) if len(columns) > len(shown) else "", _draw_notes(runs)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(filter(None, parts)) + "\n</main>\n</body>\n</html>\n"
    )


def _draw_table(title: str, note: str, runs: Sequence[Run], columns: list[Column]) -> str:
    """A run per row, a figure per column, as the paper's tables."""
    rows = [run for run in runs if any(run.find_figure(column) for column in columns)]
    if not rows:
        return ""
    facts = {run.name: _find_facts(run, columns) for run in rows}
    fact_names = [name for name in ("step", "retrieved documents") if any(facts[run.name][name] for run in rows)]
    units = {column: _find_unit(rows, column) for column in columns}
    best = {column: _find_best(rows, column) for column in columns}
    body = ""
    for run in rows:
        body += f'<tr><th scope="row">{escape(run.name)}</th>'
        body += "".join(f'<td class="n">{facts[run.name][name] or "–"}</td>' for name in fact_names)
        body += "".join(
            _draw_cell(run.find_figure(column), run.name in best[column], units[column]) for column in columns
        )
        body += "</tr>"
    note += " Below each figure its 95 % bootstrap interval and the number of items; the best of a column is bold."
    return (
        f'<section><h2>{title}</h2><p class="note">{escape(note.strip())}</p><div class="scroll">'
        f'<table class="compare"><thead>{_draw_head(columns, fact_names, units)}</thead><tbody>{body}</tbody></table>'
        f"</div></section>"
    )


def _draw_head(columns: Sequence[Column], fact_names: Sequence[str], units: dict[Column, str]) -> str:
    """Two rows: the tasks, each above its columns, and the figures; a unit that all of a task have is said once."""
    arrows = {-1: "&nbsp;↓", 0: "", 1: "&nbsp;↑"}
    first = '<th scope="col" rowspan="2">run</th>'
    first += "".join(f'<th class="n" scope="col" rowspan="2">{name}</th>' for name in fact_names)
    second = ""
    for task, group in groupby(columns, key=lambda column: column.task):
        members = list(group)
        shared = {units[column] for column in members}
        unit = shared.pop() if len(shared) == 1 else ""
        first += f'<th class="n task" scope="colgroup" colspan="{len(members)}">{escape(task)}{_draw_small(unit)}</th>'
        figures = [column.figure for column in members]
        for column in members:
            # The folder is said only where it distinguishes columns.
            folder = f"{column.variant} · " if column.variant and figures.count(column.figure) > 1 else ""
            name = f"{_break_name(folder + column.figure)}{arrows[column.direction]}"
            small = _draw_small("" if unit else units[column])
            second += f'<th class="n" scope="col">{name}{small}</th>'
    return f"<tr>{first}</tr><tr>{second}</tr>"


def _break_name(name: str) -> str:
    """A name that may be broken after slashes and underscores, a short one not at hyphens or before its last number."""
    text = re.sub(r"(/|_(?!\d+$))", r"\1<wbr>", escape(name))
    return text if len(name) > SHORT_NAME else text.replace("-", "&#8209;")


def _find_facts(run: Run, columns: list[Column]) -> dict[str, str]:
    """Step and number of retrieved documents of a run's results, several values joined."""
    found = [run.find_latest(column.task, column.variant) for column in columns]
    latest = [one for one in found if one is not None]
    steps = dict.fromkeys(f"{step:,}" for step, _, _ in latest if step is not None)
    documents = dict.fromkeys(
        _list_values(result.settings["documents"]) for _, result, _ in latest if _has_documents(result.settings)
    )
    return {"step": ", ".join(steps), "retrieved documents": ", ".join(documents)}


def _list_values(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _has_documents(settings: dict) -> bool:
    return settings.get("documents") is not None


def _find_best(runs: Sequence[Run], column: Column) -> set[str]:
    """Names of the runs with the best figure; none if the direction is not known or there is nothing to compare."""
    values = {run.name: figure.value for run in runs if (figure := run.find_figure(column)) is not None}
    if column.direction == 0 or len(values) < 2 or len(set(values.values())) == 1:
        return set()
    best = max(values.values(), key=lambda value: column.direction * value)
    return {name for name, value in values.items() if value == best}


def _find_unit(runs: Sequence[Run], column: Column) -> str:
    """The unit that all figures of a column have; empty if they have none, or several."""
    units = {figure.unit for run in runs if (figure := run.find_figure(column)) is not None}
    return units.pop() if len(units) == 1 else ""


def _draw_small(text: str) -> str:
    return f'<span class="soft">{escape(text)}</span>' if text else ""


def _draw_cell(figure: Figure | None, best: bool, unit: str) -> str:
    """A table cell; `unit` is what the table's head says, and is not repeated."""
    if figure is None:
        return '<td class="n">–</td>'
    value = f"{figure.value:.4g}{f' {escape(figure.unit)}' if figure.unit != unit else ''}"
    interval = "" if figure.low is None or figure.high is None else f"{figure.low:.3g} to {figure.high:.3g}"
    count = "" if figure.n is None else f"n = {figure.n:,}"
    value = f"<b>{value}</b>" if best else value
    return f'<td class="n">{value}{_draw_small(interval)}{_draw_small(count)}</td>'


def _draw_curves(runs: Sequence[Run], columns: list[Column]) -> str:
    """A chart per figure that some run has at several steps."""
    charts = []
    for column in columns:
        curves = {run.name: run.find_curve(column) for run in runs}
        if all(len(curve) < 2 for curve in curves.values()):
            continue
        series = {
            name: [(step, one.value, one.low, one.high) for step, one in curve]
            for name, curve in curves.items()
            if curve
        }
        alt = escape(f"{column.name} by step of {', '.join(series)}", quote=True)
        chart = draw_curves(series, column.name).replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)
        charts.append(f'<div class="chart">{chart}</div>')
    if not charts:
        return ""
    return (
        '<section><h2>Over training</h2><p class="note">Bands are 95 % bootstrap intervals.</p>'
        f'<div class="charts">{"".join(charts)}</div></section>'
    )


def _draw_images(runs: Sequence[Run], examples: int) -> str:
    sections = ""
    for name, rows in collect_images(runs, examples):
        shown = [number for number in range(len(runs)) if any(images[number] for _, images in rows)]
        # Two grids of half the rows beside each other where they fit.
        size = -(-len(rows) // 2) if len(shown) <= MOST_BESIDE and len(rows) > 2 else len(rows)
        grids = [_draw_grid(runs, shown, rows[start : start + size]) for start in range(0, len(rows), size)]
        sections += f'<h3>{escape(name)}</h3><div class="scroll grids">{"".join(grids)}</div>'
    return f"<section><h2>Images side by side</h2>{sections}</section>" if sections else ""


def _draw_grid(
    runs: Sequence[Run], shown: Sequence[int], rows: Sequence[tuple[str, Sequence[ShownImage | None]]]
) -> str:
    """A caption and an image of each of the runs `shown` per row."""
    cells = '<div class="head"></div>'
    cells += "".join(f'<div class="head">{escape(runs[number].name)}</div>' for number in shown)
    for caption, images in rows:
        cells += f'<div class="text">{escape(caption)}</div>'
        for number in shown:
            cells += _draw_image(images[number], f"{runs[number].name}: {caption}")
    columns = f"grid-template-columns: minmax(8rem, 14rem) repeat({len(shown)}, minmax(5rem, 8rem))"
    return f'<div class="sides" style="{columns}">{cells}</div>'


def _draw_image(image: ShownImage | None, alt: str) -> str:
    if image is None:
        return '<div class="none">–</div>'
    note = f"<figcaption>{escape(image.note)}</figcaption>" if image.note else ""
    return f'<figure><img alt="{escape(alt, quote=True)}" src="{_encode_image(image.path)}">{note}</figure>'


def _encode_image(path: Path) -> str:
    """A data URI; images larger than IMAGE_SIDE are reduced."""
    image = load_image(path)
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _draw_differences(runs: Sequence[Run]) -> str:
    rows = find_differences(runs)
    if len(runs) < 2:
        return ""
    if not rows:
        return "<section><h2>Settings</h2><p>The runs have the same settings, inputs and versions.</p></section>"
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(value)}</td>" for value in values)}</tr>'
        for name, values in rows
    )
    return (
        '<section><h2>Settings that differ</h2><p class="note">Figures of a task can be compared only as far as these '
        "differences are what is compared. The models' own hashes are not listed.</p>"
        f'<div class="scroll"><table class="wide"><tr><th scope="col">setting</th>{head}</tr>{body}</table></div>'
        "</section>"
    )


def _draw_all(runs: Sequence[Run], columns: list[Column]) -> str:
    """Every figure per row, a run per column."""
    head = "".join(f'<th class="n" scope="col">{escape(run.name)}</th>' for run in runs)
    body = ""
    for column in columns:
        best = _find_best(runs, column)
        unit = _find_unit(runs, column)
        cells = "".join(_draw_cell(run.find_figure(column), run.name in best, unit) for run in runs)
        body += f'<tr><th scope="row">{escape(column.name)}{_draw_small(unit)}</th>{cells}</tr>'
    return (
        '<section><h2>All figures</h2><div class="scroll"><table class="compare">'
        f'<thead><tr><th scope="col">figure</th>{head}</tr></thead><tbody>{body}</tbody></table></div></section>'
    )


def _draw_notes(runs: Sequence[Run]) -> str:
    notes = []
    for run in runs:
        for task, variant in run.results:
            latest = run.find_latest(task, variant)
            if latest is not None:
                notes += [f"<li>{escape(run.name)}, {escape(task)}: {escape(note)}</li>" for note in latest[1].notes]
    return f"<section><h2>Notes</h2><ul>{''.join(notes)}</ul></section>" if notes else ""
