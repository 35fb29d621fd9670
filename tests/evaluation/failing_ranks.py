"""Two ranks of which one fails: `failing_ranks.py FOLDER` writes the exit statuses to FOLDER/statuses.json.

The cases run at the same time, with what their ranks print in FOLDER/CASE.txt. The libraries are imported once.
"""

import json
import os
import signal
import sys
from pathlib import Path

from megatron_cm3leon.common.cli import run_tool
from megatron_cm3leon.evaluation.ranks import Ranks, start_ranks
from tests.distributed.launch import find_free_ports


def fail_on_one_rank(ranks: Ranks) -> None:
    """The first rank waits for the other, which finds a damaged file."""
    with ranks.share([0, 1], total=2, done=0, label="waiting", unit="items") as (numbers, _):
        if numbers == [1]:
            raise ValueError("image 1 is damaged.")


def fail_on_all_ranks(ranks: Ranks) -> None:
    raise ValueError("there are no images.")


def misspell_an_option(ranks: Ranks) -> None:
    def parse() -> None:
        print("usage: evaluate.py", file=sys.stderr)
        raise SystemExit(2)

    ranks.from_first(parse)


def kill_one_rank(ranks: Ranks) -> None:
    with ranks.share([0, 1], total=2, done=0, label="waiting", unit="items") as (numbers, _):
        if numbers == [1]:
            os.kill(os.getpid(), signal.SIGKILL)


CASES = (fail_on_one_rank, fail_on_all_ranks, misspell_an_option, kill_one_rank)


def run_rank(case, rank: int, port: int, output: Path) -> None:
    """Run a case as one of two ranks; ends this process."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"})

    def main() -> None:
        with start_ranks() as ranks:
            case(ranks)

    try:
        run_tool(main)
    except SystemExit as end:
        os._exit(end.code)


def main() -> None:
    folder, children = Path(sys.argv[1]), {}
    for case, port in zip(CASES, find_free_ports(len(CASES)), strict=True):
        for rank in range(2):
            child = os.fork()
            if not child:
                run_rank(case, rank, port, folder / f"{case.__name__}.txt")
            children[child] = case.__name__, rank
    statuses = {case.__name__: [0, 0] for case in CASES}
    while children:
        child, status = os.wait()
        name, rank = children.pop(child)
        statuses[name][rank] = os.waitstatus_to_exitcode(status)
    (folder / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main()
