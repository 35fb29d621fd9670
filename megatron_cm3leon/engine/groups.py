"""Process groups: where this rank stands in the layout, and on which device it works."""

import warnings
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.distributed.launch import TIMEOUT, Rank, rendezvous

if TYPE_CHECKING:
    pass


# megatron-core announces each optional package it does without; none is required here.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
# It also calls collectives by names that torch 2.13 renames.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


def initialize_groups(
    config: Config, rank: Rank, device: torch.device, store: dist.Store | None = None, longest: timedelta = TIMEOUT
) -> None:
    """Create torch's default group and megatron-core's groups for the layout of `config`.

    `store`: where the ranks met, if they have. A collective may take 30 minutes, or `longest` if that is longer.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        from megatron_cm3leon.engine import cpu_backend

        cpu_backend.install()
    from megatron.core import parallel_state, tensor_parallel

    if not dist.is_initialized():
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            rank=rank.rank,
            world_size=rank.world_size,
            store=store or rendezvous(rank),
            timeout=max(TIMEOUT, longest),
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        virtual_pipeline_model_parallel_size=config.parallel.interleave if config.parallel.interleave > 1 else None,
        context_parallel_size=config.parallel.context,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed)


def destroy_groups() -> None:
    """End every process group: without it gloo sometimes aborts at interpreter exit."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
