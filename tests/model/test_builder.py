"""Parameter counts of the presets, initial weights, and losses compared with independent forward passes."""

import pytest
import torch

from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from tests.distributed.launch import torchrun


@pytest.mark.parametrize(
    ("preset", "parameters"), [("350m", 373_293_056), ("760m", 786_432_000), ("7b", 6_727_663_616)]
)
def test_presets_have_the_parameter_counts_of_the_paper(preset, parameters):
    from megatron_cm3leon.model.weights import count_parameters

    config = load_config(None, [f"preset={preset}"])
    validate_config(config)
    assert count_parameters(config, 65_536) == parameters


def test_initial_weights_follow_the_paper():
    from megatron_cm3leon.model.weights import draw_initial_weight

    config = load_config(None, ["preset=350m"])
    validate_config(config)
    words = draw_initial_weight("embedding.word_embeddings.weight", (4096, 256), config)
    assert abs(words.std() / 0.006 - 0.9866) < 0.01  # standard deviation of a normal truncated at 3
    assert words.abs().max() <= 0.018 * (1 + 1e-5)
    positions = draw_initial_weight("embedding.position_embeddings.weight", (4096, 256), config)
    assert abs(positions.std() / 0.0002 - 0.9866) < 0.01
    for name in ("self_attention.linear_proj", "mlp.linear_fc2"):
        assert not draw_initial_weight(f"decoder.layers.3.{name}.weight", (8, 8), config).any()
    repeated = draw_initial_weight("embedding.word_embeddings.weight", (4096, 256), config)
    assert torch.equal(words, repeated)
    config.seed = 1
    assert not torch.equal(words, draw_initial_weight("embedding.word_embeddings.weight", (4096, 256), config))


def test_padding_changes_no_loss(tmp_path):
    """The vocabulary of 164 is padded to 256 rows; the softmax must cover only the 164 rows."""
    done = torchrun(1, "tests/model/check_forward.py")
    assert "forward agrees" in done.stdout
