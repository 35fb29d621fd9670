"""A CPU instead of a GPU: operations are recorded one by one and replayed without Python.

As with a CUDA graph, a replay uses the tensors of the recording, and every Python value that it had: a value that must
not depend on the host, but does, gives a wrong token. As there, recording changes no tensor, and fails where the host
reads a value or creates a tensor from its own numbers.
"""

from collections import deque
from types import SimpleNamespace

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

HOST_READS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero")
REFUSED = (*HOST_READS, "aten::lift_fresh", "aten::nonzero", "aten::masked_select", "aten::_unique2")


class Recorder:
    """The interface of `CudaGraphs`, for a CPU."""

    def __init__(self, free: int = 1 << 30) -> None:
        self.free, self.recordings, self.released, self.waits = free, [], 0, 0

    def run(self, work) -> None:
        work()

    def record(self, work, beside=None) -> "Recording":
        assert beside is None or beside in self.recordings
        recording = Recording()
        with recording:
            work()
        recording.undo()
        self.recordings.append(recording)
        return recording

    def free_bytes(self) -> int:
        return self.free

    def release(self) -> None:
        self.released += 1

    def mark(self):
        return SimpleNamespace(synchronize=self._wait)

    def _wait(self) -> None:
        self.waits += 1


class Recording(TorchDispatchMode):
    """Operations in their order, with the arguments of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.allocated, self.before = [], set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function._schema.name not in REFUSED, f"{function} needs the host while a step is recorded"
        kwargs = kwargs or {}
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._save(value)
        inputs = {storage_of(tensor) for tensor in tensors_of((args, kwargs))}
        result = function(*args, **kwargs)
        self.allocated |= {storage_of(tensor) for tensor in tensors_of(result)} - inputs
        self.calls.append((function, args, kwargs, result))
        return result

    def _save(self, tensor: Tensor) -> None:
        """Save the values of memory that the recording did not allocate, before it is written to."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.allocated | self.before.keys():
            self.before[storage.data_ptr()] = (storage, storage.clone())

    def undo(self) -> None:
        for storage, before in self.before.values():
            storage.copy_(before)
        self.before.clear()

    def replay(self) -> None:
        replaced = {}
        for function, args, kwargs, result in self.calls:
            args, kwargs = tree_map_only(Tensor, lambda tensor: replaced.get(id(tensor), tensor), (args, kwargs))
            new_result = function(*args, **kwargs)
            pairs = zip(tensors_of(result), tensors_of(new_result), strict=True)
            deque((replaced.update({id(old): new}) for old, new in pairs), maxlen=0)


def tensors_of(tree) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> int:
    """Address of the memory of a tensor; 0 for a tensor in a layout of oneDNN."""
    return 0 if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()
