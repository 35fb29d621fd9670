"""Files of golden.json: hashes of what the project writes itself, names and values of what a library writes."""

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from megatron_cm3leon.checkpoint import sharded
from megatron_cm3leon.checkpoint.format import Piece, step_folder
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import Config, save_config
from megatron_cm3leon.data.preprocess.filters import Filters
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.evaluation.metrics.statistics import compute_statistics, write_statistics
from megatron_cm3leon.evaluation.options import EvaluationOptions
from megatron_cm3leon.evaluation.result import Figure, FinishedItems, Result
from megatron_cm3leon.export import export_checkpoint
from megatron_cm3leon.generation.results import written_results
from megatron_cm3leon.monitoring.status import read_status, to_json
from megatron_cm3leon.retrieval.build import build_index_folder
from megatron_cm3leon.retrieval.encoder import TEXT_MODEL, build_tiny_clip, save_clip
from megatron_cm3leon.retrieval.options import IndexOptions
from megatron_cm3leon.tokenizers.image import ImageTokenizer
from megatron_cm3leon.tokenizers.image_training import ImageTrainingOptions
from megatron_cm3leon.tokenizers.text import TextTokenizer
from megatron_cm3leon.tokenizers.vocab import Vocabulary
from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig
from tests.checkpoint.builders import family_config, write_random_checkpoint, write_tokenizers
from tests.data.corpora import write_images, write_shards
from tests.data.runs import run as preprocess
from tests.data.tasks.instructions import run_rows, show_document, write_gray_images, write_rows
from tests.golden.streams import VOCABULARY, hash_numbers
from tools.generate import parse_arguments, recorded_options


def read_json(path: Path):
    return json.loads(path.read_text())


def describe_shards(folder: Path) -> dict:
    """A shard folder of preprocessing. Parquet's bytes depend on the library's version, so its rows are compared."""
    source = write_images(folder / "raw", 5)
    manifest = preprocess(source, folder / "shards", part_size=3, deduplicate=("caption",))
    corpus = open_shards(folder / "shards")
    rows = corpus.metadata().to_pylist()
    fixed = ("format", "vocabulary", "documents", "tokens", "kinds", "image_size", "accounts")
    return {
        "shards": [
            {ending: entry["files"][entry["name"] + ending] for ending in (".tar", ".idx.npy")}
            | {name: entry[name] for name in ("name", "documents", "tokens", "sha256")}
            for entry in manifest["shards"]
        ],
        "entry": dict.fromkeys(manifest["shards"][0]),
        "files": sorted(path.name for path in (folder / "shards").iterdir()),
        "tokens": hash_numbers(np.concatenate([corpus.read(number) for number in range(corpus.documents)])),
        "metadata": [{name: row[name] for name in row if name != "picture_sha256"} for row in rows],
        "manifest": {name: manifest[name] if name in fixed else None for name in manifest},
        "options": {name: None if name == "input_sha256" else value for name, value in manifest["options"].items()},
        "identity": corpus.identity,
    }


def describe_instructions(folder: Path) -> dict:
    """Instruction documents of records and conversations: ids, targets, and the task in the manifest."""
    write_gray_images(folder)
    records = [{"question": f"is it {n}?", "answer": "yes", "image": "white.png"} for n in range(12)]
    objects = [{"name": "cat", "box": [0, 0, 0.5, 0.75]}]
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A square."}]
    corpora = {
        form or task: run_rows(
            write_rows(folder / f"{task}.jsonl", rows), folder / task, form or "auto", task_options={"task": task}
        )
        for form, task, rows in (
            ("", "vqa", records),
            ("", "ground", [{"caption": "a cat", "image": "black.png", "objects": objects}]),
            ("llava", "chat", [{"image": "gray.png", "conversations": turns}]),
        )
    }
    return {
        name: {
            "documents": [show_document(corpus, number) for number in range(corpus.documents)],
            "tasks": corpus.manifest["options"]["tasks"],
            "identity": corpus.identity,
        }
        for name, corpus in corpora.items()
    }


def make_state() -> TrainState:
    """A state with a value in every field."""
    return TrainState(
        step=11,
        batch=14,
        sequence=440,
        tokens=123456,
        skipped=[3],
        skipped_ranges=[{"step": 8, "first": 8, "last": 9, "reason": "spike", "loss": 9.5}],
        recent_losses=[2.5, 2.25],
        cursor={"start": 4, "span": 1, "group": 0},
        stream="0123456789abcdef",
        stream_parts={"version": 2, "stream_version": 1, "weights": [7, 3], "sources": [["0a", "0b", "0c"], ["0d"]]},
        attempt=2,
        changes=[{"step": 4, "field": "cm3.probability", "old": 1.0, "new": 0.5}],
    )


def describe_checkpoint(folder: Path) -> dict:
    """The bytes of the file of one rank, and the other files of a checkpoint."""
    values, step = torch.arange(24.0), step_folder(folder, 11)
    sharded.begin_checkpoint(step)
    pieces = [
        (Piece("decoder.x.weight", kind, (6, 4), (2, 0), (4, 4), start, stop), values[start:stop])
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for start, stop in ((0, 5), (5, 16))
    ]
    sharded.write_rank_file(step, 0, pieces)
    sharded.finish_checkpoint(step, Config(), VOCABULARY, make_state(), {"torch": "x"})
    content, manifest = (step / "rank-00000.safetensors").read_bytes(), read_json(step / "manifest.json")
    return {
        "header": content[8 : 8 + int.from_bytes(content[:8], "little")].decode(),
        "sha256": hashlib.sha256(content).hexdigest(),
        "manifest": {name: None if name in ("files", "sha256") else value for name, value in manifest.items()},
        "files": {name: dict.fromkeys(record) for name, record in manifest["files"].items()},
        "state.json": read_json(step / "state.json"),
        "vocab.json": read_json(step / "vocab.json"),
        "config.yaml": json.loads(json.dumps(asdict(Config()))),
    }


def describe_tokenizers(folder: Path) -> dict:
    """The metadata of a tokenizer folder, and the hash of a vocabulary."""
    shape = dict(image_size=8, codebook_size=16, embed_dim=4, latent_channels=8, base_channels=8, norm="pixel")
    model = VQGAN(VQGANConfig(**shape, channel_multiplier=(1, 2), num_res_blocks=1, attn_resolutions=(4,)))
    ImageTokenizer(model).save(folder, {"steps": 3})
    sizes = dict(text_size=56320, image_size=8192, image_height=32, image_width=32)
    return {
        "image/config.json": read_json(folder / "config.json"),
        "hash": Vocabulary(**sizes, text_sha256="0" * 64, image_sha256="1" * 64).hash,
    }


def describe_exports(folder: Path) -> dict:
    """The metadata of an export and of an index."""
    vocabulary = write_tokenizers(folder / "tok")
    document = [5, 6, 7, vocabulary.break_id, *[vocabulary.image_start] * vocabulary.image_tokens]
    write_shards(folder / "shards", [document] * 3, vocabulary)
    checkpoint = write_random_checkpoint(folder / "run", family_config(f"data.shards={folder / 'shards'}"), vocabulary)
    export_checkpoint(checkpoint, folder / "tok", folder / "export")
    export = read_json(folder / "export/cm3leon.json")
    clip, text = folder / "clip", TextTokenizer.load(folder / "tok/text.model")
    clip.mkdir()
    text.save(clip / TEXT_MODEL)
    save_clip(build_tiny_clip(text.size, 8, 8, 8, 1), clip)
    options = IndexOptions(neighbors=1, images="tokens", tokenizer=str(folder / "tok"), device="cpu")
    index = build_index_folder(folder / "index", folder / "shards", clip, options=options)
    return {
        "cm3leon.json": dict.fromkeys(export)
        | {name: export[name] for name in ("format", "dtype", "class", "parameters", "training")}
        | {name: dict.fromkeys(export[name]) for name in ("config", "state")},
        "export": sorted(path.name for path in (folder / "export").iterdir()),
        "index.json": dict.fromkeys(index)
        | {name: index[name] for name in ("format", "documents", "bank_documents", "neighbors")}
        | {"options": {**index["options"], "tokenizer": None}},
        "index": sorted(path.name for path in (folder / "index").iterdir()),
        "table.json": dict.fromkeys(read_json(folder / "index/table.json")),
        "embeddings": {
            path.name: dict.fromkeys(read_json(path)) for path in sorted((folder / "index/embeddings").glob("*.json"))
        },
    }


def describe_generated(folder: Path) -> dict:
    """generated.json of each command of tools/generate.py: the keys of its options."""
    commands = {
        "image": ["a"],
        "caption": ["a.png"],
        "ask": ["a.png", "b"],
        "infill": ["--text", "a"],
        "complete": ["a"],
    }
    options = {}
    for command, arguments in commands.items():
        with patch.object(sys, "argv", ["generate.py", command, *arguments, "--model", "m"]):
            options[command] = recorded_options(parse_arguments())
    with written_results(folder / "image", options["image"]) as results:
        results.entries.append({"text": "a"})
    return {"generated.json": dict.fromkeys(read_json(folder / "image/generated.json")), "options": options}


def describe_evaluation(folder: Path) -> dict:
    """The result of an evaluation task, its finished items, and a file of statistics."""
    result = Result(
        task="loss",
        figures={"loss": Figure(1.5, 1.25, 1.75, 10, "nats per token"), "exact": Figure(1.0)},
        settings={"documents": [0, 1]},
        seed=3,
        inputs={"model": "ab"},
        notes=["a note"],
        tables={"tokens": {"text": 7}},
    )
    content = read_json(result.write(folder))
    del content["versions"]  # of this machine
    finished = FinishedItems(folder, {"settings": result.settings, "seed": 3})
    finished.add("7", {"losses": {"0": [1.5]}})
    finished.close()
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    features = np.array([[0, 1], [2, 3], [4, 8]], np.float32)
    write_statistics(folder / "statistics.npz", compute_statistics(features, {"network": "ab"}))
    with np.load(folder / "statistics.npz") as arrays:
        statistics = {name: [str(array.dtype.kind), array.tolist()] for name, array in arrays.items()}
    return {"result": content, "items": items, "statistics": statistics}


def describe_options() -> dict:
    """The default options as shards, index, tokenizer and evaluation record them."""
    chosen = (Filters(), IndexOptions(), ImageTrainingOptions(), EvaluationOptions())
    return {type(options).__name__: options.to_dict() for options in chosen}


def describe_run(folder: Path) -> dict:
    """The keys that tools/status.py --json prints for a run."""
    folder.mkdir()
    save_config(Config(), folder / "config.yaml")
    line = {"attempt": 1, "step": 1, "batch": 0, "loss": 2.0, "tokens": 9, "tokens_per_second": 3.0, "time": 100.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line | {"step_seconds": 1.0}) + "\n")
    return {"status": dict.fromkeys(to_json(read_status(folder, now=101.0)))}
