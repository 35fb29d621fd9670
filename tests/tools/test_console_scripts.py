"""The console scripts that setup.py installs: one for each tool, and the training command."""

import runpy
import sys
from importlib.metadata import EntryPoint
from unittest.mock import patch

import pytest

import tools
from tests.distributed.launch import ROOT

SCRIPTS = ROOT / "setup.py"


@pytest.fixture(scope="module")
def scripts():
    """Name of each script -> its entry point; setup.py is run up to the call of setup()."""
    with patch("setuptools.setup") as setup:
        runpy.run_path(str(SCRIPTS))
    options = setup.call_args.kwargs
    assert options["package_dir"] == {"megatron_cm3leon_tools": "tools"}
    lines = [line.split(" = ") for line in options["entry_points"]["console_scripts"]]
    return {name: EntryPoint(name, value, "console_scripts") for name, value in lines}


def test_every_tool_has_a_script(scripts):
    files = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"__init__"}
    found = {entry.attr.removeprefix("run_") for entry in scripts.values() if entry.module == "megatron_cm3leon_tools"}
    assert found == files
    assert scripts["cm3leon-train"].load().__module__ == "megatron_cm3leon.train"


def test_a_script_runs_its_tool(scripts, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "megatron_cm3leon_tools", tools)  # as it is installed
    monkeypatch.setattr(sys, "argv", ["cm3leon-status", "/does/not/exist"])
    with pytest.raises(SystemExit) as end:
        scripts["cm3leon-status"].load()()
    assert end.value.code == 2
    assert "error: /does/not/exist" in capsys.readouterr().err
    with pytest.raises(AttributeError, match="no attribute 'walk'"):
        _ = tools.walk
