"""Collectives along the first dimension of a tensor (the sequence): functions, and a custom op for compiled layers."""

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group


def gather(part: torch.Tensor, group: dist.ProcessGroup, asynchronous: bool = False):
    """All-gather: the parts of all ranks in rank order; with `asynchronous` (result, work to wait for)."""
    full = part.new_empty((part.shape[0] * group.size(), *part.shape[1:]))
    work = dist.all_gather_into_tensor(full, part.contiguous(), group=group, async_op=asynchronous)
    return (full, work) if asynchronous else full


def scatter_sum(full: torch.Tensor, group: dist.ProcessGroup, asynchronous: bool = False):
    """Reduce-scatter: this rank's part of the sum over ranks; with `asynchronous` (result, work to wait for)."""
    part = full.new_empty((full.shape[0] // group.size(), *full.shape[1:]))
    work = dist.reduce_scatter_tensor(part, full.contiguous(), group=group, async_op=asynchronous)
    return (part, work) if asynchronous else part


def _find_group(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(name)  # type: ignore[arg-type]  # the type of names differs between torch versions


@torch.library.custom_op("megatron_cm3leon::gather_sequence", mutates_args=())
def _gather_sequence(part: torch.Tensor, group_name: str) -> torch.Tensor:
    return gather(part, _find_group(group_name))


@torch.library.custom_op("megatron_cm3leon::scatter_sequence", mutates_args=())
def _scatter_sequence(full: torch.Tensor, group_name: str) -> torch.Tensor:
    return scatter_sum(full, _find_group(group_name))


@_gather_sequence.register_fake
def _(part, group_name):
    return part.new_empty((part.shape[0] * _find_group(group_name).size(), *part.shape[1:]))


@_scatter_sequence.register_fake
def _(full, group_name):
    return full.new_empty((full.shape[0] // _find_group(group_name).size(), *full.shape[1:]))


def _save_group(ctx, inputs, output) -> None:
    ctx.group_name = inputs[1]


_gather_sequence.register_autograd(
    lambda ctx, gradient: (_scatter_sequence(gradient, ctx.group_name), None), setup_context=_save_group
)


def gather_sequence(part: torch.Tensor, group_name: str) -> torch.Tensor:
    """All-gather over a named group; the gradient is the reduce-scatter of the gradients of all ranks."""
    return _gather_sequence(part, group_name)
