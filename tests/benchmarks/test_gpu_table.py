"""benchmarks/gpu/table.py: measured rows next to predictions, written between the marks of a page."""

import json
import subprocess
import sys

from tests.distributed.launch import ROOT

MACHINE = {"kind": "machine", "name": "machine", "gpu": "NVIDIA H200", "memory_bytes": 141 << 30, "torch": "2.11.0"}
TRAINING = {
    "kind": "training", "name": "cm3leon 7b", "layers": 26, "parameters": 5.5e9, "ms": 1999.6, "tokens_per_s": 16387.4,
    "tflops": 531.25, "mfu": 0.53716, "peak_bytes": 120 << 30, "planned_bytes": 118 << 30, "kernel_ms": 1900.0,
    "kernels": [["nvjet_hsh", 64, 1200.5]],
}  # fmt: skip
GENERATION = {
    "kind": "generation", "name": "cm3leon 7b bf16, 1 prompt", "seconds": 3.8, "images_per_s": 0.263, "first_s": 5.25,
    "graph_ms": 3.6, "tb_s": 3.75, "bandwidth_share": 0.87, "peak_bytes": 15 << 30,
}  # fmt: skip


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_table(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks/gpu/table.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_tables_show_measured_rows_next_to_predictions(tmp_path):
    failed = {"kind": "training", "name": "cm3leon 7b, train.fp8=true", "failed": "Traceback\nValueError: no fp8\n"}
    memory = {"kind": "training", "name": "cm3leon 7b", "layers": 31, "failed": "x", "out_of_memory": True}
    late = {"kind": "generation", "name": "cm3leon 7b int8, 1 prompt", "first_s": 9.0, "cut": "time limit of 60 s"}
    training = write_lines(
        tmp_path / "a.jsonl", MACHINE, {**TRAINING, "ms": 1.0, "skipped": "1"}, memory, TRAINING, failed
    )
    generation = write_lines(tmp_path / "b.jsonl", MACHINE, GENERATION, late)
    with generation.open("a") as file:
        file.write('{"kind": "generation", "na')  # a driver was killed here
    predicted = write_lines(
        tmp_path / "p.jsonl",
        {"gpu": "H200", "kind": "training", "name": "cm3leon 7b", "tflops": 550, "tflops_low": 534, "tflops_high": 600},
        {"gpu": "H200", "kind": "training", "name": "llama 350m", "tflops": 399.6},
        {"gpu": "H200", "kind": "generation", "name": "cm3leon 7b bf16, 1 prompt", "seconds": 3.75},
        {"gpu": "H100", "kind": "generation", "name": "cm3leon 7b bf16, 1 prompt", "seconds": 5.2},
    )
    done = make_table(training, generation, "--predicted", predicted)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["### NVIDIA H200, 141 GiB", "", "torch 2.11.0."]
    assert "| cm3leon 7b | 31 |  |  |  | out of memory | 534-600 |  |  |  |" in lines
    assert "| cm3leon 7b | 26 | 5500 | 2000 | 16387 | 531.2 | 534-600 | 0.537 | 120.0 | 118.0 |" in lines
    assert "| cm3leon 7b, train.fp8=true |  |  |  |  | failed: ValueError: no fp8 |  |  |  |  |" in lines
    assert "| llama 350m |  |  |  |  | not measured: no row | 400 |  |  |  |" in lines
    assert "| cm3leon 7b bf16, 1 prompt | 3.800 | 3.75 | 0.26 | 5.2 | 3.600 | 3.75 | 0.87 | 15.0 |" in lines
    assert "| cm3leon 7b int8, 1 prompt | time limit of 60 s |  |  | 9.0 |  |  |  |  |" in lines
    assert "- cm3leon 7b: 1900 of 2000 ms in kernels. 1200.5 ms `nvjet_hsh` (64)" in lines
    assert lines[-5:][0] == "### H100: predicted, not measured" and "| not measured: no row | 5.20 |" in lines[-1]


def test_only_the_text_between_the_marks_of_a_page_is_replaced(tmp_path):
    rows = write_lines(
        tmp_path / "a.jsonl", MACHINE, {"kind": "kernels", "name": "products", "kernel": "7b qkv", "forward": 701.5}
    )
    page = tmp_path / "page.md"
    page.write_text("before\n")
    refused = make_table(rows, "--write", page)
    marks = [f"<!-- tables of benchmarks/gpu/table.py: {name} -->" for name in ("begin", "end")]
    assert refused.returncode == 2 and f"must contain the lines {marks[0]} and {marks[1]} once" in refused.stderr
    page.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    for _ in range(2):
        assert make_table(rows, "--write", page, "--predicted", tmp_path / "none").returncode == 0
    text = page.read_text()
    assert text.startswith(f"before\n{marks[0]}\n\n### NVIDIA H200") and text.endswith(f"{marks[1]}\nafter\n")
    assert "| 7b qkv | 701.5 |" in text and "old" not in text


def test_files_without_valid_rows_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("not JSON\n{}\n")
    refused = make_table(tmp_path / "a.jsonl")
    assert refused.returncode == 2 and "a.jsonl, line 1 is not JSON" in refused.stderr
    refused = make_table(write_lines(tmp_path / "b.jsonl", TRAINING))
    assert refused.returncode == 2 and "does not begin with a row about the machine" in refused.stderr


def test_the_page_of_this_project_has_the_marks(tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text((ROOT / "docs/benchmarks.md").read_text())
    done = make_table(write_lines(tmp_path / "a.jsonl", MACHINE, GENERATION), "--write", page)
    assert done.returncode == 0 and "### NVIDIA H200, 141 GiB" in page.read_text()
