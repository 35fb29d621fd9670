"""Substitutes that let megatron-core 0.16.1 run on CPU and gloo.

megatron-core calls CUDA in about fifty places (`torch.cuda.current_device()`, `device="cuda"`,
`tensor.type() == "torch.cuda.FloatTensor"`), although a GPT model needs no GPU. `install()` replaces the name `torch`
in the loaded `megatron.*` modules by a substitute that handles these calls on the CPU. `torch` itself does not change,
except that `Tensor.cuda()` and `Tensor.type()` check whether their caller is megatron-core.

The random-number functions matter most: in a CPU build `torch.cuda.manual_seed` is queued and never executed, so that
megatron-core's RNG tracker would have no effect. Here these functions use the CPU generator.
"""

import contextlib
import ctypes
import functools
import importlib
import logging
import os
import platform
import sys
import types
from collections.abc import Callable, Iterator

import torch

# Modules that megatron-core imports lazily: loaded here so that they get the substitute, too.
_LAZY_MODULES = (
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.parallel_state",
    "megatron.core.pipeline_parallel",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer.multi_token_prediction",
)

# Functions of torch with an argument `device`.
_FACTORIES = [
    "arange",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "randint",
    "scalar_tensor",
    "tensor",
    "zeros",
    "zeros_like",
]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_CPU = torch.device("cpu")
_installed = False


class _CpuEvent:
    """Replaces a CUDA event: a CPU runs synchronously, so all earlier work is already complete."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def record(self, *args) -> None:
        pass

    def wait(self, *args) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _CpuStream(_CpuEvent):
    """The only stream; work on it is done immediately, in order."""

    def wait_stream(self, stream) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None) -> "_CpuEvent":
        return event or _CpuEvent()


def _set_rng_state(state, device=None, graph_safe=False) -> None:
    torch.set_rng_state(state)


def _get_rng_state(device=None, clone=False, graph_safe=False) -> torch.Tensor:
    return torch.get_rng_state()


def _build_module(original: types.ModuleType, substitutes: dict[str, object]) -> types.ModuleType:
    """A module with the names of `original`, some of them replaced."""
    module = types.ModuleType(original.__name__)
    vars(module).update(substitutes, __getattr__=functools.partial(getattr, original))
    return module


def _build_cuda_module() -> types.ModuleType:
    """The substitute for `torch.cuda`; all other names are those of torch.cuda."""
    return _build_module(
        torch.cuda,
        {
            "is_available": lambda: False,
            "current_device": lambda: _CPU,
            "synchronize": lambda *args: None,
            "empty_cache": lambda: None,
            "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
            "get_rng_state": _get_rng_state,
            "set_rng_state": _set_rng_state,
            "Event": _CpuEvent,
            "Stream": _CpuStream,
            "current_stream": lambda *args: _CpuStream(),
            "default_stream": lambda *args: _CpuStream(),
            "stream": lambda stream: contextlib.nullcontext(),
        },
    )


def _move_to_cpu(factory: Callable) -> Callable:
    """Return `factory` with `device="cuda"` replaced by the CPU."""

    @functools.wraps(factory)
    def call(*args, **kwargs):
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return call


def _build_torch_module() -> types.ModuleType:
    """The substitute for `torch` in megatron-core."""
    factories = {name: _move_to_cpu(getattr(torch, name)) for name in _FACTORIES}
    return _build_module(torch, {"cuda": _build_cuda_module(), **factories})


def _is_called_by_megatron() -> bool:
    """Whether the caller of the calling function is megatron-core."""
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")


def _patch_tensor_methods() -> None:
    """Replace `Tensor.type()` and `Tensor.cuda()` by functions that behave differently for megatron-core only."""
    original_type, original_cuda = torch.Tensor.type, torch.Tensor.cuda

    @functools.wraps(original_type)
    def tensor_type(self, *args, **kwargs):
        name = original_type(self, *args, **kwargs)
        if isinstance(name, str) and _is_called_by_megatron():
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    @functools.wraps(original_cuda)
    def tensor_cuda(self, *args, **kwargs):
        return self if _is_called_by_megatron() else original_cuda(self, *args, **kwargs)

    torch.Tensor.type, torch.Tensor.cuda = tensor_type, tensor_cuda  # type: ignore[method-assign]  # meant: a patch


class _NoRngWarning(logging.Filter):
    """Drops a warning of the RNG tracker: the CPU generator changes because it is the tracked one here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


@contextlib.contextmanager
def _disable_compile() -> Iterator[None]:
    """Ignore torch.compile: megatron-core's decorators would load the compiler, seconds of start-up without a gain."""
    original = torch.compile
    torch.compile = lambda function=None, **options: function  # type: ignore[assignment]  # restored below
    try:
        yield
    finally:
        torch.compile = original


def _keep_freed_memory() -> None:
    """Let glibc reuse the memory of a step in the next one; by default large tensors are returned to the system.

    A step of 2,048 tokens then has 2 page faults instead of 40,000, which saves 6 % of its time; the process is 7 %
    larger. Does nothing when the environment has settings of malloc (MALLOC_...).
    """
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def install() -> None:
    """Make megatron-core run on CPU tensors in this process. Further calls have no effect."""
    global _installed
    if _installed:
        return
    _installed = True
    _keep_freed_memory()
    with _disable_compile():
        for name in _LAZY_MODULES:
            importlib.import_module(name)
    substitute = _build_torch_module()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and module is not None and getattr(module, "torch", None) is torch:
            vars(module)["torch"] = substitute
    _patch_tensor_methods()
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state, random._set_cuda_rng_state = _get_rng_state, _set_rng_state
    logging.getLogger(random.__name__).addFilter(_NoRngWarning())
