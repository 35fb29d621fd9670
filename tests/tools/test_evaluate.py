"""tools/evaluate.py and tools/report.py as commands: names of tasks, options of all tasks, status 2."""

import argparse
import inspect

import pytest

from megatron_cm3leon.evaluation.metrics.comparison import Inputs
from megatron_cm3leon.evaluation.tasks import TASKS, load_task
from tests.tools.call import call_tool

SLOW_IMPORTS = {"harness", "ocr"}
"""Their own tests call them."""


@pytest.mark.parametrize("name", sorted(TASKS.keys() - SLOW_IMPORTS))
def test_a_task_takes_every_option_of_its_command(name):
    task, parser = load_task(name), argparse.ArgumentParser()
    task.add_options(parser)
    options = {action.dest: action for action in parser._actions if action.dest != "help"}
    parameters = inspect.signature(task.evaluate).parameters
    taken = {
        key: one
        for key, one in parameters.items()
        if one.kind is not inspect.Parameter.VAR_KEYWORD and key not in ("output", "ranks")
    }
    if name in ("fd", "fid"):  # further arguments are fields of Inputs
        taken |= {key: one for key, one in inspect.signature(Inputs).parameters.items() if key != "output"}
    assert taken.keys() == options.keys() and "seed" in options
    defaults = {key: _freeze(one.default) for key, one in taken.items() if not options[key].required}
    assert {key: _freeze(options[key].default) for key in defaults} == defaults


def _freeze(value):
    return tuple(value) if isinstance(value, list) else value


def test_what_is_wrong_in_any_task_is_one_sentence_and_status_2(tmp_path):
    (tmp_path / "file").write_text("")
    images = ["--images", tmp_path, "--encoder", tmp_path]
    for arguments, message in (
        (["fids"], "'fids' is not a task; the tasks are caption, clip, fd, fid,"),
        (["clip", *images, "--output", tmp_path / "file"], "file) is a file; give a folder for clip.json."),
        (["clip", *images, "--output", tmp_path, "--seed", "-1"], "--seed (-1) must be at least 0."),
        (
            ["loss", "--model", tmp_path / "none", "--shards", tmp_path, "--output", tmp_path],
            "none) is not a folder; give one that tools/convert_checkpoint.py export wrote.",
        ),
    ):
        done = call_tool("evaluate", *arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    done = call_tool("report", "--compare", tmp_path, "--examples", "-1", "--output", tmp_path)
    assert done.returncode == 2 and done.stderr == "error: --examples (-1) must be at least 0.\n"


def test_the_help_names_every_task():
    done = call_tool("evaluate", "--help")
    assert done.returncode == 0 and all(f"{name} (" in done.stdout for name in TASKS)
