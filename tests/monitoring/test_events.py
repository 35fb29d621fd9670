"""The events of a run: attempts, the first cause, a truncated line."""

from megatron_cm3leon.monitoring.events import next_attempt, read_events, record, record_first


def test_only_the_first_rank_that_finds_a_cause_records_it(tmp_path):
    assert next_attempt(tmp_path) == 1
    record(tmp_path, 1, "start")
    record(tmp_path, 1, "failure", rank=0)
    assert next_attempt(tmp_path) == 2
    assert not record_first(tmp_path, 1, "stall", rank=1)
    assert record_first(tmp_path, 2, "failure", rank=1)
    assert [(each["attempt"], each.get("rank")) for each in read_events(tmp_path)] == [(1, None), (1, 0), (2, 1)]


def test_a_truncated_last_line_is_ignored(tmp_path):
    record(tmp_path, 1, "start")
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"attempt": 2, "ev')
    assert next_attempt(tmp_path) == 2
    record(tmp_path, 2, "start")
    assert next_attempt(tmp_path) == 3
