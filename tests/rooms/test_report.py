"""`report`: a farm's history as one JSON document."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from farm_calls import A, B
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import ROOT
from report_story import ALL_TASKS, NOON, Page, Story, at
from sandbox import git, run

import farm as toolkit


def spans(records: list[dict]) -> list[tuple]:
    """(agent or slot, task or tasks, begin and end in minutes, fate) of each."""
    return [(span.get("agent", span.get("slot")), span.get("task", span.get("tasks")),
             *((toolkit.epoch(span[key]) - NOON) / 60 for key in ("started_at", "ended_at")),
             span["fate"]) for span in records]


# ---------------------------------------------------------------------------------------------- the verb


def test_report_writes_beside_the_history_and_prints_where(story, capsys):
    story.add("one")
    assert toolkit.main(["--repo", str(story.repo), "report"]) == 0
    path = story.repo / "coordination" / "report.html"
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_text().startswith("<!doctype html>")


def test_report_runs_as_a_command(story):
    story.add("one")
    done = run([sys.executable, ROOT / "farm.py", "--repo", story.repo, "report", "-o",
                "page.html"], cwd=story.repo)
    assert (done.returncode, done.stdout, done.stderr) == (0, "page.html\n", "")


def test_report_json_prints_the_document_and_writes_no_page(busy, capsys):
    assert toolkit.main(["--repo", str(busy.repo), "report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == busy.document()
    assert not Path(busy.store.path("report.html")).exists()


def test_the_page_embeds_the_document_that_json_prints(busy):
    embedded = busy.page().all("script", type="application/json")
    assert [json.loads(text) for _, text in embedded] == [busy.document()]


def test_report_elsewhere_makes_no_farm(story):
    story.page()
    story.document()
    assert not (story.repo / "coordination").exists()


def test_a_repo_without_a_farm_gets_its_page_where_git_does_not_see_it(story):
    assert toolkit.main(["--repo", str(story.repo), "report"]) == 0
    assert git(story.repo, "status", "--porcelain") == ""


def test_report_into_a_folder_that_is_not_there_says_so(story, capsys):
    target = story.repo / "no" / "page.html"
    assert toolkit.main(["--repo", str(story.repo), "report", "-o", str(target)]) == 1
    assert "No such file" in capsys.readouterr().err


def test_report_replaces_the_page_of_before_and_leaves_no_other_file(busy):
    busy.page()
    before = sorted(busy.repo.iterdir())
    busy.page()
    assert sorted(busy.repo.iterdir()) == before


def test_report_changes_nothing_of_the_farm(busy):
    before = busy.store.signature()
    busy.page()
    busy.document()
    assert busy.store.signature() == before


def write_activity(story: Story, *testing: str) -> None:
    """What a live merger says it does: this process, with these tasks in its gate."""
    me = story.owner
    gates = [{"ids": list(testing), "slot": 1}] if testing else []
    now = {"pid": me.pid, "start": me.start, "target": "main", "testing": gates, "held": {},
           "trouble": []}
    story.store.write_durably(toolkit.NOW_FILE, json.dumps(now).encode())


def test_the_same_history_gives_the_same_bytes_whenever_it_is_asked(busy):
    first = busy.write_page().read_bytes()
    busy.now += 90_061
    assert busy.write_page().read_bytes() == first
    write_activity(busy)  # the loop of a drained farm goes on
    assert busy.write_page().read_bytes() == first


def test_a_gate_that_runs_lasts_until_now(busy):
    busy.event("gate-started", ids=["t-0003"], tree="t", slot=1)
    busy.now += 120
    write_activity(busy, "t-0003")
    assert spans(busy.document()["gates"])[-1] == ("1", ["t-0003"], 19, 21, "open")


# ---------------------------------------------------------------------------------------------- the document


def test_an_empty_farm_has_a_whole_document_and_page(story):
    document, page = story.document(), story.page()
    assert (document["started_at"], document["ended_at"], document["tasks"]) == ("", "", [])
    assert "No task was added yet." in page.words()
    assert page.totals()["Landed"].split() == ["0", "of", "0", "tasks"]


def test_a_farm_with_tasks_that_nobody_took_has_a_whole_document_and_page(story):
    story.add("one", "two")
    assert [task["state"] for task in story.document()["tasks"]] == ["pending"] * 2
    assert [row["State"] for row in story.page().table(ALL_TASKS)] == ["pending"] * 2


def test_the_document_has_the_keys_that_are_promised(busy):
    assert [*busy.document()] == [
        "schema", "name", "into", "commit_url", "started_at", "ended_at", "problems",
        "unread_lines", "totals", *toolkit.SPANS, "restarts", "moves", "setbacks", "spending",
        "tasks"]
    promised = toolkit.report_document.__doc__
    assert [key for key in busy.document() if not re.search(rf"\b{key}\b", promised)] == []
    assert [key for key in busy.document()["totals"] if key not in promised] == []


def test_the_document_says_whose_and_from_when_till_when(busy):
    document = busy.document()
    assert (document["schema"], document["name"]) == (1, busy.repo.name)
    assert (document["started_at"], document["ended_at"]) == (at(0), at(19))
    assert (document["problems"], document["unread_lines"]) == ([], 0)


def test_the_totals_say_what_became_of_the_tasks(busy):
    assert busy.document()["totals"] == {
        "tasks": 4, "claimed": 0, "ready": 0, "landed": 2, "failed": 1, "canceled": 0,
        "unfinished": 1, "attempts": 5, "returned": 2, "failed_attempts": 1,
        "worked_seconds": 1620, "gate_runs": 3, "gate_seconds": 180, "gate_runs_one_by_one": 3,
        "tokens_in": 0, "tokens_out": 0, "cost_usd": 0}


def test_there_is_a_stretch_for_each_attempt_session_gate_run_and_merge(busy):
    document = busy.document()
    assert spans(document["attempts"]) == [
        (A, "t-0001", 0, 10, "landed"), (B, "t-0002", 0, 10, "returned"),
        (A, "t-0003", 10, 15, "returned"), (B, "t-0004", 15, 15, "failed"),
        (A, "t-0002", 16, 18, "landed")]
    assert spans(document["sessions"]) == [(A, None, 0, 19, "open"), (B, None, 0, 15, "ended")]
    assert spans(document["gates"]) == [
        ("1", ["t-0001", "t-0002"], 10, 11, "red"), ("1", ["t-0001"], 11, 12, "green"),
        ("1", ["t-0002"], 18, 19, "green")]
    assert spans(document["merges"]) == [
        (A, "t-0001", 10, 12, "landed"), (B, "t-0002", 10, 12, "returned"),
        (A, "t-0003", 15, 15, "returned"), (A, "t-0002", 18, 19, "landed")]


def test_every_move_of_a_task_is_told_with_the_state_that_it_has_since(busy):
    states = [(move["at"], move["state"]) for move in busy.document()["moves"]
              if move["task"] == "t-0002"]
    assert states == [(at(0), "pending"), (at(0), "claimed"), (at(10), "ready"),
                      (at(12), "pending"), (at(16), "claimed"), (at(18), "ready"),
                      (at(19), "landed")]


def test_setbacks_say_what_happened_to_whom_and_why(busy):
    keys = ("at", "event", "agent", "task", "why")
    assert [tuple(setback[key] for key in keys) for setback in busy.document()["setbacks"]] == [
        (at(12), "returned", B, "t-0002", "the gate fails with it: make test"),
        (at(15), "returned", A, "t-0003", "it conflicts with main in src/a.py"),
        (at(15), "attempt-failed", B, "t-0004", "the agent ended without any change"),
        (at(15), "session-ended", B, "", "crashed with exit code 1")]


def test_tasks_are_told_in_full_failed_ones_first(busy):
    tasks = busy.document()["tasks"]
    assert [task["id"] for task in tasks] == ["t-0004", "t-0001", "t-0002", "t-0003"]
    assert tasks[2] == {
        "id": "t-0002", "state": "landed", "title": "two", "reason": "", "agent": A,
        "attempts": 2, "added_at": at(0), "landed_at": at(19), "landed_commit": "b" * 40}
    assert tasks[3]["reason"] == "it conflicts with main in src/a.py"


def test_gate_runs_are_held_against_one_for_each_submission(story):
    story.add(*(f"task {number}" for number in range(5)))
    for number in range(1, 6):
        story.submit(story.claim(f"agent-00{number}"))
    ids = [f"t-000{number}" for number in range(1, 6)]
    story.gate(30, "green", *ids)
    for task_id in ids:
        story.land(task_id)
    totals = story.document()["totals"]
    assert (totals["gate_runs"], totals["gate_seconds"]) == (1, 30)
    assert totals["gate_runs_one_by_one"] == 5


def test_a_conflict_would_have_cost_no_gate_run(story):
    story.add("one")
    story.submit(story.claim(A))
    story.gate(30, "green", "t-0001")
    story.bring_back("t-0001", "it conflicts with main in a.txt")
    assert story.document()["totals"]["gate_runs_one_by_one"] == 0


def test_a_submission_that_no_gate_saw_would_have_cost_none(story):
    story.add("one")
    story.submit(story.claim(A))
    story.gate(30, "red", "t-0001")
    story.bring_back("t-0001", "the gate fails with it: make test")
    story.now += 60
    story.submit(story.claim(A))
    story.bring_back("t-0001", "its commit is gone (cccccccccc)")
    assert story.document()["totals"]["gate_runs_one_by_one"] == 1


def test_a_gate_that_was_ended_early_is_a_run_all_the_same(story):
    story.add("one")
    story.event("gate-started", ids=["t-0001"], tree="t", slot=1)
    story.now += 10
    story.gate(30, "green", "t-0002")
    document = story.document()
    assert [gate["fate"] for gate in document["gates"]] == ["cut", "green"]
    assert (document["totals"]["gate_runs"], document["totals"]["gate_seconds"]) == (2, 30)


def test_a_gate_of_a_merger_that_is_gone_is_no_more_than_a_mark(story):
    story.add("one")
    story.event("gate-started", ids=["t-0001"], tree="t", slot=1)
    story.now += 600
    story.add("two")
    story.claim(A)
    story.submit(story.claim(A))
    assert spans(story.document()["gates"]) == [("1", ["t-0001"], 0, 0, "cut")]


def test_work_that_goes_on_lasts_until_now(story):
    story.add("one")
    story.claim(A)
    story.now += 7200
    document = story.document()
    assert spans(document["attempts"]) == [(A, "t-0001", 0, 120, "open")]
    assert document["ended_at"] == at(120)


def test_work_of_a_dead_owner_lasts_until_the_last_event(story):
    story.owner = story.owner._replace(start="1")
    story.add("one")
    story.claim(A)
    story.now += 60
    story.event("session-ended", agent=A, cause="its session is gone")
    story.now += 7200
    assert spans(story.document()["attempts"]) == [(A, "t-0001", 0, 1, "open")]


def test_a_lost_end_of_an_attempt_is_made_good_by_the_next_claim(story):
    story.add("one")
    task = toolkit.Task(id="t-0001", title="one", state="claimed", agent=A)
    for _ in range(2):
        story.store.append_event("claimed", task, agent=A)
        story.now += 60
    story.event("session-ended", agent=A, cause="done")
    assert spans(story.document()["attempts"]) == [
        (A, "t-0001", 0, 1, "cut"), (A, "t-0001", 1, 2, "open")]


def test_cost_is_told_where_it_is_known(busy):
    assert busy.document()["spending"] == [] and "Cost" in busy.page().words()
    busy.spend(A, "t-0002", 0.25), busy.spend(A, "t-0001", 1.5)
    document = busy.document()
    assert document["totals"]["cost_usd"] == 1.75 and document["totals"]["tokens_in"] == 2000
    assert document["spending"][0] == {
        "agent": A, "task": "t-0002", "tokens_in": 1000, "tokens_out": 0, "cost_usd": 0.25}
    assert busy.page().totals()["Cost"].startswith("$1.75 2000 tokens in")


def test_a_resumed_conversation_costs_once(busy):
    busy.spend(A, "t-0001", 1.5, conversation="c")
    busy.spend(A, "t-0001", 2.5, conversation="c")
    assert busy.document()["totals"]["cost_usd"] == 2.5


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), -1e300, 10 ** 400])
def test_a_cost_that_is_no_amount_leaves_a_document_that_every_reader_takes(busy, cost):
    busy.spend(A, "t-0001", cost)
    busy.spend(A, "t-0002", 0.5)
    assert busy.document()["totals"]["cost_usd"] == 0.5
    assert not re.search(r"\b(NaN|Infinity)\b", (busy.repo / "report.json").read_text())


def test_times_of_waiting_for_a_person_are_told(busy):
    busy.add("five")
    busy.add("six")
    busy.submit(busy.claim(B, "t-0005"))
    claim = busy.claim(B, "t-0006")
    busy.event("agent-waits", agent=B, why="May I?", id="t-0006")
    busy.now += 300
    busy.event("agent-goes-on", agent=B, why="", id="t-0006")
    busy.submit(claim)
    assert spans(busy.document()["waits"]) == [(B, "", 19, 24, "over")]


def test_only_a_second_start_of_a_session_is_a_restart(busy):
    busy.event("session-started", agent=A)  # seen late, after its first claim
    busy.event("session-started", agent=B)
    assert busy.document()["restarts"] == [{"agent": B, "at": at(19)}]


@pytest.mark.parametrize(("url", "link"), [
    ("git@github.com:ada/engine.git", "https://github.com/ada/engine/commit/"),
    ("https://user:secret@github.com/ada/engine", "https://github.com/ada/engine/commit/"),
    ("ssh://git@gitlab.example.org:2222/a/b/c.git", "https://gitlab.example.org/a/b/c/-/commit/"),
    ("https://bitbucket.org/ada/engine.git", "https://bitbucket.org/ada/engine/commits/"),
    ("https://codeberg.org/ada/engine/", "https://codeberg.org/ada/engine/commit/"),
    ("git@git.sr.ht:~ada/engine", "https://git.sr.ht/~ada/engine/commit/"),
    ("https://example.org/ada/engine.git", ""), ("/srv/github/engine.git", ""),
    ("work-github:ada/engine", ""), ("javascript:alert(1)//github.com/x", ""),
    ("https://github.com/a\"onclick=\"x/b", ""),
])
def test_a_commit_leads_to_a_known_forge_and_nowhere_else(busy, url, link):
    git(busy.repo, "config", "remote.origin.url", url)
    assert busy.document()["commit_url"] == link
    assert "secret" not in busy.page().text


# ---------------------------------------------------------------------------------------------- damage


def test_a_torn_last_line_is_counted_and_said(busy):
    busy.write_line('{"at": "2026-03-01T12:30:00Z", "event": "lan')
    assert busy.document()["unread_lines"] == 1
    assert "1 line of events.jsonl could not be read" in busy.page().words()


@pytest.mark.parametrize("line", [
    "no json", "[1]", "7", '"text"', "null", '{"event": "landed"}', '{"at": 5, "event": "x"}',
    '{"at": "never", "event": "x"}', '{"at": "2026-03-01T12:00:00Z", "event": 5}',
    "[" * 100_000, b"\xff\xfe", b"\0\0"])
def test_a_line_that_is_no_event_is_counted_and_passed_over(busy, line):
    whole = busy.document()
    busy.write_line(b"\n\n" + (line.encode() if isinstance(line, str) else line) + b"\n")
    assert busy.document() == {**whole, "unread_lines": 1}


def test_nothing_is_said_of_lines_when_all_can_be_read(busy):
    assert "could not be read" not in busy.page().words()


def test_a_damaged_queue_file_is_said_and_the_rest_is_shown(busy, capsys):
    Path(busy.store.path("task_queue", "pending.json")).write_text("{")
    target = busy.repo / "page.html"
    args = ["--repo", str(busy.repo), "report"]
    assert toolkit.main([*args, "-o", str(target)]) == toolkit.DamagedState.exit_code
    page = Page(target.read_text(encoding="utf-8"))
    assert "pending.json" in capsys.readouterr().err
    assert "pending.json: line 1" in page.all("p", **{"class": "note"})[0][1]
    assert [row["Task"] for row in page.table(ALL_TASKS)] == ["t-0001", "t-0002"]
    assert toolkit.main([*args, "--json"]) == toolkit.DamagedState.exit_code
    said = capsys.readouterr()
    assert "pending.json: line 1" in json.loads(said.out)["problems"][0]
    assert "pending.json" in said.err


SHORT = st.text(max_size=5)
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | SHORT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SHORT, inner, max_size=2),
    max_leaves=4)
KINDS = st.sampled_from([
    "claimed", "submitted", "landed", "returned", "attempt-failed", "owner-died", "gate-started",
    "gate-ended", "session-ended", "session-started", "agent-waits", "agent-goes-on", "added",
    "new-kind", "gate-", "session-"])
TASKS = st.fixed_dictionaries({}, optional={
    "id": st.sampled_from(["t-0001", A, "gate 1", ""]) | ODD, "agent": ODD, "state": ODD})
EVENTS = st.fixed_dictionaries({"event": KINDS}, optional={
    "task": TASKS | ODD, "agent": st.sampled_from([A, B]) | ODD, "why": ODD, "cause": ODD,
    "cost_usd": ODD, "colour": ODD, "ids": st.lists(ODD, max_size=3) | ODD,
    "slot": st.integers(1, 2) | ODD})
MOMENTS = st.tuples(st.sampled_from([0, 1, 60, 86400, 4e9]), EVENTS)


@settings(max_examples=100, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(MOMENTS, min_size=1, max_size=12), st.booleans())
def test_no_event_however_odd_breaks_the_document_or_the_page(story, moments, is_live):
    history = toolkit.History()
    for seconds, event in sorted(moments, key=lambda moment: moment[0]):
        history.fold(toolkit.utc(NOON + seconds), event)
    history.finish(toolkit.utc(NOON) if is_live else "")
    history.lists["spending"] = []
    totals = toolkit.sum_history(history, [])
    document = {**toolkit.report_document(story.store), **history.lists, "totals": totals}
    Page(toolkit.report_page(document))
    assert json.loads(toolkit.dump_line(document)) == document
    for kind in toolkit.SPANS:
        assert all(span["started_at"] <= span["ended_at"] for span in document[kind])
