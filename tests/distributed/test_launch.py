"""Processes that tests start can import the same packages as the tests."""

import subprocess
import sys

import pytest

from tests.distributed.launch import ROOT, child_environment


def test_a_child_process_imports_packages_from_pythonpath(tmp_path, monkeypatch):
    """As on a machine without a network, where missing packages are in a folder of PYTHONPATH."""
    (tmp_path / "extra_package.py").write_text("VALUE = 7")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = "import extra_package, megatron_cm3leon; print(extra_package.VALUE)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=child_environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "7\n", done.stderr


@pytest.mark.slow
def test_tests_are_collected_without_faiss_and_webdataset():
    """A machine that runs the GPU tests may lack them; None in sys.modules makes an import fail."""
    program = (
        "import sys, pytest; sys.modules.update(faiss=None, webdataset=None)\n"
        "sys.exit(pytest.main(['-m', 'gpu', '--collect-only', '-q', '-p', 'no:cacheprovider']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=child_environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "error" not in done.stdout.splitlines()[-1] and "could not import 'faiss'" in done.stdout
