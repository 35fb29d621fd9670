"""One thread for small matrix products: of NumPy, and of small models on the CPU.

BLAS and OpenMP give every product that is not tiny to all cores, and wait for the slowest of them. For thousands of
small products in a row that gains little on an idle machine; beside other work each waits for a time slice: the
filters of the neighbor table took 51 ms per document instead of 8 (256 candidates of width 512, two busy cores). The
results are identical: a product is cut along its rows and columns, not along its sums.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import ThreadpoolController
from torch import nn

SMALL_MODEL = 1_000_000
"""Parameters up to which a model on the CPU computes with one thread."""


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Inside the `with`, or the function that it decorates, NumPy's products take one thread of this process."""
    with _find_libraries().limit(limits=1, user_api="blas"):
        yield


@functools.cache
def _find_libraries() -> ThreadpoolController:
    """The BLAS libraries of this process, looked for once: that takes milliseconds, a limit microseconds."""
    return ThreadpoolController()


@contextmanager
def one_thread_if_small(model: nn.Module) -> Iterator[None]:
    """Inside the `with` torch takes one thread where `model` is on the CPU and has at most SMALL_MODEL parameters."""
    before = torch.get_num_threads()
    parameters = list(model.parameters())
    small = sum(each.numel() for each in parameters) <= SMALL_MODEL
    if before == 1 or not small or any(each.device.type != "cpu" for each in parameters):
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
