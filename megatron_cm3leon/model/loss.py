"""Cross-entropy over a vocabulary that is partitioned over tensor-parallel ranks and padded in rows.

The padded rows take no part: their logits count as -inf. Everything is computed in fp32, whatever the
precision of the logits. (megatron-core's fused native form rounds its gradient to bf16.)

With a z-loss the value stays the cross-entropy, so that runs compare; the gradient is that of cross-entropy + z_loss x
(log Z)^2, Z the denominator of the softmax (Chameleon section 2.3).
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F


class _PartitionedCrossEntropy(torch.autograd.Function):
    """loss [T] of logits [T, columns of this rank] for targets [T] in whole-vocabulary ids."""

    @staticmethod
    def forward(ctx, logits, targets, start, columns, group, z_loss):
        scores = logits[:, :columns].float()
        # A rank whose rows are all padding has no column: its maximum is -inf and its sum 0.
        highest = scores.amax(dim=-1) if columns else scores.new_full((scores.shape[0],), -torch.inf)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        probabilities = (scores - highest[:, None]).exp_()
        local = targets - start
        here = (local >= 0) & (local < columns)
        rows, local = here.nonzero().squeeze(1), local[here]
        sums = torch.zeros(2, scores.shape[0], device=scores.device)  # sum of exp, logit of the target
        sums[0] = probabilities.sum(dim=-1)
        sums[1, rows] = scores[rows, local] - highest[rows]
        dist.all_reduce(sums, group=group)
        probabilities /= sums[0, :, None]
        log_sums = sums[0].log()
        ctx.save_for_backward(probabilities, rows, local, log_sums + highest)
        ctx.shape, ctx.dtype, ctx.z_loss = logits.shape, logits.dtype, z_loss
        return log_sums - sums[1]

    @staticmethod
    def backward(ctx, gradient):
        probabilities, rows, local, log_z = ctx.saved_tensors
        scores = probabilities * (gradient * (1 + 2 * ctx.z_loss * log_z))[:, None]
        scores[rows, local] -= gradient[rows]
        if scores.shape == ctx.shape:
            return scores.to(ctx.dtype), None, None, None, None, None
        padded = torch.zeros(ctx.shape, dtype=ctx.dtype, device=scores.device)
        padded[:, : scores.shape[1]] = scores
        return padded, None, None, None, None, None


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, vocabulary_size: int, group: dist.ProcessGroup, z_loss: float = 0.0
) -> torch.Tensor:
    """Loss of every token in nats, fp32.

    logits: [..., rows of this rank's partition]; targets: [...] ids below `vocabulary_size`, the true size;
    group: the tensor-parallel ranks, which hold consecutive row ranges of equal length.
    """
    partition = logits.shape[-1]
    start = group.rank() * partition
    columns = min(max(vocabulary_size - start, 0), partition)
    flat = logits.reshape(-1, partition)
    if group.size() == 1:
        scores = flat[:, :columns].float()
        losses = F.cross_entropy(scores, targets.reshape(-1), reduction="none")
        if z_loss:
            extra = z_loss * scores.logsumexp(-1).square()
            losses = losses + extra - extra.detach()
    else:
        losses = _PartitionedCrossEntropy.apply(flat, targets.reshape(-1), start, columns, group, z_loss)
    return losses.view(targets.shape)
