"""The task harness: the results of lm-evaluation-harness's own `--model hf` on the same export."""

import json
import threading

import numpy as np
import pytest
import torch
from lm_eval import evaluate as run_harness
from lm_eval.models.huggingface import HFLM
from transformers import OPTForCausalLM

from megatron_cm3leon.distributed.launch import Rank
from megatron_cm3leon.evaluation import lm_eval_model
from megatron_cm3leon.evaluation.lm_eval_model import make_key
from megatron_cm3leon.evaluation.ranks import Ranks
from megatron_cm3leon.evaluation.tasks import harness
from megatron_cm3leon.export.tokenizer_json import write_tokenizer
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.tokenizers.text import train_text
from tests.data.corpora import make_vocabulary
from tests.evaluation.rank_threads import run_ranks
from tests.models import make_tokenizers, save_random_opt

CAPTIONS = [
    f"a {size} {color} circle on a white background" for size in ("small", "large") for color in ("red", "blue")
]
BYTES_END = 257
"""Text pieces below are "unknown" and the bytes."""
WORDS = np.random.default_rng(0).permutation(" ".join(CAPTIONS * 4).split())
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
"""
TASKS = {
    "choice": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "text": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "continue": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
ROWS = {
    "choice": [{"question": text[:8], "choices": ["circle", "square on a", "a ring"], "answer": number % 3}
               for number, text in enumerate(CAPTIONS * 2)],
    # The last has several windows. No text repeats itself: `--model hf` answers windows of equal ids only once.
    "text": [{"text": " ".join(WORDS[:words])} for words in (9, 20, 90)],
    "continue": [{"question": text[:10], "answer": "x"} for text in CAPTIONS],
}  # fmt: skip


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """An export with random weights, whose most likely token is always a text piece, and its stock tokenizer."""
    folder = tmp_path_factory.mktemp("export")
    text = train_text(CAPTIONS, 300)
    vocabulary = make_vocabulary(text=text.size, image=8, height=2, width=2, sentinels=2, specials=6)
    save_random_opt(folder, vocabulary, positions=64)
    model = OPTForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # These have logit 0; of the other pieces some is above.
        weight = model.model.decoder.embed_tokens.weight
        weight[text.size :] = 0
        weight[:BYTES_END] = 0  # the two libraries decode bytes that are not valid UTF-8 differently
    model.save_pretrained(folder)
    assert write_tokenizer(folder, text, vocabulary, 64) == ""
    tokenizers = make_tokenizers([], vocabulary)
    tokenizers.text = text
    return folder, Generator(Decoder.load(folder), tokenizers)


@pytest.fixture
def arguments(export, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for name, rest in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, folder=tmp_path) + rest)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    folder, generator = export
    monkeypatch.setattr(Generator, "load", classmethod(lambda *_: generator))
    return {
        "model": folder,
        "include_path": tmp_path,
        "tasks": list(TASKS),
        "output": tmp_path / "out",
        "device": "cpu",
    }


def test_results_equal_those_of_model_hf(arguments):
    result = harness.evaluate(**arguments)
    with harness.offline():
        loaded = harness.load_tasks(arguments["include_path"], list(TASKS), None, 0)
        stock = HFLM(pretrained=str(arguments["model"]), device="cpu", dtype="float32", batch_size=4)
        expected = run_harness(stock, loaded, bootstrap_iters=0)
    for name, metric in (("choice", "acc"), ("choice", "acc_norm"), ("text", "word_perplexity"),
                         ("text", "bits_per_byte"), ("continue", "exact_match")):  # fmt: skip
        figure = result.figures[f"{name}/{metric}"]
        assert figure.value == pytest.approx(expected["results"][name][f"{metric},none"], rel=1e-5)
        assert figure.low <= figure.value <= figure.high and figure.n == len(ROWS[name])
    # Beyond the metrics: every log-likelihood and every text.
    answers = [json.loads(line) for line in (arguments["output"] / "items.jsonl").read_text().splitlines()[1:]]
    ours = {line["key"]: line["item"]["answer"] for line in answers}
    for name, kind in (("choice", "loglikelihood"), ("text", "loglikelihood_rolling"), ("continue", "generate_until")):
        for sample in expected["samples"][name]:
            for arguments_, response in zip(sample["arguments"], sample["resps"], strict=True):
                key = make_key(kind, arguments_)
                found, stock_answer = ours[key], response[0]
                if kind == "generate_until":
                    assert found == stock_answer and found
                elif kind == "loglikelihood":
                    assert found[0] == pytest.approx(stock_answer[0], rel=1e-5) and found[1] == stock_answer[1]
                else:
                    assert found == pytest.approx(stock_answer, rel=1e-5)


def test_bos_changes_results_and_finished_answers_are_kept(arguments):
    first = harness.evaluate(**arguments | {"tasks": ["choice"], "bos": True})
    items = (arguments["output"] / "items.jsonl").read_text()
    again = harness.evaluate(**arguments | {"tasks": ["choice"], "bos": True})
    assert (arguments["output"] / "items.jsonl").read_text() == items and again.figures == first.figures
    with pytest.raises(ValueError, match="of a run with different settings"):
        harness.evaluate(**arguments | {"tasks": ["choice"], "bos": False})


def test_ranks_share_the_requests_and_may_become_fewer(arguments, export, monkeypatch):
    monkeypatch.setattr(lm_eval_model, "REQUESTS_AT_ONCE", 3)
    with (arguments["include_path"] / "continue.jsonl").open("a") as file:
        file.write(json.dumps({"question": " ".join(WORDS[:90]), "answer": "x"}) + "\n")
    alone = harness.evaluate(**arguments)
    assert alone.notes == ["1 contexts were longer than the model's 64 tokens and lost their beginning."]
    shared = arguments | {"output": arguments["output"].parent / "shared"}
    scored, local = [], threading.local()
    score = lm_eval_model.score_tokens

    def interrupt_third(*rows):
        local.calls = getattr(local, "calls", 0) + 1
        if local.calls == 3:
            raise KeyboardInterrupt
        scored.append(len(rows[1]))
        return score(*rows)

    with harness.offline():  # once, around all threads
        monkeypatch.setattr(lm_eval_model, "score_tokens", interrupt_third)
        with pytest.raises(KeyboardInterrupt):
            harness.evaluate(**shared)
        monkeypatch.setattr(lm_eval_model, "score_tokens", score)
        for count in (3, 2):
            results = run_ranks(count, lambda ranks: harness.evaluate(**shared, ranks=ranks))
            assert results == [alone, *[None] * (count - 1)]
    assert scored == [3, 3] and (arguments["output"].parent / "shared/items-2.jsonl").exists()
    several = Ranks(Rank(0, 2, 0, 2))
    with pytest.raises(ValueError, match="the task harness with --vlmevalkit is not shared among ranks"):
        harness.evaluate(output=arguments["output"], questions="q.jsonl", vlmevalkit="q.tsv", ranks=several)


def test_bad_task_files_are_named(arguments, tmp_path):
    (tmp_path / "old.yaml").write_text(TASK.format(name="old", folder=tmp_path) + "gold_alias: answer\n")
    with pytest.raises(
        ValueError, match=r"old.yaml: lm-evaluation-harness 0.4.13 cannot load the task old .*gold_alias"
    ):
        harness.evaluate(**arguments | {"tasks": ["old"]})
    with pytest.raises(ValueError, match=r"'none' is not a task of .*; its tasks are: choice, continue, old, text"):
        harness.evaluate(**arguments | {"tasks": ["none"]})
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"its tasks are: none, because it has no task file \(YAML\)\."):
        harness.evaluate(**arguments | {"include_path": tmp_path / "bare"})
    with pytest.raises(ValueError, match=r"num_fewshot \(9\) of the task choice must be at most 8, the documents that"):
        harness.evaluate(**arguments | {"tasks": ["choice"], "num_fewshot": 9})
    other = TASK.format(name="other", folder=tmp_path).replace("other.jsonl", "*.jsonl")
    (tmp_path / "other.yaml").write_text(other + TASKS["text"])
    with pytest.raises(ValueError, match=r"the task other \(DatasetGenerationError: .*: Failed to parse string: 'x'"):
        harness.evaluate(**arguments | {"tasks": ["other"]})
    (tmp_path / "other.yaml").write_text(other.replace("*", "text") + TASKS["text"].replace("word_perp", "other_perp"))
    with pytest.raises(ValueError, match=r"other \(a metric of its metric_list, or the aggregation of one, is not"):
        harness.evaluate(**arguments | {"tasks": ["other"]})
    (tmp_path / "other.yaml").unlink()
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(ValueError, match=r"broken.yaml cannot be read"):
        harness.evaluate(**arguments | {"tasks": ["broken"]})
    with pytest.raises(ValueError, match="--tasks is missing"):
        harness.evaluate(**arguments | {"tasks": None})
    with pytest.raises(ValueError, match="--questions and --vlmevalkit belong together"):
        harness.evaluate(output=tmp_path, vlmevalkit=tmp_path / "x.tsv")
