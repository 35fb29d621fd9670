"""MemoryRecorder: bytes that operators read, write and keep allocated while they run on a CPU."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WRITE_ONLY = {"copy_", "zero_", "fill_"}
"""Operators that write their first argument without reading it."""
_PARTIAL_READS = {"gather", "index", "embedding"}
"""Operators that read only those elements of their first argument that they return."""
_ALLOCATE_ONLY = {"empty", "empty_like", "new_empty", "empty_strided"}
"""Operators that allocate a tensor without writing it."""


class MemoryRecorder(TorchDispatchMode):
    """A context manager that sums the bytes that operators read and write, except those that only create views.

    Storages of at most `cached` bytes stay in the processor's cache: they are not counted as read or written, but as
    allocated.
    """

    def __init__(self, cached: int = 0) -> None:
        super().__init__()
        self.cached = cached
        self.read = self.written = 0
        """Bytes."""
        self.live = self.peak = 0
        """Bytes of the storages that were allocated in this context and still exist, and their maximum."""
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        options = options or {}
        inputs = _tensors((arguments, options))
        for tensor in inputs:
            self._known.setdefault(tensor.untyped_storage()._cdata, weakref.ref(tensor.untyped_storage()))
        result = operator(*arguments, **options)
        outputs = _tensors(result)
        for tensor in outputs:
            self._follow(tensor)
        name = operator._schema.name.split("::")[1]
        changed = [
            tensor
            for position, argument in enumerate(operator._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(arguments[position] if position < len(arguments) else options.get(argument.name))
        ]
        before = {tensor.untyped_storage()._cdata for tensor in inputs}
        fresh = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in before]
        if changed or (fresh and name not in _ALLOCATE_ONLY):
            not_read = changed if name in _WRITE_ONLY or "out" in options else []
            not_read = inputs[:1] if name in _PARTIAL_READS else not_read
            self.read += sum(self._size(tensor) for tensor in inputs if all(tensor is not each for each in not_read))
            self.read += sum(map(self._size, fresh)) if name in _PARTIAL_READS else 0
            self.written += sum(self._size(tensor) for tensor in (changed or fresh))
        return result

    def _size(self, tensor: torch.Tensor) -> int:
        return tensor.nbytes if tensor.untyped_storage().nbytes() > self.cached else 0

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def forget(_) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


def _tensors(values) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
