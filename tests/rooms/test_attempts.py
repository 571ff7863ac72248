"""Attempts: turns, hooks, and conversations that go on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from attempt_calls import NOW, claim, hook, settings_of, turn
from paths import SCRIPTS
from sandbox import run

import farm as toolkit


def give_back(store, held: toolkit.Claim, **options) -> None:
    with store.transaction() as tx:
        toolkit.TaskQueue(tx).release(held.agent, held.fence, **options)


def test_an_interrupted_task_is_kept_for_the_agent_that_knows_its_context(store, clock):
    first = claim(store, "agent-001", "c-1")
    give_back(store, first)
    other = claim(store, "agent-002", "c-2")
    assert (first.task["id"], other.task["id"]) == ("t-0002", "t-0001")
    again = claim(store, "agent-001", "c-3")
    assert again.task["id"] == "t-0002" and again.task["conversation"] == {**again.task["conversation"], "id": "c-1"}


def test_after_two_minutes_any_agent_takes_it_in_a_conversation_of_its_own(store, clock):
    give_back(store, claim(store, "agent-001", "c-1"))
    clock.seconds += toolkit.RESUME_SECONDS + 1
    taken = claim(store, "agent-002", "c-2")
    assert (taken.task["id"], taken.task["conversation"]["id"]) == ("t-0002", "c-2")


def test_a_start_of_the_farm_keeps_interrupted_tasks_once_more(store, clock):
    give_back(store, claim(store, "agent-001", "c-1"))
    clock.seconds += 3600
    with store.transaction() as tx:
        toolkit.TaskQueue(tx).keep_for_agents(["agent-001"])
    assert claim(store, "agent-002", "c-2").task["id"] == "t-0001"


def test_an_attempt_that_came_to_an_end_leaves_no_conversation(store, clock):
    held = claim(store, "agent-001", "c-1")
    with store.transaction() as tx:
        assert toolkit.TaskQueue(tx).fail("agent-001", held.fence, "no idea").conversation == {}


def test_a_conversation_is_nothing_to_another_cli(store, clock):
    give_back(store, claim(store, "agent-001", "c-1"))
    taken = claim(store, "agent-001", preset="codex")
    assert taken.task["conversation"] == {"agent": "agent-001", "preset": "codex"}
    assert toolkit.CLIS["codex"].can_resume(taken) is False


def test_only_an_interrupted_conversation_goes_on(store, clock):
    fresh = claim(store, "agent-001", "c-1", "gemini")
    assert toolkit.CLIS["gemini"].can_resume(fresh) is False
    give_back(store, fresh)
    assert toolkit.CLIS["gemini"].can_resume(claim(store, "agent-001", "c-2", "gemini")) is True


def test_a_conversation_whose_id_the_cli_tells_at_its_end_is_kept(store, clock):
    give_back(store, claim(store, "agent-001"), conversation="thread-9")
    assert claim(store, "agent-001").task["conversation"]["id"] == "thread-9"


def test_the_first_stop_of_a_claimed_task_is_sent_back_and_the_second_ends_the_turn(store):
    fence = claim(store, "agent-001").fence
    hook(store, "UserPromptSubmit", fence=fence)
    answer = hook(store, "Stop", fence=fence)
    assert answer["decision"] == "block" and f"farm submit agent-001 --fence {fence}" in answer["reason"]
    assert turn(store)["state"] == "working"
    assert hook(store, "Stop", fence=fence) is None
    assert turn(store)["state"] == "over"


def test_a_stop_that_waits_for_the_background_is_not_the_end_until_it_takes_too_long(store, clock):
    fence = claim(store, "agent-001").fence
    hook(store, "Stop", fence=fence)
    assert hook(store, "Stop", fence=fence, background_tasks=[{"id": "b1"}]) is None
    for seconds, state in ((0, "working"), (toolkit.BACKGROUND_SECONDS - 1, "working"), (2, "over")):
        clock.seconds += seconds
        toolkit.end_waiting_turn(store, "agent-001", turn(store), clock.now())
        assert turn(store)["state"] == state
    assert hook(store, "Stop", fence=fence) is None
    assert turn(store)["state"] == "over"


def test_a_stop_after_submit_ends_the_turn_at_once(store):
    assert hook(store, "Stop") is None
    assert turn(store)["state"] == "over"


def test_a_question_is_a_wait_until_the_tool_has_run(store):
    hook(store, "PermissionRequest", tool_name="Bash", tool_input={"command": "make\x1b[31m deploy"})
    assert (turn(store)["state"], turn(store)["message"]) == ("waiting", "Bash make deploy")
    hook(store, "PostToolUse")
    assert turn(store)["state"] == "working"


def test_a_late_notification_about_a_permission_changes_nothing(store):
    hook(store, "PostToolUse")
    hook(store, "Notification", notification_type="permission_prompt", message="Claude needs your permission")
    assert turn(store)["state"] == "working"
    hook(store, "Notification", notification_type="elicitation_dialog", message="which one?")
    assert turn(store)["state"] == "waiting"


def test_what_another_claim_was_told_is_not_this_ones(store):
    hook(store, "UserPromptSubmit", fence="t-0001.9")
    assert turn(store) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\x00"])
def test_the_hook_verb_never_exits_with_the_code_that_blocks_an_agent(make_repo, text):
    repo = make_repo()
    settings = toolkit.ClaudeCode.hook_settings(settings_of())
    env = {"PATH": f"{SCRIPTS}:{os.environ['PATH']}", "FARM_REPO": str(repo), "FARM_AGENT_NAME": "agent-001", "FARM_FENCE": "t-1.1",
           "FARM_PYTHON": sys.executable}
    commands = [one["command"] for entries in settings["hooks"].values() for entry in entries for one in entry["hooks"]]
    assert {run(["sh", "-c", command], cwd=repo, env=env, input=text).returncode for command in commands} == {0}


def test_starts_take_their_turns(store, clock, monkeypatch):
    slept = []
    monkeypatch.setattr(toolkit.time, "sleep", slept.append)
    for _ in range(3):
        toolkit.wait_for_start(store, 1.5)
    assert slept == [0, 1.5, 3.0]
    clock.seconds -= 86400  # a clock that is set back holds nobody up for a day
    toolkit.wait_for_start(store, 1.5)
    assert slept[-1] == 0


def test_the_users_own_template_is_filled_in_and_its_other_braces_stay(store):
    held = claim(store, "agent-001")
    Path(store.repo, "prompt.md").write_text("{body} as {agent} {fence}: {not ours} {}")
    path = toolkit.write_prompt(store, held, settings_of(prompt_template="prompt.md"))
    assert Path(path).read_text() == f"two as agent-001 {held.fence}: {{not ours}} {{}}"
    with pytest.raises(toolkit.UsageError, match=r"nowhere\.md cannot be read"):
        toolkit.read_template(store.repo, settings_of(prompt_template="nowhere.md"))


def test_a_body_that_holds_the_names_of_fields_is_left_as_it_is(store):
    with store.transaction() as tx:
        toolkit.TaskQueue(tx).add([toolkit.Task(title="{fence} {body}", priority=9)], 3)
    text = Path(toolkit.write_prompt(store, claim(store, "agent-001"), settings_of())).read_text()
    assert text.startswith("{fence} {body}\n")


@pytest.fixture
def watched(store, clock, monkeypatch):
    """A farm of one agent at work, whose tree has used `cpu` seconds, and its last output was at NOW."""
    farm = toolkit.Farm(store, settings_of(n=1), [toolkit.Launch("", "true", "")], "main")
    Path(store.path("logs", "agent-001.log")).touch()
    os.utime(store.path("logs", "agent-001.log"), (NOW, NOW))
    farm.held, farm.cpu = claim(store, "agent-001"), 5.0
    farm.agents = {"agent-001": {"ends": []}}
    farm.sessions.found = {"agent-001": toolkit.Session(os.getpid(), False, None, "")}
    monkeypatch.setattr(toolkit, "cpu_time_of", lambda tree: farm.cpu)
    return farm


def test_what_a_resumed_conversation_had_cost_before_is_counted_once(watched):
    store, held = watched.store, watched.held
    os.makedirs(store.path("mailbox", "agent-001"), exist_ok=True)
    Path(store.path("mailbox", "agent-001", "cost.json")).write_text('{"session_id": "c-1", "cost": {"total_cost_usd": 1.25}}')
    line = {"task": "t-0002", "conversation": "c-1", "tokens_in": 1, "tokens_out": 1, "cost_usd": 1.0}
    assert toolkit.live_cost(store, held, [line]) == 0
    held = held._replace(task={**held.task, "conversation": {"agent": "agent-001", "id": "c-1"}})
    assert [toolkit.live_cost(store, held, lines) for lines in ([line], [])] == [0.25, 1.25]
    assert toolkit.cost_of_claim(store, held, [line]) == 1.25


def look(farm, clock, seconds: float) -> bool:
    """Whether the agent is held to be stuck, after so many seconds more."""
    clock.seconds += seconds
    farm.supervisor.note_stillness(farm.held, farm.agents["agent-001"], farm.sessions.found.get("agent-001"), clock.now())
    return "still_since" in farm.agents["agent-001"]


def test_an_agent_is_stuck_when_it_is_silent_and_its_whole_tree_stands_still(watched, clock):
    assert [look(watched, clock, seconds) for seconds in (890, 20, 30, 31)] == [False, False, False, True]
    assert watched.agents["agent-001"]["still_since"] == toolkit.utc(NOW)
    watched.cpu += 30
    assert look(watched, clock, 61) is False


def test_a_silent_agent_that_computes_is_not_stuck(watched, clock):
    seen = []
    for _ in range(6):
        watched.cpu += 10
        seen.append(look(watched, clock, 300))
    assert not any(seen)


def test_an_agent_that_prints_or_waits_for_a_person_is_not_stuck(watched, clock):
    look(watched, clock, 1000)
    os.utime(watched.store.path("logs", "agent-001.log"), (clock.now(), clock.now()))
    assert look(watched, clock, 100) is False
    watched.supervisor.turns["agent-001"] = {"state": "waiting"}
    assert [look(watched, clock, 1000), look(watched, clock, 100)] == [False, False]
