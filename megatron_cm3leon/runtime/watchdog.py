"""Watchdog: each rank watches itself, the ranks of its node and the next rank, and ends when the run cannot continue.

It has two threads per rank. The link thread uses the store (runtime/peers.py): it sends heartbeats, reads what other
ranks publish, and checks whether the processes of its node are alive. The clock thread does not use the store, which
blocks for as long as its host is stopped: it counts the seconds since this rank last made progress and ends the
process, which also works while the main thread is inside a collective.

The rank that finds out why the run ends publishes the cause. The first published cause counts, and only the rank that
published it prints and records it.
"""

import os
import signal
import time
from pathlib import Path
from threading import Event, Thread

import torch.distributed as dist

from megatron_cm3leon.monitoring import events
from megatron_cm3leon.runtime.exit_status import FAILED
from megatron_cm3leon.runtime.peers import Cause, Heartbeat, Peers, ProcessId
from megatron_cm3leon.runtime.report import report_failure
from megatron_cm3leon.runtime.stacks import dump_stacks, find_main_thread
from megatron_cm3leon.runtime.stall import find_late

PERIOD_SECONDS = 1.0
"""Between two exchanges of the link thread."""
TICK_SECONDS = 0.25
"""Between two checks of the clock thread."""
SILENCE_SECONDS = 25.0
"""A node is considered down when none of its ranks has sent a heartbeat for this long."""
LINK_SECONDS = 10.0
"""The store is considered unreachable when it has not answered for this long."""
SHARED_ERROR_SECONDS = 15.0
"""After an error that every rank may raise by itself, such as a full disk, each rank has this long to end by itself."""
LINGER_SECONDS = 2.5
"""The rank that hosts the store ends this much later than the others, so that they can read the cause."""
PAUSE_SECONDS = 5.0
"""If the clock thread itself was not scheduled for this long, the process was suspended (Ctrl-Z); this is no stall."""

CRASHED = "ended without reporting a cause: killed, out of memory, or crashed"


class Watchdog:
    """Runs from start() to close(); the main thread reports its progress with progress()."""

    def __init__(self, peers: Peers, run: Path, seconds: float, hosts_store: bool, launcher: int | None) -> None:
        """`seconds`: time without progress that counts as a stall; 0 disables. `launcher`: PID of the process without
        which this one must not continue; None if there is none.
        """
        self.peers, self.run, self.seconds = peers, run, seconds
        self.hosts_store, self.launcher = hosts_store, launcher
        self.attempt = 0
        self.steps_begun = False
        self.count, self.phase, self.moved = 0, "starting", time.monotonic()
        self.processes: dict[int, ProcessId] = {}
        """Rank -> process, of every rank once all have registered."""
        self.local: dict[int, ProcessId] = {}
        """The other ranks of this node."""
        self.cause: Cause | None = None
        """Why the run ends, once it is known."""
        self._main_cause: Cause | None = None
        """What the main thread published."""
        self._answered = time.monotonic()
        """When the store last answered."""
        self._lost = ""
        """Error of the connection to the store, once it is lost."""
        self._updated = False
        self._stalled = self._position_published = False
        self._next: tuple[dict[int, Heartbeat] | None, float] = (None, time.monotonic())
        """The next rank's last heartbeat, and since when it has not changed."""
        self._wake, self._known, self._closing, self._closed = Event(), Event(), Event(), Event()
        self._link = Thread(target=self._run_link, name="link", daemon=True)
        self._clock = Thread(target=self._run_clock, name="clock", daemon=True)

    # ------------------------------------------------------- called by the main thread

    def start(self) -> None:
        """Start both threads."""
        self._link.start()
        self._clock.start()

    def progress(self, phase: str) -> None:
        """Note that this rank enters `phase`; all ranks enter the same phases in the same order."""
        self.phase, self.moved = phase, time.monotonic()
        self.count += 1

    def publish_cause(self, cause: Cause) -> bool:
        """Publish why the run ends; returns whether it was the first cause, so that this rank has to print it."""
        self._main_cause = cause
        self._wake.set()
        if self._known.wait(LINK_SECONDS):
            return self.cause == cause
        self.cause = cause  # the store does not answer: the run folder decides which rank was first
        return self._record(cause, first=True)

    def wait_for_cause(self, seconds: float) -> None:
        """Wait until another rank has published a cause, which then ends this rank; at most `seconds`."""
        self._known.wait(seconds)

    def linger(self) -> None:
        """Give the other ranks time to read the cause before this rank ends, which may host the store.

        A rank that starts late finds no store when its host has ended, and would wait for it for minutes: the host
        waits until every rank has registered, but not longer than LINK_SECONDS.
        """
        end = time.monotonic() + LINK_SECONDS
        while self.hosts_store and not self.processes and time.monotonic() < end:
            time.sleep(TICK_SECONDS)
        time.sleep(LINGER_SECONDS)

    def close(self) -> None:
        """Mark this rank as done, and stop both threads. The host of the store waits until all ranks are done."""
        self._closing.set()
        self._wake.set()
        self._link.join(2 * SILENCE_SECONDS)
        self._closed.set()
        self._clock.join()

    # ------------------------------------------------------------------- link thread

    def _run_link(self) -> None:
        try:
            self.peers.register()
            while not self._closing.is_set():
                self._exchange()
                self._answered = time.monotonic()
                self._wake.wait(PERIOD_SECONDS)
                self._wake.clear()
            self.peers.mark_done()
            while self.hosts_store and self.peers.count_done() < self.peers.ranks:
                time.sleep(TICK_SECONDS / 10)
        except dist.DistError as error:
            self._lost = str(error).splitlines()[0]

    def _exchange(self) -> None:
        """One round: send a heartbeat, read what is new, check the other ranks, publish what this rank found."""
        self._send_heartbeat()
        if not self.processes and self.peers.all_registered():
            self._read_processes()
        if self._updated:
            self._updated = False
            if self.peers.read_stall() is not None:
                self._publish_position()
            self._set_cause(self.peers.read_cause())
        self._check_local_peers()
        self._check_next_node()
        if self._main_cause and not self.cause:
            self._set_cause(self.peers.publish_cause(self._main_cause))
        if self._stalled and not self.cause and self.peers.announce_stall() == self.peers.rank:
            self._explain_stall()

    def _read_processes(self) -> None:
        self.processes = self.peers.read_processes()
        this = self.peers.process
        self.local = {
            rank: process
            for rank, process in self.processes.items()
            if rank != self.peers.rank and this.is_local(process)
        }

    def _send_heartbeat(self) -> None:
        self._updated |= self.peers.send_heartbeat(self.count, self.phase)

    def _set_cause(self, cause: Cause | None) -> None:
        if cause and not self.cause:
            self.cause = cause
            self._known.set()

    def _check_local_peers(self) -> None:
        """Report a process of this node that ended without publishing a cause."""
        for rank, process in self.local.items():
            if not self.cause and not process.is_alive() and not self.peers.is_done(rank):
                self._report_cause(self._describe_failure(rank, process, CRASHED))

    def _check_next_node(self) -> None:
        """Report a node that sends no heartbeats. Each rank watches the next rank, if that is on another node."""
        rank = (self.peers.rank + 1) % self.peers.ranks
        watched = self.processes and rank not in self.local and rank != self.peers.rank
        if self.cause or not watched or self.peers.is_done(rank):
            return
        heartbeats, now = self.peers.read_heartbeats([rank]), time.monotonic()
        if heartbeats != self._next[0]:
            self._next = heartbeats, now
        elif now - self._next[1] > SILENCE_SECONDS:
            self._next = heartbeats, now  # if its node is alive, check it again after the same time
            process = self.processes[rank]
            if self._is_silent(process.host):
                silence = f"have sent no heartbeat for {SILENCE_SECONDS:.0f} s"
                what = f"and its node {silence}: the node or its network is down"
                self._report_cause(self._describe_failure(rank, process, what))

    def _is_silent(self, host: str) -> bool:
        """Whether no rank of a host sends a heartbeat for some periods."""
        ranks = [rank for rank, process in self.processes.items() if process.host == host]
        before = self.peers.read_heartbeats(ranks)
        self._keep_heartbeat(3 * PERIOD_SECONDS)
        return self.peers.read_heartbeats(ranks) == before

    def _keep_heartbeat(self, seconds: float) -> None:
        """Wait for some seconds and keep sending heartbeats."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._send_heartbeat()
            time.sleep(TICK_SECONDS)

    def _describe_failure(self, rank: int, process: ProcessId, what: str) -> Cause:
        return Cause("failure", rank, process.host, f"rank {rank} on {process} {what}.", FAILED, self.peers.rank)

    def _report_cause(self, cause: Cause) -> None:
        """Publish a cause that this thread found; print and record it if it is the first."""
        first = self.peers.publish_cause(cause)
        if first == cause:
            self._record(cause)
            report_failure(f"error: {cause.text}")
        self._set_cause(first)

    def _record(self, cause: Cause, first: bool = False) -> bool:
        """Record the cause in the run folder, with `first` only if no cause of this attempt is recorded yet.

        Returns whether this rank has to print the cause.
        """
        if not self.attempt:
            return True  # the run folder may belong to another run until this one has its lock
        values: dict[str, object] = {
            "rank": cause.rank,
            "host": cause.host,
            "cause": cause.text,
            "status": cause.status,
        }
        if cause.kind == "stall":
            values["seconds"] = self.seconds
        try:
            if first:
                return events.record_first(self.run, self.attempt, cause.kind, **values)
            events.record(self.run, self.attempt, cause.kind, **values)
        except OSError as error:
            report_failure(f"{self.run}: the {cause.kind} was not recorded: {error}")
        return True

    # ------------------------------------------------------------------------- stalls

    def _publish_position(self) -> None:
        """Write this rank's stacks and publish its position, once."""
        if self._position_published:
            return
        self._position_published = True
        self._write_stacks()
        self.peers.publish_position(find_main_thread())

    def _write_stacks(self) -> None:
        waited = time.monotonic() - self.moved
        title = f"rank {self.peers.rank} on {self.peers.process}, for {waited:.1f} s in: {self.phase}"
        try:
            dump_stacks(stacks_file(self.run, self.attempt, self.peers.rank), title)
        except OSError as error:
            report_failure(f"the stacks of rank {self.peers.rank} were not written: {error}")

    def _explain_stall(self) -> None:
        """Find the rank that the run waits for, which takes some seconds, and report it."""
        self._publish_position()
        ranks = range(self.peers.ranks)
        before = self.peers.read_heartbeats(ranks)
        self._keep_heartbeat(3 * PERIOD_SECONDS)
        processes = self.peers.read_processes()
        now, positions = self.peers.read_heartbeats(ranks), self.peers.read_positions()
        rank, text = find_late(len(ranks), processes, before, now, positions)
        self._report_cause(self._describe_stall(rank, processes.get(rank), text))

    def _describe_stall(self, rank: int, process: ProcessId | None, text: str) -> Cause:
        text = (
            f"no progress for {self.seconds:g} s (cluster.watchdog_seconds): {text}. Stacks of the ranks that respond: "
            f"{stacks_file(self.run, self.attempt, 0).parent}"
        )
        return Cause("stall", rank, process.host if process else "", text, FAILED, self.peers.rank)

    # -------------------------------------------------------------------- clock thread

    def _run_clock(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(TICK_SECONDS):
            now = time.monotonic()
            if now - last > PAUSE_SECONDS:
                self.moved += now - last
            last = now
            if self._launcher_has_ended():
                cause = self._describe_local_failure(f"the launcher (torchrun, process {self.launcher}) has ended")
                self._shutdown(cause, reachable=False)
            if self.cause:
                self._shutdown(self.cause, reachable=True)
            if self._lost and not self._closing.is_set():
                time.sleep(LINGER_SECONDS)  # if the launcher has ended and the store with it, that shows by then
                if not self._launcher_has_ended():
                    self._shutdown(self._describe_lost_store(), reachable=False)
            if self.seconds and now - self.moved > self.seconds and not self._stalled:
                self._stalled = True
                self._wake.set()
            if self._stalled and now - self._answered > LINK_SECONDS:
                self._write_stacks()
                self._shutdown(self._describe_blocked_store(), reachable=False)

    def _launcher_has_ended(self) -> bool:
        return self.launcher is not None and os.getppid() != self.launcher

    def _describe_local_failure(self, text: str) -> Cause:
        """A failure that this rank alone can see."""
        return Cause("failure", self.peers.rank, self.peers.process.host, f"{text}.", FAILED, self.peers.rank)

    def _describe_lost_store(self) -> Cause:
        """The connection to the store is lost, so the process that hosts it has ended."""
        if self.launcher is not None:
            return self._describe_local_failure(f"torchrun's store has ended ({self._lost})")
        if 0 not in self.processes:
            return self._describe_local_failure(f"rank 0, which hosts the store, has ended ({self._lost})")
        return self._describe_failure(0, self.processes[0], f"{CRASHED}; or its node is down")

    def _describe_blocked_store(self) -> Cause:
        """During a stall the store does not answer, so no other rank can be asked: its host is at fault."""
        if self.launcher is not None or 0 not in self.processes:
            return self._describe_stall(-1, None, "the store of the ranks does not respond")
        host = self.processes[0]
        return self._describe_stall(0, host, f"rank 0 on {host}, which hosts the store, does not respond")

    def _shutdown(self, cause: Cause, reachable: bool) -> None:
        """End this process with the cause's exit status.

        `reachable`: the other ranks know the cause through the store; then leave time for what the main thread, or
        they, still have to do. Otherwise the ranks that find the same cause agree through the run folder on which one
        prints it.
        """
        if not reachable:
            if self._record(cause, first=True):
                report_failure(f"error: {cause.text}")
        elif cause == self._main_cause:
            self._closed.wait(LINK_SECONDS + LINGER_SECONDS)  # the main thread prints it and ends the process
        elif cause.status != FAILED and self.steps_begun:
            self._closed.wait(SHARED_ERROR_SECONDS)
        elif self.hosts_store:
            self.linger()
        if cause.kind == "stall":
            self._kill_unresponsive(cause.rank)
        os._exit(cause.status)

    def _kill_unresponsive(self, rank: int) -> None:
        """Kill the late rank if it does not end: a stopped process cannot end itself, so a rank of its node does it."""
        process = self.local.get(rank)
        if process is None:
            return
        end = time.monotonic() + 3 * LINGER_SECONDS
        while process.is_alive():
            if time.monotonic() > end:
                os.kill(process.process, signal.SIGKILL)
                return
            time.sleep(TICK_SECONDS)


def stacks_file(run: Path, attempt: int, rank: int) -> Path:
    """Where a rank's stacks are written when the run stalls."""
    return run / "stacks" / f"attempt-{attempt}" / f"rank-{rank:05d}.txt"
