"""When a run saves, and which checkpoints it keeps."""

import pytest

from megatron_cm3leon.checkpoint.format import list_checkpoints, temporary_folder
from megatron_cm3leon.checkpoint.retention import is_due, remove_old_checkpoints
from megatron_cm3leon.config.loading import Config, load_config
from megatron_cm3leon.config.schema import CheckpointConfig
from megatron_cm3leon.config.validation import validate_config
from tests.checkpoint.builders import write_checkpoint


def list_steps(run):
    return [int(folder.name[5:]) for folder in list_checkpoints(run)]


def test_steps_at_which_a_save_is_due():
    assert [step for step in range(31) if is_due(step, CheckpointConfig(interval=10))] == [10, 20, 30]
    spaced = CheckpointConfig(interval=1000, log_spaced=True)
    found = [step for step in range(3001) if is_due(step, spaced)]
    assert found == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 3000]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep_last": 0}, [0, 1, 2, 3, 4, 6, 8, 9]),
        ({"keep_last": 2}, [8, 9]),
        ({"keep_last": 1, "keep_every": 3}, [0, 3, 6, 9]),
        ({"keep_last": 1, "log_spaced": True}, [0, 1, 2, 4, 8, 9]),
        ({"keep_last": 3, "keep_every": 4, "log_spaced": True}, [0, 1, 2, 4, 6, 8, 9]),
    ],
)
def test_old_checkpoints_are_removed_according_to_the_options(tmp_path, options, expected):
    for step in (0, 1, 2, 3, 4, 6, 8, 9):
        write_checkpoint(tmp_path, step)
    remove_old_checkpoints(tmp_path, CheckpointConfig(**options))
    assert list_steps(tmp_path) == expected


def test_only_checkpoint_folders_of_the_run_are_deleted(tmp_path):
    folders = [write_checkpoint(tmp_path / "run", step) for step in (1, 2, 3)]
    checkpoints = folders[0].parent
    temporary_folder(checkpoints / "step-00000002").mkdir()
    others = [checkpoints / name for name in ("step-00000002.damaged", "step-2", "best", "step-00000001-copy.tmp")]
    for other in others:
        other.mkdir()
    elsewhere = write_checkpoint(tmp_path / "elsewhere", 0)
    (checkpoints / "step-00000000").symlink_to(elsewhere)
    remove_old_checkpoints(tmp_path / "run", CheckpointConfig(keep_last=1))
    remaining = {path.name for path in checkpoints.iterdir()}
    assert remaining == {"step-00000003", "step-00000000"} | {other.name for other in others}
    assert (elsewhere / "manifest.json").is_file()


def test_keep_every_must_be_a_multiple_of_the_interval():
    config = load_config(None, ["checkpoint.keep_every=1500"])
    with pytest.raises(ValueError, match=r"keep_every \(1500\) must be a multiple of checkpoint.interval \(1000\)"):
        validate_config(config)
    assert Config().checkpoint.asynchronous
