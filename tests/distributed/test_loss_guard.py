"""A non-finite loss on one rank: no rank steps, and the run continues as if the batch had not existed.

Rollback after a spike: an engine that has trained further loads a checkpoint and repeats the same steps.
"""

import pytest

from tests.data.corpora import make_vocabulary, write_shards
from tests.distributed.launch import run_cases
from tests.distributed.layout_rows import CONFIG
from tests.distributed.layouts import make_learnable_pairs

ENGINES = {
    "megatron": [],
    "megatron zero=1 bf16": ["parallel.zero=1", "train.precision=bf16"],
    "deepspeed zero=0": ["train.engine=deepspeed"],
    "deepspeed zero=0 bf16": ["train.engine=deepspeed", "train.precision=bf16"],
    "deepspeed zero=1": ["train.engine=deepspeed", "parallel.zero=1"],
    "deepspeed zero=1 bf16": ["train.engine=deepspeed", "parallel.zero=1", "train.precision=bf16"],
    "deepspeed zero=2 bf16": ["train.engine=deepspeed", "parallel.zero=2", "train.precision=bf16"],
    "deepspeed zero=2 offload": ["train.engine=deepspeed", "parallel.zero=2", "deepspeed.offload_optimizer=true"],
    "deepspeed zero=3": ["train.engine=deepspeed", "parallel.zero=3"],
    "deepspeed zero=3 bf16": ["train.engine=deepspeed", "parallel.zero=3", "train.precision=bf16"],
    "deepspeed zero=3 offload": ["train.engine=deepspeed", "parallel.zero=3", "deepspeed.offload_optimizer=true"],
    "megatron zero=1": ["parallel.zero=1"],
    "megatron tensor=2": ["parallel.tensor=2"],
    "megatron pipeline=2": ["parallel.pipeline=2"],
    "deepspeed tensor=2": ["train.engine=deepspeed", "parallel.tensor=2"],
    "deepspeed tensor=2 bf16": ["train.engine=deepspeed", "parallel.tensor=2", "train.precision=bf16"],
}
DEFAULT_SUITE = ("megatron", "deepspeed zero=2 bf16", "deepspeed zero=3")


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Steps of each engine that the tests of this session need, with and without a corrupted batch."""
    folder = tmp_path_factory.mktemp("loss_guard")
    write_shards(folder / "shards", make_learnable_pairs(), make_vocabulary())
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    requested = {item.callspec.params.get("engine") for item in request.session.items if hasattr(item, "callspec")}
    cases = []
    for name in [name for name in ENGINES if name in requested]:
        for kind, more in (("clean", {}), ("corrupted", {"corrupt": 2}), ("rolled back", {"roll_back": [3, 1]})):
            paths = [f"data.shards={folder / 'shards'}", f"output={folder / name / kind}", "train.steps=4"]
            overrides = [*ENGINES[name], *paths, "schedule.warmup_steps=0", "checkpoint.interval=1"]
            cases.append({"name": f"{name} {kind}", "config": str(config), "overrides": overrides, **more})
    return run_cases(folder, 2, cases)


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=() if name in DEFAULT_SUITE else pytest.mark.slow) for name in ENGINES]
)
def test_no_rank_steps_when_the_loss_of_one_rank_is_not_finite(runs, engine):
    assert len(runs[f"{engine} clean"]) == 4
    assert runs[f"{engine} corrupted"] == runs[f"{engine} clean"]


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=() if name in DEFAULT_SUITE else pytest.mark.slow) for name in ENGINES]
)
def test_an_engine_that_rolled_back_repeats_its_steps(runs, engine):
    assert runs[f"{engine} rolled back"] == runs[f"{engine} clean"]
