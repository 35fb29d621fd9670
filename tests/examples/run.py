"""Runs a script of examples/ in the environment of the tests."""

import os
import subprocess
import sys

from tests.distributed.launch import ROOT


def run_example(script, *arguments, timeout=600):
    """The finished process of `bash examples/<script> arguments`."""
    environment = {**os.environ, "VENV": sys.prefix, "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "examples" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)
