"""`up` after anything: kills, a reboot, and what careless people do to worktrees, branches, locks and state files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, commit_files, find_processes, git, run, wait_until, write_files
from farm_calls import Caller, living_process

sys.path[:0] = [str(ROOT)]
import farm as toolkit  # noqa: E402  (needs the path above)

A, B, C = "agent-001", "agent-002", "agent-003"

# A first commit, something unsaved, then a wait for the file `go` beside the repo; with `go` there it just adds its line.
STEPS = """
echo "a line" >>"$FARM_TASK.txt"; git add -A && git commit -q -m "step of $FARM_TASK" || exit 1
[ -e "$FARM_REPO/../go" ] || { echo "unsaved in $FARM_TASK" >notes.txt; : >"$FARM_REPO/../at-$FARM_TASK"; }
until [ -e "$FARM_REPO/../go" ]; do sleep 0.05; done
"""
DEAF = "trap '' HUP; " + STEPS


class Worked(Caller):
    """A farm whose agents are scripted, with what the tests ask about worktrees, processes and rescued work."""

    def worktree(self, agent: str = A) -> Path:
        return self.repo.parent / "repo-farm" / f"{agent}-worktree"

    def git_dir(self, agent: str = A) -> Path:
        """git's own folder for a worktree, found by its name: the worktree's .git file may be broken."""
        return self.repo / ".git/worktrees" / f"{agent}-worktree"

    def up(self, count: int = 1, agent: str = STEPS, gate: str = "true", **options) -> str:
        """`up`, which must succeed; what it said."""
        done = self("up", "-n", str(count), "--agent", agent, "--gate", gate, timeout=120, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stderr

    def start_work(self, count: int = 1, agents: int = 0, agent: str = STEPS, **options) -> list[str]:
        """`count` tasks in the hands of as many agents, each with a commit and unsaved work; the tasks' ids."""
        ids = [self.ok("add", f"task {number}") for number in range(1, count + 1)]
        self.up(agents or count, agent, **options)
        for task_id in ids:
            wait_until((self.repo.parent / f"at-{task_id}").exists, 60, f"work on {task_id}")
        return ids

    def let_go(self) -> None:
        (self.repo.parent / "go").touch()

    def wait_for(self, task_id: str, state: str = "landed", timeout: float = 60) -> dict:
        """The task's record once it is in `state`."""
        message = f"{task_id} {state}"
        return wait_until(lambda: (task := self.task(task_id))["state"] == state and task, timeout, message)

    def lines_on_main(self, task_id: str) -> int:
        """How many attempts' commits of STEPS reached main."""
        return len(git(self.repo, "show", f"main:{task_id}.txt").splitlines())

    def rescued(self, name: str = "notes.txt") -> set[str]:
        """The contents that a file has in the rescue refs."""
        refs = git(self.repo, "for-each-ref", "--format=%(refname)", "refs/farm/rescue").splitlines()
        found = [run(["git", "-C", self.repo, "show", f"{ref}:{name}"]) for ref in refs]
        return {done.stdout.strip() for done in found if done.returncode == 0}

    def live(self) -> dict[str, int]:
        """Agents with a live session, and its pid."""
        return {agent["agent"]: agent["pid"] for agent in self.json("status")["agents"] if agent["pid"]}

    def lock_file(self, agent: str = A) -> Path:
        return self.folder / "agent_locks" / f"{agent}.lock"

    def doctor(self, *args: str) -> str:
        return self("doctor", *args).stdout


@pytest.fixture
def farm(make_repo, farm_cleanup) -> Worked:
    """A farm on a new repo of one commit; what is left running is ended without failing the test."""
    return Worked(make_repo(), os.getpid())


@pytest.fixture
def kill_everything(sandbox) -> Callable[[], None]:
    """kill -9 of every process of the test's farm, tmux included."""

    def kill() -> None:
        while processes := find_processes(sandbox.token):
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=1)

    return kill


def find_server(token: str) -> psutil.Process:
    return next(process for process in find_processes(token) if process.name().startswith("tmux: server"))


def kill_session(farm: Worked, agent: str) -> None:
    """kill -9 of what a session runs, by a person who knows its pid."""
    os.kill(farm.live()[agent], signal.SIGKILL)


# ------------------------------------------------------------------------------------------------ kills and reboots


def test_up_goes_on_after_everything_was_killed_at_once(farm, kill_everything):
    ids = farm.start_work(3)
    kill_everything()
    farm.let_go()
    assert "going on from what is on disk" in farm.up(3)
    for task_id in ids:
        farm.wait_for(task_id)
        assert farm.lines_on_main(task_id) == 2
    assert farm.rescued() == {f"unsaved in {task_id}" for task_id in ids}


def test_after_a_reboot_no_attempt_is_counted_and_each_task_goes_on_from_its_own_commits(farm, kill_everything, monkeypatch):
    monkeypatch.setenv("FARM_BOOT_ID", "first-boot")
    ids = farm.start_work(2)
    kill_everything()
    farm.let_go()
    monkeypatch.setenv("FARM_BOOT_ID", "second-boot")
    farm.up(2)
    for task_id in ids:
        assert farm.wait_for(task_id)["attempts"] == 0
        assert farm.lines_on_main(task_id) == 2
    assert farm.rescued() == {f"unsaved in {task_id}" for task_id in ids}


def test_up_goes_on_after_the_tmux_server_was_killed(farm, sandbox):
    ids = farm.start_work(2)
    find_server(sandbox.token).kill()
    farm.let_go()
    farm.up(2)
    for task_id in ids:
        farm.wait_for(task_id)


@pytest.mark.parametrize("victim", ["server", "session"])
def test_an_agent_that_outlives_its_session_is_ended_before_its_worktree_is_used_again(farm, sandbox, victim):
    """Two writers in one worktree would take each other's work for their own."""
    [task_id] = farm.start_work(agent=DEAF)
    session = psutil.Process(farm.live()[A])
    strays = session.children(recursive=True)
    find_server(sandbox.token).kill() if victim == "server" else session.kill()
    wait_until(lambda: not session.is_running() or session.status() == "zombie", message="the session's end")
    farm.up()
    wait_until(lambda: farm.task(task_id)["attempts"] == 1 and farm.task(task_id)["state"] == "claimed", 60, "a second attempt")
    assert [process for process in strays if process.is_running() and process.status() != "zombie"] == []


def test_a_killed_loop_is_started_again_by_itself_and_up_makes_no_second_one(farm):
    farm.start_work()
    before = farm.json("status")["loop"]["pid"]
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: farm.json("status")["loop"]["pid"] not in (None, before), 30, "a new loop")
    after = farm.json("status")["loop"]["pid"]
    farm.up()
    assert farm.json("status")["loop"]["pid"] == after


def test_a_session_that_was_killed_is_started_again_and_its_work_goes_on(farm):
    [task_id] = farm.start_work()
    kill_session(farm, A)
    farm.let_go()
    farm.wait_for(task_id)
    assert (farm.lines_on_main(task_id), farm.rescued()) == (2, {f"unsaved in {task_id}"})


# ------------------------------------------------------------------------------------------------ worktrees and branches


def test_a_worktree_folder_that_someone_deleted_is_there_again_after_up(farm, kill_everything):
    [task_id] = farm.start_work()
    kill_everything()
    shutil.rmtree(farm.worktree())
    farm.let_go()
    farm.up()
    farm.wait_for(task_id)
    assert farm.lines_on_main(task_id) == 2


def test_a_worktree_folder_that_is_deleted_while_the_farm_runs_stops_nothing(farm):
    farm.up()
    wait_until(lambda: farm.live().keys() == {A}, message="the session")
    farm.let_go()
    shutil.rmtree(farm.worktree())
    farm.wait_for(farm.ok("add", "after it was deleted"))


BREAKAGES: dict[str, Callable[[Path, Path], object]] = {
    "no .git file": lambda worktree, git_dir: (worktree / ".git").unlink(),
    "broken .git file": lambda worktree, git_dir: (worktree / ".git").write_text("gitdir: /nowhere\n"),
    "broken gitdir": lambda worktree, git_dir: (git_dir / "gitdir").write_text("/nowhere/.git\n"),
    "empty gitdir": lambda worktree, git_dir: (git_dir / "gitdir").write_text(""),
    "empty HEAD": lambda worktree, git_dir: (git_dir / "HEAD").write_text(""),
    "no commondir": lambda worktree, git_dir: (git_dir / "commondir").unlink(),
    "broken index": lambda worktree, git_dir: (git_dir / "index").write_bytes(b"DIRC\0\0\0\2 not an index"),
    "locked": lambda worktree, git_dir: (git_dir / "locked").write_text("on a USB stick\n"),
    "unlocked": lambda worktree, git_dir: (git_dir / "locked").unlink(),
    "stale index.lock": lambda worktree, git_dir: (git_dir / "index.lock").touch(),
    "stale HEAD.lock": lambda worktree, git_dir: (git_dir / "HEAD.lock").touch(),
}


def break_worktree(farm: Worked, what: str, agent: str = A) -> None:
    BREAKAGES[what](farm.worktree(agent), farm.git_dir(agent))


def test_up_mends_worktrees_that_are_broken_in_any_way_and_their_work_goes_on(farm, kill_everything):
    ids = farm.start_work(len(BREAKAGES))
    kill_everything()
    for number, what in enumerate(BREAKAGES, 1):
        break_worktree(farm, what, f"agent-{number:03d}")
    farm.let_go()
    farm.up(len(BREAKAGES))
    for task_id in ids:
        farm.wait_for(task_id)
    assert {task_id: farm.lines_on_main(task_id) for task_id in ids} == dict.fromkeys(ids, 2)
    assert farm.rescued() >= {f"unsaved in {task_id}" for task_id in ids}


def test_the_loop_mends_broken_worktrees_whose_agents_died_and_the_others_work_on(farm):
    ids = farm.start_work(3)
    break_worktree(farm, "broken .git file", A)
    break_worktree(farm, "empty HEAD", B)
    kill_session(farm, A)
    kill_session(farm, B)
    farm.let_go()
    for task_id in ids:
        farm.wait_for(task_id)


def test_an_idle_agent_whose_worktree_broke_uses_up_no_attempts(farm):
    farm.up()
    wait_until(lambda: farm.live().keys() == {A}, message="the session")
    farm.let_go()
    break_worktree(farm, "broken .git file")
    task = farm.wait_for(farm.ok("add", "after it broke"))
    assert task["attempts"] <= 1


def test_something_else_in_the_place_of_a_worktree_stops_no_other_agent(farm):
    farm.worktree().parent.mkdir()
    farm.worktree().write_text("a file of the user's\n")
    task_id = farm.ok("add", "for the other one")
    farm.let_go()
    said = farm.up(2)
    farm.wait_for(task_id)
    assert A in said
    assert farm.worktree().read_text() == "a file of the user's\n"


def test_a_lock_that_a_killed_git_left_on_an_agents_branch_stops_nothing(farm, kill_everything):
    [task_id] = farm.start_work()
    kill_everything()
    (farm.repo / f".git/refs/heads/farm/{A}/{task_id}.lock").touch()
    farm.let_go()
    farm.up()
    farm.wait_for(task_id)
    assert farm.rescued() == {f"unsaved in {task_id}"}


def test_a_lock_that_a_killed_git_left_on_the_pin_stops_no_submission(farm):
    [task_id] = farm.start_work()
    pins = farm.repo / ".git/refs/farm/ready"
    pins.mkdir(parents=True)
    (pins / f"{task_id}.lock").touch()
    farm.let_go()
    farm.wait_for(task_id)


def test_a_lock_that_a_killed_git_left_on_a_pin_stops_no_merger(farm):
    farm.ok("add", "one")
    farm.submit(A, {"one.txt": "text\n"})
    (farm.repo / ".git/refs/farm/ready/t-0001.lock").touch()
    farm.ok("merge", "--gate", "true")
    assert farm.task("t-0001")["state"] == "landed"


def test_worktrees_in_the_middle_of_a_merge_rebase_or_cherry_pick_are_kept_and_used_again(farm, kill_everything):
    ids = farm.start_work(3)
    kill_everything()
    git(farm.repo, "switch", "-q", "-c", "other", "main")
    commit_files(farm.repo, {f"{task_id}.txt": "another's line\n" for task_id in ids})
    git(farm.repo, "switch", "-q", "main")
    for verb, agent, task_id in zip(("merge", "rebase", "cherry-pick"), (A, B, C), ids, strict=True):
        assert run(["git", "-C", farm.worktree(agent), verb, "other"]).returncode != 0
        write_files(farm.worktree(agent), {f"{task_id}.txt": f"{verb} half resolved\n"})
    farm.let_go()
    farm.up(3)
    for verb, task_id in zip(("merge", "rebase", "cherry-pick"), ids, strict=True):
        farm.wait_for(task_id)
        assert f"{verb} half resolved" in farm.rescued(f"{task_id}.txt")
        assert git(farm.repo, "show", f"main:{task_id}.txt") == "a line\na line"


def test_a_task_whose_branch_someone_deleted_begins_anew(farm):
    [task_id] = farm.start_work()
    farm.ok("down", "--now", timeout=120)
    git(farm.worktree(), "switch", "-q", "--detach")
    git(farm.repo, "update-ref", "-d", f"refs/heads/farm/{A}/{task_id}")
    farm.let_go()
    farm.up()
    farm.wait_for(task_id)


@pytest.mark.parametrize("kind", ["task", "work"])
def test_a_branch_that_someone_moved_stops_nothing_and_its_old_commits_are_kept(farm, kill_everything, kind):
    [task_id] = farm.start_work()
    kill_everything()
    before = git(farm.repo, "rev-parse", f"farm/{A}/{task_id}")
    moved = commit_files(farm.repo, {"by-a-person.txt": "text\n"})
    git(farm.repo, "update-ref", f"refs/heads/farm/{A}/{task_id if kind == 'task' else 'work'}", moved)
    farm.let_go()
    farm.up()
    farm.wait_for(task_id)
    if kind == "work":
        assert git(farm.repo, "for-each-ref", "--contains", before) != ""
    assert "by-a-person.txt" in git(farm.repo, "ls-tree", "--name-only", "main").splitlines()


# ------------------------------------------------------------------------------------------------ claims and leases


def test_a_lock_file_of_an_agent_that_no_longer_exists_frees_its_task(farm, kill_everything):
    ids = farm.start_work(3)
    kill_everything()
    farm.let_go()
    farm.up(1)
    for task_id in ids:
        farm.wait_for(task_id)
        assert farm.lines_on_main(task_id) == 2
    assert farm.live().keys() == {A}


def test_down_ends_the_agents_of_a_farm_that_has_become_smaller_and_counts_no_attempt(farm):
    ids = farm.start_work(3)
    farm.up(1)
    farm.ok("down", "--now", timeout=120)
    assert [(farm.task(task_id)["state"], farm.task(task_id)["attempts"]) for task_id in ids] == [("pending", 0)] * 3
    assert farm.rescued() == {f"unsaved in {task_id}" for task_id in ids}


def hand_to_another_host(farm: Worked, agent: str = A) -> str:
    """The agent claims a task on a host that cannot be seen from here; returns the fence."""
    farm.ok("add", "far away")
    fence = farm.claim(agent)["fence"]
    record = json.loads(farm.lock_file(agent).read_text())
    record["owner"].update(host="elsewhere.example", pid=1)
    farm.lock_file(agent).write_text(json.dumps(record) + "\n")
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

    def __init__(self, farm: Worked):
        self.store, self.leases = toolkit.Store(str(farm.repo)), toolkit.LeaseWatch(10)

    def look(self) -> list[str]:
        """The agents whose claims were ended by this look."""
        with self.store.transaction() as tx:
            return [claim.agent for claim in toolkit.LockRegistry(tx).expire(self.leases.is_lapsed)]


def test_an_owner_on_another_host_keeps_its_task_until_its_lease_is_over_by_the_watchers_clock(farm, clock):
    hand_to_another_host(farm)
    watcher = Watcher(farm)
    assert watcher.look() == []
    clock.wall += 1_000_000  # somebody set the wall clock
    clock.seconds += 9.9
    assert watcher.look() == []
    clock.seconds += 0.1
    assert watcher.look() == [A]
    assert farm.task("t-0001")["attempts"] == 1


def test_a_renewal_prolongs_a_lease(farm, clock):
    fence = hand_to_another_host(farm)
    watcher = Watcher(farm)
    watcher.look()
    clock.seconds += 9
    farm.ok("renew", A, "--fence", fence)
    watcher.look()
    clock.seconds += 9
    assert watcher.look() == []
    clock.seconds += 1
    assert watcher.look() == [A]


def test_a_watcher_that_has_just_come_waits_for_a_whole_lease(farm, clock):
    hand_to_another_host(farm)
    Watcher(farm).look()
    clock.seconds += 100
    assert Watcher(farm).look() == []


def test_the_loop_frees_what_an_owner_on_another_host_holds_after_its_lease(farm):
    (farm.repo / "farm.env").write_text("FARM_LEASE_SECONDS=1\n")
    hand_to_another_host(farm, C)
    farm.let_go()
    farm.up()
    farm.wait_for("t-0001")


# ------------------------------------------------------------------------------------------------ stopping


def test_down_lets_an_agent_finish_within_the_grace_time(farm):
    [task_id] = farm.start_work()
    down = farm.start("down", env={"FARM_GRACE_SECONDS": "60"})
    wait_until(lambda: json.loads((farm.folder / "farm.json").read_text())["mode"] == "stopping", message="the stop")
    farm.let_go()
    assert down.wait(60) == 0
    assert farm.task(task_id)["state"] == "ready"
    farm.ok("merge", "--gate", "true")
    assert farm.task(task_id)["state"] == "landed"


def test_down_ends_an_agent_that_does_not_finish_keeps_its_work_and_counts_no_attempt(farm, sandbox):
    [task_id] = farm.start_work()
    farm.ok("down", timeout=120, env={"FARM_GRACE_SECONDS": "0.2"})
    task = farm.task(task_id)
    assert (task["state"], task["attempts"]) == ("pending", 0)
    assert farm.rescued() == {f"unsaved in {task_id}"}
    assert (list(farm.lock_file().parent.glob("*.lock")), find_processes(sandbox.token)) == ([], [])


def test_after_down_the_next_up_goes_on_from_the_agents_commits(farm):
    [task_id] = farm.start_work()
    farm.ok("down", "--now", timeout=120)
    farm.let_go()
    farm.up()
    farm.wait_for(task_id)
    assert farm.lines_on_main(task_id) == 2


def test_down_frees_every_claim_although_worktrees_are_broken(farm):
    ids = farm.start_work(4)
    for what, agent in zip(("broken .git file", "empty HEAD", "broken index"), (A, B, C), strict=True):
        break_worktree(farm, what, agent)
    farm("down", "--now", timeout=120)
    assert [farm.task(task_id)["state"] for task_id in ids] == ["pending"] * 4


def test_down_ends_the_gate_of_a_merger_that_was_killed(farm, sandbox):
    note = sandbox.root / "gate.pid"
    farm.ok("add", "for the gate")
    farm.let_go()
    farm.up(gate=f"echo $$ >{note}; exec sleep 60")
    gate = psutil.Process(int(wait_until(lambda: note.exists() and note.read_text().strip(), 60, "the gate")))
    try:
        for name in ("loop.lock", "merger.lock"):
            os.kill(int((farm.folder / name).read_text().split()[0]), signal.SIGKILL)
        farm.ok("down", "--now", timeout=120)
        assert not gate.is_running() or gate.status() == "zombie"
    finally:
        gate.kill() if gate.is_running() else None


def test_down_and_clean_leave_a_bystander_in_a_worktree_alone(farm):
    farm.start_work()
    with subprocess.Popen(["sleep", "600"], cwd=farm.worktree(), env={"PATH": os.environ["PATH"]}) as bystander:
        farm.ok("down", "--now", timeout=120)
        kept = farm("clean", timeout=120)
        assert bystander.poll() is None
        bystander.kill()
    assert kept.returncode == 4
    assert kept.stdout.split("\t")[:2] == [A, "kept"] and "inside" in kept.stdout
    assert farm.worktree().is_dir()


# ------------------------------------------------------------------------------------------------ doctor


@pytest.mark.parametrize("name", ["task_queue/pending.json", "merge_queue/ready-to-merge.json"])
@pytest.mark.parametrize("damage", ["{ torn", None])
def test_doctor_fix_rebuilds_a_queue_file_from_history(farm, name, damage):
    farm.ok("add", "one")
    farm.ok("add", "two")
    farm.submit(A, {"one.txt": "text\n"})
    before = farm.json("tasks")
    path = farm.folder / name
    path.unlink() if damage is None else path.write_text(damage)
    assert farm("tasks").returncode == 7
    assert "doctor --fix" in farm.doctor()
    farm.ok("doctor", "--fix")
    assert farm.json("tasks") == before
    assert damage is None or [kept.read_text() for kept in path.parent.glob(f"{path.name}.damaged-*")] == [damage]


def test_doctor_fix_rebuilds_the_lock_of_a_live_agent_which_then_can_submit(farm):
    [task_id] = farm.start_work()
    farm.lock_file().write_text("{ torn")
    assert str(farm.lock_file()) in farm.doctor()
    assert "claimed" in farm.ok("doctor", "--fix")
    farm.let_go()
    assert farm.wait_for(task_id)["attempts"] == 0


def test_doctor_fix_brings_back_the_task_of_a_live_agent_whose_lock_someone_deleted(farm):
    [task_id] = farm.start_work()
    farm.lock_file().unlink()
    assert task_id in farm.doctor()
    farm.ok("doctor", "--fix")
    farm.let_go()
    assert farm.wait_for(task_id)["attempts"] == 0


def test_doctor_fix_brings_back_a_task_that_only_history_knows(farm):
    farm.ok("add", "one")
    stale = (farm.folder / "task_queue/pending.json").read_bytes()
    farm.ok("add", "two", "--prompt", "with a prompt")
    before = farm.json("tasks")
    (farm.folder / "task_queue/pending.json").write_bytes(stale)
    assert "t-0002" in farm.doctor()
    farm.ok("doctor", "--fix")
    assert farm.json("tasks") == before


def test_a_stale_save_of_the_queue_brings_no_finished_work_back(farm):
    farm.ok("add", "one")
    stale = (farm.folder / "task_queue/pending.json").read_bytes()
    farm.submit(A, {"one.txt": "text\n"})
    farm.ok("merge", "--gate", "true")
    (farm.folder / "task_queue/pending.json").write_bytes(stale)
    assert farm("claim", A, "--owner-pid", str(os.getpid())).returncode == 3
    assert [task["state"] for task in farm.json("tasks")] == ["landed"]


def test_doctor_of_a_healed_farm_finds_nothing_and_a_second_fix_mends_nothing(farm):
    farm.ok("add", "one")
    (farm.folder / "task_queue/pending.json").unlink()
    farm.ok("doctor", "--fix")
    assert "mended" not in farm.ok("doctor", "--fix")


def test_doctor_lists_a_pin_that_no_task_knows(farm):
    farm.ok("add", "one")
    git(farm.repo, "update-ref", "refs/farm/ready/t-0099", "HEAD")
    assert re.search(r"refs/farm/ready/t-0099 keeps [0-9a-f]{10}, and no task t-0099 is known", farm.doctor())


def test_doctor_names_the_lock_of_a_dead_owner(farm):
    farm.ok("add", "one")
    with living_process() as owner:
        farm.ok("claim", A, "--owner-pid", str(owner.pid))
        owner.kill()
        owner.wait()
        assert f"{A} holds its lock" in farm.doctor()


# ------------------------------------------------------------------------------------------------ a disk that fills


def test_below_the_limit_of_free_disk_no_task_is_handed_out_and_the_farm_says_so(farm):
    (farm.repo / "farm.env").write_text("FARM_MIN_FREE_MIB=999999999\n")
    task_id = farm.ok("add", "one")
    farm.let_go()
    farm.up()
    log = farm.folder / "logs/control.log"
    wait_until(lambda: log.exists() and "no new work starts" in log.read_text(), 30, "a word about it")
    assert farm.task(task_id)["state"] in ("pending", "waiting")



def test_below_the_limit_of_free_disk_no_gate_runs_and_merge_says_so(farm):
    farm.ok("add", "one")
    farm.submit(A, {"one.txt": "text\n"})
    said = farm.refused(5, "merge", "--gate", "true", env={"FARM_MIN_FREE_MIB": "999999999"})
    assert "no gate starts" in said and "FARM_MIN_FREE_MIB" in said
    assert farm.task("t-0001")["state"] == "ready"
    farm.ok("merge", "--gate", "true")
