"""The rows of benchmarks/gpu at tiny sizes on the CPU: their fields, and rows that this source tree cannot measure."""

import json
import math
import subprocess
import sys

import pytest

from tests.distributed.launch import ROOT, child_environment

MODULES = ("runner", "timing", "training", "generation", "peers", "train_step", "generate")


@pytest.fixture(scope="module")
def drivers():
    """The modules training and generation, imported as the drivers' workers import them."""
    paths = [str(ROOT / "benchmarks/gpu"), str(ROOT / "benchmarks")]
    sys.path[:0] = paths
    try:
        import generation
        import training

        yield training, generation
    finally:
        for path in paths:
            sys.path.remove(path)
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def cleanup_groups():
    """Destroys the process groups that a row has created, because the next row creates its own."""
    yield
    from megatron_cm3leon.engine.groups import destroy_groups

    destroy_groups()


def find_row(module, name: str) -> dict:
    return next(row for row in module.make_rows("cpu") if row["name"] == name)


def test_the_most_valuable_rows_come_first(drivers):
    training, generation = drivers
    names = [row["name"] for row in training.make_rows("cuda")]
    assert names[:3] == ["cm3leon 7b", "cm3leon 760m", "cm3leon 350m"] and len(set(names)) == len(names)
    names = [row["name"] for row in generation.make_rows("cuda")]
    assert names[:2] == ["cm3leon 7b bf16, 1 prompt", "cm3leon 7b int8, 1 prompt"] and len(set(names)) == len(names)


def test_rows_compare_the_same_loss(drivers):
    """The other libraries have no z-loss, which the presets of family llama enable."""
    training, _ = drivers
    for row in (row for row in training.make_rows("cuda") if row["model"] == "350m"):
        z_loss = [override for override in row["overrides"] if "z_loss" in override]
        config = training.build_config({**row, "overrides": z_loss})
        assert config.train.z_loss == (1e-5 if z_loss else 0), row["name"]
        assert not config.checkpoint.asynchronous and config.model.dropout == 0


def test_a_training_row_has_consistent_losses_and_rates(drivers, cleanup_groups):
    training, _ = drivers
    *_, row = training.measure(find_row(training, "llama 350m"))
    assert len(row["losses"]) == training.WARM_UP + row["steps"] and row["losses"][-1] < row["losses"][0]
    assert abs(row["losses"][0] - math.log(row["vocabulary"])) < 0.1
    assert row["tflops"] == pytest.approx(row["tera_operations"] / row["ms"] * 1e3)
    assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["ms"] * 1e3)
    assert row["planned_bytes"] > 18 * row["parameters"] and row["grad_norm"] > 0 and len(row["warm_up_s"]) == 2
    from megatron_cm3leon.engine import megatron
    from megatron_cm3leon.model import builder

    assert (megatron.build_stage.__module__, builder.initialize_weights.__module__) == (builder.__name__,) * 2


def test_a_row_with_attention_sample_divides_batches_into_samples(drivers, cleanup_groups):
    training, _ = drivers
    row = find_row(training, "cm3leon 350m, data.attention=sample")
    *_, result = training.measure(row | {"steps": 1})
    assert abs(result["losses"][0] - math.log(row["vocabulary"])) < 0.1
    from train_step import make_batches

    batch = training.divide_into_samples(make_batches(1024, 2, 128, 1)[0])
    assert batch.samples[1].tolist() == [0] * 64 + [1] * 64 and batch.position_ids[1, 62:66].tolist() == [62, 63, 0, 1]


def test_a_hugging_face_row_has_the_same_parameters_and_operations(drivers):
    training, _ = drivers
    row = find_row(training, "cm3leon 350m, Hugging Face, SDPA")
    *_, result = training.measure(row)
    assert abs(result["losses"][0] - math.log(row["vocabulary"])) < 0.1 and result["losses"][-1] < result["losses"][0]
    assert "planned_bytes" not in result
    ours = training.describe(training.build_config(row), {**row, "contender": training.OURS})
    assert result["parameters"] == ours["parameters"] and result["tera_operations"] == ours["tera_operations"]


def test_the_error_names_an_unknown_override(drivers):
    training, _ = drivers
    row = find_row(training, "cm3leon 350m") | {"overrides": ["train.warp=9"]}
    with pytest.raises(ValueError, match=r"there is no field train\.warp"):
        list(training.measure(row))


def test_layers_fit_the_memory_and_decrease_after_out_of_memory(drivers):
    training, _ = drivers
    row = training.make_rows("cuda")[0]
    small, large = (training.fit_layers(row, gib << 30) for gib in (80, 130))
    assert 8 < small < large < 32
    retry = training.fewer_layers({**row, "layers": large, "out_of_memory": True, "failed": "..."})
    assert retry["layers"] == int(0.85 * large) and training.build_config(retry).model.layers == retry["layers"]
    assert training.fewer_layers({**row, "layers": large, "failed": "..."}) is None
    assert training.model_flops_utilization(494.5, "NVIDIA H200") == 0.5
    assert training.model_flops_utilization(494.5, "another card") is None


def test_a_generation_row_has_consistent_rates(drivers):
    _, generation = drivers
    row = find_row(generation, "llama 350m bf16, 1 prompt")
    states = [dict(state) for state in generation.measure(row)]
    assert "first_s" not in states[0] and "seconds" not in states[1]
    result = states[-1]
    assert result["seconds"] > 0 and result["images_per_s"] == pytest.approx(1 / result["seconds"])
    assert result["step_bytes"] > 3e6 and result["read_tb_s"] > 0
    with pytest.raises(ValueError, match=r"weights \(fp7\) must be one of: .*bf16"):
        list(generation.measure({**row, "weights": "fp7"}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("driver", "arguments", "rows"),
    [
        ("training", ["--only", "train.fp8", "llama 7b"], ["llama 7b"]),
        ("generation", ["--only", "fp8", "8 prompts"], ["cm3leon 7b bf16, 8 prompts"]),
        ("kernels", [], ["decoding_matrices", "training_attention", "products", "cross_entropy", "optimizer"]),
        ("smoke", [], ["rates", "attention", "images", "preflight", "clip", "first_step"]),
    ],
)
def test_a_driver_runs_on_the_cpu(tmp_path, driver, arguments, rows):
    command = [sys.executable, str(ROOT / f"benchmarks/gpu/{driver}.py"), "--device", "cpu"]
    command += ["--output", str(tmp_path / "rows.jsonl"), "--seconds", "300", *arguments]
    done = subprocess.run(command, env=child_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=500)
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert written[0]["kind"] == "machine"
    measured = {row["name"] for row in written if not {"failed", "cut", "skipped"} & row.keys()}
    assert set(rows) <= measured, done.stdout
    expected = ("weights (", "there is no field train.")  # features that this source tree may not have
    assert all(any(text in row["failed"] for text in expected) for row in written if "failed" in row), done.stdout
