"""Head and loss some tokens at a time (train.head_chunk), so that the logits of all tokens never exist together.

The forward pass computes a chunk's logits, measures them (loss.py) and drops them; the backward pass computes them
again, which costs the head's product once more. With `accumulates` the chunks' weight gradients add to the fp32
`main_grad` as in linear.py; otherwise to an fp32 tensor, rounded once.

Layout legend: S sequence (of this rank under sequence parallelism), B batch, T = S x B tokens of all tensor-parallel
ranks, H width of the residual stream, P rows of the head's weight on this rank.
"""

import torch
import torch.distributed as dist

from megatron_cm3leon.model.collectives import gather, scatter_sum
from megatron_cm3leon.model.linear import ColumnLinear, accumulate_weight_gradient
from megatron_cm3leon.model.loss import Partition, combine_ranks, measure_logits, softmax_factors, write_gradient


class Head(ColumnLinear):
    """The output layer: logits, or the losses of some tokens at a time.

    Both are calls of the module, whose hooks wait for weights that other data-parallel ranks have updated.
    """

    def forward(self, input_, weight=None, runtime_gather_output=None, **options):
        """Logits, as megatron-core calls it; with the keywords of `chunked_losses` the losses. The second is None."""
        if not options:
            return super().forward(input_, weight, runtime_gather_output)
        return self.chunked_losses(input_, self.weight if weight is None else weight, **options), None

    def chunked_losses(
        self, hidden_SBH, weight_PH, *, targets_SB: torch.Tensor, vocabulary_size: int, z_loss: float, chunk: int
    ) -> torch.Tensor:
        """Losses [S, B] as loss.cross_entropy gives them for the logits; `chunk` tokens have logits at once.

        targets_SB: of all tensor-parallel ranks' tokens; weight_PH: this layer's, or the tied embedding's.
        """
        partition = Partition.of_rank(len(weight_PH), vocabulary_size, self.tp_group)
        main_grad = weight_PH.main_grad if self.accumulates and torch.is_grad_enabled() else None
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
        )
        return losses.view(targets_SB.shape)


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_SBH, weight_PH, main_grad, targets, columns, group, sequence_parallel, z_loss, chunk):
        hidden_TH = _all_tokens(hidden_SBH, group, sequence_parallel)
        measured = torch.empty(3, len(hidden_TH), device=hidden_TH.device)
        for rows in _chunks(len(hidden_TH), chunk):
            measured[:, rows] = measure_logits(hidden_TH[rows] @ weight_PH.t(), targets[rows], columns)
        highest, sums, chosen = combine_ranks(measured, group)
        ctx.save_for_backward(hidden_SBH, weight_PH, targets, highest, sums)
        ctx.main_grad = main_grad  # no saved tensor: other micro-batches add to it in between
        ctx.settings = columns, group, sequence_parallel, z_loss, chunk
        return sums.log() - (chosen - highest)

    @staticmethod
    def backward(ctx, gradient):
        hidden_SBH, weight_PH, targets, highest, sums = ctx.saved_tensors
        columns, group, sequence_parallel, z_loss, chunk = ctx.settings
        factors = softmax_factors(gradient, highest, sums, z_loss)
        hidden_TH = _all_tokens(hidden_SBH, group, sequence_parallel)
        of_hidden = torch.empty_like(hidden_TH)
        of_weight = ctx.main_grad
        if of_weight is None:
            of_weight = torch.zeros(weight_PH.shape, dtype=torch.float32, device=weight_PH.device)
        for rows in _chunks(len(hidden_TH), chunk):
            logits = hidden_TH[rows] @ weight_PH.t()
            write_gradient(logits, targets[rows], columns, highest[rows], factors[rows], gradient[rows])
            torch.mm(logits, weight_PH, out=of_hidden[rows])
            accumulate_weight_gradient(of_weight, logits, hidden_TH[rows])
        if sequence_parallel:
            of_hidden = scatter_sum(of_hidden, group)
        elif group.size() > 1:
            dist.all_reduce(of_hidden, group=group)
        if ctx.main_grad is None:
            of_weight = of_weight.to(weight_PH.dtype)
        elif getattr(weight_PH, "zero_out_wgrad", False):
            of_weight = None  # the embedding's gradient alone goes through autograd
        else:
            of_weight = torch.empty_like(weight_PH)  # read by nobody: see linear.mark_accumulated
        return of_hidden.view(hidden_SBH.shape), of_weight, *[None] * 7


def _all_tokens(hidden_SBH: torch.Tensor, group: dist.ProcessGroup, sequence_parallel: bool) -> torch.Tensor:
    """[T, H], gathered over ranks that hold parts of the sequence."""
    if sequence_parallel:
        hidden_SBH = gather(hidden_SBH, group)
    return hidden_SBH.reshape(-1, hidden_SBH.shape[-1])


def _chunks(tokens: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]
