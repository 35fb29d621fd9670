"""Training on a GPU: the losses of the CPU, checkpoints that both devices resume, asynchronous saves."""

import pytest
import torch

from megatron_cm3leon.checkpoint.format import step_folder
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.runtime.preflight import find_device_fault
from tests.data.corpora import make_vocabulary, write_shards
from tests.distributed.layout_rows import BF16, CONFIG, DEEPSPEED, LLAMA, SAMPLES, SMALL
from tests.distributed.layouts import make_learnable_pairs, relative_difference
from tests.gpu.rows import RowRunner

pytestmark = pytest.mark.gpu
ROWS = {  # name -> overrides
    "cm3leon": (),
    "llama": LLAMA,
    "by sample": SAMPLES,
    "llama by sample": LLAMA + SAMPLES,
    "zero=1 recompute=full": ("parallel.zero=1", "parallel.recompute=full"),
    "recompute=selective": ("parallel.recompute=selective",),
    "bf16": BF16,
    "llama bf16": LLAMA + BF16,
    "deepspeed zero=2": (*DEEPSPEED, "parallel.zero=2", *SMALL),
    "deepspeed zero=3 bf16": (*DEEPSPEED, "parallel.zero=3", *BF16, *SMALL),
}
UNCOMPILED = ("train.compile=false",)
COMPILED = {"compiled": "cm3leon", "llama by sample, compiled": "llama by sample"}
"""Name of a compiled row -> row whose uncompiled losses on the CPU it must equal."""
SYNCHRONOUS = "saved synchronously"
BROKEN = "broken"
RESUMED = ("cm3leon", "bf16", "deepspeed zero=2")
DIRECTIONS = [("cpu", "device"), ("device", "cpu"), ("device", "device")]


def tolerance(row: str, device: torch.device) -> float:
    """Largest relative difference between losses of the device and of the CPU.

    CUDA computes fp32 attention with three TF32 products per product, which round at 1e-6 to 1e-5 of a score.
    """
    if "bf16" in row:
        return 5e-3
    return 1e-5 if device.type == "cpu" else 1e-4


class Runs:
    """Rows on the CPU and on the device, each side in one process; all rows are submitted at the start."""

    def __init__(self, folder, device: torch.device) -> None:
        self.folder, self.device = folder, device
        write_shards(folder / "shards", make_learnable_pairs(), make_vocabulary())
        (folder / "config.yaml").write_text(CONFIG)
        self.runners = {"device": RowRunner(folder), "cpu": RowRunner(folder, CUDA_VISIBLE_DEVICES="")}
        self.futures = {}
        self._submit(BROKEN, ("model.heads=3",), "device")
        for row, overrides in ROWS.items():
            for side in self.runners:
                self._submit(row, overrides, side)
        for row, base in COMPILED.items():
            self._submit(row, (*ROWS[base], "train.compile=true"), "device")
        self._submit(SYNCHRONOUS, ("checkpoint.asynchronous=false",), "device")
        for row in RESUMED:
            for source, target in DIRECTIONS:
                self._submit_resumed(row, source, target)

    def _submit(self, row: str, overrides: tuple, side: str, after=None, name: str = "") -> None:
        name = name or f"{row} on {side}"
        train_device = self.device.type if side == "device" else "cpu"
        paths = [f"data.shards={self.folder / 'shards'}", f"output={self.folder / name}"]
        overrides = [*UNCOMPILED, *overrides, *paths, f"train.device={train_device}"]
        case = {"name": name, "config": str(self.folder / "config.yaml"), "overrides": overrides}
        self.futures[name] = self.runners[side].submit(case, after)

    def _submit_resumed(self, row: str, source: str, target: str) -> None:
        """Resume the run of `source` from step 10 on `target`."""
        name, saved = f"{row} from {source} to {target}", self.checkpoint(f"{row} on {source}")
        link = self.folder / name / "checkpoints" / saved.name
        link.parent.mkdir(parents=True)
        link.symlink_to(saved)
        self._submit(row, ROWS[row], target, self.futures[f"{row} on {source}"], name)

    def checkpoint(self, name: str):
        return step_folder(self.folder / name, 10)

    def steps(self, name: str) -> list[dict]:
        """Wait for a run and return its steps; AssertionError when it failed."""
        return self.futures[name].result()

    def close(self) -> None:
        for runner in self.runners.values():
            runner.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, device):
    runs = Runs(tmp_path_factory.mktemp("rows"), device)
    yield runs
    runs.close()


@pytest.mark.parametrize("row", ROWS)
def test_losses_equal_those_of_the_cpu(runs, device, row):
    found, expected = runs.steps(f"{row} on device"), runs.steps(f"{row} on cpu")
    assert relative_difference(found, expected, "loss") <= tolerance(row, device)


@pytest.mark.parametrize("row", COMPILED)
def test_compiled_layers_give_the_same_losses(runs, device, row):
    found, expected = runs.steps(f"{row} on device"), runs.steps(f"{COMPILED[row]} on cpu")
    assert relative_difference(found, expected, "loss") <= tolerance(row, device)


def test_a_failing_row_reports_its_cause_and_does_not_affect_others(runs):
    with pytest.raises(AssertionError, match=r"(?s)broken on device ended its process:.*model\.heads \(3\)"):
        runs.steps(f"{BROKEN} on device")
    assert len(runs.steps("cm3leon on device")) == 20


@pytest.mark.parametrize("row", RESUMED)
@pytest.mark.parametrize(("source", "target"), DIRECTIONS)
def test_each_device_resumes_from_a_checkpoint_of_the_other(runs, device, row, source, target):
    resumed = runs.steps(f"{row} from {source} to {target}")
    assert [step["step"] for step in resumed] == list(range(11, 21))
    limit = 1e-5 if source == target else tolerance(row, device)
    assert relative_difference(resumed, runs.steps(f"{row} on {source}"), "loss") <= limit


def test_an_asynchronous_save_contains_the_weights_of_its_step(runs):
    """A step changes weights by about 3e-4, so a copy made after the next step would differ."""
    runs.steps("cm3leon on device"), runs.steps(f"{SYNCHRONOUS} on device")
    expected = CheckpointReader(runs.checkpoint(f"{SYNCHRONOUS} on device"))
    found = CheckpointReader(runs.checkpoint("cm3leon on device"))
    assert found.names == expected.names and found.state.step == 10
    for name in expected.names:
        torch.testing.assert_close(found.read(name), expected.read(name), rtol=0, atol=2e-5)


def test_the_device_computes_correct_products(device):
    assert find_device_fault(device) == ""
