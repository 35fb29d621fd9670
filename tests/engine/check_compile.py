"""Compiled layers: graphs and graph breaks counted by dynamo, and losses; `torchrun check_compile.py CASE ...`.

Layers are traced and differentiated as in a run, but executed without the code generator, which takes seconds and does
not affect graphs. Prints "results " and a JSON object: case -> graphs, breaks, losses, and the loss of an evaluation
after them.
"""

import functools
import json
import sys

import torch
import torch._dynamo

from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.distributed.launch import Rank, set_threads
from megatron_cm3leon.engine import compile as engine_compile
from megatron_cm3leon.engine.groups import initialize_groups
from tests.data.corpora import make_vocabulary
from tests.distributed.measure_memory import make_batches

SIZE = ["model.layers=3", "model.hidden_size=32", "model.heads=4", "data.seq_length=16", "train.precision=fp32"]
SIZE += ["train.global_batch_size=4", "train.micro_batch_size=1"]
LLAMA = ["model.family=llama", "model.kv_heads=2", "model.qk_norm=true"]
CASES = {  # name -> overrides
    "llama": LLAMA,
    "recompute=selective": ["parallel.recompute=selective"],
    "recompute=full": ["parallel.recompute=full"],
    "dropout": ["model.dropout=0.1"],
    "fp8": ["train.precision=bf16", "train.fp8=true"],
    "zero=1": ["parallel.zero=1"],
}


def run(overrides: list[str], rank: Rank, bucket_size: int) -> dict:
    """Train 3 steps; `bucket_size`: elements per bucket of the exchange of gradients and weights, 0 for the default."""
    from megatron.core import parallel_state

    from megatron_cm3leon.engine import megatron

    config = load_config(None, [*SIZE, *overrides])
    validate_config(config, rank.world_size)
    initialize_groups(config, rank, torch.device("cpu"))
    ddp_config = megatron.DistributedDataParallelConfig
    if bucket_size:
        megatron.DistributedDataParallelConfig = functools.partial(ddp_config, bucket_size=bucket_size)
    engine = megatron.MegatronEngine(config, make_vocabulary(), torch.device("cpu"))
    megatron.DistributedDataParallelConfig = ddp_config
    torch._dynamo.utils.counters.clear()  # do not count the graphs of try_compiler
    torch.manual_seed(rank.rank)
    batches = make_batches(config, make_vocabulary(), 4 // rank.world_size)
    losses = [engine.train_step(batches, step, 1e-2).loss for step in range(3)]
    counters = torch._dynamo.utils.counters
    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    evaluated = engine.eval_step(batches).loss
    parallel_state.destroy_model_parallel()
    return {"graphs": graphs, "breaks": breaks, "losses": losses, "evaluated": evaluated}


def main() -> None:
    rank = Rank.from_environment()
    set_threads(1, rank)
    engine_compile.BACKEND = "aot_eager"
    results = {}
    for case in sys.argv[1:]:
        for compiled in ("false", "true"):
            overrides = [*CASES[case], f"train.compile={compiled}"]
            results[f"{case} {compiled}"] = run(overrides, rank, bucket_size=3000 if case == "zero=1" else 0)
    if rank.rank == 0:
        print("results " + json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
