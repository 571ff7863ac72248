"""Titles, prompts and commands of any length; what a task waits for; lists in any order; follow-ups without bound."""

from __future__ import annotations

import json
import os

import pytest
from farm_calls import Caller

LONG = "long words " * 27_000


@pytest.fixture
def farm(make_repo) -> Caller:
    return Caller(make_repo("app"), os.getpid())


def test_a_title_of_any_length_is_shortened_and_all_of_it_is_in_the_prompt(farm):
    farm.ok("add", "-f", "-", input=LONG + "\n")
    task = json.loads((farm.folder / "task_queue/pending.json").read_text())["tasks"][0]
    assert len(task["title"]) <= 200 and task["prompt"] == LONG.strip()
    farm.ok("run", "-n", "1", "--agent", "cp \"$FARM_PROMPT_FILE\" prompt", "--gate", "true", "--until-drained",
            timeout=60)
    assert LONG.strip() in (farm.repo / "prompt").read_text()
    assert farm.ok("add", "-f", "-", input=LONG + "\n") == "t-0001", "the same list adds nothing twice"


def test_a_reason_and_a_note_of_any_length_are_taken(farm):
    farm.ok("add", "one")
    claim = farm.claim("agent-001")
    farm.ok("fail", "agent-001", "--fence", claim["fence"], "--why", LONG[:100_000])
    assert len(farm.task("t-0001")["reason"]) <= 500


@pytest.mark.parametrize("setting", ["FARM_AGENT", "FARM_GATE"])
def test_a_command_that_cannot_be_passed_on_is_refused_with_the_way_out(farm, setting):
    (farm.repo / "farm.env").write_text(f"{setting}=true {LONG}\n")
    assert "put it into a script" in farm.refused(2, "up", "-n", "1")


def test_waiting_says_for_what(farm):
    farm.ok("add", "one")
    farm.ok("add", "two", "--after", "t-0001")
    assert "after t-0001, which is pending" in farm.ok("tasks")
    farm.ok("cancel", "t-0001")
    shown = farm.ok("tasks")
    assert "after t-0001, which is canceled: ./farm.py retry t-0001, or ./farm.py cancel t-0002" in shown
    assert farm.task("t-0002")["waits"].startswith("after t-0001")


def test_a_list_may_name_what_comes_later_in_it(farm):
    lines = [{"id": "a", "title": "A", "after": ["b"]}, {"id": "b", "title": "B", "after": ["c"]},
             {"id": "c", "title": "C"}]
    assert farm.ok("add", "-f", "-", input="".join(json.dumps(line) + "\n" for line in lines)) == "a\nb\nc"


@pytest.mark.parametrize(("after", "circle"), [
    ({"a": ["b"], "b": ["c"], "c": ["a"]}, "a after b after c after a"), ({"a": ["a"]}, "a after a"),
    ({"a": [], "b": ["c", "a"], "c": ["b"]}, "b after c after b"),
], ids=["three", "itself", "two of three"])
def test_a_circle_is_refused_and_spelled_out(farm, after, circle):
    lines = [{"id": name, "title": name, "after": names} for name, names in after.items()]
    assert circle in farm.refused(2, "add", "-f", "-", input="".join(json.dumps(line) + "\n" for line in lines))
    assert farm.json("tasks") == []


@pytest.mark.parametrize("sandboxed", ["", "1"], ids=["direct", "by mailbox"])
def test_an_agent_that_adds_tasks_in_every_task_comes_to_an_end(farm, sandboxed):
    agent = "for i in 1 2 3; do farm add \"child $i of $FARM_TASK\" || echo \"code $?\"; done; echo x >$FARM_TASK"
    farm.ok("add", "root")
    farm.ok("run", "-n", "2", "--agent", agent, "--gate", "true", "--until-drained", timeout=90,
            env={"FARM_FOLLOW_UPS": "2", "FARM_FOLLOW_UP_DEPTH": "2", "FARM_SANDBOXED": sandboxed})
    tasks = farm.json("tasks")
    assert len(tasks) == 1 + 2 + 4 and {task["state"] for task in tasks} == {"landed"}
    logs = "".join(path.read_text() for path in (farm.folder / "logs").glob("agent-*.log"))
    assert "code 4" in logs and "FARM_FOLLOW_UPS" in logs and "FARM_FOLLOW_UP_DEPTH" in logs
    assert [task["parent"] for task in tasks[1:3]] == ["t-0001"] * 2
