"""Head and loss in chunks: the same losses and gradients as with all logits at once, memory for one chunk of logits."""

import pytest
import torch

from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.model.head import _ChunkedLosses
from megatron_cm3leon.model.loss import cross_entropy
from megatron_cm3leon.model.memory import estimate_memory
from tests.recording import MemoryRecorder

TOKENS, WIDTH, ROWS, VOCABULARY_SIZE, Z_LOSS = 96, 16, 512, 450, 0.01


def make_example(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS // 2, 2, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY_SIZE, (TOKENS,), generator=generator)
    return hidden, weight, targets, torch.rand(TOKENS, generator=generator)


def compute_chunked_losses(hidden, weight, main_grad, targets, group, chunk: int):
    settings = VOCABULARY_SIZE, group, False, Z_LOSS, chunk, weight.requires_grad
    return _ChunkedLosses.apply(hidden, weight, main_grad, targets, *settings)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("chunk", [7, 96, 1000])
def test_chunks_give_the_same_losses_and_gradients_as_all_logits_at_once(single_rank, dtype, tolerance, chunk):
    hidden, weight, targets, weights = make_example(dtype)
    logits = hidden.view(TOKENS, WIDTH) @ weight.t()
    expected = cross_entropy(logits, targets, VOCABULARY_SIZE, single_rank, Z_LOSS)
    found = compute_chunked_losses(hidden, weight, None, targets, single_rank, chunk)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(found, (hidden, weight), weights),
        torch.autograd.grad(expected, (hidden, weight), weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_weight_gradients_are_added_to_the_main_gradient(single_rank):
    hidden, weight, targets, weights = make_example(torch.bfloat16)
    (expected,) = torch.autograd.grad(
        compute_chunked_losses(hidden, weight, None, targets, single_rank, 7), weight, weights
    )
    main_grad = torch.ones(ROWS, WIDTH)
    compute_chunked_losses(hidden, weight, main_grad, targets, single_rank, 7).backward(weights)
    torch.testing.assert_close(main_grad - 1, expected.float(), rtol=8e-3, atol=8e-3)


def test_a_frozen_weight_has_no_gradient(single_rank):
    hidden, weight, targets, weights = make_example(torch.float32)
    gradients = []
    for trains in (True, False):
        losses = compute_chunked_losses(hidden, weight.detach().requires_grad_(trains), None, targets, single_rank, 7)
        gradients += torch.autograd.grad(losses, hidden, weights)
    assert torch.equal(*gradients)


def test_peak_memory_is_that_of_one_chunk(single_rank):
    hidden, weight, targets, weights = make_example(torch.float32)
    peaks = []
    for chunk in (TOKENS, 8):
        with MemoryRecorder() as recorder:
            compute_chunked_losses(hidden, weight, None, targets, single_rank, chunk).backward(weights)
        peaks.append(recorder.peak)
    assert peaks[0] > TOKENS * ROWS * 4
    assert peaks[1] < 8 * ROWS * 4 + 3 * weight.nbytes + 2 * hidden.nbytes


def test_the_memory_plan_counts_the_logits_of_one_chunk():
    plans = []
    for chunk in (0, 1000, 1 << 20):
        config = load_config(None, ["preset=350m", "train.micro_batch_size=4", f"train.head_chunk={chunk}"])
        validate_config(config, 1)
        plans.append(estimate_memory(config, 65_536, 1, 0).activations)
    tokens = 4 * 4096
    assert plans[0] == plans[2]
    assert plans[0] - plans[1] == (tokens - 1000) * 65_536 * 2


def test_a_negative_chunk_is_rejected():
    config = load_config(None, ["train.head_chunk=-1"])
    with pytest.raises(ValueError, match=r"train.head_chunk \(-1\) must be at least 0"):
        validate_config(config, 1)
