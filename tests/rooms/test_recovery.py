"""`up` after anything: kills, a reboot, and what careless people do to worktrees and branches."""

from __future__ import annotations

import os
import shutil
import signal

import psutil
import pytest
from farm_calls import A, B, C, landed
from sandbox import commit_files, find_processes, git, run, wait_until, write_files
from worked import BREAKAGES, STEPS, Worked, break_worktree

DEAF = "trap '' HUP; " + STEPS


def find_server(token: str) -> psutil.Process:
    return next(process for process in find_processes(token) if process.name().startswith("tmux: server"))


def kill_session(worked: Worked, agent: str) -> None:
    """kill -9 of what a session runs, by a person who knows its pid."""
    os.kill(worked.live()[agent], signal.SIGKILL)


# ---------------------------------------------------------------------------------------------- kills and reboots


def test_up_goes_on_after_everything_was_killed_at_once(worked, kill_everything):
    ids = worked.start_work(3)
    kill_everything()
    worked.let_go()
    assert "going on from what is on disk" in worked.up(3)
    for task_id in ids:
        worked.wait_for(task_id)
        assert worked.lines_on_main(task_id) == 2
    assert worked.rescued() == {f"unsaved in {task_id}" for task_id in ids}


def test_after_a_reboot_no_attempt_is_counted_and_each_task_goes_on_from_its_own_commits(worked, kill_everything, monkeypatch):
    monkeypatch.setenv("FARM_BOOT_ID", "first-boot")
    ids = worked.start_work(2)
    kill_everything()
    worked.let_go()
    monkeypatch.setenv("FARM_BOOT_ID", "second-boot")
    worked.up(2)
    for task_id in ids:
        assert worked.wait_for(task_id)["attempts"] == 0
        assert worked.lines_on_main(task_id) == 2
    assert worked.rescued() == {f"unsaved in {task_id}" for task_id in ids}


def test_up_goes_on_after_the_tmux_server_was_killed(worked, sandbox):
    ids = worked.start_work(2)
    find_server(sandbox.token).kill()
    worked.let_go()
    worked.up(2)
    for task_id in ids:
        worked.wait_for(task_id)


@pytest.mark.parametrize("victim", ["server", "session"])
def test_an_agent_that_outlives_its_session_is_ended_before_its_worktree_is_used_again(worked, sandbox, victim):
    """Two writers in one worktree would take each other's work for their own."""
    [task_id] = worked.start_work(agent=DEAF)
    session = psutil.Process(worked.live()[A])
    strays = session.children(recursive=True)
    find_server(sandbox.token).kill() if victim == "server" else session.kill()
    wait_until(lambda: not session.is_running() or session.status() == "zombie", message="the session's end")
    worked.up()
    wait_until(lambda: worked.task(task_id)["attempts"] == 1 and worked.task(task_id)["state"] == "claimed", 60, "a second attempt")
    assert [process for process in strays if process.is_running() and process.status() != "zombie"] == []


def test_a_killed_loop_is_started_again_by_itself_and_up_makes_no_second_one(worked):
    worked.start_work()
    before = worked.json("status")["loop"]["pid"]
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: worked.json("status")["loop"]["pid"] not in (None, before), 30, "a new loop")
    after = worked.json("status")["loop"]["pid"]
    worked.up()
    assert worked.json("status")["loop"]["pid"] == after


def test_a_session_that_was_killed_is_started_again_and_its_work_goes_on(worked):
    [task_id] = worked.start_work()
    kill_session(worked, A)
    worked.let_go()
    worked.wait_for(task_id)
    assert (worked.lines_on_main(task_id), worked.rescued()) == (2, {f"unsaved in {task_id}"})


# ---------------------------------------------------------------------------------------------- worktrees and branches


def test_a_worktree_folder_that_someone_deleted_is_there_again_after_up(worked, kill_everything):
    [task_id] = worked.start_work()
    kill_everything()
    shutil.rmtree(worked.worktree())
    worked.let_go()
    worked.up()
    worked.wait_for(task_id)
    assert worked.lines_on_main(task_id) == 2


def test_a_worktree_folder_that_is_deleted_while_the_farm_runs_stops_nothing(worked):
    worked.up()
    wait_until(lambda: worked.live().keys() == {A}, message="the session")
    worked.let_go()
    shutil.rmtree(worked.worktree())
    worked.wait_for(worked.ok("add", "after it was deleted"))


def test_up_mends_worktrees_that_are_broken_in_any_way_and_their_work_goes_on(worked, kill_everything):
    ids = worked.start_work(len(BREAKAGES))
    kill_everything()
    for number, what in enumerate(BREAKAGES, 1):
        break_worktree(worked, what, f"agent-{number:03d}")
    worked.let_go()
    worked.up(len(BREAKAGES))
    for task_id in ids:
        worked.wait_for(task_id)
    assert {task_id: worked.lines_on_main(task_id) for task_id in ids} == dict.fromkeys(ids, 2)
    assert worked.rescued() >= {f"unsaved in {task_id}" for task_id in ids}


def test_the_loop_mends_broken_worktrees_whose_agents_died_and_the_others_work_on(worked):
    ids = worked.start_work(3)
    break_worktree(worked, "broken .git file", A)
    break_worktree(worked, "empty HEAD", B)
    kill_session(worked, A)
    kill_session(worked, B)
    worked.let_go()
    for task_id in ids:
        worked.wait_for(task_id)


def test_an_idle_agent_whose_worktree_broke_uses_up_no_attempts(worked):
    worked.up()
    wait_until(lambda: worked.live().keys() == {A}, message="the session")
    worked.let_go()
    break_worktree(worked, "broken .git file")
    task = worked.wait_for(worked.ok("add", "after it broke"))
    assert task["attempts"] <= 1


def test_something_else_in_the_place_of_a_worktree_stops_no_other_agent(worked):
    worked.worktree().parent.mkdir()
    worked.worktree().write_text("a file of the user's\n")
    task_id = worked.ok("add", "for the other one")
    worked.let_go()
    said = worked.up(2)
    worked.wait_for(task_id)
    assert A in said
    assert worked.worktree().read_text() == "a file of the user's\n"


def test_a_lock_that_a_killed_git_left_on_an_agents_branch_stops_nothing(worked, kill_everything):
    [task_id] = worked.start_work()
    kill_everything()
    (worked.repo / f".git/refs/heads/farm/{A}/{task_id}.lock").touch()
    worked.let_go()
    worked.up()
    worked.wait_for(task_id)
    assert worked.rescued() == {f"unsaved in {task_id}"}


def test_a_lock_that_a_killed_git_left_on_the_pin_stops_no_submission(worked):
    [task_id] = worked.start_work()
    pins = worked.repo / ".git/refs/farm/ready"
    pins.mkdir(parents=True)
    (pins / f"{task_id}.lock").touch()
    worked.let_go()
    worked.wait_for(task_id)


def test_a_lock_that_a_killed_git_left_on_a_pin_stops_no_merger(worked):
    worked.ok("add", "one")
    worked.submit(A, {"one.txt": "text\n"})
    (worked.repo / ".git/refs/farm/ready/t-0001.lock").touch()
    worked.ok("merge", "--gate", "true")
    assert worked.task("t-0001")["state"] == "landed"


def test_worktrees_in_the_middle_of_a_merge_rebase_or_cherry_pick_are_kept_and_used_again(worked, kill_everything):
    ids = worked.start_work(3)
    kill_everything()
    git(worked.repo, "switch", "-q", "-c", "other", "main")
    commit_files(worked.repo, {f"{task_id}.txt": "another's line\n" for task_id in ids})
    git(worked.repo, "switch", "-q", "main")
    for verb, agent, task_id in zip(("merge", "rebase", "cherry-pick"), (A, B, C), ids, strict=True):
        assert run(["git", "-C", worked.worktree(agent), verb, "other"]).returncode != 0
        write_files(worked.worktree(agent), {f"{task_id}.txt": f"{verb} half resolved\n"})
    worked.let_go()
    worked.up(3)
    for verb, task_id in zip(("merge", "rebase", "cherry-pick"), ids, strict=True):
        worked.wait_for(task_id)
        assert f"{verb} half resolved" in worked.rescued(f"{task_id}.txt")
        assert git(worked.repo, "show", f"main:{task_id}.txt") == "a line\na line"


def test_a_task_whose_branch_someone_deleted_begins_anew(worked):
    [task_id] = worked.start_work()
    worked.ok("down", "--now", timeout=120)
    git(worked.worktree(), "switch", "-q", "--detach")
    git(worked.repo, "update-ref", "-d", f"refs/heads/farm/{A}/{task_id}")
    worked.let_go()
    worked.up()
    worked.wait_for(task_id)


@pytest.mark.parametrize("kind", ["task", "work"])
def test_a_branch_that_someone_moved_stops_nothing_and_its_old_commits_are_kept(worked, kill_everything, kind):
    [task_id] = worked.start_work()
    kill_everything()
    before = git(worked.repo, "rev-parse", f"farm/{A}/{task_id}")
    moved = commit_files(worked.repo, {"by-a-person.txt": "text\n"})
    git(worked.repo, "update-ref", f"refs/heads/farm/{A}/{task_id if kind == 'task' else 'work'}", moved)
    worked.let_go()
    worked.up()
    worked.wait_for(task_id)
    if kind == "work":
        assert git(worked.repo, "for-each-ref", "--contains", before) != ""
    assert "by-a-person.txt" in git(worked.repo, "ls-tree", "--name-only", "main").splitlines()


# ---------------------------------------------------------------------------------------------- a disk that fills


def test_below_the_limit_of_free_disk_no_task_is_handed_out_and_the_farm_says_so(worked):
    (worked.repo / "farm.env").write_text("FARM_MIN_FREE_MIB=999999999\n")
    task_id = worked.ok("add", "one")
    worked.let_go()
    worked.up()
    log = worked.folder / "logs/control.log"
    wait_until(lambda: log.exists() and "no new work starts" in log.read_text(), 30, "a word about it")
    assert worked.task(task_id)["state"] in ("pending", "waiting")


def test_below_the_limit_of_free_disk_no_gate_runs_and_merge_says_so(worked):
    worked.ok("add", "one")
    worked.submit(A, {"one.txt": "text\n"})
    said = worked.refused(5, "merge", "--gate", "true", env={"FARM_MIN_FREE_MIB": "999999999"})
    assert "no gate starts" in said and "FARM_MIN_FREE_MIB" in said
    assert worked.task("t-0001")["state"] == "ready"
    worked.ok("merge", "--gate", "true")


def test_a_loop_whose_trouble_cannot_even_be_written_down_goes_on_when_it_is_over(farm, farm_cleanup):
    """As on a full disk, where the log of the loop is what fails next."""
    (farm.folder / "logs/loop.log").mkdir(parents=True)
    farm.ok("add", "one")
    loop = farm.start("run", "-n", "1", "--agent", "echo x >\"$FARM_TASK\"", "--gate", "true")
    wait_until(lambda: landed(farm), 60, "the first task")
    queue = farm.folder / "task_queue/pending.json"
    text = queue.read_text()
    queue.write_text("{")
    wait_until(lambda: "the loop: " in loop.stderr.readline(), 60, "the loop to meet it")
    queue.write_text(text)
    farm.ok("add", "two")
    wait_until(lambda: len(landed(farm)) == 2, 60, "the second task")
    loop.send_signal(signal.SIGINT)
    assert loop.wait(60) == 130
