"""Attention on a CPU for short bf16 sequences and narrow heads equals that of torch."""

import pytest
import torch
import torch.nn.functional as F


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_unfused_attention_equals_that_of_torch(dtype, tolerance):
    from megatron_cm3leon.model.attention import attend_unfused

    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(2, 3, 20, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    weights = torch.randn(2, 3, 20, 16, generator=generator).to(dtype)
    found = attend_unfused(*ours)
    expected = F.scaled_dot_product_attention(*theirs, is_causal=True)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for tensor, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(tensor.grad, reference.grad, rtol=tolerance, atol=tolerance)


def test_the_gradient_of_narrow_bf16_heads_is_computed_in_fp32():
    """It is closer to the fp32 gradient than the bf16 gradient of torch, whose kernel is also slower."""
    from megatron_cm3leon.model.attention import _AttentionWithFp32Gradient

    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 3, 40, 16, generator=generator) for _ in range(3)]
    weights = torch.randn(2, 3, 40, 16, generator=generator)
    gradients = {}
    for name, dtype in (("exact", torch.float32), ("ours", torch.bfloat16), ("torch", torch.bfloat16)):
        inputs = [state.bfloat16().to(dtype).requires_grad_() for state in states]
        if name == "ours":
            output = _AttentionWithFp32Gradient.apply(*inputs, None)
        else:
            output = F.scaled_dot_product_attention(*inputs, is_causal=True)
        (output.float() * weights.bfloat16().float()).sum().backward()
        gradients[name] = torch.cat([each.grad.float().flatten() for each in inputs])
        assert all(each.grad.dtype == dtype for each in inputs)
    exact = gradients.pop("exact")
    errors = {name: float((found - exact).norm() / exact.norm()) for name, found in gradients.items()}
    assert errors["ours"] <= errors["torch"] < 0.02, errors


def test_dropout_drops_weights_and_keeps_their_mean():
    from megatron_cm3leon.model.attention import attend_unfused

    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 12, 16, generator=generator) for _ in range(2))
    value = torch.eye(12)[None, None]  # the result is the attention weights
    without_dropout = attend_unfused(query, key, value)
    torch.manual_seed(0)
    draws = torch.stack([attend_unfused(query, key, value, dropout=0.25) for _ in range(4000)])
    assert (draws[..., 11, :] == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(draws.mean(0), without_dropout, rtol=0, atol=0.03)
