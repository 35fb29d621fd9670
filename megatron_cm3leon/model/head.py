"""Head and loss in chunks of tokens (train.head_chunk), so that the logits of all tokens never exist at once.

The forward pass computes the logits of a chunk, reduces them (loss.py) and frees them. The backward pass computes them
again, which costs one more matrix product of the head. With `accumulates` the weight gradients of the chunks are added
to the fp32 `main_grad` as in linear.py; otherwise to an fp32 tensor that is rounded once.

Layout legend: S sequence (of this rank with sequence parallelism), B batch, T = S x B tokens of all tensor-parallel
ranks, H width of the residual stream, P rows of the head's weight on this rank.
"""

import torch
import torch.distributed as dist

from megatron_cm3leon.model.collectives import gather, scatter_sum
from megatron_cm3leon.model.linear import ColumnLinear, accumulate_weight_gradient
from megatron_cm3leon.model.loss import Partition, combine_ranks, measure_logits, softmax_factors, write_gradient


class Head(ColumnLinear):
    """Output layer: computes logits, or losses in chunks of tokens.

    Both are calls of the module, because its hooks wait for the weights that other data-parallel ranks have updated.
    """

    def forward(self, input_, weight=None, runtime_gather_output=None, **options):
        """(logits, None), as megatron-core calls it; with the keywords of `chunked_losses`, (losses, None)."""
        if not options:
            return super().forward(input_, weight, runtime_gather_output)
        return self.chunked_losses(input_, self.weight if weight is None else weight, **options), None

    def chunked_losses(
        self, hidden_SBH, weight_PH, *, targets_SB: torch.Tensor, vocabulary_size: int, z_loss: float, chunk: int
    ) -> torch.Tensor:
        """Losses [S, B], equal to those of loss.cross_entropy, with the logits of `chunk` tokens at a time.

        targets_SB: targets of the tokens of all tensor-parallel ranks; weight_PH: weight of this layer or of the tied
        embedding.
        """
        partition = Partition.of_rank(len(weight_PH), vocabulary_size, self.tp_group)
        trains = torch.is_grad_enabled() and weight_PH.requires_grad
        main_grad = weight_PH.gradient_sum if self.accumulates and trains else None
        losses = _ChunkedLosses.apply(
            hidden_SBH,
            weight_PH,
            main_grad,
            partition.find_columns(targets_SB.reshape(-1)),
            partition.columns,
            self.tp_group,
            self.sequence_parallel,
            z_loss,
            chunk,
            trains,
        )
        return losses.view(targets_SB.shape)


class _ChunkedLosses(torch.autograd.Function):
    """Losses [T] of head and cross-entropy, `chunk` tokens at a time; `targets` [T] are columns of this rank."""

    @staticmethod
    def forward(
        ctx, hidden_SBH, weight_PH, main_grad, targets, columns, group, sequence_parallel, z_loss, chunk, trains
    ):
        hidden_TH = _gather_tokens(hidden_SBH, group, sequence_parallel)
        measured = torch.empty(3, len(hidden_TH), device=hidden_TH.device)
        for rows in _chunks(len(hidden_TH), chunk):
            measured[:, rows] = measure_logits(hidden_TH[rows] @ weight_PH.t(), targets[rows], columns)
        highest, sums, chosen = combine_ranks(measured, group)
        ctx.save_for_backward(hidden_SBH, weight_PH, targets, highest, sums)
        ctx.main_grad = main_grad  # not a saved tensor, because other micro-batches add to it before backward
        ctx.settings = columns, group, sequence_parallel, z_loss, chunk, trains
        return sums.log() - (chosen - highest)

    @staticmethod
    def backward(ctx, gradient):
        hidden_SBH, weight_PH, targets, highest, sums = ctx.saved_tensors
        columns, group, sequence_parallel, z_loss, chunk, trains = ctx.settings
        factors = softmax_factors(gradient, highest, sums, z_loss)
        hidden_TH = _gather_tokens(hidden_SBH, group, sequence_parallel)
        of_hidden = torch.empty_like(hidden_TH)
        of_weight = ctx.main_grad
        if of_weight is None and trains:
            of_weight = torch.zeros(weight_PH.shape, dtype=torch.float32, device=weight_PH.device)
        for rows in _chunks(len(hidden_TH), chunk):
            logits = hidden_TH[rows] @ weight_PH.t()
            write_gradient(logits, targets[rows], columns, highest[rows], factors[rows], gradient[rows])
            torch.mm(logits, weight_PH, out=of_hidden[rows])
            if trains:
                accumulate_weight_gradient(of_weight, logits, hidden_TH[rows])
        if sequence_parallel:
            of_hidden = scatter_sum(of_hidden, group)
        elif group.size() > 1:
            dist.all_reduce(of_hidden, group=group)
        if not trains:
            of_weight = None
        elif ctx.main_grad is None:
            of_weight = of_weight.to(weight_PH.dtype)
        elif getattr(weight_PH, "zero_out_wgrad", False):
            of_weight = None  # only the embedding's gradient goes through autograd
        else:
            of_weight = torch.empty_like(weight_PH)  # never read: see linear.mark_accumulated
        return of_hidden.view(hidden_SBH.shape), of_weight, *[None] * 8


def _gather_tokens(hidden_SBH: torch.Tensor, group: dist.ProcessGroup, sequence_parallel: bool) -> torch.Tensor:
    """Hidden states [T, H], gathered over the ranks that hold parts of the sequence."""
    if sequence_parallel:
        hidden_SBH = gather(hidden_SBH, group)
    return hidden_SBH.reshape(-1, hidden_SBH.shape[-1])


def _chunks(tokens: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]
