"""Attempt: one start of a run as one rank lives it, from meeting the other ranks to an end that says why.

    Attempt(...), begin()   store, watchdog, signals; lock of the run folder, number of the attempt, process groups
    watch.progress()        and stop_asked(), from the training loop
    finish() or fail()      the events stop, failure; the exit status

Exit status: 0 done · 2 the user must mend something · 75 stopped on request, the same command goes on · 1 a failure,
after which a restart may help. The first cause is told once, by the rank that met it; see runtime/watchdog.py.
"""

import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal, NoReturn

import torch
import torch.distributed as dist

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.distributed.launch import Rank, gather_objects, meet, uses_launchers_store
from megatron_cm3leon.engine.groups import destroy_groups, initialize_groups
from megatron_cm3leon.monitoring import events
from megatron_cm3leon.runtime.exit_status import DONE, FAILED, STOPPED, USER_ERROR
from megatron_cm3leon.runtime.lock import RunLock
from megatron_cm3leon.runtime.peers import Cause, Peers
from megatron_cm3leon.runtime.preflight import check_all_reduce, compare_ranks
from megatron_cm3leon.runtime.signals import StopRequested, StopSignals
from megatron_cm3leon.runtime.watchdog import LINGER_SECONDS, SILENCE_SECONDS, Watchdog

StopReason = Literal["finished", "stop_after", "signal"]
"""Why training stopped: train.steps, train.stop_after, or a signal."""

SIGNAL_SECONDS = 1.5
"""A launcher signals the ranks that are left when one has died: its death, if it was that, is known after this."""


class Attempt:
    """What the training loop is given: the attempt's number, its watchdog and its signals."""

    def __init__(self, config: Config, rank: Rank, device: torch.device, signals: StopSignals) -> None:
        """Meets the other ranks and starts the watchdog."""
        self.config, self.rank, self.device, self.signals = config, rank, device, signals
        self.run, self.first = Path(config.output), rank.rank == 0
        self.number = 0
        self.exit_status, self.stop_event = DONE, {}
        self.lock = RunLock(self.run)
        self.store = meet(rank)
        agent = uses_launchers_store()
        self.watch = Watchdog(
            Peers(self.store, rank.rank, rank.world_size),
            self.run,
            config.cluster.watchdog_seconds,
            hosts_store=self.first and not agent and rank.world_size > 1,
            launcher=os.getppid() if agent else None,
        )
        self.watch.start()

    def begin(self) -> None:
        """Take the run folder, agree on the attempt's number, compare the ranks and create the groups; collective."""
        self.watch.progress("meeting the other ranks")
        if self.first:
            self._take_folder()
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

    def _take_folder(self) -> None:
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
        except OSError as error:
            raise ValueError(
                f"output ({self.run}) cannot be written ({error.strerror or error}); mend it or give another output."
            ) from error

    def record(self, event: str, **values) -> None:
        """Record an event of this attempt."""
        events.record(self.run, self.number, event, **values)

    def start_steps(self) -> None:
        """From here on there is something to save: a signal waits for the end of the step."""
        self.signals.start_steps()
        self.watch.steps_begun = True

    def stop_asked(self, step: int) -> bool:
        """Whether a signal asked any rank to stop after `step`; recorded once; collective."""
        found = self.signals.agree(self.device)
        if found and self.first:
            self.record("signal", step=step, signal=found[0], rank=found[1])
        return found is not None

    def finish(self, reason: StopReason, step: int) -> None:
        """Training stopped after `step`; `reason` decides the exit status."""
        self.stop_event = {"step": step, "reason": reason}
        self.exit_status = STOPPED if reason == "signal" else DONE

    def leave(self) -> None:
        """Record the stop, leave the other ranks and release the run folder."""
        if self.first:
            self.record("stop", **self.stop_event)
        self.watch.close()
        self.lock.release()

    def fail(self, error: BaseException) -> NoReturn:
        """End this process after an error; of all ranks the first one to fail prints and records why."""
        if is_lost_connection(error):
            self.watch.wait_for_cause(SILENCE_SECONDS + LINGER_SECONDS)
        elif isinstance(error, StopRequested):
            self.watch.wait_for_cause(SIGNAL_SECONDS)
        cause = self._describe(error)
        if self.watch.tell(cause):
            self._show(error, cause)
        if self.watch.hosts_store:
            time.sleep(LINGER_SECONDS)
        os._exit(self.watch.cause.status)  # process groups without their peers cannot be taken down in order

    def _describe(self, error: BaseException) -> Cause:
        kind, status, text = "failure", FAILED, f"{type(error).__name__}: {error}"
        if isinstance(error, StopRequested) and not self.signals.steps_begun:
            kind, status = "signal", STOPPED
            text = f"{error.name} before the first step: nothing to save; the same command goes on."
        elif isinstance(error, StopRequested):
            text = f"a second {error.name}: ended at once; the same command goes on from the last checkpoint."
        elif isinstance(error, torch.OutOfMemoryError | MemoryError):
            status = USER_ERROR
            text = (
                f"out of memory on {self.device} of {platform.node()} ({str(error).splitlines()[0] or 'MemoryError'}); "
                f"lower train.micro_batch_size, set parallel.recompute=selective or full, or spread the model over "
                f"more ranks (parallel.zero, parallel.tensor, parallel.pipeline)."
            )
        elif isinstance(error, ValueError | OSError):
            status, text = USER_ERROR, str(error)
        elif is_lost_connection(error):
            text = f"lost the connection to the other ranks, none of which told why ({str(error).splitlines()[0]})."
        rank = self.rank.rank
        return Cause(kind, rank, platform.node(), text, status, teller=rank)

    def _show(self, error: BaseException, cause: Cause) -> None:
        """Print and record the cause."""
        told = isinstance(error, StopRequested | ValueError | OSError | torch.OutOfMemoryError | MemoryError)
        if not told and not is_lost_connection(error):
            print(f"rank {cause.rank} on {cause.host} failed:", file=sys.stderr)
            traceback.print_exception(error)
        print(f"error (rank {cause.rank}): {cause.text}", file=sys.stderr, flush=True)
        if not self.number:
            return  # the run folder is not this run's yet: another one may hold it
        try:
            if cause.kind == "signal":
                self.record("signal", signal=error.name, rank=cause.rank)
                self.record("stop", reason="signal")
            else:
                self.record("failure", rank=cause.rank, host=cause.host, cause=cause.text, status=cause.status)
        except OSError as trouble:
            print(f"{self.run}: the {cause.kind} was not recorded: {trouble}", file=sys.stderr, flush=True)


@contextmanager
def start_attempt(config: Config, rank: Rank, device: torch.device) -> Iterator[Attempt]:
    """Meet the other ranks and create the process groups; after the body leave them in order.

    The body ends with Attempt.finish. An error or a second signal inside it ends this process with the exit status of
    runtime/exit_status.py, once the first cause is reported; one before the ranks have met raises SystemExit.
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
            print(f"stopped by {error.name} before the ranks had met", file=sys.stderr, flush=True)
            raise SystemExit(STOPPED) from error
        if not isinstance(error, ValueError | OSError):
            raise
        print(f"error (rank {rank.rank}): {error}", file=sys.stderr, flush=True)
        raise SystemExit(USER_ERROR) from error


def is_lost_connection(error: BaseException) -> bool:
    """Whether the error says no more than that another rank is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and bool(re.search(r"gloo|NCCL|Connection (closed|reset) by peer", str(error)))
    )
