"""Folders that appear on disk only when they are complete."""

import errno
import os

import pytest

from megatron_cm3leon.common.atomic_io import atomic_directory


def test_a_symbolic_link_is_kept_and_its_target_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_directory(tmp_path / "link") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "real" / "file").exists() and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_the_error_of_a_full_disk_names_the_output(tmp_path):
    with pytest.raises(OSError) as error, atomic_directory(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "out") and not list(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"^another message$"), atomic_directory(tmp_path / "out"):
        raise OSError("another message")
