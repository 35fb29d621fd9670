"""Status of a run, as text and as JSON, from its folder alone."""

import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

from megatron_cm3leon.checkpoint.format import MANIFEST, list_checkpoints, parse_step
from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.monitoring.goodput import Process, TimeBreakdown, read_time_breakdown

RECENT = 50
"""Number of last steps from which the rate and the time left are computed."""
SILENT_SECONDS = 120.0
"""A run is `silent`, no longer `running`, when its last record is older than this and than ten of its steps."""
MEANING = {
    "kept": "steps that are part of the run",
    "lost": "steps repeated, rolled back or skipped",
    "start-up": "from each start to its first step",
    "between": "saves, validation, rollbacks",
    "down": "between two starts",
}


@dataclass(kw_only=True)
class Status:
    """Status of a run. Unknown values are None; times are in seconds; goodput is a share of wall time, 0 to 1."""

    run: str
    state: str
    """running, finished, stopped, failed, or silent: no record for a long time, and none that gives a reason."""
    why: str
    """Cause of a failure or reason of a stop; else empty."""
    last_record_seconds: float
    """Age of the last record."""
    step: int
    steps: int | None
    loss: float | None
    validation_step: int | None
    """Step of the last validation."""
    validation: dict[str, float]
    """Its losses: "" (validation.shards), without_retrieval, and the names of validation.sources."""
    tokens: int
    tokens_per_second: float | None
    seconds_left: float | None
    checkpoint: str | None
    checkpoint_step: int | None
    checkpoint_age_seconds: float | None
    restarts: int
    skipped: dict[str, int]
    """Reason (non-finite, spike, asked) -> number of batches without a step."""
    slowest: dict | None
    """Last report of stragglers: slowest_rank, slowest_host, slowest_over_median."""
    goodput: float
    wall_seconds: float
    seconds: dict[str, float]
    """Wall time by parts (monitoring/goodput.py)."""


def read_status(run: str | Path, now: float | None = None) -> Status:
    """Status of a run folder; ValueError if it is not a run folder. `now`: Unix seconds, default the current time."""
    run, now = Path(run), time.time() if now is None else now
    times = read_time_breakdown(run)
    lines = [line for line, skipped in times.lines if not skipped]
    steps = load_config(run / "config.yaml", expand=False).train.steps if (run / "config.yaml").is_file() else None
    step = lines[-1]["step"] if lines else 0
    recent = [line for line in times.processes[-1].trained if line.get("tokens_per_second")][-RECENT:]
    step_seconds = _seconds_per_step(recent)
    checkpoint = next(reversed(list_checkpoints(run)), None)
    reasons = [line.get("skipped", "non-finite") for line, skipped in times.lines if skipped]
    silence = now - times.processes[-1].end
    validated = [line for line in lines if _find_validation(line)]
    state, why = _find_state(times.processes[-1], silence, step_seconds, steps is not None and step >= steps)
    return Status(
        run=str(run),
        state=state,
        why=why,
        last_record_seconds=silence,
        step=step,
        steps=steps,
        loss=lines[-1].get("loss") if lines else None,
        validation_step=validated[-1]["step"] if validated else None,
        validation=_find_validation(validated[-1]) if validated else {},
        tokens=lines[-1].get("tokens", 0) if lines else 0,
        tokens_per_second=statistics.median(line["tokens_per_second"] for line in recent) if recent else None,
        seconds_left=max(0, steps - step) * step_seconds if steps is not None and step_seconds else None,
        checkpoint=checkpoint.name if checkpoint else None,
        checkpoint_step=parse_step(checkpoint) if checkpoint else None,
        checkpoint_age_seconds=now - _saved_at(checkpoint) if checkpoint else None,
        restarts=len(times.processes) - 1,
        skipped={reason: reasons.count(reason) for reason in dict.fromkeys(reasons)},
        slowest=_find_slowest(times),
        goodput=times.goodput,
        wall_seconds=times.wall,
        seconds=times.seconds,
    )


def _find_validation(line: dict) -> dict[str, float]:
    """Losses over all tokens of a validation, by the names of Status.validation."""
    found = {key: re.fullmatch(r"validation_(?:(.+)_)?loss", key) for key in line}
    return {match[1] or "": line[key] for key, match in found.items() if match and line[key] is not None}


def _seconds_per_step(recent: list[dict]) -> float | None:
    """Seconds per step with the time between steps, since saves and validation continue; None without steps."""
    if len(recent) < 2:
        return recent[0]["step_seconds"] if recent else None
    return (recent[-1]["time"] - recent[0]["time"]) / (len(recent) - 1)


def _saved_at(checkpoint: Path) -> float:
    """When the checkpoint was completed, Unix seconds."""
    manifest = checkpoint / MANIFEST
    return (manifest if manifest.is_file() else checkpoint).stat().st_mtime


def _find_state(process: Process, silence: float, step_seconds: float | None, complete: bool) -> tuple[str, str]:
    ends = [event for event in process.events if event["event"] in ("stop", "failure", "stall")]
    if ends and ends[-1]["event"] == "stop":
        reason = ends[-1].get("reason", "")
        return ("finished", "") if reason == "finished" else ("stopped", reason)
    if ends:
        event = ends[-1]
        cause = str(event.get("cause"))
        named = event["event"] == "stall" or cause.startswith("rank ")
        return "failed", cause if named else f"rank {event.get('rank')} on {event.get('host')}: {cause}"
    if complete:
        return "finished", ""
    if silence > max(SILENT_SECONDS, 10 * (step_seconds or 0)):
        return "silent", "killed or hanging: no record gives the reason"
    return "running", ""


def _find_slowest(times: TimeBreakdown) -> dict | None:
    names = ("slowest_rank", "slowest_host", "slowest_over_median")
    reports = [line for line, _ in times.lines if names[0] in line]
    return {name: reports[-1][name] for name in names} if reports else None


# ------------------------------------------------------------------------- as text


def describe(status: Status) -> str:
    """One run as text of at most 100 columns."""
    left = "" if status.seconds_left is None or status.state == "finished" else show_seconds(status.seconds_left)
    done = f" ({status.step / status.steps:.1%})" if status.steps else ""
    rows = [
        ("state", f"{status.state}: {status.why}" if status.why else status.state),
        ("last record", f"{show_seconds(status.last_record_seconds)} ago"),
        ("step", f"{status.step:,} of {'?' if status.steps is None else f'{status.steps:,}'}{done}"),
        ("loss", "" if status.loss is None else f"{status.loss:.4g}"),
        ("validation", _describe_validation(status)),
        ("tokens", f"{show_number(status.tokens)}, {_describe_rate(status)}"),
        ("time left", left),
        ("last checkpoint", _describe_checkpoint(status)),
        ("restarts", str(status.restarts)),
        ("skipped batches", ", ".join(f"{count} {reason}" for reason, count in status.skipped.items())),
        ("slowest rank", _describe_slowest(status)),
        ("goodput", f"{status.goodput:.1%} of {show_seconds(status.wall_seconds)}"),
    ]
    lines = [status.run]
    for name, value in rows:
        lines += wrap(value, 100, initial_indent=f"  {name:<16} ", subsequent_indent=" " * 19)
    for part, seconds in status.seconds.items():
        share = seconds / status.wall_seconds if status.wall_seconds else 0.0
        bar = "#" * round(15 * share)
        lines.append(f"    {part:<14} {share:>6.1%} {show_seconds(seconds):>12}  {bar:<15}  {MEANING[part]}")
    return "\n".join(lines)


def describe_table(statuses: list[Status]) -> str:
    """Several runs as a table with one line per run, of at most 100 columns."""
    rows = [("run", "state", "step", "tok/s", "loss", "left", "saved", "again", "skips", "goodput")]
    for each in statuses:
        left = None if each.state == "finished" else each.seconds_left
        rows.append(
            (
                each.run if len(each.run) <= 20 else "..." + each.run[-17:],
                each.state,
                f"{each.step}/{'?' if each.steps is None else each.steps}",
                "" if each.tokens_per_second is None else show_number(each.tokens_per_second),
                "" if each.loss is None else f"{each.loss:.3f}",
                _show_short(left),
                _show_short(each.checkpoint_age_seconds),
                str(each.restarts),
                str(sum(each.skipped.values())),
                f"{each.goodput:.1%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _show_short(seconds: float | None) -> str:
    """Seconds as one number and its unit: 5.2 h."""
    if seconds is None:
        return ""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def to_json(status: Status) -> dict:
    """The status as a JSON object."""
    return {
        "run": status.run,
        "state": status.state,
        "why": status.why,
        "last_record_seconds": status.last_record_seconds,
        "step": status.step,
        "steps": status.steps,
        "loss": status.loss,
        "validation_step": status.validation_step,
        "validation": status.validation,
        "tokens": status.tokens,
        "tokens_per_second": status.tokens_per_second,
        "seconds_left": status.seconds_left,
        "checkpoint": status.checkpoint,
        "checkpoint_step": status.checkpoint_step,
        "checkpoint_age_seconds": status.checkpoint_age_seconds,
        "restarts": status.restarts,
        "skipped": status.skipped,
        "slowest": status.slowest,
        "goodput": status.goodput,
        "wall_seconds": status.wall_seconds,
        "seconds": status.seconds,
    }


def _describe_rate(status: Status) -> str:
    return "no rate yet" if status.tokens_per_second is None else f"{show_number(status.tokens_per_second)}/s"


def _describe_checkpoint(status: Status) -> str:
    if status.checkpoint is None or status.checkpoint_step is None or status.checkpoint_age_seconds is None:
        return "none yet"
    behind = status.step - status.checkpoint_step
    return f"{status.checkpoint}, {show_seconds(status.checkpoint_age_seconds)} ago, {behind} steps behind"


def _describe_validation(status: Status) -> str:
    if status.validation_step is None:
        return ""
    losses = [f"{name} {loss:.4g}".strip() for name, loss in status.validation.items()]
    return f"{', '.join(losses)} at step {status.validation_step:,}"


def _describe_slowest(status: Status) -> str:
    if status.slowest is None:
        return ""
    rank, host, ratio = status.slowest.values()
    return f"{rank} on {host}, {ratio:.2f} x the median"


def show_number(number: float) -> str:
    """A number with three digits and a decimal prefix: 1.23 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def show_seconds(seconds: float) -> str:
    """Seconds in at most two units: 3 d 4 h, 5 h 12 min, 2 min 3 s, 4.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    for size, unit, smaller, size_of_smaller in ((86400, "d", "h", 3600), (3600, "h", "min", 60), (60, "min", "s", 1)):
        if rounded >= size:
            return f"{rounded // size} {unit} {rounded % size // size_of_smaller} {smaller}"
    raise AssertionError("60 seconds are a minute")
