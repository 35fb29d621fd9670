"""Effect of retrieval on the held-out loss: with 0, 1, 2 and 3 retrieved documents, and with random documents.

    python benchmarks/retrieval_gain.py --corpora shapes emoji --steps 3000 --output runs/retrieval_gain

For each corpus the tools create pairs, tokenizers, shards, a CLIP encoder and indexes once, as examples/quickstart.sh
and examples/emoji.sh do; `--prepared NAME=FOLDER` uses the output folder of such a script instead. For each family and
seed, a model is trained with K retrieved documents, K uniform in 0..3 (as in RA-CM3, so that it is trained on every
number), and exported. Measured is the loss per token of held-out query documents, always of the same tokens, with K
documents in context: the nearest of their row of the neighbor table (found by text and by image, as in training), the
nearest by text alone (as for a prompt), and random documents of the memory bank. Only held-out documents with three
neighbors are used. Finished parts are kept: the same command continues an interrupted run.

Writes figures.json and gain.png, and prints the table.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np

from megatron_cm3leon.common.cli import HelpFormatter, run_tool
from megatron_cm3leon.common.progress import track
from megatron_cm3leon.config.loading import load_config, save_config
from megatron_cm3leon.data.neighbors import load_neighbors
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.evaluation.loss import measure_loss
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.retrieval.retriever import Retriever

matplotlib.use("agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"nearest": "#2f6fd0", "nearest by text": "#2e8b57", "random": "#c2630a"}
FAMILIES = {"cm3leon": [], "llama": ["model.family=llama", "model.activation=swiglu"]}
"""Model family -> changes of the corpus's recipe."""
MOST = 3
"""Maximum number of retrieved documents, as in CM3Leon."""
CORPORA = {
    "shapes": {
        "generate": "examples/shapes/generate.py",
        "count": "--pairs",
        "pairs": 9000,
        "more": ["--size", "32"],
        "specials": ["--specials", "32", "--sentinels", "16"],
        "text": ["--vocab-size", "480"],
        "image": ["--image-size", "32", "--downsample", "4", "--codebook-size", "256"],
        "image_steps": 1200,
        "clip_steps": 400,
        "config": "examples/quickstart/train.yaml",
    },
    "emoji": {
        "generate": "examples/emoji/generate.py",
        "count": "--limit",
        "pairs": 0,
        "more": [],
        "specials": ["--specials", "64", "--sentinels", "32"],
        "text": ["--vocab-size", "1472"],
        "image": ["--image-size", "32", "--downsample", "4", "--codebook-size", "512", "--num-res-blocks", "1"],
        "image_steps": 2000,
        "clip_steps": 600,
        "config": "examples/emoji/train.yaml",
    },
}
"""The settings of the two scripts in examples/."""


def run(*arguments) -> None:
    """Run one of the project's commands in its own process; ValueError if it fails."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, *map(str, arguments)]
    if subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}).returncode:
        raise ValueError(f"{' '.join(command)} failed; fix the cause and run the same command again.")


def prepare(name: str, folder: Path, options: argparse.Namespace) -> Path:
    """Create pairs, tokenizers, shards, encoder and indexes; a stage whose result exists is skipped."""
    corpus, tokenizer, train = CORPORA[name], folder / "tokenizer", folder / "pairs/train.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    image_steps, clip_steps = (max(2, round(corpus[key] * options.scale)) for key in ("image_steps", "clip_steps"))
    pairs = options.pairs or corpus["pairs"]
    run_once(train, corpus["generate"], corpus["count"], pairs, "--output", folder / "pairs", *corpus["more"])
    train_tokenizer = (
        "tools/train_tokenizer.py",
        "{kind}",
        "--input",
        train,
        "--output",
        tokenizer,
        *corpus["specials"],
    )
    text, image = ([str(part).format(kind=kind) for part in train_tokenizer] for kind in ("text", "image"))
    run_once(tokenizer / "text.model", *text, *corpus["text"])
    run_once(tokenizer / "vocab.json", *image, *corpus["image"], "--steps", image_steps)
    shards, clip, index = folder / "shards", folder / "clip", folder / "index"
    for split in ("train", "heldout"):
        inputs = ("--input", folder / "pairs" / f"{split}.jsonl", "--tokenizer", tokenizer)
        run_once(shards / split / "manifest.json", "tools/preprocess_data.py", *inputs, "--output", shards / split)
    inputs = ("--input", train, "--text-model", tokenizer / "text.model")
    run_once(clip / "model.safetensors", "tools/train_clip.py", *inputs, "--output", clip, "--steps", clip_steps)
    for split, bank in (("train", ()), ("heldout", ("--bank", index / "train"))):
        inputs = ("--shards", shards / split, *bank, "--encoder", clip)
        run_once(index / split / "index.json", "tools/build_index.py", *inputs, "--output", index / split)
    return folder


def run_once(result: Path, *command) -> None:
    """Run a command unless `result`, the file that it writes last, exists."""
    if not result.is_file():
        run(*command)


def train_model(name: str, family: str, seed: int, prepared: Path, folder: Path, options: argparse.Namespace) -> Path:
    """Train with K uniform in 0..3 and export; returns the exported folder."""
    overrides = [f"data.shards={prepared}/shards/train", f"retrieval.index={prepared}/index/train", f"seed={seed}"]
    overrides += [
        f"retrieval.documents={MOST}",
        "retrieval.choice=uniform",
        f"data.seq_length={find_context(prepared)}",
    ]
    overrides += [f"train.steps={options.steps}", f"checkpoint.interval={options.steps}"]
    recipe = ROOT / CORPORA[name]["config"]
    return train_and_export(recipe, overrides + FAMILIES[family] + options.set, prepared / "tokenizer", folder)


def train_and_export(recipe: Path, overrides: list[str], tokenizer: Path, folder: Path) -> Path:
    """Train a recipe with changes in `folder`, or continue; returns the exported folder.

    ValueError if the folder holds a run with other settings.
    """
    exported, config = folder / "exported", folder / "train.yaml"
    expected = load_config(recipe, [*overrides, f"output={folder}/run"])
    if config.is_file() and load_config(config) != expected:
        raise ValueError(f"{folder} was trained with other settings ({config}); give another folder, or remove it.")
    if (exported / "config.json").is_file():
        return exported
    folder.mkdir(parents=True, exist_ok=True)
    save_config(expected, config)
    run("-m", "megatron_cm3leon.train", config)
    latest = folder / "run/checkpoints" / (folder / "run/latest").read_text().strip()
    inputs = ("--checkpoint", latest, "--tokenizer", tokenizer)
    shutil.rmtree(exported, ignore_errors=True)
    run("tools/convert_checkpoint.py", "export", *inputs, "--output", exported)
    return exported


def find_context(prepared: Path, documents: int = MOST) -> int:
    """Sequence length for a query and documents of nearly any length, and for masking; a multiple of 32."""
    corpora = [open_shards(prepared / "shards" / split) for split in ("train", "heldout")]
    query = max(int(corpus.lengths.max()) for corpus in corpora)
    others = documents * (int(np.quantile(corpora[0].lengths, 0.95)) + 1)
    return -(-(query + others + 10) // 32) * 32


def measure(exported: Path, prepared: Path, seed: int, options: argparse.Namespace) -> dict[str, dict]:
    """Losses of held-out queries with K documents of each kind in context, by name such as `nearest 2`."""
    decoder = Decoder.load(exported)
    heldout = open_shards(prepared / "shards/heldout")
    neighbors = load_neighbors(prepared / "index/heldout", heldout)
    captions = heldout.metadata(["caption"]).column("caption").to_pylist()
    by_text = Retriever.load(prepared / "index/heldout", prepared / "clip").search(texts=captions, k=MOST)
    full = (neighbors.table[:, :MOST] >= 0).all(axis=1) & (by_text >= 0).all(axis=1)
    chosen = np.flatnonzero(full)[: options.queries]
    if not len(chosen):
        raise ValueError(
            f"no held-out document of {heldout.folder} has the required {MOST} neighbors; train a better encoder."
        )
    random = np.random.default_rng(seed)
    drawn = np.stack([random.choice(neighbors.bank.documents, MOST, replace=False) for _ in chosen])
    tables = dict(zip(KINDS, (neighbors.table[chosen, :MOST], by_text[chosen], drawn), strict=True))
    queries = [heldout.read(int(number)) for number in chosen]
    losses = {"none": measure_loss(decoder, queries, [[] for _ in queries], heldout.vocabulary)}
    for kind, table in tables.items():
        for count in range(1, MOST + 1):
            documents = [[neighbors.bank.read(int(number)) for number in row[:count][::-1]] for row in table]
            losses[f"{kind} {count}"] = measure_loss(decoder, queries, documents, heldout.vocabulary)
    return losses


def summarize(results: dict) -> str:
    """A Markdown table: means over the seeds, and the range of the differences from the loss with no document."""
    lines = ["| corpus, family | retrieved | loss | text | image | less than with none |", "|---|---|---|---|---|---|"]
    for corpus, seeds in results.items():
        for name in next(iter(seeds.values())):
            rows = [losses[name] for losses in seeds.values()]
            gains = [losses["none"]["loss"] - losses[name]["loss"] for losses in seeds.values()]
            means = [np.mean([row[key] for row in rows]) for key in ("loss", "loss_text", "loss_image")]
            gain = f"{np.mean(gains):+.4f} ({min(gains):+.4f} to {max(gains):+.4f})" if name != "none" else ""
            lines.append(f"| {corpus} | {name} | {' | '.join(f'{mean:.4f}' for mean in means)} | {gain} |")
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """Plot the loss by number of documents, one panel per corpus and family; thin lines are seeds, thick ones means."""
    columns = min(2, len(results))
    rows = -(-len(results) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(4.6 * columns, 3.6 * rows), squeeze=False)
    for axes, (corpus, seeds) in zip(panels.flat, results.items(), strict=False):
        for kind, color in KINDS.items():
            names = ["none", *(f"{kind} {count}" for count in range(1, MOST + 1))]
            curves = np.array([[losses[name]["loss"] for name in names] for losses in seeds.values()])
            for curve in curves:
                axes.plot(range(MOST + 1), curve, color=color, alpha=0.3, linewidth=1)
            axes.plot(range(MOST + 1), curves.mean(axis=0), color=color, linewidth=2.2, marker="o", label=kind)
        axes.set(title=corpus, xlabel="retrieved documents", ylabel="held-out loss, nats per token")
        axes.set_xticks(range(MOST + 1))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    for axes in panels.flat[len(results) :]:
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/retrieval_gain"), help="folder of all results")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=list(CORPORA))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the models")
    parser.add_argument("--steps", type=int, default=3000, help="training steps of each model")
    parser.add_argument("--queries", type=int, default=1000, help="maximum number of held-out documents to measure")
    parser.add_argument(
        "--prepared", nargs="*", default=[], metavar="NAME=FOLDER", help="output folders of examples/*.sh"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the steps of image tokenizer and encoder")
    parser.add_argument("--pairs", type=int, default=0, help="pairs of shapes, or emoji (0: as in the examples)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="section.key=value", help="further fields of the configuration"
    )
    options = parser.parse_args()
    given = dict(entry.split("=", 1) for entry in options.prepared)
    output = options.output.resolve()
    results: dict[str, dict] = {}
    for name in options.corpora:
        prepared = Path(given[name]).resolve() if name in given else prepare(name, output / name / "data", options)
        for family in options.families:
            measured = results[f"{name}, {family}"] = {}
            for seed in track(options.seeds, label=f"{name}, {family}", unit="seeds"):
                folder = output / name / f"{family}-seed-{seed}"
                exported = train_model(name, family, seed, prepared, folder, options)
                measured[seed] = measure(exported, prepared, seed, options)
    (output / "figures.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, output / "gain.png")
    print(summarize(results))
    print(f"wrote {output}/figures.json and gain.png")


if __name__ == "__main__":
    run_tool(main)
