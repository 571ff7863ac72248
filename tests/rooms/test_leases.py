"""Claims and leases: whose they are after kills, by hand, and of another host."""

from __future__ import annotations

import json

import pytest
from farm_calls import A, C
from worked import Worked

import farm as toolkit


def test_a_lock_file_of_an_agent_that_no_longer_exists_frees_its_task(worked, kill_everything):
    ids = worked.start_work(3)
    kill_everything()
    worked.let_go()
    worked.up(1)
    for task_id in ids:
        worked.wait_for(task_id)
        assert worked.lines_on_main(task_id) == 2
    assert worked.live().keys() == {A}


def test_down_ends_the_agents_of_a_farm_that_has_become_smaller_and_counts_no_attempt(worked):
    ids = worked.start_work(3)
    worked.up(1)
    worked.ok("down", "--now", timeout=120)
    assert [(worked.task(task_id)["state"], worked.task(task_id)["attempts"]) for task_id in ids] == [("pending", 0)] * 3
    assert worked.rescued() == {f"unsaved in {task_id}" for task_id in ids}


def hand_to_another_host(worked: Worked, agent: str = A) -> str:
    """The agent claims a task on a host that cannot be seen from here; returns the fence."""
    worked.ok("add", "far away")
    fence = worked.claim(agent)["fence"]
    record = json.loads(worked.lock_file(agent).read_text())
    record["owner"].update(host="elsewhere.example", boot="another", machine="another", pid=1)
    worked.lock_file(agent).write_text(json.dumps(record) + "\n")
    return fence


class FakeClock:
    """Seconds that pass when a test says so; the wall clock goes its own way."""

    def __init__(self):
        self.seconds, self.wall = 1000.0, 1_700_000_000.0

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> float:
        return self.wall


@pytest.fixture
def clock(monkeypatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(toolkit, "CLOCK", fake)
    return fake


class Watcher:
    """Somebody who looks at the leases of 10 s now and then."""

    def __init__(self, worked: Worked):
        self.store = toolkit.Store(str(worked.repo))
        self.leases = toolkit.LeaseWatch(toolkit.load_settings(str(worked.repo), {"lease_seconds": 10.0}))

    def look(self) -> list[str]:
        """The agents whose claims were ended by this look."""
        with self.store.transaction() as tx:
            return [claim.agent for claim in toolkit.TaskQueue(tx).expire(self.leases.is_lapsed)]


def test_an_owner_on_another_host_keeps_its_task_until_its_lease_is_over_by_the_watchers_clock(worked, clock):
    hand_to_another_host(worked)
    watcher = Watcher(worked)
    assert watcher.look() == []
    clock.wall += 1_000_000  # somebody set the wall clock
    clock.seconds += 9.9
    assert watcher.look() == []
    clock.seconds += 0.1
    assert watcher.look() == [A]
    task = worked.task("t-0001")
    assert task["attempts"] == 0
    assert task["reason"].startswith(f"{A} on elsewhere.example was not heard of in its lease (last at 20")


def test_a_renewal_prolongs_a_lease(worked, clock):
    fence = hand_to_another_host(worked)
    watcher = Watcher(worked)
    watcher.look()
    clock.seconds += 9
    worked.ok("renew", A, "--fence", fence)
    watcher.look()
    clock.seconds += 9
    assert watcher.look() == []
    clock.seconds += 1
    assert watcher.look() == [A]


def test_a_watcher_that_has_just_come_waits_for_a_whole_lease(worked, clock):
    hand_to_another_host(worked)
    Watcher(worked).look()
    clock.seconds += 100
    assert Watcher(worked).look() == []


def test_the_loop_frees_what_an_owner_on_another_host_holds_after_its_lease(worked):
    (worked.repo / "farm.env").write_text("FARM_LEASE_SECONDS=1\n")
    hand_to_another_host(worked, C)
    worked.let_go()
    worked.up()
    worked.wait_for("t-0001")
