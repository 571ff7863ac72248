"""git clean, git stash, rm -r: what the farm knows is left alone, or its loss is said and mended."""

from __future__ import annotations

import os
import shutil
import time

import psutil
import pytest
from farm_calls import Caller
from sandbox import git, run, wait_until

SLEEPER = "sleep 1000"


@pytest.fixture
def farm(make_repo) -> Caller:
    farm = Caller(make_repo("app"), os.getpid())
    for number in range(3):
        farm.ok("add", f"task {number}", "--prompt", f"prompt {number}")
    return farm


@pytest.mark.parametrize(
    "words",
    [["clean", "-fdxq"], ["clean", "-fdq"], ["clean", "-fdXq"], ["stash", "-a"], ["stash", "-u"], ["add", "-A"]],
    ids=" ".join)
def test_git_leaves_the_folder_alone(farm, words):
    git(farm.repo, *words)
    assert [task["title"] for task in farm.json("tasks")] == ["task 0", "task 1", "task 2"]
    assert git(farm.repo, "status", "--porcelain") == ""


def test_the_queue_outlives_git_clean_also_where_a_file_of_the_folder_is_tracked(make_repo):
    farm = Caller(make_repo("toolkit", files={"coordination/README.md": "what is here\n"}), os.getpid())
    farm.ok("add", "one")
    git(farm.repo, "clean", "-fdxq")
    assert [task["title"] for task in farm.json("tasks")] == ["one"]
    (farm.folder / "README.md").write_text("edited\n")
    git(farm.repo, "add", "-A")
    assert git(farm.repo, "status", "--porcelain") == "M  coordination/README.md"
    assert len(Caller(farm.folder / "logs", os.getpid()).json("tasks")) == 1


def test_the_folder_is_no_repo_of_anybodys(farm):
    here = Caller(farm.folder, os.getpid())
    assert len(here.json("tasks")) == 3


def test_where_it_is_gone_every_verb_says_so_and_doctor_brings_it_back(farm):
    farm.claim("agent-001")
    before = [(task["id"], task["state"], task["rev"]) for task in farm.json("tasks")]
    shutil.rmtree(farm.folder)
    for verb in (["tasks"], ["add", "x"], ["claim", "agent-002", "--owner-pid", str(os.getpid())]):
        assert "doctor --fix" in farm.refused(7, *verb)
    assert not (farm.folder / "task_queue").exists(), "a new queue hides the loss"
    assert farm("status").returncode == 7 and "is gone" in farm("status").stdout and "is gone" in farm("doctor").stdout
    farm("doctor", "--fix")
    assert [(task["id"], task["state"], task["rev"]) for task in farm.json("tasks")] == before
    assert "prompt 2" in (farm.folder / "task_queue/pending.json").read_text()


@pytest.mark.parametrize("verb", [["down", "--now"], ["estop"]], ids=" ".join)
@pytest.mark.parametrize("has_copy", [True, False])
def test_the_sessions_of_a_farm_whose_folder_is_gone_are_ended(farm, verb, has_copy):
    farm.ok("up", "-n", "2", "--agent", f"echo unsaved >note; {SLEEPER}")
    wait_until(lambda: len([t for t in farm.json("tasks") if t["state"] == "claimed"]) == 2, 30, "two at work")
    wait_until((farm.repo.parent / "app-farm/agent-002-worktree/note").exists, 30, "their notes")
    wait_until(lambda: not shutil.rmtree(farm.folder, ignore_errors=True) and not farm.folder.exists(), 10,
               "its removal")
    if not has_copy:
        shutil.rmtree(farm.repo / ".git/farm")
    writers = [
        process for process in psutil.process_iter(["cmdline"])
        if f"f='{farm.folder}/logs" in " ".join(process.info["cmdline"] or [])
    ]
    used = [sum(process.cpu_times()[:4]) for process in writers]
    time.sleep(1.5)
    spent = [sum(process.cpu_times()[:4]) - before for process, before in zip(writers, used, strict=True)]
    assert len(writers) >= 2 and max(spent) < 0.2, "a log writer spins"
    said = farm.ok(*verb, timeout=60) + farm("doctor").stdout
    assert "refs/farm/rescue" in git(farm.repo, "for-each-ref", "--format=%(refname)", "refs/farm")
    assert "gone" in said or "not there" in said
    wait_until(
        lambda: not [p for p in psutil.process_iter(["cmdline"]) if SLEEPER.split() == (p.info["cmdline"] or [])], 10,
        "the end")


def test_a_mutex_that_was_removed_lets_nobody_in_twice(farm):
    import farm as toolkit

    held = toolkit.take_mutex(str(farm.folder / ".lock"))
    waiting = farm.start("add", "late")
    time.sleep(0.5)
    (farm.folder / ".lock").unlink()
    again = toolkit.take_mutex(str(farm.folder / ".lock"))
    os.close(held)
    time.sleep(0.5)
    assert waiting.poll() is None, "it took the mutex that somebody had removed"
    os.close(again)
    assert waiting.wait(20) == 0
    waiting.communicate()


def test_history_that_is_rotated_away_is_followed(farm):
    (farm.folder / "events.jsonl").rename(farm.folder / "events.old")
    farm.ok("add", "after")
    assert (farm.repo / ".git/farm/events.jsonl").samefile(farm.folder / "events.jsonl")
    assert run(["git", "-C", farm.repo, "status", "--porcelain"]).stdout == ""
