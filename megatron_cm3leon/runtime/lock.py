"""RunLock: one run at a time in a run folder.

A POSIX record lock (fcntl.lockf) on RUN/lock, which the kernel gives back when the process ends, however it ends: a
file that was left behind blocks nobody. Children do not inherit it. NFS has such locks; Lustre with -o flock.
"""

import errno
import fcntl
import json
import logging
import os
import platform
import time
from pathlib import Path

NAME = "lock"
PATIENCE_SECONDS = 15.0
"""For ranks of the attempt before that are just ending."""
_PAUSE_SECONDS = 0.2

logger = logging.getLogger(__name__)


class RunLock:
    """Held from acquire() to release() or to the end of the process; for the first rank alone."""

    def __init__(self, run: str | Path) -> None:
        self.path = Path(run) / NAME
        self.file: int | None = None

    def acquire(self, patience: float = PATIENCE_SECONDS) -> None:
        """Take the lock; ValueError, naming who holds it, when it does not come free within `patience` seconds."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + patience
        while not _try(file, self.path):
            if time.monotonic() > deadline:
                holder = _describe(os.pread(file, 1000, 0))
                os.close(file)
                raise ValueError(
                    f"output ({self.path.parent}) is in use by {holder}; two runs in one folder would mix their "
                    f"checkpoints and metrics. Wait until that one has ended, end it, or choose another output=..."
                )
            time.sleep(_PAUSE_SECONDS)
        self.file = file
        job = os.environ.get("SLURM_JOB_ID", "")
        holder = {"host": platform.node(), "process": os.getpid(), "job": job, "since": time.time()}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode(), 0)

    def release(self) -> None:
        """Give the lock back; the file stays, for deleting it could take another run's lock away."""
        if self.file is not None:
            os.close(self.file)
            self.file = None


def _try(file: int, path: Path) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        # Lustre mounted without -o flock, for one: better unguarded than not at all.
        logger.warning("%s: this file system has no locks (%s); see that no two runs share the folder", path, error)
    return True


def _describe(text: bytes) -> str:
    try:
        holder = json.loads(text)
    except ValueError:  # between taking the lock and writing its name
        return "another run"
    job = f", job {holder['job']}" if holder["job"] else ""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
    return f"process {holder['process']} on {holder['host']}{job}, since {since}"
