"""Exit statuses of `python -m megatron_cm3leon.train`, on which batch scripts act."""

DONE = 0
FAILED = 1
"""A failure after which a restart may help."""
USER_ERROR = 2
"""The user must fix something."""
STOPPED = 75
"""Stopped on request with a checkpoint saved (EX_TEMPFAIL): the same command continues the run."""
