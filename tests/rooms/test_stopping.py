"""Stopping: what ends, and what is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import psutil
from farm_calls import ROOT, A, B, C
from sandbox import find_processes, run, wait_until
from worked import break_worktree


def test_down_lets_an_agent_finish_within_the_grace_time(worked):
    [task_id] = worked.start_work()
    down = worked.start("down", env={"FARM_GRACE_SECONDS": "60"})
    wait_until(lambda: json.loads((worked.folder / "farm.json").read_text())["mode"] == "stopping", message="the stop")
    worked.let_go()
    assert down.wait(60) == 0
    assert worked.task(task_id)["state"] == "ready"
    worked.ok("merge", "--gate", "true")
    assert worked.task(task_id)["state"] == "landed"


def test_down_ends_an_agent_that_does_not_finish_keeps_its_work_and_counts_no_attempt(worked, sandbox):
    [task_id] = worked.start_work()
    worked.ok("down", timeout=120, env={"FARM_GRACE_SECONDS": "0.2"})
    task = worked.task(task_id)
    assert (task["state"], task["attempts"]) == ("pending", 0)
    assert worked.rescued() == {f"unsaved in {task_id}"}
    assert (list(worked.lock_file().parent.glob("*.lock")), find_processes(sandbox.token)) == ([], [])


def test_after_down_the_next_up_goes_on_from_the_agents_commits(worked):
    [task_id] = worked.start_work()
    worked.ok("down", "--now", timeout=120)
    worked.let_go()
    worked.up()
    worked.wait_for(task_id)
    assert worked.lines_on_main(task_id) == 2


def test_down_frees_every_claim_although_worktrees_are_broken(worked):
    ids = worked.start_work(4)
    for what, agent in zip(("broken .git file", "empty HEAD", "broken index"), (A, B, C), strict=True):
        break_worktree(worked, what, agent)
    worked("down", "--now", timeout=120)
    assert [worked.task(task_id)["state"] for task_id in ids] == ["pending"] * 4


def test_down_ends_the_gate_of_a_merger_that_was_killed(worked, sandbox):
    note = sandbox.root / "gate.pid"
    worked.ok("add", "for the gate")
    worked.let_go()
    worked.up(gate=f"echo $$ >{note}; exec sleep 60")
    gate = psutil.Process(int(wait_until(lambda: note.exists() and note.read_text().strip(), 60, "the gate")))
    try:
        for name in ("loop.lock", "merger.lock"):
            os.kill(int((worked.folder / name).read_text().split()[0]), signal.SIGKILL)
        worked.ok("down", "--now", timeout=120)
        assert not gate.is_running() or gate.status() == "zombie"
    finally:
        gate.kill() if gate.is_running() else None


def test_down_and_clean_leave_a_bystander_in_a_worktree_alone(worked):
    worked.start_work()
    with subprocess.Popen(["sleep", "600"], cwd=worked.worktree(), env={"PATH": os.environ["PATH"]}) as bystander:
        worked.ok("down", "--now", timeout=120)
        kept = worked("clean", timeout=120)
        assert bystander.poll() is None
        bystander.kill()
    assert kept.returncode == 4
    assert kept.stdout.split("\t")[:2] == [A, "kept"] and "inside" in kept.stdout
    assert worked.worktree().is_dir()


AT_EVERY_STEP = """\
import signal, sys
sys.path.insert(0, sys.argv[1])
import farm

request = farm.StopRequest()


def interrupt(frame, event, arg):
    signal.raise_signal(signal.SIGTERM)
    return interrupt


sys.settrace(interrupt)
request.wait(0.01)
sys.settrace(None)
print(request.is_set(), request.signal, request.count > 1)
request.clear()
request.wait(0.01)
print(request.is_set())
"""


def test_a_signal_in_any_step_of_a_wait_is_taken(sandbox):
    done = run([sys.executable, "-c", AT_EVERY_STEP, str(ROOT)], timeout=30, check=True)
    assert done.stdout.splitlines() == [f"True {int(signal.SIGTERM)} True", "False"]
