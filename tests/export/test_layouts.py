"""Export and import of checkpoints of any layout and either engine: the same bits, and training continues."""

import shutil

import pytest
import torch

from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.config.loading import save_config
from megatron_cm3leon.export import export_checkpoint, import_export
from tests.checkpoint.builders import family_config
from tests.distributed.launch import run_cases

SETTINGS = ["train.global_batch_size=4", "train.precision=fp32", "train.device=cpu", "train.steps=5", "data.workers=0"]
SETTINGS += [
    "data.packing=stream",
    "data.image_first_probability=0",
    "schedule.warmup_steps=2",
    "checkpoint.interval=2",
]
SINGLE_RANK = [
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.sequence=false",
    "parallel.zero=0",
    "train.engine=megatron",
]
LAYOUTS = {
    "single": (1, []),
    "tensor-pipeline": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    "zero": (2, ["parallel.zero=1"]),
    "deepspeed": (2, ["train.engine=deepspeed", "parallel.zero=1"]),
    "deepspeed-tensor": (2, ["train.engine=deepspeed", "parallel.tensor=2"]),
}
FAMILIES = {"cm3leon": [], "llama": ["model.family=llama", "model.qk_norm=true", "model.kv_heads=2"]}
SOURCES = [(family, layout) for family in FAMILIES for layout in ("tensor-pipeline", "deepspeed")]


def train(folder, runs):
    """Train each (layout, config, output, stop_after) of `runs`, one launch per number of ranks; output -> steps."""
    cases = {}
    for layout, config, output, stop_after in runs:
        ranks, overrides = LAYOUTS[layout]
        overrides = [f"output={output}", f"train.stop_after={stop_after}", *SINGLE_RANK, *overrides]
        name = "-".join(output.relative_to(folder).parts)
        cases.setdefault(ranks, []).append({"name": name, "config": str(config), "overrides": overrides})
    found = {}
    for ranks, cases_of_ranks in cases.items():
        found |= run_cases(folder, ranks, cases_of_ranks)
    return {output: found["-".join(output.relative_to(folder).parts)] for *_, output, _ in runs}


@pytest.fixture(scope="module")
def continued(tmp_path_factory, tokenizer, shards):
    """(folder, steps of each source's import under every layout): trained, exported, imported, trained further."""
    folder = tmp_path_factory.mktemp("export-and-import")
    first, second = [], []
    for family, layout in SOURCES:
        start = folder / f"{family}-{layout}"
        start.mkdir()
        save_config(family_config(f"data.shards={shards}", *SETTINGS, *FAMILIES[family]), start / "start.yaml")
        first.append((layout, start / "start.yaml", start / "run", 2))
    train(folder, first)
    for *_, run, _ in first:
        export_checkpoint(run / "checkpoints/step-00000002", tokenizer, run.parent / "export")
        import_export(run.parent / "export", run.parent / "back")
        for layout in LAYOUTS:
            output = shutil.copytree(run.parent / "back", run.parent / layout)
            second.append((layout, output / "config.yaml", output, 4))
    return folder, train(folder, second)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "source"), SOURCES)
def test_export_and_import_under_every_layout(continued, family, source):
    folder, steps = continued[0] / f"{family}-{source}", continued[1]
    checkpoint = folder / "run/checkpoints/step-00000002"
    before, after = CheckpointReader(checkpoint), CheckpointReader(folder / "back/checkpoints/step-00000002")
    assert before.names == after.names and after.state == before.state
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names)
    assert before.has(before.names[0], "exp_avg") and not after.has(before.names[0], "exp_avg")

    for layout in LAYOUTS:
        found = steps[folder / layout]
        assert [step["step"] for step in found] == [3, 4], layout
        for one, other in zip(found, steps[folder / "single"], strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-6), layout
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5), layout
