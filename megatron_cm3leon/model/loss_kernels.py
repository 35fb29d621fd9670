"""Triton kernels for the two passes of the cross-entropy over the logits on CUDA; loss.py defines what they compute.

`measure_logits` reads each logit once; `write_gradient` reads it once and overwrites it with its gradient. Both also
run in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1), which tests use.

Layout legend: T tokens, P columns of the logits.
"""

import contextlib

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Logits of a row per iteration of a program: 32 per thread."""
WARPS = 4


@triton.jit
def _measure(logits, stride, targets, measured, tokens, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """One row per program: running maximum and sum of exponentials relative to it, in blocks of BLOCK logits."""
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * stride
    highest = float("-inf")
    total = 0.0
    for start in range(0, COLUMNS, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        scores = tl.load(row + columns, mask=columns < COLUMNS, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(scores, axis=0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # 0 while all logits are -inf
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(scores - shift), axis=0)
        highest = higher
    target = tl.load(targets + token)
    chosen = tl.load(row + target, mask=target >= 0, other=0.0).to(tl.float32)
    tl.store(measured + token, highest)
    tl.store(measured + tokens + token, total)
    tl.store(measured + 2 * tokens + token, chosen)


@triton.jit
def _write(
    logits, stride, targets, highest, factors, gradient, width, blocks, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """One block of a row per program."""
    token = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = logits + token.to(tl.int64) * stride
    scores = tl.load(row + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)
    values = tl.exp(scores - tl.load(highest + token)) * tl.load(factors + token)
    values = tl.where(columns == tl.load(targets + token), values - tl.load(gradient + token), values)
    values = tl.where(columns < COLUMNS, values, 0.0)
    tl.store(row + columns, values.to(logits.dtype.element_ty), mask=columns < width)


def measure_logits(logits_TP: torch.Tensor, targets: torch.Tensor, columns: int) -> torch.Tensor:
    """See loss.measure_logits."""
    tokens, width = logits_TP.shape
    measured = torch.empty(3, tokens, device=logits_TP.device)
    with _on_device_of(logits_TP):
        _measure[(tokens,)](
            logits_TP,
            _stride(logits_TP),
            targets,
            measured,
            tokens,
            COLUMNS=columns,
            BLOCK=_block(width),
            num_warps=WARPS,
        )
    return measured


def write_gradient(logits_TP: torch.Tensor, targets: torch.Tensor, columns: int, *of_tokens: torch.Tensor) -> None:
    """See loss.write_gradient; `of_tokens`: highest, factors, gradient."""
    tokens, width = logits_TP.shape
    blocks = triton.cdiv(width, _block(width))
    highest, factors, gradient = (each.contiguous() for each in of_tokens)
    with _on_device_of(logits_TP):
        _write[(tokens * blocks,)](
            logits_TP,
            _stride(logits_TP),
            targets,
            highest,
            factors,
            gradient,
            width,
            blocks,
            COLUMNS=columns,
            BLOCK=_block(width),
            num_warps=WARPS,
        )


def _block(width: int) -> int:
    return min(BLOCK, triton.next_power_of_2(width))


def _stride(logits_TP: torch.Tensor) -> int:
    assert logits_TP.stride(1) == 1, "the logits of a row must be contiguous"
    return logits_TP.stride(0)


def _on_device_of(tensor: torch.Tensor):
    """Context in which the tensor's GPU is the current device, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
