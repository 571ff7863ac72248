"""Which CLI takes which task: add --agent, labels in lists, FARM_FALLBACK, and what nobody can take."""

from __future__ import annotations

import json

import pytest
from farm_calls import A, B, C
from screens import up

CODEX, CLAUDE = {"FARM_PRESET": "codex"}, {"FARM_PRESET": "claude-print"}
LIMIT = {"cause": "usage limit", "until": "2999-01-01T00:00:00Z", "said": "limit", "count": 1}


def takes(farm, agent: str, env: dict) -> str:
    """The task that this agent claims; empty for none."""
    done = farm("claim", agent, "--owner-pid", str(farm.owner), env=env)
    return json.loads(done.stdout)["task"]["id"] if done.returncode == 0 else ""


def test_only_agents_of_its_preset_take_a_task(farm):
    farm.ok("add", "for codex", "--agent", "codex", "--priority", "9")
    farm.ok("add", "for any command", "--agent", "command", "--priority", "8")
    farm.ok("add", "for anybody")
    assert [takes(farm, A, CLAUDE), takes(farm, B, CODEX)] == ["t-0003", "t-0001"]
    assert [takes(farm, C, CODEX), takes(farm, C, {"FARM_AGENT": "x"})] == ["", "t-0002"]
    farm.ok("add", "for codex", "--agent", "codex")
    assert takes(farm, "agent-004", {}) == "t-0004", "a person claims by hand what there is"
    assert "there is no preset 'codeks'" in farm.refused(2, "add", "x", "--agent", "codeks")
    farm.ok("add", "more")
    assert "there is no preset" in farm.refused(2, "edit", "t-0005", "--agent", "gtp")


@pytest.mark.parametrize("text", [
    "- [ ] one\n  agent: codex\n  path: src/**\n  path: a b\n  priority: 5\n\n  do it\n- [ ] two\n  after: #1\n",
    json.dumps([{"title": "one", "agent": "codex", "paths": ["src/**", "a b"], "priority": 5, "prompt": "do it"},
                {"id": "t-0002", "title": "two", "after": ["t-0001"]}]),
    json.dumps([{"title": "one", "labels": [{"name": "bug"}, {"name": "agent: codex"}], "paths": ["src/**", "a b"], "priority": 5,
                 "body": "do it", "number": 7}, {"title": "two", "after": ["t-0001"]}]),
], ids=["checklist", "json", "issues"])
def test_a_list_says_it_too(farm, text):
    farm.ok("add", "-f", "-", input=text)
    one, two = farm.json("tasks")
    assert (one["preset"], one["paths"], one["priority"], two["after"]) == ("codex", ["src/**", "a b"], 5, ["t-0001"])
    assert json.loads(farm.ok("show", "t-0001", "--json"))["prompt"] == "do it"


@pytest.mark.parametrize("text", ["- [ ] one\n  agent: gtp\n", "- [ ] one\n  after: #2\n", "- [ ] one\n  priority: high\n"])
def test_a_label_that_means_nothing_adds_nothing(farm, text):
    farm.refused(2, "add", "-f", "-", input=text)
    assert farm.json("tasks") == []


def test_another_takes_it_while_the_first_is_at_its_limit(farm):
    farm.ok("add", "one", "--agent", "claude-print")
    env = {**CODEX, "FARM_FALLBACK": "gemini>codex, claude-print>codex"}
    assert takes(farm, A, env) == ""
    (farm.folder / "limits.json").write_text(json.dumps({"schema": 1, "presets": {"claude-print": LIMIT}}))
    assert [takes(farm, A, CODEX), takes(farm, A, {**env, "FARM_PRESET": "gemini"}), takes(farm, A, env)] == ["", "", "t-0001"]


def test_a_task_that_nobody_in_the_farm_can_take_is_said_and_ends_a_run(farm, farm_cleanup):
    farm.ok("add", "one", "--agent", "codex"), farm.ok("add", "two")
    done = farm("run", "-n", "1", "--agent", "date >$FARM_TASK", "--gate", "true", "--until-drained", timeout=90,
                env={"FARM_GRACE_SECONDS": "1"})
    assert done.returncode == 5 and "t-0001 is for codex, and no agent of the farm is" in done.stderr
    assert farm.task("t-0002")["state"] == "landed"
    up(farm, 1, "date >$FARM_TASK")
    assert "next: ./farm.py edit t-0001 --agent '' # t-0001 is for codex" in farm("status").stdout
    farm.ok("edit", "t-0001", "--agent", "")
    assert "is for codex" not in farm("status").stdout
    farm.ok("down", "--now", timeout=120)
