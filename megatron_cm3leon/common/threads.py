"""One thread for small matrix products: of NumPy, and of small models on the CPU.

BLAS and OpenMP distribute every product that is not tiny over all cores and wait for the slowest one. For thousands of
small products that gains little on an idle machine, and on a busy one each product waits for a time slice: the filters
of the neighbor table took 51 ms per document instead of 8 (256 candidates of width 512, two busy cores). The results
are identical: a product is divided along its rows and columns, not along its sums.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import ThreadpoolController
from torch import nn

SMALL_MODEL = 1_000_000
"""Largest number of parameters of a model that computes with one thread on the CPU."""


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Inside the `with`, or the function that it decorates, products of NumPy use one thread of this process."""
    with _find_libraries().limit(limits=1, user_api="blas"):
        yield


@functools.cache
def _find_libraries() -> ThreadpoolController:
    """The BLAS libraries of this process, found once: that takes milliseconds, setting a limit microseconds."""
    return ThreadpoolController()


@contextmanager
def one_thread_if_small(model: nn.Module) -> Iterator[None]:
    """Inside the `with` torch uses one thread if `model` is on the CPU and has at most SMALL_MODEL parameters."""
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
