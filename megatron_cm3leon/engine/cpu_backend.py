"""megatron-core 0.16.1 on CPU and gloo: the substitutes it needs, in one place.

megatron-core names CUDA in some fifty places (`torch.cuda.current_device()`, `device="cuda"`,
`tensor.type() == "torch.cuda.FloatTensor"`) although nothing it does for a GPT model needs a GPU.
`install()` gives the loaded `megatron.*` modules a stand-in for the name `torch` that answers those
calls for the CPU. The real `torch` stays as it is for everybody else, except that `Tensor.cuda()` and
`Tensor.type()` look whether their caller is megatron-core.

The random-number helpers matter most: on a CPU build `torch.cuda.manual_seed` is queued and never
runs, so that megatron-core's RNG tracker would silently do nothing. Here they drive the CPU generator.
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
from collections.abc import Iterator

import torch

# Modules that megatron-core imports lazily: loaded here so that they get the stand-in too.
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

# Functions of torch that take `device`.
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
    """An event of the default stream: on a CPU everything before it has happened."""

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
    """The only stream there is: what is issued on it is done at once, in order."""

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


def _build_cuda_module() -> types.ModuleType:
    """The stand-in for `torch.cuda`; every other name is torch.cuda's own."""
    module = types.ModuleType("torch.cuda")
    module.__getattr__ = functools.partial(getattr, torch.cuda)
    module.is_available = lambda: False
    module.current_device = lambda: _CPU
    module.synchronize = lambda *args: None
    module.empty_cache = lambda: None
    module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    module.get_rng_state = _get_rng_state
    module.set_rng_state = _set_rng_state
    module.Event, module.Stream = _CpuEvent, _CpuStream
    module.current_stream = module.default_stream = lambda *args: _CpuStream()
    module.stream = lambda stream: contextlib.nullcontext()
    return module


def _on_cpu(factory):
    """`factory` with `device="cuda"` read as the CPU."""

    @functools.wraps(factory)
    def call(*args, **kwargs):
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return call


def _build_torch_module() -> types.ModuleType:
    """The stand-in for `torch` inside megatron-core."""
    module = types.ModuleType("torch")
    module.__getattr__ = functools.partial(getattr, torch)
    module.cuda = _build_cuda_module()
    for name in _FACTORIES:
        setattr(module, name, _on_cpu(getattr(torch, name)))
    return module


def _called_by_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")


def _patch_tensor_methods() -> None:
    """`Tensor.type()` and `Tensor.cuda()` as megatron-core expects them, for megatron-core alone."""
    original_type, original_cuda = torch.Tensor.type, torch.Tensor.cuda

    @functools.wraps(original_type)
    def tensor_type(self, *args, **kwargs):
        name = original_type(self, *args, **kwargs)
        if isinstance(name, str) and _called_by_megatron():
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    @functools.wraps(original_cuda)
    def tensor_cuda(self, *args, **kwargs):
        return self if _called_by_megatron() else original_cuda(self, *args, **kwargs)

    torch.Tensor.type, torch.Tensor.cuda = tensor_type, tensor_cuda


class _NoRngWarning(logging.Filter):
    """Drops the tracker's warning: here the CPU generator changes because it is the one being tracked."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """megatron-core decorates with torch.compile, which loads the compiler: seconds of start-up, for no fusion."""
    original, torch.compile = torch.compile, lambda function=None, **options: function
    try:
        yield
    finally:
        torch.compile = original


def _keep_freed_memory() -> None:
    """Let glibc re-use a step's memory in the next one: by default large tensors go back to the system each time.

    A step of 2,048 tokens then has 2 page faults instead of 40,000, which is 6 % of its time, and the process is 7 %
    larger. Settings of the environment (MALLOC_...) are left alone.
    """
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def install() -> None:
    """Make the loaded megatron-core run on CPU tensors. Calling it again does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    _keep_freed_memory()
    with _nothing_compiled():
        for name in _LAZY_MODULES:
            importlib.import_module(name)
    stand_in = _build_torch_module()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and module is not None and getattr(module, "torch", None) is torch:
            module.torch = stand_in
    _patch_tensor_methods()
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state, random._set_cuda_rng_state = _get_rng_state, _set_rng_state
    logging.getLogger(random.__name__).addFilter(_NoRngWarning())
