"""train.fp8: a run whose weights are converted once in a step has the bits of one that converts them at every use."""

import json

import pytest

from tests.distributed.launch import torchrun

STEPS, USES = 5, 2
"""Steps of a run, each followed by an evaluation."""


def run(folder, ranks: int, *cases: str) -> dict:
    done = torchrun(ranks, "tests/engine/check_fp8.py", folder, *cases)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("seen "))[5:])


def check(seen: dict, case: str, keeps: bool = True) -> None:
    kept, converted = seen[f"{case} True"], seen[f"{case} False"]
    assert kept["losses"] == converted["losses"] and kept["weights"] == converted["weights"]
    assert len(set(kept["losses"])) == STEPS  # of the initial weights and after each step, one of which was repeated
    assert kept["losses"][4:6] == kept["losses"][6:8]  # the step from a loaded checkpoint is the step before it
    assert kept["conversions"] == STEPS * USES * kept["matrices"] and (kept["matrices"] > 0) == keeps
    assert converted["conversions"] == 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("fp8"), 1, "plain", "compiled", "compiled recompute")


@pytest.mark.parametrize("case", ["plain", "compiled", "compiled recompute"])
def test_kept_weights_change_no_bit(alone, case):
    check(alone, case)


def test_compiled_and_recomputed_layers_have_the_same_bits(alone):
    plain, *compiled = (
        [float.fromhex(loss) for loss in alone[f"{case} True"]["losses"]]
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
def test_kept_weights_change_no_bit_in_other_layouts(tmp_path, cases):
    seen = run(tmp_path, 2, *cases)
    for case in cases:
        check(seen, case, keeps=case != "deepspeed zero=3")
