"""The ranks of an evaluation, which share the items of a task: `torchrun --nproc-per-node 8 tools/evaluate.py TASK ...`

The items, such as captions, are cut into batches, the same for any number of ranks, and the batches that are not
finished are distributed over the ranks in turn. Each rank appends its items to a file of its own (FinishedItems). The
first rank shows the progress of all, waits for them, reads their files and computes the result. So images, captions,
answers and figures do not depend on interruptions or on the number of ranks, which may change between them.

There are no collectives and no process group: the ranks share a folder, and the store of distributed/launch.py, through
which the watchdog of training (runtime/watchdog.py) ends all ranks when one has failed; only that one prints its error.
"""

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from megatron_cm3leon.common.cli import explain_error
from megatron_cm3leon.common.progress import Meter, meter
from megatron_cm3leon.distributed.device import resolve_rank_device
from megatron_cm3leon.distributed.launch import Rank, rendezvous, set_threads, uses_launcher_store
from megatron_cm3leon.evaluation.result import FinishedItems
from megatron_cm3leon.runtime.exit_status import FAILED
from megatron_cm3leon.runtime.peers import Cause, Peers
from megatron_cm3leon.runtime.report import report_failure
from megatron_cm3leon.runtime.watchdog import LINGER_SECONDS, SILENCE_SECONDS, Watchdog

ONE_RANK = Rank(rank=0, world_size=1, local_rank=0, local_world_size=1)
POLL_SECONDS = 0.05
"""Between two looks at the store for what another rank is about to write."""
REPORT_SECONDS = 1.0
"""Between two reports of a rank's progress to the store."""
SECONDS_FOR_FIRST_RANK = 20
"""A launcher ends all ranks when one has ended: the others wait, so that the first rank can print its error."""

Thing = TypeVar("Thing")
Advance = Callable[[int], None]


class Ranks:
    """The ranks of this launch, as one of them; by default it is alone.

    All ranks call the same methods in the same order.
    """

    def __init__(self, rank: Rank = ONE_RANK, store: dist.Store | None = None) -> None:
        """`store` is that of all ranks; one rank alone needs none."""
        self.rank, self.store = rank, store or dist.HashStore()
        self._calls = 0

    @property
    def first(self) -> bool:
        """Whether this rank shows progress, and computes and writes the result."""
        return self.rank.rank == 0

    def require_one(self, what: str) -> None:
        """ValueError if there are several ranks, for `what` they do not share."""
        if self.rank.world_size > 1:
            raise ValueError(
                f"{what} is not shared among ranks, but {self.rank.world_size} were started (WORLD_SIZE); start one "
                f"process, without torchrun or srun -n."
            )

    def resolve_device(self, name: str) -> str:
        """The device of this rank for the option --device; errors as resolve_rank_device."""
        return resolve_rank_device(name, self.rank)

    def from_first(self, compute: Callable[[], Any]) -> Any:
        """What `compute` returns on the first rank, as JSON holds it, on every rank; the others do not call it."""
        key = self._name_key()
        if self.first:
            self.store.set(key, json.dumps(compute()))
        while not self.store.check([key]):
            time.sleep(POLL_SECONDS)
        return json.loads(self.store.get(key))

    def open_items(self, output: str | Path, identity: dict) -> FinishedItems:
        """The items of a task in the folder `output`; the first rank has all that are finished, the others their own.

        ValueError as FinishedItems.
        """
        finished = FinishedItems(output, identity) if self.first else None
        self.from_first(lambda: None)  # the first rank reads the files before any other rank changes its own
        return finished or FinishedItems(output, identity, self.rank.rank)

    def finish_items(
        self,
        things: Mapping[str, Thing],
        compute: Callable[[list[Thing]], Iterable[dict]],
        finished: FinishedItems,
        *,
        batch_size: int,
        label: str,
        unit: str,
    ) -> None:
        """Compute the items of `things`, by key, that are not finished; `compute` gets a batch and returns its items.

        A batch is computed again as a whole if one of its items is missing, because rounding may depend on what else is
        in a batch. Afterwards `finished` of the first rank has all items. ValueError for a batch size below 1, and if
        the ranks do not see the same folder.
        """
        if batch_size < 1:
            raise ValueError(f"--batch-size ({batch_size}) must be at least 1.")
        keys = list(things)
        batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
        left = self.from_first(
            lambda: [number for number, batch in enumerate(batches) if not finished.items.keys() >= set(batch)]
        )
        done = len(keys) - sum(len(batches[number]) for number in left)
        with self.share(left, total=len(keys), done=done, label=label, unit=unit) as (numbers, advance):
            for number in numbers:
                batch = batches[number]
                items = compute([things[key] for key in batch])
                finished.add_all(dict(zip(batch, items, strict=True)))
                advance(len(batch))
            finished.sync()
        if not self.first:
            return
        finished.read_ranks(self.rank.world_size)
        missing = len(things.keys() - finished.items.keys())
        if missing:
            raise ValueError(
                f"{missing} of {len(keys)} items are not in {finished.path.parent}: other ranks wrote them elsewhere; "
                f"give an --output on a file system that all nodes share."
            )

    @contextmanager
    def share(
        self, numbers: Sequence[int], *, total: int, done: int, label: str, unit: str
    ) -> Iterator[tuple[Sequence[int], Advance]]:
        """This rank's share of `numbers`, which are the same on all ranks, and advance(n): n more units are finished.

        The first rank leaves the `with` when all ranks have left it. Meanwhile it shows how many of the `total` units
        all ranks have finished; `done` of them were finished before.
        """
        ranks, key = self.rank.world_size, self._name_key()
        with meter(total, label, unit, quiet=not self.first) as shown:
            shown.advance(done)
            progress = _Progress(self.store, f"{key}/units", shown)
            yield numbers[self.rank.rank :: ranks], progress.advance
            progress.report()
            left = self.store.add(f"{key}/left", 1)
            while self.first and left < ranks:
                time.sleep(POLL_SECONDS)
                progress.advance(0)
                left = self.store.add(f"{key}/left", 0)
            progress.report()

    def _name_key(self) -> str:
        """A key of the store for this call, the same on every rank."""
        self._calls += 1
        return f"evaluation/{self._calls}"


class _Progress:
    """Finished units of all ranks, counted in the store."""

    def __init__(self, store: dist.Store, key: str, shown: Meter) -> None:
        self.store, self.key, self.meter = store, key, shown
        self.unreported = self.shown = 0
        self.reported = time.monotonic()

    def advance(self, units: int) -> None:
        """Count units that this rank has finished."""
        self.unreported += units
        if time.monotonic() - self.reported >= REPORT_SECONDS:
            self.report()

    def report(self) -> None:
        """Add what this rank has finished to the count in the store, and show what all ranks have."""
        count = self.store.add(self.key, self.unreported)
        self.unreported, self.reported = 0, time.monotonic()
        if count > self.shown:
            self.meter.advance(count - self.shown)
            self.shown = count


@contextmanager
def start_ranks() -> Iterator[Ranks]:
    """Connect to the other ranks of this launch, if there are any, and share the node's cores with its other ranks.

    After an error inside the `with`, or the loss of a rank, all ranks end with the same exit status: 2 for a ValueError
    or OSError, and only one of them prints it. One rank alone raises the error. ValueError as Rank.from_environment and
    rendezvous.
    """
    try:
        rank = Rank.from_environment()
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            raise
        time.sleep(SECONDS_FOR_FIRST_RANK)
        raise SystemExit(explain_error(error)[0]) from error
    if rank.world_size == 1:
        yield Ranks(rank)
        return
    if rank.rank:
        logging.getLogger("megatron_cm3leon").setLevel(logging.WARNING)
    set_threads(0, rank)
    store = rendezvous(rank)
    launched = uses_launcher_store()
    watch = Watchdog(
        Peers(store, rank.rank, rank.world_size),
        Path(),  # of a run whose stalls and causes are recorded: none here
        seconds=0,
        hosts_store=rank.rank == 0 and not launched,
        launcher=os.getppid() if launched else None,
    )
    watch.start()
    try:
        yield Ranks(rank, store)
    except BaseException as error:
        _end_all(error, rank, watch)
    watch.close()


def _end_all(error: BaseException, rank: Rank, watch: Watchdog) -> NoReturn:
    """End this process because of an error, and the other ranks; the first rank that failed prints the error."""
    if isinstance(error, dist.DistError):  # another rank has ended, which the watchdog explains
        watch.wait_for_cause(SILENCE_SECONDS + LINGER_SECONDS)
    host, shown = platform.node(), None
    if isinstance(error, SystemExit):  # argparse has printed its message
        status, text = (error.code if isinstance(error.code, int) else int(error.code is not None)), ""
    elif isinstance(error, ValueError | OSError | KeyboardInterrupt):
        status, text = explain_error(error)
        text = text.replace("error:", f"error (rank {rank.rank} on {host}):", 1)
    else:
        status, text, shown = FAILED, f"error (rank {rank.rank} on {host}): {type(error).__name__}: {error}", error
    cause = Cause("failure", rank.rank, host, text, status, reporter=rank.rank)
    if watch.publish_cause(cause) and text:
        report_failure(text, shown)
    sys.stdout.flush()
    time.sleep(LINGER_SECONDS)  # the launcher ends all ranks when this one has ended: they end by themselves before
    os._exit((watch.cause or cause).status)
