"""Rotary positions (RoFormer, arXiv 2104.09864): angles once per forward pass, queries and keys rotated in each layer.

Layout legend: B batch, S sequence of this rank, N heads, D width of a head.
"""

import torch


def compute_rotary_angles(positions_BS: torch.Tensor, width: int, base: float) -> torch.Tensor:
    """Cosine and sine of the angles of `width` / 2 pairs of dimensions, fp32 [2, B, S, width / 2]."""
    rates = base ** (torch.arange(0, width, 2, device=positions_BS.device, dtype=torch.float32) / -width)
    angles = positions_BS[..., None].float() * rates
    return torch.stack([angles.cos(), angles.sin()])


def rotate_pairs(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate dimensions d and d + D / 2 of states [..., S, D] by angles [..., S, D / 2]; result in their dtype."""
    left, right = states.chunk(2, dim=-1)
    return torch.cat([left * cosine - right * sine, right * cosine + left * sine], dim=-1).to(states.dtype)


class _Rotation(torch.autograd.Function):
    """The gradient is rotated by the negative angles: as many passes as forward; only the angles are saved."""

    @staticmethod
    def forward(ctx, states, cosine, sine):
        ctx.save_for_backward(cosine, sine)
        return rotate_pairs(states, cosine, sine)

    @staticmethod
    def backward(ctx, gradient):
        cosine, sine = ctx.saved_tensors
        return rotate_pairs(gradient, cosine, -sine), None, None


def rotate(states_BNSD: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys by `angles` of compute_rotary_angles, in fp32; result in the dtype of the states.

    Dimension d is paired with d + D / 2, as in the LLaMA classes of Hugging Face.
    """
    cosine, sine = angles[:, :, None]
    if torch.compiler.is_compiling():
        return rotate_pairs(states_BNSD, cosine, sine)  # the compiler fuses it with its neighbors, both ways
    return _Rotation.apply(states_BNSD, cosine, sine)
