"""The last message of a process that ends because of a failure."""

import sys
import traceback


def report_failure(message: str, error: BaseException | None = None) -> None:
    """Print `message`, and before it the traceback of `error` if there is one, to stderr.

    This prints and does not log: the process ends right after it (os._exit), so the message must appear whether or not
    logging is configured, and the watchdog's thread must not wait for a logging lock that a blocked main thread holds.
    """
    if error is not None:
        traceback.print_exception(error)
    print(message, file=sys.stderr, flush=True)
