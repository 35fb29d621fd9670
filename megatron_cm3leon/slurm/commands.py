"""SLURM's own commands and its notation: what is asked of a controller, and how durations are written."""

import re
import shutil
import subprocess
from pathlib import Path

# The forms that sbatch takes: minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s.
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def parse_time(text: str) -> int:
    """Seconds of a time limit in one of sbatch's forms; ValueError for anything else."""
    found = _TIME.fullmatch(text)
    if not found:
        raise ValueError(
            f"--time ({text}) is no time limit; write minutes, minutes:seconds, hours:minutes:seconds or "
            f"days-hours:minutes:seconds, such as 24:00:00 or 2-00:00:00."
        )
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is not None:
        seconds = ((days * 24 + first) * 60 + (second or 0)) * 60 + (third or 0)
    elif third is not None:
        seconds = (first * 60 + second) * 60 + third
    else:
        seconds = first * 60 + (second or 0)
    if not seconds:
        raise ValueError(f"--time ({text}) must be more than nothing.")
    return seconds


def _run(*command: str) -> str:
    """What one of SLURM's commands prints; ValueError with its own sentence when it refuses."""
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]} is not on this machine; submit where SLURM is, or look at it with --print.")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{command[0]} refused: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def submit(script: Path, *options: str) -> int:
    """Submit a batch script and return the job's number; ValueError with what sbatch says when it refuses."""
    return int(_run("sbatch", "--parsable", *options, str(script)).split(";")[0])


def cancel(jobs: list[int]) -> None:
    """Cancel jobs."""
    _run("scancel", *map(str, jobs))


def list_alive(jobs: list[int]) -> list[int]:
    """Those of `jobs` that wait or run. Numbers that SLURM has forgotten are left out."""
    lines = _run("squeue", "--noheader", "--me", "--format=%A").split()
    return sorted(set(jobs) & {int(line) for line in lines})
