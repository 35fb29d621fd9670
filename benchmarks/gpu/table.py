"""Write the tables of docs/benchmarks.md from the files of the drivers, with the earlier predictions.

    python benchmarks/gpu/table.py gpu-results/*.jsonl                                 prints them
    python benchmarks/gpu/table.py gpu-results/*.jsonl --write docs/benchmarks.md      writes them between its two marks
    python benchmarks/gpu/table.py --write docs/benchmarks.md                          only the predictions

All rows are listed, including those that ran out of memory, exceeded their time or failed; of several rows with the
same name on the same GPU, the last one is used. A prediction is a JSON line with the `kind` and `name` of a row, `gpu`,
a part of the GPU's name, and `tflops` (training) or `seconds` (generation), with or without bounds such as `tflops_low`
and `tflops_high`.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PREDICTED = ROOT / "benchmarks" / "results" / "gpu_predicted.jsonl"
BEGIN, END = "<!-- tables of benchmarks/gpu/table.py: begin -->", "<!-- tables of benchmarks/gpu/table.py: end -->"
VALUE = {"training": ("tflops", 0), "generation": ("seconds", 2)}
"""Kind -> predicted field, and its decimal places."""
HEADERS = {
    "training": (
        "model", "layers", "M parameters", "ms", "tokens/s", "TFLOP/s", "predicted", "MFU", "peak GiB", "planned GiB",
    ),
    "generation": (
        "model", "seconds", "predicted", "images/s", "first call, s", "graph, ms per token", "TB/s", "of a plain read",
        "peak GiB",
    ),
}  # fmt: skip
CARD = ("driver", "torch", "cuda", "cudnn", "triton", "megatron-core", "transformers", "commit")


def read_files(paths: list[Path]) -> dict[str, dict[str, list[dict]]]:
    """GPU -> kind -> its rows, the last one of each name; the rows of kind `machine` describe the GPU."""
    cards: dict[str, dict[str, dict]] = {}
    for path in paths:
        card = None
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                if number == len(lines):
                    continue  # the driver was killed while it wrote this line
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}); give files that the drivers wrote."
                ) from error
            if row.get("kind") == "machine":
                card = cards.setdefault(row["gpu"], {})
            if card is None:
                raise ValueError(
                    f"{path} does not begin with a row about the machine; give files that the drivers wrote."
                )
            # A group has several rows, one per kernel; a row that ran out of memory was repeated with fewer layers.
            layers = row.get("layers") if row.get("out_of_memory") else None
            key = row["name"], row.get("kernel"), row.get("model"), row.get("rows"), layers
            rows = card.setdefault(row["kind"], {})
            if "skipped" not in row or key not in rows:
                rows.pop(key, None)
                rows[key] = row
    return {name: {kind: list(rows.values()) for kind, rows in card.items()} for name, card in cards.items()}


def read_predictions(path: Path) -> list[dict]:
    """The lines of a file of predictions; empty if the file does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []


def show_prediction(prediction: dict | None) -> str:
    """The bounds of a prediction if it has them, else its value."""
    if not prediction:
        return ""
    field, places = VALUE[prediction["kind"]]
    if f"{field}_low" not in prediction:
        return number(prediction[field], places)
    return f"{number(prediction[f'{field}_low'], places)}-{number(prediction[f'{field}_high'], places)}"


def number(value: float | None, places: int = 2) -> str:
    return "" if value is None else f"{value:.{places}f}"


def gib(value: int | None) -> str:
    return number(value / 2**30, 1) if value else ""


def reason(row: dict) -> str:
    """Why a row has no measurement, in a few words; empty if it has one."""
    if row.get("out_of_memory"):
        return "out of memory"
    if "failed" in row:
        lines = row["failed"].strip().splitlines() or [""]
        return f"failed: {lines[-1][:160]}"
    return row.get("cut") or (f"not measured: {row['skipped']}" if "skipped" in row else "")


def training_cells(row: dict, predicted: str) -> list[str]:
    if "tflops" not in row:
        return [row["name"], str(row.get("layers", "")), "", "", "", reason(row), predicted, "", "", ""]
    name = row["name"] + (f" ({row['cut']})" if "cut" in row else "")
    return [
        name, str(row["layers"]), number(row["parameters"] / 1e6, 0), number(row["ms"], 0),
        number(row["tokens_per_s"], 0), number(row["tflops"], 1), predicted, number(row.get("mfu"), 3),
        gib(row.get("peak_bytes")), gib(row.get("planned_bytes")),
    ]  # fmt: skip


def generation_cells(row: dict, predicted: str) -> list[str]:
    measured = number(row["seconds"], 3) if "seconds" in row else reason(row)
    name = row["name"] + (f" ({row['cut']})" if "cut" in row and "seconds" in row else "")
    return [
        name, measured, predicted, number(row.get("images_per_s")), number(row.get("first_s"), 1),
        number(row.get("graph_ms"), 3), number(row.get("tb_s")), number(row.get("bandwidth_share")),
        gib(row.get("peak_bytes")),
    ]  # fmt: skip


def markdown(headers: tuple[str, ...] | list[str], rows: list[list[str]]) -> list[str]:
    lines = [headers, ["---"] * len(headers), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines] + [""]


def compare(kind: str, rows: list[dict], predictions: list[dict]) -> list[str]:
    """The table of one kind: all measured rows, then the predictions of rows that were not measured."""
    cells = {"training": training_cells, "generation": generation_cells}[kind]
    predicted = {each["name"]: each for each in predictions if each["kind"] == kind}
    lines = [cells(row, show_prediction(predicted.get(row["name"]))) for row in rows]
    names = {row["name"] for row in rows}
    for name, prediction in predicted.items():
        if name not in names:
            row = {"name": name, "layers": prediction.get("layers", ""), "skipped": "no row"}
            lines.append(cells(row, show_prediction(prediction)))
    return markdown(HEADERS[kind], lines) if lines else []


def kernel_tables(rows: list[dict]) -> list[str]:
    """One table per group, with the columns of its rows."""
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        group = [row for row in rows if row["name"] == name]
        hidden = ("name", "kind", "device", "at_s", "row_s", "raised", "failed", "cut", "skipped")
        columns = list(dict.fromkeys(key for row in group for key in row if key not in hidden))
        body = []
        for row in group:
            cells = [f"{row[key]:.4g}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in columns]
            problem = row.get("raised", "") or reason(row)
            body.append([*cells[:-1], cells[-1] or problem[:120]] if columns else [problem[:120]])
        lines += [f"`{name}`", "", *markdown([each.replace("_", " ") for each in columns] or [name], body)]
    return lines


def most_time(rows: list[dict], longest: int = 6) -> list[str]:
    """For each training row, the kernels that take most of the time of a step."""
    lines = []
    for row in rows:
        if row.get("kernels"):
            top = "; ".join(f"{ms:.1f} ms `{name[:60]}` ({calls:.0f})" for name, calls, ms in row["kernels"][:longest])
            lines.append(f"- {row['name']}: {row['kernel_ms']:.0f} of {row['ms']:.0f} ms in kernels. {top}")
    return ["Kernels that take most of a step (calls per step):", "", *lines, ""] if lines else []


def write_tables(cards: dict[str, dict[str, list[dict]]], predictions: list[dict]) -> str:
    """All tables as Markdown."""
    lines: list[str] = []
    for card, kinds in cards.items():
        machine = kinds["machine"][-1]
        memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in machine else ""
        facts = ", ".join(f"{key} {machine[key]}" for key in CARD if machine.get(key))
        of_card = [each for each in predictions if each["gpu"] in card]
        lines += [f"### {card}{memory}", "", f"{facts}.", ""]
        for smoke in kinds.get("smoke", []):
            if "read_tb_s" in smoke:
                names = [key for key in smoke if key.endswith(("tb_s", "tflops"))]
                rates = ", ".join(f"{name.replace('_', ' ')} {smoke[name]:.4g}" for name in names)
                lines += [f"Reached by plain kernels: {rates}.", ""]
        for kind in HEADERS:
            lines += compare(kind, kinds.get(kind, []), of_card if kinds.get(kind) else [])
        lines += most_time(kinds.get("training", []))
        lines += kernel_tables(kinds.get("kernels", []))
    for gpu in dict.fromkeys(each["gpu"] for each in predictions):
        if not any(gpu in card for card in cards):
            lines += [f"### {gpu}: predicted, not measured", ""]
            for kind in HEADERS:
                lines += compare(kind, [], [each for each in predictions if each["gpu"] == gpu])
    return "\n".join(lines).strip() + "\n"


def replace_between_marks(path: Path, text: str) -> None:
    """Write `text` between the marks of a page; ValueError if it does not have them."""
    page = path.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(
            f"--write ({path}) must contain the lines {BEGIN} and {END} once; add them where the tables belong."
        )
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="JSON Lines files of the drivers")
    parser.add_argument(
        "--predicted", type=Path, default=PREDICTED, help=f"predictions (default: {PREDICTED.relative_to(ROOT)})"
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="Markdown file with the two marks")
    options = parser.parse_args()
    try:
        text = write_tables(read_files(options.files), read_predictions(options.predicted))
        if options.write:
            replace_between_marks(options.write, text)
        else:
            print(text, end="")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
