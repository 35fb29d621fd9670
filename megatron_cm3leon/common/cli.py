"""What every command-line tool shares: errors as one sentence, and exit statuses."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable

from megatron_cm3leon.common.paths import expand_path


def user_path(text: str) -> str:
    """Type of options that are paths: expands ~ and $VARIABLE, which a shell leaves in `--output=~/x`."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}.") from error


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends defaults to the help of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == [] or action.required:
            return action.help
        return super()._get_help_string(action)


def show_messages(level: int = logging.INFO) -> None:
    """Print this project's messages from `level` on, and only warnings of the libraries beneath."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("megatron_cm3leon").setLevel(level)


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a tool's `main` and exit: 0 done, 2 for a user's error, 130 after Ctrl-C, 141 for a closed pipe."""
    show_messages()
    # Pillow warns of large images, which this project refuses with a reason.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    try:
        status = main() or 0
    except BrokenPipeError:  # who reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except OSError as error:
        print(f"error: {f'{error.filename}: {error.strerror}' if error.filename else error}", file=sys.stderr)
        status = 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
