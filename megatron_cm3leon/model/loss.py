"""Cross-entropy over a vocabulary that is partitioned over tensor-parallel ranks and padded in rows.

Logits of padded rows count as -inf. Everything is computed in fp32, whatever the dtype of the logits. (megatron-core's
fused native form rounds its gradient to bf16.)

With a z-loss the value is still the cross-entropy, so that runs can be compared; the gradient is that of
cross-entropy + z_loss x (log Z)^2, where Z is the denominator of the softmax (Chameleon section 2.3).

The forward pass saves the logits and two numbers per token, the highest logit and the sum of exponentials. The backward
pass computes the softmax again and writes the gradient over the logits, or over a copy of them. Memory traffic per bf16
logit, with z-loss: 2 bytes read in the forward pass, 2 read and 2 written in the backward pass; memory: the 2 bytes of
the logit. On CUDA each pass is one kernel (loss_kernels.py). On a CPU they are torch operators on chunks of tokens that
are small enough for the cache. Both passes are custom ops, so that an operator trace counts one kernel each.

Layout legend: T tokens, P rows of the vocabulary on this rank (columns of its logits).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

CHUNK_ELEMENTS = 1 << 17
"""fp32 numbers per CPU thread and chunk: 512 KiB, which stay in the cache between operators."""


@dataclass(frozen=True)
class Partition:
    """Rows of the vocabulary to which this rank's logits belong."""

    start: int
    """Vocabulary id of the first row."""
    columns: int
    """Rows without padding, which come first; 0 on a rank whose rows are all padding."""

    @classmethod
    def of_rank(cls, rows: int, vocabulary_size: int, group: dist.ProcessGroup) -> "Partition":
        """Partition of this rank; the ranks of `group` hold consecutive ranges of `rows` rows."""
        start = group.rank() * rows
        return cls(start, min(max(vocabulary_size - start, 0), rows))

    def find_columns(self, targets: torch.Tensor) -> torch.Tensor:
        """Column of each target in this rank's logits; -1 for targets of other ranks."""
        local = targets - self.start
        return torch.where((local >= 0) & (local < self.columns), local, -1)


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    vocabulary_size: int,
    group: dist.ProcessGroup,
    z_loss: float = 0.0,
    overwrite: bool = False,
) -> torch.Tensor:
    """Loss of every token in nats, fp32 [...].

    logits: [..., rows of this rank's partition]; targets: [...] ids below `vocabulary_size`, the size without padding;
    group: the tensor-parallel ranks, which hold consecutive row ranges of equal length; overwrite: the backward pass
    writes the gradient over the logits, which must not be used elsewhere (a second backward pass raises RuntimeError).
    """
    flat = logits.reshape(-1, logits.shape[-1])
    partition = Partition.of_rank(flat.shape[1], vocabulary_size, group)
    columns = partition.find_columns(targets.reshape(-1))
    losses = _CrossEntropy.apply(flat, columns, partition.columns, group, z_loss, overwrite)
    return losses.view(targets.shape)


class _CrossEntropy(torch.autograd.Function):
    """Losses [T] of logits [T, P] for target columns [T], which are -1 for targets of other ranks."""

    @staticmethod
    def forward(ctx, logits_TP, targets, columns, group, z_loss, overwrite):
        highest, sums, chosen = combine_ranks(measure_logits(logits_TP, targets, columns), group)
        ctx.save_for_backward(logits_TP, targets, highest, sums)
        ctx.columns, ctx.z_loss, ctx.overwrite = columns, z_loss, overwrite
        return sums.log() - (chosen - highest)

    @staticmethod
    def backward(ctx, gradient):
        logits_TP, targets, highest, sums = ctx.saved_tensors
        factors = softmax_factors(gradient, highest, sums, ctx.z_loss)
        out = logits_TP if ctx.overwrite else logits_TP.clone()
        write_gradient(out, targets, ctx.columns, highest, factors, gradient)
        return out, None, None, None, None, None


def combine_ranks(measured: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Combine the results of `measure_logits` [3, T] of all partitions; returns those of the whole vocabulary."""
    if group.size() > 1:
        highest = measured[0].clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        measured[1] *= (measured[0] - highest).exp_()
        measured[0] = highest
        dist.all_reduce(measured[1:], group=group)
    return measured


def softmax_factors(gradient, highest, sums, z_loss: float) -> torch.Tensor:
    """Factors of exp(logit - highest) in the gradient of a logit, where `gradient` is that of the loss; all [T]."""
    return gradient * (1 + 2 * z_loss * (sums.log() + highest)) / sums


def measure_logits(logits_TP: torch.Tensor, targets: torch.Tensor, columns: int) -> torch.Tensor:
    """Highest of each row's first `columns` logits, sum of exp(logit - highest), target's logit; fp32 [3, T].

    With `columns` 0 they are -inf, 0 and 0; the target's logit is 0 where `targets` is -1.
    """
    return _measure(logits_TP, targets, columns)


def write_gradient(logits_TP, targets, columns: int, highest, factors, gradient) -> None:
    """Replace each logit by exp(logit - highest) x factor, minus `gradient` at the target; by 0 from `columns` on.

    highest, factors, gradient: fp32 [T].
    """
    _write(logits_TP, targets, columns, highest, factors, gradient)


@torch.library.custom_op("megatron_cm3leon::measure_logits", mutates_args=())
def _measure(logits: torch.Tensor, targets: torch.Tensor, columns: int) -> torch.Tensor:
    if logits.is_cuda:
        from megatron_cm3leon.model import loss_kernels

        return loss_kernels.measure_logits(logits, targets, columns)
    return measure_in_chunks(logits, targets, columns)


@_measure.register_fake
def _(logits, targets, columns):
    return logits.new_empty((3, len(logits)), dtype=torch.float32)


@torch.library.custom_op("megatron_cm3leon::write_logit_gradient", mutates_args=("logits",))
def _write(
    logits: torch.Tensor,
    targets: torch.Tensor,
    columns: int,
    highest: torch.Tensor,
    factors: torch.Tensor,
    gradient: torch.Tensor,
) -> None:
    if logits.is_cuda:
        from megatron_cm3leon.model import loss_kernels

        loss_kernels.write_gradient(logits, targets, columns, highest, factors, gradient)
    else:
        write_in_chunks(logits, targets, columns, highest, factors, gradient)


@_write.register_fake
def _(logits, targets, columns, highest, factors, gradient):
    return None


def measure_in_chunks(logits_TP: torch.Tensor, targets: torch.Tensor, columns: int) -> torch.Tensor:
    """measure_logits() with torch operators on chunks of tokens."""
    measured = torch.zeros(3, len(logits_TP), device=logits_TP.device)
    highest, sums, chosen = measured
    if not columns:
        highest.fill_(-torch.inf)
        return measured
    for rows in _chunks(len(logits_TP), columns):
        scores = logits_TP[rows, :columns].float()
        highest[rows] = scores.amax(-1)
        torch.sum((scores - highest[rows, None]).exp_(), -1, out=sums[rows])
    chosen.copy_(logits_TP.gather(1, targets.clamp(min=0)[:, None])[:, 0]).mul_(targets >= 0)
    return measured


def write_in_chunks(logits_TP, targets, columns: int, highest, factors, gradient) -> None:
    """write_gradient() with torch operators on chunks of tokens."""
    logits_TP[:, columns:] = 0
    if not columns:
        return
    of_target = (gradient * (targets >= 0)).neg_()
    for rows in _chunks(len(logits_TP), columns):
        logits = logits_TP[rows, :columns]
        scores = logits.float()  # a copy, unless they are fp32
        scores.sub_(highest[rows, None]).exp_().mul_(factors[rows, None])
        scores.scatter_add_(1, targets[rows, None].clamp(min=0), of_target[rows, None])
        if logits.dtype != torch.float32:
            logits.copy_(scores)


def _chunks(tokens: int, columns: int) -> Iterator[slice]:
    """Ranges of tokens with at most CHUNK_ELEMENTS logits per thread, and at least one token."""
    step = max(1, CHUNK_ELEMENTS * torch.get_num_threads() // columns)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))
