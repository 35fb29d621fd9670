"""Record every operator that runs on fake tensors: floating-point operations, bytes read and written, live bytes.

    with OperatorTrace() as trace:
        ...                                   # anything on fake tensors
    for total in trace.summarize(fused=True): ...

The bytes of an operator are those of its inputs and of its outputs. Each tensor counts once, an expanded dimension as
one element, a view as nothing. A look-up of rows (embedding, gather) reads the rows that it returns.

Eager code is counted per operator. A graph that `run_graph` executes (a graph that torch.compile has traced) is counted
per kernel: all operators between two that inductor leaves to libraries (matrix products, attention, custom operators)
are one kernel, which reads each external tensor once and writes each tensor once that is read outside of it later.
Inductor splits such a group where loops differ (a reduction over rows and one over columns), so the counted traffic is
a lower bound.
"""

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

KINDS = ("gemm", "attention", "loss", "elementwise", "copy", "weight_gradient_add", "optimizer")
"""Kinds, in the order of a table's rows. `elementwise` includes norms and look-ups, `copy` moves and conversions."""

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "_scaled_mm"}
COPIES = {"clone", "copy_", "_to_copy", "cat", "stack", "_foreach_copy_", "constant_pad_nd", "split_with_sizes_copy"}
UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
LOOKUPS = {"embedding", "index", "index_select", "gather"}
OVERWRITES = {"copy_", "zero_", "fill_", "_foreach_zero_", "_foreach_copy_", "normal_", "uniform_", "random_"}
"""Operators that write their first argument without reading it."""
COMPOSED = {"megatron_cm3leon::product", "megatron_cm3leon::gradients"}
"""Custom operators that call others (model/linear.py), which are recorded instead; all other ones are one kernel."""
OLDER = -1
"""`born` of a storage that is older than the recording."""


@dataclass
class Operation:
    """One operator, or one fused kernel. Storages are numbered in the order of their first use."""

    name: str
    kind: str
    flops: int = 0
    reads: dict[int, int] = field(default_factory=dict)
    """Number of the storage -> bytes."""
    writes: dict[int, int] = field(default_factory=dict)
    graph: int = 0
    """Number of the execution of a compiled graph that contains it; 0 for eager code."""
    shape: tuple = ()
    """Product: M, N, K, batch, bytes per element, all bytes. Attention: batch, heads, groups, S, D, pass."""


@dataclass
class Lifetime:
    """A storage that exists from operation `born` to operation `died`; `died` is None if it still exists."""

    bytes: int
    born: int
    died: int | None = None


@dataclass
class Total:
    """All operations of one kind."""

    kind: str
    launches: int = 0
    flops: int = 0
    read: int = 0
    written: int = 0


class OperatorTrace(TorchDispatchMode):
    """Records operators while it is active and `recording`; tracks storages whenever it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.lifetimes: dict[int, Lifetime] = {}
        self.recording = True
        self.section = ""
        """Kind of elementwise operators, set by `mark`; empty: by operator."""
        self.gradients: set[int] = set()
        """Storages that weight gradients are added to."""
        self._count = 0
        self._numbers: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}
        self._graph, self._graphs = 0, 0
        self._forwards: list[tuple[int, int, str]] = []

    # --------------------------------------------------------------- recording

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        options = options or {}
        if operator.name() in COMPOSED:
            with self, self._in_graph(0):  # the operators that it calls are eager, also in a compiled graph
                return OPDEFS[operator.name()]._init_fn(*arguments, **options)
        if operator.name() == "aten::matmul":  # nothing below autograd has decomposed it
            with self:
                return operator.decompose(*arguments, **options)
        inputs = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, FakeTensor)]
        before = {self.number(leaf) for leaf in inputs}
        result = operator(*arguments, **options)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor)]
        fresh = {self.number(leaf): _touched(leaf) for leaf in outputs if self.number(leaf) not in before}
        if self.recording and operator.namespace != "prim":
            self._record(operator, arguments, options, inputs, fresh)
        return result

    def number(self, tensor: torch.Tensor) -> int:
        """Number of the tensor's storage."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            self._count += 1
            self._numbers[key] = number = self._count
            self.lifetimes[number] = Lifetime(storage.nbytes(), len(self.operations))

            def forget(_, key=key, number=number) -> None:
                self.lifetimes[number].died = len(self.operations)
                del self._numbers[key], self._references[key]

            self._references[key] = weakref.ref(storage, forget)
        return self._numbers[key]

    def _record(self, operator, arguments, options, inputs: list, fresh: dict[int, int]) -> None:
        """Append the operation; `fresh`: new storages -> bytes."""
        name = operator._schema.name.split("::")[1]
        changed = _changed_arguments(operator, arguments, options)
        if not changed and (not fresh or name in UNWRITTEN):
            return  # a view, or memory without values
        reads, writes = Counter(), Counter(fresh)
        for leaf in inputs:
            reads[self.number(leaf)] += _touched(leaf)
        for leaf in changed:
            writes[self.number(leaf)] += _touched(leaf)
        if name in OVERWRITES:
            reads -= Counter(writes)
        if name in LOOKUPS and inputs:
            reads[self.number(inputs[0])] = sum(fresh.values())
        if name in (
            "_fused_adamw_",
            "_fused_adam_",
        ):  # the schema marks gradients as written, but only a scaler writes them
            for leaf in arguments[1]:
                del writes[self.number(leaf)]
        flops, shape = _count_work(operator, name, arguments)
        if name in PRODUCTS:
            shape = (*shape, sum(reads.values()) + sum(writes.values()))
        kind = self._classify(operator, name, flops, changed)
        self.operations.append(Operation(name, kind, flops, dict(reads), dict(writes), self._graph, shape))

    def _classify(self, operator, name: str, flops: int, changed: list) -> str:
        if flops:
            return "attention" if "attention" in name else "gemm"
        section = self.section or self._section_of_backward()
        if section:
            return section
        if name == "add_" and self.number(changed[0]) in self.gradients:
            return "weight_gradient_add"
        return "copy" if name in COPIES else "elementwise"

    # ---------------------------------------------------------------- sections

    @contextlib.contextmanager
    def mark(self, section: str) -> Iterator[None]:
        """Operators inside, and those of their backward pass, get this kind; products and attention keep their own."""
        start, before = torch.autograd._get_sequence_nr(), self.section
        self.section = section
        try:
            yield
        finally:
            self.section = before
            self._forwards.append((start, torch.autograd._get_sequence_nr(), section))

    def _section_of_backward(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return ""
        number = node._sequence_nr()
        return next((section for start, stop, section in self._forwards if start <= number < stop), "")

    def run_graph(self, graph, arguments: list):
        """Execute a traced graph; its operators are counted as inductor would fuse them."""
        self._graphs += 1
        entered = self in _get_current_dispatch_mode_stack()
        with self._in_graph(self._graphs), contextlib.nullcontext() if entered else self:
            return graph(*arguments)

    @contextlib.contextmanager
    def _in_graph(self, number: int) -> Iterator[None]:
        before, self._graph = self._graph, number
        try:
            yield
        finally:
            self._graph = before

    def restart(self) -> None:
        """Delete the operations so far; storages that exist are kept, as older than the recording."""
        self.operations.clear()
        self._forwards.clear()
        self.lifetimes = {n: Lifetime(life.bytes, OLDER) for n, life in self.lifetimes.items() if life.died is None}

    # ----------------------------------------------------------------- results

    def kernels(self) -> list[Operation]:
        """All operations; those of compiled graphs are fused."""
        return [group[0] if len(group) == 1 else self._fuse(group) for group in self._group()]

    def _group(self) -> list[list[Operation]]:
        groups: list[list[Operation]] = []
        for operation in self.operations:
            joins = groups and operation.graph and groups[-1][-1].graph == operation.graph
            if joins and _is_fusable(operation) and _is_fusable(groups[-1][-1]):
                groups[-1].append(operation)
            else:
                groups.append([operation])
        return groups

    def _fuse(self, group: list[Operation]) -> Operation:
        reads, written = {}, {}
        for operation in group:
            for storage, size in operation.reads.items():
                if storage not in written:
                    reads[storage] = max(size, reads.get(storage, 0))
            written |= {storage: max(size, written.get(storage, 0)) for storage, size in operation.writes.items()}
        inside = {id(operation) for operation in group}
        needed = self._read_outside(inside)
        kept = {storage: size for storage, size in written.items() if storage in needed}
        kind = "loss" if any(operation.kind == "loss" for operation in group) else "elementwise"
        return Operation("fused", kind, 0, reads, kept, group[0].graph)

    def _read_outside(self, inside: set[int]) -> set[int]:
        """Storages that an operation outside reads, or that are older than the recording or still exist."""
        if not hasattr(self, "_readers") or self._readers[0] != len(self.operations):
            readers: dict[int, set[int]] = {}
            for operation in self.operations:
                for storage in operation.reads:
                    readers.setdefault(storage, set()).add(id(operation))
            self._readers = len(self.operations), readers
        lasting = {n for n, life in self.lifetimes.items() if life.died is None or life.born == OLDER}
        return lasting | {storage for storage, users in self._readers[1].items() if users - inside}

    def summarize(self) -> list[Total]:
        """Totals by kind, in the order of KINDS."""
        totals = {kind: Total(kind) for kind in KINDS}
        for operation in self.kernels():
            total = totals[operation.kind]
            total.launches += 1
            total.flops += operation.flops
            total.read += sum(operation.reads.values())
            total.written += sum(operation.writes.values())
        return list(totals.values())

    def peak_bytes(self, kind: str = "") -> tuple[int, int]:
        """(peak of live bytes, live bytes before the first operation); with `kind`, only over operations of that kind.

        Tensors inside a fused kernel take no memory.
        """
        groups = self._group()
        stored = {n for group in groups for n in (self._fuse(group) if len(group) > 1 else group[0]).writes}
        inner = {n for group in groups if len(group) > 1 for o in group for n in o.writes} - stored
        changes, positions = Counter(), [i for i, o in enumerate(self.operations) if kind in ("", o.kind)]
        for number, life in self.lifetimes.items():
            if number not in inner:
                changes[life.born] += life.bytes
                if life.died is not None:
                    changes[life.died] -= life.bytes
        live, total = [], changes[OLDER]
        for position in range(len(self.operations) + 1):
            total += changes[position]
            live.append(total)
        if not positions:
            return 0, 0
        return max(live[i] for i in positions), live[positions[0] - 1] if positions[0] else changes[OLDER]


def _is_fusable(operation: Operation) -> bool:
    custom = {name.split("::")[1] for name in OPDEFS if name.startswith("megatron_cm3leon::")}
    return not operation.flops and operation.name not in {"embedding_dense_backward", "sort", "topk", *custom}


def _touched(tensor: torch.Tensor) -> int:
    """Bytes of the elements of a tensor; an expanded dimension counts as one element."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride or not size) * tensor.element_size()


def _changed_arguments(operator, arguments, options) -> list[FakeTensor]:
    """Tensors among the arguments that the operator writes according to its schema."""
    found = []
    for position, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = arguments[position] if position < len(arguments) else options.get(argument.name)
            found += [leaf for leaf in tree_leaves(given) if isinstance(leaf, FakeTensor)]
    return found


def _count_work(operator, name: str, arguments) -> tuple[int, tuple]:
    """Floating-point operations of a product or of attention, and its shape; (0, ()) for other operators."""
    tensors = [leaf for leaf in arguments if isinstance(leaf, torch.Tensor)]
    if name in PRODUCTS:
        left, right = tensors[1:3] if name.startswith(("addmm", "baddbmm")) else tensors[:2]
        batch = left.shape[0] if left.dim() == 3 else 1
        (rows, inner), columns = left.shape[-2:], right.shape[-1]
        return 2 * batch * rows * inner * columns, (rows, columns, inner, batch, left.element_size())
    if operator.namespace == "operator_record" and name.startswith("attention"):
        query, key = tensors[:2]
        batch, heads, length, width = query.shape
        share = 1 if len(tensors) in (4, 7) else 0.5  # with a mask, the complete square is computed
        backward = name.endswith("backward")
        flops = (10 if backward else 4) * batch * heads * length * key.shape[2] * width * share
        return int(flops), (batch, heads, key.shape[1], length, width, "backward" if backward else "forward")
    return 0, ()
