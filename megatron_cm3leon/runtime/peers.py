"""Communication between the ranks of a run beside their collectives, through the store of the rendezvous.

    process/R    host, PID and start time of rank R: other ranks of its node can see whether it is alive
    heartbeat/R  number of heartbeats sent, number of phases entered, and the current phase
    updates      incremented when one of the two keys below is set, so that an idle rank reads one number per second
    cause        why the run ends: the first cause that any rank published
    stall        the rank that first found no progress; every rank then writes its stacks and sets position/R
    position/R   where the main thread of rank R is during a stall
    done/R       rank R has finished its work and may exit

An operation on the store can block for as long as the process that hosts it is stopped: call this class only from a
thread that may be late.
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

from megatron_cm3leon.runtime.stacks import StackPosition


@dataclass(frozen=True)
class ProcessId:
    """PID plus start time of a process: robust to PID reuse."""

    host: str
    process: int
    """PID."""
    started: str
    """Clock ticks between boot and the start of the process; empty where /proc does not provide it."""
    namespace: str
    """PID namespace: PIDs can be compared only within one."""

    @classmethod
    def current(cls) -> "ProcessId":
        """The calling process."""
        try:
            namespace = os.readlink("/proc/self/ns/pid")
        except OSError:
            namespace = ""
        return cls(platform.node(), os.getpid(), read_start_time(os.getpid()), namespace)

    def is_local(self, other: "ProcessId") -> bool:
        """Whether the two processes are on one node and each can see if the other is alive."""
        return bool(self.started) and (self.host, self.namespace) == (other.host, other.namespace)

    def is_alive(self) -> bool:
        """Whether this process, which must be local, has not ended."""
        return read_start_time(self.process) == self.started

    def __str__(self) -> str:
        return f"host {self.host} (process {self.process})"


def read_start_time(process: int) -> str:
    """Clock ticks between boot and the start of a process of this node, by PID; empty if it has ended."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state in "ZX" else fields[18]


@dataclass(frozen=True)
class Heartbeat:
    """What a rank publishes about itself once per second."""

    count: int
    """Heartbeats sent so far."""
    progress: int
    """Phases entered so far; all ranks enter the same phases in the same order."""
    phase: str


@dataclass(frozen=True)
class Cause:
    """Why a run ends early."""

    kind: str
    """The event of events.jsonl: failure, stall or signal."""
    rank: int
    """The rank at fault."""
    host: str
    text: str
    status: int
    """Exit status of every rank."""
    reporter: int
    """The rank that found the cause; it prints and records it."""


class Peers:
    """The other ranks, as one rank sees them through the store."""

    def __init__(self, store: dist.Store, rank: int, ranks: int) -> None:
        """Opens a connection of its own to `store`."""
        # torch's stubs omit Store.clone.
        self.store = dist.PrefixStore("peers", store.clone())  # type: ignore[attr-defined]
        self.store.set_timeout(timedelta(seconds=30))
        self.rank, self.ranks = rank, ranks
        self.heartbeats = self.updates = 0
        self.process = ProcessId.current()

    def register(self) -> None:
        """Publish the process of this rank."""
        self.store.set(f"process/{self.rank}", json.dumps(asdict(self.process)))
        self.store.add("registered", 1)

    def all_registered(self) -> bool:
        """Whether every rank has registered."""
        return self.store.add("registered", 0) == self.ranks

    def read_processes(self) -> dict[int, ProcessId]:
        """Rank -> process, of the ranks that have registered."""
        return {rank: ProcessId(**value) for rank, value in self._read("process", range(self.ranks)).items()}

    def send_heartbeat(self, progress: int, phase: str) -> bool:
        """Publish that this rank is alive and how far it is; returns whether there is a new cause or stall."""
        self.heartbeats += 1
        self.store.set(f"heartbeat/{self.rank}", json.dumps([self.heartbeats, progress, phase]))
        before, self.updates = self.updates, self.store.add("updates", 0)
        return self.updates != before

    def read_heartbeats(self, ranks: Iterable[int]) -> dict[int, Heartbeat]:
        """Rank -> its last heartbeat, of those of `ranks` that have sent one."""
        return {rank: Heartbeat(*value) for rank, value in self._read("heartbeat", ranks).items()}

    def publish_cause(self, cause: Cause) -> Cause:
        """Publish why the run ends; returns the cause that was published first, which counts."""
        first = Cause(**json.loads(self.store.compare_set("cause", "", json.dumps(asdict(cause)))))
        self.store.add("updates", 1)
        return first

    def read_cause(self) -> Cause | None:
        """The published cause; None while the run continues."""
        return Cause(**json.loads(self.store.get("cause"))) if self.store.check(["cause"]) else None

    def announce_stall(self) -> int:
        """Announce a stall; returns the rank that announced it first, which finds the late rank."""
        first = int(self.store.compare_set("stall", "", str(self.rank)))
        self.store.add("updates", 1)
        return first

    def read_stall(self) -> int | None:
        """The rank that announced a stall; None if there is none."""
        return int(self.store.get("stall")) if self.store.check(["stall"]) else None

    def publish_position(self, position: StackPosition) -> None:
        """Publish where the main thread of this rank is during a stall."""
        self.store.set(f"position/{self.rank}", json.dumps(asdict(position)))

    def read_positions(self) -> dict[int, StackPosition]:
        """Rank -> its main thread's position, of the ranks that have published it since the stall was announced."""
        return {rank: StackPosition(**value) for rank, value in self._read("position", range(self.ranks)).items()}

    def mark_done(self) -> None:
        """Publish that this rank has finished its work."""
        self.store.set(f"done/{self.rank}", "1")
        self.store.add("done", 1)

    def is_done(self, rank: int) -> bool:
        """Whether a rank has finished its work."""
        return self.store.check([f"done/{rank}"])

    def count_done(self) -> int:
        """Number of ranks that have finished their work."""
        return self.store.add("done", 0)

    def _read(self, kind: str, ranks: Iterable[int]) -> dict[int, Any]:
        """Rank -> decoded value of the key `kind/rank`, of the ranks that have set it."""
        found = list(ranks)
        if not self.store.check([f"{kind}/{rank}" for rank in found]):
            found = [rank for rank in found if self.store.check([f"{kind}/{rank}"])]
        values = self.store.multi_get([f"{kind}/{rank}" for rank in found]) if found else []
        return {rank: json.loads(value) for rank, value in zip(found, values, strict=True)}
