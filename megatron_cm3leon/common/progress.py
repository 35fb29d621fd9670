"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from threading import Lock

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL_SECONDS = 5.0


class Meter:
    """Counts finished units; `advance(n, note)` after each piece of work."""

    def __init__(
        self,
        total: int | None,
        label: str,
        unit: str,
        bar: Progress | None,
        interval: float = PLAIN_INTERVAL_SECONDS,
    ) -> None:
        self.total, self.label, self.unit, self.bar, self.interval = total, label, unit, bar, interval
        self.done, self.note = 0, ""
        self.started = self.printed = time.monotonic()
        self.task = bar.add_task(label, total=total, rate="") if bar else None

    def advance(self, units: int = 1, note: str = "") -> None:
        """Report `units` more finished; `note` is shown behind the rate, such as a loss."""
        self.done += units
        self.note = note
        now = time.monotonic()
        if self.bar and self.task is not None:
            self.bar.update(self.task, advance=units, rate=f"{self.rate(now)} {note}")
        elif now - self.printed >= self.interval:
            self.printed = now
            self.print_line(now)

    def count(self, parts: int) -> Callable[[int], None]:
        """A function to call, from any thread, with finished parts of units; `parts` make one unit."""
        lock, left = Lock(), 0

        def add(finished: int) -> None:
            nonlocal left
            with lock:
                left += finished
                if left >= parts:
                    self.advance(left // parts)
                    left %= parts

        return add

    def rate(self, now: float) -> str:
        per_second = self.done / max(now - self.started, 1e-9)
        return f"{per_second:.3g} {self.unit}/s"

    def print_line(self, now: float) -> None:
        elapsed = now - self.started
        left = ""
        if self.total and self.done:
            left = f", {elapsed * (self.total - self.done) / self.done:.0f} s left"
        of = f"/{self.total}" if self.total else ""
        print(
            f"{self.label}: {self.done}{of} {self.unit}, {self.rate(now)}{left} {self.note}".rstrip(),
            flush=True,
        )


@contextmanager
def meter(total: int | None, label: str, unit: str, quiet: bool = False) -> Iterator[Meter]:
    """Show progress inside the `with`; a last plain line is always printed where there is no terminal.

    `quiet` shows nothing: for all ranks but the first.
    """
    if quiet:
        yield Meter(None, label, unit, None, interval=float("inf"))
        return
    if not sys.stdout.isatty():
        plain = Meter(total, label, unit, None)
        yield plain
        plain.print_line(time.monotonic())
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console()) as bar:
        yield Meter(total, label, unit, bar)


def track(items: Iterable, *, label: str, unit: str, total: int | None = None) -> Iterator:
    """Yield `items` while showing how many are done."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with meter(total, label, unit) as progress:
        for item in items:
            yield item
            progress.advance()
