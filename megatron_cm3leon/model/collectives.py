"""Collectives along the sequence (a tensor's first dimension), as plain calls and as an op inside compiled layers."""

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group


def gather(part: torch.Tensor, group: dist.ProcessGroup, asynchronous: bool = False):
    """The parts of all ranks, concatenated in their order; with `asynchronous` also what to wait for."""
    whole = part.new_empty((part.shape[0] * group.size(), *part.shape[1:]))
    work = dist.all_gather_into_tensor(whole, part.contiguous(), group=group, async_op=asynchronous)
    return (whole, work) if asynchronous else whole


def scatter_sum(whole: torch.Tensor, group: dist.ProcessGroup, asynchronous: bool = False):
    """This rank's part of the sum over ranks; with `asynchronous` also what to wait for."""
    part = whole.new_empty((whole.shape[0] // group.size(), *whole.shape[1:]))
    work = dist.reduce_scatter_tensor(part, whole.contiguous(), group=group, async_op=asynchronous)
    return (part, work) if asynchronous else part


@torch.library.custom_op("megatron_cm3leon::gather_sequence", mutates_args=())
def _gather_sequence(part: torch.Tensor, group_name: str) -> torch.Tensor:
    return gather(part, _resolve_process_group(group_name))


@torch.library.custom_op("megatron_cm3leon::scatter_sequence", mutates_args=())
def _scatter_sequence(whole: torch.Tensor, group_name: str) -> torch.Tensor:
    return scatter_sum(whole, _resolve_process_group(group_name))


@_gather_sequence.register_fake
def _(part, group_name):
    return part.new_empty((part.shape[0] * _resolve_process_group(group_name).size(), *part.shape[1:]))


@_scatter_sequence.register_fake
def _(whole, group_name):
    return whole.new_empty((whole.shape[0] // _resolve_process_group(group_name).size(), *whole.shape[1:]))


def _keep_group(ctx, inputs, output) -> None:
    ctx.group_name = inputs[1]


_gather_sequence.register_autograd(
    lambda ctx, gradient: (_scatter_sequence(gradient, ctx.group_name), None), setup_context=_keep_group
)


def gather_sequence(part: torch.Tensor, group_name: str) -> torch.Tensor:
    """The parts of all ranks of a named group; the gradient is the sum over ranks, each rank's part of it."""
    return _gather_sequence(part, group_name)
