"""Compare the estimated memory of a rank with the peak of two steps: `torchrun measure_memory.py OVERRIDES`."""

import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.data.stream.loader import MicroBatch
from megatron_cm3leon.distributed.launch import Rank, set_threads
from megatron_cm3leon.engine.groups import destroy_groups, initialize_groups
from megatron_cm3leon.model.memory import estimate_memory, locate_rank
from tests.data.corpora import make_vocabulary


def read_resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class PeakMemoryWatch(threading.Thread):
    """Reads the resident memory every 2 ms and keeps its maximum."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.stopped = 0, False

    def run(self) -> None:
        while not self.stopped:
            self.peak = max(self.peak, read_resident_bytes())
            time.sleep(0.002)


def load_libraries() -> None:
    """Use kernels and torch's optimizer once, because the first use loads code and tables."""
    layer = torch.nn.Linear(512, 512)
    layer(torch.randn(64, 512)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()
    states = [torch.randn(1, 2, 64, 32, requires_grad=True) for _ in range(3)]
    F.scaled_dot_product_attention(*states, is_causal=True).sum().backward()


def make_batches(config, vocabulary, count: int) -> list[MicroBatch]:
    size, length = config.train.micro_batch_size, config.data.seq_length
    batches = []
    for _ in range(count):
        tokens = torch.randint(0, vocabulary.size, (size, length + 1))
        positions = torch.arange(length).repeat(size, 1)
        batches.append(MicroBatch(tokens[:, :-1], tokens[:, 1:], torch.ones(size, length), positions, None, 0))
    return batches


def main() -> None:
    # The plan does not include the copy of the weights for a save, which is allocated when training starts.
    overrides = [*sys.argv[1:], "checkpoint.asynchronous=false"]
    config, rank = load_config(None, overrides), Rank.from_environment()
    validate_config(config, rank.world_size)
    set_threads(1, rank)
    initialize_groups(config, rank, torch.device("cpu"))
    from megatron.core import parallel_state

    from megatron_cm3leon.engine.megatron import MegatronEngine

    coordinates = locate_rank(config, rank.world_size, rank.rank)
    assert coordinates.tensor == parallel_state.get_tensor_model_parallel_rank()
    assert coordinates.context == parallel_state.get_context_parallel_rank()
    assert coordinates.data == parallel_state.get_data_parallel_rank()
    assert coordinates.pipeline == parallel_state.get_pipeline_model_parallel_rank()
    vocabulary = make_vocabulary(text=3000, image=1000, height=4, width=4)
    sequences = config.train.micro_batch_size * config.data_parallel_size(rank.world_size)
    batches = make_batches(config, vocabulary, config.train.global_batch_size // sequences)
    load_libraries()
    before = read_resident_bytes()
    engine = MegatronEngine(config, vocabulary, torch.device("cpu"))
    watch = PeakMemoryWatch()
    watch.start()
    for step in range(2):
        engine.train_step(batches, step, 1e-4)
    watch.stopped = True
    watch.join()
    planned = estimate_memory(config, vocabulary.size, rank.world_size, coordinates.pipeline)
    local = sum(parameter.numel() for parameter, _ in engine.placements)
    assert local == planned.parameters, (local, planned.parameters)
    print(f"rank {rank.rank}: planned/measured {planned.total / (watch.peak - before):.3f}")
    destroy_groups()


if __name__ == "__main__":
    main()
