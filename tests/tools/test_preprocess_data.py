"""tools/preprocess_data.py with a real tokenizer folder, as a user runs it."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from megatron_cm3leon.data.shards.reader import open_shards, split_segments
from megatron_cm3leon.tokenizers.folder import Tokenizers, write_vocabulary
from megatron_cm3leon.tokenizers.image import ImageTokenizer
from megatron_cm3leon.tokenizers.images import load_image, to_pixels
from megatron_cm3leon.tokenizers.text import encode_continuation, train_text
from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig
from tests.data.corpora import write_images
from tests.tools.call import TOOLS, call_tool

TRICKY = "<break> and <sentinel:0> </s>  two  spaces, ünïcode 🎈"
preprocess = partial(call_tool, "preprocess_data")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """raw/pairs.jsonl, and in tok/ an untrained tokenizer with 4 x 4 codes per image."""
    folder = tmp_path_factory.mktemp("tool")
    pairs = write_images(folder / "raw", 20)
    with pairs.open("a") as file:
        file.write(json.dumps({"image": "3.png", "caption": TRICKY}) + "\n")
    (folder / "tok").mkdir()
    train_text([f"picture {number}" for number in range(50)], 280).save(folder / "tok/text.model")
    torch.manual_seed(0)
    config = VQGANConfig(
        image_size=16, codebook_size=32, embed_dim=8, latent_channels=32, base_channels=32,
        channel_multiplier=(1, 1, 1),
        num_res_blocks=1, mid_attention=False,
    )  # fmt: skip
    ImageTokenizer(VQGAN(config)).save(folder / "tok/image")
    write_vocabulary(folder / "tok", specials=32, sentinels=16)
    return folder


@pytest.fixture(autouse=True)
def change_to_raw(raw, monkeypatch):
    """Paths on the command lines are relative to `raw`."""
    monkeypatch.chdir(raw)


def test_the_tool_runs_as_a_program(raw):
    command = [sys.executable, str(TOOLS / "preprocess_data.py"), "--input", "raw/pairs.jsonl"]
    command += ["--tokenizer", "tok", "--output", "program", "--workers", "1"]
    result = subprocess.run(command, cwd=raw, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert open_shards(raw / "program").manifest["command"].startswith("preprocess_data.py --input raw/pairs.jsonl")


def test_pairs_become_the_tokens_of_both_tokenizers(raw):
    arguments = ["--input", "raw/pairs.jsonl", "--tokenizer", "tok", "--output", "shards", "--part-size", 8]
    result = preprocess(*arguments)
    assert result.returncode == 0, result.stderr
    assert "shards: 3 shards." in result.stdout and "21 documents of" in result.stdout
    corpus, tokenizers = open_shards(raw / "shards"), Tokenizers.load(raw / "tok")
    assert corpus.vocabulary == tokenizers.vocabulary
    assert "--part-size 8" in corpus.manifest["command"] and corpus.manifest["options"]["part_size"] == 8
    text, image = split_segments(corpus.read(20), corpus.vocabulary)
    assert tokenizers.text.decode(text.tolist()) == TRICKY
    assert corpus.vocabulary.is_text(text).all() and corpus.vocabulary.is_image(image).all()
    pixels = to_pixels(load_image(raw / "raw/3.png"), 16)
    codes = tokenizers.image.encode(pixels[None])[0] + corpus.vocabulary.image_start
    assert image.tolist() == codes.tolist()
    again = preprocess(*arguments)
    assert again.returncode == 0 and "already holds these shards; nothing to do" in again.stdout
    other = preprocess(*arguments[:-1], 9)
    assert other.returncode == 2 and other.stdout == ""
    assert other.stderr.startswith("error: --output shards holds shards written with other options (part_size: 8, now ")


def test_too_many_bad_inputs_exit_with_2_and_name_the_list(raw):
    pairs = raw / "raw/bad.jsonl"
    pairs.write_text((raw / "raw/pairs.jsonl").read_text() + '{"image": "none.png", "caption": "x"}\n')
    arguments = ["--input", pairs, "--tokenizer", "tok", "--output", "bad"]
    result = preprocess(*arguments)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "1 of the 22 inputs read are unusable" in result.stderr and "bad/quarantine.jsonl" in result.stderr
    result = preprocess(*arguments, "--max-bad-fraction", 0.1)
    assert result.returncode == 0
    assert "1 unusable inputs are listed in bad/quarantine.jsonl:\n  1 x missing picture" in result.stdout


def test_a_job_array_and_merge_write_the_shards_of_one_process(raw, monkeypatch):
    arguments = ["--input", "raw/pairs.jsonl", "--tokenizer", "tok", "--part-size", 8, "--device", "cpu"]
    arguments += ["--deduplicate", "picture", "--fit", "pad"]
    assert preprocess(*arguments, "--output", "single").returncode == 0
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    for stage in ("hash", "encode"):
        result = preprocess("merge", "--output", "array")
        assert result.returncode == 2 and "error: " in result.stderr
        for task in ("1", "2"):  # an array that begins at 1
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
            result = preprocess(*arguments, "--output", "array", "--stage", stage)
            assert result.returncode == 0, result.stderr
        assert f"this task's {'hashes' if stage == 'hash' else 'parts'} are done" in result.stdout
    result = preprocess("merge", "--output", "array")
    assert result.returncode == 0 and "20 documents of" in result.stdout, result.stderr
    assert "1 duplicates and 0 filtered inputs were skipped.\n  1 x duplicate picture" in result.stdout
    single, array = open_shards(raw / "single").manifest, open_shards(raw / "array").manifest
    assert single["shards"] == array["shards"] and single["content_sha256"] == array["content_sha256"]
    result = preprocess(*arguments, "--output", "x", "--task-id", 2)
    assert result.returncode == 2 and "--task-id and --num-tasks must be given together" in result.stderr


def test_records_of_a_task_become_instruction_documents(raw):
    rows = [{"question": f"is it {number}?", "answer": "yes", "image": f"{number}.png"} for number in range(3)]
    (raw / "raw/vqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--input", "raw/vqa.jsonl", "--tokenizer", "tok", "--output", "tuning", "--task", "vqa"]
    result = preprocess(*arguments)
    assert result.returncode == 0 and "3 documents of" in result.stdout, result.stderr
    corpus, text = open_shards(raw / "tuning"), Tokenizers.load(raw / "tok").text
    assert corpus.manifest["options"]["tasks"][0]["name"] == "vqa" and corpus.manifest["kinds"] == {"instruction": 3}
    question, answer = text.encode("Question: is it 0? Answer:"), encode_continuation(text, " yes")
    document, _ = split_segments(corpus.read(0), corpus.vocabulary)
    # the ids of the prompts that generation/prompts.py builds
    assert document.tolist() == [*question, *answer, *encode_continuation(text, ".")]
    assert corpus.targets(np.array([0]))[0].tolist() == [[len(question), len(question) + len(answer)]]
    again = preprocess(*arguments, "--all-templates")
    assert again.returncode == 2 and "written with other options (tasks: " in again.stderr
    image_first = [*arguments[:-3], "first", "--task", "vqa", "--image-first"]
    assert preprocess(*image_first).returncode == 0
    image, document = split_segments(open_shards(raw / "first").read(0), corpus.vocabulary)
    assert corpus.vocabulary.is_image(image).all() and document.tolist()[: len(question)] == question


def test_usage_errors_of_instruction_documents(raw):
    for arguments, message in (
        (
            ["--image-first"],
            "error: --image-first is for instruction documents; give --task, or a --format of them: llava,",
        ),
        (["--template-seed", 3], "error: --template-seed is for instruction documents; "),
        (["--fields", "a=b"], "error: --fields is for instruction documents; "),
        (["--task", "none"], "error: --task (none) must be a YAML file, or one of caption, "),
        (["--task", "vqa", "--image-field", "x"], "error: --image-field and --caption-field are for pairs; name the"),
        (["--task", "vqa"], "error: task vqa: no record of the input has one of its fields: field "),
        (["--task", "caption", "--clean-captions"], "error: --clean-captions is for captions, not for the pieces of "),
    ):
        result = preprocess("--input", "raw/pairs.jsonl", "--tokenizer", "tok", "--output", "x", *arguments)
        assert result.returncode == 2 and result.stderr.startswith(message), result.stderr


def test_usage_errors():
    for arguments, message in (
        (["--workers", 0], "error: --workers (0) must be at least 1."),
        (["--max-bad-fraction", 2], "error: --max-bad-fraction (2.0) must be between 0 and 1."),
        (["--tokenizer", "nowhere"], "error: no vocabulary at nowhere"),
    ):
        result = preprocess("--input", "raw/pairs.jsonl", "--tokenizer", "tok", "--output", "x", *arguments)
        assert result.returncode == 2 and result.stderr.startswith(message), result.stderr
    result = preprocess("--help")
    assert result.returncode == 0 and "(default: 0.01)" in " ".join(result.stdout.split())


def test_show_batch_prints_the_captions(raw):
    shards = raw / "one"
    preprocess("--input", "raw/pairs.jsonl", "--tokenizer", "tok", "--output", "one")
    (raw / "config.yaml").write_text(f"data: {{shards: {shards}, seq_length: 127}}\ntrain: {{global_batch_size: 21}}\n")
    arguments = ["config.yaml", "cm3.probability=0", "--tokenizer", "tok", "--blocks", 0]
    result = call_tool("show_batch", *arguments)
    assert result.returncode == 0, result.stderr
    shown = TRICKY.replace("<break>", "\\<break>").replace("<sent", "\\<sent").replace("</s>", "\\</s>")
    assert shown in result.stdout and result.stdout.count("[image: 16 codes]") == 21
