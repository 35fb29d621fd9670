"""benchmarks/gpu/runner.py: rows that fail, exceed their time limit or are skipped; the file on disk after SIGKILL."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.distributed.launch import ROOT

DRIVER = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT / "benchmarks/gpu")!r})
from runner import parse_options, run_driver

NAMES = ["first", "raises", "dies", "late", "memory", "last"]

class OutOfMemoryError(RuntimeError):
    pass

def measure(row):
    yield {{"steps": 1}}
    if row["name"] == "raises":
        raise ValueError("this row is broken")
    if row["name"] == "dies":
        print("last output of a library", flush=True)
        os._exit(7)
    if row["name"] == "memory" and not row.get("layers"):
        raise OutOfMemoryError("CUDA out of memory")
    yield {{"steps": 2, "rate": 1 / 3, "nothing": float("nan")}}
    if row["name"] == "late":
        Path("late.pid").write_text(str(os.getpid()))
        time.sleep(60)

def retry(result):
    return {{"name": "memory", "kind": "test", "layers": 3, "limit_s": 30}} if "out_of_memory" in result else None

rows = [{{"name": name, "kind": "test", "limit_s": LIMIT if name == "late" else 30}} for name in NAMES]
sys.exit(run_driver(__file__, parse_options("", 60, "rows.jsonl"), rows, (), measure, again=retry))
"""


def start(folder, *arguments, limit=30):
    driver = folder / "driver.py"
    driver.write_text(DRIVER.replace("LIMIT", str(limit)))
    command = [sys.executable, str(driver), "--device", "cpu", *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_rows(folder):
    lines = (folder / "rows.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Exit status, output and rows of a complete run, whose row `late` has a time limit of one second."""
    folder = tmp_path_factory.mktemp("driver")
    process = start(folder, limit=1)
    printed, _ = process.communicate(timeout=100)
    return process.returncode, printed, read_rows(folder)


def test_every_row_is_written_although_others_fail(finished):
    status, printed, rows = finished
    assert [row["name"] for row in rows] == ["machine", "first", "raises", "dies", "late", "memory", "memory", "last"]
    assert rows[0]["kind"] == "machine" and rows[0]["torch"] and rows[0]["gpu"] == "CPU"
    for row in (rows[1], rows[-1]):
        assert row["steps"] == 2 and row["rate"] == 0.333333 and row["nothing"] is None and "limit_s" not in row
    assert status == 1 and "3 rows not measured: raises, dies, late" in printed


def test_a_failed_row_contains_the_end_of_its_error(finished):
    _, _, rows = finished
    assert rows[2]["failed"].endswith("ValueError: this row is broken\n") and rows[2]["steps"] == 1
    assert rows[3]["failed"].startswith("exit status 7\n") and "last output of a library" in rows[3]["failed"]


def test_a_row_that_exceeds_its_time_limit_keeps_its_results(finished):
    _, _, rows = finished
    assert rows[4]["cut"] == "time limit of 1 s" and rows[4]["steps"] == 2 and rows[4]["row_s"] < 20


def test_a_row_out_of_memory_is_retried_with_other_layers(finished):
    _, _, rows = finished
    assert rows[5]["out_of_memory"] is True and "layers" not in rows[5]
    assert rows[6]["layers"] == 3 and rows[6]["steps"] == 2


def test_a_killed_driver_leaves_all_finished_rows_and_no_worker(tmp_path):
    process = start(tmp_path, "--only", "first", "late", "last")
    pid_file, deadline = tmp_path / "late.pid", time.monotonic() + 60
    while not pid_file.exists() or not pid_file.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert [row["name"] for row in read_rows(tmp_path)] == ["machine", "first"]
    worker = int(pid_file.read_text())
    while is_running(worker):
        assert time.monotonic() < deadline, "the worker still runs after its driver was killed"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_rows_without_remaining_time_are_skipped(tmp_path):
    process = start(tmp_path, "--seconds", 0)
    printed, _ = process.communicate(timeout=60)
    rows = read_rows(tmp_path)
    assert process.returncode == 1 and rows[0]["name"] == "machine" and "6 rows not measured" in printed
    assert [row.get("skipped") for row in rows[1:]] == ["0 s were left"] * 6


def test_an_unknown_row_name_is_refused(tmp_path):
    process = start(tmp_path, "--only", "second")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: --only (second) matches no row; the rows are: first, raises, dies, late, memory, last" in printed
