"""Matrix products over tensor-parallel ranks: megatron-core's layers, in one form for eager and compiled execution.

One autograd function holds the product, its communication and both gradients. Inside a compiled layer everything that
communicates, or adds to a gradient buffer, is one custom op: the compiler does not trace it and does not save what it
gathers, so a sequence-parallel input is gathered again in the backward pass, as without compilation.

Weight gradients: with `accumulates` (the megatron engine's weights) the product adds to the fp32 `weight.main_grad`,
by one kernel on CUDA and for fp32, and autograd receives an uninitialized gradient that nothing reads. See
`mark_accumulated`.

Frozen weights (train.only, lora) have no gradient: their input is neither saved nor gathered again.

With `in_fp8` (train.fp8) the three products are those of fp8.py; communication and `main_grad` stay as they are. The
input is converted once: the backward pass keeps its transposed copy in fp8 (of an input that it gathers again, this
rank's part in bf16). With `keeps_weight` a weight is converted once per step, too: see keep_converted_weights().

Layout legend: S sequence (of this rank under sequence parallelism), B batch, I and O features in and out.
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.distributed_c10d import _resolve_process_group

from megatron_cm3leon.model.collectives import gather, scatter_sum
from megatron_cm3leon.model.fp8 import (
    BACKWARD,
    FORWARD,
    Quantized,
    find_largest,
    multiply,
    quantize,
    quantize_both_ways,
    quantize_transposed,
)

ALONE, COLUMN, COLUMN_SEQUENCE, ROW, ROW_SEQUENCE = "alone", "column", "column_sequence", "row", "row_sequence"
"""How a layer communicates. column: the input's gradients are summed. row: the outputs are summed. With sequence:
a column's input is gathered along S and its gradient is scattered, a row's output is scattered."""


_HAS_FP32_RESULT = hasattr(torch.ops.aten.addmm, "dtype_out")
"""Since torch 2.8 a GPU adds products of bf16 to fp32."""


def accumulate_weight_gradient(main_grad: torch.Tensor, grad: torch.Tensor, input: torch.Tensor) -> None:
    """main_grad [O, I] += grad [tokens, O] transposed @ input [tokens, I], summed in fp32 where a kernel can."""
    if grad.dtype == main_grad.dtype:
        main_grad.addmm_(grad.t(), input)
    elif grad.is_cuda and _HAS_FP32_RESULT:
        torch.addmm(main_grad, grad.t(), input, out_dtype=main_grad.dtype, out=main_grad)
    else:  # a CPU has no product of bf16 with an fp32 result; with fp32 copies it takes 1.8-4.5 times as long
        main_grad.add_(grad.t() @ input)


def _multiply(
    input_SBI: torch.Tensor,
    weight_OI: torch.Tensor,
    in_fp8: bool,
    input_inverse: torch.Tensor | None,
    weight_inverse: torch.Tensor | None,
) -> torch.Tensor:
    if not in_fp8:
        return input_SBI @ weight_OI.t()
    input = _as_fp8(input_SBI.reshape(-1, input_SBI.shape[-1]), input_inverse)
    output = multiply(input, _as_fp8(weight_OI, weight_inverse), torch.bfloat16, fast=True)
    # Not a view, like the result of torch's own product: megatron-core adds to it in place without gradients, which
    # compiled layers cannot do to a view.
    return torch.ops.aten._unsafe_view(output, (*input_SBI.shape[:-1], output.shape[-1]))


def _as_fp8(matrix: torch.Tensor, inverse: torch.Tensor | None) -> Quantized:
    """A matrix in fp8: already converted if there is an inverse of its scale, else converted here."""
    return quantize(matrix, FORWARD) if inverse is None else Quantized(matrix, inverse)


def _as_transposed_fp8(matrix: torch.Tensor, inverse: torch.Tensor | None) -> Quantized:
    """A matrix transposed, in fp8: already converted if there is an inverse of its scale, else converted here."""
    return quantize_transposed(matrix, FORWARD) if inverse is None else Quantized(matrix, inverse)


def _product(
    input_SBI: torch.Tensor,
    weight_OI: torch.Tensor,
    kind: str,
    group_name: str,
    in_fp8: bool,
    input_inverse: torch.Tensor | None,
    weight_inverse: torch.Tensor | None,
) -> torch.Tensor:
    """The output. In fp8, input and weight are already converted where there is an inverse of their scale."""
    options = in_fp8, input_inverse, weight_inverse
    if kind in (ALONE, COLUMN):
        return _multiply(input_SBI, weight_OI, *options)
    group = _find_group(group_name)
    if kind == COLUMN_SEQUENCE:
        return _multiply(gather(input_SBI, group), weight_OI, *options)
    output = _multiply(input_SBI, weight_OI, *options)
    if kind == ROW_SEQUENCE:
        return scatter_sum(output, group)
    dist.all_reduce(output, group=group)
    return output


def _find_group(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(name)  # type: ignore[arg-type]  # since torch 2.13 a NewType of str


def _gradients(
    grad_SBO: torch.Tensor,
    input: torch.Tensor | None,
    weight: torch.Tensor,
    main_grad: torch.Tensor | None,
    kind: str,
    group_name: str,
    in_fp8: bool,
    input_inverse: torch.Tensor | None,
    weight_inverse: torch.Tensor | None,
    largest: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of input and weight; the second is uninitialized memory if it was added to `main_grad`.

    Without `input` the weight is frozen, and its gradient empty.
    input [S, B, I] and weight [O, I]; in fp8 they are already converted and transposed, [I, S x B] and [I, O], where
    there is an inverse of their scale. `largest`: find_largest() of the gradient, where it is known.

    Communication overlaps with the products: the gather with the input's, the sum with the weight's.
    """
    work = None
    if kind == ROW_SEQUENCE:
        grad_SBO = gather(grad_SBO, _find_group(group_name))
    elif kind == COLUMN_SEQUENCE and input is not None:
        input, work = gather(input, _find_group(group_name), asynchronous=True)
    grad = grad_SBO.reshape(-1, grad_SBO.shape[-1])
    if in_fp8:
        if input is None:
            grad_fp8, transposed_grad = quantize(grad, BACKWARD), None
        else:
            grad_fp8, transposed_grad = quantize_both_ways(grad, BACKWARD, largest)
        grad_input = multiply(grad_fp8, _as_transposed_fp8(weight, weight_inverse), torch.bfloat16)
        grad_input = grad_input.view(*grad_SBO.shape[:-1], -1)
    else:
        grad_input = grad_SBO @ weight
    if work is not None:
        work.wait()
    if kind == COLUMN:
        work = dist.all_reduce(grad_input, group=_find_group(group_name), async_op=True)
    elif kind == COLUMN_SEQUENCE:
        whole = grad_input  # read until the wait below
        grad_input, work = scatter_sum(whole, _find_group(group_name), asynchronous=True)
    if input is None:
        grad_weight = grad_SBO.new_empty(0)
    elif in_fp8:
        assert transposed_grad is not None
        rows = input if input_inverse is not None else input.reshape(-1, input.shape[-1])
        dtype = torch.bfloat16 if main_grad is None else main_grad.dtype
        grad_weight = multiply(transposed_grad, _as_transposed_fp8(rows, input_inverse), dtype)
        if main_grad is not None:
            main_grad.add_(grad_weight)
    elif main_grad is None:
        grad_weight = grad.t() @ input.reshape(-1, input.shape[-1])
    else:
        accumulate_weight_gradient(main_grad, grad, input.reshape(-1, input.shape[-1]))
    if main_grad is not None and input is not None:
        grad_weight = torch.empty_like(main_grad, dtype=grad_SBO.dtype)
    if work is not None:
        work.wait()
    return grad_input, grad_weight


_compiled_product = torch.library.custom_op("megatron_cm3leon::product", _product, mutates_args=())


@torch.library.custom_op("megatron_cm3leon::gradients", mutates_args=())
def _compiled_gradients(
    grad_SBO: torch.Tensor,
    input: torch.Tensor | None,
    weight: torch.Tensor,
    main_grad: torch.Tensor | None,
    kind: str,
    group_name: str,
    in_fp8: bool,
    input_inverse: torch.Tensor | None,
    weight_inverse: torch.Tensor | None,
    largest: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """_gradients(). The addition to `main_grad` is not declared, and does not change its version counter.

    A compiled layer saves `main_grad` for its backward pass, once per micro-batch in progress: by the rules of saved
    tensors, the first addition would invalidate it for the others. No graph reads it except here.
    """
    kept = nullcontext() if main_grad is None else _unsafe_preserve_version_counter(main_grad)
    with kept:
        return _gradients(
            grad_SBO, input, weight, main_grad, kind, group_name, in_fp8, input_inverse, weight_inverse, largest
        )


@_compiled_product.register_fake
def _(input_SBI, weight_OI, kind, group_name, in_fp8, input_inverse, weight_inverse):
    length, ranks = input_SBI.shape[0], _resolve_process_group(group_name).size()
    length = length * ranks if kind == COLUMN_SEQUENCE else length // ranks if kind == ROW_SEQUENCE else length
    dtype = torch.bfloat16 if in_fp8 else input_SBI.dtype
    return input_SBI.new_empty((length, *input_SBI.shape[1:-1], weight_OI.shape[0]), dtype=dtype)


@_compiled_gradients.register_fake
def _(grad_SBO, input, weight, main_grad, kind, group_name, in_fp8, input_inverse, weight_inverse, largest):
    length, ranks = grad_SBO.shape[0], 1 if kind == ALONE else _resolve_process_group(group_name).size()
    length = length * ranks if kind == ROW_SEQUENCE else length // ranks if kind == COLUMN_SEQUENCE else length
    features, inputs = grad_SBO.shape[-1], weight.shape[1] if weight_inverse is None else weight.shape[0]
    of_input = grad_SBO.new_empty((length, *grad_SBO.shape[1:-1], inputs))
    return of_input, grad_SBO.new_empty(0 if input is None else (features, inputs))


class _Linear(torch.autograd.Function):
    """The product with its communication. `main_grad` is not saved: other micro-batches add to it in between.

    In fp8, `kept` are the two forms of a weight that is already converted; `trains` is False if the weight is frozen,
    or no backward pass follows.
    """

    @staticmethod
    def forward(ctx, input, weight, main_grad, kind, group_name, shared, in_fp8=False, trains=True, *kept):
        ctx.in_fp8, ctx.keeps_weight, ctx.trains = in_fp8, bool(kept), trains
        ctx.main_grad, ctx.kind, ctx.group_name, ctx.shared = main_grad, kind, group_name, shared
        left, left_inverse, saved_input, right, right_inverse, saved_weight = input, None, input, weight, None, weight
        if in_fp8 and kind != COLUMN_SEQUENCE:
            left, left_inverse, saved_input = _convert_input(input, trains)
        if kept:
            right, saved_weight, right_inverse = kept
        ctx.save_for_backward(saved_input if trains else None, saved_weight, left_inverse, right_inverse)
        product = _product
        if torch.compiler.is_compiling() and kind not in (ALONE, COLUMN):
            product = _compiled_product
        return product(left, right, kind, group_name, in_fp8, left_inverse, right_inverse)

    @staticmethod
    def backward(ctx, gradient):
        input, weight, input_inverse, weight_inverse = ctx.saved_tensors
        gradients, largest = _gradients, None
        if torch.compiler.is_compiling() and not (ctx.kind == ALONE and ctx.main_grad is None):
            gradients = _compiled_gradients
            if (
                ctx.in_fp8 and ctx.kind != ROW_SEQUENCE
            ):  # here, so that it is fused with the kernel that computed the gradient
                largest = find_largest(gradient.reshape(-1, gradient.shape[-1]))
        options = ctx.kind, ctx.group_name, ctx.in_fp8, input_inverse, weight_inverse, largest
        of_input, of_weight = gradients(gradient, input, weight, ctx.main_grad, *options)
        return of_input, of_weight if ctx.trains and not ctx.shared else None, *[None] * (9 if ctx.keeps_weight else 6)


def _convert_input(input_SBI: torch.Tensor, trains: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In fp8: the input, the inverse of its scale, and what the backward pass needs, [I, S x B]."""
    rows = input_SBI.reshape(-1, input_SBI.shape[-1])
    if not trains:
        values, inverse = quantize(rows, FORWARD)
        return values.view(input_SBI.shape), inverse, values
    (values, inverse), (transposed, _) = quantize_both_ways(rows, FORWARD)
    return values.view(input_SBI.shape), inverse, transposed


class OwnForward:
    """The common part of both layers.

    `has_adapter` is set by adapters.py, `accumulates` by mark_accumulated(), `in_fp8` by multiply_in_fp8(),
    `keeps_weight` by keep_converted_weights(). `weight_fp8`: the weight in fp8, the same transposed, and the
    inverse of the scale.
    """

    accumulates = in_fp8 = keeps_weight = is_current = has_adapter = False
    weight_fp8: tuple[torch.Tensor, ...] = ()
    weight: torch.nn.Parameter
    tp_group: dist.ProcessGroup

    def multiply(self, input_SBI: torch.Tensor, weight_OI: torch.Tensor, kind: str) -> torch.Tensor:
        trains = torch.is_grad_enabled() and weight_OI.requires_grad
        accumulates = self.accumulates and trains
        main_grad = weight_OI.gradient_sum if accumulates else None  # type: ignore[attr-defined]  # mark_accumulated
        # The embedding reads rows of the same weight: only its gradient goes through autograd.
        shared = main_grad is not None and getattr(weight_OI, "zero_out_wgrad", False)
        if not torch.compiler.is_compiling():  # engine/compile.py does it before a compiled layer
            self.convert_weight()
        options = kind, self.tp_group.group_name, shared, self.in_fp8, trains
        return _Linear.apply(input_SBI, weight_OI, main_grad, *options, *self.weight_fp8)

    @torch.no_grad()
    def convert_weight(self) -> None:
        """Convert the weight to fp8 if it is kept and not current; once after each forget_converted_weights()."""
        if self.keeps_weight and not self.is_current:
            self.weight_fp8 = ()  # frees its memory for the new one
            (values, inverse), (transposed, _) = quantize_both_ways(self.weight, FORWARD)
            self.weight_fp8 = values, transposed, inverse
            self.is_current = True


class ColumnLinear(OwnForward, ColumnParallelLinear):
    """megatron-core's layer whose output features are partitioned, without bias."""

    def forward(self, input_, weight=None, runtime_gather_output=None):
        assert self.bias is None and not runtime_gather_output, "a bias or gathered outputs are not built here"
        kind = COLUMN_SEQUENCE if self.sequence_parallel else COLUMN if self.allreduce_dgrad else ALONE
        output = self.multiply(input_, self.weight if weight is None else weight, kind)
        return output + self.lora(input_) if self.has_adapter else output, None


class RowLinear(OwnForward, RowParallelLinear):
    """megatron-core's layer whose input features are partitioned, without bias."""

    def forward(self, input_):
        assert self.bias is None and self.input_is_parallel, "a bias or whole inputs are not built here"
        kind = ALONE if self.tp_group.size() == 1 else ROW_SEQUENCE if self.sequence_parallel else ROW
        output = self.multiply(input_, self.weight, kind)
        return output + self.lora(input_) if self.has_adapter else output, None


def multiply_in_fp8(model: torch.nn.Module) -> None:
    """Make all layers in `model` compute their products by fp8.py."""
    for module in model.modules():
        if isinstance(module, OwnForward):
            module.in_fp8 = True


def keep_converted_weights(model: torch.nn.Module) -> list[OwnForward]:
    """Make the fp8 layers of `model` convert their weights once per step; returns these layers.

    The caller passes them to forget_converted_weights() whenever weights may have changed.
    """
    layers: list[OwnForward] = []
    layers += [module for module in model.modules() if isinstance(module, OwnForward) and module.in_fp8]
    for layer in layers:
        layer.keeps_weight = True
    return layers


def forget_converted_weights(layers: list[OwnForward]) -> None:
    """Make each weight be converted again at its next use."""
    for layer in layers:
        layer.is_current = False


def mark_accumulated(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Make the products of `model` add to `main_grad`, which each weight must already have; returns these weights.

    Before every step the caller sets `grad_added_to_main_grad` on them, which megatron-core's hooks read. The products
    add through `gradient_sum`, the same memory, whose version counter megatron-core's own additions do not change.
    """
    layers: list[OwnForward] = [module for module in model.modules() if isinstance(module, OwnForward)]
    weights = [layer.weight for layer in layers if layer.weight is not None and layer.weight.requires_grad]
    for parameter in model.parameters():  # the tied head is given the embedding's
        if parameter.requires_grad:
            parameter.gradient_sum = parameter.main_grad.data  # type: ignore[attr-defined]  # of megatron-core's buffer
    for layer in layers:
        layer.accumulates = True
    return weights
