"""Show what runs are doing, from their run folders alone.

    python tools/status.py runs/x
    python tools/status.py runs/*
    python tools/status.py runs/x --watch
    python tools/status.py runs/x --json

One run is described, several make a table. Goodput is the share of wall time in training steps that were kept;
megatron_cm3leon/monitoring/goodput.py says what the rest is. Which checkpoint.interval is best: benchmarks/goodput.py.
"""

import argparse
import json
import sys
import time

from megatron_cm3leon.common.cli import run_tool, user_path
from megatron_cm3leon.monitoring.status import Status, describe, describe_table, read_status, to_json


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=user_path, nargs="+", metavar="RUN", help="run folder, such as runs/x")
    parser.add_argument("--watch", action="store_true", help="show it again and again until Ctrl-C")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks of --watch (default: 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a run and line; times in seconds")
    arguments = parser.parse_args()
    if arguments.every <= 0:
        parser.error(f"--every ({arguments.every:g}) must be above 0.")
    return arguments


def look(runs: list[str]) -> tuple[list[Status], list[ValueError]]:
    """The runs, and what is wrong with those of `runs/*` that are none or are damaged."""
    statuses, faults = [], []
    for run in runs:
        try:
            statuses.append(read_status(run))
        except ValueError as error:
            faults.append(error)
    return statuses, faults


def show(statuses: list[Status], as_json: bool) -> str:
    if as_json:
        return "\n".join(json.dumps(to_json(status)) for status in statuses)
    return describe(statuses[0]) if len(statuses) == 1 else describe_table(statuses)


def main() -> int:
    arguments = parse_arguments()
    while True:
        statuses, faults = look(arguments.runs)
        if not statuses:
            raise faults[0]
        text = show(statuses, arguments.json)
        if arguments.watch and not arguments.json and sys.stdout.isatty():
            text = "\033[H\033[2J" + text  # clear the screen
        print(text, flush=True)
        for fault in faults:
            print(f"error: {fault}", file=sys.stderr)
        if not arguments.watch:
            return 2 if faults else 0
        time.sleep(arguments.every)


if __name__ == "__main__":
    run_tool(main)
