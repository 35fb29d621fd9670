"""The run's record, metrics.jsonl."""

from megatron_cm3leon.metrics import drop_half_line


def test_a_line_that_was_cut_off_goes_and_whole_ones_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    drop_half_line(path)
    for whole, half in (("", '{"st'), ('{"step": 1}\n', '{"step": 2'), ('{"step": 1}\n', "")):
        path.write_text(whole + half)
        drop_half_line(path)
        assert path.read_text() == whole
