"""What both engines do with a global batch beside forward and backward: weights, sums of losses, dropout's seed."""

import math

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_cm3leon.data.loader import MicroBatch
from megatron_cm3leon.engine.base import StepMetrics
from megatron_cm3leon.tokenizers.vocab import Vocabulary


def loss_scale(micro_batches: list[MicroBatch], device: torch.device, group: dist.ProcessGroup) -> torch.Tensor:
    """1 / sum of weights over the global batch, whose parts the ranks of `group` hold; fp32, not waited for."""
    weight = torch.zeros((), dtype=torch.float64)
    for micro_batch in micro_batches:
        weight += micro_batch.loss_weights.double().sum()
    weight = weight.to(device, non_blocking=True)
    dist.all_reduce(weight, group=group)
    return (1.0 / weight.clamp_min(1e-30)).float()


def sum_losses(weighted, labels, weights, trimmed: float, vocabulary: Vocabulary) -> torch.Tensor:
    """Of one micro-batch, fp64 [8]: loss, text loss, image loss, the three weights, targets that count, trimmed tokens.

    weighted: weight x loss of each token; labels, weights: the same shape; trimmed: this rank's share of the tokens.
    """
    text, image = vocabulary.is_text(labels), vocabulary.is_image(labels)
    return torch.stack(
        [
            weighted.sum(dtype=torch.float64),
            (weighted * text).sum(dtype=torch.float64),
            (weighted * image).sum(dtype=torch.float64),
            weights.sum(dtype=torch.float64),
            (weights * text).sum(dtype=torch.float64),
            (weights * image).sum(dtype=torch.float64),
            (weights > 0).sum().double(),
            torch.full((), trimmed, dtype=torch.float64, device=weights.device),  # a copy would wait for the device
        ]
    )


def to_metrics(sums: list[float], norm: float, stepped: bool) -> StepMetrics:
    """Metrics of a global batch from the sums of `sum_losses` over its micro-batches and ranks."""
    loss, text, image, weight, text_weight, image_weight, tokens, trimmed = sums

    def mean(total: float, weights: float) -> float:
        return total / weights if weights else math.nan

    return StepMetrics(
        loss=mean(loss, weight),
        loss_text=mean(text, text_weight),
        loss_image=mean(image, image_weight),
        grad_norm=norm,
        tokens=int(tokens),
        tokens_trimmed=int(trimmed),
        stepped=stepped,
    )


def seed_dropout(seed: int, step: int, data_rank: int) -> None:
    """Dropout is a function of (seed, step, data-parallel rank): nothing to save, nothing to restore."""
    model_parallel_cuda_manual_seed(hash((seed, step, data_rank)) % (1 << 31), force_reset_rng=True)
