"""Claims: who gets which task, what may not be claimed yet, waiting, and owners that die."""

from __future__ import annotations

import json
import os
import sys
import time

import psutil
import pytest
from farm_calls import A, B, C, assert_is_error, living_process, lock_file
from sandbox import run, wait_until

import farm as toolkit

# ---------------------------------------------------------------------------------------------- claim


def test_claim_prints_the_lock_file_on_one_line(farm):
    farm.ok("add", "Fix")
    printed = farm.ok("claim", A, "--owner-pid", str(farm.owner))
    assert printed + "\n" == lock_file(farm, A).read_text()


def test_a_fence_names_the_task_and_its_revision(farm):
    farm.ok("add", "Fix")
    claim = farm.claim(A)
    assert claim["fence"] == f"t-0001.{claim['task']['rev']}"


def test_a_number_stands_for_an_agent(farm):
    farm.ok("add", "Fix")
    assert farm.claim("3")["agent"] == C


@pytest.mark.parametrize("agent", ["../x", "a/b", "", ".hidden", "a b", "x.lock", "a\nb"])
def test_claim_refuses_an_agent_that_is_no_file_name(farm, agent):
    farm.ok("add", "Fix")
    farm.refused(2, "claim", agent, "--owner-pid", str(farm.owner))


def test_claim_without_an_agent_is_a_usage_error(farm):
    farm.refused(2, "claim")


def test_claim_of_nothing_exits_3(farm):
    farm.refused(3, "claim", A, "--owner-pid", str(farm.owner))


def test_claim_is_first_come_first_served(farm):
    for title in ("a", "b", "c"):
        farm.ok("add", title)
    assert [farm.claim(agent)["task"]["id"] for agent in (A, B, C)] == ["t-0001", "t-0002", "t-0003"]


def test_claim_takes_the_highest_priority_first(farm):
    farm.ok("add", "low", "--priority", "-1")
    farm.ok("add", "normal")
    farm.ok("add", "high", "--priority", "5")
    assert [farm.claim(agent)["task"]["title"] for agent in (A, B, C)] == ["high", "normal", "low"]


def test_claim_again_by_the_same_owner_gives_the_same_claim(farm):
    farm.ok("add", "a")
    farm.ok("add", "b")
    assert farm.claim(A) == farm.claim(A)


def test_claim_for_an_agent_whose_owner_lives_is_refused_to_another_owner(farm):
    farm.ok("add", "a")
    farm.ok("add", "b")
    farm.claim(A)
    with living_process() as other:
        farm.refused(4, "claim", A, "--owner-pid", str(other.pid))


def test_claim_by_id_passes_over_those_before_it(farm):
    farm.ok("add", "a")
    farm.ok("add", "b")
    assert farm.claim(A, "--id", "t-0002")["task"]["title"] == "b"


def test_claim_by_id_of_a_held_task_is_refused(farm):
    farm.ok("add", "a")
    farm.claim(A)
    assert A in farm.refused(4, "claim", B, "--owner-pid", str(farm.owner), "--id", "t-0001")


def test_claim_by_id_of_no_task_exits_3(farm):
    farm.ok("add", "a")
    farm.refused(3, "claim", A, "--owner-pid", str(farm.owner), "--id", "t-0009")


def test_claim_refuses_an_owner_that_does_not_live(farm):
    farm.ok("add", "a")
    with living_process() as process:
        process.kill()
        process.wait()
        farm.refused(2, "claim", A, "--owner-pid", str(process.pid))


def in_a_session_of_its_own(then: str, argv: list[str]) -> list[str]:
    """A command that leads a new session and there runs `then`, Python that has `argv`."""
    return [sys.executable, "-c", f"import os, subprocess\nos.setsid()\nargv = {argv!r}\n{then}"]


def test_claim_that_leads_its_own_session_must_name_an_owner(farm):
    farm.ok("add", "a")
    assert_is_error(run(in_a_session_of_its_own("os.execv(argv[0], argv)", farm.argv("claim", A))), 2)


def test_the_session_leader_owns_a_claim_by_default(farm):
    farm.ok("add", "a")
    done = run(in_a_session_of_its_own("print(os.getpid(), flush=True)\nsubprocess.run(argv)", farm.argv("claim", A)))
    leader, claim = done.stdout.splitlines()
    assert json.loads(claim)["owner"]["pid"] == int(leader)


def test_many_claims_at_once_take_each_task_once(farm):
    farm.ok("add", "-f", "-", input="".join(f"task {number}\n" for number in range(8)))
    names = [f"agent-{number:03d}" for number in range(1, 9)]
    started = [farm.start("claim", name, "--owner-pid", str(farm.owner)) for name in names]
    claimed = sorted(json.loads(process.communicate(timeout=60)[0])["task"]["id"] for process in started)
    assert claimed == [f"t-{number:04d}" for number in range(1, 9)]


# ---------------------------------------------------------------------------------------------- what may not be claimed yet


def test_a_task_waits_until_what_it_comes_after_has_landed(farm):
    farm.ok("add", "a")
    farm.ok("add", "b", "--after", "t-0001")
    farm.submit(A, {"a.txt": "a"})
    farm.refused(3, "claim", B, "--owner-pid", str(farm.owner))


def test_a_task_may_be_claimed_once_what_it_comes_after_has_landed(farm):
    farm.ok("add", "a")
    farm.ok("add", "b", "--after", "t-0001")
    farm.submit(A, {"a.txt": "a"})
    farm.ok("merge")
    assert farm.claim(B)["task"]["id"] == "t-0002"


def test_a_task_with_unmet_after_is_shown_as_waiting(farm):
    farm.ok("add", "a")
    farm.ok("add", "b", "--after", "t-0001")
    assert farm.task("t-0002")["state"] == "waiting"


def test_waiting_is_never_stored(farm):
    farm.ok("add", "a")
    farm.ok("add", "b", "--after", "t-0001")
    assert '"waiting"' not in (farm.folder / "task_queue" / "pending.json").read_text()


def test_claim_skips_a_task_whose_paths_overlap_a_held_one(farm):
    farm.ok("add", "a", "--path", "src/**")
    farm.ok("add", "b", "--path", "src/db/*.py")
    farm.ok("add", "c", "--path", "docs")
    farm.claim(A)
    assert farm.claim(B)["task"]["title"] == "c"


def test_claim_skips_a_task_whose_paths_overlap_a_lock(farm):
    farm.ok("add", "a", "--path", "src/db/*.py")
    farm.lock(B, "path:src/**", check=True)
    farm.refused(3, "claim", A, "--owner-pid", str(farm.owner))


def test_claim_takes_a_task_whose_paths_only_its_own_lock_covers(farm):
    farm.ok("add", "a", "--path", "src/db/*.py")
    farm.lock(A, "path:src/**", check=True)
    assert farm.claim(A)["task"]["title"] == "a"


def test_a_task_in_backoff_is_shown_as_waiting(farm):
    farm.ok("add", "a")
    farm.ok("fail", A, "--fence", farm.claim(A)["fence"], "--why", "no")
    farm.ok("fail", A, "--fence", farm.claim(A, "--wait", "20")["fence"], "--why", "no")
    assert farm.task("t-0001")["state"] == "waiting"


def test_claim_waits_for_the_end_of_a_backoff(farm):
    farm.ok("add", "a")
    farm.ok("fail", A, "--fence", farm.claim(A)["fence"], "--why", "no")
    assert farm.claim(B, "--wait", "20")["task"]["attempts"] == 1


class StoodStill:
    """A clock that a test moves by hand."""

    def __init__(self):
        self.seconds = 1_800_000_000.0

    def now(self):
        return self.seconds

    monotonic = now


def test_backoff_doubles_up_to_five_minutes(farm, monkeypatch):
    clock = StoodStill()
    monkeypatch.setattr(toolkit, "CLOCK", clock)
    farm.ok("add", "a", "--max-attempts", "99")
    waits = []
    for _ in range(11):
        with toolkit.Store(str(farm.repo)).transaction() as tx:
            fence = toolkit.TaskQueue(tx).claim(A, toolkit.identify(farm.owner)).fence
            task = toolkit.TaskQueue(tx).fail(A, fence, "no")
        waits.append(toolkit.epoch(task.not_before) - clock.now())
        clock.seconds += waits[-1]
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


def test_a_clock_that_is_set_back_keeps_no_task_and_no_agent_for_as_long(farm, monkeypatch):
    clock = StoodStill()
    monkeypatch.setattr(toolkit, "CLOCK", clock)
    farm.ok("add", "a", "--max-attempts", "99")
    me, told = toolkit.identify(farm.owner), {"preset": "claude", "id": "one"}
    store = toolkit.Store(str(farm.repo))
    for end in ("fail", "release"):
        with store.transaction() as tx:
            queue = toolkit.TaskQueue(tx)
            fence = queue.claim(A, me, "", told).fence
            getattr(queue, end)(A, fence, "no", **({"resume": True} if end == "release" else {}))
            assert queue.claimable("agent-002") == []
        clock.seconds -= 86400
        with store.transaction() as tx:
            assert len(toolkit.TaskQueue(tx).claimable("agent-002")) == 1
            assert toolkit.describe_wait(tx.state.pending["t-0001"], tx.state, clock.now()) == ""
    ends = [clock.seconds + 86400.0] * 5
    assert toolkit.next_start(ends, clock.seconds) == clock.seconds


# ---------------------------------------------------------------------------------------------- claim --wait


def test_claim_with_wait_gets_a_task_that_is_added_meanwhile(farm):
    waiting = farm.start("claim", A, "--owner-pid", str(farm.owner), "--wait", "60")
    wait_until((farm.folder / "events.jsonl").exists, message="the first look of the waiting claim")
    farm.ok("add", "Late")
    assert json.loads(waiting.communicate(timeout=60)[0])["task"]["title"] == "Late"


def test_claim_with_wait_gets_a_task_that_is_unblocked_meanwhile(farm):
    farm.ok("add", "a", "--path", "src")
    farm.ok("add", "b", "--path", "src/x")
    fence = farm.claim(A)["fence"]
    waiting = farm.start("claim", B, "--owner-pid", str(farm.owner), "--wait", "60")
    farm.ok("fail", A, "--fence", fence, "--why", "no", "--no-retry")
    assert json.loads(waiting.communicate(timeout=60)[0])["task"]["title"] == "b"


def test_claim_with_wait_gets_the_task_of_an_owner_that_dies_meanwhile(farm):
    farm.ok("add", "a")
    lock_and_die(farm, C)
    with living_process() as owner:
        farm.ok("claim", A, "--owner-pid", str(owner.pid))
        waiting = farm.start("claim", B, "--owner-pid", str(farm.owner), "--wait", "10")
        wait_until(lambda: not lock_file(farm, C).exists(), message="the first look, which ends the dead owner's lock")
        owner.kill()
        owner.wait()
        assert json.loads(waiting.communicate(timeout=60)[0] or "{}").get("agent") == B


def lock_and_die(farm, agent: str) -> None:
    """A lock of an owner that is dead now: whoever looks next removes it, and can be seen to have looked."""
    with living_process() as owner:
        farm.ok("lock", agent, "schema", "--owner-pid", str(owner.pid))
        owner.kill()
        owner.wait()


def test_claim_with_wait_gives_up_at_its_end(farm):
    farm.refused(3, "claim", A, "--owner-pid", str(farm.owner), "--wait", "0.2")


@pytest.mark.parametrize("wait", ["soon", "nan", "-1"])
def test_claim_refuses_a_wait_that_is_no_number_of_seconds(farm, wait):
    done = farm("claim", A, "--owner-pid", str(farm.owner), f"--wait={wait}", timeout=20)
    assert_is_error(done, 2)


# ---------------------------------------------------------------------------------------------- dead owners


def claim_and_die(farm, agent=A, *args):
    """A claim of an owner that is dead now."""
    with living_process() as owner:
        claim = json.loads(farm.ok("claim", agent, "--owner-pid", str(owner.pid), *args))
        owner.kill()
        owner.wait()
    return claim


def test_claim_takes_over_a_dead_owners_task(farm):
    farm.ok("add", "a")
    claim_and_die(farm)
    assert farm.claim(B, "--wait", "20")["task"]["id"] == "t-0001"


def test_a_task_of_a_dead_owner_starts_from_its_own_branch(farm):
    farm.ok("add", "a")
    claim_and_die(farm)
    assert farm.claim(B, "--wait", "20")["task"]["start"] == f"farm/{A}/t-0001"


def test_a_death_counts_as_an_attempt(farm):
    farm.ok("add", "a", "--max-attempts", "1")
    claim_and_die(farm)
    farm("claim", B, "--owner-pid", str(farm.owner))
    assert farm.task("t-0001")["state"] == "failed"


def test_the_reason_after_a_death_names_the_agent(farm):
    farm.ok("add", "a")
    claim_and_die(farm)
    farm("claim", B, "--owner-pid", str(farm.owner))
    assert A in farm.task("t-0001")["reason"]


def test_a_reboot_costs_no_attempt(farm):
    farm.ok("add", "a")
    farm.claim(A)
    claim = farm.claim(B, env={"FARM_BOOT_ID": "another"})
    assert "attempts" not in claim["task"]


def test_the_fence_of_a_dead_owners_claim_is_refused(farm):
    farm.ok("add", "a")
    old = claim_and_die(farm)
    farm.claim(B, "--wait", "20")
    farm.refused(4, "submit", A, "--fence", old["fence"], "--commit", "HEAD")


def test_an_owner_that_is_a_zombie_is_dead(farm):
    farm.ok("add", "a")
    with living_process() as owner:
        farm.ok("claim", A, "--owner-pid", str(owner.pid))
        owner.kill()
        wait_until(lambda: psutil.Process(owner.pid).status() == psutil.STATUS_ZOMBIE)
        assert farm.claim(B, "--wait", "20")["agent"] == B


def test_a_live_owners_task_is_never_taken_by_age(farm):
    farm.ok("add", "a")
    farm.claim(A)
    farm.refused(3, "claim", B, "--owner-pid", str(farm.owner), "--wait", "0.2", env={"FARM_LEASE_SECONDS": "0"})


def test_an_owner_on_another_host_keeps_its_task_within_the_lease(farm):
    farm.ok("add", "a")
    farm.claim(A)
    move_owner_to_another_host(farm)
    farm.refused(3, "claim", B, "--owner-pid", str(farm.owner), "--wait", "0.2", env={"FARM_LEASE_SECONDS": "600"})


def test_an_owner_on_another_host_loses_its_task_after_the_lease(farm):
    farm.ok("add", "a")
    farm.claim(A)
    move_owner_to_another_host(farm)
    assert farm.claim(B, "--wait", "10", env={"FARM_LEASE_SECONDS": "0.3"})["agent"] == B


def move_owner_to_another_host(farm) -> None:
    path = lock_file(farm, A)
    claim = json.loads(path.read_text())
    claim["owner"].update(host="elsewhere.example", boot="another", machine="another")
    path.write_text(json.dumps(claim) + "\n")


# ------------------------------------------------------------------------------- what a store remembers


def test_a_lock_file_is_read_again_when_it_changes_or_has_changed_within_a_tick(farm):
    farm.ok("add", "Fix")
    farm.claim(A)
    store, path = toolkit.Store(str(farm.repo)), lock_file(farm, A)
    claim, now = json.loads(path.read_text()), time.time()

    def heard(year: str, at: float) -> str:
        """What the store has read after a change of one character, by which neither inode nor size changes."""
        path.write_text(json.dumps({**claim, "heard_at": f"{year}-01-01T00:00:00Z"}))
        os.utime(path, (at, at))
        return store.load().claims[A].heard_at[:4]

    assert [heard("2020", now - 9), heard("2021", now - 8)] == ["2020", "2021"]
    assert [heard("2022", now), heard("2023", now)] == ["2022", "2023"], "of one tick"
    path.unlink()
    assert store.load().claims == {}


def test_of_a_lock_that_is_gone_nothing_is_remembered(farm):
    """Each with-lock has a name of its own; a loop lives for a year."""
    store = toolkit.Store(str(farm.repo))
    farm.ok("add", "Fix")
    for number in range(5):
        agent = f"with-lock-{number}"
        farm.ok("lock", agent, f"name-{number}", "--owner-pid", str(farm.owner))
        os.utime(lock_file(farm, agent), (1, 1))
        assert [*store.read_claims()] == [agent] and len(store.known) == 1
        farm.ok("unlock", agent, f"name-{number}")
    store.load()
    assert not [name for name in store.known if "with-lock" in name]
