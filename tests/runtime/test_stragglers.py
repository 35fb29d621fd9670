"""The slowest rank is reported, and the time for which other ranks wait is not counted as compute time."""

import os
import platform

import pytest

from megatron_cm3leon.monitoring.history import read_metrics
from megatron_cm3leon.runtime.stragglers import StragglerWatch
from tests.data.corpora import make_vocabulary, write_shards
from tests.distributed.launch import torchrun
from tests.distributed.layout_rows import CONFIG
from tests.distributed.layouts import make_learnable_pairs

SLOW_PASSES = """
import os, sys, time
from megatron_cm3leon.engine.{engine} import {cls} as engine
from megatron_cm3leon import train

run = engine._run

def slow_rank(self, micro_batches, *flags, **named):
    model = self.model[0] if hasattr(self, "model") else self.engine.module
    if os.environ["RANK"] == "1" and not hasattr(self, "slowed"):
        self.slowed = model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    return run(self, micro_batches, *flags, **named)

engine._run = slow_rank
sys.exit(train.main(sys.argv[1:]))
"""
SLOW_LOADER = """
import os, sys, time
from megatron_cm3leon.data.stream.loader import Loader
from megatron_cm3leon import train

load = Loader.__next__

def slow_load(self):
    if os.environ["RANK"] == "1":
        time.sleep(0.1)
    return load(self)

Loader.__next__ = slow_load
sys.exit(train.main(sys.argv[1:]))
"""
CASES = {
    "megatron passes": (SLOW_PASSES.format(engine="megatron", cls="MegatronEngine"), ()),
    "megatron loader": (SLOW_LOADER, ()),
    "deepspeed passes": (
        SLOW_PASSES.format(engine="deepspeed", cls="DeepSpeedEngine"), ("train.engine=deepspeed", "parallel.zero=2")
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name == "megatron passes" else pytest.mark.slow) for name in CASES]
)
def test_a_slow_rank_is_reported(tmp_path, case):
    script, overrides = CASES[case]
    write_shards(tmp_path / "shards", make_learnable_pairs(), make_vocabulary())
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "slow.py").write_text(script)
    options = ["train.steps=9", "cluster.straggler_interval=4", "train.threads=1", "model.layers=1", *overrides]
    paths = [f"output={tmp_path / 'run'}", f"data.shards={tmp_path / 'shards'}"]
    done = torchrun(3, tmp_path / "slow.py", tmp_path / "config.yaml", "train.global_batch_size=6", *options, *paths)
    reports = {line["step"]: line for line in read_metrics(tmp_path / "run") if "slowest_rank" in line}
    assert list(reports) == [5, 9]
    for report in reports.values():
        assert (report["slowest_rank"], report["slowest_host"]) == (1, platform.node())
        assert report["slowest_over_median"] > 1.25 and report["step_seconds"] > 0.04
    assert done.stderr.count(f"rank 1 on {platform.node()} is slow") == 2


def compute_report(seconds, first=True):
    """The report for the (data, compute) seconds of each rank."""
    watch = StragglerWatch(1, lambda value: [("a", data, compute) for data, compute in seconds], first)
    assert watch.add(9.0, 9.0) == {}  # the first step
    return watch.add(0.0, 0.0)


def test_the_ratio_is_compute_time_over_the_median(caplog):
    assert compute_report([(0, 1.0), (0.5, 1.0), (0, 0.9)]) == {
        "slowest_rank": 1, "slowest_host": "a", "slowest_over_median": pytest.approx(1.5)
    }  # fmt: skip
    assert "rank 1 on a is slow: its own work takes 1.5 s per step (0.5 s of it waiting for data)" in caplog.text
    caplog.clear()
    assert compute_report([(0, 1.0), (0, 1.1), (0, 0.9)])["slowest_over_median"] == pytest.approx(1.1)
    compute_report([(0, 1.0), (0, 9.0), (0, 1.0)], first=False)
    assert compute_report([(0, 1.0)]) == {} and not caplog.text
    assert StragglerWatch(0, os.abort, True).add(1.0, 1.0) == {}
