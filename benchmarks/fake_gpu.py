"""Run a training engine at real shapes without memory: fake tensors on a CPU that claim to be CUDA tensors.

    with pretend_cuda(trace):
        engine = MegatronEngine(config, vocabulary, CUDA)
        engine.train_step(batches, 0, 1e-4)

Nothing is computed (torch's FakeTensorMode). This package's code, compiled or not, and torch's optimizers see
`device.type == "cuda"`, so they take the same branches as on a GPU; megatron-core runs with the substitutes of
engine/cpu_backend.py. A number that is read back (`float(norm)`) is 1. Attention and RMSNorm are one operator each, as
in GPU libraries. Collectives of the single rank do nothing. torch.compile traces, and `trace` runs its graphs.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from operator_trace import OperatorTrace
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.variables import ConstantVariable, TensorVariable
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
_CUDA_MODULES = ("megatron_cm3leon", "torch.optim")
"""Modules for which a fake tensor reports a CUDA device."""
_READS = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__, torch.Tensor.__bool__, torch.Tensor.__int__,
}  # fmt: skip


class _RedirectCuda(TorchFunctionMode):
    """Create tensors of a CUDA device as fake CPU tensors; return 1 for numbers that are read back."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function in _READS and isinstance(arguments[0], FakeTensor):
            with _disable_current_modes():
                return getattr(torch.ones(arguments[0].shape, dtype=arguments[0].dtype), function.__name__)()
        if function is torch.tensor:
            arguments = tree_map(lambda one: 1.0 if isinstance(one, FakeTensor) else one, arguments)
        if "device" in options and _is_cuda(options["device"]):
            options = {**options, "device": CPU}
        arguments = tuple(CPU if _is_cuda(one) else one for one in arguments)
        return function(*arguments, **options)


@torch.no_grad()
def _apply_in_place(module, function, recurse=True):
    """Replaces Module._apply, which creates new parameters if they are fake, so that references would be outdated."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = function(tensor.data)
    return module


def _is_cuda(device) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


_LIBRARY = torch.library.Library("operator_record", "DEF")
for _signature in (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask) -> (Tensor, Tensor)",
    "attention_backward(Tensor query, Tensor key, Tensor value, Tensor output, Tensor log_sums, Tensor gradient, "
    "Tensor? mask) -> (Tensor, Tensor, Tensor)",
    "rms_norm(Tensor hidden, Tensor weight) -> (Tensor, Tensor)",
    "rms_norm_backward(Tensor gradient, Tensor hidden, Tensor rates, Tensor weight) -> (Tensor, Tensor)",
):
    _LIBRARY.define(_signature)
_OPERATORS = torch.ops.operator_record


@torch.library.register_fake("operator_record::attention", lib=_LIBRARY)
def _(query, key, value, mask):
    # GPU libraries keep the order of the projection, [B, S, N, D], so the next operator needs no copy.
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    return output, query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("operator_record::attention_backward", lib=_LIBRARY)
def _(query, key, value, output, log_sums, gradient, mask):
    return tuple(torch.empty_like(one, memory_format=torch.contiguous_format) for one in (query, key, value))


@torch.library.register_fake("operator_record::rms_norm", lib=_LIBRARY)
def _(hidden, weight):
    return torch.empty_like(hidden), hidden.new_empty(*hidden.shape[:-1], 1, dtype=torch.float32)


@torch.library.register_fake("operator_record::rms_norm_backward", lib=_LIBRARY)
def _(gradient, hidden, rates, weight):
    return torch.empty_like(hidden), torch.empty_like(weight)


def _keep_attention(ctx, inputs, output) -> None:
    query, key, value, mask = inputs
    ctx.save_for_backward(query, key, value, *output, *([] if mask is None else [mask]))


def _differentiate_attention(ctx, gradient, _):
    query, key, value, output, log_sums, *mask = ctx.saved_tensors
    found = _OPERATORS.attention_backward(query, key, value, output, log_sums, gradient, *(mask or [None]))
    return *found, None


def _keep_rms_norm(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[1], inputs[1])


def _differentiate_rms_norm(ctx, gradient, _):
    return _OPERATORS.rms_norm_backward(gradient, *ctx.saved_tensors)


for _name, _keep, _differentiate in (
    ("attention", _keep_attention, _differentiate_attention),
    ("rms_norm", _keep_rms_norm, _differentiate_rms_norm),
):
    torch.library.register_autograd(f"operator_record::{_name}", _differentiate, setup_context=_keep, lib=_LIBRARY)


def _scaled_dot_product_attention(query, key, value, attn_mask=None, **options):
    return _OPERATORS.attention(query, key, value, attn_mask)[0]


def _rms_norm_of(original):
    def rms_norm(hidden, shape, weight=None, eps=None):
        """One kernel on a GPU, several operators elsewhere, which inductor fuses."""
        if weight is None or torch.compiler.is_compiling():
            return original(hidden, shape, weight, eps)
        return _OPERATORS.rms_norm(hidden, weight)[0]

    return rms_norm


class _Event:
    """Replaces a CUDA event, and a stream without pending work."""

    def __init__(self, *arguments, **options) -> None:
        pass

    def __getattr__(self, name: str):
        return lambda *arguments, **options: self


@contextlib.contextmanager
def _without_modes(fake: FakeTensorMode) -> Iterator[None]:
    """Disable recording and redirection inside: otherwise the compiler would trace them."""
    stack = []
    while torch._C._len_torch_function_stack():
        stack.append(_pop_mode())
    try:
        with _disable_current_modes(), fake:
            yield
    finally:
        for mode in reversed(stack):
            _push_mode(mode)


def _compile_to_graphs(trace: OperatorTrace, fake: FakeTensorMode, original):
    """torch.compile with inductor's decompositions and its choice of saved tensors; `trace` runs the graphs."""

    def keep(graph, inputs):
        def run(*arguments):
            with fake:
                return trace.run_graph(graph, arguments)

        return make_boxed_func(run)

    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )  # fmt: skip

    def compile(function=None, **options):
        if function is None:
            return lambda later: compile(later, **options)
        kept = {name: options[name] for name in ("dynamic", "fullgraph") if name in options}
        compiled = original(function, backend=backend, **kept)

        @functools.wraps(function)
        def call(*arguments, **given):
            with _without_modes(fake):
                return compiled(*arguments, **given)

        return call

    return compile


@contextlib.contextmanager
def pretend_cuda(trace: OperatorTrace) -> Iterator[None]:
    """Make fake tensors claim to be CUDA tensors, and record with `trace` what runs on them."""
    from megatron.core import optimizer

    device, fake = FakeTensor.device, FakeTensorMode(allow_non_fake_inputs=True)

    def seen_device(tensor):
        true = device.__get__(tensor)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return CUDA if true.type == "cpu" and caller.startswith(_CUDA_MODULES) else true

    def seen_is_cuda(tensor):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return caller.startswith(_CUDA_MODULES)

    substitutes = {name: (lambda *a, **k: _Event()) for name in ("current_stream", "default_stream", "Event", "Stream")}
    with contextlib.ExitStack() as stack:
        for name, value in substitutes.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        for target, name, value in (
            (dist, "all_reduce", lambda *arguments, **options: None),
            (dist, "barrier", lambda *arguments, **options: None),
            (dist, "all_gather_object", lambda found, value, *arguments, **options: found.__setitem__(0, value)),
            (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
            (torch.cuda, "synchronize", lambda *arguments: None),
            (FakeTensor, "device", property(seen_device)),
            (torch.Tensor, "is_cuda", property(seen_is_cuda)),
            (TensorVariable, "method_attr_is_cuda", lambda variable, tx: ConstantVariable.create(True)),
            (torch.nn.Module, "_apply", _apply_in_place),
            (torch, "compile", _compile_to_graphs(trace, fake, torch.compile)),
            (F, "scaled_dot_product_attention", _scaled_dot_product_attention),
            (F, "rms_norm", _rms_norm_of(F.rms_norm)),
            (
                importlib.import_module("torch.optim.optimizer"),
                "_foreach_supported_types",
                [torch.Tensor, torch.nn.Parameter, FakeTensor],
            ),
            # The values of megatron-core on a GPU without TransformerEngine and apex.
            (optimizer, "USING_PYTORCH_OPTIMIZER", True),
            (optimizer, "Adam", torch.optim.AdamW),
        ):
            stack.enter_context(patch.object(target, name, value))
        for mode in (fake, _RedirectCuda(), trace):
            stack.enter_context(mode)
        yield
