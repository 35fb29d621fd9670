"""Kernels of the training step on a GPU: cross-entropy, attention per sample, fp8 products."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from megatron_cm3leon.model.fp8 import BACKWARD, FORWARD, multiply, quantize_both_ways
from megatron_cm3leon.model.loss import cross_entropy
from megatron_cm3leon.model.sample_attention import attend_samples, build_sample_mask
from tests.flex_on_cpu import flex_on_cpu

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "rows"), [(9000, 9088), (4096, 4096), (150, 256)])
def test_cross_entropy_equals_that_of_torch(single_rank, device, dtype, columns, rows):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(40, rows, generator=generator) * 3).to(device, dtype).requires_grad_()
    targets = torch.randint(0, columns, (40,), generator=generator).to(device)
    weights = torch.rand(40, generator=generator).to(device)
    found = cross_entropy(logits, targets, columns, single_rank, 0.01)
    (gradient,) = torch.autograd.grad(found, logits, weights)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact[:, :columns], targets, reduction="none")
    z = 0.01 * exact[:, :columns].logsumexp(-1).square()
    (expected_gradient,) = torch.autograd.grad(expected + z, exact, weights.double())
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
    tolerance = {"rtol": 8e-3, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-8}
    torch.testing.assert_close(gradient.double(), expected_gradient, **tolerance)


def test_cross_entropy_needs_no_memory_except_the_logits(single_rank, device):
    if device.type == "cpu":
        pytest.skip("torch does not count the memory of a CPU")
    logits = torch.randn(4096, 65_536, device=device, dtype=torch.bfloat16, requires_grad=True) * 1
    targets = torch.randint(0, 65_536, (4096,), device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = cross_entropy(logits, targets, 65_536, single_rank, 0.01, overwrite=True)
    torch.autograd.grad(losses.sum(), logits)
    assert torch.cuda.max_memory_allocated() - before < 0.01 * logits.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "heads", "groups"), [(64, 4, 2), (96, 2, 2), (128, 2, 1)])
def test_attention_per_sample_equals_masked_attention(device, dtype, width, heads, groups):
    generator, length = torch.Generator().manual_seed(0), 700
    samples = (torch.arange(length) * 4 // length)[None].clone()
    samples[:, 600:] = torch.randint(0, 4, (100,), generator=generator)  # CM3 masking moves spans to the end
    samples = samples.to(device)
    states = [
        torch.randn(1, count, length, width, generator=generator).to(device, dtype).requires_grad_()
        for count in (heads, groups, groups)
    ]
    weights = torch.randn(1, heads, length, width, generator=generator).to(device, dtype)
    allowed = (samples[:, :, None] == samples[:, None]).tril()[:, None]
    expected = F.scaled_dot_product_attention(*states, attn_mask=allowed, enable_gqa=True)
    with flex_on_cpu() if device.type == "cpu" else nullcontext():
        found = attend_samples(*states, build_sample_mask(samples), None)
        gradients = torch.autograd.grad(found, states, weights)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5 if device.type == "cpu" else 1e-4  # three TF32 products
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, states, weights), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(
    ("left", "dtype"), [(FORWARD, torch.bfloat16), (BACKWARD, torch.bfloat16), (BACKWARD, torch.float32)]
)
def test_fp8_products_equal_those_of_the_cpu(device, left, dtype):
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this GPU has no fp8")
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator).bfloat16() for shape in ((64, 256), (96, 256))]
    results = []
    for target in (torch.device("cpu"), device):
        (left_rows, left_transposed), (right_rows, right_transposed) = (
            quantize_both_ways(each.to(target), kind) for each, kind in zip(matrices, (left, FORWARD), strict=True)
        )
        results.append(
            (left_rows, right_rows, left_transposed, right_transposed, multiply(left_rows, right_rows, dtype).cpu())
        )
    for ours, theirs in zip(*(each[:4] for each in results), strict=True):
        assert torch.equal(ours.values.float().cpu(), theirs.values.float().cpu())
        assert ours.inverse.cpu() == theirs.inverse.cpu()
    torch.testing.assert_close(results[1][4], results[0][4], rtol=1e-2, atol=1e-2 * float(results[0][4].std()))
