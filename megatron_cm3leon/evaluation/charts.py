"""Charts as inline SVG in the colors of the page: dark text on light pages, light text on dark pages."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, GRID = "#010203", "#040506"
"""Placeholders that are replaced by the page's own colors, var(--ink) and var(--line)."""
COLORS = {"loss": "#6b7280", "loss_text": "#c2630a", "loss_image": "#2f6fd0"}
NAMES = {"loss": "all tokens", "loss_text": "text", "loss_image": "image"}
RUN_COLORS = ("#2f6fd0", "#c2630a", "#2e8b57", "#b3478f", "#7a6fd0", "#8a7a1e", "#1a8a9a", "#6b7280")
"""Colors of runs, which repeat after the last one with another line style."""
_LINES = ("-", "--", ":", "-.")
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_cm3leon",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw_loss_curves(records: list[dict], width: float = 6.2, height: float = 3.4) -> str:
    """Loss of text, image and all tokens by step, as SVG of `width` x `height` inches.

    `records` are the lines of metrics.jsonl in the order they were written. The start of each later attempt is marked.
    """
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]  # its annotation lists every key of matplotlib
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        attempts = split_attempts(records)
        for key in COLORS:
            _draw_curve(axes, key, attempts)
        for number, attempt in enumerate(attempts[1:], 2):
            start = attempt[0]["step"] - 0.5
            axes.axvline(start, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"attempt {number} begins",
                (start, 1),
                xycoords=("data", "axes fraction"),
                xytext=(5, -3),
                textcoords="offset points",
                va="top",
            )
        axes.set_xlabel("step")
        axes.set_ylabel("loss per token (nats)")
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlim(left=0)
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axes.legend(unique.values(), unique.keys(), frameon=False, loc="upper right", bbox_to_anchor=(1, 0.93))
        return _to_svg(figure)


def draw_curves(
    series: dict[str, list[tuple[int, float, float | None, float | None]]],
    label: str,
    width: float = 4.6,
    height: float = 3.0,
) -> str:
    """A figure of several runs by step, as SVG: run -> (step, value, low, high), a band where all have intervals."""
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]  # its annotation lists every key of matplotlib
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for number, (name, rows) in enumerate(series.items()):
            color = RUN_COLORS[number % len(RUN_COLORS)]
            line = _LINES[number // len(RUN_COLORS) % len(_LINES)]
            steps, values, lows, highs = zip(*rows, strict=True)
            axes.plot(steps, values, line, marker="o", markersize=4, color=color, linewidth=1.8, label=name)
            if None not in lows and None not in highs:
                axes.fill_between(steps, lows, highs, color=color, alpha=0.18, linewidth=0)
        axes.set_title(label, loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.legend(frameon=False, fontsize=9)
        return _to_svg(figure)


def _draw_curve(axes: Axes, key: str, attempts: list[list[dict]]) -> None:
    """Single steps thin, their moving average thick, held-out losses as points."""
    color = COLORS[key]
    for attempt in attempts:
        known = [(record["step"], record[key]) for record in attempt if record.get(key) is not None]
        if known:
            steps, values = zip(*known, strict=True)
            axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.9)
            axes.plot(steps, smooth(values), color=color, linewidth=1.8, label=NAMES[key])
    held_out = [
        (record["step"], record[f"validation_{key}"])
        for attempt in attempts
        for record in attempt
        if record.get(f"validation_{key}")
    ]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o", color=color, markersize=4.5)


def split_attempts(records: list[dict]) -> list[list[dict]]:
    """Lines of one attempt after the other, in the order of the attempts."""
    attempts: dict[int, list[dict]] = {}
    for record in records:
        attempts.setdefault(record.get("attempt", 1), []).append(record)
    return list(attempts.values())


def smooth(values: Sequence[float], share: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for the bias of its start."""
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean, weight = share * mean + (1 - share) * value, share * weight + 1 - share
        smoothed.append(mean / weight)
    return smoothed


def _to_svg(figure: Figure) -> str:
    """Inline SVG in the page's colors and font, as wide as its container, with ids that differ between charts."""
    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(INK, "var(--ink)").replace(GRID, "var(--line)")
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    text = re.sub(r"font: ([^;\"]*?)px '[^\"]*?sans-serif", r"font: \1px system-ui, sans-serif", text)
    return re.sub(r' xmlns:xlink="[^"]*"', "", text).replace("xlink:href", "href")
