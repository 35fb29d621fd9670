"""docs/formats.md lists the keys of files: each of its tables is compared with files that the code has just written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_cm3leon.checkpoint.format import list_checkpoints
from megatron_cm3leon.data.preprocess.conditions import ConditionSettings, make_conditions
from megatron_cm3leon.data.shards.targets import TARGETS_DTYPE
from megatron_cm3leon.data.tasks.conversation import ConversationFiller
from megatron_cm3leon.data.tasks.options import load_task
from megatron_cm3leon.data.tasks.records import RecordFiller
from megatron_cm3leon.evaluation.assemble import collect_report
from megatron_cm3leon.evaluation.compare import read_runs
from megatron_cm3leon.evaluation.compare_page import write_comparison
from megatron_cm3leon.evaluation.evaluate import EvaluationOptions, evaluate_model
from megatron_cm3leon.evaluation.metrics.statistics import compute_statistics, write_statistics
from megatron_cm3leon.evaluation.result import Figure, Result
from megatron_cm3leon.evaluation.tasks import TASKS, loss
from megatron_cm3leon.generation.retrieved import DocumentSource
from megatron_cm3leon.monitoring import events
from tests.data.corpora import write_images
from tests.data.runs import run as preprocess
from tests.distributed.launch import ROOT, child_environment
from tests.evaluation.conftest import inputs as evaluation_inputs  # noqa: F401 - a fixture
from tests.golden import formats
from tests.golden.write_old_run import write_data
from tests.tools.call import call_tool
from tests.tools.test_generate import folder as generation_folder  # noqa: F401 - a fixture

PAGE = (ROOT / "docs" / "formats.md").read_text()
CONFIG = """
model: {layers: 1, hidden_size: 8, heads: 2, init_std: 0.02}
data: {seq_length: 63, packing: documents, workers: 0, shards: shards}
retrieval: {documents: 1, index: index}
train: {steps: 4, global_batch_size: 4, micro_batch_size: 2, precision: fp32, threads: 1, skip_batches: '1'}
validation: {shards: shards, index: index, interval: 2, batches: 1}
checkpoint: {interval: 2}
"""


def read_table(heading: str, columns: int = 1) -> dict[str, str]:
    """Keys in backticks in the first column of the table under a heading -> the cell of column `columns`."""
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert section, f"docs/formats.md has no heading {heading!r}"
    rows = [line.split(" | ") for line in section[1].splitlines() if line.startswith("| `")]
    return {key: row[columns] for row in rows for key in re.findall(r"`([^`]+)`", row[0])}


def check_keys(heading: str, *written: dict) -> None:
    """Every key of the objects must be in the table; every object must have all keys that are not optional."""
    table = read_table(heading)
    required = {key for key, kind in table.items() if "optional" not in kind}
    unknown = {key for entry in written for key in entry} - table.keys()
    assert not unknown, f"docs/formats.md, {heading}, lacks {', '.join(sorted(unknown))}"
    for entry in written:
        missing = required - entry.keys()
        assert not missing, f"docs/formats.md, {heading}: {', '.join(sorted(missing))} not written"


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders tok, export and index; shards with a bad input; checkpoint; image of tools/generate.py."""
    folder = tmp_path_factory.mktemp("written")
    for name in ("exports", "checkpoint", "generated"):
        getattr(formats, f"describe_{name}")(folder)
    source = write_images(folder / "raw", 5)
    with source.open("a") as file:
        file.write('{"image": "none.png", "caption": "a"}\n')
    preprocess(source, folder / "pairs", part_size=3, deduplicate=("caption",), max_bad_fraction=1.0)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of four steps with validation, retrieval and a skipped batch."""
    folder, before = tmp_path_factory.mktemp("run"), Path.cwd()
    os.chdir(folder)
    try:
        write_data()
        Path("config.yaml").write_text(CONFIG)
        names = ("RANK", "WORLD_SIZE")
        environment = {name: value for name, value in child_environment().items() if name not in names}
        command = [sys.executable, "-m", "megatron_cm3leon.train", "config.yaml", "output=run"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    finally:
        os.chdir(before)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_condition_images(tmp_path):
    image = np.full((16, 16, 3), 255, np.uint8)
    image[4:12, 4:12] = 0
    Image.fromarray(image).save(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "a.png", "caption": "a square"}) + "\n")
    make_conditions([str(tmp_path / "pairs.jsonl")], tmp_path / "out", ConditionSettings("canny"))
    check_keys("`manifest.json` of condition images", json.loads((tmp_path / "out/manifest.json").read_text()))


def test_keys_of_a_tokenizer_folder_are_documented(written):
    check_keys("`vocab.json`", read_json(written / "tok/vocab.json"))
    check_keys("`image/config.json`", read_json(written / "tok/image/config.json"))


def test_keys_of_shards_are_documented(written):
    manifest = read_json(written / "pairs/manifest.json")
    check_keys("`manifest.json` of shards", manifest)
    check_keys("an entry of `shards`", *manifest["shards"])
    check_keys("`accounts`", manifest["accounts"])
    check_keys("`options`", manifest["options"])
    check_keys("`quarantine.jsonl`", *read_lines(written / "pairs/quarantine.jsonl"))
    name = manifest["shards"][0]["name"]
    index = np.load(written / f"pairs/{name}.idx.npy")
    fields = {key: index.dtype[key].name for key in index.dtype.names}
    assert fields == read_table("`shard-*.idx.npy`")
    assert {key: TARGETS_DTYPE[key].name for key in TARGETS_DTYPE.names} == read_table("`shard-*.targets.npy`")
    check_keys("`shard-*.parquet`", dict.fromkeys(pq.read_schema(written / f"pairs/{name}.parquet").names))


def test_keys_of_the_task_of_instruction_documents_are_documented():
    tasks = [RecordFiller(load_task(name)) for name in ("ground", "scienceqa")]
    tasks += [RecordFiller(load_task("vqa", image_first=True), all_templates=True, names={"image": "file_name"})]
    check_keys(
        "an entry of `tasks`", *(task.describe() for task in (*tasks, ConversationFiller(load_task("chat"), "llava")))
    )


def test_keys_and_files_of_an_index_folder_are_documented(written):
    index = written / "index"
    for name in (
        "index.json",
        "index.faiss.json",
        "table.json",
        "embeddings/bank.json",
        "embeddings/queries_text.json",
    ):
        check_keys(f"`{name}`", read_json(index / name))
    found = {str(path.relative_to(index)) for path in index.rglob("*") if path.is_file()}
    assert found <= read_table("Index folder").keys() | {"embeddings/queries_image.npy"}


def test_metrics_and_files_of_a_run_folder_are_documented(run):
    assert {path.name for path in run.iterdir()} <= {name.split("/")[0] for name in read_table("Run folder")}
    lines = read_lines(run / "metrics.jsonl")
    skipped = [line for line in lines if "skipped" in line]
    check_keys("`metrics.jsonl`", *(line for line in lines if "skipped" not in line))
    assert len(skipped) == 1 and skipped[0].keys() <= read_table("`metrics.jsonl`").keys()
    validated = {key for key in read_table("`metrics.jsonl`") if key.startswith("validation_")}
    assert validated <= lines[-1].keys()
    assert (run / "latest").read_text().strip() == list_checkpoints(run)[-1].name


def test_events_and_their_fields_are_documented(run):
    table = read_table("`events.jsonl`")
    assert set(re.findall(r"^\| `?(\w+)`? \|", events.__doc__, re.MULTILINE)) - {"event"} == table.keys()
    found = read_lines(run / "events.jsonl")
    assert {"start", "initialize", "saved", "stop"} <= {event["event"] for event in found}
    for event in found:
        documented = set(re.findall(r"`([^`]+)`", table[event["event"]]))
        assert event.keys() - {"time", "attempt", "event", "step"} == documented, event["event"]


def test_sections_of_a_saved_config_are_documented(run):
    import yaml

    check_keys("`config.yaml`", yaml.safe_load((run / "config.yaml").read_text()))


def test_keys_and_files_of_a_checkpoint_are_documented(run):
    folder = list_checkpoints(run)[-1]
    manifest = read_json(folder / "manifest.json")
    check_keys("`manifest.json` of a checkpoint", manifest)
    check_keys("`state.json`", read_json(folder / "state.json"))
    check_keys("`vocab.json`", read_json(folder / "vocab.json"))
    content = (folder / "rank-00000.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    check_keys("a piece in the header of `rank-*.safetensors`", *json.loads(header["__metadata__"]["pieces"]))
    names = {re.sub(r"\d{5}", "XXXXX", path.name) for path in folder.iterdir()}
    assert names == read_table("Checkpoint folder").keys()


def test_keys_of_an_export_are_documented(written):
    export = read_json(written / "export/cm3leon.json")
    check_keys("`cm3leon.json`", export)
    check_keys("`training`", export["training"])
    check_keys("`state.json`", export["state"])


def test_keys_of_generated_json_are_documented(written, generation_folder, tmp_path):  # noqa: F811
    check_keys("`generated.json`", read_json(written / "image/generated.json"))
    image, model = tmp_path / "image/000.png", ["--model", generation_folder / "exported"]
    commands = {
        "image": ["a red one"],
        "caption": [image],
        "ask": [image, "which color?"],
        "infill": ["--text", "a <mask> one"],
        "complete": ["a red one", "--segments", "1"],
    }
    entries = []
    for command, arguments in commands.items():
        done = call_tool("generate", command, *arguments, *model, "--output", tmp_path / command)
        assert done.returncode == 0, done.stderr
        entries += read_json(tmp_path / command / "generated.json")["made"]
    others = {"score", "retrieved", "form"}  # tests/tools/test_generate.py checks these
    assert {key for entry in entries for key in entry} == read_table("an entry of `made`").keys() - others


def test_keys_of_an_evaluation_are_documented(evaluation_inputs, monkeypatch):  # noqa: F811
    inputs = evaluation_inputs
    monkeypatch.setattr(DocumentSource, "load", classmethod(lambda *_: inputs.source))
    options = EvaluationOptions(images=12, sweep_images=6, guidance=[1.0, 2.0], examples=3)
    found = evaluate_model(
        inputs.model, inputs.shards, inputs.path / "out", options, checker=inputs.checker, index="index"
    )
    plain = evaluate_model(inputs.model, inputs.shards, inputs.path / "plain", options)
    check_keys("`evaluation.json`", found, plain)
    check_keys("`figures`", found["figures"], plain["figures"])
    assert found["figures"].keys() == read_table("`figures`").keys()
    _, figures = collect_report(inputs.path / "out", inputs.model)
    check_keys("`report.json`", {key: figures[key] for key in figures.keys() - read_table("`figures`").keys()})


def test_keys_and_files_of_a_task_are_documented(evaluation_inputs, tmp_path):  # noqa: F811
    inputs = evaluation_inputs
    loss.evaluate(output=tmp_path / "loss", model=inputs.model, shards=inputs.shards, count=3).write(tmp_path / "loss")
    assert {path.name.replace("loss.", "TASK.") for path in (tmp_path / "loss").iterdir()} <= read_table(
        "Folder of a task"
    ).keys()
    result = read_json(tmp_path / "loss/loss.json")
    check_keys("`TASK.json`", result)
    check_keys("A figure", *result["figures"].values())
    assert result["tables"].keys() <= read_table("`tables`").keys()
    first, *items = read_lines(tmp_path / "loss/items.jsonl")
    assert first.keys() == {"identity"} and len(items) == 3
    documented = set(re.findall(r"`(\w+)`", read_table("`items.jsonl`", 2)["loss"]))
    assert all(line.keys() == {"key", "item"} and line["item"].keys() == documented for line in items)
    assert read_table("`items.jsonl`").keys() == set(TASKS)
    write_statistics(tmp_path / "s.npz", compute_statistics(np.eye(3, dtype=np.float32)))
    with np.load(tmp_path / "s.npz") as content:
        check_keys("Statistics of images", dict(content))


def test_keys_of_a_comparison_are_documented(tmp_path):
    Result(task="clip", figures={"score": Figure(1.0)}, settings={}).write(tmp_path / "run/step-00000010")
    write_comparison(read_runs([str(tmp_path / "run")]), tmp_path / "page")
    [columns] = read_json(tmp_path / "page/report.json")["runs"].values()
    check_keys("A figure", *({key: one[key] for key in one if key != "curve"} for one in columns.values()))
    assert '`{"runs": {RUN: {COLUMN: ...}}}`' in PAGE and columns["clip · score"]["curve"][0][0] == 10


def test_an_undocumented_key_and_a_missing_one_are_reported():
    with pytest.raises(AssertionError, match="`accounts`, lacks repaired"):
        check_keys("`accounts`", dict.fromkeys([*read_table("`accounts`"), "repaired"]))
    with pytest.raises(AssertionError, match="`accounts`: filtered not written"):
        check_keys("`accounts`", {key: 0 for key in read_table("`accounts`") if key != "filtered"})
