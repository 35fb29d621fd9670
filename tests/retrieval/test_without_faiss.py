"""FAISS that cannot be imported: the package can be imported and encodes; searches fail and name what to install."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_cm3leon.retrieval import index as faiss_index
from megatron_cm3leon.retrieval.build import build_index_folder

ROOT = Path(__file__).resolve().parents[2]
REASON = "libcudart.so.12: cannot open shared object file"
MESSAGE = (
    r"FAISS, which retrieval requires, cannot be imported \(libcudart.*\); install faiss-cpu, or faiss-gpu on a "
    r"machine with GPUs \(docs/installation.md\)\."
)


@pytest.fixture
def without_faiss(monkeypatch):
    monkeypatch.setattr(faiss_index, "faiss", None)
    monkeypatch.setattr(faiss_index, "_IMPORT_ERROR", ImportError(REASON))


def test_training_does_not_import_faiss_and_a_tool_that_needs_it_reports_it(tmp_path):
    (tmp_path / "faiss.py").write_text(f"raise ImportError({REASON!r})")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    script = (
        "import runpy, sys, megatron_cm3leon.train; print('faiss' in sys.modules, flush=True); "
        "sys.argv = ['build_index.py', '--shards', 'shards', '--encoder', 'clip', '--output', 'index']; "
        "runpy.run_path('tools/build_index.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: FAISS, which") and REASON in done.stderr


def test_searches_fail_before_any_work(without_faiss, tmp_path):
    vectors = np.eye(4, dtype=np.float32)
    for call in (
        lambda: faiss_index.build_index(vectors, "Flat"),
        lambda: faiss_index.load_index(tmp_path / "index.faiss"),
        lambda: faiss_index.search_exact(vectors, vectors, 2),
        lambda: build_index_folder(tmp_path / "index", "shards", "clip"),
        lambda: build_index_folder(tmp_path / "index", "shards", "clip", stage="neighbors", tasks=2),
    ):
        with pytest.raises(ValueError, match=MESSAGE):
            call()
    assert not (tmp_path / "index").exists()


def test_encoding_works_without_faiss(without_faiss, tmp_path):
    for options in ({"stage": "encode"}, {"tasks": 2}):
        with pytest.raises(ValueError, match="shards"):  # it looked for the shards
            build_index_folder(tmp_path / "index", tmp_path / "shards", "clip", **options)
