"""Which parameters lora and train.only train, and the initial values of adapters."""

import pytest
import torch

from megatron_cm3leon.distributed.launch import Rank
from megatron_cm3leon.engine.groups import destroy_groups, initialize_groups
from megatron_cm3leon.model.weights import (
    canonical_shapes,
    count_trained,
    draw_initial_weight,
    trained_shapes,
    trains_image_rows_only,
)
from tests.checkpoint.builders import family_config
from tests.data.corpora import make_vocabulary

LLAMA = ["model.family=llama", "model.kv_heads=2", "model.ffn_hidden_size=48", "model.qk_norm=true"]


def trained(*overrides):
    return trained_shapes(family_config("train.init=base", *overrides), 100)


def test_adapters_have_the_shapes_of_their_layers():
    shapes = trained("lora.rank=4", "lora.layers=[layers.1]", *LLAMA)
    layer = "decoder.layers.1."
    assert shapes == {
        f"{layer}self_attention.linear_qkv.lora_A.weight": (4, 32),
        f"{layer}self_attention.linear_qkv.lora_B.weight": (64, 4),
        f"{layer}self_attention.linear_proj.lora_A.weight": (4, 32),
        f"{layer}self_attention.linear_proj.lora_B.weight": (32, 4),
        f"{layer}mlp.linear_fc1.lora_A.weight": (4, 32),
        f"{layer}mlp.linear_fc1.lora_B.weight": (2, 48, 4),
        f"{layer}mlp.linear_fc2.lora_A.weight": (4, 48),
        f"{layer}mlp.linear_fc2.lora_B.weight": (32, 4),
    }


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("embeddings", {"embedding.word_embeddings.weight"}),
        ("image_rows", {"embedding.word_embeddings.weight", "output_layer.weight"}),
        ("output", {"output_layer.weight"}),
        ("norms", {"decoder.final_layernorm.weight"} | {
            f"decoder.layers.{layer}.{name}.weight" for layer in (0, 1)
            for name in ("input_layernorm", "pre_mlp_layernorm", "self_attention.q_layernorm",
                         "self_attention.k_layernorm")}),
        ("layers.1.mlp", {f"decoder.layers.1.mlp.linear_fc{number}.weight" for number in (1, 2)}),
    ],
)  # fmt: skip
def test_parts_of_the_model(only, expected):
    shapes = trained(f"train.only=[{only}]", *LLAMA)
    assert set(shapes) == expected
    full = canonical_shapes(family_config(*LLAMA), 100)
    assert all(full[name] == shape for name, shape in shapes.items())


def test_of_image_rows_only_these_are_counted():
    config = family_config("train.init=base", "train.only=[image_rows]")
    assert count_trained(config, 100, 16) == 16 * 32
    assert trains_image_rows_only(config, "embedding.word_embeddings.weight")
    both = family_config("train.init=base", "train.only=[image_rows,embeddings]", *LLAMA)
    assert not trains_image_rows_only(both, "embedding.word_embeddings.weight")
    assert count_trained(both, 100, 16) == 100 * 32 + 16 * 32


def test_an_adapter_begins_with_zero_output():
    config = family_config("train.init=base", "lora.rank=64", "model.hidden_size=256", "model.heads=4")
    for name, shape in trained_shapes(config, 100).items():
        weight = draw_initial_weight(name, shape, config)
        if "lora_B" in name:
            assert not weight.any()
        else:
            assert weight.std() == pytest.approx((3 * shape[1]) ** -0.5, rel=0.03)
            half = draw_initial_weight(name, shape, config, (0, shape[1] // 2), (shape[0], shape[1] // 2))
            assert torch.equal(half, weight[:, shape[1] // 2 :])


@pytest.fixture
def stage():
    """Function: (configuration with lora or train.only) -> the model of one process, in training mode."""
    config = family_config()
    initialize_groups(config, Rank(0, 1, 0, 1), torch.device("cpu"))
    try:
        from megatron_cm3leon.model.builder import build_stage

        def build(*overrides):
            config = family_config("train.init=base", "train.precision=fp32", "model.init_std=0.1", *overrides)
            [model] = build_stage(config, make_vocabulary())
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name or "linear_proj" in name or "linear_fc2" in name:
                        parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
            return model

        yield build
    finally:
        destroy_groups()


def compute_losses(model, seed=0):
    from megatron_cm3leon.engine.step import seed_dropout

    seed_dropout(seed, 0, 2)
    ids = torch.arange(40).view(2, 20)
    return model(ids, torch.arange(20).expand_as(ids), None, labels=ids.roll(-1, 1))


def test_what_is_frozen_has_no_gradient(stage):
    model = stage("lora.rank=2", "lora.layers=[layers.1.mlp]", "train.only=[layers.0.linear_qkv]", *LLAMA)
    compute_losses(model).sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = {f"decoder.layers.1.mlp.linear_fc{n}.lora.lora_{letter}.weight" for n in (1, 2) for letter in "AB"}
    assert with_gradient == expected | {"decoder.layers.0.self_attention.linear_qkv.weight"}
    assert all(model.get_parameter(name).grad.any() for name in with_gradient)


def test_the_inputs_of_adapters_are_dropped_while_training(stage):
    model = stage("lora.rank=2", "lora.dropout=0.5")
    first, again, other = (compute_losses(model, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    model.eval()
    evaluated = compute_losses(model)
    assert torch.equal(evaluated, compute_losses(model, 1)) and not torch.equal(evaluated, first)
