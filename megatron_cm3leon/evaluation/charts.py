"""Charts as inline SVG whose ink follows the page: dark text on light pages, light on dark ones."""

import io
import re

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

INK, GRID = "#010203", "#040506"
"""Stand-ins that become the page's own colours, var(--ink) and var(--line)."""
COLOURS = {"loss": "#6b7280", "loss_text": "#c2630a", "loss_image": "#2f6fd0"}
NAMES = {"loss": "all tokens", "loss_text": "text", "loss_image": "image"}
_STYLE = {
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
    """Loss of text, image and all tokens by step; each attempt (leg) of the run is marked where it begins.

    `records` are the lines of metrics.jsonl in the order they were written.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(width, height))
        legs = split_legs(records)
        for key, colour in COLOURS.items():
            for leg in legs:
                steps, values = zip(*((one["step"], one.get(key)) for one in leg), strict=True)
                known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
                if not known:
                    continue
                steps, values = zip(*known, strict=True)
                axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.9)
                axes.plot(steps, smooth(values), color=colour, linewidth=1.8, label=NAMES[key])
            held_out = [(one["step"], one[f"validation_{key}"]) for one in records if one.get(f"validation_{key}")]
            if held_out:
                axes.plot(*zip(*held_out, strict=True), "o", color=colour, markersize=4.5)
        for leg in legs[1:]:
            axes.axvline(leg[0]["step"] - 0.5, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"leg {legs.index(leg) + 1} begins",
                (leg[0]["step"] - 0.5, 1),
                xycoords=("data", "axes fraction"),
                xytext=(5, -3),
                textcoords="offset points",
                va="top",
            )
        axes.set_xlabel("step")
        axes.set_ylabel("loss a token (nats)")
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlim(left=0)
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axes.legend(unique.values(), unique.keys(), frameon=False, loc="upper right", bbox_to_anchor=(1, 0.93))
        return _to_svg(figure)


def split_legs(records: list[dict]) -> list[list[dict]]:
    """Lines of one attempt after the other, in the order the attempts were made."""
    legs: dict = {}
    for one in records:
        legs.setdefault(one.get("attempt", 1), []).append(one)
    return list(legs.values())


def smooth(values, share: float = 0.9) -> list[float]:
    """Exponential moving average without the pull of its start."""
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean, weight = share * mean + (1 - share) * value, share * weight + 1 - share
        smoothed.append(mean / weight)
    return smoothed


def _to_svg(figure) -> str:
    """Inline SVG in the page's colours and font, as wide as its place, ids apart from other charts'."""
    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(INK, "var(--ink)").replace(GRID, "var(--line)")
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    text = re.sub(r"font: ([^;\"]*?)px '[^\"]*?sans-serif", r"font: \1px system-ui, sans-serif", text)
    return re.sub(r' xmlns:xlink="[^"]*"', "", text).replace("xlink:href", "href")
