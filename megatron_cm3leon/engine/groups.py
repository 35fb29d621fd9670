"""Process groups of a layout: torch's default group and megatron-core's tensor, pipeline, context, data groups."""

import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.distributed.launch import TIMEOUT, Rank, rendezvous


def ignore_library_warnings() -> None:
    """Hide warnings that a user of this package cannot act on; commands that train call it first."""
    # megatron-core warns about each optional package that is not installed; none is required here.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    # It calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


def initialize_groups(
    config: Config, rank: Rank, device: torch.device, store: dist.Store | None = None, timeout: timedelta = TIMEOUT
) -> None:
    """Create torch's default group and megatron-core's groups for the layout of `config`.

    `store`: that of an earlier rendezvous; None performs the rendezvous. A collective fails after `timeout`, but not
    before 30 minutes. On a CPU, megatron-core gets its substitutes (cpu_backend.py).
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
            timeout=max(TIMEOUT, timeout),
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
    """Destroy all process groups: otherwise gloo sometimes aborts at interpreter exit."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
