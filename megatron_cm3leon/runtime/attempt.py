"""Lifecycle of one training attempt on one rank: rendezvous, training, shutdown, exit status.

    Attempt(...), begin()     store, watchdog, signals; lock of the run folder, attempt number, process groups
    watch.progress(),         called by the training loop
    stop_requested()
    finish() or fail()        why the run stopped; records the event stop or failure, sets the exit status

Exit status: 0 done; 2 the user must fix something; 75 stopped on request, the same command continues the run; 1 a
failure after which a restart may help. Only the first cause is reported, by the rank that found it
(runtime/watchdog.py).
"""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal, NoReturn

import torch
import torch.distributed as dist

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.distributed.launch import Rank, gather_objects, rendezvous, uses_launcher_store
from megatron_cm3leon.engine.groups import destroy_groups, initialize_groups
from megatron_cm3leon.monitoring import events
from megatron_cm3leon.runtime.exit_status import DONE, FAILED, STOPPED, USER_ERROR
from megatron_cm3leon.runtime.lock import RunLock
from megatron_cm3leon.runtime.peers import Cause, Peers
from megatron_cm3leon.runtime.preflight import check_all_reduce, compare_ranks
from megatron_cm3leon.runtime.report import report_failure
from megatron_cm3leon.runtime.signals import StopRequested, StopSignals
from megatron_cm3leon.runtime.watchdog import LINGER_SECONDS, SILENCE_SECONDS, Watchdog

StopReason = Literal["finished", "stop_after", "signal"]
"""Why training stopped: train.steps, train.stop_after, or a signal."""

SIGNAL_SECONDS = 1.5
"""When a rank dies, its launcher signals the others: a signal waits this long for the report of a dead rank."""


class Attempt:
    """One start of a run on this rank: its number, watchdog, signals, lock of the run folder, and events."""

    def __init__(self, config: Config, rank: Rank, device: torch.device, signals: StopSignals) -> None:
        """Connects to the store that the ranks share, and starts the watchdog. ValueError as rendezvous()."""
        self.config, self.rank, self.device, self.signals = config, rank, device, signals
        self.run, self.first = Path(config.output), rank.rank == 0
        self.number = 0
        self.exit_status = DONE
        self.stop_event: dict[str, object] = {}
        self.lock = RunLock(self.run)
        self.store = rendezvous(rank)
        launched = uses_launcher_store()
        self.watch = Watchdog(
            Peers(self.store, rank.rank, rank.world_size),
            self.run,
            config.cluster.watchdog_seconds,
            hosts_store=self.first and not launched and rank.world_size > 1,
            launcher=os.getppid() if launched else None,
        )
        self.watch.start()

    def begin(self) -> None:
        """Lock the run folder, number the attempt, compare the ranks and create the process groups; collective.

        ValueError when the run folder is not writable or in use, and as compare_ranks() and check_all_reduce().
        """
        self.watch.progress("waiting for the other ranks")
        if self.first:
            self._lock_folder()
            self.store.set("attempt", str(events.next_attempt(self.run)))
        self.number = self.watch.attempt = int(self.store.get("attempt"))
        preflight = self.config.cluster.preflight
        if preflight:
            self.watch.progress("comparing the ranks")
            compare_ranks(self.config, self.rank, self.device, self.store)
        self.watch.progress("creating process groups")
        longest = timedelta(seconds=2 * self.config.cluster.watchdog_seconds)
        initialize_groups(self.config, self.rank, self.device, self.store, longest)
        if preflight:
            check_all_reduce(self.device)
        hosts = gather_objects(platform.node())
        if self.first:
            job, restarts = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
            hosts = list(dict.fromkeys(hosts))
            self.record("start", job=job, restarts=restarts, ranks=self.rank.world_size, hosts=hosts)

    def _lock_folder(self) -> None:
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
        except OSError as error:
            raise ValueError(
                f"output ({self.run}) is not writable ({error.strerror or error}); fix the permissions or "
                f"choose another output=..."
            ) from error

    def record(self, event: str, **values: object) -> None:
        """Append an event of this attempt to events.jsonl."""
        events.record(self.run, self.number, event, **values)

    def start_steps(self) -> None:
        """From now on there is something to save: a signal takes effect after the current step."""
        self.signals.start_steps()
        self.watch.steps_begun = True

    def stop_requested(self, step: int) -> bool:
        """Whether any rank has received a signal to stop after `step`; recorded once; collective."""
        found = self.signals.agree(self.device)
        if found and self.first:
            self.record("signal", step=step, signal=found[0], rank=found[1])
        return found is not None

    def finish(self, reason: StopReason, step: int) -> None:
        """Training stopped after `step`; `reason` decides the exit status."""
        self.stop_event = {"step": step, "reason": reason}
        self.exit_status = STOPPED if reason == "signal" else DONE

    def leave(self) -> None:
        """Record the stop, disconnect from the other ranks and release the run folder."""
        if self.first:
            self.record("stop", **self.stop_event)
        self.watch.close()
        self.lock.release()

    def fail(self, error: BaseException) -> NoReturn:
        """End this process after an error; the first rank to fail prints and records the cause."""
        if is_lost_connection(error):
            self.watch.wait_for_cause(SILENCE_SECONDS + LINGER_SECONDS)
        elif isinstance(error, StopRequested):
            self.watch.wait_for_cause(SIGNAL_SECONDS)
        cause = self._describe(error)
        if self.watch.publish_cause(cause):
            self._report(error, cause)
        if self.watch.hosts_store:
            self.watch.linger()
        os._exit((self.watch.cause or cause).status)  # without the other ranks, destroying process groups hangs

    def _describe(self, error: BaseException) -> Cause:
        """Why the run ends because of `error`: what the user reads, and the exit status."""
        kind, status, text = "failure", FAILED, f"{type(error).__name__}: {error}"
        first_line = str(error).partition("\n")[0]
        if isinstance(error, StopRequested) and not self.signals.steps_begun:
            kind, status = "signal", STOPPED
            text = f"{error.name} before the first step: nothing to save; the same command starts the run again."
        elif isinstance(error, StopRequested):
            text = f"a second {error.name}: ended at once; the same command resumes from the last checkpoint."
        elif isinstance(error, torch.OutOfMemoryError | MemoryError):
            status = USER_ERROR
            text = (
                f"out of memory on {self.device} of {platform.node()} ({first_line or 'MemoryError'}); "
                f"lower train.micro_batch_size, set parallel.recompute=selective or full, or spread the model over "
                f"more ranks (parallel.zero, parallel.tensor, parallel.pipeline)."
            )
        elif isinstance(error, ValueError | OSError):
            status, text = USER_ERROR, str(error)
        elif is_lost_connection(error):
            text = f"lost the connection to the other ranks, none of which reported a cause ({first_line})."
        rank = self.rank.rank
        return Cause(kind, rank, platform.node(), text, status, reporter=rank)

    def _report(self, error: BaseException, cause: Cause) -> None:
        """Print the cause, with a traceback if the error was not expected, and record it."""
        explained = isinstance(error, StopRequested | ValueError | OSError | torch.OutOfMemoryError | MemoryError)
        shown = None if explained or is_lost_connection(error) else error
        report_failure(f"error (rank {cause.rank} on {cause.host}): {cause.text}", shown)
        if not self.number:
            return  # the run folder may belong to another run until this one has its lock
        try:
            if isinstance(error, StopRequested) and cause.kind == "signal":
                self.record("signal", signal=error.name, rank=cause.rank)
                self.record("stop", reason="signal")
            else:
                self.record("failure", rank=cause.rank, host=cause.host, cause=cause.text, status=cause.status)
        except OSError as record_error:
            report_failure(f"{self.run}: the {cause.kind} was not recorded: {record_error}")


@contextmanager
def start_attempt(config: Config, rank: Rank, device: torch.device) -> Iterator[Attempt]:
    """Connect to the other ranks and create the process groups; after the body disconnect in order.

    The body ends with Attempt.finish. After an error or a second signal in it, the first cause is reported and this
    process ends with an exit status of runtime/exit_status.py; before the ranks are connected, SystemExit is raised.
    """
    signals, attempt = StopSignals(), None
    signals.install()
    try:
        attempt = Attempt(config, rank, device, signals)
        attempt.begin()
        yield attempt
        signals.ignore()
        destroy_groups()
        attempt.leave()
    except (Exception, StopRequested) as error:
        signals.ignore()
        if attempt is not None:
            attempt.fail(error)
        if isinstance(error, StopRequested):
            report_failure(f"stopped by {error.name} before the ranks were connected")
            raise SystemExit(STOPPED) from error
        if not isinstance(error, ValueError | OSError):
            raise
        report_failure(f"error (rank {rank.rank}): {error}")
        raise SystemExit(USER_ERROR) from error


def is_lost_connection(error: BaseException) -> bool:
    """Whether the error says only that another rank has ended."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and bool(re.search(r"gloo|NCCL|Connection (closed|reset) by peer", str(error)))
    )
