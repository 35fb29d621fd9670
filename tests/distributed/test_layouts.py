"""Every layout is the same run: initial weights, 20 losses, and a checkpoint that any layout resumes."""

import pytest
import torch

from megatron_cm3leon.checkpoint.format import step_folder
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from tests.distributed.layout_rows import BY_NAME, LAYOUTS, MASKS, RESUMES, Layout, Resume
from tests.distributed.layouts import read_masks, relative, run_layouts

SLOW = {
    "micro-batches of 1",
    "data 2, zero=1, not overlapped",
    "deepspeed, data 2 zero=3 offload",
}
"""Rows that run under the marker `slow`, beside the covering ones: at most 40 together, in which every field of the
table has each of its values. `python -m tests.distributed.layouts --write docs/layouts.md` runs and checks all rows."""
TESTED = [row for row in LAYOUTS if row.covering or row.name in SLOW]


def _marked(rows: list[Layout | Resume]) -> list:
    """Parameters of the rows that are tests: a run is resumed where its source is one."""
    names = {row.name for row in TESTED}
    return [
        pytest.param(row, id=row.name, marks=() if row.covering else pytest.mark.slow)
        for row in rows
        if row.covering or (row.source if isinstance(row, Resume) else row.name) in names
    ]


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Steps of every layout and resumed run that this session's tests ask for, and the folder they lie in."""
    folder = tmp_path_factory.mktemp("layouts")
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = {row for params in asked for row in params.values() if isinstance(row, Layout | Resume)}
    resumes = [row for row in RESUMES if row in wanted]
    names = {row.name for row in wanted if isinstance(row, Layout)} | {row.source for row in resumes}
    names |= {BY_NAME[name].reference for name in names} | {"one process"}
    return folder, run_layouts(folder, [row for row in LAYOUTS if row.name in names], resumes)


COMPARED = [row for row in LAYOUTS if row.name != row.reference]


@pytest.mark.parametrize("layout", _marked(COMPARED))
def test_same_losses_as_one_process(runs, layout):
    _, steps = runs
    assert [step["step"] for step in steps[layout.name]] == list(range(1, 21))
    assert relative(steps[layout.name], steps[layout.reference], "loss") <= layout.loss_tolerance
    assert relative(steps[layout.name], steps[layout.reference], "grad_norm") <= layout.norm_tolerance


@pytest.mark.parametrize("layout", _marked(COMPARED))
def test_same_initial_weights_as_one_process(runs, layout):
    folder, _ = runs
    expected = CheckpointReader(step_folder(folder / BY_NAME[layout.reference].folder, 0))
    found = CheckpointReader(step_folder(folder / layout.folder, 0))
    assert found.names == expected.names
    for name in expected.names:
        assert torch.equal(found.read(name), expected.read(name)), name


@pytest.mark.parametrize("resume", _marked(RESUMES))
def test_resumes_under_any_layout(runs, resume):
    _, steps = runs
    assert [step["step"] for step in steps[resume.name]] == [step["step"] for step in steps[resume.source][10:]]
    if resume.source == resume.target:
        assert steps[resume.name] == steps[resume.source][10:]  # bit for bit
    assert relative(steps[resume.name], steps[resume.source], "loss") <= 1e-6


@pytest.mark.parametrize("layout", _marked(MASKS))
def test_dropout_masks_are_the_same_where_activations_are_and_independent_elsewhere(runs, layout):
    folder, _ = runs
    found = read_masks(folder, layout)
    assert found.different and found.worst <= 4, found
    replicated = "parallel.tensor=2" in layout.overrides and "parallel.sequence=true" not in layout.overrides
    assert (found.same > 0) == replicated
    assert (found.replayed > 0) == any(override.startswith("parallel.recompute") for override in layout.overrides)


def test_the_tested_rows_are_few_and_have_every_value():
    """What only the command ran would break unseen."""
    assert {row.name for row in TESTED} >= SLOW
    assert len({row.name for row in TESTED} | {row.reference for row in TESTED}) <= 40
    tested = {override for row in TESTED for override in row.overrides}
    fields = {override.partition("=")[0] for row in LAYOUTS for override in row.overrides}
    assert fields == {override.partition("=")[0] for override in tested}
    counted = ("parallel.tensor", "parallel.pipeline", "train.micro_batch_size")  # 4 ranks beside 2, 4 and 8 beside 1
    left = {override for row in LAYOUTS for override in row.overrides} - tested
    assert all(override.startswith(counted) for override in left), left


def test_the_loss_falls(runs):
    _, steps = runs
    losses = [step["loss"] for step in steps["one process"]]
    assert losses[-1] < losses[0] - 0.05
