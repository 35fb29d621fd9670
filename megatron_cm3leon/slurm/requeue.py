"""Once the ranks of a SLURM job have ended: does the job end, or start again? Asked by the batch script.

    python -m megatron_cm3leon.slurm.requeue RUN --status 75 --signal USR1 --since 1700000000 --max-restarts 3 \\
        --job "$(scontrol show job -o "$SLURM_JOB_ID")"

prints `requeue` or `end STATUS`; why goes to stderr, and into the run folder's events when the job starts again or
gives up. What decides, first to last:

1. SLURM is ending the job already (scancel, pre-emption, a node that went down): it alone says what comes next.
2. The run finished, or its user must mend something (exit status 2): it ends.
3. It was asked to stop because time is running out (SIGUSR1): it starts again.
4. It was told to stop (SIGTERM): it ends, unless it is being pre-empted with a grace time: SLURM 22.05 requeues only
   a job that is still there when its grace ends, and this one has saved and left.
5. Anything else is a failure: it starts again.

3 to 5 hold until --max-restarts starts in a row brought no new checkpoint. torchrun turns every failing exit status
into 1, so the `stop` and `failure` events of this start count before the status.
"""

import argparse
import sys
from dataclasses import dataclass

from megatron_cm3leon.checkpoint.format import list_checkpoints, parse_step
from megatron_cm3leon.monitoring.events import read_events, record
from megatron_cm3leon.runtime.exit_status import STOPPED, USER_ERROR


@dataclass(frozen=True)
class Verdict:
    """What becomes of the job."""

    requeue: bool
    status: int
    """Exit status of a job that ends."""
    reason: str


def parse_job(line: str) -> dict[str, str]:
    """The fields of one line of `scontrol show job -o`."""
    return dict(field.partition("=")[::2] for field in line.split() if "=" in field)


def decide(status: int, signal: str, events: list[dict], job: dict[str, str]) -> Verdict:
    """`signal`: what the batch script received, USR1, TERM or nothing; `events`: those of this start of the job."""
    last = {event["event"]: event for event in events}
    if job.get("JobState", "RUNNING") != "RUNNING":
        return Verdict(False, status or STOPPED, f"SLURM is ending the job itself ({job['JobState']})")
    stopped = last.get("stop", {}).get("reason")
    if stopped in ("finished", "stop_after") or status == 0:
        return Verdict(False, 0, "the run is finished")
    failure = last.get("failure", {})
    if USER_ERROR in (status, failure.get("status")):
        return Verdict(False, USER_ERROR, "the run stopped with an error that its user can mend")
    received = {signal, str(last.get("signal", {}).get("signal", "")).removeprefix("SIG")}
    if "USR1" in received:
        return Verdict(True, STOPPED, "time limit")
    if job.get("PreemptTime", "None") != "None":
        return Verdict(True, STOPPED, "pre-emption")
    if "TERM" in received or status == STOPPED:
        return Verdict(False, STOPPED, "the run was told to stop; the same command goes on")
    return Verdict(True, status, failure.get("cause") or f"exit status {status}")


def count_idle_restarts(events: list[dict], job: str | None, step: int) -> int:
    """Restarts of this job, in a row up to now, at which the newest checkpoint was that of `step` already."""
    count = 0
    for event in reversed([event for event in events if event["event"] == "requeue"]):
        if event["job"] != job or event["step"] < step:
            break
        count += 1
    return count


def limit_restarts(verdict: Verdict, idle: int, most: int) -> Verdict:
    """The verdict, unless the last `most` restarts brought nothing."""
    if not verdict.requeue or idle < most:
        return verdict
    return Verdict(
        False,
        verdict.status if verdict.status not in (0, STOPPED) else 1,
        f"{idle} restarts in a row brought no new checkpoint, cluster.max_restarts is {most}; the last end: "
        f"{verdict.reason}. Mend its cause, then submit the same command again",
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="megatron_cm3leon.slurm.requeue", description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="run folder")
    parser.add_argument("--status", type=int, required=True, help="exit status of the ranks")
    parser.add_argument("--signal", default="", help="signal that the batch script received: USR1, TERM or nothing")
    parser.add_argument("--since", type=float, required=True, help="when this start of the job began, Unix seconds")
    parser.add_argument("--max-restarts", type=int, required=True, help="restarts in a row without a new checkpoint")
    parser.add_argument("--job", required=True, help="what `scontrol show job -o` says of the job")
    options = parser.parse_args()
    events, job = read_events(options.run), parse_job(options.job)
    verdict = decide(options.status, options.signal, [event for event in events if event["time"] >= options.since], job)
    found = list_checkpoints(options.run)
    step = parse_step(found[-1]) if found else -1
    final = limit_restarts(verdict, count_idle_restarts(events, job.get("JobId"), step), options.max_restarts)
    if verdict.requeue:
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
