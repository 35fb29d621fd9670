"""The roofline model against values computed by hand, and the table made from recorded rows."""

import json

import gpu_prediction
import operator_table
import pytest
from gpu_prediction import GPUS, LAUNCH, product_seconds

H200 = GPUS["H200"]


def make_row(**values) -> dict:
    zero = {"launches": 0, "flops": 0, "read": 0, "written": 0}
    kinds = ("gemm", "attention", "loss", "elementwise", "copy", "weight_gradient_add", "optimizer")
    row = {
        "tree": "abc", "model": "cm3leon 350m", "family": "cm3leon", "preset": "350m", "layers": 24, "micro_batch": 4,
        "sequence": 4096, "vocabulary": 65_536, "settings": [], "compared": ["model.dropout=0", "optimizer.rule=none"],
        "classes": {kind: dict(zero) for kind in kinds}, "shapes": {"gemm": [], "attention": []},
    }  # fmt: skip
    return row | values


def test_a_partial_wave_costs_nearly_as_much_as_a_full_wave():
    tile = 2 * 128 * 256 * (8192 + 96) / (700e12 / 132)
    one_wave = product_seconds([128 * 132, 256, 8192, 1, 2, 0], H200, 700)
    assert one_wave == pytest.approx(tile)
    assert product_seconds([128 * 264, 256, 8192, 1, 2, 0], H200, 700) == pytest.approx(2 * tile)
    partial = product_seconds([128 * 132 + 1, 256, 8192, 1, 2, 0], H200, 700)
    assert 1.3 * tile < partial <= 2 * tile  # smaller tiles or a split of K lose less than a wave
    assert product_seconds([16, 16, 16, 1, 2, 0], H200, 700) == LAUNCH
    assert product_seconds([1, 65_536, 4096, 1, 2, 10**9], H200, 700) == pytest.approx(1e9 / 3.8e12)


def test_the_time_of_a_class_is_bound_by_bytes_or_by_launches():
    row = make_row(shapes={"gemm": [], "attention": [[1, 2, 2, 1000, 128, "forward", 3]]})
    row["classes"]["loss"] = {"launches": 2, "flops": 0, "read": 19_000_000_000, "written": 19_000_000_000}
    row["classes"]["copy"] = {"launches": 100, "flops": 0, "read": 10, "written": 10}
    seconds = gpu_prediction.step_seconds(row, H200, 0)
    assert seconds["loss"] == pytest.approx(0.01) and seconds["copy"] == pytest.approx(100 * LAUNCH)
    assert seconds["attention"] == pytest.approx(3 * 2 * 2 * 1000**2 * 128 / 540e12)


def test_any_depth_is_predicted_from_recordings_of_two_depths():
    rows = [make_row(layers=8), make_row(layers=16)]
    for row in rows:
        row["classes"]["elementwise"]["read"] = (100 + 10 * row["layers"]) * 10**9
    at_20 = gpu_prediction.at_depth(rows, 20, H200, 0)
    assert at_20["elementwise"] == pytest.approx(300e9 / 3.8e12)


def test_predicted_rows_have_the_names_of_measured_rows(tmp_path):
    rows = [make_row(tree="old"), make_row(), make_row(settings=["train.compile=false"])]
    for row in rows:
        row["classes"]["loss"]["read"] = 10**12
    recorded = tmp_path / "rows.jsonl"
    recorded.write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = gpu_prediction.group_recordings(recorded, "")
    assert list(groups) == ["cm3leon 350m", "cm3leon 350m, train.compile=false"]
    predicted = gpu_prediction.predict(groups, ["H200"])
    assert {row["gpu"] for row in predicted} == {"H200"}
    by_name = {row["name"]: row for row in predicted}
    training = by_name["cm3leon 350m"]
    assert training["ms"] == pytest.approx(4 * 1e3 / 3.8, rel=0.01) and training["shares"]["loss"] > 0.99
    assert training["tflops_low"] <= training["tflops"] <= training["tflops_high"]
    assert f"| cm3leon 350m | {training['tflops']:.0f} (" in gpu_prediction.build_tables(predicted, ["H200"])
    assert gpu_prediction.describe_trees(predicted).startswith("Training of the tree abc, as operator_record.py has")
    for row in predicted[:1]:
        row["tree"] = "old"
    assert "recorded it; of old: cm3leon 350m.\n" in gpu_prediction.describe_trees([*predicted, *predicted[1:]])
    with pytest.raises(ValueError, match=r"--tree \(none\) must be one of those in .*: old, abc; operator_record.py"):
        gpu_prediction.group_recordings(recorded, "none")


def test_recordings_of_two_source_trees_are_refused(tmp_path):
    recorded = tmp_path / "rows.jsonl"
    rows = make_row(tree="old", model="cm3leon 7b, 8 layers", layers=8), make_row(model="cm3leon 7b, 16 layers")
    recorded.write_text("".join(json.dumps(row | {"preset": "7b"}) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match=r"has recordings of cm3leon 7b of two trees; record both depths with one tree"
    ):
        gpu_prediction.group_recordings(recorded, "")
    assert len(gpu_prediction.group_recordings(recorded, "old")["cm3leon 7b"]) == 1


def test_the_number_of_layers_that_fit_depends_on_the_settings_of_the_row():
    row = make_row(model="cm3leon 7b", preset="7b", micro_batch=1)
    assert gpu_prediction.fit_layers(row | {"settings": ["train.fp8=true"]}, H200) < gpu_prediction.fit_layers(
        row, H200
    )


def test_fp8_is_refused_on_a_gpu_without_it():
    row = make_row(shapes={"gemm": [[128, 128, 128, 1, 1, 0, 1]], "attention": []})
    assert gpu_prediction.step_seconds(row, H200, 0)["gemm"] == LAUNCH
    with pytest.raises(ValueError, match=r"cm3leon 350m has products in fp8, which this GPU lacks; choose other GPUs"):
        gpu_prediction.step_seconds(row, GPUS["A100"], 0)


def test_decoding_reads_the_weights_and_half_the_cache():
    row = gpu_prediction.predict_generation("cm3leon", "7b", "bf16", 1, H200)
    assert row["name"] == "cm3leon 7b bf16, 1 prompt"
    assert row["step_bytes"] == 2 * (32 * 12 * 4096**2 + 8192 * 4096)
    assert row["cache_bytes"] == 2 * 2 * 2 * 32 * 4096 * (26 + 512)
    lower_bound = 1024 * (row["step_bytes"] + row["cache_bytes"]) / 4.3e12
    assert lower_bound < row["seconds_low"] < row["seconds"] < row["seconds_high"] < 1.25 * lower_bound
    int8 = gpu_prediction.predict_generation("cm3leon", "7b", "int8", 1, H200)
    assert row["step_bytes"] / 2 < int8["step_bytes"] < 0.502 * row["step_bytes"]
    many = gpu_prediction.predict_generation("cm3leon", "350m", "bf16", 64, H200)
    assert many["name"] == "cm3leon 350m bf16, 64 prompts"
    assert many["images_per_s"] == pytest.approx(64 / many["seconds"])


def test_tables_are_written_between_marks(tmp_path):
    row = make_row(loss_bytes_per_logit=44.0, loss_alive_per_logit=12.0, peak_bytes=3 << 30)
    row["classes"]["loss"] = {"launches": 6, "flops": 0, "read": 3 * 10**9, "written": 10**9}
    later = {**row, "tree": "def", "loss_bytes_per_logit": 6.0}
    table = operator_table.build_table([row, later])
    assert table.splitlines()[2:] == [
        "| cm3leon 350m | abc | 0.0 | 0.0 | 4.0 | 0.0 | 0.0 | 6 | 44.0 | 12.0 | 3.0 |",
        "| cm3leon 350m | def | 0.0 | 0.0 | 4.0 | 0.0 | 0.0 | 6 | 6.0 | 12.0 | 3.0 |",
    ]
    page = tmp_path / "page.md"
    begin, end = "<!-- tables of benchmarks/x.py: begin -->", "<!-- tables of benchmarks/x.py: end -->"
    page.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    operator_table.write_between_marks(page, "benchmarks/x.py", table)
    assert page.read_text() == f"above\n{begin}\n\n{table}\n{end}\nbelow\n"
    with pytest.raises(
        ValueError, match=r"page.md must contain the lines <!-- tables of benchmarks/y.py: begin --> and"
    ):
        operator_table.write_between_marks(page, "benchmarks/y.py", table)
