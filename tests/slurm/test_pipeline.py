"""tools/submit.py pipeline: the scripts of the jobs, and all jobs on a real SLURM."""

import json
from functools import partial

import pytest
import torch
import yaml

from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.monitoring.history import read_metrics
from megatron_cm3leon.retrieval.encoder import TEXT_MODEL, build_tiny_clip, save_clip
from megatron_cm3leon.tokenizers.folder import write_vocabulary
from megatron_cm3leon.tokenizers.image import ImageTokenizer
from megatron_cm3leon.tokenizers.text import train_text
from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig
from tests.data.corpora import write_images
from tests.tools.call import call_tool

pipeline = partial(call_tool, "submit", "pipeline")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Pairs, held-out pairs, an untrained tokenizer and encoder, and the YAML of a run."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_images(folder / "train", 40)
    write_images(folder / "heldout", 12)
    (folder / "tok").mkdir()
    (folder / "clip").mkdir()
    text = train_text([f"picture {number}" for number in range(50)], 280)
    for path in (folder / "tok/text.model", folder / "clip" / TEXT_MODEL):
        text.save(path)
    torch.manual_seed(0)
    sizes = {"image_size": 16, "codebook_size": 32, "embed_dim": 8, "latent_channels": 32, "base_channels": 32}
    config = VQGANConfig(**sizes, channel_multiplier=(1, 1, 1), num_res_blocks=1, mid_attention=False)
    ImageTokenizer(VQGAN(config)).save(folder / "tok/image")
    write_vocabulary(folder / "tok", specials=32, sentinels=16)
    save_clip(build_tiny_clip(280, 32, 16, 32, 1), folder / "clip")
    (folder / "run.yaml").write_text(
        "model: {layers: 2, hidden_size: 32, heads: 4}\ndata: {seq_length: 96}\nretrieval: {documents: 1}\n"
        "train: {steps: 4, global_batch_size: 4, precision: fp32, threads: 1}\ncheckpoint: {interval: 2}\n"
        "validation: {interval: 2, batches: 1}\n"
    )
    plan = {
        "input": [str(folder / "train/*.jsonl")],
        "heldout": [str(folder / "heldout/pairs.jsonl")],
        "tokenizer": str(folder / "tok"),
        "encoder": str(folder / "clip"),
        "config": str(folder / "run.yaml"),
        "preprocess": {"tasks": 2, "time": "5", "options": ["--part-size", "8"]},
        "embed": {"tasks": 2, "time": "5", "options": ["--neighbors", "2"]},
        "train": {"ranks_per_node": 2, "time": "5"},
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return folder


def submit(raw, output):
    """Submit the pipeline: name of a step -> its job, in the order of submission."""
    done = pipeline(raw / "plan.yaml", f"output={output}", f"train.options=[output={output / 'run'}]")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("job ")]
    return {line[2].rstrip(","): line[1].rstrip(":") for line in lines}


def read_logs(output):
    return "\n".join(path.read_text() for path in sorted(output.glob("**/submit/*.log")))


@pytest.mark.slow
def test_a_killed_task_cancels_dependent_jobs_and_the_same_command_resumes(slurm, raw):
    output = raw / "corpus"
    jobs = submit(raw, output)
    names = "shards shards-merge heldout embed index heldout-index train"
    assert list(jobs) == names.split()
    task = f"{jobs['shards']}_1"
    slurm.wait(task, "RUNNING")
    rejected = pipeline(raw / "plan.yaml", f"output={output}")
    assert rejected.returncode == 2 and "of this pipeline are still pending or running" in rejected.stderr
    slurm.kill_task(jobs["shards"], 1)
    assert slurm.wait(task)["JobState"] == "FAILED"
    for name in ("shards-merge", "embed", "index", "heldout-index", "train"):
        assert slurm.wait(jobs[name])["JobState"] == "CANCELLED", name
    for job in (f"{jobs['shards']}_0", jobs["heldout"]):
        assert slurm.wait(job)["JobState"] == "COMPLETED", read_logs(output)

    second_jobs = submit(raw, output)
    assert list(second_jobs) == ["shards", "shards-merge", "embed", "index", "heldout-index", "train"]
    assert slurm.wait(second_jobs["train"], seconds=300)["JobState"] == "COMPLETED", read_logs(output)
    lines = read_metrics(output / "run")
    assert len(lines) == 4 and lines[-1]["validation_loss"] and lines[-1]["validation_without_retrieval_loss"]

    inputs = ["--input", raw / "train/pairs.jsonl", "--tokenizer", raw / "tok", "--part-size", 8]
    single_task = call_tool("preprocess_data", *inputs, "--output", raw / "single_task")
    assert single_task.returncode == 0, single_task.stderr
    shards = [open_shards(folder).manifest["content_sha256"] for folder in (raw / "single_task", output / "shards")]
    assert shards[0] == shards[1]
    assert json.loads((output / "heldout_index/index.json").read_text())["documents"] == 12

    complete = pipeline(raw / "plan.yaml", f"output={output}", "config=''")
    assert complete.returncode == 0 and complete.stdout.endswith("nothing is missing.\n")
    changed = pipeline(raw / "plan.yaml", f"output={output}", "preprocess.options=[--part-size,'9']")
    assert (
        changed.returncode == 2
        and "preprocess.options (['--part-size', '9']) was ['--part-size', '8']" in changed.stderr
    )


def test_print_prints_every_script_and_writes_nothing(raw):
    output = raw / "printed"
    done = pipeline(raw / "plan.yaml", f"output={output}", "--print", "--partition", "cpu", "preprocess.partition=gpu")
    assert done.returncode == 0, done.stderr
    assert not output.exists()
    headings = [line for line in done.stdout.splitlines() if line.startswith("### ")]
    assert headings[0] == f"### {output}/submit/shards.sh"
    assert headings[1] == f"### {output}/submit/shards-merge.sh, after shards"
    assert headings[-1].endswith("submit/001.sh, after shards, shards-merge, heldout, index, heldout-index")
    scripts = done.stdout.split("\n### ")
    assert "#SBATCH --array=0-1\n" in scripts[0] and "#SBATCH --partition=gpu\n" in scripts[0]
    assert scripts[0].rstrip().endswith('--task-id "$SLURM_ARRAY_TASK_ID" --num-tasks 2')
    assert "#SBATCH --partition=cpu\n" in scripts[1]


def test_deduplication_with_several_tasks_takes_two_rounds(raw):
    options = "preprocess.options=[--deduplicate,picture]"
    done = pipeline(raw / "plan.yaml", f"output={raw / 'printed'}", "--print", options)
    headings = [line.rpartition("/")[2] for line in done.stdout.splitlines() if line.startswith("### ")]
    assert headings[:3] == [
        "shards-hash.sh",
        "shards-encode.sh, after shards-hash",
        "shards-merge.sh, after shards-encode",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("input=[nothing/*.tar]", "input (nothing/*.tar) matches no file."),
        ("tokenizer=nowhere", "tokenizer (nowhere) must be an existing folder."),
        ("output=''", "output is empty, but required"),
        ("train.options={a: 1}", "a list was found where a mapping is required"),
        ("preprocess.task=3", "there is no field preprocess.task; did you mean preprocess.tasks?"),
        ("embed.tasks=0", "embed.tasks (0) must be at least 1."),
        ("index.time=soon", "index.time: --time (soon) is not a valid SLURM time limit; write minutes"),
        ("train.ranks_per_node=0", "--gpus-per-node must be given, or --ranks-per-node for nodes without GPUs."),
        ("train.options=[parallel.tensor=3]", "parallel.tensor (3) must divide model.heads (4)"),
    ],
)
def test_errors_are_reported_before_anything_is_written(raw, override, message):
    output = raw / "rejected"
    done = pipeline(raw / "plan.yaml", f"output={output}", override, "--print")
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not output.exists()
