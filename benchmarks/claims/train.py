"""Trains the models: the recipe of examples/icons/train.yaml, at the sizes and for the tokens of the plan."""

import json
from pathlib import Path

import numpy as np
from claims.plan import MODELS, Unit, choose_recipe
from retrieval_gain import ROOT, find_context, train_and_export

from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.evaluation.result import hash_input
from megatron_cm3leon.export.reader import METADATA_FILE
from megatron_cm3leon.model.flops import flops_per_token

RECIPE = ROOT / "examples/icons/train.yaml"
BATCH_TOKENS = 6400
"""Tokens of a step, about: those of 16 sequences with four retrieved documents."""
POINTS = 10
"""Validations during training, on held-out documents without retrieved ones."""
CHECKPOINTS = 20
"""Checkpoints during training: what an interruption costs is a twentieth of a run."""


def find_model(work: Path, unit: Unit) -> Path:
    """Folder of the trained model of a unit of `train`: its run, and its export."""
    return work / "models" / unit.name


def train_model(work: Path, unit: Unit, tokens: float, threads: int) -> dict:
    """Train or continue, export, and return the content of the unit's line."""
    documents = MODELS[unit.arm][0]
    corpus = open_shards(work / "shards/train")
    mean = float(corpus.lengths.mean())
    sequence_tokens = (documents + 1) * (mean + 1)
    batch = max(1, round(BATCH_TOKENS / sequence_tokens))
    steps = max(2, round(tokens / (batch * sequence_tokens)))
    overrides = [f"data.shards={work}/shards/train", f"data.seq_length={find_context(work, documents)}"]
    overrides += [f"retrieval.documents={documents}", f"train.steps={steps}"]
    overrides += [f"train.global_batch_size={batch}", f"train.micro_batch_size={batch}", f"train.threads={threads}"]
    overrides += [f"retrieval.index={work}/index/train"] if documents else []
    overrides += [f"validation.shards={work}/shards/heldout", f"validation.interval={max(1, steps // POINTS)}"]
    overrides += [f"checkpoint.interval={max(1, steps // CHECKPOINTS)}", "checkpoint.keep_last=1"]
    folder = find_model(work, unit)
    exported = train_and_export(RECIPE, [*overrides, *choose_recipe(unit)], work / "tokenizer", folder)
    return describe_training(folder, exported)


def describe_training(folder: Path, exported: Path) -> dict:
    """Figures of a finished run."""
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    rows = list({row["step"]: row for row in rows if "loss" in row}.values())
    config = load_config(folder / "run/config.yaml")
    metadata = json.loads((exported / METADATA_FILE).read_text())
    vocabulary = open_shards(config.data.shards).vocabulary
    flops = flops_per_token(config, vocabulary.size)
    curve = [(row["tokens"], round(row["validation_loss"], 4)) for row in rows if "validation_loss" in row]
    return {
        "figures": {
            "parameters": [metadata["parameters"]],
            "tokens": [rows[-1]["tokens"]],
            "flops": [flops * rows[-1]["tokens"]],
            "training_loss": [round(float(np.mean([row["loss"] for row in rows[-50:]])), 4)],
        },
        "curve": curve,
        "hashes": {"model": hash_input(exported)},
        "settings": {"steps": config.train.steps, "sequences": config.train.global_batch_size}
        | {"seq_length": config.data.seq_length, "documents": config.retrieval.documents},
    }
