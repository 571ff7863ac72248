"""Coding CLIs: what each agent runs, its hooks, its trouble and what follows, conversations that go on, budgets and limits."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, SCRIPTS, git, run, wait_until
from test_farm import add_tasks, down, farm, states, status, tasks, wait_for_states

import farm as toolkit

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=timezone.utc).timestamp()


def at(*when: int) -> float:
    return datetime(*when, tzinfo=timezone.utc).timestamp()


# ---------------------------------------------------------------------------------------------- who runs what


def settings_of(**values) -> toolkit.Settings:
    return toolkit.Settings(**{name: setting.default for name, setting in toolkit.SETTINGS.items()} | values)


def test_a_mix_gives_each_agent_its_preset_in_order():
    settings = settings_of(agent="claude:2,codex:1", n=3)
    assert toolkit.share_agents(settings) == ["claude", "claude", "codex"]
    assert toolkit.count_agents(settings_of(agent="claude:2,codex:1"), None) == 3


@pytest.mark.parametrize("agent", ["./agent.sh", "my-agent --port 8:1", "echo a:1,b"])
def test_a_command_with_a_colon_is_no_mix(agent):
    assert toolkit.share_agents(settings_of(agent=agent, n=2)) == [agent, agent]


def test_a_mix_that_does_not_add_up_or_names_no_preset_is_refused():
    with pytest.raises(toolkit.UsageError, match="names 3 agents, and -n says 10"):
        toolkit.count_agents(settings_of(agent="claude:2,codex:1"), 10)
    with pytest.raises(toolkit.UsageError, match="no preset 'clod'"):
        toolkit.read_mix("claude:2,clod:1")


def test_permissions_are_the_safe_ones_unless_the_user_says_otherwise():
    assert "acceptEdits" in toolkit.launch_of("claude", toolkit.SETTINGS["permissions"].default).start
    assert "workspace-write" in toolkit.launch_of("codex", toolkit.SETTINGS["permissions"].default).start
    everything = [name for name in toolkit.PRESETS for text in toolkit.launch_of(name, "edits")[1:3]
                  if any(word in text for word in ("dangerously", "yolo", "--auto "))]
    assert everything == []


@pytest.mark.parametrize("name", toolkit.PRESETS)
@pytest.mark.parametrize("permissions", ["ask", "edits", "all"])
def test_what_a_preset_runs_is_bash_that_parses(name, permissions):
    launch = toolkit.launch_of(name, permissions)
    for text in (launch.start, launch.resume):
        assert run(["bash", "-n", "-c", text]).returncode == 0
        assert "{" not in text.replace("{ ", "")


def test_a_headless_cli_that_fails_fails_through_the_pipe_that_keeps_its_output(sandbox):
    launch = toolkit.launch_of("codex", "edits")
    (sandbox.root / "bin").mkdir()
    (sandbox.root / "bin/codex").write_text("#!/bin/sh\necho '{}'\nexit 7\n")
    (sandbox.root / "bin/codex").chmod(0o755)
    env = {"PATH": f"{sandbox.root}/bin:{os.environ['PATH']}", "FARM_OUTPUT": str(sandbox.root / "out"), "FARM_PROMPT": "-x"}
    assert run(["bash", "-c", launch.start], env=env).returncode == 7
    assert (sandbox.root / "out").read_text() == "{}\n"


# ---------------------------------------------------------------------------------------------- reset times, causes, ends


@pytest.mark.parametrize(("text", "wanted"), [
    ("You've hit your session limit · resets 3pm (UTC)", at(2026, 11, 23, 15) + 75),
    ("You've hit your 5-hour limit · resets 3:45pm (Europe/Berlin)", at(2026, 11, 23, 14, 45) + 75),
    ("resets 9am (UTC)", at(2026, 11, 24, 9) + 75),
    ("You've hit your weekly limit · resets Nov 25, 3pm (UTC)", at(2026, 11, 25, 15) + 75),
    ("resets Jan 2, 2027, 3pm (UTC)", at(2027, 1, 2, 15) + 75),
    ("resets Jan 2, 3pm (UTC)", at(2027, 1, 2, 15) + 75),
    ("resets 12am (UTC)", at(2026, 11, 24) + 75),
    ("resets at 12:30 PM (UTC)", at(2026, 11, 23, 12, 30) + 75),
    ("Claude AI usage limit reached|1795444000", 1795444000.0),
    ("try again in 2 hours 5 minutes", NOW + 7500),
    ("Try again in 3 days, 4 hours and 1 minute.", NOW + 3 * 86400 + 4 * 3600 + 60),
    ("Please retry in 3999s.", NOW + 3999),
    ("retry after 1.5 min", NOW + 90),
    ("something else happened in 2 places", None),
    ("resets soon", None),
    ("resets 27pm (UTC)", None),
    ("resets Feb 30, 3pm (UTC)", None),
    ("resets 3pm (Nowhere/At_All)", None),
])
def test_the_time_at_which_a_limit_ends_is_read_from_the_clis_words(text, wanted):
    assert toolkit.read_reset(text, NOW) == wanted


def test_a_reset_without_a_zone_is_in_the_readers(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        wanted = [at(2026, 11, 24, 7, 8) + 75, at(2026, 11, 27, 21, 10) + 75]
        said = ["You’ve hit your usage limit. Upgrade to Pro, or try again at 4:08 PM.", "or try again at Nov 28th, 2026 6:10 AM."]
        assert [toolkit.read_reset(text, NOW) for text in said] == wanted
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(("error", "cause"), [
    ("rate_limit: You've hit your 5-hour limit · resets 4pm (UTC)", "usage limit"),
    ("You’ve hit your usage limit. Upgrade to Pro (...) or try again at 4:08 PM.", "usage limit"),
    ("You exceeded your current quota, please check your plan and billing details. Please retry in 3999s.", "usage limit"),
    ("exceeded retry limit, last status: 429 Too Many Requests", "usage limit"),
    ("authentication_failed: Not logged in · Please run /login", "not logged in"),
    ("Invalid API key · Fix external API key", "not logged in"),
    ("unexpected status 401 Unauthorized: no", "not logged in"),
    ("Missing environment variable: `OPENAI_KEY`", "not logged in"),
    ("billing_error: Credit balance is too low", "no credit"),
    ("invalid_request: Prompt is too long · 210000 tokens", "context used up"),
    ("server_error: API Error: 529 Overloaded. This is a server-side issue", "API failure"),
    ("We’re currently experiencing high demand, which may cause temporary errors.", "API failure"),
    ("unknown: ", "API failure"),
    ("max_output_tokens: the answer was too long", ""),
])
def test_an_error_has_its_cause(error, cause):
    assert toolkit.find_cause(error) == cause


def judge(code: int = 0, turn: dict | None = None, ending: dict | None = None, **spent) -> tuple:
    return toolkit.judge_end(code, turn or {}, ending or {}, toolkit.Spent(**spent), "the tail")


@pytest.mark.parametrize(("told", "move", "cause"), [
    ({"code": 0}, "submit", "done"),
    ({"code": 143, "turn": {"state": "over", "event": "Stop"}}, "submit", "done"),
    ({"code": 0, "denied": "Bash"}, "submit", "done"),
    ({"code": 0, "turn": {"state": "working", "event": "UserPromptSubmit"}}, "resume", "ended early"),
    ({"code": 3}, "fail", "crashed"),
    ({"code": 137}, "resume", "killed (out of memory?)"),
    ({"code": 139}, "resume", "killed"),
    ({"code": 1, "error": "API Error: 529"}, "release", "API failure"),
    ({"code": 173, "error": "You exceeded your current quota"}, "release", "usage limit"),
    ({"code": 143, "turn": {"state": "over", "event": "StopFailure", "message": "authentication_failed: Not logged in"}},
     "release", "not logged in"),
    ({"code": 1, "error": "Prompt is too long"}, "fail", "context used up"),
    ({"code": 1, "error": "a tool exploded"}, "fail", "failed"),
    ({"code": 143, "ending": {"event": "time limit", "message": "over"}}, "fail", "time limit"),
    ({"code": 0, "ending": {"event": "budget", "message": "over"}, "error": "API Error"}, "fail", "budget"),
])
def test_an_end_is_judged_by_the_farms_word_then_the_error_then_the_hooks_then_the_code(told, move, cause):
    assert judge(**told)[:2] == (move, cause)


def test_the_log_is_the_reason_where_the_cli_gives_none():
    assert judge(3).why == "the agent ended with exit code 3: the tail"
    assert judge(denied="Bash, WebFetch").why == "denied: Bash, WebFetch"


# ---------------------------------------------------------------------------------------------- turns, conversations (in process)


class Clock:
    def __init__(self):
        self.seconds = NOW

    def now(self) -> float:
        return self.seconds

    monotonic = now


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(toolkit, "CLOCK", fake)
    return fake


@pytest.fixture
def store(make_repo):
    store = toolkit.Store(str(make_repo()))
    with store.transaction() as tx:
        toolkit.TaskQueue(tx).add([toolkit.Task(title="one"), toolkit.Task(title="two", priority=5)], 3)
    return store


def claim(store, agent: str, conversation: str = "", preset: str = "claude") -> toolkit.Claim:
    with store.transaction() as tx:
        told = {"preset": preset, "id": conversation} if conversation else {"preset": preset}
        return toolkit.TaskQueue(tx).claim(agent, toolkit.identify(os.getpid()), "", told)


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
    assert toolkit.can_resume(toolkit.PRESETS["codex"], taken) is False


def test_only_an_interrupted_conversation_goes_on(store, clock):
    fresh = claim(store, "agent-001", "c-1", "gemini")
    assert toolkit.can_resume(toolkit.PRESETS["gemini"], fresh) is False
    give_back(store, fresh)
    assert toolkit.can_resume(toolkit.PRESETS["gemini"], claim(store, "agent-001", "c-2", "gemini")) is True


def test_a_conversation_whose_id_the_cli_tells_at_its_end_is_kept(store, clock):
    give_back(store, claim(store, "agent-001"), conversation="thread-9")
    assert claim(store, "agent-001").task["conversation"]["id"] == "thread-9"


def hook(store, event: str, agent: str = "agent-001", fence: str = "t-0002.2", **more) -> dict | None:
    os.makedirs(store.path("mailbox", agent), exist_ok=True)
    return toolkit.note_turn(store, agent, fence, {"hook_event_name": event, **more})


def turn(store) -> dict:
    return toolkit.read_mail(store, "agent-001", toolkit.TURN_FILE, "t-0002.2")


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
    settings = toolkit.cli_settings(settings_of())
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
    farm.sessions = {"agent-001": toolkit.Session("agent-001", "%1", os.getpid(), False, None, "", 0.0, "")}
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
    farm.note_stillness(farm.held, clock.now())
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
    watched.turns["agent-001"] = {"state": "waiting"}
    assert [look(watched, clock, 1000), look(watched, clock, 100)] == [False, False]


# ---------------------------------------------------------------------------------------------- what would block a start


@pytest.mark.parametrize(("told", "wanted"), [
    (None, ["not been set up", "does not trust"]),
    ({"hasCompletedOnboarding": True}, ["does not trust", "about ANTHROPIC_API_KEY"]),
    ({"hasCompletedOnboarding": True, "projects": {"REPO": {"hasTrustDialogAccepted": True}}}, ["about ANTHROPIC_API_KEY"]),
    ({"hasCompletedOnboarding": True, "projects": {"REPO": {"hasTrustDialogAccepted": True}},
      "customApiKeyResponses": {"approved": ["key-for-nothing-at-all"[-20:]]}}, []),
    ({"projects": 7}, []),
])
def test_what_claude_would_ask_at_its_first_start_is_known_before(sandbox, monkeypatch, told, wanted):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key-for-nothing-at-all")
    monkeypatch.delenv("CLAUDE_CONFIG_DIR", raising=False)
    if told is not None:
        (sandbox.home / ".claude.json").write_text(json.dumps(told).replace("REPO", "/r"))
    found = [what for what, _ in toolkit.find_blockers("/r", settings_of())]
    assert len(found) == len(wanted) and all(part in what for part, what in zip(wanted, found, strict=True))


# ---------------------------------------------------------------------------------------------- scripts


def test_end_tree_ends_what_ignores_sigterm_and_what_is_below_it(sandbox):
    script = "trap '' TERM; bash -c 'trap \"\" TERM; echo ready; while :; do sleep 0.05; done' & wait; while :; do sleep 0.05; done"
    process = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert run(["bash", SCRIPTS / "end-tree.sh", "-s", "1", str(process.pid)]).returncode == 0
    assert process.wait(5) == -signal.SIGKILL
    psutil.wait_procs(tree, timeout=5)
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in tree)


@pytest.mark.parametrize("pid", ["", "0", "1", "-1", "x"])
def test_end_tree_takes_only_a_process_number(pid):
    assert run(["bash", SCRIPTS / "end-tree.sh", "--", pid]).returncode == 2


# ---------------------------------------------------------------------------------------------- end to end, with a scripted claude


@pytest.fixture
def claude(make_repo, sandbox, monkeypatch):
    """A repo that claude trusts, and a `claude` on PATH."""
    repo = make_repo()
    (sandbox.root / "bin").mkdir()
    (sandbox.root / "bin/claude").write_text(f"#!/bin/sh\nexec '{sys.executable}' '{ROOT}/tests/fake_claude.py' \"$@\"\n")
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
    wait_until(lambda: agent_of(repo, number)["state"] == state, 30, f"agent {number} to be {state}")
    return agent_of(repo, number)


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
    assert toolkit.read_turn(store, "agent-001", "t-0002.2", str(sandbox.home))["state"] == state


# ---------------------------------------------------------------------------------------------- what holds a preset up


def note(store, cause: str, why: str = "", move: str = "release") -> str:
    with store.transaction() as tx:
        return toolkit.note_limit(tx, "claude", toolkit.Outcome(move, cause, why), toolkit.CLOCK.now())


def test_one_agents_success_does_not_end_a_limit_that_began_meanwhile(store, clock):
    note(store, "usage limit", "try again in 1 hour")
    note(store, "done", move="submit")
    assert "usage limit until 2026-11-23T13:00:00Z" in toolkit.find_limit(store, "claude", clock.now())
    clock.seconds += 3601
    assert toolkit.find_limit(store, "claude", clock.now()) == ""


def test_a_failing_api_never_shortens_a_limit_and_a_success_ends_it(store, clock):
    note(store, "usage limit", "try again in 1 hour")
    assert note(store, "API failure") == "2026-11-23T13:00:00Z"
    clock.seconds += 3601
    assert [note(store, "API failure") for _ in range(2)] == ["2026-11-23T13:00:31Z", "2026-11-23T13:01:01Z"]
    note(store, "done", move="submit")
    assert toolkit.find_limit(store, "claude", clock.now()) == ""


def test_a_pause_without_a_known_end_doubles_up_to_a_quarter_of_an_hour(store, clock):
    pauses = [toolkit.epoch(note(store, "usage limit", "rejected (429)")) - NOW for _ in range(7)]
    assert pauses == [30, 60, 120, 240, 480, 900, 900]


def test_limits_that_cannot_be_read_are_damage_like_any_other_state(store):
    Path(store.path(toolkit.LIMITS_FILE)).write_text('{"presets": []}')
    with pytest.raises(toolkit.DamagedState, match=r"limits\.json"):
        toolkit.find_limit(store, "claude", NOW)


def spend(store, fence: str, **more) -> None:
    line = {"task": fence.partition(".")[0], "agent": "agent-001", "fence": fence, **more}
    toolkit.note_spent(store, line, toolkit.Spent(5, 1, 0.5))


def test_a_line_that_a_kill_has_torn_costs_no_other_line(store):
    spend(store, "t-0001.2")
    path = Path(store.path(toolkit.USAGE_FILE))
    path.write_bytes(path.read_bytes() + path.read_bytes()[:40])
    spend(store, "t-0002.2")
    assert toolkit.sum_spending(toolkit.read_spending(store))["cost_usd"] == 1.0


def test_an_attempt_is_judged_although_its_cost_cannot_be_written(store, capsys):
    os.mkdir(store.path(toolkit.USAGE_FILE))
    spend(store, "t-0001.2")
    assert "the cost of t-0001.2 is not counted" in capsys.readouterr().err
    assert toolkit.read_spending(store) == []
