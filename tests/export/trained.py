"""The trained model in one process, with which a conversion is compared."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.config.schema import ParallelConfig
from megatron_cm3leon.distributed.launch import Rank
from megatron_cm3leon.engine.groups import destroy_groups, initialize_groups


@contextmanager
def open_trained_model(
    checkpoint: str | Path, base: str | Path | None = None
) -> Iterator[Callable[[torch.Tensor, torch.dtype], torch.Tensor]]:
    """Inside the `with`: (ids int64 [B, S], dtype) -> logits [B, S, padded rows] of the megatron-core model.

    Weights are the fp32 weights of the checkpoint; computation is in `dtype` (fp32 or fp64).
    The checkpoint may be of any layout; `base`: that of the frozen weights, if it has adapters alone. Process groups of
    one rank exist only inside the `with`.
    """
    reader = CheckpointReader(checkpoint)
    others = CheckpointReader(base or checkpoint)
    config = reader.config
    config.parallel, config.train.precision = ParallelConfig(), "fp32"
    initialize_groups(config, Rank(0, 1, 0, 1), torch.device("cpu"))
    try:
        from megatron_cm3leon.model.builder import build_stage, locate_parameters

        [stage] = build_stage(config, reader.vocabulary)
        stage.eval()
        with torch.no_grad():
            for parameter, location in locate_parameters(stage):
                source = reader if reader.has(location.name, "weight") else others
                part = source.read_part(location.name, "weight", location.offset, location.local_shape)
                parameter.copy_(part.view(parameter.shape))

        @torch.no_grad()
        def logits(ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            return stage.to(dtype)(ids, torch.arange(ids.shape[1]).expand_as(ids), None)

        yield logits
    finally:
        destroy_groups()
