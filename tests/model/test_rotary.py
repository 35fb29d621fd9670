"""Rotary positions and SwiGLU: values and gradients equal those of the plain formulas in torch."""

import pytest
import torch
import torch.nn.functional as F

from megatron_cm3leon.model.rotary import compute_rotary_angles, rotate


def rotate_by_formula(states_BNSD, positions_BS, base):
    """Rotate as LLaMA of transformers does."""
    width = states_BNSD.shape[-1]
    rates = base ** (torch.arange(0, width, 2).float() / -width)
    angles = positions_BS[:, None, :, None].float() * rates
    angles = torch.cat([angles, angles], dim=-1)
    left, right = states_BNSD.chunk(2, dim=-1)
    rotated = torch.cat([-right, left], dim=-1)
    return (states_BNSD * angles.cos() + rotated * angles.sin()).to(states_BNSD.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_rotation_equals_the_formula(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(2, 3, 7, 8, generator=generator).to(dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    weights = torch.randn(2, 3, 7, 8, generator=generator)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 2, 3, 0]])
    found, expected = (
        rotate(ours, compute_rotary_angles(positions, 8, 100.0)),
        rotate_by_formula(theirs, positions, 100.0),
    )
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)


def test_one_row_of_angles_is_used_for_every_sequence():
    states = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(7)
    shared, per_row = (
        compute_rotary_angles(positions[None], 8, 100.0),
        compute_rotary_angles(positions.expand(2, -1), 8, 100.0),
    )
    assert shared.shape == (2, 1, 7, 4) and torch.equal(rotate(states, shared), rotate(states, per_row))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_swiglu_equals_the_formula(dtype, tolerance):
    from megatron_cm3leon.model.layers import swiglu

    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(5, 2, 12, generator=generator).to(dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    weights = torch.randn(5, 2, 6, generator=generator)
    gate, up = theirs.chunk(2, dim=-1)
    found, expected = swiglu(ours), F.silu(gate) * up
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)
