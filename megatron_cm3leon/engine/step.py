"""Parts of a step that both engines share: loss weights of the global batch, sums of losses, seeds of dropout."""

import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_cm3leon.data.stream.loader import MicroBatch
from megatron_cm3leon.data.stream.order import derive_key
from megatron_cm3leon.engine.base import StepMetrics
from megatron_cm3leon.tokenizers.vocab import Vocabulary


def compute_loss_scale(micro_batches: list[MicroBatch], device: torch.device, group: dist.ProcessGroup) -> torch.Tensor:
    """1 / sum of weights over the global batch, whose parts the ranks of `group` hold; fp32 scalar on `device`.

    Collective; does not wait for the device.
    """
    weight = torch.zeros((), dtype=torch.float64)
    for micro_batch in micro_batches:
        weight += micro_batch.loss_weights.double().sum()
    weight = weight.to(device, non_blocking=True)
    dist.all_reduce(weight, group=group)
    return (1.0 / weight.clamp_min(1e-30)).float()


def sum_losses(
    weighted: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, trimmed: float, vocabulary: Vocabulary
) -> torch.Tensor:
    """Sums over one micro-batch, fp64 [8]: loss, text loss, image loss, their weights, targets, trimmed tokens.

    weighted: weight x loss of each token; labels, weights: same shape; trimmed: this rank's share of trimmed tokens. A
    target counts when its weight is above 0.
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
            torch.full((), trimmed, dtype=torch.float64, device=weights.device),  # torch.tensor() would wait for it
        ]
    )


def build_metrics(sums: list[float], norm: float, stepped: bool) -> StepMetrics:
    """Metrics of a global batch from `sum_losses`, summed over its micro-batches and ranks."""
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


def seed_dropout(seed: int, step: int, version: int) -> None:
    """Seed this rank's generators for the dropout masks of one step, so that no generator state has to be saved.

    Masks are a function of the run's seed, the step and the rank's coordinates. The default generator draws the masks
    of activations that are replicated on tensor-parallel ranks; its seed contains data, pipeline and context rank. The
    masks of partitioned activations (heads; slices of the sequence with parallel.sequence) come from megatron-core's
    model-parallel generator, to whose seed megatron-core adds the tensor rank. The interleaved chunks of a pipeline
    rank draw from the same generators one after the other.

    version: TrainState.dropout_seeding. In version 1 pipeline and context ranks draw the same masks.
    """
    data_rank = parallel_state.get_data_parallel_rank()
    if version == 1:
        key = hash((seed, step, data_rank)) % (1 << 31)
    else:
        pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
        context_rank = parallel_state.get_context_parallel_rank()
        # 62 bits, because megatron-core adds to the seed and torch accepts 64 bits.
        key = derive_key(seed, "dropout", step, data_rank, pipeline_rank, context_rank) >> 2
    model_parallel_cuda_manual_seed(key, force_reset_rng=True)
