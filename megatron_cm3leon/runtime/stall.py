"""Which rank a stalled run waits for."""

from collections.abc import Mapping

from megatron_cm3leon.runtime.peers import Heartbeat, ProcessId
from megatron_cm3leon.runtime.stacks import StackPosition


def find_late(
    ranks: int,
    processes: Mapping[int, ProcessId],
    before: Mapping[int, Heartbeat],
    now: Mapping[int, Heartbeat],
    positions: Mapping[int, StackPosition],
) -> tuple[int, str]:
    """Find the rank that the others wait for; returns (rank, sentence), with rank -1 if no rank differs from others.

    In this order: a rank that never started; one that sends no heartbeats; one in an earlier phase than the others; one
    that is in no collective while others are. `before` and `now` are heartbeats taken some seconds apart: a rank that
    is alive has sent one in between.
    """
    everyone = range(ranks)
    missing = [rank for rank in everyone if rank not in processes]
    if missing:
        name = _name(missing, processes)
        return missing[0], f"{name} never connected: its process did not start or cannot reach the store"
    silent = [rank for rank in everyone if rank not in now or now[rank] == before.get(rank)]
    if silent:
        name = _name(silent, processes)
        return silent[0], f"{name} does not respond: stopped, out of memory, or its node is down"
    furthest = f"the furthest is in: {max(now.values(), key=lambda beat: beat.progress).phase}"
    least = min(beat.progress for beat in now.values())
    behind = [rank for rank in everyone if now[rank].progress == least]
    if len(behind) < ranks:
        late = _describe_late(behind, processes, now, positions)
        return behind[0], f"{late}; {furthest}"
    busy = [rank for rank, position in positions.items() if not position.in_collective]
    if 0 < len(busy) < len(positions):
        late = _describe_late(busy, processes, now, positions)
        return busy[0], f"{late}; the others wait"
    return -1, f"every rank is in: {now[0].phase}{_at(0, positions)}; no rank is behind the others"


def _describe_late(
    late: list[int],
    processes: Mapping[int, ProcessId],
    now: Mapping[int, Heartbeat],
    positions: Mapping[int, StackPosition],
) -> str:
    return f"{_name(late, processes)} is late, in: {now[late[0]].phase}{_at(late[0], positions)}"


def _name(ranks: list[int], processes: Mapping[int, ProcessId]) -> str:
    """The first of `ranks` with its process, and how many there are."""
    first = f"rank {ranks[0]}" + (f" on {processes[ranks[0]]}" if ranks[0] in processes else "")
    return first + (f", one of {len(ranks)} ranks," if len(ranks) > 1 else "")


def _at(rank: int, positions: Mapping[int, StackPosition]) -> str:
    return f" ({positions[rank].text})" if rank in positions else ""
