"""To steer: send, pause, resume, estop."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest
from farm_calls import A, B, C
from sandbox import find_processes, git, wait_until
from screens import up, wait_for_state

pytestmark = pytest.mark.usefixtures("farm_cleanup")  # farms are left running at the end of a test


def test_send_to_all_reaches_everybody_at_work(three):
    assert three.ok("send", "--all", "be", "quick").splitlines() == [f"{name}\ttaken" for name in (A, B, C)]
    wait_until(lambda: three.ok("logs", "--all").count("got be quick") == 3, message="three answers")


def test_send_to_all_where_nobody_works_exits_3(farm):
    farm.refused(3, "send", "--all", "text")
    farm.refused(2, "send", "--all")


def test_a_paused_farm_hands_out_nothing_and_lets_agents_finish(farm):
    up(farm, 1, "until [ -e $FARM_REPO/go ]; do sleep 0.05; done; echo x > $FARM_TASK")
    farm.ok("add", "one"), farm.ok("add", "two")
    wait_for_state(farm, A, "working")
    farm.ok("pause", "--why", "lunch")
    assert json.loads(farm("status", "--json").stdout)["mode"] == "paused"
    assert "lunch" in farm("status").stdout and "next: ./farm.py resume" in farm("status").stdout
    (farm.repo / "go").touch()
    wait_until(lambda: farm.task("t-0001")["state"] == "landed", 60, "the landing of what was held")
    assert "resume" in farm.refused(3, "claim", "agent-009", "--owner-pid", str(os.getpid()))
    assert farm.task("t-0002")["state"] == "pending"
    farm.ok("resume")
    wait_until(lambda: farm.task("t-0002")["state"] == "landed", 60, "the landing of what had to wait")
    farm.ok("down", "--now", timeout=120)


def test_a_pause_outlives_a_killed_loop(farm):
    up(farm, 1, "true")
    wait_until(lambda: json.loads(farm("status", "--json").stdout)["loop"]["alive"], message="the loop")
    farm.ok("pause")
    loop = json.loads(farm("status", "--json").stdout)["loop"]["pid"]
    os.kill(loop, signal.SIGKILL)
    status = wait_until(lambda: (found := json.loads(farm("status", "--json").stdout))["loop"]["pid"] not in (None, loop) and found,
                        40, "a new loop")
    assert status["mode"] == "paused"
    farm.ok("down", "--now", timeout=120)


@pytest.mark.parametrize("verb", ["pause", "resume", "estop"])
def test_steering_a_farm_that_was_never_started_says_so(farm, verb):
    assert "./farm.py up" in farm.refused(3, verb)


def test_a_farm_that_is_down_cannot_be_paused(farm):
    up(farm, 1, "true")
    farm.ok("down", "--now", timeout=120)
    farm.refused(4, "pause")
    farm.refused(4, "resume")


STUBBORN = """trap '' TERM HUP INT; echo precious > new.txt; echo changed >> README.md
(trap '' TERM HUP INT; while :; do date > ticking; sleep 0.1; done) & while :; do sleep 1; done"""


def test_estop_stops_what_ignores_every_signal_and_loses_nothing(farm, sandbox):
    for number in range(3):
        farm.ok("add", f"task {number}")
    up(farm, 3, STUBBORN)
    worktrees = farm.repo.parent / "repo-farm"
    wait_until(lambda: len(list(worktrees.glob("*/ticking"))) == 3, 40, "three stubborn agents")
    farm.ok("estop", timeout=120)
    assert [p.cmdline() for p in find_processes(sandbox.token)] == []
    status = json.loads(farm("status", "--json").stdout)
    assert (status["mode"], status["tasks"], status["agents"]) == ("down", {"pending": 3}, [])
    assert [task["attempts"] for task in farm.json("tasks")] == [0, 0, 0]
    refs = git(farm.repo, "for-each-ref", "--format=%(refname)", "refs/farm/rescue").splitlines()
    assert [git(farm.repo, "show", f"{ref}:new.txt") for ref in refs] == ["precious"] * 3
    up(farm, 3, "true")
    wait_until(lambda: json.loads(farm("status", "--json").stdout)["loop"]["alive"], message="the farm again")
    farm.ok("down", "--now", timeout=120)


def test_estop_ends_a_stubborn_gate_and_its_work_stays_submitted(farm, sandbox):
    farm.ok("add", "a task")
    before = git(farm.repo, "rev-parse", "main")
    gate = f"touch {sandbox.root}/gate; trap '' TERM HUP INT; while :; do sleep 1; done"
    farm.ok("up", "-n", "1", "--agent", "echo x > x", "--gate", gate, timeout=120)
    wait_until((sandbox.root / "gate").exists, 60, "the gate")
    farm.ok("estop", timeout=120)
    assert [p.cmdline() for p in find_processes(sandbox.token)] == []
    assert (farm.task("t-0001")["state"], git(farm.repo, "rev-parse", "main")) == ("ready", before)


def test_estop_leaves_a_shell_alone_that_only_names_the_repo(farm):
    up(farm, 1, "sleep 1000")
    with subprocess.Popen(["sleep", "1000"], env={**os.environ, "FARM_REPO": str(farm.repo)}) as mine:
        farm.ok("estop", timeout=120)
        assert mine.poll() is None
        mine.kill()
