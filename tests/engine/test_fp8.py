"""train.fp8: converting weights once per step gives the same bits as converting them at every use."""

import json

import pytest

from tests.distributed.launch import torchrun

STEPS, USES = 5, 2
"""Steps of a run, and uses of a weight per step: training, and the evaluation after it."""


def run(folder, ranks: int, *cases: str) -> dict:
    done = torchrun(ranks, "tests/engine/check_fp8.py", folder, *cases)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("results "))[8:])


def check(results: dict, case: str, keeps_weights: bool = True) -> None:
    kept, converted = results[f"{case} True"], results[f"{case} False"]
    assert kept["losses"] == converted["losses"] and kept["weights"] == converted["weights"]
    # One loss per state of the weights: the initial one, and one after each step; one of the steps is repeated.
    assert len(set(kept["losses"])) == STEPS
    assert kept["losses"][4:6] == kept["losses"][6:8]  # the step after loading repeats the step before
    assert kept["conversions"] == STEPS * USES * kept["matrices"] and (kept["matrices"] > 0) == keeps_weights
    assert converted["conversions"] == 0


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return run(tmp_path_factory.mktemp("fp8"), 1, "plain", "compiled", "compiled recompute")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "compiled", "compiled recompute"])
def test_weights_converted_once_per_step_give_identical_results(one_rank, case):
    check(one_rank, case)


@pytest.mark.slow
def test_compiled_and_recomputed_layers_have_the_same_losses(one_rank):
    plain, *compiled = (
        [float.fromhex(loss) for loss in one_rank[f"{case} True"]["losses"]]
        for case in ("plain", "compiled", "compiled recompute")
    )
    for losses in compiled:
        assert losses == pytest.approx(plain, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        ("tensor", "sequence compiled"),
        ("interleaved",),
        ("zero=1", "zero=1 compiled"),
        ("deepspeed",),
        ("deepspeed zero=3",),
    ],
)
def test_weights_converted_once_per_step_give_identical_results_in_other_layouts(tmp_path, cases):
    results = run(tmp_path, 2, *cases)
    for case in cases:
        check(results, case, keeps_weights=case != "deepspeed zero=3")
