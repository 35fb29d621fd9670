"""Run the table of layouts (layout_rows.py), compare its rows with one process, and write the differences.

python -m tests.distributed.layouts --write docs/layouts.md     runs every row and writes the table
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
from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from tests.checkpoint.builders import write_random_checkpoint
from tests.data.corpora import make_vocabulary, write_shards
from tests.distributed.launch import run_cases
from tests.distributed.layout_rows import (
    BY_NAME,
    CONFIG,
    DROPOUT,
    LAYOUTS,
    LORA_REFERENCE,
    MASKS,
    PARTS_REFERENCE,
    RESUMES,
    Layout,
    Resume,
)
from tests.distributed.masks import ENTRIES, STEPS, Comparison, compare_masks, load_masks


def make_learnable_pairs(count: int = 64) -> list[np.ndarray]:
    """Pairs whose image is a function of the text, so that a model can learn it."""
    vocabulary, random = make_vocabulary(), np.random.default_rng(0)
    pairs = []
    for _ in range(count):
        text = random.integers(0, vocabulary.text_size, random.integers(3, 9))
        codes = (np.arange(vocabulary.image_tokens) * (text[0] % 5 + 1) + text[1]) % vocabulary.image_size
        pairs.append(np.concatenate([text, [vocabulary.break_id], vocabulary.image_start + codes]))
    return pairs


def make_instructions(count: int = 16) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Questions with an answer, drawings, and their targets; as samples they have 17 to 24 tokens in every form."""
    vocabulary, random = make_vocabulary(), np.random.default_rng(1)
    documents, targets = [], []
    for number in range(count):
        words = random.integers(0, vocabulary.text_size, 17).tolist()
        if number % 2:
            codes = random.integers(vocabulary.image_start, vocabulary.image_end, vocabulary.image_tokens).tolist()
            prompt = [*words[: random.integers(1, 6)], vocabulary.break_id]
            documents.append([*prompt, *codes])
            targets.append([(len(prompt), len(documents[-1]))])
        else:
            length = random.integers(14, 18)
            documents.append([*words[:length], 7])
            targets.append([(length - random.integers(1, 6), length)])
    return documents, targets


def run_layouts(folder: Path, layouts: list[Layout], resumes: list[Resume]) -> dict[str, list[dict]]:
    """Run rows and resumes; returns name -> steps.

    A launch takes longer to start than most rows take to run, so there is one launch per number of ranks. It also
    resumes checkpoints that it or an earlier launch saved; at most two more launches resume the others.
    """
    write_shards(folder / "shards", make_learnable_pairs(), make_vocabulary())
    documents, targets = make_instructions()
    write_shards(folder / "instructions", documents, make_vocabulary(), targets=targets)
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    bases = {}
    for label in (LORA_REFERENCE, PARTS_REFERENCE):
        if any(layout.reference == label for layout in layouts):
            base = load_config(config, [each for each in BY_NAME[label].overrides if each.startswith("model.")])
            validate_config(base)
            bases[label] = write_random_checkpoint(folder / f"base-{len(bases)}", base, make_vocabulary())

    def build_case(name: str, layout: Layout, output: str, **more) -> dict:
        paths = [f"data.shards={folder / layout.shards}", f"output={folder / output}"]
        if layout.reference in bases:
            paths.append(f"train.init={bases[layout.reference]}")
        return {"name": name, "config": str(config), "overrides": [*layout.overrides, *paths], **more}

    def build_resume_case(resume: Resume) -> dict:
        output = f"resume-{RESUMES.index(resume)}"
        target = folder / output / "checkpoints"
        target.mkdir(parents=True)
        source = step_folder(folder / BY_NAME[resume.source].folder, 10)
        (target / source.name).symlink_to(source)  # the same launch may write the checkpoint later
        return build_case(resume.name, BY_NAME[resume.target], output)

    launches, finished, remaining = [], set(), list(resumes)
    for ranks in (4, 2, 1):
        rows = [layout for layout in layouts if layout.ranks == ranks]
        finished |= {row.name for row in rows}
        ready = [each for each in remaining if each.source in finished and BY_NAME[each.target].ranks == ranks]
        remaining = [each for each in remaining if each not in ready]
        masks = {row.name: {"masks": True} if row in MASKS else {} for row in rows}
        cases = [build_case(row.name, row, row.folder, save_start=True, **masks[row.name]) for row in rows]
        launches.append((ranks, cases + [build_resume_case(each) for each in ready]))
    for ranks in (4, 2):
        launches.append((ranks, [build_resume_case(each) for each in remaining if BY_NAME[each.target].ranks == ranks]))
    steps = {}
    for ranks, cases in track([each for each in launches if each[1]], label="layouts", unit="launches"):
        steps |= run_cases(folder, ranks, cases)
    return steps


def compare_row_masks(folder: Path, layout: Layout) -> Comparison:
    """Compare the dropout masks of the ranks of a row."""
    sequence = "parallel.sequence=true" in layout.overrides
    return compare_masks(load_masks(folder, layout.name, layout.ranks), DROPOUT, sequence)


def relative_difference(found: list[dict], expected: list[dict], field: str) -> float:
    """Largest relative difference over the steps of `found`."""
    by_step = {step["step"]: step for step in expected}
    return max(abs(step[field] / by_step[step["step"]][field] - 1) for step in found)


def find_differences(steps: dict[str, list[dict]]) -> list[str]:
    """Describe rows and resumes whose losses or gradient norms differ by more than the tolerance."""
    problems = []
    for layout in LAYOUTS:
        for field, largest in (("loss", layout.loss_tolerance), ("grad_norm", layout.norm_tolerance)):
            found = relative_difference(steps[layout.name], steps[layout.reference], field)
            problems += [f"{layout.name}: {field} differs by {found:.1e}, more than {largest:.1e}"] * (found > largest)
    for resume in RESUMES:
        found = relative_difference(steps[resume.name], steps[resume.source], "loss")
        problems += [f"{resume.name}: loss differs by {found:.1e}, more than 1e-06"] * (found > 1e-6)
        exact = resume.source != resume.target or steps[resume.name] == steps[resume.source][10:]
        problems += [f"{resume.name}: not bit-identical when resumed under the same layout"] * (not exact)
    return problems


def compare_all_masks(folder: Path) -> tuple[list[str], list[str]]:
    """(lines of the table of dropout masks, descriptions of masks that are not independent)."""
    lines, problems = [], []
    for layout in MASKS:
        found = compare_row_masks(folder, layout)
        lines.append(
            f"| {layout.name} | {layout.ranks} | {found.identical} | {found.independent} | "
            f"{found.largest_deviation:.1f} | {found.recomputed} |"
        )
        problems += [f"{layout.name}: masks are {found.largest_deviation:.1f} standard deviations from chance"] * (
            found.largest_deviation > 4
        )
    return lines, problems


def write_table(path: Path) -> list[str]:
    """Run all rows and write docs/layouts.md; returns descriptions of differences above the tolerance."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        steps = run_layouts(Path(folder), LAYOUTS, RESUMES)
        masks, problems = compare_all_masks(Path(folder))
    lines = [
        "# Every layout is the same run",
        "",
        f"Written by `python -m tests.distributed.layouts --write {path}` in {time.perf_counter() - start:.0f} s on "
        f"{platform.processor() or platform.machine()}, CPU and gloo. Each row is 20 steps from the same start: 4 "
        "layers, width 64, 8 sequences of 48 tokens per step, a learnable corpus. The differences are the "
        "largest of the 20, relative to the same model in one process.",
        "",
        "Rows `lora` train adapters of a model of random weights, of attention and half of the feed-forward layers; "
        "`lora and parts` (family llama) adapters of all linear layers, the rows of the image codes, the norms and one "
        "feed-forward layer.",
        "",
        "| layout | ranks | loss | gradient norm | last loss |",
        "|---|---|---|---|---|",
    ]
    for layout in LAYOUTS:
        found, expected = steps[layout.name], steps[layout.reference]
        same = layout.name == layout.reference
        differences = (
            ["", ""] if same else [f"{relative_difference(found, expected, key):.1e}" for key in ("loss", "grad_norm")]
        )
        lines.append(f"| {layout.name} | {layout.ranks} | {' | '.join(differences)} | {found[-1]['loss']:.4f} |")
    lines += [
        "",
        "## Dropout",
        "",
        "Ranks with the same activations draw the same dropout masks, all others independent ones. "
        f"The masks of {STEPS} steps are compared between ranks, between the chunks of an interleaved pipeline, and "
        f"between kinds, {ENTRIES:,} entries each: identical pairs, independent pairs, and the largest deviation of "
        "the number of equal entries from chance, in standard deviations. Recomputed masks are those that backward "
        "passes drew again; each equals a mask of the forward passes. These rows stop at step 12.",
        "",
        "| layout | ranks | identical | independent | deviation | recomputed |",
        "|---|---|---|---|---|---|",
        *masks,
        "",
        "## Resumed under another layout",
        "",
        "Saved at step 10, then ten steps (two in rows of dropout masks) under the second layout, compared with the "
        "uninterrupted run of the first.",
        "",
        "| saved under | resumed under | loss |",
        "|---|---|---|",
    ]
    for resume in RESUMES:
        found, expected = steps[resume.name], steps[resume.source]
        difference = (
            f"{relative_difference(found, expected, 'loss'):.1e}" if found != expected[10:] else "0, bit-identical"
        )
        lines.append(f"| {resume.source} | {resume.target} | {difference} |")
    path.write_text("\n".join(lines) + "\n")
    return find_differences(steps) + problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, required=True, help="file to write, docs/layouts.md")
    sys.exit("\n".join(write_table(parser.parse_args().write)) or 0)
