"""Pre-flight checks: differences between ranks and faults of a rank are reported with ranks, hosts and values."""

import logging
import os
import shutil
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.distributed.launch import Rank
from megatron_cm3leon.runtime import preflight
from megatron_cm3leon.runtime.preflight import check_disk, compare_facts, compare_ranks, find_device_fault
from tests.checkpoint.builders import run_ranks, write_checkpoint
from tests.data.corpora import make_pairs, make_vocabulary, write_shards
from tests.distributed.launch import torchrun
from tests.distributed.layout_rows import CONFIG

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight")
    write_shards(folder / "shards", make_pairs(20, make_vocabulary()), make_vocabulary())
    write_shards(folder / "other_data", make_pairs(20, make_vocabulary(), seed=1), make_vocabulary())
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def make_config(folder, *overrides):
    config = load_config(
        folder / "config.yaml", [f"data.shards={folder / 'shards'}", f"output={folder / 'run'}", *overrides]
    )
    validate_config(config)
    return config


def compare_configs(*configs):
    """The result of each rank; the ranks are threads that share a store."""
    store = dist.HashStore()
    return run_ranks(
        len(configs), lambda rank: compare_ranks(configs[rank], Rank(rank, len(configs), rank, 3), CPU, store)
    )


def test_equal_ranks_pass_and_one_line_is_logged(folder, caplog):
    caplog.set_level(logging.INFO, "megatron_cm3leon")
    assert compare_configs(*[make_config(folder)] * 3) == [None] * 3
    [line] = caplog.messages
    assert line.startswith("pre-flight: 3 ranks on 1 host, cpu arithmetic check passed, versions")
    assert "; checkpoints of " in line and "written at " in line
    assert not list(folder.glob("**/.preflight*"))


def test_each_rank_reports_every_field_that_differs(folder):
    default = make_config(folder)
    errors = compare_configs(default, default, make_config(folder, "parallel.tensor=2", "optimizer.clip=0.5"))
    assert {type(error) for error in errors} == {ValueError} and len(set(map(str, errors))) == 1
    host = os.uname().nodename
    assert f"parallel.tensor differs: 2 on rank 2 ({host}); the default on ranks 0-1 ({host})" in str(errors[0])
    assert f"optimizer.clip differs: 0.5 on rank 2 ({host})" in str(errors[0])


def test_different_and_missing_data_are_reported(folder, tmp_path):
    shutil.copytree(folder / "other_data", tmp_path / "shards")
    default, other, absent = (make_config(folder, f"data.shards={path}") for path in
                            (folder / "shards", tmp_path / "shards", tmp_path / "none"))  # fmt: skip
    message = str(compare_configs(default, default, other)[0])
    hashes = [preflight.describe_data(config)["content of data.shards"] for config in (other, default)]
    assert f"content of data.shards differs: {hashes[0]} on rank 2 (" in message
    assert f"; {hashes[1]} on ranks 0-1 (" in message
    message = str(compare_configs(default, absent, default)[0])
    assert f"content of data.shards differs: no shards at {tmp_path / 'none'}: " in message


def make_facts(host="a", faults=(), model="", **must_match):
    return {"host": host, "must_match": must_match, "faults": list(faults), "model": model, "disk": {}}


def test_the_node_that_differs_is_reported():
    found = (
        [make_facts("a", torch="2.13.0")] * 2
        + [make_facts("b", torch="2.12.1")] * 2
        + [make_facts("c", torch="2.13.0")] * 2
    )
    [error], _ = compare_facts(found, [0.0] * 6)
    assert error.startswith("torch differs: 2.12.1 on ranks 2-3 (b); 2.13.0 on ranks 0-1,4-5 (a, c).")
    [error], _ = compare_facts(
        [make_facts("a"), make_facts("b", ["cuda:0 computes wrong products in float32"])], [0.0] * 2
    )
    assert error == "rank 1 (b): cuda:0 computes wrong products in float32."
    found = [make_facts("a", model="H200"), make_facts("b", model="H200"), make_facts("c", model="H100")]
    _, [warning] = compare_facts(found, [0.0] * 3)
    assert warning.startswith("GPU model differs: H100 on rank 2 (c); H200 on ranks 0-1 (a, b).")


def test_a_clock_that_differs_by_more_than_a_second_is_a_warning():
    found = [make_facts("a"), make_facts("a"), make_facts("b"), make_facts("b"), make_facts("c")]
    assert compare_facts(found, [100.0, 100.1, 100.9, 100.2, 99.9]) == ([], [])
    errors, [warning] = compare_facts(found, [100.0, 100.1, 97.5, 97.4, 99.9])
    assert not errors and warning.startswith("the clock of b (ranks 2-3) is 2.5 s behind the others")


def test_a_device_that_computes_wrong_products_is_found(monkeypatch):
    assert find_device_fault(CPU) == ""
    multiply = torch.Tensor.__matmul__

    def multiply_with_error(left, right):
        product = multiply(left, right)
        if product.dtype == torch.bfloat16:
            product[7, 7] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply_with_error)
    assert find_device_fault(CPU) == "cpu computes wrong products in bfloat16"


def test_the_disk_must_be_writable_and_hold_the_next_checkpoints(folder, tmp_path):
    config = make_config(folder, f"output={tmp_path / 'not' / 'yet'}", "checkpoint.keep_last=2")
    found = check_disk(config, 1000)
    assert found["rate"] > 0 and found["free"] > 0 and len(found) == 2 and not list(tmp_path.iterdir())
    free = int(found["free"])
    assert "are free at" in check_disk(config, 2 * free)["fault"]
    assert ", and 3 more are to be kept (checkpoint.keep_last)" in check_disk(config, free // 2)["warning"]
    write_checkpoint(tmp_path / "not" / "yet", 1)
    assert ", and 2 more are to be kept" in check_disk(config, int(free / 1.5))["warning"]
    unwritable = check_disk(make_config(folder, "output=/proc/run"), 0)  # /proc has no free bytes either
    assert unwritable["fault"].startswith("/proc is not writable (")


def test_a_rank_that_does_not_connect_is_reported(folder, monkeypatch):
    monkeypatch.setattr(preflight, "WAIT", timedelta(seconds=0.2))
    with pytest.raises(ValueError, match=r"ranks 1-2 of 3 have not connected within 0 s"):
        compare_ranks(make_config(folder), Rank(0, 3, 0, 3), CPU, dist.HashStore())


DIFFERENT = """
import os, sys
from megatron_cm3leon.train import main

sys.exit(main([*sys.argv[1:], *(["parallel.tensor=2"] if os.environ["RANK"] == "1" else [])]))
"""


def test_a_run_whose_ranks_differ_ends_before_process_groups_are_created(folder, tmp_path):
    (tmp_path / "different.py").write_text(DIFFERENT)
    paths = [f"data.shards={folder / 'shards'}", f"output={tmp_path / 'run'}"]
    done = torchrun(2, tmp_path / "different.py", folder / "config.yaml", *paths, check=False, timeout=60)
    assert done.returncode != 0 and done.stderr.count("pre-flight: parallel.tensor differs: ") == 1
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.slow
def test_the_preflight_command_prints_the_bandwidth(folder, tmp_path):
    paths = [f"data.shards={folder / 'shards'}", f"output={tmp_path / 'run'}"]
    done = torchrun(2, "-m", "megatron_cm3leon.runtime.preflight", folder / "config.yaml", *paths)
    assert "pre-flight: 2 ranks on 1 host" in done.stderr
    assert "pre-flight: all-reduce of 4.19 MB in " in done.stderr
