"""TrainState: all that a resumed run needs to know beside weights and optimizer moments."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(kw_only=True)
class TrainState:
    """Position of a run. Random draws are functions of (seed, step or batch): no generator has a state."""

    step: int = 0
    """Optimizer steps taken."""
    batch: int = 0
    """Next batch of the stream; ahead of `step` once a batch was skipped."""
    tokens: int = 0
    """Target tokens seen, padding not counted."""
    skipped: list[int] = field(default_factory=list)
    """Batches whose loss or gradient was not finite, on which no rank stepped."""
    left_out: list[dict] = field(default_factory=list)
    """Further batches that no rank trained on: step, first, last, reason (spike or asked) and the spike's loss."""
    recent_losses: list[float] = field(default_factory=list)
    """With train.spike_width, the last losses that were no spikes, against which the next one is judged."""
    cursor: dict = field(default_factory=dict)
    """Where the last batch stands in the stream (Stream.resume), so that resuming costs the same at any step."""
    stream: str = ""
    """Fingerprint of the stream: data, settings, seed, global batch size."""
    attempt: int = 0
    """How often the run was started, this time included."""
    dropout_seeding: int = 1
    """Version of the seeding of dropout masks (engine/batch.py); runs that do not record it have version 1."""

    changes: list[dict] = field(default_factory=list)
    """Fixed fields that a resume changed: step, field, old and new value."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "TrainState":
        return cls(**json.loads(path.read_text()))
