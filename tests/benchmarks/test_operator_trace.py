"""Operators, bytes and live memory counted by hand, eager and as a compiled graph."""

import pytest
import torch
import torch.nn.functional as F
from fake_gpu import _compile_to_graphs
from operator_trace import OperatorTrace
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture
def traced():
    fake, trace = FakeTensorMode(allow_non_fake_inputs=True), OperatorTrace()
    with fake, trace:
        yield trace, fake


def list_operations(trace: OperatorTrace) -> list[tuple]:
    return [(o.name, o.kind, o.flops, sum(o.reads.values()), sum(o.writes.values())) for o in trace.operations]


def test_a_matrix_product_and_elementwise_operations_are_counted(traced):
    trace, _ = traced
    left, right = torch.empty(3, 5, dtype=torch.bfloat16), torch.empty(7, 5, dtype=torch.bfloat16)
    product = left @ right.t()  # the transpose is a view
    product += torch.ones(7, dtype=torch.bfloat16)
    copy = product.float()
    copy.zero_()
    assert list_operations(trace) == [
        ("mm", "gemm", 2 * 3 * 5 * 7, 2 * (15 + 35), 2 * 21),
        ("ones", "elementwise", 0, 0, 14),
        ("add_", "elementwise", 0, 2 * 21 + 14, 2 * 21),
        ("_to_copy", "copy", 0, 2 * 21, 4 * 21),
        ("zero_", "elementwise", 0, 0, 4 * 21),
    ]
    assert trace.operations[0].shape == (3, 7, 5, 1, 2, 2 * (15 + 35 + 21))


def test_an_expanded_tensor_counts_once_and_an_embedding_counts_its_rows(traced):
    trace, _ = traced
    table, ids = torch.empty(1000, 4), torch.zeros(6, dtype=torch.long)
    rows = F.embedding(ids, table)
    rows * torch.empty(1, 1).expand(6, 4)
    assert [(name, read, written) for name, _, _, read, written in list_operations(trace)] == [
        ("zeros", 0, 48),
        ("embedding", 6 * 16 + 48, 6 * 16),
        ("mul", 6 * 16 + 4, 6 * 16),
    ]


def test_peak_bytes_follow_the_live_tensors(traced):
    trace, _ = traced
    kept = torch.empty(256)
    trace.restart()
    for _ in range(3):
        first = kept * 2
        second = first + 1
        del first
    assert trace.peak_bytes() == (4 * 1024, 1024)  # kept, first, second and the second before it
    del second
    assert [total.launches for total in trace.summarize() if total.kind == "elementwise"] == [6]


def test_a_marked_section_includes_its_backward_pass(traced):
    trace, _ = traced
    logits = torch.empty(8, 32, requires_grad=True)
    with trace.mark("loss"):
        loss = F.cross_entropy(logits * 2, torch.zeros(8, dtype=torch.long))
    (loss * 3).backward()
    kinds = {(name, kind) for name, kind, *_ in list_operations(trace)}
    assert {("_log_softmax", "loss"), ("_log_softmax_backward_data", "loss"), ("nll_loss_backward", "loss")} <= kinds
    assert ("mul", "elementwise") in kinds and ("mul", "loss") in kinds


def test_the_optimizer_reads_16_and_writes_12_bytes_per_weight(traced):
    trace, _ = traced
    weight = torch.empty(1000, requires_grad=True)
    weight.grad = torch.empty(1000)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()
    (found,) = [operation for operation in list_operations(trace) if operation[0] == "_fused_adamw_"]
    assert found[3:] == (16 * 1000 + 4, 12 * 1000)


def test_a_compiled_loss_reads_logits_twice_and_writes_their_gradient(traced):
    trace, fake = traced

    def loss(logits, targets):
        return F.cross_entropy(logits.float(), targets, reduction="none")

    compiled = _compile_to_graphs(trace, fake, torch.compile)(loss, dynamic=False)
    logits = torch.empty(512, 4096, dtype=torch.bfloat16, requires_grad=True)
    trace.restart()
    with trace.mark("loss"):
        losses = compiled(logits, torch.zeros(512, dtype=torch.long))
    losses.sum().backward()
    kernels = [kernel for kernel in trace.kernels() if kernel.name == "fused"]
    assert [kernel.kind for kernel in kernels] == ["loss", "loss"]
    bytes_per_logit = [
        (sum(kernel.reads.values()) / logits.numel(), sum(kernel.writes.values()) / logits.numel())
        for kernel in kernels
    ]
    assert bytes_per_logit == [pytest.approx((2, 0), abs=0.02), pytest.approx((2, 2), abs=0.02)]
    peak, before = trace.peak_bytes("loss")
    assert (peak - before) / logits.numel() == pytest.approx(2, abs=0.02)  # the gradient; no fp32 copy is stored
