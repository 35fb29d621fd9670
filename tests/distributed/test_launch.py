"""Processes that tests start find what the tests find."""

import subprocess
import sys

import pytest

from tests.distributed.launch import ROOT, child_environment


def test_packages_of_pythonpath_reach_a_child(tmp_path, monkeypatch):
    """As on a machine without a network, whose missing packages lie in a folder of PYTHONPATH."""
    (tmp_path / "carried_package.py").write_text("VALUE = 7")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = "import carried_package, megatron_cm3leon; print(carried_package.VALUE)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=child_environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "7\n", done.stderr


@pytest.mark.slow
def test_tests_are_collected_without_faiss_and_webdataset():
    """A machine that runs the tests of a GPU need not have them; None in sys.modules makes an import fail."""
    program = (
        "import sys, pytest; sys.modules.update(faiss=None, webdataset=None)\n"
        "sys.exit(pytest.main(['-m', 'gpu', '--collect-only', '-q', '-p', 'no:cacheprovider']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=child_environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "error" not in done.stdout.splitlines()[-1] and "could not import 'faiss'" in done.stdout
