"""The CUDA kernels of the loss, in Triton's interpreter (TRITON_INTERPRET=1), give the results of the CPU functions."""

import torch

from megatron_cm3leon.model import loss_kernels
from megatron_cm3leon.model.loss import measure_in_chunks, softmax_factors, write_in_chunks

WIDTH = 192


def check_both_passes(dtype: torch.dtype, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, WIDTH, generator=generator).mul_(4).to(dtype)
    targets = torch.tensor([3, -1, columns - 1, 0, -1]).clamp(max=columns - 1)
    found, expected = loss_kernels.measure_logits(logits, targets, columns), measure_in_chunks(logits, targets, columns)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    highest, sums = expected[:2] if columns else (torch.zeros(5), torch.ones(5))
    gradient = torch.rand(5, generator=generator)
    factors = softmax_factors(gradient, highest, sums, 1e-2)
    ours, theirs = logits.clone(), logits.clone()
    loss_kernels.write_gradient(ours, targets, columns, highest, factors, gradient)
    write_in_chunks(theirs, targets, columns, highest, factors, gradient)
    torch.testing.assert_close(ours, theirs, rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-7)
    assert not ours[:, columns:].any()


def check_row_that_starts_with_minus_infinity() -> None:
    logits = torch.randn(1, WIDTH)
    logits[:, :100] = -torch.inf
    highest, sums, _ = loss_kernels.measure_logits(logits, torch.tensor([120]), WIDTH)
    torch.testing.assert_close(sums.log() + highest, logits.logsumexp(-1))


def main() -> None:
    loss_kernels.BLOCK = 64
    for dtype in (torch.float32, torch.bfloat16):
        for columns in (150, WIDTH, 0):
            check_both_passes(dtype, columns)
    check_row_that_starts_with_minus_infinity()
    print("kernels agree")


if __name__ == "__main__":
    main()
