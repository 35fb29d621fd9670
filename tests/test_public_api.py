"""The public API: every name is importable and documented, and importing the package changes nothing in the process."""

import subprocess
import sys

import megatron_cm3leon
from tests.distributed.launch import child_environment

IMPORT_ALL = """
import os, pkgutil, sys, warnings
import torch, transformers  # their own changes are not checked, nor those of what transformers imports where installed
from importlib import import_module
from importlib.util import find_spec
for name in ("accelerate", "scipy.sparse"):
    if find_spec(name.partition(".")[0]):
        import_module(name)
before = dict(os.environ), list(warnings.filters)
import megatron_cm3leon
loaded = {name for name in sys.modules if name.startswith("megatron_cm3leon.")}
assert loaded <= {"megatron_cm3leon.common", "megatron_cm3leon.common.version"}, loaded
commands = ("megatron_cm3leon.train", "megatron_cm3leon.cluster", "megatron_cm3leon.export", "megatron_cm3leon.engine")
gpu = ("megatron_cm3leon.generation.",)
other = tuple(f"megatron_cm3leon.evaluation.{name}" for name in ("lm_eval_model", "lmms_eval_model", "tasks."))
for module in pkgutil.walk_packages(megatron_cm3leon.__path__, "megatron_cm3leon."):
    if not module.name.startswith((*commands, *gpu, *other, "megatron_cm3leon.model")):
        import_module(module.name)
assert dict(os.environ) == before[0], set(dict(os.environ).items()) ^ set(before[0].items())
assert "matplotlib.pyplot" not in sys.modules
added = [entry for entry in warnings.filters if entry not in before[1]]
assert not [entry for entry in added if entry[0] == "ignore"], added
"""


def test_every_public_name_is_importable_and_documented():
    for name in megatron_cm3leon.__all__:
        assert getattr(megatron_cm3leon, name).__doc__, name
    assert set(megatron_cm3leon.__all__) <= set(dir(megatron_cm3leon))
    assert not hasattr(megatron_cm3leon, "no_such_name")


def test_importing_has_no_side_effects():
    """Without what imports megatron-core, Triton or packages of evaluation, which change the process themselves."""
    command = [sys.executable, "-c", IMPORT_ALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=child_environment())
    assert done.returncode == 0, done.stderr
