"""Where a process is: the Python stacks of all threads in a file, and the position of the main thread in one line."""

import faulthandler
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_PACKAGE = str(Path(__file__).parents[1])
_INNERMOST = 8
"""Number of innermost frames among which a collective is searched for."""


@dataclass(frozen=True)
class StackPosition:
    """Where the main thread of a process is."""

    text: str
    """Innermost frame in this package: `file:line function`."""
    in_collective: bool
    """Whether the thread waits for other ranks in torch.distributed."""


def dump_stacks(path: Path, title: str) -> None:
    """Write the stacks of all threads, innermost frame first, below `title`. Creates the folder; OSError as open()."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        file.write(f"{title}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def find_main_thread() -> StackPosition:
    """The current position of this process's main thread."""
    frames = list(_outwards(sys._current_frames().get(threading.main_thread().ident or 0)))
    if not frames:
        return StackPosition("the main thread has ended", in_collective=False)
    shown = next((frame for frame in frames if frame.f_code.co_filename.startswith(_PACKAGE)), frames[0])
    in_collective = any("/torch/distributed/" in frame.f_code.co_filename for frame in frames[:_INNERMOST])
    return StackPosition(f"{shown.f_code.co_filename}:{shown.f_lineno} {shown.f_code.co_name}", in_collective)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """`frame` and its callers, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back
