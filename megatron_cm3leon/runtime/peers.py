"""Peers: how the ranks of a run hear of each other beside their collectives, through the store they met at.

    place/R    host, process and its start: whether it lives can be seen by the ranks of its node
    beat/R     how often it has beaten, how far it has come, and in what phase it is
    news       counts changes of the two below, so that one number a second is all that a quiet rank asks for
    cause      why the run ends: of all ranks that know a cause, the first to tell it
    stall      the rank that first found no progress; then every rank writes its stacks and standing/R
    left/R     it has done all its work and may be gone

A store's operation can block for as long as its host is stopped: only a thread that may be late uses this class.
"""

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_cm3leon.runtime.stacks import Standing


@dataclass(frozen=True)
class Place:
    """A process, known well enough to tell from another one that gets its number later."""

    host: str
    process: int
    started: str
    """Clock ticks since the node's start; empty where /proc does not tell."""
    namespace: str
    """Process numbers mean the same inside it."""

    @classmethod
    def own(cls) -> "Place":
        try:
            namespace = os.readlink("/proc/self/ns/pid")
        except OSError:
            namespace = ""
        return cls(platform.node(), os.getpid(), start_of(os.getpid()), namespace)

    def is_near(self, other: "Place") -> bool:
        """Whether each can see if the other lives."""
        return bool(self.started) and (self.host, self.namespace) == (other.host, other.namespace)

    def lives(self) -> bool:
        """Whether the process, which is near, has not ended."""
        return start_of(self.process) == self.started

    def __str__(self) -> str:
        return f"host {self.host} (process {self.process})"


def start_of(process: int) -> str:
    """When a process of this node began; empty when it has ended."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state in "ZX" else fields[18]


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself once a second."""

    count: int
    progress: int
    """Phases entered; equal ranks enter equal phases."""
    phase: str


@dataclass(frozen=True)
class Cause:
    """Why a run ends before its time."""

    kind: str
    """failure, stall or signal: as events.jsonl has it."""
    rank: int
    """The rank to blame."""
    host: str
    text: str
    status: int
    """Exit status of every rank."""
    teller: int
    """The rank that found it, prints it and records it."""


class Peers:
    """One rank's view of the others."""

    def __init__(self, store: dist.Store, rank: int, ranks: int) -> None:
        """`store` is copied: this class has a connection of its own."""
        self.store = dist.PrefixStore("peers", store.clone())
        self.store.set_timeout(timedelta(seconds=30))
        self.rank, self.ranks = rank, ranks
        self.beats = self.news = 0
        self.place = Place.own()

    def introduce(self) -> None:
        """Tell where this rank is."""
        self.store.set(f"place/{self.rank}", json.dumps(asdict(self.place)))
        self.store.add("came", 1)

    def all_came(self) -> bool:
        """Whether every rank has introduced itself."""
        return self.store.add("came", 0) == self.ranks

    def places(self) -> dict[int, Place]:
        """Where the ranks are that have come so far."""
        return {rank: Place(**value) for rank, value in self._read("place", range(self.ranks)).items()}

    def beat(self, progress: int, phase: str) -> bool:
        """Tell that this rank lives and how far it is; returns whether there is news."""
        self.beats += 1
        self.store.set(f"beat/{self.rank}", json.dumps([self.beats, progress, phase]))
        before, self.news = self.news, self.store.add("news", 0)
        return self.news != before

    def beats_of(self, ranks: Iterable[int]) -> dict[int, Beat]:
        """The last beats of those of `ranks` that have come so far."""
        return {rank: Beat(*value) for rank, value in self._read("beat", ranks).items()}

    def tell(self, cause: Cause) -> Cause:
        """Say why the run ends; returns the cause that was told first."""
        first = Cause(**json.loads(self.store.compare_set("cause", "", json.dumps(asdict(cause)))))
        self.store.add("news", 1)
        return first

    def cause(self) -> Cause | None:
        """What was told, if anything was."""
        return Cause(**json.loads(self.store.get("cause"))) if self.store.check(["cause"]) else None

    def announce_stall(self) -> int:
        """Say that nothing moves; returns the rank that said so first, which finds out who is late."""
        first = int(self.store.compare_set("stall", "", str(self.rank)))
        self.store.add("news", 1)
        return first

    def stall(self) -> int | None:
        """The rank that announced a stall."""
        return int(self.store.get("stall")) if self.store.check(["stall"]) else None

    def tell_standing(self, standing: Standing) -> None:
        self.store.set(f"standing/{self.rank}", json.dumps(asdict(standing)))

    def standings(self) -> dict[int, Standing]:
        """Where the ranks stand that have told so since the stall was announced."""
        return {rank: Standing(**value) for rank, value in self._read("standing", range(self.ranks)).items()}

    def leave(self) -> None:
        """Say that this rank is done."""
        self.store.set(f"left/{self.rank}", "1")
        self.store.add("left", 1)

    def has_left(self, rank: int) -> bool:
        return self.store.check([f"left/{rank}"])

    def count_left(self) -> int:
        """How many ranks are done."""
        return self.store.add("left", 0)

    def _read(self, kind: str, ranks: Iterable[int]) -> dict[int, Any]:
        found = list(ranks)
        if not self.store.check([f"{kind}/{rank}" for rank in found]):
            found = [rank for rank in found if self.store.check([f"{kind}/{rank}"])]
        values = self.store.multi_get([f"{kind}/{rank}" for rank in found]) if found else []
        return {rank: json.loads(value) for rank, value in zip(found, values, strict=True)}
