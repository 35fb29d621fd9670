"""tools/checkpoint.py on the command line: output and exit statuses."""

import subprocess
import sys
from functools import partial

import pytest

from megatron_cm3leon.checkpoint.format import temporary_folder
from megatron_cm3leon.config.loading import load_config, save_config
from megatron_cm3leon.config.validation import validate_config
from tests.checkpoint.builders import flip_byte, write_checkpoint
from tests.tools.call import TOOLS, call_tool

call = partial(call_tool, "checkpoint")


@pytest.fixture
def run(tmp_path):
    """A run folder with complete checkpoints of steps 0, 2, 3, 5 and 6 and an incomplete one of step 7."""
    run = tmp_path / "run"
    overrides = ["checkpoint.keep_last=1", "checkpoint.interval=3", "checkpoint.keep_every=3", "parallel.tensor=2"]
    config = load_config(None, [*overrides, "checkpoint.log_spaced=true"])
    validate_config(config)
    for step in (0, 2, 3, 5, 6):
        write_checkpoint(run, step, kinds=("weight", "exp_avg", "exp_avg_sq"), config=config)
    temporary_folder(run / "checkpoints/step-00000007").mkdir()
    save_config(config, run / "config.yaml")
    return run


def test_list(run):
    (run / "checkpoints/step-00000002/manifest.json").unlink()
    (run / "checkpoints/step-00000003/state.json").write_text("{")
    done = call("list", run)
    assert done.returncode == 0
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["step", "tokens", "written", "bytes", "complete", "kept", "by"]
    rows = {int(line.split()[0]): line for line in lines}
    assert list(rows) == [0, 2, 3, 5, 6, 7]
    assert rows[0].split()[-2:] == ["yes", "log_spaced"]
    assert "NO: no manifest.json" in rows[2]
    assert "NO: state.json has 1 bytes" in rows[3] and "keep_every 3" in rows[3]
    assert "nothing: deleted after the next save" in rows[5] and " 5,000 " in rows[5]
    assert "yes" in rows[6] and "keep_every 3" in rows[6]
    assert "NO: being written, or interrupted" in rows[7]


def test_verify_finds_one_flipped_byte(run):
    done = call("verify", run)
    assert done.returncode == 0 and "5 checkpoints, every SHA-256 matches" in done.stdout
    flip_byte(run / "checkpoints/step-00000006/rank-00001.safetensors")
    for path in (run, run / "checkpoints/step-00000006"):
        done = call("verify", path)
        assert done.returncode == 1
        assert "rank-00001.safetensors does not match its SHA-256" in done.stderr
        assert f"The previous checkpoint is {run / 'checkpoints/step-00000005'}" in done.stderr
    assert call("verify", run / "checkpoints/step-00000005", "--threads", 1).returncode == 0
    (run / "checkpoints/step-00000005/manifest.json").unlink()
    done = call("verify", run / "checkpoints/step-00000005")
    assert done.returncode == 1 and "not a complete checkpoint" in done.stderr


def test_inspect(run):
    done = call("inspect", run / "checkpoints/step-00000003")
    assert done.returncode == 0
    for line in (
        "  torch x",
        "  ranks 2",
        "  tensor 2",
        "  step 3",
        "  tokens 3,000",
        "  [100, 132) image codes",
        "    keep_every: 3",
        "  1 tensors, 24 parameters",
    ):
        assert line in done.stdout.splitlines(), line
    tensor = next(line for line in done.stdout.splitlines() if line.startswith("  w "))
    assert tensor.split() == ["w", "6", "x", "4", "weight", "exp_avg", "exp_avg_sq", "3", "0-1"]


def test_a_path_that_is_not_a_checkpoint_is_a_usage_error(run, tmp_path):
    for arguments in (("list", tmp_path), ("verify", tmp_path / "none"), ("verify", tmp_path), ("inspect", run)):
        done = call(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    done = call("list", run / "checkpoints/step-00000003")
    assert done.returncode == 2 and f"give the run folder ({run})" in done.stderr
    assert call("look").returncode == 2


def test_no_torch_is_loaded(run):
    code = f"import sys, runpy; sys.argv = ['checkpoint', 'inspect', {str(run / 'checkpoints/step-00000003')!r}]\n"
    code += f"try: runpy.run_path({str(TOOLS / 'checkpoint.py')!r}, run_name='__main__')\nexcept SystemExit: pass\n"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'megatron', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=TOOLS.parent).returncode == 0
