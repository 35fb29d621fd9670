"""One run per run folder: the error names the holder of the lock, and a leftover file does not block."""

import json
import os
import subprocess
import sys

import pytest

from megatron_cm3leon.runtime.lock import RunLock
from tests.distributed.launch import child_environment

HOLD = """
import sys
from megatron_cm3leon.runtime.lock import RunLock
RunLock(sys.argv[1]).acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_gets_an_error_that_names_the_holder(tmp_path):
    environment = child_environment(SLURM_JOB_ID="4711")
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=rf"{tmp_path}\) is in use by process {holder.pid} on .*, job 4711.*output="):
        RunLock(tmp_path).acquire(patience=0)
    holder.kill()
    holder.communicate()
    RunLock(tmp_path).acquire(patience=0)  # the file still exists


def test_a_leftover_lock_file_does_not_block(tmp_path):
    (tmp_path / "lock").write_text("left by an older run, and longer than what replaces it" * 9)
    lock = RunLock(tmp_path)
    lock.acquire(patience=0)
    assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()
    lock.release()
