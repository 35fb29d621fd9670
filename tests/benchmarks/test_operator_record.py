"""A recorded step of each family against the formulas of the model, in a separate process."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.model.flops import flops_per_token
from megatron_cm3leon.model.weights import canonical_shapes

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/operator_record.py"
SEQUENCE, VOCABULARY, LAYERS, MICRO_BATCH = 512, 8192, 2, 2
"""The sequence is longer than LONGEST_UNFUSED of model/attention.py, so that attention is one operator."""


@pytest.mark.parametrize("family", ["cm3leon", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_recorded_step_matches_the_formulas_of_the_model(tmp_path, family):
    output = tmp_path / "rows.jsonl"
    command = [
        sys.executable, SCRIPT, "--models", f"{family} 350m", "--layers", LAYERS, "--sequence", SEQUENCE,
        "--vocabulary", VOCABULARY, "--micro-batch", MICRO_BATCH, "--label", "here", "--output", output,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| gemm | " in done.stdout and "bytes per logit" in done.stdout
    (row,) = map(json.loads, output.read_text().splitlines())
    assert (row["tree"], row["family"], row["layers"]) == ("here", family, LAYERS)

    values = ["preset=350m", f"model.family={family}", f"data.seq_length={SEQUENCE}", f"model.layers={LAYERS}"]
    config = load_config(None, [*values, "train.precision=bf16", "train.global_batch_size=2"])
    validate_config(config, 1)
    tokens = MICRO_BATCH * SEQUENCE
    attention = 6 * LAYERS * SEQUENCE * config.model.hidden_size
    classes = row["classes"]
    assert classes["gemm"]["flops"] == (flops_per_token(config, VOCABULARY) - attention) * tokens
    assert classes["attention"]["flops"] == attention * tokens * 7 / 6  # the backward pass computes scores again
    weights = sum(math.prod(shape) for shape in canonical_shapes(config, VOCABULARY).values())
    optimizer = classes["optimizer"]["read"] + classes["optimizer"]["written"]
    assert optimizer / weights > 28  # AdamW alone reads 16 bytes per weight and writes 12
    assert row["loss_bytes_per_logit"] >= 6 and row["loss_alive_per_logit"] >= 2  # read, read again, gradient
    assert row["peak_bytes"] > 18 * weights
    assert sum(count for *_, count in row["shapes"]["gemm"]) == classes["gemm"]["launches"] == 3 * (4 * LAYERS + 1)
    assert sum(count for *_, count in row["shapes"]["attention"]) == 2 * LAYERS
