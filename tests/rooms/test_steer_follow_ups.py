"""Agents hand on what they find, and one makes a plan."""

from __future__ import annotations

import json
import os

import pytest
from farm_calls import A, bytes_below, drain, landed
from sandbox import git

PLAN = """- [ ] Draw the plot
  path: plots/**
  agent: command
  after: #2

  With axes.
- [ ] Read the data\x1b[2J
"""


def at_work(farm) -> dict[str, str]:
    """The environment of an agent at work."""
    claim = farm.claim(A)
    return {"FARM_TASK": claim["task"]["id"], "FARM_FENCE": claim["fence"]}


def test_a_follow_up_waits_for_its_parent_unless_it_says_otherwise(farm):
    farm.ok("add", "parent")
    env = at_work(farm)
    for args in ((), ("--no-after",), ("--after", "t-0002")):
        farm.ok("add", "child", *args, env=env)
    farm.ok("add", "-f", "-", input="- [ ] one\n- [ ] two\n  after: #1\n", env=env)
    assert [task.get("after", []) for task in farm.json("tasks")[1:]] == [["t-0001"], [], ["t-0002"], ["t-0001"], ["t-0005"]]
    assert {task["parent"] for task in farm.json("tasks")[1:]} == {"t-0001"}
    assert json.loads(farm.ok("show", "t-0001", "--json"))["follow_ups"] == [f"t-000{number}" for number in range(2, 7)]
    said = farm.refused(4, "add", "one too many", env=env)
    assert "one attempt may add 5 tasks, and t-0001 has added 5" in said
    assert "after" not in farm.ok("add", "by a person") and farm.task("t-0007").get("after") is None


@pytest.mark.parametrize(("limit", "is_said"), [("5", True), ("0", False)])
def test_the_prompt_says_that_it_exists(farm, limit, is_said):
    farm.ok("add", "parent")
    env = {"FARM_FOLLOW_UPS": limit}
    claim = farm.claim(A, env=env)
    prompt = (farm.folder / "prompts/t-0001.1.md").read_text()
    assert ('farm add "what to do" --prompt' in prompt and "up to 5 times" in prompt) == is_said
    if not is_said:
        farm.refused(4, "add", "x", env={**env, "FARM_TASK": "t-0001", "FARM_FENCE": claim["fence"]})


def plan(farm, *args: str, agent: str, **options):
    return farm("plan", "Plot it", *args, "--agent", agent, **options)


def test_a_plan_is_shown_and_added_only_when_it_is_wanted(farm, sandbox):
    (sandbox.root / "PLAN").write_text(PLAN)
    agent = f"cp {sandbox.root}/PLAN PLAN.md; echo mess >README.md; cat \"$FARM_PROMPT_FILE\" >{sandbox.root}/asked"
    before = git(farm.repo, "rev-parse", "main"), git(farm.repo, "for-each-ref"), git(farm.repo, "status", "--porcelain")
    done = plan(farm, agent=agent)
    assert done.returncode == 0 and done.stdout.startswith("- [ ] Draw the plot\n") and "\x1b" not in done.stdout
    assert farm.json("tasks") == [] and f"./farm.py add -f '{farm.folder}/plan.md'" in done.stderr
    assert "Plot it" in (sandbox.root / "asked").read_text()
    assert (git(farm.repo, "rev-parse", "main"), git(farm.repo, "for-each-ref"), git(farm.repo, "status", "--porcelain")) == before
    assert git(farm.repo, "worktree", "list").count("\n") == 0
    assert [path.name for path in (farm.repo.parent / "repo-farm").iterdir() if path.name.startswith("plan-")] == []
    done = plan(farm, "--yes", agent=agent)
    assert done.stdout.split()[-2:] == ["t-0001", "t-0002"]
    one, two = farm.json("tasks")
    assert (one["title"], one["paths"], one["preset"], one["after"]) == ("Draw the plot", ["plots/**"], "command", ["t-0002"])
    assert two["title"] == "Read the data"
    drain(farm, "--gate", "true", agent="date >made-$FARM_TASK")
    assert landed(farm) == ["t-0001", "t-0002"]


@pytest.mark.parametrize(("agent", "said"), [
    ("true", "wrote no PLAN.md, and ended with exit code 0"), ("printf -- '- [] nearly\\n' >PLAN.md", "is nearly a task"),
    ("printf -- '- [ ] x\\n  agent: gtp\\n' >PLAN.md", "there is no preset 'gtp'"), ("sleep 60", "took longer than 2 s"),
])
def test_a_plan_that_is_none_adds_nothing_and_leaves_nothing(farm, agent, said):
    done = plan(farm, "--yes", agent=agent, env={"FARM_TASK_SECONDS": "2"})
    assert done.returncode in (1, 2) and said in done.stderr and farm.json("tasks") == []
    assert git(farm.repo, "worktree", "list").count("\n") == 0
    farm.refused(2, "plan")


def test_the_plans_agent_may_be_a_known_cli(farm, sandbox, monkeypatch):
    tools = sandbox.root / "tools"
    tools.mkdir()
    result = json.dumps({"type": "result", "total_cost_usd": 0.5, "usage": {"input_tokens": 7}})
    script = f"printf -- '- [ ] one\\n' >PLAN.md; echo \"$@\" >{sandbox.root}/args; echo '{result}'"
    (tools / "claude").write_text(f"#!/bin/sh\n{script}\n")
    (tools / "claude").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    done = plan(farm, "--yes", agent="claude")
    assert done.stdout == "- [ ] one\n\nt-0001\n", done.stderr
    assert "-p --output-format stream-json" in (sandbox.root / "args").read_text()
    usage = (farm.folder / "usage.jsonl").read_text()
    assert json.loads(usage)["cost_usd"] == 0.5 and bytes_below(farm.folder / "agent_locks") == {}


@pytest.mark.skipif("FARM_TESTS_WITHOUT_SANDBOX" in os.environ, reason="admitted: bwrap cannot work here")
@pytest.mark.parametrize(("isolate", "title"), [("none", "KEY"), ("bwrap", "hidden")])
def test_the_plans_agent_is_in_the_sandbox_that_is_asked_for(farm, sandbox, isolate, title):
    (sandbox.home / ".ssh").mkdir()
    (sandbox.home / ".ssh/key").write_text("KEY")
    agent = 'printf -- "- [ ] %s\\n" "$(cat ~/.ssh/key 2>/dev/null || echo hidden)" >PLAN.md'
    done = plan(farm, agent=agent, env={"FARM_ISOLATE": isolate})
    assert (done.stdout.splitlines()[:1], done.returncode) == ([f"- [ ] {title}"], 0), done.stderr
    assert [path.name for path in (farm.folder / "mailbox").iterdir()] == ["plan"]
