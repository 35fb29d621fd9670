"""Attention written out for short bf16 sequences on a CPU equals torch's."""

import pytest
import torch
import torch.nn.functional as F


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_attention_written_out_equals_torchs(dtype, tolerance):
    from megatron_cm3leon.model.layers import attend_written_out

    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(2, 3, 20, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    weights = torch.randn(2, 3, 20, 16, generator=generator).to(dtype)
    found = attend_written_out(*ours)
    expected = F.scaled_dot_product_attention(*theirs, is_causal=True)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=tolerance, atol=tolerance)
