"""Accuracy of generated images by decoding settings, according to a checker: one table and one plot.

    python benchmarks/decoding_sweep.py --model exported --shards shards/heldout --index index/heldout
        --checker examples/shapes/checker.py --output docs/images/decoding_sweep.png    (paths shortened)

Sweeps one setting at a time, without and (given --index) with retrieved documents, on the same held-out captions and
seeds: guidance at temperature 0.7, temperature at the default guidance 2, CD-K's alpha at k = 4, and its k at alpha
0.5, both at temperature 0.7. Accuracy is the share of images in which the checker finds all attributes correct; its
standard error is at most 0.5 / sqrt(captions). The reference line is the accuracy of the true images, encoded and
decoded by the image tokenizer: the upper bound for every setting.
"""

import argparse
import json
from pathlib import Path

from megatron_cm3leon.common.cli import HelpFormatter, run_tool
from megatron_cm3leon.common.progress import track
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.evaluation.heldout import read_heldout
from megatron_cm3leon.evaluation.judge import compute_accuracy, judge_images, load_checker, parse_captions
from megatron_cm3leon.evaluation.retrieval import PROMPT_TOKENS
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.retrieved import DocumentSource, keep_nearest
from megatron_cm3leon.generation.sampling import Sampling, default_guidance

TEMPERATURE = 0.7
SWEEPS = {
    "guidance": [{"guidance": weight} for weight in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)],
    "temperature": [{"temperature": value} for value in (0.0, 0.3, 0.5, 0.7, 1.0, 1.3)],
    "contrast_alpha": [{"contrast_k": 4, "contrast_alpha": share} for share in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)],
    "contrast_k": [{"contrast_k": k, "contrast_alpha": 0.5} for k in (1, 2, 4, 8, 32)],
}
LABELS = {
    "guidance": f"guidance (temperature {TEMPERATURE})",
    "temperature": "temperature (guidance 2)",
    "contrast_alpha": f"CD-K's alpha (k = 4, temperature {TEMPERATURE})",
    "contrast_k": f"CD-K's k (alpha 0.5, temperature {TEMPERATURE})",
}


def measure(options: argparse.Namespace) -> tuple[list[dict], float]:
    """One row per setting, and the checker's accuracy on the image tokenizer's reconstructions of the true images."""
    checker, generator = load_checker(options.checker), Generator.load(options.model)
    pairs = read_heldout(open_shards(options.shards), options.captions, options.seed, checker)
    expected = parse_captions(checker, pairs.captions)
    arms = {"none": None}
    if options.index:
        source = DocumentSource.load(options.index, generator.vocabulary)
        found = source.read(source.find(generator.training_documents, texts=pairs.captions))
        context = generator.decoder.context
        arms["retrieved"] = [
            keep_nearest(documents, len(document) + PROMPT_TOKENS, context)
            for documents, document in zip(found, pairs.documents, strict=True)
        ]
    jobs = [(name, setting, arm) for name, settings in SWEEPS.items() for setting in settings for arm in arms]
    rows = []
    for name, setting, arm in track(jobs, label="generation", unit="settings"):
        guidance = default_guidance(setting.get("contrast_k", 0))
        fields = {"temperature": TEMPERATURE, "guidance": guidance, "seed": options.seed, **setting}
        generated = generator.images(pairs.captions, Sampling(**fields), retrieved=arms[arm])
        shares = compute_accuracy(judge_images(checker, [each.image for each in generated], expected))
        rows.append({"sweep": name, "value": setting[name], "documents": arm, **shares})
    true = judge_images(checker, generator.codec.decode_images(pairs.codes), expected)
    return rows, compute_accuracy(true)["all"]


def print_table(rows: list[dict], ceiling: float, captions: int) -> None:
    """Print a Markdown table with one line per setting and one column per arm."""
    arms = list(dict.fromkeys(row["documents"] for row in rows))
    titles = {"none": "no documents", "retrieved": "retrieved documents"}
    print(f"| | value | {' | '.join(titles[arm] for arm in arms)} |\n|---|---|{'---|' * len(arms)}")
    for name, value in dict.fromkeys((row["sweep"], row["value"]) for row in rows):
        found = {row["documents"]: row["all"] for row in rows if (row["sweep"], row["value"]) == (name, value)}
        print(f"| {LABELS[name]} | {value:g} | {' | '.join(f'{100 * found[arm]:.0f} %' for arm in arms)} |")
    print(f"\n{captions} captions; reconstructions of the true images: {100 * ceiling:.0f} %.")


def draw_plot(rows: list[dict], ceiling: float, path: Path) -> None:
    """Write the plot, four panels with a common scale, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    axes = figure.subplots(1, len(SWEEPS), sharey=True)
    for axis, name in zip(axes, SWEEPS, strict=True):
        for arm, label in (("none", "no documents"), ("retrieved", "retrieved documents")):
            points = [row for row in rows if row["sweep"] == name and row["documents"] == arm]
            if points:
                axis.plot([p["value"] for p in points], [100 * p["all"] for p in points], marker="o", label=label)
        axis.axhline(100 * ceiling, color="grey", linestyle=":", label="true images, reconstructed")
        axis.set_title(LABELS[name], fontsize=9)
        axis.set_ylim(0, 100)
        axis.grid(alpha=0.3)
        if name == "contrast_k":
            axis.set_xscale("log", base=2)
    axes[0].set_ylabel("correct in all attributes, %")
    axes[0].legend(fontsize=7, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="folder that tools/convert_checkpoint.py export wrote")
    parser.add_argument("--shards", required=True, help="held-out shards")
    parser.add_argument("--checker", required=True, help="Python file with classify and parse_caption")
    parser.add_argument("--index", help="index folder, for the arm with retrieved documents")
    parser.add_argument(
        "--captions", type=int, default=144, help="number of held-out captions; one image per caption and setting"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, help="PNG file of the plot; the rows are written beside it as .json")
    options = parser.parse_args()
    output = Path(options.output)
    if output.suffix != ".png":
        raise ValueError(f"--output ({output}) must end in .png.")
    rows, ceiling = measure(options)
    draw_plot(rows, ceiling, output)
    output.with_suffix(".json").write_text(json.dumps({"rows": rows, "ceiling": ceiling}, indent=1) + "\n")
    print_table(rows, ceiling, options.captions)


if __name__ == "__main__":
    run_tool(main)
