"""The table of layouts (layout_rows.py): runs its rows, compares them with one process, writes what was measured.

python -m tests.distributed.layouts --write docs/layouts.md     runs every row and writes what it measured
"""

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_cm3leon.checkpoint.format import step_folder
from megatron_cm3leon.common.progress import track
from tests.data.corpora import make_vocabulary, write_shards
from tests.distributed.launch import run_cases
from tests.distributed.layout_rows import BY_NAME, CONFIG, DROPOUT, LAYOUTS, MASKS, RESUMES, Layout, Resume
from tests.distributed.masks import ENTRIES, STEPS, Comparison, compare_masks, load_masks


def learnable_pairs(count: int = 64) -> list[np.ndarray]:
    """Pairs whose picture follows from their text, so that there is something to learn."""
    vocabulary, random = make_vocabulary(), np.random.default_rng(0)
    pairs = []
    for _ in range(count):
        text = random.integers(0, vocabulary.text_size, random.integers(3, 9))
        codes = (np.arange(vocabulary.image_tokens) * (text[0] % 5 + 1) + text[1]) % vocabulary.image_size
        pairs.append(np.concatenate([text, [vocabulary.break_id], vocabulary.image_start + codes]))
    return pairs


def run_layouts(folder: Path, layouts: list[Layout], resumes: list[Resume]) -> dict[str, list[dict]]:
    """Run rows and resumes, one world for each number of ranks; name -> its steps."""
    write_shards(folder / "shards", learnable_pairs(), make_vocabulary())
    config = folder / "config.yaml"
    config.write_text(CONFIG)

    def case(name: str, layout: Layout, output: str, **more) -> dict:
        paths = [f"data.shards={folder / 'shards'}", f"output={folder / output}"]
        return {"name": name, "config": str(config), "overrides": [*layout.overrides, *paths], **more}

    cases: dict[int, list[dict]] = {1: [], 2: [], 4: []}
    for layout in layouts:
        more = {"masks": True} if layout in MASKS else {}
        cases[layout.ranks].append(case(layout.name, layout, layout.folder, save_start=True, **more))
    steps = {}
    for ranks in track(cases, label="layouts", unit="worlds"):
        steps |= run_cases(folder, ranks, cases[ranks]) if cases[ranks] else {}
    again: dict[int, list[dict]] = {1: [], 2: [], 4: []}
    for number, resume in enumerate(resumes):
        target = folder / f"resume-{number}" / "checkpoints"
        target.mkdir(parents=True)
        source = step_folder(folder / BY_NAME[resume.source].folder, 10)
        (target / source.name).symlink_to(source)
        layout = BY_NAME[resume.target]
        again[layout.ranks].append(case(resume.name, layout, f"resume-{number}"))
    for ranks in track(again, label="resumes", unit="worlds"):
        steps |= run_cases(folder, ranks, again[ranks]) if again[ranks] else {}
    return steps


def read_masks(folder: Path, layout: Layout) -> Comparison:
    """The masks that the ranks of a row drew, compared."""
    sequence = "parallel.sequence=true" in layout.overrides
    return compare_masks(load_masks(folder, layout.name, layout.ranks), DROPOUT, sequence)


def relative(found: list[dict], expected: list[dict], field: str) -> float:
    """Largest relative difference over the steps of `found`."""
    by_step = {step["step"]: step for step in expected}
    return max(abs(step[field] / by_step[step["step"]][field] - 1) for step in found)


def find_differences(steps: dict[str, list[dict]]) -> list[str]:
    """Rows and resumes whose losses or gradient norms differ by more than they may."""
    wrong = []
    for layout in LAYOUTS:
        for field, largest in (("loss", layout.loss_tolerance), ("grad_norm", layout.norm_tolerance)):
            found = relative(steps[layout.name], steps[layout.reference], field)
            wrong += [f"{layout.name}: {field} differs by {found:.1e}, more than {largest:.1e}"] * (found > largest)
    for resume in RESUMES:
        found = relative(steps[resume.name], steps[resume.source], "loss")
        wrong += [f"{resume.name}: loss differs by {found:.1e}, more than 1e-06"] * (found > 1e-6)
        exact = resume.source != resume.target or steps[resume.name] == steps[resume.source][10:]
        wrong += [f"{resume.name}: resumed under the same layout, not the same bit for bit"] * (not exact)
    return wrong


def compare_all_masks(folder: Path) -> tuple[list[str], list[str]]:
    """Lines of the table of dropout masks, and what is wrong with them."""
    lines, wrong = [], []
    for layout in MASKS:
        found = read_masks(folder, layout)
        lines.append(
            f"| {layout.name} | {layout.ranks} | {found.same} | {found.different} | {found.worst:.1f} | "
            f"{found.replayed} |"
        )
        wrong += [f"{layout.name}: masks are {found.worst:.1f} standard deviations from chance"] * (found.worst > 4)
    return lines, wrong


def write_table(path: Path) -> list[str]:
    """Run everything and write docs/layouts.md; returns what differs by more than it may."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        steps = run_layouts(Path(folder), LAYOUTS, RESUMES)
        masks, wrong = compare_all_masks(Path(folder))
    lines = [
        "# Every layout is the same run",
        "",
        f"Written by `python -m tests.distributed.layouts --write {path}` in {time.perf_counter() - started:.0f} s on "
        f"{platform.processor() or platform.machine()}, CPU and gloo. Each row is 20 steps from the same start: 4 "
        "layers, 64 wide, 8 blocks of 48 tokens a step, of a corpus that can be learnt. The differences are the "
        "largest of the 20, relative to the same model in one process.",
        "",
        "| layout | ranks | loss | gradient norm | last loss |",
        "|---|---|---|---|---|",
    ]
    for layout in LAYOUTS:
        found, expected = steps[layout.name], steps[layout.reference]
        same = layout.name == layout.reference
        differences = ["", ""] if same else [f"{relative(found, expected, key):.1e}" for key in ("loss", "grad_norm")]
        lines.append(f"| {layout.name} | {layout.ranks} | {' | '.join(differences)} | {found[-1]['loss']:.4f} |")
    lines += [
        "",
        "## Dropout",
        "",
        "Ranks that hold the same activations draw the same dropout masks, all others independent ones. The masks of "
        f"{STEPS} steps are compared between ranks, between the chunks of an interleaved pipeline, and between kinds, "
        f"{ENTRIES:,} entries each: pairs that are the same, pairs that are independent, and the largest deviation of "
        "their equal entries from chance, in standard deviations. Recomputed masks are those that backward passes drew "
        "again, all of them masks of the forward passes. These rows stop at step 12.",
        "",
        "| layout | ranks | the same | independent | deviation | recomputed |",
        "|---|---|---|---|---|---|",
        *masks,
        "",
        "## Resumed under another layout",
        "",
        "Saved at step 10, then ten steps (two in rows of dropout masks) under the second layout; against the run of "
        "the first, never stopped.",
        "",
        "| saved under | resumed under | loss |",
        "|---|---|---|",
    ]
    for resume in RESUMES:
        found, expected = steps[resume.name], steps[resume.source]
        difference = f"{relative(found, expected, 'loss'):.1e}" if found != expected[10:] else "0, bit for bit"
        lines.append(f"| {resume.source} | {resume.target} | {difference} |")
    path.write_text("\n".join(lines) + "\n")
    return find_differences(steps) + wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, required=True, help="file to write, docs/layouts.md")
    sys.exit("\n".join(write_table(parser.parse_args().write)) or 0)
