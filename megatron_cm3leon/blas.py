"""One thread for the small matrix products of NumPy.

BLAS gives every product that is not tiny to all cores, and waits for the slowest of them. For thousands of small
products in a row that gains little on an idle machine; beside other work each waits for a time slice: the filters of
the neighbor table took 51 ms per document instead of 8 (256 candidates of width 512, two busy cores). The results are
identical: a product is cut along its rows and columns, not along its sums.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import ThreadpoolController


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Inside the `with`, or the function that it decorates, NumPy's products take one thread of this process."""
    with _find_libraries().limit(limits=1, user_api="blas"):
        yield


@functools.cache
def _find_libraries() -> ThreadpoolController:
    """The BLAS libraries of this process, looked for once: that takes milliseconds, a limit microseconds."""
    return ThreadpoolController()
