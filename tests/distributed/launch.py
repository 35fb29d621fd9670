"""Start groups of ranks from tests."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def child_environment(**variables: str) -> dict[str, str]:
    """Environment of a child process: PYTHONPATH with the project, one thread, and `variables`."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **variables}


def torchrun(ranks: int, *arguments: str, timeout: float = 300, check: bool = True) -> subprocess.CompletedProcess:
    """Run `torchrun --nproc-per-node RANKS ARGUMENTS` on free ports; with `check`, AssertionError when it fails."""
    return _run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, *arguments,
                timeout=timeout, check=check)  # fmt: skip


def run_cases(folder: Path, ranks: int, cases: list[dict]) -> dict[str, list[dict]]:
    """Run `cases` (see worker.py) with `ranks` ranks in one launch; returns case name -> steps."""
    path = folder / f"cases-{ranks}-{cases[0]['name']}.json"
    path.write_text(json.dumps(cases))
    _run(ROOT / "tests" / "distributed" / "worker.py", path, ranks, timeout=120 + 30 * len(cases))
    return {case["name"]: json.loads((folder / f"{case['name']}.json").read_text()) for case in cases}


def find_free_ports(count: int) -> list[int]:
    """Different ports of 127.0.0.1 that are unused now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _run(*arguments: object, timeout: float, check: bool = True) -> subprocess.CompletedProcess:
    """Run Python with `arguments`; with `check`, AssertionError with the output when it fails."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=child_environment(), cwd=ROOT)
    if check and done.returncode:
        raise AssertionError(f"exit status {done.returncode} of {command}:\n{done.stdout}\n{done.stderr}")
    return done
