"""The page of evidence.py: the table of claims, the figures of all arms, and plots. Only what was measured is shown."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from claims.plan import CANDIDATES, CONTRAST_K, DOCUMENTS, GUIDANCE, SAMPLING, Plan
from claims.results import Results
from claims.statements import list_claims
from claims.verdicts import FACTORS, LABELS, PERCENT, Verdict, judge_claim

matplotlib.use("agg")
from matplotlib import pyplot

COLORS = {"cm3leon": "#2f6fd0", "llama": "#c2630a"}
GRAY = "#777777"


def build_page(results: Results, plan: Plan, images: Path, prefix: str) -> str:
    """Markdown of the measured part of the page; plots are written to the folder `images`, linked with `prefix`."""
    items = results.shared["settings"]["items"]
    verdicts = [
        judge_claim(claim, family, results, plan) for claim in list_claims(len(plan.sizes)) for family in plan.families
    ]
    counts = {kind: sum(v.result.startswith(kind) for v in verdicts) for kind in ("holds", "fails", "not yet")}
    hours = sum(line["seconds"] for line in results.lines.values()) / 3600
    machine = results.shared["versions"]
    parts = [
        f"{counts['holds']} claims hold, {counts['fails']} fail, {counts['not yet']} are not yet measured, with seeds "
        f"{', '.join(map(str, plan.seeds))} and {items:,} items per arm. {len(results.lines)} units took "
        f"{hours:.1f} hours on {machine['machine']}; torch {machine['torch']}. SHA-256 of the second CLIP's weights: "
        f"{results.shared['hashes']['judge'][:16]}.",
        "A row compares the first arm of its claim with the second: the values of both (means over the seeds), their "
        "difference with its 95 % interval over items, and the difference in each seed.",
        tabulate_verdicts(verdicts, plan.families),
        "### All arms",
        f"Means over the measured seeds. Sampling: temperature {SAMPLING.temperature:g}, guidance "
        f"{SAMPLING.guidance:g}, except where an arm says otherwise.",
        tabulate_arms(results),
        "### Models",
        tabulate_models(results),
    ]
    for name, draw in PLOTS.items():
        if draw(results, plan, images / f"evidence_{name}.png"):
            parts.append(f"![{name}]({prefix}/evidence_{name}.png)")
    return "\n\n".join(part for part in parts if part)


def tabulate_verdicts(verdicts: Sequence[Verdict], families: Sequence[str]) -> str:
    """The table of claims, with two columns for each family."""
    columns = [cell for family in families for cell in (f"{family}: first, second; difference", "result")]
    lines = [f"| claim | measure | paper | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
    for start in range(0, len(verdicts), len(families)):
        row = verdicts[start : start + len(families)]
        claim = row[0].claim
        cells = [claim.text, LABELS[claim.measure], claim.paper]
        for verdict in row:
            cells += [_show_difference(verdict), verdict.result]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _show_difference(verdict: Verdict) -> str:
    if not verdict.values or not verdict.interval:
        return ""
    low, high = verdict.interval
    each = ", ".join(f"{value:+.3g}" for value in verdict.differences)
    ours = f"{verdict.values[0]:.4g}, {verdict.values[1]:.4g}"
    return f"{ours}; {np.mean(verdict.differences):+.3g} [{low:+.3g}, {high:+.3g}] ({each})"


def tabulate_arms(results: Results) -> str:
    """Means over the seeds of every measured arm."""
    groups: dict[tuple, list[dict]] = {}
    for line in results.lines.values():
        if line["study"] != "train":
            groups.setdefault((line["study"], line["arm"], line["family"], line["size"]), []).append(line)
    names = [name for name in LABELS if any(name in line["figures"] for group in groups.values() for line in group)]
    lines = [f"| study | arm | family | size | seeds | {' | '.join(LABELS[name] for name in names)} |"]
    lines.append("|---" * (len(names) + 5) + "|")
    for key in sorted(groups):
        found = groups[key]
        cells = [*key, str(len(found))]
        for name in names:
            values = [FACTORS.get(name, 1.0) * line["figures"][name][0] for line in found if name in line["figures"]]
            cells.append(f"{np.mean(values):.4g}" if values else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tabulate_models(results: Results) -> str:
    """The trained models."""
    lines = ["| model | family | size | seeds | parameters | tokens | training FLOPs | minutes |", "|---" * 8 + "|"]
    groups: dict[tuple, list[dict]] = {}
    for line in results.lines.values():
        if line["study"] == "train":
            groups.setdefault((line["arm"], line["family"], line["size"]), []).append(line)
    for key in sorted(groups):
        found, figures = groups[key], groups[key][0]["figures"]
        minutes = np.mean([line["seconds"] for line in found]) / 60
        counts = f"{figures['parameters'][0]:,} | {figures['tokens'][0]:,} | {figures['flops'][0]:.3g}"
        lines.append(f"| {' | '.join(key)} | {len(found)} | {counts} | {minutes:.1f} |")
    return "\n".join(lines) if groups else ""


def find_values(results: Results, study: str, arm: str, family: str, size: str, measure: str) -> list[float]:
    """Values of a measure in all measured seeds."""
    found = [
        line["figures"][measure][0]
        for key, line in results.lines.items()
        if key[:4] == (study, arm, family, size) and measure in line["figures"]
    ]
    return [FACTORS.get(measure, 1.0) * value for value in found]


def _draw_lines(axes, results: Results, plan: Plan, arms: list[tuple[float, str, str]], measure: str) -> bool:
    """One curve per family through arms (x, study, arm): means over the seeds, and a point for each seed."""
    drawn = False
    for family in plan.families:
        found = [(x, find_values(results, *arm, family, plan.main_size, measure)) for x, *arm in arms]
        found = [(x, values) for x, values in found if values]
        if not found:
            continue
        color, drawn = COLORS.get(family, GRAY), True
        axes.plot([x for x, _ in found], [np.mean(v) for _, v in found], color=color, marker="o", label=family)
        for x, values in found:
            axes.plot([x] * len(values), values, ".", color=color, alpha=0.35)
    return drawn


def _finish(figure, panels, path: Path, drawn: bool) -> bool:
    for axes in panels:
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    if drawn:
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return drawn


def _draw_measures(
    results: Results,
    plan: Plan,
    path: Path,
    arms: list[tuple[float, str, str]],
    measures: list[str],
    label: str,
    ceilings: str,
) -> bool:
    """A panel for each measure; `ceilings` is the study of the lines of true and reconstructed images."""
    figure, panels = pyplot.subplots(1, len(measures), figsize=(4.2 * len(measures), 3.4))
    drawn = False
    for axes, measure in zip(panels, measures, strict=True):
        drawn |= _draw_lines(axes, results, plan, arms, measure)
        axes.set(xlabel=label, ylabel=LABELS[measure])
        for arm, style in CEILINGS[ceilings].items():
            values = find_values(results, ceilings, arm, "none", "none", measure)
            if values and measure in PERCENT:
                axes.axhline(values[0], color=GRAY, linestyle=style, label=arm)
    return _finish(figure, panels, path, drawn)


CEILINGS = {
    "retrieval": {"true": ":", "reconstructed": "--", "clip": "-."},
    "memory": {"true-style": ":", "reconstructed-style": "--"},
}


def draw_retrieval(results: Results, plan: Plan, path: Path) -> bool:
    """Loss, distance and accuracy by retrieved documents."""
    arms = [(float(count), "retrieval", f"documents-{count}") for count in range(3)]
    return _draw_measures(results, plan, path, arms, ["loss", "fd", "right"], "retrieved documents", "retrieval")


def draw_demonstrations(results: Results, plan: Plan, path: Path) -> bool:
    """The held-out style by demonstrations."""
    arms = [(float(count), "memory", f"demonstrations-{count}") for count in range(DOCUMENTS + 1)]
    return _draw_measures(
        results, plan, path, arms, ["loss_image", "fd", "right"], "demonstrations in context", "memory"
    )


def draw_memory(results: Results, plan: Plan, path: Path) -> bool:
    """Accuracy of naming by what is in context, a bar per family."""
    arms = [("retrieval", "documents-0"), ("retrieval", "random-2"), ("retrieval", "documents-2")]
    arms += [("memory", "bank-2"), ("memory", "given-2")]
    labels = ["nothing", "random", "bank without\nthe names", "bank with\nthe names", "the name in\nother styles"]
    figure, axes = pyplot.subplots(figsize=(7, 3.4))
    families = plan.families
    drawn = False
    for number, family in enumerate(families):
        for place, arm in enumerate(arms):
            values = find_values(results, *arm, family, plan.main_size, "right")
            if values:
                x = place + 0.4 * (number - (len(families) - 1) / 2)
                axes.bar(x, np.mean(values), 0.36, color=COLORS.get(family, GRAY), label=None if place else family)
                axes.plot([x] * len(values), values, "k.", markersize=4)
                drawn = True
    axes.set_xticks(range(len(arms)), labels, fontsize=8)
    axes.set_ylabel("named right among the names, %")
    return _finish(figure, [axes], path, drawn)


def draw_scale(results: Results, plan: Plan, path: Path) -> bool:
    """Loss, distance and accuracy against training FLOPs; validation loss during training."""
    drawn = False
    figure, panels = pyplot.subplots(1, 3, figsize=(12.6, 3.4))
    for family in plan.families:
        color = COLORS.get(family, GRAY)
        for axes, measure in zip(panels[:2], ("fd", "right"), strict=True):
            points = []
            for size in plan.sizes:
                study = "retrieval" if size == plan.main_size else "scale"
                values = find_values(results, study, "documents-2", family, size, measure)
                flops = find_values(results, "train", "retrieval", family, size, "flops")
                if values and flops:
                    points.append((np.mean(flops), np.mean(values)))
                    axes.plot([np.mean(flops)] * len(values), values, ".", color=color, alpha=0.35)
            if points:
                axes.plot(*zip(*points, strict=True), color=color, marker="o", label=family)
                drawn = True
        for size, width in zip(plan.sizes, np.linspace(0.8, 2.4, len(plan.sizes)), strict=True):
            line = results.lines.get(("train", "retrieval", family, size, plan.seeds[0]))
            if line and line["curve"]:
                tokens, losses = np.array(line["curve"]).T
                flops = tokens * line["figures"]["flops"][0] / line["figures"]["tokens"][0]
                panels[2].plot(flops, losses, color=color, linewidth=width, label=f"{family} {size}")
                drawn = True
    for axes, name in zip(panels, (LABELS["fd"], LABELS["right"], "validation loss"), strict=True):
        axes.set(xscale="log", xlabel="training FLOPs", ylabel=name)
    return _finish(figure, panels, path, drawn)


def draw_decoding(results: Results, plan: Plan, path: Path) -> bool:
    """Accuracy and distance by guidance, by k of CD-K, and by the number of candidates."""
    figure, grid = pyplot.subplots(2, 3, figsize=(12.6, 6.4))
    guidance = [(weight, "decoding", f"guidance-{weight:g}") for weight in GUIDANCE]
    guidance = sorted([*guidance, (SAMPLING.guidance, "retrieval", "documents-2")])
    contrast = [(float(k), "decoding", "pool-contrast" if k == CONTRAST_K[1] else f"contrast-{k}") for k in CONTRAST_K]
    drawn = False
    for row, measure in zip(grid, ("fd", "right"), strict=True):
        drawn |= _draw_lines(row[0], results, plan, guidance, measure)
        drawn |= _draw_lines(row[1], results, plan, contrast, measure)
        drawn |= _draw_candidates(row[2], results, plan, measure)
        row[0].set(xlabel="guidance", ylabel=LABELS[measure])
        row[1].set(xlabel="k of CD-K", xscale="log")
        row[1].set_xticks(CONTRAST_K, list(map(str, CONTRAST_K)))
        row[2].set(xlabel="images per caption, the best by CLIP", xscale="log")
        row[2].set_xticks([1, 2, 4, CANDIDATES], ["1", "2", "4", str(CANDIDATES)])
        for axes in row[1:]:
            axes.minorticks_off()
    return _finish(figure, grid.flat, path, drawn)


def _draw_candidates(axes, results: Results, plan: Plan, measure: str) -> bool:
    """Best-of-n by n, for guidance, CD-K, and half of each."""
    drawn, factor = False, FACTORS.get(measure, 1.0)
    for family in plan.families:
        for kind, style in {"guidance": "-", "contrast": "--", "together": ":"}.items():
            curves = [
                line["curve"]
                for key, line in results.lines.items()
                if key[:3] == ("decoding", f"best-{kind}", family) and "curve" in line
            ]
            if curves:
                counts = list(curves[0])
                values = [factor * np.mean([curve[count][measure] for curve in curves]) for count in counts]
                axes.plot(
                    list(map(int, counts)), values, style, color=COLORS.get(family, GRAY), label=f"{family}, {kind}"
                )
                drawn = True
    return drawn


PLOTS = {
    "retrieval": draw_retrieval,
    "memory": draw_memory,
    "demonstrations": draw_demonstrations,
    "scale": draw_scale,
    "decoding": draw_decoding,
}
"""Name of the image -> a function that draws it, and returns False if nothing of it was measured."""
