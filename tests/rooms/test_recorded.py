"""What real CLIs said to the stand-in, recorded below tests/stand_ins/recorded, as farm.py reads it; and the stand-in itself."""

from __future__ import annotations

import concurrent.futures
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest
from paths import ROOT
from sandbox import run
from stand_in import StandIn
from stand_in_script import find_turn, parse_script

import farm as toolkit

RECORDED = ROOT / "tests/stand_ins/recorded"
NOW = datetime(2026, 11, 23, 15, 0, tzinfo=timezone.utc).timestamp()  # when they were recorded, near enough
HOOKS = [json.loads(line) for line in (RECORDED / "claude-hooks.jsonl").read_text(encoding="utf-8").splitlines()]


def cli_of_recording(name: str) -> toolkit.Cli:
    """A recording is named by its CLI; what claude prints is claude-print's."""
    own = "claude" if name.startswith("claude-transcript") else name.split("-")[0].replace("claude", "claude-print")
    return toolkit.CLIS[own]


def read(name: str) -> toolkit.Usage:
    return cli_of_recording(name).read(str(RECORDED / name))


# ---------------------------------------------------------------------------------------------- what they printed


@pytest.mark.parametrize(
    ("name", "tokens_in", "tokens_out", "cost"),
    [
        ("claude-print-ok.jsonl", 3600, 240, 0.0192),
        ("claude-transcript.jsonl", 1200, 80, 0.0064),
        ("claude-transcript-killed-and-resumed.jsonl", 4800, 320, 0.0064),
        ("codex-ok.jsonl", 4800, 320, 0.0),
        ("gemini-ok.json", 3600, 240, 0.0),
        ("opencode-ok.jsonl", 3600, 240, 0.0),
    ],
)
def test_the_tokens_of_a_recording_are_those_that_the_api_counted(name, tokens_in, tokens_out, cost):
    spent = read(name)
    assert (spent.tokens_in, spent.tokens_out, round(spent.cost_usd, 6), spent.error) == (tokens_in, tokens_out, cost, "")


def test_a_resumed_codex_thread_tells_the_sum_of_all_its_turns():
    first, second = read("codex-ok.jsonl"), read("codex-resume.jsonl")
    assert first.conversation == second.conversation and second.tokens_in == first.tokens_in + 1200


def test_a_denied_tool_is_named_though_the_cli_calls_it_a_success():
    assert read("claude-print-ok.jsonl").denied == "Bash"


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("claude-print-nokey.jsonl", "not logged in"),
        ("claude-print-401.jsonl", "not logged in"),
        ("claude-print-credit.jsonl", "no credit"),
        ("claude-print-toolong.jsonl", "context used up"),
        ("claude-print-500.jsonl", "API failure"),
        ("claude-print-529.jsonl", "API failure"),
        ("claude-print-limit.jsonl", "usage limit"),
        ("claude-transcript-overloaded.jsonl", "API failure"),
        ("codex-nokey.jsonl", "not logged in"),
        ("codex-401.jsonl", "not logged in"),
        ("codex-500.jsonl", "API failure"),
        ("codex-429.jsonl", "usage limit"),
        ("codex-limit.jsonl", "usage limit"),
        ("gemini-nokey.txt", "not logged in"),
        ("gemini-401.txt", "not logged in"),
        ("gemini-429.txt", "usage limit"),
        ("opencode-401.jsonl", "not logged in"),
    ],
)
def test_a_recorded_failure_has_its_cause(name, cause):
    outcome = toolkit.judge_end(1, {}, {}, read(name), "")
    assert outcome.cause == cause
    assert outcome.move == ("release" if cause in toolkit.NO_FAULT else "fail")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("claude-print-limit.jsonl", 1795449745.0),  # exact: it stands beside the words
        ("claude-print-limit-days.jsonl", 1795845745.0),
        ("codex-limit.jsonl", datetime(2026, 11, 23, 16, 8, tzinfo=timezone.utc).timestamp() + toolkit.CUT_SECONDS),
        ("codex-limit-days.jsonl", datetime(2026, 11, 28, 6, 10, tzinfo=timezone.utc).timestamp() + toolkit.CUT_SECONDS),
        ("gemini-429.txt", NOW + 3999),
    ],
)
def test_the_end_of_a_recorded_limit_is_known(name, wanted, monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    try:
        assert toolkit.read_reset(read(name).error, NOW) == wanted
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("name", sorted(path.name for path in RECORDED.iterdir() if path.name != "claude-hooks.jsonl"))
def test_a_recording_that_breaks_off_anywhere_is_still_read(name, tmp_path):
    text = (RECORDED / name).read_bytes()
    for size in range(0, len(text), max(1, len(text) // 40)):
        (tmp_path / name).write_bytes(text[:size])
        assert cli_of_recording(name).read(str(tmp_path / name)).tokens_in >= 0


# ---------------------------------------------------------------------------------------------- what their hooks said


@pytest.fixture
def store(make_repo) -> toolkit.Store:
    store = toolkit.Store(str(make_repo()))
    with store.transaction() as tx:
        toolkit.TaskQueue(tx).add([toolkit.Task(title="one")], 3)
    return store


def replay(store: toolkit.Store, case: str) -> list[dict]:
    """Every turn.json that a recorded session leaves, one after the other."""
    with store.transaction() as tx:
        fence = toolkit.TaskQueue(tx).claim("agent-001", toolkit.identify(os.getpid()), "", "").fence
    Path(store.path("mailbox", "agent-001")).mkdir(parents=True, exist_ok=True)
    turns = []
    for line in HOOKS:
        if line["case"] == case:
            toolkit.note_turn(store, "agent-001", fence, line["hook"])
            turns.append(toolkit.read_mail(store, "agent-001", toolkit.TURN_FILE, fence))
    return turns


@pytest.mark.parametrize(
    ("case", "states"),
    [
        ("permission", ["working", "waiting", "working", "waiting"]),
        ("blocked-stop", ["working", "over"]),
        ("not-logged-in", ["working", "over"]),
        ("invalid-key", ["working", "over"]),
        ("overloaded", ["working", "over"]),
        ("failing", ["working", "over"]),
    ],
)
def test_the_states_of_a_recorded_session_follow_its_hooks(store, case, states):
    found = [turn["state"] for turn in replay(store, case) if turn]
    assert [state for index, state in enumerate(found) if index == 0 or state != found[index - 1]] == states


def test_a_recorded_question_says_what_is_asked_for(store):
    messages = [turn["message"] for turn in replay(store, "permission") if turn and turn["state"] == "waiting"]
    assert any("touch" in message for message in messages)


@pytest.mark.parametrize(
    ("case", "move", "cause"),
    [
        ("not-logged-in", "release", "not logged in"),
        ("invalid-key", "release", "not logged in"),
        ("overloaded", "release", "API failure"),
        ("failing", "release", "API failure"),
        ("blocked-stop", "submit", "done"),
    ],
)
def test_the_end_of_a_recorded_session_is_judged_by_its_last_hook(store, case, move, cause):
    turn = replay(store, case)[-1]
    assert toolkit.judge_end(143, turn, {}, toolkit.Usage(), "")[:2] == (move, cause)


def test_a_recorded_usage_limit_of_a_session_is_known_to_the_minute(store):
    turn = next(turn for turn in replay(store, "limit") if turn and turn["event"] == "StopFailure")
    outcome = toolkit.judge_end(143, turn, {}, toolkit.Usage(), "")
    at = datetime(2026, 11, 23, 14, 56, tzinfo=timezone.utc).timestamp()
    assert outcome[:2] == ("release", "usage limit")
    assert toolkit.read_reset(outcome.why, at - 60) == at + toolkit.CUT_SECONDS


# ---------------------------------------------------------------------------------------------- the stand-in


@pytest.fixture
def server(tmp_path) -> Iterator[StandIn]:
    server = StandIn(log=str(tmp_path / "requests.jsonl"))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(server: StandIn, prompt: str, *, session: str = "", results: int = 0) -> dict:
    """What a Claude Code would get for this prompt after so many tool results; {"status", "message"} when it is refused."""
    messages = [{"role": "user", "content": prompt}]
    for _ in range(results):
        messages.append({"role": "user", "content": [{"type": "tool_result", "content": "ok"}]})
    body = json.dumps({"model": "m", "messages": messages, "tools": [{"name": "Bash"}, {"name": "Write"}]}).encode()
    request = urllib.request.Request(f"{server.url}/v1/messages", body, {"x-claude-code-session-id": session})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return {"status": error.code, "message": json.load(error)["error"]["message"]}


def test_the_stand_in_listens_on_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"


def test_each_reply_is_the_next_step_of_the_prompts_script(server):
    prompt = "Do it\nWRITE a.txt::text\nRUN make\nSAY all done"
    replies = [ask(server, prompt, results=number) for number in range(4)]
    tools = [[part["name"] for part in reply["content"] if part["type"] == "tool_use"] for reply in replies]
    assert tools == [["Write"], ["Bash"], ["Bash"], []]
    assert replies[2]["content"][1]["input"]["command"].startswith("git add -A && git commit -q -m 'Do it'")
    assert replies[3]["content"][0]["text"] == "all done"


def test_a_later_text_without_a_directive_leaves_the_script_in_force():
    assert find_turn([("user", "RUN a", 0), ("user", "", 1), ("user", "go on", 0)]) == ("RUN a", 1)
    assert find_turn([("user", "RUN a", 0), ("user", "", 1), ("user", "RUN b", 0)]) == ("RUN b", 0)


@pytest.mark.parametrize(("attempt", "words"), [(1, ["a", "c"]), (2, ["b", "c"])])
def test_a_script_may_differ_between_the_first_and_later_attempts(attempt, words):
    steps, _ = parse_script(f"FIRST RUN a\nAGAIN RUN b\nRUN c\nYour task is t-0001, attempt {attempt}.")
    assert [argument for _, argument, _ in steps] == words


def test_an_agent_submits_with_the_words_that_it_was_told_last(server):
    prompt = "SUBMIT\nrun:  farm submit agent-001 --fence t-0001.2\nnow it is  farm submit agent-001 --fence t-0001.4."
    assert ask(server, prompt)["content"][1]["input"]["command"] == "farm submit agent-001 --fence t-0001.4"


def test_an_error_comes_as_often_as_it_was_asked_for(server):
    replies = [ask(server, "ERROR 529::2::Overloaded\nSAY ok", session="one") for _ in range(3)]
    assert [reply.get("status") for reply in replies] == [529, 529, None]


def test_a_usage_limit_refuses_everybody_until_it_is_over(server):
    assert ask(server, "LIMIT 2\nSAY ok", session="one")["status"] == 429
    assert ask(server, "SAY ok", session="two")["status"] == 429
    deadline = time.monotonic() + 10
    while ask(server, "LIMIT 2\nSAY ok", session="one").get("status") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ask(server, "SAY ok", session="two")["content"][0]["text"] == "ok"


def test_conversations_wait_for_each_other_where_they_gather(server):
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(ask, server, "GATHER 3", session=str(number)) for number in range(3)]
        assert all(call.result(timeout=20)["content"][1]["name"] == "Bash" for call in calls)


@pytest.mark.parametrize(
    ("path", "body", "wanted"),
    [
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": "RUN make"}], "tools": [{"name": "exec_command"}]},
            "exec_command",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "RUN make"}], "tools": [{"function": {"name": "bash"}}]},
            "bash",
        ),
        (
            "/v1beta/models/m:generateContent",
            {
                "contents": [{"role": "user", "parts": [{"text": "RUN make"}]}],
                "tools": [{"functionDeclarations": [{"name": "run_shell_command"}]}],
            },
            "run_shell_command",
        ),
    ],
)
def test_the_same_script_is_spoken_in_the_other_clis_protocols(server, path, body, wanted):
    request = urllib.request.Request(server.url + path, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as response:
        text = response.read().decode()
    assert wanted in text and "make" in text


# ---------------------------------------------------------------------------------------------- the campaign


def test_the_campaign_says_why_it_is_skipped_where_there_is_no_npm(tmp_path):
    done = run([sys.executable, ROOT / "tests/campaigns/agents.py", "--clis", tmp_path / "clis"], env={"PATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (0, "skipped: npm is not installed\n")
