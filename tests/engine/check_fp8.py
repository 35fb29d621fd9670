"""Compare weights converted to fp8 once per step with weights converted at every use; `torchrun check_fp8.py CASE ...`.

Both runs of a case take two steps with an evaluation after each, save, take one more step, load the checkpoint, repeat
that step and take another one. Prints "results " and a JSON object: case, kept or not -> losses as hexadecimal numbers,
a hash of this rank's weights, the number of conversions of weights, and the number of matrices.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch

from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.distributed.launch import Rank, set_threads
from megatron_cm3leon.engine import compile as engine_compile
from megatron_cm3leon.engine import megatron
from megatron_cm3leon.engine.groups import initialize_groups
from megatron_cm3leon.model import linear
from tests.data.corpora import make_vocabulary
from tests.distributed.measure_memory import make_batches

SIZE = ["model.layers=2", "model.hidden_size=32", "model.heads=4", "data.seq_length=16", "train.global_batch_size=4"]
SIZE += ["train.micro_batch_size=1", "train.precision=bf16", "train.fp8=true", "checkpoint.asynchronous=false"]
CASES = {  # name -> overrides; the number of ranks is that of the launch
    "plain": [],
    "llama": ["model.family=llama", "parallel.recompute=selective"],
    "recompute": ["parallel.recompute=full"],
    "compiled": ["train.compile=true"],
    "compiled recompute": ["train.compile=true", "parallel.recompute=full"],
    "tensor": ["parallel.tensor=2"],
    "sequence compiled": ["parallel.tensor=2", "parallel.sequence=true", "train.compile=true"],
    "interleaved": ["parallel.pipeline=2", "parallel.interleave=2", "model.layers=4"],
    "zero=1": ["parallel.zero=1"],
    "zero=1 compiled": ["parallel.zero=1", "train.compile=true"],
    "deepspeed": ["train.engine=deepspeed", "parallel.zero=2"],
    "deepspeed zero=3": ["train.engine=deepspeed", "parallel.zero=3"],
}


def build_engine(config):
    if config.train.engine == "deepspeed":
        from megatron_cm3leon.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, make_vocabulary(), torch.device("cpu"))
    return megatron.MegatronEngine(config, make_vocabulary(), torch.device("cpu"))


def run(overrides: list[str], rank: Rank, keeps_weights: bool, folder: Path) -> dict:
    from megatron.core import parallel_state

    config = load_config(None, [*SIZE, *overrides])
    validate_config(config, rank.world_size)
    initialize_groups(config, rank, torch.device("cpu"))
    engine = build_engine(config)
    matrices = len(engine.converted)
    if not keeps_weights:
        for layer in engine.converted:
            layer.keeps_weight = False
    torch.manual_seed(rank.rank if config.data_parallel_size(rank.world_size) > 1 else 0)
    batches = make_batches(config, make_vocabulary(), 4 // config.data_parallel_size(rank.world_size))
    losses, conversions = [], 0
    original = linear.OwnForward.convert_weight

    def convert_and_count(layer):
        nonlocal conversions
        before = layer.is_current
        original(layer)
        conversions += layer.is_current and not before

    linear.OwnForward.convert_weight = convert_and_count
    for step in (0, 1, 2, 2, 3):
        if len(losses) == 4:
            engine.save(folder, TrainState(step=2))
        if len(losses) == 6:  # repeat the step from the checkpoint
            engine.load(folder)
        losses += [engine.train_step(batches, step, 1e-2).loss, engine.eval_step(batches).loss]
    linear.OwnForward.convert_weight = original
    weights = hashlib.sha256()
    if config.parallel.zero < 3:
        for parameter, _ in engine.placements:
            weights.update(parameter.detach().float().numpy().tobytes())
    parallel_state.destroy_model_parallel()
    found = {"losses": [loss.hex() for loss in losses], "weights": weights.hexdigest()}
    return found | {"conversions": conversions, "matrices": matrices}


def main() -> None:
    rank = Rank.from_environment()
    set_threads(1, rank)
    engine_compile.BACKEND = "aot_eager"
    settings, results = megatron.DistributedDataParallelConfig, {}
    # Small buckets: gradients and weights are exchanged in many parts.
    megatron.DistributedDataParallelConfig = lambda **options: settings(bucket_size=3000, **options)
    with tempfile.TemporaryDirectory() as temporary:
        for case in sys.argv[2:]:
            for keeps_weights in (True, False):
                folder = Path(sys.argv[1] or temporary) / f"{case.replace(' ', '-')}-{keeps_weights}"
                results[f"{case} {keeps_weights}"] = run(CASES[case], rank, keeps_weights, folder)
    if rank.rank == 0:
        print("results " + json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
