"""Engine: the interface between the training loop and the engines, and the metrics of a step."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.data.stream.loader import MicroBatch
from megatron_cm3leon.model.weights import Placement

DROPOUT_SEEDING = 2
"""Version of the seeding of dropout masks in a new run (engine/step.py, seed_dropout)."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Metrics of one global batch, the same on every rank. Losses are weighted means in nats per token."""

    loss: float
    loss_text: float
    """Loss of the text targets; NaN when the batch has none."""
    loss_image: float
    """Loss of the image targets; NaN when the batch has none."""
    grad_norm: float
    """L2 norm of the gradient of the whole model before clipping; 0 for an evaluation."""
    tokens: int
    """Targets with a weight above 0."""
    tokens_trimmed: int
    """Tokens cut off at the end of the sequences because of the tokens that CM3 masking added."""
    stepped: bool
    """False when the loss or the gradient was not finite and no rank took an optimizer step."""


class WeightReader(Protocol):
    """Parameters by canonical names (model/weights.py); a CheckpointReader is one."""

    def has(self, name: str, kind: str) -> bool:
        """Return whether there is a tensor `name` of `kind`: weight, exp_avg or exp_avg_sq."""

    def read_part(self, name: str, kind: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """Return the rectangle of shape `size` at `offset` of a whole tensor, fp32; zeros beyond the tensor's edge."""


class WeightSource(WeightReader, Protocol):
    """Weights without moments, with which a new run begins (training/base_model.py)."""

    def verify(self, placements: list[Placement]) -> AbstractContextManager[None]:
        """Verify what the body reads, which is `placements` on this rank; collective.

        On exit every rank raises ValueError where the content is damaged or the body failed on any rank.
        """


class Engine(Protocol):
    """Trains one model on this rank's part of every batch. The training loop uses nothing else of an engine."""

    device: torch.device
    """Device of the model and the optimizer."""
    data_rank: int
    """Data-parallel rank: which part of every batch this rank reads."""
    data_size: int
    """Data-parallel ranks, among which a batch is divided."""
    dropout_seeding: int
    """Version of the seeding of dropout masks: DROPOUT_SEEDING, or that of the loaded run."""

    def train_step(self, micro_batches: list[MicroBatch], step: int, learning_rate: float) -> StepMetrics:
        """Run forward, backward and optimizer step number `step` (from 0) on this rank's part of a global batch.

        Collective. When the loss or the gradient is not finite, no rank steps, and weights and moments do not change.
        """

    def compute_seconds(self) -> float:
        """Return the seconds that this rank computed in the last train_step before it waited for data-parallel ranks.

        megatron: forward and backward passes, until the wait for gradients. deepspeed: forward passes only, because
        its backward passes wait for gradients. Waits within a replica (tensor, context and pipeline parallel), and
        for weights with zero=3, are included.
        """

    def eval_step(self, micro_batches: list[MicroBatch]) -> StepMetrics:
        """Compute the losses of a global batch without dropout and without a step; collective."""

    def save(self, folder: Path, state: TrainState) -> None:
        """Start an asynchronous save of a snapshot of the current state; collective.

        Blocks until the previous save has finished and raises its error. `folder` appears when the parts of all ranks
        are on disk: with checkpoint.asynchronous=false before this returns.
        """

    def poll(self) -> bool:
        """Return whether no save is in progress on this rank; not collective.

        Raises ValueError, with the path and the remedy, when the save failed.
        """

    def load(self, folder: Path) -> TrainState:
        """Replace weights and optimizer state by those of a checkpoint, of any layout and engine; collective.

        Verifies the checksums. Raises ValueError on every rank for a damaged checkpoint and for one of another model
        or vocabulary.
        """

    def load_weights(self, source: WeightSource) -> None:
        """Replace the weights by those of `source`; the optimizer is as before the first step; collective.

        Raises ValueError on every rank as WeightSource.verify does.
        """

    def close(self) -> None:
        """Wait for the save in progress, whose error it raises, and destroy the process groups."""
