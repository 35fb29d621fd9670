"""Decides, after the ranks of a SLURM job have ended, whether the job ends or starts again. Run by the batch script.

    python -m megatron_cm3leon.slurm.requeue RUN --status 75 --signal USR1 --since 1700000000 --max-restarts 3 \\
        --job "$(scontrol show job -o "$SLURM_JOB_ID")"

prints `requeue` or `end STATUS`. The reason goes to stderr and, when the job starts again or gives up, into the run's
events. The first rule that applies decides:

1. SLURM is already ending the job (scancel, pre-emption, node failure): the job ends, and SLURM decides what follows.
2. The run is finished, or the user must fix something (exit status 2): the job ends.
3. The run stopped because its time limit was near (SIGUSR1): the job starts again.
4. The run stopped on SIGTERM: the job ends, unless it is being pre-empted with a grace time. SLURM 22.05 requeues only
   jobs that still run at the end of their grace time, and this one has saved and ended before.
5. Anything else is a failure: the job starts again.

After --max-restarts consecutive restarts without a new checkpoint the job ends in cases 3 to 5 too. torchrun turns each
nonzero exit status into 1, so the `stop` and `failure` events of this start take precedence over the status.
"""

import argparse
import sys
from dataclasses import dataclass

from megatron_cm3leon.checkpoint.format import list_checkpoints, parse_step
from megatron_cm3leon.monitoring.events import read_events, record
from megatron_cm3leon.runtime.exit_status import STOPPED, USER_ERROR


@dataclass(frozen=True)
class Decision:
    """Whether the job starts again, and why."""

    requeue: bool
    status: int
    """Exit status of the job if it ends."""
    reason: str


def parse_job(line: str) -> dict[str, str]:
    """Parse the fields of one line of `scontrol show job -o`."""
    return dict(field.partition("=")[::2] for field in line.split() if "=" in field)


def decide(status: int, signal: str, events: list[dict], job: dict[str, str]) -> Decision:
    """Decide whether a job starts again, without the limit of restarts.

    `signal`: received by the batch script (USR1, TERM or empty); `events`: since this start of the job; `job`: fields
    of `scontrol show job`.
    """
    last = {event["event"]: event for event in events}
    if job.get("JobState", "RUNNING") != "RUNNING":
        return Decision(False, status or STOPPED, f"SLURM is ending the job ({job['JobState']})")
    stopped = last.get("stop", {}).get("reason")
    if stopped in ("finished", "stop_after") or status == 0:
        return Decision(False, 0, "the run is finished")
    failure = last.get("failure", {})
    if USER_ERROR in (status, failure.get("status")):
        return Decision(False, USER_ERROR, "the run stopped with an error that the user must fix")
    received = {signal, str(last.get("signal", {}).get("signal", "")).removeprefix("SIG")}
    if "USR1" in received:
        return Decision(True, STOPPED, "time limit")
    if job.get("PreemptTime", "None") != "None":
        return Decision(True, STOPPED, "pre-emption")
    if "TERM" in received or status == STOPPED:
        return Decision(False, STOPPED, "the run was stopped by SIGTERM; the same command continues it")
    return Decision(True, status, failure.get("cause") or f"exit status {status}")


def count_idle_restarts(events: list[dict], job: str | None, step: int) -> int:
    """Number of consecutive last restarts of this job since which no checkpoint after `step` was written."""
    count = 0
    for event in reversed([event for event in events if event["event"] == "requeue"]):
        if event["job"] != job or event["step"] < step:
            break
        count += 1
    return count


def limit_restarts(decision: Decision, idle: int, most: int) -> Decision:
    """`decision`, but the job ends if its last `most` restarts, `idle` by count, wrote no new checkpoint."""
    if not decision.requeue or idle < most:
        return decision
    return Decision(
        False,
        decision.status if decision.status not in (0, STOPPED) else 1,
        f"{idle} consecutive restarts without a new checkpoint, cluster.max_restarts is {most}; the last end: "
        f"{decision.reason}. Fix its cause, then submit the same command again",
    )


def main() -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="megatron_cm3leon.slurm.requeue", description=summary)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--status", type=int, required=True, help="exit status of the ranks")
    parser.add_argument("--signal", default="", help="signal that the batch script received: USR1, TERM or empty")
    parser.add_argument("--since", type=float, required=True, help="time of this start of the job, Unix seconds")
    parser.add_argument("--max-restarts", type=int, required=True, help="consecutive restarts without a new checkpoint")
    parser.add_argument("--job", required=True, help="output of `scontrol show job -o`")
    options = parser.parse_args()
    events, job = read_events(options.run), parse_job(options.job)
    of_this_start = [event for event in events if event["time"] >= options.since]
    decision = decide(options.status, options.signal, of_this_start, job)
    found = list_checkpoints(options.run)
    newest = parse_step(found[-1]) if found else None
    step = -1 if newest is None else newest
    final = limit_restarts(decision, count_idle_restarts(events, job.get("JobId"), step), options.max_restarts)
    if decision.requeue:
        record(
            options.run,
            events[-1]["attempt"] if events else 0,
            "requeue" if final.requeue else "gave_up",
            step=step,
            job=job.get("JobId"),
            restarts=int(job.get("Restarts", 0)),
            reason=final.reason,
        )
    print(f"{'requeued' if final.requeue else 'not requeued'}: {final.reason}.", file=sys.stderr)
    print("requeue" if final.requeue else f"end {final.status}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
