"""Which sequences of which stream a batch of a run has; the batch size and the stream may change on resuming.

Batch numbers continue when train.global_batch_size changes. Every line of metrics.jsonl has the `first_sequence` and
the number of `sequences` of its batch. Lines of older versions have neither: there batch b begins at b times the global
batch size of that time.
"""

import copy
from pathlib import Path

from megatron_cm3leon.checkpoint.format import CheckpointFolder, list_checkpoints, parse_step
from megatron_cm3leon.config.loading import SOURCE_FIELDS, Config, changed_fields, is_fixed
from megatron_cm3leon.monitoring.history import METRICS, read_lines


def find_sequences(run: str | Path, config: Config, batch: int) -> tuple[range, Config]:
    """Sequence numbers of a batch, and `config` with the stream and batch size that the run had there.

    For a batch that the run has not reached, and for a folder without metrics.jsonl, they are those with which the run
    would continue under `config`. ValueError for a batch of data that the run no longer reads.
    """
    size = config.train.global_batch_size
    lines = {line["batch"]: line for line, _ in read_lines(run)} if (Path(run) / METRICS).is_file() else {}
    before = [number for number in lines if number <= batch]
    if not before:
        return range(batch * size, (batch + 1) * size), config
    line = lines[max(before)]
    then = _find_config(run, config, line)
    size_then = line.get("sequences", then.train.global_batch_size)
    first = line.get("first_sequence", line["batch"] * size_then)
    if line["batch"] == batch:
        return range(first, first + size_then), then
    first += size_then + (batch - line["batch"] - 1) * size
    return range(first, first + size), config


def _find_config(run: str | Path, config: Config, line: dict) -> Config:
    """`config` with the stream and the batch size that the run had at a line of metrics.jsonl."""
    checkpoint = next(reversed(list_checkpoints(run)), None)
    if checkpoint is None or line["step"] > parse_step(checkpoint):
        return config
    opened, then = CheckpointFolder(checkpoint), copy.deepcopy(config)
    for name, (now, _) in changed_fields(opened.config, config).items():
        if is_fixed(name):
            _set_field(then, name, now)
    for change in reversed(opened.state.changes):
        if line["batch"] >= change["batch"] if "batch" in change else line["step"] > change["step"]:
            continue
        if change["field"] in SOURCE_FIELDS:
            raise ValueError(
                f"batch {line['batch']} of {run} is from other data: {change['field']} changed at step "
                f"{change['step']}; add the data of that time to --batch, such as data.shards=..."
            )
        _set_field(then, change["field"], change["old"])
    return then


def _set_field(config: Config, name: str, value: object) -> None:
    section, _, field = name.rpartition(".")
    setattr(getattr(config, section) if section else config, field, value)
