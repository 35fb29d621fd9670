"""Every layout is the same run: initial weights, 20 losses, and a checkpoint that any layout resumes."""

import numpy as np
import pytest
import torch

from megatron_cm3leon.checkpoint.sharded import CheckpointReader, step_folder
from tests.data.corpora import make_vocabulary, write_shards
from tests.distributed.launch import run_cases

CONFIG = """
model: {layers: 4, hidden_size: 64, heads: 4, init_std: 0.02}
data: {seq_length: 48, packing: stream, workers: 0}
train: {steps: 20, global_batch_size: 8, micro_batch_size: 2, precision: fp32}
optimizer: {learning_rate: 6e-4}
schedule: {warmup_steps: 20}
checkpoint: {interval: 10}
"""
LAYOUTS = {
    "one process": (1, []),
    "tensor 2": (2, ["parallel.tensor=2"]),
    "pipeline 2": (2, ["parallel.pipeline=2"]),
    "data 2, ZeRO-1": (2, ["parallel.zero=1"]),
    "data 2, micro-batches of 1": (2, ["train.micro_batch_size=1"]),
    "tensor 2 x pipeline 2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
}
RESUMES = {  # name -> (saved under, ranks, overrides of the resuming run)
    "one process again": ("one process", 1, []),
    "tensor 2 x pipeline 2 -> data 2, ZeRO-1": ("tensor 2 x pipeline 2", 2, ["parallel.zero=1"]),
    "data 2, ZeRO-1 -> tensor 2": ("data 2, ZeRO-1", 2, ["parallel.tensor=2"]),
    "data 2, ZeRO-1 again": ("data 2, ZeRO-1", 2, ["parallel.zero=1"]),
    "tensor 2 -> pipeline 2, ZeRO-1": ("tensor 2", 2, ["parallel.pipeline=2", "parallel.zero=1"]),
}


def learnable_pairs(count: int = 64) -> list[np.ndarray]:
    """Pairs whose picture follows from their text, so that there is something to learn."""
    vocabulary, random = make_vocabulary(), np.random.default_rng(0)
    pairs = []
    for _ in range(count):
        text = random.integers(0, vocabulary.text_size, random.integers(3, 9))
        codes = (np.arange(vocabulary.image_tokens) * (text[0] % 5 + 1) + text[1]) % vocabulary.image_size
        pairs.append(np.concatenate([text, [vocabulary.break_id], vocabulary.image_start + codes]))
    return pairs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Steps of every layout and of every resumed run, and the folder they lie in."""
    folder = tmp_path_factory.mktemp("layouts")
    shards = folder / "shards"
    write_shards(shards, learnable_pairs(), make_vocabulary())
    config = folder / "config.yaml"
    config.write_text(CONFIG)

    def case(name: str, overrides: list[str], **more) -> dict:
        paths = [f"data.shards={shards}", f"output={folder / name.replace(' ', '_')}"]
        return {"name": name, "config": str(config), "overrides": overrides + paths, **more}

    steps = {}
    for ranks in (1, 2, 4):
        cases = [case(name, more, save_start=True) for name, (count, more) in LAYOUTS.items() if count == ranks]
        steps |= run_cases(folder, ranks, cases)
    for name, (source, _, _) in RESUMES.items():
        target = folder / name.replace(" ", "_") / "checkpoints"
        target.mkdir(parents=True)
        (target / "step-00000010").symlink_to(step_folder(folder / source.replace(" ", "_"), 10))
    for ranks in (1, 2):
        cases = [case(name, more) for name, (_, count, more) in RESUMES.items() if count == ranks]
        steps |= run_cases(folder, ranks, cases)
    return folder, steps


def relative(found: list[dict], expected: list[dict], field: str) -> float:
    """Largest relative difference over the steps of `found`."""
    by_step = {step["step"]: step for step in expected}
    return max(abs(step[field] / by_step[step["step"]][field] - 1) for step in found)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one process"])
def test_same_losses_as_one_process(runs, layout):
    _, steps = runs
    assert [step["step"] for step in steps[layout]] == list(range(1, 21))
    assert relative(steps[layout], steps["one process"], "loss") <= 1e-6
    assert relative(steps[layout], steps["one process"], "grad_norm") <= 1e-5


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one process"])
def test_same_initial_weights_as_one_process(runs, layout):
    folder, _ = runs
    expected = CheckpointReader(step_folder(folder / "one_process", 0))
    found = CheckpointReader(step_folder(folder / layout.replace(" ", "_"), 0))
    assert found.names == expected.names
    for name in expected.names:
        assert torch.equal(found.read(name), expected.read(name)), name


@pytest.mark.parametrize("resumed", RESUMES)
def test_resumes_under_any_layout(runs, resumed):
    _, steps = runs
    assert [step["step"] for step in steps[resumed]] == list(range(11, 21))
    assert relative(steps[resumed], steps["one process"], "loss") <= 1e-6


@pytest.mark.parametrize("resumed", [name for name in RESUMES if name.endswith("again")])
def test_resumes_bit_for_bit_under_the_same_layout(runs, resumed):
    _, steps = runs
    source = RESUMES[resumed][0]
    assert steps[resumed] == steps[source][10:]


def test_the_loss_falls(runs):
    _, steps = runs
    losses = [step["loss"] for step in steps["one process"]]
    assert losses[-1] < losses[0] - 0.05
