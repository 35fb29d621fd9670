"""Memory plan and dry run: groups of ranks, exact parameter counts, bytes close to the measured ones."""

import json
import re
from pathlib import Path

import pytest

from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.model.memory import count_stage_parameters, describe_memory, estimate_memory, list_groups
from megatron_cm3leon.model.weights import count_parameters, count_trained
from megatron_cm3leon.train import main
from tests.distributed.launch import torchrun

ROOT = Path(__file__).resolve().parents[2]
SIZE = """model.layers=4 model.hidden_size=512 model.heads=8 data.seq_length=512 train.global_batch_size=4
          train.micro_batch_size=2 train.precision=fp32"""


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, "train.micro_batch_size=4"),
        (2, "parallel.tensor=2"),
        pytest.param(2, "parallel.zero=1 model.family=llama", marks=pytest.mark.slow),
        pytest.param(1, "train.micro_batch_size=4 lora.rank=8 train.init=base", marks=pytest.mark.slow),
        pytest.param(
            1,
            "train.micro_batch_size=4 model.family=llama model.qk_norm=true train.precision=bf16",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_planned_bytes_are_within_10_percent_of_the_peak(ranks, layout, monkeypatch):
    # Large allocations are returned to the system at once, so that resident memory is that of the tensors.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "100000")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    done = torchrun(ranks, "tests/distributed/measure_memory.py", *SIZE.split(), *layout.split())
    ratios = [float(ratio) for ratio in re.findall(r"planned/measured ([\d.]+)", done.stdout)]
    assert len(ratios) == ranks and all(0.9 <= ratio <= 1.1 for ratio in ratios), ratios


def load(text: str, ranks: int):
    config = load_config(None, text.split())
    validate_config(config, ranks)
    return config


def test_parameters_of_all_stages_sum_to_those_of_the_model():
    """Without tensor parallelism and vocabulary padding, the parameters of all stages sum to those of the model."""
    for text in (
        "preset=350m",
        "preset=350m model.family=llama",
        "preset=7b parallel.pipeline=4 parallel.interleave=2",
    ):
        config = load(text, 8)
        total = sum(count_stage_parameters(config, 65_536, stage) for stage in range(config.parallel.pipeline))
        tied_copy = config.model.tied_embeddings and config.parallel.pipeline > 1
        assert total == count_parameters(config, 65_536) + tied_copy * 65_536 * config.model.hidden_size


def test_each_zero_stage_partitions_more_tensors():
    base = "preset=350m train.engine=deepspeed train.precision=fp32"
    plans = [estimate_memory(load(f"{base} parallel.zero={zero}", 4), 65_536, 4, 0) for zero in range(4)]
    assert [plan.optimizer * 4 == plans[0].optimizer for plan in plans] == [False, True, True, True]
    assert [plan.gradients * 4 == plans[0].gradients for plan in plans] == [False, False, True, True]
    assert [plan.weights * 4 == plans[0].weights for plan in plans] == [False, False, False, True]
    offloaded = f"{base} parallel.zero=3 deepspeed.offload_optimizer=true deepspeed.offload_parameters=true"
    plan = estimate_memory(load(offloaded, 4), 65_536, 4, 0)
    assert plan.optimizer == plan.weights == 0 < plan.gradients


@pytest.mark.parametrize("model", ["cm3leon 350m", "cm3leon 760m", "llama 350m"])
def test_the_fp8_plan_equals_the_recorded_peak_of_a_gpu(model):
    """Peaks of benchmarks/operator_record.py; emulation on a CPU decodes operands, which takes additional memory."""
    lines = (ROOT / "benchmarks/results/operator_record.jsonl").read_text().splitlines()
    recorded = [row for row in map(json.loads, lines) if (row["model"], row["settings"]) == (model, ["train.fp8=true"])]
    family, preset = model.split()
    config = f"preset={preset} model.family={family} train.micro_batch_size=4 train.global_batch_size=4"
    config += " data.seq_length=4096 train.precision=bf16 train.fp8=true train.compile=true"
    assert estimate_memory(load(config, 1), 65_536, 1, 0).total == pytest.approx(recorded[-1]["peak_bytes"], rel=0.02)


def test_fp8_keeps_two_copies_of_the_weights_in_addition_to_bf16():
    base = "preset=350m train.precision=bf16 parallel.tensor=2 parallel.pipeline=2 train.fp8="
    plans = [estimate_memory(load(base + value, 4), 65_536, 4, 1) for value in ("false", "true")]
    assert plans[1].weights - plans[0].weights == 2 * 12 * 1024**2 * 24 // 4
    base = "preset=350m train.engine=deepspeed parallel.zero=3 train.precision=bf16 train.fp8="  # converts at every use
    plans = [estimate_memory(load(base + value, 4), 65_536, 4, 0) for value in ("false", "true")]
    assert plans[1].weights == plans[0].weights


def test_ranks_of_a_group_differ_in_one_coordinate():
    config = load("preset=350m parallel.tensor=2 parallel.context=2 parallel.pipeline=2", 16)
    groups = list_groups(config, 16)
    assert groups["tensor"][:2] == [[0, 1], [2, 3]] and groups["context"][0] == [0, 2]
    assert groups["data"][0] == [0, 4] and groups["pipeline"][0] == [0, 8]
    for kind in groups.values():
        assert sorted(rank for group in kind for rank in group) == list(range(16))


def test_the_description_has_sizes_and_groups():
    text = describe_memory(load("preset=7b parallel.tensor=4 parallel.pipeline=4 parallel.zero=1", 64), 65_536, 64)
    assert "6,727,663,616 parameters" in text and "64 ranks = tensor 4 x context 1 x data 4 x pipeline 4" in text
    assert len(re.findall(r"GiB\n", text)) == 4 and "512 micro-batches of 1" in text


def test_adapters_have_gradients_and_optimizer_state_alone():
    text = "preset=7b parallel.tensor=2 train.init=base"
    full, tuned = (load(f"{text}{more}", 2) for more in ("", " lora.rank=16 lora.layers=[attention]"))
    assert count_trained(tuned, 65_536, 8_192) == 32 * 16 * (4096 + 3 * 4096 + 4096 + 4096)  # layers, rank, A and B
    plan, whole = (estimate_memory(each, 65_536, 2, 0) for each in (tuned, full))
    local = 32 * 16 * (4096 + 3 * 4096 // 2 + 4096 // 2 + 4096)  # A of linear_qkv and B of linear_proj are whole
    assert (plan.gradients, plan.optimizer) == (4 * local, 12 * local)
    assert plan.weights == whole.weights + 2 * local
    assert whole.activations < plan.activations < 1.05 * whole.activations


def test_a_dry_run_compares_full_tuning_with_adapters():
    text = describe_memory(load("preset=760m train.init=base lora.rank=8 parallel.pipeline=2", 2), 65_536, 2)
    assert re.search(
        r"training 4,718,592 parameters, 0.60% of the model's 786,432,000: adapters of rank 8, alpha 8", text
    )
    rows = [line.split() for line in text.splitlines() if line.split()[:1] in (["full"], ["lora.rank=8"])]
    assert [row[:2] for row in rows] == [["full", "100.00%"], ["lora.rank=8", "0.60%"]]
    assert "lora.rank=16" in describe_memory(load("preset=760m train.init=base", 2), 65_536, 2)
    assert "lora" not in describe_memory(load("preset=760m", 2), 65_536, 2)


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"preset: 350m\nparallel: {{tensor: 2}}\noutput: {tmp_path / 'run'}\n")
    assert main([str(config), "--dry-run", "--ranks", "8"]) == 0
    assert "8 ranks = tensor 2 x context 1 x data 4 x pipeline 1" in capsys.readouterr().out
    assert main([str(config), "--dry-run", "--ranks", "5"]) == 2
    assert "= 2 must divide the number of ranks (5)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
