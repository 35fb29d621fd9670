"""What the training loop knows of an engine, and nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.data.stream.loader import MicroBatch

DROPOUT_SEEDING = 2
"""Version of the seeding of dropout masks in a new run (engine/step.py, seed_dropout)."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Of one global batch; the same numbers on every rank. Losses are nats a token, weighted means."""

    loss: float
    loss_text: float
    """Over the text targets; NaN where the batch has none."""
    loss_image: float
    """Over the image targets; NaN where the batch has none."""
    grad_norm: float
    """Of the whole model, before clipping; 0 for an evaluation."""
    tokens: int
    """Targets with a weight above 0."""
    tokens_trimmed: int
    """Tokens that CM3 masking's added tokens pushed out of their blocks."""
    stepped: bool
    """False when the loss or the gradient was not finite and no rank stepped."""


class Engine(Protocol):
    """Trains one model on this rank's share of every batch."""

    data_rank: int
    """Which share of every batch is this rank's."""
    data_size: int
    """Into how many shares a batch is cut."""
    dropout_seeding: int
    """Version of the seeding of dropout masks: DROPOUT_SEEDING, or the loaded run's."""

    def train_step(self, micro_batches: list[MicroBatch], step: int, learning_rate: float) -> StepMetrics:
        """Forward, backward and optimizer step number `step` (from 0) on this rank's part of a global batch."""

    def own_seconds(self) -> float:
        """Of the last train_step: seconds in which this rank worked before it waited for other data-parallel ranks.

        megatron: forward and backward passes, until gradients are waited for. deepspeed: the forward passes, because
        its backward passes wait for gradients. What a rank waits for within a replica (tensor, context and pipeline
        parallel), or for weights under zero=3, is not told from its work.
        """

    def eval_step(self, micro_batches: list[MicroBatch]) -> StepMetrics:
        """Losses of a global batch, without dropout and without a step."""

    def save(self, folder: Path, state: TrainState) -> None:
        """Start writing a checkpoint, after the one before is written; later changes are not written.

        It appears under `folder` when every rank's part is on the disk. With checkpoint.asynchronous off that is
        before this returns. Raises what went wrong in the save before.
        """

    def poll(self) -> bool:
        """Whether no save is under way; ValueError, with the path, when one went wrong. Not collective."""

    def load(self, folder: Path) -> TrainState:
        """Read weights and optimizer state of any layout of this engine, and compare checksums; collective.

        Also into an engine that has trained: nothing of it remains.
        """

    def close(self) -> None:
        """Wait for the save under way, which may raise as poll() does, and end the process groups."""
