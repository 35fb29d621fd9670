"""Results of several runs, collected for one page: figures by column, curves over training, images side by side.

A run is a result file of tools/evaluate.py, or a folder with such files at any depth. The step of a result is its
setting `step`, or the number of a folder such as `step-00001000` on its path; without either it has none.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_cm3leon.evaluation.result import Figure, Result, read_result
from megatron_cm3leon.evaluation.tasks import TASKS

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_KEYS = {"format", "task", "figures", "settings"}
_STEP = re.compile(r"step[-_]?(\d+)")
_SHARES = re.compile(r"(^|[-_])(precision|recall)\b")
"""Of `fd-inception-HEX8-precision`, too, which begins like a distance."""
_LOWER = re.compile(r"^(fid|kid|fd|cmmd)\b|loss|_per_(byte|pixel)|bits|perplexity|error|mean_rank")
_HIGHER = re.compile(r"acc|score|cider|bleu|rouge|meteor|spice|exact|correct|ndcg|mrr|r@|f1|clip|_at_")


@dataclass(frozen=True)
class Column:
    """A figure that several runs have."""

    task: str
    variant: str
    """Folder of the result below the run, without its step; empty if it only repeats the task."""
    figure: str

    @property
    def name(self) -> str:
        """As the page shows it."""
        parts = [self.task, self.variant, "" if self.figure == self.task else self.figure]
        return " · ".join(part for part in parts if part)

    @property
    def direction(self) -> int:
        """-1 where lower is better, 1 where higher is better, 0 if that is not known from the name."""
        name = self.figure.lower()
        if self.task == "harness" and "/" in name:
            name = name.split("/")[1]  # TASK/METRIC or TASK/METRIC/FILTER
        if _SHARES.search(name):
            return 1
        if _LOWER.search(name):
            return -1
        return 1 if _HIGHER.search(name) or self.task in ("geneval", "vqa", "caption", "infill") else 0


@dataclass
class Run:
    """The results of one run."""

    name: str
    results: dict[tuple[str, str], dict[int | None, tuple[Result, Path]]] = field(default_factory=dict)
    """(task, variant) -> step -> result and its folder."""

    def find_latest(self, task: str, variant: str) -> tuple[int | None, Result, Path] | None:
        """The result of the last step."""
        by_step = self.results.get((task, variant))
        if not by_step:
            return None
        step = max(by_step, key=lambda one: -1 if one is None else one)
        return step, *by_step[step]

    def find_figure(self, column: Column) -> Figure | None:
        """The figure of a column at the last step."""
        latest = self.find_latest(column.task, column.variant)
        return None if latest is None else latest[1].figures.get(column.figure)

    def find_curve(self, column: Column) -> list[tuple[int, Figure]]:
        """(step, figure) of every step that has one."""
        by_step = self.results.get((column.task, column.variant), {})
        rows = [(step, result.figures.get(column.figure)) for step, (result, _) in by_step.items() if step is not None]
        return sorted([(step, figure) for step, figure in rows if figure is not None], key=lambda row: row[0])


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """Runs of `PATH` or `NAME=PATH` arguments; ValueError for a path without results, and for a name given twice."""
    runs: list[Run] = []
    for argument in arguments:
        name, separator, rest = argument.partition("=")
        path = Path(rest if separator and not Path(argument).exists() else argument)
        run = Run(
            name if separator and not Path(argument).exists() else path.stem if path.is_file() else path.resolve().name
        )
        if run.name in {one.name for one in runs}:
            raise ValueError(f"--compare has two runs named {run.name}; give them names: NAME=PATH.")
        for file in [path] if path.is_file() else _find_results(path):
            _add_result(run, file, path)
        runs.append(run)
    return runs


def _find_results(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"--compare ({folder}): there is no file or folder; give what tools/evaluate.py TASK wrote.")
    found = [path for path in sorted(folder.rglob("*.json")) if _is_result(path)]
    if not found:
        raise ValueError(f"--compare ({folder}) has no results; tools/evaluate.py TASK --output writes TASK.json.")
    return found


def _is_result(path: Path) -> bool:
    """Whether a JSON file is TASK.json of a task: a folder of results has others, too. A damaged one is."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return path.stem in TASKS
    return isinstance(content, dict) and set(content) >= _KEYS and content["task"] == path.stem


def _add_result(run: Run, file: Path, root: Path) -> None:
    result = read_result(file)
    parts = [] if file == root else list(file.parent.relative_to(root).parts)
    steps = [match for part in [root.name, *parts] if (match := _STEP.fullmatch(part))]
    step = result.settings.get("step") or (int(steps[-1][1]) if steps else None)
    variant = "/".join(part for part in parts if not _STEP.fullmatch(part) and part != result.task)
    by_step = run.results.setdefault((result.task, variant), {})
    if step in by_step:
        at = "" if step is None else f" at step {step}"
        raise ValueError(
            f"{file} and {by_step[step][1]} are both results of {result.task}{at}; put them into folders of their own, "
            f"named step-STEP if they are of different steps."
        )
    by_step[step] = (result, file.parent)


def collect_columns(runs: Sequence[Run]) -> list[Column]:
    """Every figure of the last results, in the order in which the results have them."""
    columns: dict[Column, None] = {}
    for run in runs:
        for task, variant in run.results:
            latest = run.find_latest(task, variant)
            assert latest is not None
            columns |= dict.fromkeys(Column(task, variant, figure) for figure in latest[1].figures)
    return list(columns)


def find_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(what, value per run) of all settings, inputs, seeds and versions that are not the same in all runs.

    The model is meant to differ and is not listed. Hashes are cut to 12 digits; a run without the result has a dash.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run.results))
    rows = []
    for task, variant in keys:
        found = [_describe_result(run.find_latest(task, variant)) for run in runs]
        for name in dict.fromkeys(name for one in found if one for name in one):
            values = ["–" if one is None else one.get(name, "–") for one in found]
            if len({value for value, one in zip(values, found, strict=True) if one is not None}) > 1:
                label = " · ".join(part for part in (task, variant) if part)
                rows.append((f"{label}: {name}", values))
    return rows


def _describe_result(latest: tuple[int | None, Result, Path] | None) -> dict[str, str] | None:
    """What numbers depend on, as short texts."""
    if latest is None:
        return None
    result = latest[1]
    described = {
        name: json.dumps(value, ensure_ascii=False) for name, value in result.settings.items() if name != "step"
    }
    described["seed"] = str(result.seed)
    described |= {f"SHA-256 of {name}": value[:12] for name, value in result.inputs.items() if name != "model"}
    return described | {f"version of {name}": value for name, value in result.versions.items()}


@dataclass(frozen=True)
class ShownImage:
    """An image of a result, and what the result says about it, such as its score."""

    path: Path
    note: str = ""


def collect_images(runs: Sequence[Run], most: int) -> list[tuple[str, list[tuple[str, list[ShownImage | None]]]]]:
    """For each result with images: its name, and rows of (caption, image per run), at most `most` rows.

    A result names its images in `tables.images`, a list of {"path", "caption", "note"} with paths relative to its
    folder and an optional note; otherwise they are the files of its folder `images`. Images are of the same row if name
    and caption are the same.
    """
    sections = []
    for task, variant in dict.fromkeys(key for run in runs for key in run.results):
        latest = [run.find_latest(task, variant) for run in runs]
        listed = [{} if one is None else _list_images(one[1], one[2]) for one in latest]
        keys = sorted(
            dict.fromkeys(key for one in listed for key in one), key=lambda key: -sum(key in one for one in listed)
        )
        rows = [(caption or name, [one.get((name, caption)) for one in listed]) for name, caption in keys[:most]]
        if rows:
            sections.append((" · ".join(part for part in (task, variant) if part), rows))
    return sections


def _list_images(result: Result, folder: Path) -> dict[tuple[str, str], ShownImage]:
    """(name, caption) -> image of a result."""
    listed = result.tables.get("images")
    if isinstance(listed, list):
        # The caption alone identifies an image that lies outside the result's folder.
        named = [("" if Path(one["path"]).is_absolute() else one["path"], one) for one in listed]
        return {
            (name, one["caption"]): ShownImage(folder / one["path"], one.get("note", ""))
            for name, one in named
            if (folder / one["path"]).is_file()
        }
    files = sorted((folder / "images").glob("*")) if (folder / "images").is_dir() else []
    return {(path.name, ""): ShownImage(path) for path in files if path.suffix.lower() in IMAGE_ENDINGS}
