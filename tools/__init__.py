"""The tools as console scripts. setup.py installs this folder as megatron_cm3leon_tools and lists the scripts."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

from megatron_cm3leon.common.cli import run_tool


def _run(tool: str) -> None:
    run_tool(import_module(f"{__name__}.{tool}").main)


def __getattr__(name: str) -> Callable[[], None]:
    """`run_status` is what the script cm3leon-status calls: tools/status.py as a command. The tool is imported then."""
    if not name.startswith("run_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(_run, name.removeprefix("run_"))
