"""What the watchdog of one rank reports, given heartbeats and causes of other ranks: several nodes in one process."""

import time
from dataclasses import replace

import pytest
import torch.distributed as dist

from megatron_cm3leon.monitoring.events import read_events
from megatron_cm3leon.runtime import watchdog
from megatron_cm3leon.runtime.peers import Cause, Peers
from megatron_cm3leon.runtime.watchdog import Watchdog


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Rank 0's watchdog on node n0, its threads not started, and ranks 1 and 2 on node n1."""
    monkeypatch.setattr(watchdog, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(watchdog, "PERIOD_SECONDS", 0.1)
    store = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    ranks = [Peers(store, rank, 3) for rank in range(3)]
    for each in ranks:
        each.process = replace(each.process, host=f"n{min(each.rank, 1)}")
        each.register()
        each.send_heartbeat(1, "step 1")
    watch = Watchdog(ranks[0], tmp_path, 0, hosts_store=True, launcher=None)
    watch.attempt = 1
    return watch, ranks[1:], store


def exchange(watch, seconds, *live_peers):
    """Exchange with the store for some seconds, while `live_peers` send heartbeats."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not watch.cause:
        for peers in live_peers:
            peers.send_heartbeat(1, "step 1")
        watch._exchange()


def test_a_node_without_heartbeats_is_reported(world, capsys):
    watch, _, _ = world
    exchange(watch, 20)
    assert watch.cause.rank == 1 and "rank 1 on host n1" in watch.cause.text
    assert "the node or its network is down" in watch.cause.text
    [failure] = read_events(watch.run)
    assert failure["cause"] in capsys.readouterr().err


def test_a_node_that_sends_heartbeats_or_is_done_is_not_reported(world):
    watch, others, _ = world
    exchange(watch, 1, others[0])
    assert watch.cause is None
    others[0].mark_done()
    exchange(watch, 1)
    assert watch.cause is None


def test_a_silent_rank_is_not_reported_while_its_node_sends_heartbeats(world, monkeypatch):
    watch, others, _ = world
    monkeypatch.setattr(watch.peers, "send_heartbeat", lambda *state: others[1].send_heartbeat(1, "step 1"))
    exchange(watch, 1)
    assert watch.cause is None


def test_the_first_published_cause_is_used(world):
    watch, others, _ = world
    first = Cause("failure", 2, "n1", "the first", 2, reporter=2)
    assert others[1].publish_cause(first) == first
    assert others[0].publish_cause(replace(first, text="the second", reporter=1)) == first
    watch._exchange()
    assert watch.cause == first
