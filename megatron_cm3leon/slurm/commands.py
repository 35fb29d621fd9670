"""SLURM's commands sbatch, scancel and squeue, and its notation of time limits."""

import re
import shutil
import subprocess
from pathlib import Path

# The forms that sbatch accepts: minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s.
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def parse_time(text: str) -> int:
    """Parse a time limit in one of sbatch's forms into seconds; ValueError for anything else."""
    found = _TIME.fullmatch(text)
    if not found:
        raise ValueError(
            f"--time ({text}) is not a valid SLURM time limit; write minutes, minutes:seconds, hours:minutes:seconds "
            f"or days-hours:minutes:seconds, such as 24:00:00 or 2-00:00:00."
        )
    days, first, second, third = found.groups()
    numbers = [int(part or 0) for part in (first, second, third)]
    if days is not None or third is not None:  # the first number is hours
        seconds = (int(days or 0) * 24 + numbers[0]) * 3600 + numbers[1] * 60 + numbers[2]
    else:
        seconds = numbers[0] * 60 + numbers[1]
    if not seconds:
        raise ValueError(f"--time ({text}) must be longer than 0 s.")
    return seconds


def _run(*command: str) -> str:
    """Output of one of SLURM's commands; ValueError with its error message when it fails."""
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]} is not installed on this machine; submit where SLURM is, or use --print.")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def submit(script: Path, *options: str) -> int:
    """Submit a batch script and return its job ID; ValueError with the message of sbatch when it fails."""
    return int(_run("sbatch", "--parsable", *options, str(script)).split(";")[0])


def cancel(jobs: list[int]) -> None:
    """Cancel jobs by ID."""
    _run("scancel", *map(str, jobs))


def list_active(jobs: list[int]) -> list[int]:
    """IDs of those of `jobs` that are pending or running."""
    lines = _run("squeue", "--noheader", "--me", "--format=%A").split()
    return sorted(set(jobs) & {int(line) for line in lines})
