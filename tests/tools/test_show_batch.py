"""tools/show_batch.py prints what the model sees."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.data.inspect.sequences import SequencePrinter, find_images
from megatron_cm3leon.data.stream.stream import Stream
from megatron_cm3leon.monitoring.history import read_history
from tests.data.corpora import ByteText, make_neighbors, make_vocabulary, write_shards
from tests.tools.call import call_tool
from tools.show_batch import draw_images

V = make_vocabulary(text=256, image=16, height=2, width=2)


@pytest.fixture
def corpus(tmp_path):
    documents = [[*f"kite {name}".encode(), V.break_id, *[V.image_start + 3] * 4] for name in "abcd"]
    return write_shards(tmp_path / "shards", documents, V)


def make_printer(corpus, neighbors=None, **options):
    config = Config()
    config.data.seq_length, config.data.image_first_probability = 31, 0.0
    config.cm3.probability, config.retrieval.documents, config.retrieval.loss_weight = 0.0, 1, 0.25
    return SequencePrinter(Stream(config, corpus, neighbors), ByteText(), **options)


def test_a_sequence_reads_as_text(corpus):
    text = make_printer(corpus).describe(0)
    header, query, tokens = text.split("\n")
    assert (
        header == "sequence 0  epoch 0  13 tokens (4 of images), 19 padding, 0 trimmed, 0 spans moved, loss weight 12"
    )
    number = int(query.split()[1][:-1])
    assert query == f"  query {number}: made ({number}.png)"
    assert tokens == f"</s>kite {'abcd'[number]}<break>[image: 4 codes]</s><pad> x 19"


def test_weights_and_color(corpus):
    neighbors = make_neighbors(corpus, columns=1, missing=0.0)
    tokens = make_printer(corpus, neighbors).describe(0).split("\n")[-1]
    assert tokens.startswith("</s>⟦0.25: kite ") and "codes]<break>⟧kite " in tokens
    assert "\033[36m[image: 4 codes]\033[0m" in make_printer(corpus, color=True).describe(0)


def test_targets_of_instructions_are_marked(tmp_path):
    question = [72, 105, 32, 66, 121, 46, 9]  # "Hi By.\t", with the answer "By"
    corpus = write_shards(tmp_path, [question], V, targets=[[(3, 5)]])
    config = Config()
    config.data.seq_length, config.cm3.probability, config.sft.loss = 15, 0.0, "target"
    shown = SequencePrinter(Stream(config, corpus), ByteText()).describe(0)
    assert "loss weight 3 (2 tokens of targets with 2 of it)" in shown
    assert shown.endswith("⟦0: </s>Hi <sentinel:0>.\\t</s><sentinel:0>⟧⟪By⟫<eoss><pad> x 4")
    config.sft.mask_targets, config.data.text_loss_weight = 0.0, 0.5
    shown = SequencePrinter(Stream(config, corpus), ByteText()).describe(0)
    assert shown.endswith("⟦0: </s>Hi ⟧⟦0.5: ⟪By⟫.⟧⟦0: \\t</s>⟧<pad> x 7")


def test_sentinels_and_incomplete_images_are_shown(corpus):
    tokens = np.array([V.image_start, V.sentinel(3), 65, 27, V.eoss, V.eoss, V.pad])
    shown = make_printer(corpus).show_tokens(tokens, np.array([1, 1, 1, 1, 1, 1, 0], np.float32))
    assert shown == "[image: 1 codes]<sentinel:3>A\\x1b<eoss><eoss><pad>"


def test_the_tool_prints_a_batch_and_names_what_is_missing(corpus, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("train: {global_batch_size: 2}\ndata: {seq_length: 31}\n")
    result = call_tool("show_batch", config, f"data.shards={corpus.folder}", "cm3.probability=0", "--batch", 3)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("batch 3: sequences 6..7, stream ") and "sequence 7  epoch 1" in result.stdout
    assert "\033" not in result.stdout and result.stdout.count("[image: 4 codes]") == 2
    result = call_tool("show_batch", config)
    assert result.returncode == 2 and result.stderr.startswith("error: data.shards is empty; give the folder")


def write_metrics(run, lines):
    names = ("attempt", "step", "batch")
    text = "".join(json.dumps(dict(zip(names, line, strict=True))) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text)


def test_a_step_of_a_run_is_printed_and_skipped_batches_are_marked(corpus, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        f"train: {{global_batch_size: 2}}\ndata: {{seq_length: 31, shards: {corpus.folder}}}\ncm3: {{probability: 0}}\n"
    )
    # Batch 1 was skipped; the second attempt continued from the checkpoint of step 1 and skipped batch 2 instead.
    first = [(1, 1, 0), (1, 1, 1), (1, 2, 2), (1, 3, 3)]
    write_metrics(run, first)
    assert read_history(run) == {0: (1, ""), 1: (1, "non-finite"), 2: (2, ""), 3: (3, "")}
    write_metrics(run, [*first, (2, 2, 1), (2, 2, 2), (2, 3, 3)])
    assert read_history(run) == {0: (1, ""), 1: (2, ""), 2: (2, "non-finite"), 3: (3, "")}
    result = call_tool("show_batch", run, "--step", 3)
    assert result.returncode == 0 and result.stdout.startswith("batch 3: sequences 6..7, stream "), result.stderr
    assert ", step 3\n" in result.stdout
    assert ", SKIPPED by this run after step 2: its loss" in call_tool("show_batch", run, "--batch", 2).stdout
    assert ", not reached by this run" in call_tool("show_batch", run / "config.yaml", "--batch", 9).stdout
    result = call_tool("show_batch", run, "--step", 4)
    assert result.returncode == 2 and "--step (4) is not among the steps of" in result.stderr
    assert "it has steps 1 to 3" in result.stderr
    result = call_tool("show_batch", corpus.folder.parent / "none.yaml", "--step", 4)
    assert result.returncode == 2 and "no configuration file at" in result.stderr


def test_the_packing_report_counts_padding_and_trimmed_and_complete_samples(corpus, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {{seq_length: 31, shards: {corpus.folder}}}\ncm3: {{probability: 0}}\n")
    lines = call_tool("show_batch", config, "--report", 8).stdout.splitlines()
    assert lines[0] == "sequences 0..7 under packing=query, 32 tokens each"
    assert [line.split()[1] for line in lines[1:6]] == ["152", "0", "0", "8", "0,"]  # 13 tokens per sequence
    assert lines[-1].endswith("mean 13 tokens of 4 samples, standard deviation 0; if all had the mean length, "
                              "2 per sequence would leave 18.8% empty.")  # fmt: skip
    lines = call_tool("show_batch", config, "--report", 13, "data.packing=stream").stdout.splitlines()
    assert lines[1].split()[1] == "0" and lines[4].split()[1:4] == ["22", "complete", "of"]
    lines = call_tool("show_batch", config, "--report", 2, "data.packing=documents").stdout.splitlines()
    assert lines[1].split()[1] == "12" and lines[4].split()[1] == "4"


def test_images_are_decoded_from_the_tokens(corpus, tmp_path):
    tokens = np.array([V.eos, *[V.image_start + 3] * 4, V.break_id, V.image_start, V.break_id, *range(256, 260)])
    found = find_images(tokens, V)
    assert [(position, codes.tolist()) for position, codes in found] == [(1, [3] * 4), (8, [0, 1, 2, 3])]
    config, sheet = tmp_path / "config.yaml", tmp_path / "sheet.png"
    config.write_text(f"data: {{seq_length: 31, shards: {corpus.folder}}}\ncm3: {{probability: 0}}\n")
    assert draw_images(make_printer(corpus).stream, range(3), SimpleNamespace(image=MeanImageDecoder()), sheet) == 3
    with Image.open(sheet) as image:
        assert image.mode == "RGB" and image.width > 3 * 160
    for option in ("--images", "--pictures"):  # the second is the former name of the first
        result = call_tool("show_batch", config, option, sheet)
        assert result.returncode == 2 and "--images requires --tokenizer" in result.stderr


class MeanImageDecoder:
    """Decodes four codes to four gray quarters of 8 x 8 pixels."""

    def decode(self, codes):
        gray = (codes.view(-1, 1, 2, 2) / 7.5 - 1).float()
        return gray.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


def test_a_step_belongs_to_the_stream_of_the_run(corpus, tmp_path):
    (tmp_path / "config.yaml").write_text(
        f"train: {{global_batch_size: 2}}\ndata: {{seq_length: 31, shards: {corpus.folder}}}\n"
    )
    (tmp_path / "metrics.jsonl").write_text('{"attempt": 1, "step": 1, "batch": 0}\n')
    assert call_tool("show_batch", tmp_path, "--step", 1, "train.steps=9").returncode == 0
    assert call_tool("show_batch", tmp_path).stdout.splitlines()[0].endswith(", step 1")
    other = call_tool("show_batch", tmp_path, "cm3.probability=0.5").stdout
    assert other.startswith("batch 0: ") and "step 1" not in other  # batch 0 of the run was another one
    result = call_tool("show_batch", tmp_path, "--step", 1, "cm3.probability=0.5")
    assert result.returncode == 2
    assert "whose cm3.probability is 1.0, not 0.5; remove the override, or give --batch" in result.stderr
