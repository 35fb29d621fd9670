"""Rotary positions (RoFormer, arXiv 2104.09864): angles once per forward pass, queries and keys turned in each layer.

Layout legend: B batch, S sequence of this rank, N heads, D width of a head.
"""

import torch


def compute_rotary_angles(positions_BS: torch.Tensor, width: int, base: float) -> torch.Tensor:
    """Cosine and sine of the angles of `width` / 2 pairs, fp32 [2, B, S, width / 2]."""
    rates = base ** (torch.arange(0, width, 2, device=positions_BS.device, dtype=torch.float32) / -width)
    angles = positions_BS[..., None].float() * rates
    return torch.stack([angles.cos(), angles.sin()])


def _turn(states_BNSD: torch.Tensor, cosine_B1SD: torch.Tensor, sine_B1SD: torch.Tensor) -> torch.Tensor:
    left, right = states_BNSD.chunk(2, dim=-1)
    turned = [left * cosine_B1SD - right * sine_B1SD, right * cosine_B1SD + left * sine_B1SD]
    return torch.cat(turned, dim=-1).to(states_BNSD.dtype)


class _Rotation(torch.autograd.Function):
    """The gradient turns back by the same angles: as few passes as forward, nothing kept but the angles."""

    @staticmethod
    def forward(ctx, states, cosine, sine):
        ctx.save_for_backward(cosine, sine)
        return _turn(states, cosine, sine)

    @staticmethod
    def backward(ctx, gradient):
        cosine, sine = ctx.saved_tensors
        return _turn(gradient, cosine, -sine), None, None


def rotate(states_BNSD: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn dimension d with d + D / 2, as LLaMA's Hugging Face form pairs them; in fp32, the result in their type."""
    cosine, sine = angles[:, :, None]
    if torch.compiler.is_compiling():
        return _turn(states_BNSD, cosine, sine)  # one kernel with what is around it, both ways
    return _Rotation.apply(states_BNSD, cosine, sine)
