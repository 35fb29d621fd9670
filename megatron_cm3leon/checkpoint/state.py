"""TrainState: all that a resumed run needs to know beside weights and optimizer moments."""

import json
from dataclasses import dataclass, field
from pathlib import Path

_KEYS = {
    "step": "step",
    "batch": "batch",
    "sequence": "sequence",
    "tokens": "tokens",
    "skipped": "skipped",
    "left_out": "left_out",
    "recent_losses": "recent_losses",
    "cursor": "cursor",
    "stream": "stream",
    "stream_parts": "stream_parts",
    "attempt": "attempt",
    "dropout_seeding": "dropout_seeding",
    "changes": "changes",
}
"""Key in state.json -> attribute. Keys stay when attributes are renamed."""


@dataclass(kw_only=True)
class TrainState:
    """Position of a run. Random draws are functions of (seed, step or sequence): no generator has a state."""

    step: int = 0
    """Optimizer steps taken."""
    batch: int = 0
    """Number of the next batch; ahead of `step` once a batch was skipped."""
    sequence: int = 0
    """Next sequence of the stream: the run's position, which a change of train.global_batch_size keeps."""
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
    """Identity of the stream (data/stream/identity.py)."""
    stream_parts: dict = field(default_factory=dict)
    """Version of that identity, and what it covers beside the configuration; empty in version 1."""
    attempt: int = 0
    """How often the run was started, this time included."""
    dropout_seeding: int = 1
    """Version of the seeding of dropout masks (engine/step.py); runs that do not record it have version 1."""

    changes: list[dict] = field(default_factory=list)
    """Fixed fields that a resume changed: step, batch (not in older states), field, old and new value."""

    def to_dict(self) -> dict:
        """The state as state.json and an export's metadata have it."""
        return {key: getattr(self, attribute) for key, attribute in _KEYS.items()}

    @classmethod
    def from_dict(cls, values: dict, global_batch_size: int) -> "TrainState":
        """Read `to_dict`'s form; ValueError for a key that this version does not know.

        `global_batch_size` is that of the run which wrote it: older states count their position in batches alone.
        """
        unknown = sorted(values.keys() - _KEYS.keys())
        if unknown:
            raise ValueError(f"the state of the run has the unknown key {unknown[0]!r}; a newer version wrote it.")
        state = cls(**{_KEYS[key]: value for key, value in values.items()})
        if "sequence" not in values:
            state.sequence = state.batch * global_batch_size
        return state

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path, global_batch_size: int) -> "TrainState":
        """Read state.json; as `from_dict`."""
        return cls.from_dict(json.loads(path.read_text()), global_batch_size)
