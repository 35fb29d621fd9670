"""Patterns of lora.layers and train.only: what they select, and one sentence for each that cannot be used."""

import pytest

from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.patterns import list_selected
from megatron_cm3leon.config.validation import validate_config

ALL = {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}


def of_layers(layers, words):
    return {(layer, word) for layer in layers for word in words}


@pytest.mark.parametrize(
    ("field", "patterns", "expected"),
    [
        ("lora.layers", ["*"], of_layers(range(12), ALL)),
        ("lora.layers", ["attention"], of_layers(range(12), ["linear_qkv", "linear_proj"])),
        ("lora.layers", ["layers.0-1.mlp", "layers.11"], of_layers([0, 1], ["linear_fc1", "linear_fc2"])
         | of_layers([11], ALL)),
        ("lora.layers", ["linear_qkv", "layers.1.linear_qkv"], of_layers(range(12), ["linear_qkv"])),
        ("train.only", ["embeddings", "image_rows"], set()),
        ("train.only", ["norms"], of_layers(range(12), ["norms"])),
        ("train.only", ["layers.10-11"], of_layers((10, 11), ALL | {"norms"})),
        ("train.only", ["layers.3.norms", "layers.4.attention"], {(3, "norms"), (4, "linear_qkv"), (4, "linear_proj")}),
    ],
)  # fmt: skip
def test_what_patterns_select(field, patterns, expected):
    assert list_selected(field, patterns, 12) == expected


BASE = ["model.layers=4", "model.hidden_size=32", "model.heads=4", "train.init=base"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.rank=4", "lora.layers=[attn]"],
         r"lora\.layers \(attn\) must be one of \*, attention, mlp, linear_qkv, linear_proj, linear_fc1, linear_fc2, "
         r"or such a layer of some layers only: layers\.3, layers\.0-11, layers\.0-11\.mlp\."),
        (["lora.rank=4", "lora.layers=[norms]"], r"lora\.layers \(norms\) must be one of"),
        (["lora.rank=4", "lora.layers=[layers.2-4]"], r"\(layers\.2-4\) must name layers .* are layers\.0-3"),
        (["lora.rank=4", "lora.layers=[]"], r"lora\.layers is empty"),
        (["lora.rank=33"], r"lora\.rank \(33\) must be at most 32, the smaller dimension of linear_fc1; lower it\."),
        (["lora.rank=4", 'train.init=""'], r"lora\.rank \(4\) needs train\.init"),
        (["lora.alpha=8"], r"lora\.alpha \(8\.0\) needs lora\.rank"),
        (["train.only=[layers.0-1]", 'train.init=""'], r"train\.only \(layers\.0-1\) needs train\.init"),
        (["train.only=[heads]"], r"train\.only \(heads\) must be one of \*, .* norms, embeddings, image_rows, output"),
        (["train.only=[norms]"], r"train\.only \(norms\) needs norms with weights, which model\.family=cm3leon does"),
        (["train.only=[output]"], r"train\.only \(output\) needs an output layer of its own, but with model\.tied_emb"),
    ],
)  # fmt: skip
def test_a_selection_that_cannot_be_used_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        validate_config(load_config(None, [*BASE, *overrides]))


def test_alpha_is_the_rank_unless_it_is_given():
    for more, scale in (([], 1.0), (["lora.alpha=8"], 2.0)):
        config = load_config(None, [*BASE, "lora.rank=4", *more])
        validate_config(config)
        assert config.lora.scale == scale and config.trains_part
