"""Calls a tool inside the process of the test, because imports of a separate process take seconds."""

import io
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def call_tool(name, *arguments) -> CompletedProcess:
    """Run tools/<name>.py as on the command line; the result has its returncode, stdout and stderr."""
    command = [str(TOOLS / f"{name}.py"), *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", command),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        runpy.run_path(command[0], run_name="__main__")
    return CompletedProcess(command, end.value.code or 0, out.getvalue(), err.getvalue())
