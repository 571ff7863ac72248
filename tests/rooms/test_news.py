"""News of the farm, and who is told."""

from __future__ import annotations

import json
import os
import signal

import pytest
from farm_calls import A
from sandbox import find_processes, wait_until
from screens import up

import farm as toolkit

pytestmark = pytest.mark.usefixtures("farm_cleanup")  # farms are left running at the end of a test


TELL = 'cat >> "$FARM_REPO/../told"'


def told(farm) -> list[dict]:
    path = farm.repo.parent / "told"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_drained_farm_tells_so_once_and_leaves_its_report(farm):
    farm.ok("add", "one")
    farm("run", "-n", "1", "--agent", "echo x > x", "--gate", "true", "--until-drained", env={"FARM_NOTIFY": TELL}, timeout=120)
    assert [event["event"] for event in told(farm)] == ["drained"]
    assert {"at", "repo", "tasks", "message", "try"} <= set(told(farm)[0]) and told(farm)[0]["tasks"] == {"landed": 1}
    assert "1 of 1 task landed" in (farm.folder / "report.html").read_text()


def test_each_event_is_told_once_through_restarts_of_the_loop(farm):
    farm.ok("add", "one", "--max-attempts", "1")
    up(farm, 1, "exit 1", env={"FARM_NOTIFY": TELL})
    wait_until(lambda: {event["event"] for event in told(farm)} == {"failed", "drained"}, 60, "what happened")
    for _ in range(2):
        pid = wait_until(lambda: json.loads(farm("status", "--json").stdout)["loop"]["pid"], 40, "a loop")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: json.loads(farm("status", "--json").stdout)["loop"]["pid"] not in (None, pid), 40, "the next")
    farm.ok("add", "two", "--max-attempts", "1")
    wait_until(lambda: len(told(farm)) >= 4, 60, "what happened next")
    assert sorted((event["event"], event.get("task")) for event in told(farm)) == [
        ("drained", None), ("drained", None), ("failed", "t-0001"), ("failed", "t-0002")]
    farm.ok("down", "--now", timeout=120)


def test_a_red_target_is_told(farm):
    farm.ok("add", "one")
    farm.ok("up", "-n", "1", "--agent", "echo x > x", "--gate", "false", timeout=120, env={"FARM_NOTIFY": TELL})
    wait_until(lambda: [event["event"] for event in told(farm)] == ["blocked"], 60, "that the target is red")
    assert "main" in told(farm)[0]["message"]
    farm.ok("down", "--now", timeout=120)


def test_an_agent_that_waits_for_a_person_is_told(farm):
    farm.ok("add", "one")
    hook = """printf '{"hook_event_name":"PermissionRequest","tool_name":"Bash","tool_input":{"command":"rm x"}}' | farm hook"""
    up(farm, 1, f"{hook}; sleep 1000", env={"FARM_NOTIFY": TELL})
    event = wait_until(lambda: told(farm), 60, "that somebody waits")[0]
    assert (event["event"], event["agent"], event["task"], event["try"]) == ("waiting", A, "t-0001", "./farm.py attach 1")
    assert "rm x" in event["message"]
    assert "next: ./farm.py attach 1 # agent-001 waits for a person: Bash rm x" in farm("status").stdout
    farm.ok("down", "--now", timeout=120)


@pytest.mark.parametrize("command", ["exit 3", "cat >/dev/null; sleep 1000", "nonsense-command", "exec 0<&-"])
def test_a_command_that_fails_or_hangs_does_not_stop_the_loop(farm, command):
    farm.ok("add", "one")
    up(farm, 1, "echo x > x", env={"FARM_NOTIFY": command})
    wait_until(lambda: farm.task("t-0001")["state"] == "landed", 60, "the landing")
    farm.ok("add", "two")
    wait_until((farm.folder / "report.html").exists, 60, "the report")
    farm.ok("down", "--now", timeout=120)


def test_a_command_that_hangs_is_ended(farm, monkeypatch, sandbox):
    monkeypatch.setattr(toolkit, "NOTICE_SECONDS", 0.2)
    store = toolkit.Store(str(farm.repo))
    store.ensure_folders()
    toolkit.run_notice("sleep 1000 & sleep 1000", {"event": "drained"}, store)
    assert find_processes(sandbox.token) == []
    assert "drained: exit code -9" in (farm.folder / "logs" / "notify.log").read_text()
