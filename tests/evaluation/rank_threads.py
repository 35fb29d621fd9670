"""Ranks of an evaluation as threads of one process: sharing and resuming need no processes."""

from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from megatron_cm3leon.distributed.launch import Rank
from megatron_cm3leon.evaluation.ranks import Ranks


def run_ranks(count, work):
    """What `work(ranks)` returns on each of `count` ranks. An error must be raised on all of them: they wait."""
    store = dist.HashStore()
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work, Ranks(Rank(rank, count, rank, count), store)) for rank in range(count)]
        return [future.result() for future in futures]
