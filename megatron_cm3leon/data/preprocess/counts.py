"""Counts of processed inputs: written + duplicates + filtered + quarantined == read."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_cm3leon.data.preprocess.dedupe import REASONS
from megatron_cm3leon.data.preprocess.reasons import Reasons

QUARANTINE = "quarantine.jsonl"


@dataclass
class InputCounts:
    """Inputs by the result of processing them."""

    written: int = 0
    duplicates: int = 0
    filtered: int = 0
    quarantined: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Reasons of all inputs that were not written."""

    @property
    def read(self) -> int:
        """Inputs in total."""
        return self.written + self.duplicates + self.filtered + self.quarantined

    def add(self, counts: dict) -> None:
        """Add the counts of a part (worker.count_record)."""
        self.written += counts.get("written", 0)
        self.quarantined += counts["quarantined"]
        for reason, count in counts.get("left_out", {}).items():
            self.reasons[reason] += count
            if reason in REASONS.values():
                self.duplicates += count
            else:
                self.filtered += count

    def to_dict(self) -> dict:
        """The counts as manifests record them under "accounts"."""
        return {
            "read": self.read,
            "written": self.written,
            "duplicates": self.duplicates,
            "filtered": self.filtered,
            "quarantined": self.quarantined,
            "reasons": dict(sorted(self.reasons.items())),
        }


def write_quarantine(output: Path, records: Iterable[Path]) -> None:
    """Write the quarantined inputs of the parts' records to quarantine.jsonl, in the given order."""
    temporary = output / f".{QUARANTINE}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        for path in records:
            quarantine = json.loads(path.read_text())["quarantine"]
            file.writelines(json.dumps(bad, ensure_ascii=False) + "\n" for bad in quarantine)
    os.replace(temporary, output / QUARANTINE)


def check_bad_share(bad: int, read: int, allowed: float, output: Path, total: float | None = None) -> None:
    """ValueError if more than the share `allowed` of a run's `total` inputs (None: `read`) is unusable.

    The message names the most common reasons listed in `output`.
    """
    if bad <= allowed * (total or read):
        return
    reasons = Reasons()
    with open(output / QUARANTINE, encoding="utf-8") as lines:
        for line in lines:
            reasons.add(json.loads(line)["reason"])
    raise ValueError(
        f"{bad} of the {read} inputs read are unusable, more than --max-bad-fraction {allowed:g} allows: {reasons}. "
        + (f"{reasons.hint} " if reasons.hint else "")
        + f"{output / QUARANTINE} lists each of them with its reason. Fix these inputs, or raise --max-bad-fraction, "
        f"and run the same command again: complete parts are kept. If the list of inputs, the files in a folder of "
        f"images, or the field names have changed, add --overwrite."
    )
