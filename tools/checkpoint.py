"""List, verify and inspect checkpoints without loading them.

    python tools/checkpoint.py list runs/x
    python tools/checkpoint.py verify runs/x
    python tools/checkpoint.py inspect runs/x/checkpoints/step-00001000

Exit status: 0 success, 1 `verify` found damage, 2 usage error.
"""

import argparse
import sys
from pathlib import Path

from megatron_cm3leon.checkpoint.damage import find_damage
from megatron_cm3leon.checkpoint.format import count_bytes
from megatron_cm3leon.checkpoint.summary import describe_checkpoint, describe_run, find_checkpoints
from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.common.progress import meter


def parse_arguments() -> argparse.Namespace:
    style = HelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser(
        "list",
        help="one line per checkpoint: step, tokens, time, bytes, complete or not, rule that keeps it",
        formatter_class=style,
    )
    listing.add_argument("run", type=user_path, help="run folder, such as runs/x")
    verify = commands.add_parser("verify", help="verify the SHA-256 of every file", formatter_class=style)
    verify.add_argument("path", type=user_path, help="checkpoint folder, or run folder for all of its checkpoints")
    verify.add_argument("--threads", type=int, default=0, help="files hashed at the same time; 0 uses every core")
    inspect = commands.add_parser(
        "inspect", help="configuration, state, versions, vocabulary, layout and every tensor", formatter_class=style
    )
    inspect.add_argument(
        "checkpoint", type=user_path, help="checkpoint folder, such as runs/x/checkpoints/step-00001000"
    )
    return parser.parse_args()


def verify_all(path: Path, threads: int) -> int:
    """Verify a checkpoint, or all of a run, and print every damage; returns the exit status."""
    folders = find_checkpoints(path)
    errors = []
    with meter(sum(map(count_bytes, folders)) // 1_000_000, "verifying", "MB") as progress:
        for folder in folders:
            errors += find_damage(folder, progress.count(1_000_000), threads)
    for sentence in errors:
        print(f"error: {sentence}", file=sys.stderr)
    noun = "checkpoint" if len(folders) == 1 else "checkpoints"
    print(f"{path}: {len(folders)} {noun}, {f'{len(errors)} errors' if errors else 'every SHA-256 matches'}")
    return 1 if errors else 0


def main() -> int:
    arguments = parse_arguments()
    if arguments.command == "list":
        print(describe_run(Path(arguments.run)))
    elif arguments.command == "inspect":
        print(describe_checkpoint(Path(arguments.checkpoint)))
    else:
        return verify_all(Path(arguments.path), arguments.threads)
    return 0


if __name__ == "__main__":
    run_tool(main)
