"""Runs several layouts in one launch: `worker.py CASES.json RANKS`.

Each case is {"name", "config" (YAML), "overrides"}; rank 0 writes NAME.json with the losses and gradient norms of all
steps to the folder of CASES.json. Importing the libraries takes longer than most cases, so the launch imports them
once, and the ranks of each case are forked from it. They end with their case: a process that ran many cases would keep
thousands of gloo's threads, because cycles of autograd nodes keep the engines of earlier cases, and their groups.

With "save_start" the initial weights are also saved. With "corrupt" (a step) that step first gets a batch whose loss
weights are infinite on the last data-parallel rank only: no rank may step, and the run must continue as if that batch
had not existed.
With "validate" the losses of validation before the first step are added to the record of that step.
With "masks" the dropout masks of each rank are written to NAME-RANK.npz (masks.py).
With "roll_back" ([from, to]) the checkpoint of step `to` is loaded once, at step `from`, and training continues there.
"""

import ctypes
import importlib
import json
import math
import os
import signal
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_cm3leon.checkpoint.format import step_folder
from megatron_cm3leon.config.loading import Config, load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.data.stream.loader import Loader, MicroBatch
from megatron_cm3leon.data.stream.stream import Stream, build_stream
from megatron_cm3leon.distributed.launch import Rank, choose_device, set_threads
from megatron_cm3leon.engine.base import Engine
from megatron_cm3leon.engine.groups import initialize_groups
from megatron_cm3leon.training.loop import advance
from megatron_cm3leon.training.lr_schedule import learning_rate
from megatron_cm3leon.training.setup import build_loader, open_run
from megatron_cm3leon.training.validation import Validation
from tests.distributed import masks
from tests.distributed.launch import find_free_ports
from tests.flex_on_cpu import flex_on_cpu

PR_SET_PDEATHSIG = 1
"""Of <sys/prctl.h>: the rank is killed when the process that forked it ends."""


def corrupt(micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    """Copy with infinite loss weights in the first micro-batch, so that its loss and its gradients are NaN."""
    first, *others = micro_batches
    return [replace(first, loss_weights=torch.full_like(first.loss_weights, torch.inf)), *others]


def roll_back(step: int, config: Config, stream: Stream, engine: Engine, record: list[dict], loader: Loader) -> tuple:
    """Load the checkpoint of `step` into the engine; returns state, record and loader of that step."""
    while not engine.poll():
        time.sleep(0.01)
    dist.barrier()
    state = engine.load(step_folder(Path(config.output), step))
    loader.close()
    return state, record[:step], build_loader(config, stream, engine, state)


def save_masks(recorder: masks.MaskRecorder, path: Path) -> None:
    """Write the masks of this rank, with its coordinates."""
    from megatron.core import parallel_state

    coordinates = {
        "data": parallel_state.get_data_parallel_rank(),
        "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
        "context": parallel_state.get_context_parallel_rank(),
        "tensor": parallel_state.get_tensor_model_parallel_rank(),
    }
    recorder.save(path, coordinates)


def run_case(case: dict, rank: Rank, folder: Path) -> None:
    """Train one case, save and resume as it says, and write its losses and gradient norms."""
    config = load_config(case["config"], case["overrides"])
    validate_config(config, rank.world_size)
    device = choose_device(config.train.device, rank)
    initialize_groups(config, rank, device)

    stream = build_stream(config)
    engine, state, _ = open_run(config, stream, device, [])
    if case.get("save_start"):
        engine.save(step_folder(Path(config.output), 0), state)
    loader = build_loader(config, stream, engine, state)
    record, recorder = [], nullcontext()
    validated = Validation(config, stream.vocabulary).run(engine) if case.get("validate") else {}
    if case.get("masks"):
        recorder = masks.MaskRecorder(getattr(engine, "model", None) or [engine.engine])
    while state.step < (config.train.stop_after or config.train.steps):
        batch, micro_batches = next(loader)
        if state.step == case.get("corrupt"):
            corrupted = corrupt(micro_batches) if engine.data_rank == engine.data_size - 1 else micro_batches
            metrics = engine.train_step(corrupted, state.step, learning_rate(config, state.step))
            assert not metrics.stepped and not math.isfinite(metrics.loss), (case["name"], metrics)
        with recorder if state.step < masks.STEPS else nullcontext():
            metrics = engine.train_step(micro_batches, state.step, learning_rate(config, state.step))
        assert metrics.stepped, (case["name"], state.step, metrics)
        assert batch == state.batch, (case["name"], batch, state.batch)
        advance(state, metrics, config)
        record.append({"step": state.step, "loss": metrics.loss, "grad_norm": metrics.grad_norm, **validated})
        validated = {}
        if state.step % config.checkpoint.interval == 0:
            engine.save(step_folder(Path(config.output), state.step), state)
        if state.step == case.get("roll_back", [None])[0]:
            state, record, loader = roll_back(case.pop("roll_back")[1], config, stream, engine, record, loader)
    loader.close()
    while not engine.poll():
        time.sleep(0.01)
    if case.get("masks"):
        save_masks(recorder, folder / f"{case['name']}-{rank.rank}.npz")
    if rank.rank == 0:
        (folder / f"{case['name']}.json").write_text(json.dumps(record))
    dist.barrier()


def run_rank(case: dict, rank: int, ranks: int, port: int, folder: Path) -> int:
    """Run a case as one of its ranks; returns the exit status."""
    variables = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        this_rank = Rank.from_environment()
        set_threads(1, this_rank)
        flex = "train.sample_attention=flex" in case["overrides"] and not torch.cuda.is_available()
        with flex_on_cpu() if flex else nullcontext():
            run_case(case, this_rank, folder)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run_ranks(case: dict, ranks: int, folder: Path) -> bool:
    """Fork the ranks of a case and wait for them; when one fails, the others are killed. Whether all succeeded."""
    [port], children = find_free_ports(1), set()
    for rank in range(ranks):
        child = os.fork()
        if not child:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            status = run_rank(case, rank, ranks, port, folder)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        children.add(child)
    succeeded = True
    while children:
        child, status = os.wait()
        children.discard(child)
        if status and succeeded:
            succeeded = False
            for other in children:
                os.kill(other, signal.SIGKILL)
    return succeeded


def main() -> int:
    path, ranks = Path(sys.argv[1]), int(sys.argv[2])
    cases = json.loads(path.read_text())
    modules = ["megatron_cm3leon.engine.megatron"]
    if any("train.engine=deepspeed" in case["overrides"] for case in cases):
        modules += ["deepspeed", "megatron_cm3leon.engine.deepspeed"]
    for name in modules:
        importlib.import_module(name)
    for case in cases:
        if not run_ranks(case, ranks, path.parent):
            print(f"case {case['name']!r} failed", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
