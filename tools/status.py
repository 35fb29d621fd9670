"""Show the status of runs, from their run folders alone.

    python tools/status.py runs/x
    python tools/status.py runs/*
    python tools/status.py runs/x --watch
    python tools/status.py runs/x --json

One run is shown in detail, several as a table. Goodput is the share of wall time in training steps that were kept;
megatron_cm3leon/monitoring/goodput.py describes the other parts. benchmarks/goodput.py finds the best
checkpoint.interval.
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
    parser.add_argument("--watch", action="store_true", help="repeat until Ctrl-C")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two updates of --watch (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per run and line; times in seconds")
    arguments = parser.parse_args()
    if arguments.every <= 0:
        parser.error(f"--every ({arguments.every:g}) must be above 0.")
    return arguments


def read_statuses(runs: list[str]) -> tuple[list[Status], list[ValueError]]:
    """The status of each run, and an error for each folder that is not a run folder or is damaged."""
    statuses: list[Status] = []
    errors: list[ValueError] = []
    for run in runs:
        try:
            statuses.append(read_status(run))
        except ValueError as error:
            errors.append(error)
    return statuses, errors


def show(statuses: list[Status], as_json: bool) -> str:
    if as_json:
        return "\n".join(json.dumps(to_json(status)) for status in statuses)
    return describe(statuses[0]) if len(statuses) == 1 else describe_table(statuses)


def main() -> int:
    arguments = parse_arguments()
    while True:
        statuses, errors = read_statuses(arguments.runs)
        if not statuses:
            raise errors[0]
        text = show(statuses, arguments.json)
        if arguments.watch and not arguments.json and sys.stdout.isatty():
            text = "\033[H\033[2J" + text  # clear the screen
        print(text, flush=True)
        for error in errors:
            print(f"error: {error}", file=sys.stderr)
        if not arguments.watch:
            return 2 if errors else 0
        time.sleep(arguments.every)


if __name__ == "__main__":
    run_tool(main)
