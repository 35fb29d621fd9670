"""Folders that appear whole."""

import errno
import os

import pytest

from megatron_cm3leon.common.atomic_io import atomic_directory


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_directory(tmp_path / "link") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "real" / "file").exists() and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_a_full_disk_is_told_with_the_output_s_name(tmp_path):
    with pytest.raises(OSError) as told, atomic_directory(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert told.value.filename == str(tmp_path / "out") and not list(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"^a sentence of its own$"), atomic_directory(tmp_path / "out"):
        raise OSError("a sentence of its own")
