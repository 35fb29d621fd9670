"""Watchdog: every rank watches itself, the ranks of its node and the next rank, and ends when the run cannot go on.

Two threads a rank. The link beats through the store (runtime/peers.py), reads what others tell, and looks whether the
processes of its node live. The clock uses no store, which blocks for as long as its host is stopped: it counts the
seconds since this rank last came further, and ends the process, which works inside a collective too.

Whoever knows why the run ends tells it to all; the first cause counts, and only its teller prints and records it.
"""

import os
import signal
import sys
import time
from pathlib import Path
from threading import Event, Thread

import torch.distributed as dist

from megatron_cm3leon.monitoring import events
from megatron_cm3leon.runtime.exit_status import FAILED
from megatron_cm3leon.runtime.peers import Cause, Peers, Place
from megatron_cm3leon.runtime.stacks import dump_stacks, main_thread
from megatron_cm3leon.runtime.stall import find_late

PERIOD_SECONDS = 1.0
TICK_SECONDS = 0.25
SILENCE_SECONDS = 25.0
"""A node none of whose ranks beats for so long is gone."""
LINK_SECONDS = 10.0
"""A store that does not answer for so long is of no help any more."""
ALIKE_SECONDS = 15.0
"""After an error that every rank may meet by itself, such as a full disk, each may end in its own way within this."""
LINGER_SECONDS = 2.5
"""The rank that hosts the store ends so much later, so that the others have read why."""
PAUSE_SECONDS = 5.0
"""The clock itself stood still for longer than this: the process was stopped (Ctrl-Z), not the run."""


class Watchdog:
    """Runs from start() to close(); the main thread says how far it is with progress()."""

    def __init__(self, peers: Peers, run: Path, seconds: float, hosts_store: bool, launcher: int | None) -> None:
        """`seconds` without progress are a stall, 0: never. `launcher`: the process that this one must not outlive."""
        self.peers, self.run, self.seconds = peers, run, seconds
        self.hosts_store, self.launcher = hosts_store, launcher
        self.attempt = 0
        self.steps_begun = False
        self.count, self.phase, self.moved = 0, "starting", time.monotonic()
        self.near: dict[int, Place] = {}
        self.places: dict[int, Place] = {}
        self.cause: Cause | None = None
        """Why the run ends, once it is known."""
        self._own: Cause | None = None
        self._heard = time.monotonic()
        self._lost = ""
        self._news = False
        self._stalled = self._handled = False
        self._next = (None, time.monotonic())
        self._wake, self._known, self._closing, self._closed = Event(), Event(), Event(), Event()
        self._link = Thread(target=self._run_link, name="link", daemon=True)
        self._clock = Thread(target=self._run_clock, name="clock", daemon=True)

    # ------------------------------------------------------- from the main thread

    def start(self) -> None:
        self._link.start()
        self._clock.start()

    def progress(self, phase: str) -> None:
        """This rank enters `phase`; all ranks enter the same phases in the same order."""
        self.phase, self.moved = phase, time.monotonic()
        self.count += 1

    def tell(self, cause: Cause) -> bool:
        """Say why the run ends, unless another rank did; whether this rank is the first, and so the one to print it."""
        self._own = cause
        self._wake.set()
        if self._known.wait(LINK_SECONDS):
            return self.cause == cause
        self.cause = cause  # the store is of no help: the run folder decides who was first
        return self._record(cause, first=True)

    def wait_for_cause(self, seconds: float) -> None:
        """Give the others time to tell why; once they did, this rank ends."""
        self._known.wait(seconds)

    def close(self) -> None:
        """This rank is done: the others no longer miss it. The host of the store waits until all are."""
        self._closing.set()
        self._wake.set()
        self._link.join(2 * SILENCE_SECONDS)
        self._closed.set()
        self._clock.join()

    # ------------------------------------------------------------------- the link

    def _run_link(self) -> None:
        try:
            self.peers.introduce()
            while not self._closing.is_set():
                self._exchange()
                self._heard = time.monotonic()
                self._wake.wait(PERIOD_SECONDS)
                self._wake.clear()
            self.peers.leave()
            while self.hosts_store and self.peers.count_left() < self.peers.ranks:
                time.sleep(TICK_SECONDS / 10)
        except dist.DistError as error:
            self._lost = str(error).splitlines()[0]

    def _exchange(self) -> None:
        self._beat()
        if not self.places and self.peers.all_came():
            self.places = self.peers.places()
            own = self.peers.place
            self.near = {rank: place for rank, place in self.places.items() if rank != self.peers.rank}
            self.near = {rank: place for rank, place in self.near.items() if own.is_near(place)}
        if self._news:
            self._news = False
            if self.peers.stall() is not None:
                self._show_standing()
            self._learn(self.peers.cause())
        self._look_for_dead()
        self._look_at_next()
        if self._own and not self.cause:
            self._learn(self.peers.tell(self._own))
        if self._stalled and not self.cause and self.peers.announce_stall() == self.peers.rank:
            self._explain_stall()

    def _beat(self) -> None:
        self._news |= self.peers.beat(self.count, self.phase)

    def _learn(self, cause: Cause | None) -> None:
        if cause and not self.cause:
            self.cause = cause
            self._known.set()

    def _look_for_dead(self) -> None:
        """Tell of a process of this node that ended without a word."""
        for rank, place in self.near.items():
            if not self.cause and not place.lives() and not self.peers.has_left(rank):
                self._find(self._failure(rank, place, "ended without a word: killed, out of memory, or crashed"))

    def _look_at_next(self) -> None:
        """Tell of a whole node that went silent; each rank watches the next one, on the lookout for other nodes'."""
        rank = (self.peers.rank + 1) % self.peers.ranks
        if self.cause or not self.places or rank in self.near or rank == self.peers.rank or self.peers.has_left(rank):
            return
        beats, now = self.peers.beats_of([rank]), time.monotonic()
        if beats != self._next[0]:
            self._next = beats, now
        elif now - self._next[1] > SILENCE_SECONDS:
            self._next = beats, now  # a node that lives is asked again after as long
            if self._is_silent(self.places[rank].host):
                what = f"and its node have been silent for {SILENCE_SECONDS:.0f} s: the node is gone, or its network"
                self._find(self._failure(rank, self.places[rank], what))

    def _is_silent(self, host: str) -> bool:
        mates = [rank for rank, place in self.places.items() if place.host == host]
        before = self.peers.beats_of(mates)
        self._beat_on(3 * PERIOD_SECONDS)
        return self.peers.beats_of(mates) == before

    def _beat_on(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._beat()
            time.sleep(TICK_SECONDS)

    def _failure(self, rank: int, place: Place, what: str) -> Cause:
        return Cause("failure", rank, place.host, f"rank {rank} on {place} {what}.", FAILED, self.peers.rank)

    def _find(self, cause: Cause) -> None:
        """Tell a cause that this thread found; print and record it if it is the first."""
        first = self.peers.tell(cause)
        if first == cause:
            self._record(cause)
            print(f"error: {cause.text}", file=sys.stderr, flush=True)
        self._learn(first)

    def _record(self, cause: Cause, first: bool = False) -> bool:
        """Record the cause, with `first` only if none is recorded yet; whether this rank is the one to print it."""
        if not self.attempt:
            return True  # the run folder is not this run's yet
        values = {"rank": cause.rank, "host": cause.host, "cause": cause.text, "status": cause.status}
        if cause.kind == "stall":
            values["seconds"] = self.seconds
        try:
            if first:
                return events.record_first(self.run, self.attempt, cause.kind, **values)
            events.record(self.run, self.attempt, cause.kind, **values)
        except OSError as error:
            print(f"{self.run}: {cause.kind} was not recorded: {error}", file=sys.stderr, flush=True)
        return True

    # --------------------------------------------------------------------- stalls

    def _show_standing(self) -> None:
        """Write this rank's stacks, and tell the others where it is."""
        if self._handled:
            return
        self._handled = True
        self._write_stacks()
        self.peers.tell_standing(main_thread())

    def _write_stacks(self) -> None:
        waited = time.monotonic() - self.moved
        title = f"rank {self.peers.rank} on {self.peers.place}, for {waited:.1f} s in: {self.phase}"
        try:
            dump_stacks(stacks_file(self.run, self.attempt, self.peers.rank), title)
        except OSError as error:
            print(f"no stacks of rank {self.peers.rank}: {error}", file=sys.stderr, flush=True)

    def _explain_stall(self) -> None:
        """Find out, some seconds long, which rank the run waits for, and tell it."""
        self._show_standing()
        ranks = range(self.peers.ranks)
        before = self.peers.beats_of(ranks)
        self._beat_on(3 * PERIOD_SECONDS)
        places = self.peers.places()
        rank, text = find_late(len(ranks), places, before, self.peers.beats_of(ranks), self.peers.standings())
        self._find(self._stall(rank, places.get(rank), text))

    def _stall(self, rank: int, place: Place | None, text: str) -> Cause:
        text = (
            f"no progress for {self.seconds:g} s (cluster.watchdog_seconds): {text}. Stacks of the ranks that answer: "
            f"{stacks_file(self.run, self.attempt, 0).parent}"
        )
        return Cause("stall", rank, place.host if place else "", text, FAILED, self.peers.rank)

    # ------------------------------------------------------------------ the clock

    def _run_clock(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(TICK_SECONDS):
            now = time.monotonic()
            if now - last > PAUSE_SECONDS:
                self.moved += now - last
            last = now
            if self.launcher is not None and os.getppid() != self.launcher:
                self._end_alone(self._failure_here(f"the launcher (torchrun, process {self.launcher}) is gone"))
            if self.cause:
                self._obey(self.cause)
            if self._lost and not self._closing.is_set():
                self._end_without_store()
            if self.seconds and now - self.moved > self.seconds and not self._stalled:
                self._stalled = True
                self._wake.set()
            if self._stalled and now - self._heard > LINK_SECONDS:
                self._end_blocked()

    def _failure_here(self, text: str) -> Cause:
        return Cause("failure", self.peers.rank, self.peers.place.host, f"{text}.", FAILED, self.peers.rank)

    def _obey(self, cause: Cause) -> None:
        """End this process, if need be after what the main thread still has to do."""
        if cause == self._own:
            self._closed.wait(LINK_SECONDS + LINGER_SECONDS)  # the main thread prints, and ends the process
        elif cause.status != FAILED and self.steps_begun:
            self._closed.wait(ALIKE_SECONDS)
        elif self.hosts_store:
            time.sleep(LINGER_SECONDS)
        if cause.kind == "stall":
            self._end_silent(cause.rank)
        os._exit(cause.status)

    def _end_silent(self, rank: int) -> None:
        """A stopped process cannot end itself: who shares its node does it."""
        place = self.near.get(rank)
        if place is None:
            return
        end = time.monotonic() + 3 * LINGER_SECONDS
        while place.lives():
            if time.monotonic() > end:
                os.kill(place.process, signal.SIGKILL)
                return
            time.sleep(TICK_SECONDS)

    def _end_without_store(self) -> None:
        """The store is gone, and with it the process that hosts it."""
        time.sleep(LINGER_SECONDS)  # the launcher's end, if that is what it was, shows soon
        if self.launcher is not None:
            if os.getppid() != self.launcher:
                return
            return self._end_alone(self._failure_here(f"torchrun's store is gone ({self._lost})"))
        place = self.places.get(0)
        text = "ended without a word: killed, out of memory, or crashed; or its node is gone"
        where = self._failure(0, place, text) if place else self._failure_here(f"rank 0 is gone ({self._lost})")
        self._end_alone(where)

    def _end_blocked(self) -> None:
        """The store does not answer: nobody can be asked, and its host is the one to blame."""
        self._write_stacks()
        if self.launcher is not None or 0 not in self.places:
            return self._end_alone(self._stall(-1, None, "the store of the ranks does not answer"))
        self._end_alone(
            self._stall(0, self.places[0], f"rank 0 on {self.places[0]}, which hosts the store, does not answer")
        )

    def _end_alone(self, cause: Cause) -> None:
        if self._record(cause, first=True):
            print(f"error: {cause.text}", file=sys.stderr, flush=True)
        if cause.kind == "stall":
            self._end_silent(cause.rank)
        os._exit(cause.status)


def stacks_file(run: Path, attempt: int, rank: int) -> Path:
    """Where a rank's stacks are written when the run stalls."""
    return run / "stacks" / f"attempt-{attempt}" / f"rank-{rank:05d}.txt"
