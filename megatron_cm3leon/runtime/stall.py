"""Which rank a run that stands still is waiting for."""

from collections.abc import Mapping

from megatron_cm3leon.runtime.peers import Beat, Place
from megatron_cm3leon.runtime.stacks import Standing


def find_late(
    ranks: int,
    places: Mapping[int, Place],
    before: Mapping[int, Beat],
    now: Mapping[int, Beat],
    standings: Mapping[int, Standing],
) -> tuple[int, str]:
    """(rank, sentence): the rank that is missing, silent, behind, or busy while the others wait for it; -1 for none.

    `before` and `now` are beats some seconds apart: who lives has beaten in between.
    """
    everyone = range(ranks)
    missing = [rank for rank in everyone if rank not in places]
    if missing:
        return missing[0], f"{_name(missing, places)} never came: its process did not start, or not reach the others"
    silent = [rank for rank in everyone if rank not in now or now[rank] == before.get(rank)]
    if silent:
        return silent[0], f"{_name(silent, places)} does not answer: stopped, out of memory, or its node is gone"
    phases = f"the furthest is in: {max(now.values(), key=lambda beat: beat.progress).phase}"
    least = min(beat.progress for beat in now.values())
    behind = [rank for rank in everyone if now[rank].progress == least]
    if len(behind) < ranks:
        return behind[
            0
        ], f"{_name(behind, places)} is late, in: {now[behind[0]].phase}{_at(behind[0], standings)}; {phases}"
    busy = [rank for rank, standing in standings.items() if not standing.in_collective]
    if 0 < len(busy) < len(standings):
        return busy[
            0
        ], f"{_name(busy, places)} is late, in: {now[busy[0]].phase}{_at(busy[0], standings)}; the others wait"
    return -1, f"every rank is in: {now[0].phase}{_at(0, standings)}; no rank is behind the others"


def _name(ranks: list[int], places: Mapping[int, Place]) -> str:
    first = f"rank {ranks[0]}" + (f" on {places[ranks[0]]}" if ranks[0] in places else "")
    return first + (f", one of {len(ranks)} ranks," if len(ranks) > 1 else "")


def _at(rank: int, standings: Mapping[int, Standing]) -> str:
    return f" ({standings[rank].text})" if rank in standings else ""
