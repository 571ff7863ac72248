"""Coding CLIs end to end, with a scripted claude."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import psutil
import pytest
from attempt_calls import claim, hook, settings_of
from paths import ROOT
from repo_calls import add_tasks, down, farm, states, status, tasks, wait_for_states
from sandbox import git, wait_until

import farm as toolkit


@pytest.fixture
def claude(make_repo, sandbox, monkeypatch):
    """A repo that claude trusts, and a `claude` on PATH."""
    repo = make_repo()
    (sandbox.root / "bin").mkdir()
    (sandbox.root / "bin/claude").write_text(f"#!/bin/sh\nexec '{sys.executable}' '{ROOT}/tests/stand_ins/fake_claude.py' \"$@\"\n")
    (sandbox.root / "bin/claude").chmod(0o755)
    monkeypatch.setenv("PATH", f"{sandbox.root / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    trusted = {"hasCompletedOnboarding": True, "projects": {str(repo): {"hasTrustDialogAccepted": True}}}
    (sandbox.home / ".claude.json").write_text(json.dumps(trusted))
    (repo / ".git/info/exclude").write_text("go\nlimited\n")
    return repo


def start(repo: Path, count: int = 1, **env) -> None:
    done = farm(repo, "up", "-n", str(count), "--agent", "claude", "--gate", "true", env=env)
    assert done.returncode == 0, done.stderr


def agent_of(repo: Path, number: int = 1) -> dict:
    return status(repo)["agents"][number - 1]


def wait_for_agent(repo: Path, state: str, number: int = 1) -> dict:
    def look() -> dict | None:
        seen = agent_of(repo, number)
        return seen if seen["state"] == state else None

    return wait_until(look, 30, f"agent {number} to be {state}")


def events(repo: Path) -> list[dict]:
    return [json.loads(line) for line in (repo / "coordination/events.jsonl").read_text().splitlines()]


def test_interactive_sessions_work_through_their_tasks_and_are_ended_after_each(claude):
    add_tasks(claude, 4, prompt="WORK")
    start(claude, 2)
    wait_for_states(claude, {"landed": 4})
    assert "sent back" in (claude / "coordination/logs/agent-001.log").read_text()
    used = [json.loads(line) for line in (claude / "coordination/usage.jsonl").read_text().splitlines()]
    assert {line["task"]: (line["tokens_in"], line["tokens_out"], line["cost_usd"]) for line in used} == {
        f"t-000{number}": (1100, 10, 0.25) for number in (1, 2, 3, 4)}
    assert [(task["tokens_in"], task["cost_usd"]) for task in tasks(claude)] == [(1100, 0.25)] * 4
    down(claude)


def test_an_agent_that_submits_by_itself_is_not_sent_back(claude):
    add_tasks(claude, 1, prompt='WORK\nRUN farm submit agent-001 --fence "$FARM_FENCE"')
    start(claude)
    wait_for_states(claude, {"landed": 1})
    wait_for_agent(claude, "idle")
    assert "sent back" not in (claude / "coordination/logs/agent-001.log").read_text()
    down(claude)


def test_a_question_is_shown_first_and_the_farm_waits_for_its_answer(claude):
    add_tasks(claude, 1, prompt="ASK\nWORK")
    start(claude)
    waiting = wait_for_agent(claude, "waiting")
    assert waiting["cause"] == "Bash make deploy" and waiting["task"] == "t-0001"
    wait_until(lambda: "agent-waits" in [event["event"] for event in events(claude)], 30, "the loop to note it")
    (claude / "go").touch()
    wait_for_states(claude, {"landed": 1})
    down(claude)


def test_a_usage_limit_parks_the_preset_until_the_reset_and_counts_for_nothing(claude):
    add_tasks(claude, 2, prompt="LIMIT You've hit your 5-hour limit, try again in 4 seconds\nWORK")
    (claude / "limited").touch()
    start(claude, 2)
    limited = wait_for_agent(claude, "limited")
    assert "usage limit until 2" in limited["cause"]
    (claude / "limited").unlink()
    wait_for_states(claude, {"landed": 2})
    assert [task["attempts"] for task in tasks(claude)] == [0, 0]
    prompts = "".join(path.read_text() for path in (claude / "coordination/prompts").glob("*.resumed.md"))
    assert "You were interrupted (usage limit: rate_limit: You've hit your 5-hour limit" in prompts
    assert "resumed" in (claude / "t-0001.txt").read_text() + (claude / "t-0002.txt").read_text()
    down(claude)


def test_a_missing_login_stops_all_agents_at_once_until_a_person_types_up(claude, sandbox):
    add_tasks(claude, 3, prompt="ERROR authentication_failed\nWORK")
    start(claude, FARM_NOTIFY=f"cat >> '{sandbox.root}/told'")
    limited = wait_for_agent(claude, "limited")
    assert "not logged in" in limited["cause"] and "./farm.py up" in limited["cause"]
    assert states(claude)["pending"] == 3
    told = sandbox.root / "told"
    wait_until(lambda: told.exists() and "claude: not logged in" in told.read_text(), 20, "a notice")
    wait_until(lambda: start(claude) or states(claude) == {"landed": 3}, 60, "all to land, an up after each first try")
    assert [task["attempts"] for task in tasks(claude)] == [0, 0, 0]
    down(claude)


def test_a_killed_cli_goes_on_in_its_conversation_and_its_tree(claude):
    add_tasks(claude, 1, prompt="RUN echo half > half.txt\nCRASH\nWORK")
    start(claude)
    wait_for_states(claude, {"landed": 1})
    assert (claude / "t-0001.txt").read_text() == "t-0001 resumed\n"
    assert (claude / "half.txt").exists()
    assert tasks(claude)[0]["attempts"] == 1
    assert any("killed by signal 9" in event.get("why", "") for event in events(claude))
    down(claude)


def test_a_farm_that_was_stopped_in_mid_task_goes_on_in_the_same_conversations(claude):
    add_tasks(claude, 2, prompt="RUN echo half > $FARM_TASK.half\nASK\nWORK")
    start(claude, 2)
    for number in (1, 2):
        wait_for_agent(claude, "waiting", number)
    before = {agent["agent"]: agent["task"] for agent in status(claude)["agents"]}
    down(claude)
    (claude / "go").touch()
    start(claude, 2)
    wait_for_states(claude, {"landed": 2})
    assert all((claude / f"{task}.txt").read_text() == f"{task} resumed\n" for task in before.values())
    assert [task["attempts"] for task in tasks(claude)] == [0, 0]
    prompts = sorted(path.name for path in (claude / "coordination/prompts").iterdir())
    assert prompts == ["t-0001.1.md", "t-0001.1.resumed.md", "t-0002.1.md", "t-0002.1.resumed.md"]
    down(claude)


def test_a_session_that_is_killed_whole_goes_on_in_its_conversation(claude):
    add_tasks(claude, 1, prompt="ASK\nWORK")
    start(claude)
    session = psutil.Process(wait_for_agent(claude, "waiting")["pid"])
    for process in [session, *session.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    (claude / "go").touch()
    wait_for_states(claude, {"landed": 1})
    assert (claude / "t-0001.txt").read_text() == "t-0001 resumed\n"
    down(claude)


def test_a_session_that_asks_for_ever_is_ended_by_its_tasks_time_limit(claude):
    add_tasks(claude, 1, prompt="RUN echo kept > kept.txt\nASK", time_limit_seconds=2, max_attempts=1)
    start(claude)
    wait_for_states(claude, {"failed": 1})
    assert tasks(claude)[0]["reason"] == "its time limit of 2s is over"
    rescue = farm(claude, "rescue", "list").stdout.split("\t")[0]
    assert git(claude, "show", f"{rescue}:kept.txt") == "kept"
    down(claude)


def test_a_task_that_is_over_its_budget_is_failed_while_it_works(claude):
    add_tasks(claude, 1, prompt="COST 1.5\nSLEEP 60", budget_usd=1)
    start(claude, FARM_BUDGET="1000")
    wait_for_states(claude, {"failed": 1})
    assert tasks(claude)[0]["reason"] == "its budget of $1.00 is used up ($1.50)"
    down(claude)


def test_a_farm_that_is_over_its_budget_pauses(claude):
    add_tasks(claude, 9, prompt="WORK")
    start(claude, FARM_BUDGET="0.4")
    wait_until(lambda: status(claude)["mode"] == "paused", 30, "the farm to pause")
    wait_until(lambda: set(states(claude)) == {"landed", "pending"}, 30, "what was begun to land")
    assert states(claude) == {"landed": 2, "pending": 7}
    told = farm(claude, "claim", "agent-007", "--owner-pid", str(os.getpid()))
    assert told.returncode == 3 and "paused" in told.stderr
    assert "FARM_BUDGET=0.90 ./farm.py up" in status(claude)["reason"]
    start(claude, FARM_BUDGET="100")
    wait_for_states(claude, {"landed": 9})
    down(claude)


def test_up_refuses_a_repo_that_claude_does_not_trust_yet(claude, sandbox):
    (sandbox.home / ".claude.json").unlink()
    done = farm(claude, "up", "-n", "2", "--agent", "claude", "--gate", "true")
    assert done.returncode == 4 and "does not trust" in done.stderr and "try: cd" in done.stderr


def test_each_agent_has_a_home_of_its_own_where_a_folder_for_it_is_named(claude, sandbox):
    (sandbox.root / "template/.config").mkdir(parents=True)
    (sandbox.root / "template/.config/tool").write_text("mine\n")
    add_tasks(claude, 2, prompt='RUN cat "$HOME/.config/tool" > $FARM_TASK.txt; basename "$HOME" >> $FARM_TASK.txt')
    start(claude, 2, FARM_AGENT_HOME=str(sandbox.root / "template"))
    wait_for_states(claude, {"landed": 2})
    homes = sorted((claude / f"t-000{number}.txt").read_text() for number in (1, 2))
    assert [home.split() for home in homes] == [["mine", "agent-001"], ["mine", "agent-002"]]
    down(claude)


def test_a_mix_of_a_claude_and_a_codex(claude, sandbox):
    codex = ('#!/bin/sh\nprintf "%s\\n" \'{"type":"thread.started","thread_id":"th-1"}\' \'{"type":"turn.completed","usage":'
             '{"input_tokens":7,"output_tokens":3}}\'\necho codex > "$FARM_TASK.txt"\n')
    (sandbox.root / "bin/codex").write_text(codex)
    (sandbox.root / "bin/codex").chmod(0o755)
    add_tasks(claude, 2, prompt="WORK\nASK")
    done = farm(claude, "up", "--agent", "claude:1,codex:1", "--gate", "true")
    assert done.returncode == 0, done.stderr
    wait_for_agent(claude, "waiting", 1)
    (claude / "go").touch()
    wait_for_states(claude, {"landed": 2})
    used = [json.loads(line) for line in (claude / "coordination/usage.jsonl").read_text().splitlines()]
    assert sorted((line["preset"], line["tokens_in"]) for line in used) == [("claude", 1100), ("codex", 7)]
    down(claude)


def test_doctor_says_which_clis_are_there_and_what_would_block_them(claude, sandbox):
    assert "claude" in (told := farm(claude, "doctor").stdout).splitlines()[0] and "not installed" in told
    (sandbox.home / ".claude.json").unlink()
    assert "does not trust" in farm(claude, "doctor").stdout


def test_a_title_that_begins_with_a_slash_is_no_command_of_the_cli(store):
    with store.transaction() as tx:
        toolkit.TaskQueue(tx).add([toolkit.Task(title="/clear the cache", priority=9)], 3)
    text = Path(toolkit.write_prompt(store, claim(store, "agent-001"), settings_of())).read_text()
    assert text.startswith("Task:\n/clear the cache\n")


@pytest.mark.parametrize(("status", "since", "is_ours", "state"), [
    ("idle", -10, True, "waiting"), ("idle", -2, True, "working"), ("busy", -10, True, "working"), ("idle", -10, False, "working"),
    ("idle", -40, True, "working"),
])
def test_a_cli_that_says_it_is_idle_in_mid_turn_waits_for_a_person(store, sandbox, clock, status, since, is_ours, state):
    """Esc fires no hook. A word from before the turn's last event, or of another process, is worth nothing."""
    hook(store, "UserPromptSubmit")
    clock.seconds += 30
    Path(store.path("mailbox", "agent-001", "pid")).write_text(f"{os.getpid()}\n")
    told = {"status": status, "statusUpdatedAt": int((clock.now() + since) * 1000),
            "procStart": toolkit.start_of(os.getpid()) if is_ours else "1"}
    (sandbox.home / ".claude/sessions").mkdir(parents=True)
    (sandbox.home / f".claude/sessions/{os.getpid()}.json").write_text(json.dumps(told))
    settings = toolkit.load_settings(store.repo)
    assert toolkit.read_turn(store, settings, "agent-001", "t-0002.2", "claude")["state"] == state
