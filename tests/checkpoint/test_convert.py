"""Export: stock OPT gives the trained model's logits; what cannot be exported is refused in a sentence."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import OPTForCausalLM

from megatron_cm3leon.checkpoint import convert
from megatron_cm3leon.checkpoint.convert import export_checkpoint, split_qkv
from megatron_cm3leon.checkpoint.reference import reference_logits
from megatron_cm3leon.config import Config
from megatron_cm3leon.model.weights import canonical_shapes
from tests.data.corpora import make_vocabulary

VOCABULARY = make_vocabulary(text=40, image=16, height=2, width=3, sentinels=4, specials=10)


class FakeReader:
    """What read_weights gives, from random weights in memory."""

    def __init__(self, activation="relu", vocabulary=VOCABULARY):
        self.config = Config()
        self.config.model.layers, self.config.model.hidden_size, self.config.model.heads = 2, 24, 3
        self.config.model.activation = activation
        self.config.data.seq_length = 20
        self.config.validate()
        self.vocabulary = vocabulary
        generator = torch.Generator().manual_seed(1)
        shapes = canonical_shapes(self.config, vocabulary.size)
        self.weights = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}

    @property
    def names(self):
        return list(self.weights)

    def shape(self, name):
        return self.weights[name].shape

    def read(self, name):
        return self.weights[name].clone()


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tok"
    (folder / "image").mkdir(parents=True)
    (folder / "image" / "config.json").write_text("{}")
    (folder / "text.model").write_bytes(b"pieces")
    VOCABULARY.save(folder / "vocab.json")
    return folder


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_stock_opt_gives_the_trained_logits(tmp_path, tokenizer, activation):
    reader = FakeReader(activation)
    account = export_checkpoint("step-1", tokenizer, tmp_path / "out", reader=reader)
    assert account["max_abs_logit_diff"] <= 1e-5
    model = OPTForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.randint(VOCABULARY.size, (3, 20), generator=torch.Generator().manual_seed(2))
    expected = reference_logits(reader.read, reader.config, ids)
    assert model(ids).logits.shape == expected.shape == (3, 20, VOCABULARY.size)
    assert (model(ids).logits - expected).abs().max() < 1e-5
    assert expected.std() > 0.1  # a comparison of logits that differ from each other
    parameters = {id(p): p.numel() for p in model.parameters()}
    assert account["parameters"] == sum(parameters.values()) - 2 * 24


def test_the_folder_is_complete(tmp_path, tokenizer):
    export_checkpoint("step-1", tokenizer, tmp_path / "out", reader=FakeReader())
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "cm3leon.json",
        "config.json",
        "generation_config.json",
        "image",
        "model.safetensors",
        "text.model",
        "vocab.json",
    ]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["OPTForCausalLM"] and config["vocab_size"] == VOCABULARY.size
    ids = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert ids["eos_token_id"] == VOCABULARY.eos and ids["pad_token_id"] == VOCABULARY.pad
    assert json.loads((tmp_path / "out" / "cm3leon.json").read_text())["training"]["seq_length"] == 20


def test_shards_and_reduced_precision_load_alike(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(convert, "SHARD_BYTES", 5_000)
    account = export_checkpoint("s", tokenizer, tmp_path / "out", reader=FakeReader(), dtype="bf16")
    assert account["max_abs_logit_diff"] <= 1e-5
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2


def test_qkv_rows_are_grouped_per_head():
    rows = torch.arange(12.0)[:, None].expand(12, 4)  # 2 heads of width 2
    query, key, value = split_qkv(rows, heads=2)
    assert query[:, 0].tolist() == [0, 1, 6, 7]
    assert key[:, 0].tolist() == [2, 3, 8, 9]
    assert value[:, 0].tolist() == [4, 5, 10, 11]


def test_a_difference_fails_and_leaves_nothing(tmp_path, tokenizer):
    reader = FakeReader()

    def other(ids, dtype):
        return reference_logits(reader.read, reader.config, ids) + 2e-5

    with pytest.raises(ValueError, match=r"differ from the trained model's by 2.*at most 1e-05"):
        export_checkpoint("s", tokenizer, tmp_path / "out", reader=reader, trained_logits=other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tok"]


def test_wrong_arrangement_is_noticed(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(convert, "split_qkv", lambda weight, heads: weight.chunk(3))
    with pytest.raises(ValueError, match="differ from the trained"):
        export_checkpoint("s", tokenizer, tmp_path / "out", reader=FakeReader())


def _drop(reader):
    del reader.weights["decoder.layers.1.mlp.linear_fc2.weight"]


def _add(reader):
    reader.weights["final_layernorm.weight"] = torch.ones(24)


def _spoil(reader):
    reader.weights["decoder.layers.0.mlp.linear_fc1.weight"][3, 3] = float("nan")


def _reshape(reader):
    reader.weights["embedding.position_embeddings.weight"] = torch.zeros(21, 24)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, r"1 missing \(decoder.layers.1.mlp.linear_fc2.weight\)"),
        (_add, r"1 unknown \(final_layernorm.weight\)"),
        (_spoil, r"decoder.layers.0.mlp.linear_fc1.weight of step-1 has NaN"),
        (_reshape, r"has shape \(21, 24\); \(20, 24\) is required"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, tokenizer, damage, message):
    reader = FakeReader()
    damage(reader)
    with pytest.raises(ValueError, match=message):
        export_checkpoint("step-1", tokenizer, tmp_path / "out", reader=reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tok"]


def test_wrong_inputs_are_refused(tmp_path, tokenizer):
    reader = FakeReader()
    with pytest.raises(ValueError, match="dtype"):
        export_checkpoint("s", tokenizer, tmp_path / "out", reader=reader, dtype="int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"full already exists and is not empty"):
        export_checkpoint("s", tokenizer, tmp_path / "full", reader=reader)
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    (tokenizer / "text.model").unlink()
    with pytest.raises(ValueError, match=r"has no text.model"):
        export_checkpoint("s", tokenizer, tmp_path / "out", reader=reader)
    replace(VOCABULARY, text_size=41).save(tokenizer / "vocab.json")
    with pytest.raises(ValueError, match=r"another vocabulary .*text_size: 41 instead of 40"):
        export_checkpoint("s", tokenizer, tmp_path / "out", reader=reader)


def test_an_empty_output_folder_is_taken(tmp_path, tokenizer):
    (tmp_path / "out").mkdir()
    export_checkpoint("s", tokenizer, tmp_path / "out", reader=FakeReader())
    assert (tmp_path / "out" / "config.json").exists()
