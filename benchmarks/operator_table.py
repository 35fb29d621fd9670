"""Write the table of docs/benchmarks.md from the recordings of operator_record.py, trees of one model together.

python benchmarks/operator_table.py                              prints it
python benchmarks/operator_table.py --write docs/benchmarks.md   writes it between its two marks
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT / "benchmarks/results/operator_record.jsonl"
sys.path[:0] = [str(ROOT)]
PARTS = {  # column -> classes of operators
    "products": ("gemm", "weight_gradient_add"), "attention": ("attention",), "loss": ("loss",),
    "elementwise": ("elementwise", "copy"), "optimizer": ("optimizer",),
}  # fmt: skip


def build_table(rows: list[dict]) -> str:
    """One row per model and tree, in the order of the first recordings; a later recording replaces an earlier one."""
    latest = {(row["model"], tuple(row["settings"]), row["tree"]): row for row in rows}
    names = list(dict.fromkeys((row["model"], tuple(row["settings"])) for row in rows))
    columns = [f"{name}, GB" for name in PARTS]
    lines = [f"| model | tree | {' | '.join(columns)} | launches | bytes per logit | alive per logit | peak GiB |"]
    lines.append("|---" * (len(columns) + 6) + "|")
    for name in names:
        for (*key, tree), row in latest.items():
            if tuple(key) == name:
                label = ", ".join([row["model"], *row["settings"]])
                lines.append(f"| {label} | {tree} | {' | '.join(_show(row))} |")
    return "\n".join(lines) + "\n"


def _show(row: dict) -> list[str]:
    moved = {kind: (found["read"] + found["written"]) / 1e9 for kind, found in row["classes"].items()}
    cells = [f"{sum(moved[kind] for kind in kinds):.1f}" for kinds in PARTS.values()]
    launches = sum(found["launches"] for found in row["classes"].values())
    of_loss = f"{row['loss_bytes_per_logit']:.1f}", f"{row['loss_alive_per_logit']:.1f}"
    return [*cells, str(launches), *of_loss, f"{row['peak_bytes'] / 2**30:.1f}"]


def write_between_marks(path: Path, script: str, text: str) -> None:
    """Replace the text between the two marks of a script in a Markdown file; ValueError if it does not have them."""
    begin, end = (f"<!-- tables of {script}: {word} -->" for word in ("begin", "end"))
    page = path.read_text()
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"{path} must contain the lines {begin} and {end}, once each and in this order; add them.")
    before, rest = page.split(begin)
    path.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, default=RECORDED, help="recordings (default: %(default)s)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file with the marks of this script")
    options = parser.parse_args()
    table = build_table([json.loads(line) for line in options.recorded.read_text().splitlines()])
    print(table, end="")
    if options.write:
        write_between_marks(options.write, "benchmarks/operator_table.py", table)


if __name__ == "__main__":
    from megatron_cm3leon.common.cli import run_tool

    run_tool(main)
