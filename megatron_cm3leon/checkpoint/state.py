"""TrainState: what a resumed run needs in addition to weights and optimizer moments."""

import json
from dataclasses import dataclass, field
from pathlib import Path

_KEYS = {
    "step": "step",
    "batch": "batch",
    "sequence": "sequence",
    "tokens": "tokens",
    "skipped": "skipped",
    "left_out": "skipped_ranges",
    "recent_losses": "recent_losses",
    "cursor": "cursor",
    "stream": "stream",
    "stream_parts": "stream_parts",
    "attempt": "attempt",
    "dropout_seeding": "dropout_seeding",
    "changes": "changes",
    "init": "init",
}
"""Key in state.json -> attribute. Keys stay when attributes are renamed."""


@dataclass(kw_only=True)
class TrainState:
    """Position of a run. Random draws are functions of (seed, step or sequence): there is no generator state."""

    step: int = 0
    """Optimizer steps taken."""
    batch: int = 0
    """Number of the next batch; larger than `step` once a batch was skipped."""
    sequence: int = 0
    """Next sequence of the stream: position of the run, which a change of train.global_batch_size keeps."""
    tokens: int = 0
    """Target tokens seen, without padding."""
    skipped: list[int] = field(default_factory=list)
    """Batches with a non-finite loss or gradient, for which no rank took an optimizer step."""
    skipped_ranges: list[dict] = field(default_factory=list)
    """Batches skipped by a rollback: step, first, last, reason (spike or asked) and the loss of the spike."""
    recent_losses: list[float] = field(default_factory=list)
    """With train.spike_width, the last losses that were not spikes; the next loss is compared with them."""
    cursor: dict = field(default_factory=dict)
    """Position of the last batch in the stream (Stream.resume), so that resuming takes the same time at any step."""
    stream: str = ""
    """Identity of the stream (data/stream/identity.py)."""
    stream_parts: dict = field(default_factory=dict)
    """Version of that identity, and what it covers in addition to the configuration; empty in version 1."""
    attempt: int = 0
    """Number of times the run was started, including this one."""
    dropout_seeding: int = 1
    """Version of the seeding of dropout masks (engine/step.py); runs that do not record it have version 1."""
    changes: list[dict] = field(default_factory=list)
    """Fixed fields changed on resuming: step, batch (not in older states), field, old and new value."""
    init: dict = field(default_factory=dict)
    """Where the weights of step 0 are from (training/base_model.py, BaseModel.describe); empty: they were drawn."""

    def to_dict(self) -> dict:
        """The state with the keys of state.json, which the metadata of an export contains, too."""
        return {key: getattr(self, attribute) for key, attribute in _KEYS.items()}

    @classmethod
    def from_dict(cls, values: dict, global_batch_size: int) -> "TrainState":
        """Read the form of `to_dict`; raises ValueError for an unknown key.

        `global_batch_size` is that of the run that wrote it: older states record their position in batches only.
        """
        unknown = sorted(values.keys() - _KEYS.keys())
        if unknown:
            raise ValueError(
                f"the state of the run has the unknown key {unknown[0]!r}; a newer version of megatron_cm3leon wrote "
                f"it: resume with that version."
            )
        state = cls(**{_KEYS[key]: value for key, value in values.items()})
        if "sequence" not in values:
            state.sequence = state.batch * global_batch_size
        return state

    def save(self, path: Path) -> None:
        """Write state.json."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path, global_batch_size: int) -> "TrainState":
        """Read state.json; see `from_dict`."""
        return cls.from_dict(json.loads(path.read_text()), global_batch_size)
