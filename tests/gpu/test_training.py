"""On a CUDA device: the losses of the CPU, and checkpoints that either resumes. Needs one GPU: pytest -m gpu."""

import pytest
import torch

from tests.data.corpora import make_vocabulary, write_shards
from tests.distributed.launch import run_cases
from tests.distributed.layouts import BF16, CONFIG, DEEPSPEED, LLAMA, SAMPLES, SMALL, learnable_pairs, relative

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
DEVICE = "cuda"
ROWS = {  # name -> overrides, largest relative difference of a loss from the CPU's
    "cm3leon": ((), 1e-5),
    "llama": (LLAMA, 1e-5),
    "by sample": (SAMPLES, 1e-5),
    "llama by sample": (LLAMA + SAMPLES, 1e-5),
    "zero=1 recompute=full": (("parallel.zero=1", "parallel.recompute=full"), 1e-5),
    "recompute=selective": (("parallel.recompute=selective",), 1e-5),
    "bf16": (BF16, 5e-3),
    "llama bf16": (LLAMA + BF16, 5e-3),
    "deepspeed zero=2": ((*DEEPSPEED, "parallel.zero=2", *SMALL), 1e-5),
    "deepspeed zero=3 bf16": ((*DEEPSPEED, "parallel.zero=3", *BF16, *SMALL), 5e-3),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Steps of every row on both devices, and of runs that go on from step 10 of the other's."""
    folder = tmp_path_factory.mktemp("cuda")
    write_shards(folder / "shards", learnable_pairs(), make_vocabulary())
    (folder / "config.yaml").write_text(CONFIG)

    def case(name: str, overrides: tuple, device: str) -> dict:
        paths = [f"data.shards={folder / 'shards'}", f"output={folder / name}", f"train.device={device}"]
        return {"name": name, "config": str(folder / "config.yaml"), "overrides": [*overrides, *paths]}

    steps = {}
    for device in ("cpu", DEVICE):
        steps |= run_cases(folder, 1, [case(f"{name} on {device}", row[0], device) for name, row in ROWS.items()])
    for source, target in (("cpu", DEVICE), (DEVICE, "cpu")):
        cases = []
        for name in ("cm3leon", "deepspeed zero=2"):
            saved = folder / f"{name} on {source}" / "checkpoints" / "step-00000010"
            resumed = folder / f"{name} from {source}"
            (resumed / "checkpoints").mkdir(parents=True)
            (resumed / "checkpoints" / saved.name).symlink_to(saved)
            cases.append(case(resumed.name, ROWS[name][0], target))
        steps |= run_cases(folder, 1, cases)
    return steps


@pytest.mark.parametrize("row", ROWS)
def test_same_losses_as_on_the_cpu(runs, row):
    assert relative(runs[f"{row} on {DEVICE}"], runs[f"{row} on cpu"], "loss") <= ROWS[row][1]


@pytest.mark.parametrize("row", ["cm3leon", "deepspeed zero=2"])
@pytest.mark.parametrize("source", ["cpu", DEVICE])
def test_either_device_resumes_the_others_checkpoint(runs, row, source):
    resumed = runs[f"{row} from {source}"]
    assert [step["step"] for step in resumed] == list(range(11, 21))
    assert relative(resumed, runs[f"{row} on {source}"], "loss") <= 1e-5
