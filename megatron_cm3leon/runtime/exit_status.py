"""Exit statuses of `python -m megatron_cm3leon.train`, which batch scripts decide by."""

DONE = 0
FAILED = 1
"""A failure after which a restart may help."""
USER_ERROR = 2
"""The user must mend something."""
STOPPED = 75
"""Stopped on request with a checkpoint saved (EX_TEMPFAIL): the same command goes on."""
