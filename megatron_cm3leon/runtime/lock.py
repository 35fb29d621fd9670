"""RunLock: allows one run at a time in a run folder.

It is a POSIX record lock (fcntl.lockf) on RUN/lock, which the kernel releases when the process ends for any reason, so
a leftover file blocks nobody. Child processes do not inherit it. NFS supports such locks, and Lustre with -o flock.
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
"""Waiting time for ranks of the previous attempt that are still ending."""
_PAUSE_SECONDS = 0.2

logger = logging.getLogger(__name__)


class RunLock:
    """Held from acquire() to release() or to the end of the process. Only rank 0 takes it."""

    def __init__(self, run: str | Path) -> None:
        self.path = Path(run) / NAME
        self.file: int | None = None

    def acquire(self, patience: float = PATIENCE_SECONDS) -> None:
        """Take the lock; ValueError that names its holder when it is not released within `patience` seconds."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + patience
        while not _try_lock(file, self.path):
            if time.monotonic() > deadline:
                holder = _describe_holder(os.pread(file, 1000, 0))
                os.close(file)
                raise ValueError(
                    f"output ({self.path.parent}) is in use by {holder}; two runs in one folder would mix their "
                    f"checkpoints and metrics. Wait until it has ended, stop it, or choose another output=..."
                )
            time.sleep(_PAUSE_SECONDS)
        self.file = file
        job = os.environ.get("SLURM_JOB_ID", "")
        this = {"host": platform.node(), "process": os.getpid(), "job": job, "since": time.time()}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(this).encode(), 0)

    def release(self) -> None:
        """Release the lock. The file stays: deleting it could remove another run's lock."""
        if self.file is not None:
            os.close(self.file)
            self.file = None


def _try_lock(file: int, path: Path) -> bool:
    """Whether this process now has the lock; True with a warning where the file system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        # For example Lustre mounted without -o flock: run without the lock rather than not at all.
        logger.warning("%s: this file system has no locks (%s); make sure that no two runs use the folder", path, error)
    return True


def _describe_holder(text: bytes) -> str:
    try:
        holder = json.loads(text)
    except ValueError:  # it has the lock and has not written its name yet
        return "another run"
    job = f", job {holder['job']}" if holder["job"] else ""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
    return f"process {holder['process']} on {holder['host']}{job}, since {since}"
