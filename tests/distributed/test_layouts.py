"""Every layout is the same run: initial weights, 20 losses, and checkpoints that any layout resumes."""

import pytest
import torch

from megatron_cm3leon.checkpoint.format import step_folder
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.model.weights import OUTPUT_HEAD, WORD_EMBEDDINGS, trained_shapes
from tests.distributed.layout_rows import BY_NAME, LAYOUTS, MASKS, PARTS_REFERENCE, RESUMES, Layout, Resume
from tests.distributed.layouts import compare_row_masks, relative_difference, run_layouts

QUICK = {
    "one process",
    "recompute=full",
    "data 2, zero=1",
    "pipeline=2 interleave=2",
    "context=2",
    "tensor=2 data 2 zero=1 sequence=true",
    "tensor=2 pipeline=2 interleave=2 sequence=true",
    "llama, tensor=2 sequence=true",
    "llama, pipeline=2 interleave=2",
    "llama by sample, tensor=2 context=2 zero=1",
    "bf16, tensor=2 context=2 zero=1",
    "deepspeed, data 2 zero=3",
    "dropout, tensor=2 context=2 sequence=true recompute=full",
    "instructions, loss=target, one sample per sequence",
    "instructions, loss=target, packed, one process",
    "lora, tensor=2 pipeline=2 interleave=2 sequence=true recompute=full",
    "lora and parts, tensor=2 context=2 zero=1",
}
"""Rows of the default suite: each parallel dimension, family and engine once."""
SLOW = {
    "micro-batches of 1",
    "data 2, zero=1, not overlapped",
    "deepspeed, data 2 zero=3 offload",
}
"""Rows that run with the marker `slow` beside those of the table's shorter form: at most 40 in total, with every value
of every field. `python -m tests.distributed.layouts --write docs/layouts.md` runs and checks all rows."""
TESTED = [row for row in LAYOUTS if row.in_suite or row.name in SLOW]


def _parametrize(rows: list[Layout | Resume]) -> list:
    """Test parameters of the rows; a resumed run is tested when its source is."""
    names = {row.name for row in TESTED}
    parameters = []
    for row in rows:
        needed = {row.source, row.target} if isinstance(row, Resume) else {row.name}
        if row.in_suite or (row.source if isinstance(row, Resume) else row.name) in names:
            quick = row.in_suite and needed <= QUICK
            parameters.append(pytest.param(row, id=row.name, marks=() if quick else pytest.mark.slow))
    return parameters


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """(folder, steps of every layout and resumed run that the tests of this session need)."""
    folder = tmp_path_factory.mktemp("layouts")
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    required = {row for params in parameters for row in params.values() if isinstance(row, Layout | Resume)}
    resumes = [row for row in RESUMES if row in required]
    names = {row.name for row in required if isinstance(row, Layout)} | {row.source for row in resumes}
    names |= {BY_NAME[name].reference for name in names} | {"one process"}
    return folder, run_layouts(folder, [row for row in LAYOUTS if row.name in names], resumes)


COMPARED = [row for row in LAYOUTS if row.name != row.reference]


@pytest.mark.parametrize("layout", _parametrize(COMPARED))
def test_losses_equal_those_of_one_process(runs, layout):
    _, steps = runs
    assert [step["step"] for step in steps[layout.name]] == list(range(1, 21))
    assert relative_difference(steps[layout.name], steps[layout.reference], "loss") <= layout.loss_tolerance
    assert relative_difference(steps[layout.name], steps[layout.reference], "grad_norm") <= layout.norm_tolerance


@pytest.mark.parametrize("layout", _parametrize(COMPARED))
def test_initial_weights_equal_those_of_one_process(runs, layout):
    folder, _ = runs
    expected = CheckpointReader(step_folder(folder / BY_NAME[layout.reference].folder, 0))
    found = CheckpointReader(step_folder(folder / layout.folder, 0))
    assert found.names == expected.names
    for name in expected.names:
        assert torch.equal(found.read(name), expected.read(name)), name


@pytest.mark.parametrize("layout", _parametrize([row for row in LAYOUTS if row.reference == PARTS_REFERENCE]))
def test_only_what_is_selected_changes(runs, layout):
    """Of word embedding and output layer the rows of the image codes; other weights are not in the checkpoint."""
    folder, _ = runs
    start, later = (CheckpointReader(step_folder(folder / layout.folder, step)) for step in (0, 10))
    assert set(later.names) == set(trained_shapes(later.config, later.vocabulary.size))
    is_image = later.vocabulary.is_image(torch.arange(later.vocabulary.size))
    for name in (WORD_EMBEDDINGS, OUTPUT_HEAD):
        changed = (later.read(name) != start.read(name)).any(1)
        assert changed[is_image].any() and not changed[~is_image].any(), name
    for name in set(later.names) - {WORD_EMBEDDINGS, OUTPUT_HEAD}:
        assert not torch.equal(later.read(name), start.read(name)), name


@pytest.mark.parametrize("resume", _parametrize(RESUMES))
def test_a_checkpoint_is_resumed_under_any_layout(runs, resume):
    _, steps = runs
    assert [step["step"] for step in steps[resume.name]] == [step["step"] for step in steps[resume.source][10:]]
    if resume.source == resume.target:
        assert steps[resume.name] == steps[resume.source][10:]  # bit-identical
    assert relative_difference(steps[resume.name], steps[resume.source], "loss") <= 1e-6


@pytest.mark.parametrize("layout", _parametrize(MASKS))
def test_dropout_masks_are_identical_for_equal_activations_and_independent_elsewhere(runs, layout):
    folder, _ = runs
    found = compare_row_masks(folder, layout)
    assert found.independent and found.largest_deviation <= 4, found
    replicated = "parallel.tensor=2" in layout.overrides and "parallel.sequence=true" not in layout.overrides
    assert (found.identical > 0) == replicated
    assert (found.recomputed > 0) == any(override.startswith("parallel.recompute") for override in layout.overrides)


def test_the_tested_rows_cover_every_value():
    """An error in a value that no test covers would not be detected."""
    assert {row.name for row in TESTED} >= SLOW | QUICK
    assert len({row.name for row in TESTED} | {row.reference for row in TESTED}) <= 40
    tested = {override for row in TESTED for override in row.overrides}
    fields = {override.partition("=")[0] for row in LAYOUTS for override in row.overrides}
    assert fields == {override.partition("=")[0] for override in tested}
    # Their values 4 and 8 are covered by 1 and 2.
    counts = ("parallel.tensor", "parallel.pipeline", "train.micro_batch_size")
    uncovered = {override for row in LAYOUTS for override in row.overrides} - tested
    assert all(override.startswith(counts) for override in uncovered), uncovered


def test_the_loss_falls(runs):
    _, steps = runs
    losses = [step["loss"] for step in steps["one process"]]
    assert losses[-1] < losses[0] - 0.05
