"""What all command-line tools share: errors as one sentence, exit statuses, help texts."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable

from megatron_cm3leon.common.paths import expand_path


def user_path(text: str) -> str:
    """argparse type of options that are paths: expands ~ and $VARIABLE, which a shell does not in `--output=~/x`."""
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
    """Print messages of this project from `level` on, and only warnings of other libraries."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("megatron_cm3leon").setLevel(level)


def explain_error(error: ValueError | OSError | KeyboardInterrupt) -> tuple[int, str]:
    """(exit status, message) of an error that is the user's, or of Ctrl-C; the message of a closed pipe is empty."""
    if isinstance(error, BrokenPipeError):  # the reader of the output, such as head, has ended
        return 141, ""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, OSError):
        return 2, f"error: {f'{error.filename}: {error.strerror}' if error.filename else error}"
    return 2, f"error: {error}"


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a tool's `main` and exit: 0 done, 2 for a user's error, 130 after Ctrl-C, 141 for a closed pipe."""
    show_messages()
    # Pillow warns of large images, which this project refuses with a reason.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    try:
        status = main() or 0
    except (ValueError, OSError, KeyboardInterrupt) as error:
        status, message = explain_error(error)
        if message:
            print(message, file=sys.stderr)
        else:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
