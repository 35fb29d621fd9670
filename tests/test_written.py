"""Folders that appear whole."""

import os

from megatron_cm3leon.written import written_whole


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with written_whole(tmp_path / "link") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "real" / "file").exists() and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
