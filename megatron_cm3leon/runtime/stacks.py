"""Where a process is: the Python stacks of all its threads in a file, and its main thread in one line."""

import faulthandler
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_PACKAGE = str(Path(__file__).parents[1])
_INNERMOST = 8
"""Frames among which a collective shows."""


@dataclass(frozen=True)
class Standing:
    """Where the main thread is."""

    text: str
    """Innermost line of this package: `file:line function`."""
    in_collective: bool
    """Whether it waits in torch.distributed for other ranks."""


def dump_stacks(path: Path, title: str) -> None:
    """Write the stacks of all threads, innermost line first, under a title."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        file.write(f"{title}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def main_thread() -> Standing:
    """Where the main thread of this process is now."""
    frames = list(_outwards(sys._current_frames()[threading.main_thread().ident]))
    own = next((frame for frame in frames if frame.f_code.co_filename.startswith(_PACKAGE)), frames[0])
    inside = any("/torch/distributed/" in frame.f_code.co_filename for frame in frames[:_INNERMOST])
    return Standing(f"{own.f_code.co_filename}:{own.f_lineno} {own.f_code.co_name}", inside)


def _outwards(frame: FrameType | None):
    while frame is not None:
        yield frame
        frame = frame.f_back
