"""Initial weights: the same bits on every machine, parts drawn without the rest, truncated normal distribution."""

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch

from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.model import initialization
from megatron_cm3leon.model.initialization import BLOCK, compute_sinusoids, draw_truncated_normal, list_runs
from megatron_cm3leon.model.weights import POSITION_EMBEDDINGS, draw_initial_weight

SHA256 = "b753c39083cdc3d40a46b2f4f4f52e3c1764dc8e012a73399d796fc46d966835"
PRINT_SHA256 = """
import hashlib
from megatron_cm3leon.model.initialization import draw_truncated_normal
weights = draw_truncated_normal(1234, "decoder.layers.0.mlp.linear_fc1.weight", 0, 3_000_001, 0.006)
print(hashlib.sha256(weights.numpy().tobytes()).hexdigest())
"""


def draw(start: int, stop: int, seed: int = 7, name: str = "w") -> torch.Tensor:
    return draw_truncated_normal(seed, name, start, stop, 1.0)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_weights_have_the_same_bits_with_every_instruction_set(capability):
    """trunc_normal_, used earlier, gave different bits with `default` and `avx2`, and with torch 2.11."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", PRINT_SHA256], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == SHA256, done.stderr


def test_any_part_is_drawn_without_the_rest():
    full = draw(0, 2 * BLOCK + 1000)
    for start, stop in [(0, 5), (40_000, 40_003), (BLOCK - 3, BLOCK + 70_000), (BLOCK, 2 * BLOCK), (5, 2 * BLOCK + 9)]:
        assert torch.equal(draw(start, stop), full[start:stop])


def test_another_seed_name_or_block_gives_different_numbers():
    first = draw(0, 1000)
    for other in (draw(0, 1000, seed=8), draw(0, 1000, name="v"), draw(BLOCK, BLOCK + 1000)):
        assert not (first == other).any()


def test_the_distribution_is_a_normal_truncated_at_three_standard_deviations():
    numbers = draw(0, 1_000_000).double()
    assert numbers.abs().max() <= 3 * (1 + 1e-5) and numbers.abs().max() > 2.99
    points = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 2.5], dtype=torch.float64)
    probability_inside = math.erf(3 / math.sqrt(2))
    expected = (torch.special.ndtr(points) - 0.5) / probability_inside + 0.5
    found = (numbers[:, None] <= points).double().mean(0)
    assert (found - expected).abs().max() < 4 * 0.5 / 1000  # four standard errors


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoids_are_those_of_the_transformer(width):
    table = compute_sinusoids(0, 50, width, 0.25)
    positions, indices = torch.arange(50.0)[:, None], torch.arange(math.ceil(width / 2))
    angles = positions * 10_000.0 ** (-2 * indices / width)
    expected = torch.cat([angles.sin(), angles.cos()], 1)[:, :width] * 0.25 * 2**0.5
    assert torch.allclose(table, expected, atol=1e-5) and torch.equal(
        table[20:31], compute_sinusoids(20, 11, width, 0.25)
    )
    assert width % 2 or abs(table.square().mean().sqrt() - 0.25) < 1e-6


def test_positions_begin_as_their_option_says():
    changes = ["model.layers=1", "model.hidden_size=8", "model.heads=1", "data.seq_length=16"]
    name, shape = POSITION_EMBEDDINGS, (16, 8)
    normal = load_config(overrides=changes)
    sinusoidal = load_config(overrides=[*changes, "model.position_init=sinusoidal"])
    assert torch.equal(
        draw_initial_weight(name, shape, normal), draw_truncated_normal(1234, name, 0, 128, 0.0002).view(shape)
    )
    table = draw_initial_weight(name, shape, sinusoidal)
    assert torch.equal(table, compute_sinusoids(0, 16, 8, 0.0002))
    assert torch.equal(draw_initial_weight(name, shape, sinusoidal, (3, 0), (5, 8)), table[3:8])


def test_runs_of_a_part_cover_its_numbers():
    full = torch.arange(2 * 3 * 4 * 5)
    shape, offset, part = (2, 3, 4, 5), (0, 1, 0, 0), (2, 2, 4, 5)
    runs = [full[start : start + length] for start, length in list_runs(shape, offset, part)]
    assert len(runs) == 2
    assert torch.equal(torch.cat(runs), full.view(shape)[:, 1:3].reshape(-1))
    columns = [full[start : start + length] for start, length in list_runs((24, 5), (2, 1), (3, 2))]
    assert torch.equal(torch.cat(columns), full.view(24, 5)[2:5, 1:3].reshape(-1))


def test_the_version_identifies_these_numbers():
    """Runs record the version, so a change of the numbers requires a new one."""
    assert initialization.VERSION == "pcg64-erfinv-1"
    assert hashlib.sha256(draw(0, 4).numpy().tobytes()).hexdigest()[:16] == "f207d1346cb90cff"
