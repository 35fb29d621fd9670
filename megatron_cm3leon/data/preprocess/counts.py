"""The account of every input: written + duplicates + filtered + quarantined = read."""

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
class Account:
    """Inputs by what became of them."""

    written: int = 0
    duplicates: int = 0
    filtered: int = 0
    quarantined: int = 0
    reasons: Counter = field(default_factory=Counter)
    """Of everything that was not written."""

    @property
    def read(self) -> int:
        return self.written + self.duplicates + self.filtered + self.quarantined

    def add(self, counts: dict) -> None:
        """Add a part's counts (parts.count_record)."""
        self.written += counts.get("written", 0)
        self.quarantined += counts["quarantined"]
        for reason, count in counts.get("left_out", {}).items():
            self.reasons[reason] += count
            if reason in REASONS.values():
                self.duplicates += count
            else:
                self.filtered += count

    def to_dict(self) -> dict:
        return {
            "read": self.read,
            "written": self.written,
            "duplicates": self.duplicates,
            "filtered": self.filtered,
            "quarantined": self.quarantined,
            "reasons": dict(sorted(self.reasons.items())),
        }


def write_quarantine(output: Path, records: Iterable[Path]) -> None:
    """List what the parts' records have quarantined, in the order given."""
    temporary = output / f".{QUARANTINE}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        for path in records:
            quarantine = json.loads(path.read_text())["quarantine"]
            file.writelines(json.dumps(bad, ensure_ascii=False) + "\n" for bad in quarantine)
    os.replace(temporary, output / QUARANTINE)


def check_bad_share(bad: int, read: int, allowed: float, output: Path, total: float | None = None) -> None:
    """ValueError where more than the share `allowed` of a run's `total` inputs (those read: None) is unusable.

    It names the commonest reasons, as far as `output` lists them.
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
        + f"{output / QUARANTINE} names each with its reason. Fix what it names, or raise --max-bad-fraction, and run "
        f"the same command again: complete parts are kept. Another list of inputs, a changed folder of images, or "
        f"other names of fields need --overwrite."
    )
