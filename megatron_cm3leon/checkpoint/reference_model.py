"""The trained model in plain PyTorch, read from a checkpoint that any layout and engine wrote."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.model.reference import reference_logits
from megatron_cm3leon.tokenizers.vocab import Vocabulary


@dataclass(frozen=True)
class ReferenceModel:
    """Logits in fp32 on a CPU; weights are read one at a time, so that a model larger than the memory can be run."""

    weights: CheckpointReader

    @property
    def config(self) -> Config:
        """The configuration of its run."""
        return self.weights.config

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary it was trained with."""
        return self.weights.vocabulary

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, length, vocabulary] of token ids [batch, length]."""
        return reference_logits(self.weights.read, self.config, ids)


def load_reference_model(checkpoint: str | Path) -> ReferenceModel:
    """Open a checkpoint folder, such as runs/x/checkpoints/step-00001000.

    Raises ValueError when it is not a complete checkpoint, and for one of adapters without their base.
    """
    reader = CheckpointReader(checkpoint)
    reader.require_whole()
    return ReferenceModel(reader)
