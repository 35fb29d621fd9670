"""What every command-line tool shares: errors as one sentence, and exit statuses."""

import logging
import sys
from collections.abc import Callable


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a tool's `main` and exit: 0 done, 2 for an error the user can mend, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        status = main() or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
