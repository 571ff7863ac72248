"""Coding CLIs: what each agent runs, its trouble and what follows, what blocks a start, budgets and limits."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

import psutil
import pytest
from attempt_calls import NOW, settings_of
from paths import ROOT, SCRIPTS
from sandbox import run

import farm as toolkit


def at(*when: int) -> float:
    return datetime(*when, tzinfo=timezone.utc).timestamp()


# ---------------------------------------------------------------------------------------------- who runs what


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
    assert "acceptEdits" in toolkit.cli_of("claude").launch(toolkit.SETTINGS["permissions"].default).start
    assert "workspace-write" in toolkit.cli_of("codex").launch(toolkit.SETTINGS["permissions"].default).start
    everything = [name for name in toolkit.CLIS for text in toolkit.cli_of(name).launch("edits")[1:3]
                  if any(word in text for word in ("dangerously", "yolo", "--auto "))]
    assert everything == []


def test_no_other_room_knows_a_cli_by_name_or_by_a_word_of_its_command_line():
    """But for the sentence that explains --agent, and an example."""
    source = (ROOT / "farm.py").read_text(encoding="utf-8")
    names = "|".join([*toolkit.CLIS, "workspace-write", "stream-json"])
    tree, known = ast.parse(source), re.compile(f"(?<![a-z])({names})(?![a-z])|\\bCLAUDE")
    first, last = (source[:source.index(f"- {room}\n")].count("\n") + 1 for room in ("coding CLIs", "attempts"))
    documents = {node.body[0].value for node in ast.walk(tree)
                 if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and isinstance(node.body[0], ast.Expr)}
    found = [f"line {node.lineno}: {node.value}" for node in ast.walk(tree)
             if isinstance(node, ast.Constant) and isinstance(node.value, str) and known.search(node.value)
             and node not in documents and not first <= node.lineno <= last]
    assert [line for line in found if not re.search("a mix such as|: ./farm.py ", line)] == []


@pytest.mark.parametrize("name", toolkit.CLIS)
@pytest.mark.parametrize("permissions", ["ask", "edits", "all"])
def test_what_a_preset_runs_is_bash_that_parses(name, permissions):
    launch = toolkit.cli_of(name).launch(permissions)
    for text in (launch.start, launch.resume):
        assert run(["bash", "-n", "-c", text]).returncode == 0
        assert "{" not in text.replace("{ ", "")


def test_a_headless_cli_that_fails_fails_through_the_pipe_that_keeps_its_output(sandbox):
    launch = toolkit.cli_of("codex").launch("edits")
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
    return toolkit.judge_end(code, turn or {}, ending or {}, toolkit.Usage(**spent), "the tail")


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
    found = [what for what, _ in toolkit.ClaudeCode().find_blockers("/r", settings_of())]
    assert len(found) == len(wanted) and all(part in what for part, what in zip(wanted, found, strict=True))


# ---------------------------------------------------------------------------------------------- scripts


def test_end_tree_ends_what_ignores_sigterm_and_what_is_below_it(sandbox):
    script = "trap '' TERM; bash -c 'trap \"\" TERM; echo ready; while :; do sleep 0.05; done' & wait; while :; do sleep 0.05; done"
    process = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert run(["bash", SCRIPTS / "agent/end-tree.sh", "-s", "1", str(process.pid)]).returncode == 0
    assert process.wait(5) == -signal.SIGKILL
    psutil.wait_procs(tree, timeout=5)
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in tree)


@pytest.mark.parametrize("pid", ["", "0", "1", "-1", "x"])
def test_end_tree_takes_only_a_process_number(pid):
    assert run(["bash", SCRIPTS / "agent/end-tree.sh", "--", pid]).returncode == 2


# ---------------------------------------------------------------------------------------------- what holds a preset up


def note(store, cause: str, why: str = "", move: str = "release") -> str:
    with store.transaction() as tx:
        return toolkit.note_limit(tx, "claude", toolkit.Outcome(move, cause, why), toolkit.CLOCK.now())


def test_one_agents_success_does_not_end_a_limit_that_began_meanwhile(store, clock):
    note(store, "usage limit", "try again in 1 hour")
    note(store, "done", move="submit")
    assert "usage limit until 2026-11-23T13:00:00Z" in toolkit.find_limit(store, "claude")
    clock.seconds += 3601
    assert toolkit.find_limit(store, "claude") == ""


def test_a_failing_api_never_shortens_a_limit_and_a_success_ends_it(store, clock):
    note(store, "usage limit", "try again in 1 hour")
    assert note(store, "API failure") == "2026-11-23T13:00:00Z"
    clock.seconds += 3601
    assert note(store, "API failure") == "2026-11-23T13:00:31Z"
    clock.seconds += 31
    assert note(store, "API failure") == "2026-11-23T13:01:32Z"
    note(store, "done", move="submit")
    assert toolkit.find_limit(store, "claude") == ""


def test_a_pause_without_a_known_end_doubles_up_to_a_quarter_of_an_hour(store, clock):
    pauses = []
    for _ in range(7):
        pauses.append(toolkit.epoch(note(store, "usage limit", "rejected (429)")) - clock.now())
        clock.seconds += pauses[-1] + 1
    assert pauses == [30, 60, 120, 240, 480, 900, 900]


def test_a_clock_that_is_set_back_prolongs_no_pause_of_our_own(store, clock):
    note(store, "API failure")
    clock.seconds -= 86400
    assert toolkit.find_limit(store, "claude") == ""
    note(store, "usage limit", "try again in 48 hours")
    assert "usage limit until" in toolkit.find_limit(store, "claude")


def test_ten_agents_that_meet_a_limit_together_have_met_it_once(store, clock):
    for _ in range(10):
        clock.seconds += 0.1
        until = note(store, "usage limit", "rejected (429)")
    assert toolkit.epoch(until) - clock.now() <= 30


def test_limits_that_cannot_be_read_are_damage_like_any_other_state(store):
    Path(store.path(toolkit.LIMITS_FILE)).write_text('{"presets": []}')
    with pytest.raises(toolkit.DamagedState, match=r"limits\.json"):
        toolkit.find_limit(store, "claude")


def spend(store, fence: str, **more) -> None:
    line = {"task": fence.partition(".")[0], "agent": "agent-001", "fence": fence, **more}
    toolkit.note_usage(store, line, toolkit.Usage(5, 1, 0.5))


def test_a_line_that_a_kill_has_torn_costs_no_other_line(store):
    spend(store, "t-0001.2")
    path = Path(store.path(toolkit.USAGE_FILE))
    path.write_bytes(path.read_bytes() + path.read_bytes()[:40])
    spend(store, "t-0002.2")
    assert toolkit.sum_usage(toolkit.read_usage(store))["cost_usd"] == 1.0


def test_an_attempt_is_judged_although_its_cost_cannot_be_written(store, capsys):
    os.mkdir(store.path(toolkit.USAGE_FILE))
    spend(store, "t-0001.2")
    assert "the cost of t-0001.2 may not be counted" in capsys.readouterr().err
    assert toolkit.read_usage(store) == []
