"""Measure single training steps of the megatron engine on one rank: `torchrun check_step.py`.

Prints "results " and a JSON object, which test_step.py checks.
"""

import json
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cm3leon.config.loading import Config, load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.distributed.launch import Rank, set_threads
from megatron_cm3leon.engine import optimizer
from megatron_cm3leon.engine.groups import initialize_groups
from tests.data.corpora import make_vocabulary
from tests.distributed.measure_memory import make_batches

SIZE = ["model.hidden_size=32", "model.heads=2", "data.seq_length=16", "train.precision=fp32"]
SIZE += ["train.global_batch_size=4", "train.micro_batch_size=2", "train.steps=100", "checkpoint.interval=50"]
VOCABULARY = make_vocabulary()


class CountReads(TorchDispatchMode):
    """Counts the values that are read from tensors; on a GPU each of them waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW like FusedAdam of apex and TransformerEngine: `step` belongs to the group, not to a parameter."""

    def __init__(self, params, adam_w_mode=True, **options) -> None:
        assert adam_w_mode
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["step"] = step = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                state = self.state[weight]
                for kind in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(kind, torch.zeros_like(weight))
                state["exp_avg"].lerp_(weight.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(weight.grad, weight.grad, value=1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1**step))


def build_small_engine(*overrides: str):
    """Build (engine, batches) of a small model."""
    from megatron_cm3leon.engine.megatron import MegatronEngine

    config = load_config(None, [*SIZE, *overrides])
    validate_config(config, 1)
    torch.manual_seed(0)
    return MegatronEngine(config, VOCABULARY, torch.device("cpu")), make_batches(config, VOCABULARY, 2)


def train(engine, batches, steps: range) -> list[float]:
    return [engine.train_step(batches, step, 1e-2).loss for step in steps]


def count_device_reads(layers: int) -> int:
    engine, batches = build_small_engine(f"model.layers={layers}")
    train(engine, batches, range(1))
    with CountReads() as reads:
        train(engine, batches, range(1, 2))
    return reads.count


def watch_reservation() -> dict[str, bool]:
    """Whether memory for a save is reserved after building the engine, long before a save, shortly before it."""
    engine, batches = build_small_engine("model.layers=1")
    reserved = {"built": engine.writer.reserved}
    for name, step in (("far", 0), ("near", 30)):
        train(engine, batches, range(step, step + 1))
        reserved[name] = engine.writer.reserved
    engine.writer.close()
    return reserved


def resume_with(saving: type, resuming: type, folder) -> list[float]:
    """Losses of 3 steps with one class of AdamW and of 3 more steps with another class, from the checkpoint."""
    from megatron_cm3leon.checkpoint.state import TrainState

    losses = []
    for adam, steps in ((saving, range(3)), (resuming, range(3, 6))):
        optimizer._INSTALLED = None if adam is optimizer.FusedAdamW else adam
        engine, batches = build_small_engine("model.layers=1", f"output={folder}", "checkpoint.asynchronous=false")
        assert type(engine.optimizer.optimizer) is adam, type(engine.optimizer.optimizer)
        if steps.start:
            engine.load(folder / "step-00000003")
        losses += train(engine, batches, steps)
        if not steps.start:
            engine.save(folder / "step-00000003", TrainState(step=3))
    return losses


def resume_with_dropout(version: int, folder) -> dict:
    """Seed of step 7, losses of steps 0 to 3, and losses of steps 2 and 3 resumed from the checkpoint of step 2."""
    from megatron_cm3leon.checkpoint.state import TrainState
    from megatron_cm3leon.engine.step import seed_dropout

    options = ["model.layers=1", "model.dropout=0.1", f"output={folder}", "checkpoint.asynchronous=false"]
    engine, batches = build_small_engine(*options)
    newest, engine.dropout_seeding = engine.dropout_seeding, version
    losses = train(engine, batches, range(2))
    recorded = {} if version == 1 else {"dropout_seeding": version}  # version 1 was not recorded
    state = TrainState(step=2, **recorded)
    engine.save(folder / "step-00000002", state)
    losses += train(engine, batches, range(2, 4))
    resumed_engine, _ = build_small_engine(*options)
    resumed_engine.load(folder / "step-00000002")
    resumed = train(resumed_engine, batches, range(2, 4))
    seed_dropout(1234, 7, version)
    return {"newest": newest, "seed": torch.initial_seed(), "losses": losses, "resumed": resumed}


def main() -> None:
    import tempfile
    from pathlib import Path

    rank = Rank.from_environment()
    set_threads(1, rank)
    initialize_groups(Config(), rank, torch.device("cpu"))
    torch_class, installed = optimizer.FusedAdamW, GroupStepAdamW
    results = {
        "reads": [count_device_reads(layers) for layers in (1, 3)],
        "reserved": watch_reservation(),
        "losses": {},
    }
    for name, pair in {
        "torch": (torch_class, torch_class),
        "installed to torch": (installed, torch_class),
        "torch to installed": (torch_class, installed),
    }.items():
        with tempfile.TemporaryDirectory() as folder:
            results["losses"][name] = resume_with(*pair, Path(folder) / "checkpoints")
    optimizer._INSTALLED = None
    for version in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            results[f"dropout {version}"] = resume_with_dropout(version, Path(folder) / "checkpoints")
    optimizer._INSTALLED = GroupStepAdamW
    results["classes"] = SimpleNamespace(
        auto=type(build_small_engine("model.layers=1")[0].optimizer.optimizer).__name__,
        torch=type(build_small_engine("model.layers=1", "train.kernels=torch")[0].optimizer.optimizer).__name__,
    ).__dict__
    print("results " + json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
