"""From a checkpoint of any layout and either engine, and back into any: the same bits, and training that goes on."""

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
ALONE = [
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.sequence=false",
    "parallel.zero=0",
    "train.engine=megatron",
]
LAYOUTS = {
    "alone": (1, []),
    "tensor-pipeline": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    "zero": (2, ["parallel.zero=1"]),
    "deepspeed": (2, ["train.engine=deepspeed", "parallel.zero=1"]),
    "deepspeed-tensor": (2, ["train.engine=deepspeed", "parallel.tensor=2"]),
}


def train(folder, layout, config, output, stop_after):
    ranks, overrides = LAYOUTS[layout]
    overrides = [f"output={output}", f"train.stop_after={stop_after}", *ALONE, *overrides]
    name = f"{output.name}-{stop_after}"
    return run_cases(folder, ranks, [{"name": name, "config": str(config), "overrides": overrides}])[name]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["tensor-pipeline", "deepspeed"])
@pytest.mark.parametrize(
    "overrides", [[], ["model.family=llama", "model.qk_norm=true", "model.kv_heads=2"]], ids=["cm3leon", "llama"]
)
def test_there_and_back_under_every_layout(tmp_path, tokenizer, shards, source, overrides):
    config = family_config(f"data.shards={shards}", *SETTINGS, *overrides)
    save_config(config, tmp_path / "start.yaml")
    train(tmp_path, source, tmp_path / "start.yaml", tmp_path / "run", 2)
    checkpoint = tmp_path / "run/checkpoints/step-00000002"
    export_checkpoint(checkpoint, tokenizer, tmp_path / "export")
    folder, _ = import_export(tmp_path / "export", tmp_path / "back")
    before, after = CheckpointReader(checkpoint), CheckpointReader(folder)
    assert before.names == after.names and after.state == before.state
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names)
    assert before.has(before.names[0], "exp_avg") and not after.has(before.names[0], "exp_avg")

    steps = {}
    for layout in LAYOUTS:
        output = shutil.copytree(tmp_path / "back", tmp_path / layout)
        steps[layout] = train(tmp_path, layout, output / "config.yaml", output, 4)
    for layout, found in steps.items():
        assert [step["step"] for step in found] == [3, 4], layout
        for one, other in zip(found, steps["alone"], strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-6), layout
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5), layout
