"""`report`: one HTML page of a farm's history. Read back with a parser of its own, and looked at in a real browser."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import os
import re
import shutil
import struct
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, git, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path[:0] = [str(ROOT)]
import farm as toolkit  # noqa: E402  (needs the path above)

NOON = 1_772_366_400.0  # 2026-03-01T12:00:00Z
A, B = "agent-001", "agent-002"
VOID = {"meta", "link", "rect", "path", "br"}
EVIL = "<script>alert(1)</script> & \"quoted\" \x1b[31mred\x1b[0m bell\x07 \x85 tab\there\nline \u2028 \u202eend"
PNG_FILTERS = {
    1: lambda left, up, corner: left,
    2: lambda left, up, corner: up,
    3: lambda left, up, corner: (left + up) // 2,
    4: lambda left, up, corner: min((left, up, corner), key=lambda near: abs(left + up - corner - near)),
}


class Page(html.parser.HTMLParser):
    """A parsed page; fails on a tag that is not closed in order. elements: (name, attributes, text below it)."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.open, self.elements = text, [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {[element[0] for element in self.open]}"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: <{tag} {attrs}>"
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID or tag in ("rect", "path"):
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for _, _, texts in self.open:
            texts.append(data)

    def all(self, tag: str, **wanted: str) -> list[tuple[dict, str]]:
        """(attributes, text) of every element of that name with these attributes."""
        return [(attributes, "".join(texts).strip()) for name, attributes, texts in self.elements
                if name == tag and all(attributes.get(key) == value for key, value in wanted.items())]

    def words(self) -> str:
        """The text that a reader sees, as one line."""
        return " ".join("".join(self.all("main")[0][1]).split())

    def table(self, caption: str) -> list[dict]:
        """The rows of one table, each a dict by column head."""
        rows, heads, is_in = [], [], False
        for name, _, texts in self.elements:
            text = " ".join("".join(texts).split())
            if name == "table":
                is_in, heads = text.startswith(caption), []
            elif is_in and name == "tr":
                rows.append([])
            elif is_in and name in ("th", "td"):
                rows[-1].append(text)
        heads = rows.pop(0) if rows else []
        return [dict(zip(heads, row, strict=True)) for row in rows]

    def totals(self) -> dict[str, str]:
        """Name -> number and words beside it."""
        return dict(zip((text for _, text in self.all("dt")), (text for _, text in self.all("dd")), strict=True))

    def bars(self) -> list[tuple[str, str]]:
        """(class, tooltip) of each bar of the timeline that is drawn."""
        found = []
        for index, (name, attributes, texts) in enumerate(self.elements):
            if name == "rect" and self.elements[index + 1][0] == "title":
                found.append((attributes["class"], "".join(texts)))
        return found


class Story:
    """A farm whose moves are really made, on a clock that the test sets; git is left out."""

    def __init__(self, repo: Path, monkeypatch: pytest.MonkeyPatch):
        self.repo, self.now = repo, NOON
        monkeypatch.setattr(toolkit.CLOCK, "now", lambda: self.now)
        self.store = toolkit.Store(str(repo))
        self.owner = toolkit.identify(os.getpid())

    def add(self, *titles: str, **fields) -> None:
        with self.store.transaction() as tx:
            toolkit.TaskQueue(tx).add([toolkit.Task(title=title, **fields) for title in titles], 3)

    def claim(self, agent: str, task_id: str = "") -> toolkit.Claim:
        with self.store.transaction() as tx:
            return toolkit.TaskQueue(tx).claim(agent, self.owner, task_id)

    def submit(self, claim: toolkit.Claim) -> None:
        with self.store.transaction() as tx:
            toolkit.TaskQueue(tx).submit(claim.agent, claim.fence, "work", "c" * 40)

    def fail(self, claim: toolkit.Claim, why: str, **options) -> None:
        with self.store.transaction() as tx:
            toolkit.TaskQueue(tx).fail(claim.agent, claim.fence, why, **options)

    def land(self, task_id: str, commit: str = "a" * 40) -> None:
        with self.store.transaction() as tx:
            task = tx.state.ready[task_id]
            done = task._replace(state="landed", landed_commit=commit, landed_at=toolkit.utc(self.now), reason="")
            tx.move(done, "landed", "landed")

    def bring_back(self, task_id: str, reason: str) -> None:
        with self.store.transaction() as tx:
            toolkit.TaskQueue(tx).give_back(tx.state.ready[task_id], reason, "return", start="refs/farm/returned/x")

    def event(self, kind: str, **details) -> None:
        self.store.append_event(kind, None, **details)

    def gate(self, seconds: float, colour: str, *ids: str, slot: int = 1) -> None:
        self.event("gate-started", ids=list(ids), tree="t", slot=slot)
        self.now += seconds
        self.event("gate-ended", ids=list(ids), tree="t", slot=slot, colour=colour, exit_code=0, seconds=seconds, note="")

    def write_line(self, line: str | bytes) -> None:
        with open(self.store.path("events.jsonl"), "ab") as file:
            file.write(line.encode() if isinstance(line, str) else line)

    def page(self) -> Page:
        """The page, written by the verb."""
        target = self.repo / "page.html"
        assert toolkit.main(["--repo", str(self.repo), "report", "-o", str(target)]) == 0
        return Page(target.read_text(encoding="utf-8"))


@pytest.fixture
def story(make_repo, monkeypatch) -> Story:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    return Story(make_repo(), monkeypatch)


@pytest.fixture
def busy(story) -> Story:
    """Two agents and four tasks: one lands at once, one after a red gate, one conflicts, one fails for good."""
    story.add("one", "two", "three", "four")
    first, second = story.claim(A), story.claim(B)
    story.now += 600
    story.submit(first), story.submit(second)
    third = story.claim(A)
    story.gate(60, "red", "t-0001", "t-0002")
    story.gate(60, "green", "t-0001")
    story.land("t-0001")
    story.bring_back("t-0002", "the gate fails with it: make test")
    story.now += 180
    story.submit(third)
    story.bring_back("t-0003", "it conflicts with main in src/a.py")
    story.fail(story.claim(B, "t-0004"), "the agent ended without any change", retry=False)
    story.event("session-ended", agent=B, cause="crashed with exit code 1")
    story.now += 60
    again = story.claim(A, "t-0002")
    story.now += 120
    story.submit(again)
    story.gate(60, "green", "t-0002")
    story.land("t-0002", "b" * 40)
    return story


# ---------------------------------------------------------------------------------------------- the verb


def test_report_writes_beside_the_history_and_prints_where(story, capsys):
    story.add("one")
    assert toolkit.main(["--repo", str(story.repo), "report"]) == 0
    path = story.repo / "coordination" / "report.html"
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_text().startswith("<!doctype html>")


def test_report_runs_as_a_command(story):
    story.add("one")
    done = run([sys.executable, ROOT / "farm.py", "--repo", story.repo, "report", "-o", "page.html"], cwd=story.repo)
    assert (done.returncode, done.stdout, done.stderr) == (0, "page.html\n", "")


def test_report_elsewhere_makes_no_farm(story):
    story.page()
    assert not (story.repo / "coordination").exists()


def test_a_repo_without_a_farm_gets_its_page_where_git_does_not_see_it(story):
    assert toolkit.main(["--repo", str(story.repo), "report"]) == 0
    assert git(story.repo, "status", "--porcelain") == ""


def test_report_into_a_folder_that_is_not_there_says_so(story, capsys):
    assert toolkit.main(["--repo", str(story.repo), "report", "-o", str(story.repo / "no" / "page.html")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_report_replaces_the_page_of_before_and_leaves_no_other_file(busy):
    busy.page()
    before = sorted(busy.repo.iterdir())
    busy.page()
    assert sorted(busy.repo.iterdir()) == before


def test_report_changes_nothing_of_the_farm(busy):
    before = busy.store.signature()
    busy.page()
    assert busy.store.signature() == before


# ---------------------------------------------------------------------------------------------- what it says


def test_an_empty_farm_has_a_whole_page(story):
    page = story.page()
    assert "No task was added yet." in page.words()
    assert page.totals()["Landed"].split() == ["0", "of", "0", "tasks"]


def test_a_farm_with_tasks_that_nobody_took_has_a_whole_page(story):
    story.add("one", "two")
    assert [row["State"] for row in story.page().table("Failed ones first")] == ["\u25cb pending"] * 2


def test_the_totals_say_what_became_of_the_tasks(busy):
    totals = {name: " ".join(text.split()) for name, text in busy.page().totals().items()}
    assert totals == {
        "Landed": "2 of 4 tasks", "Not finished": "1 0 in the merge queue", "Failed": "1 and 0 canceled",
        "Came back": "2 and 1 failed attempt", "Work": "27m in 5 attempts", "Gate runs": "3 0 saved",
    }


def test_the_table_of_tasks_has_the_failed_ones_first(busy):
    assert [row["Task"] for row in busy.page().table("Failed ones first")] == ["t-0004", "t-0001", "t-0002", "t-0003"]


def test_a_row_of_the_table_of_tasks_says_all_of_it(busy):
    row = busy.page().table("Failed ones first")[2]
    assert row == {"Task": "t-0002", "State": "\u25cf landed", "Title, and why it last came back": "two", "Agent": A,
                   "Attempts": "2", "Worked": "12m", "Landed": "03-01 12:19", "Commit": "git show " + "b" * 10}


def test_a_task_that_came_back_says_why(busy):
    row = busy.page().table("Failed ones first")[3]
    assert row["Title, and why it last came back"] == "threeit conflicts with main in src/a.py"


def test_the_timeline_has_a_bar_for_each_attempt_and_gate_run(busy):
    assert Counter(busy.page().bars()) == Counter([
        ("landed", "t-0001: landed, 10m"), ("returned", "t-0002: came back, 10m"), ("returned", "t-0003: came back, 5m"),
        ("failed", "t-0004: failed, 0s"), ("landed", "t-0002: landed, 2m"), ("red", "target with t-0001, t-0002: red, 1m"),
        ("green", "target with t-0001: green, 1m"), ("green", "target with t-0002: green, 1m"),
    ])


def test_the_timeline_has_a_row_for_each_agent_and_gate_slot(busy):
    labels = [text for attributes, text in busy.page().all("text") if attributes.get("class") == "e"]
    assert labels[:3] == [A, B, "gate 1"]


def test_the_timeline_marks_the_end_of_a_session(busy):
    assert len([1 for attributes, text in busy.page().all("path", **{"class": "end"}) if text == "session ended"]) == 1


def test_the_numbers_of_the_agents_are_those_of_the_timeline(busy):
    rows = busy.page().table("The same in numbers")
    assert rows == [
        {"Agent": A, "Attempts": "3", "Landed": "2", "Came back": "1", "Failed": "0", "Worked": "17m", "Idle": "2m",
         "Session ends": "0"},
        {"Agent": B, "Attempts": "2", "Landed": "0", "Came back": "1", "Failed": "1", "Worked": "10m", "Idle": "5m",
         "Session ends": "1"},
    ]


def test_each_bar_has_its_place_on_the_time_axis(busy):
    page = busy.page()
    bars = [attributes for attributes, text in page.all("rect") if text and attributes["class"] != "quiet"]
    assert all(float(bar["x"]) >= 96 and float(bar["width"]) >= 2 and float(bar["x"]) + float(bar["width"]) <= 975 for bar in bars)
    first, second = (next(float(bar["width"]) for bar, text in page.all("rect") if text == words)
                     for words in ("t-0001: landed, 10m", "t-0002: landed, 2m"))
    assert first == pytest.approx(5 * second, abs=0.5)


def test_causes_say_what_happened_to_whom(busy):
    rows = busy.page().table("Like reasons")
    assert {(row["Cause"], row["What happened"], row["Times"]) for row in rows} == {
        ("It conflicts with main", "came back", "1"), ("The gate fails with it", "came back", "1"),
        ("The agent ended without any change", "attempt failed", "1"), ("Crashed with exit code 1", "session ended", "1")}


def test_like_causes_are_counted_together(story):
    for number in range(2):
        story.add(f"task {number}")
        story.fail(story.claim(f"agent-00{number + 1}"), f"agent-00{number + 1} died (pid {4000 + number} is gone)", retry=False)
    story.add("another")
    story.fail(story.claim(A), "no disk: 3 of 7", retry=False)
    rows = story.page().table("Like reasons")
    assert [(row["Cause"], row["Times"], row["Which"].replace("\u2011", "-")) for row in rows] == [
        ("The agent died (pid \u2026 is gone)", "2", "t-0001, t-0002"), ("No disk", "1", "t-0003")]


def test_gate_runs_are_held_against_one_for_each_submission(story):
    story.add(*(f"task {number}" for number in range(5)))
    for number in range(1, 6):
        story.submit(story.claim(f"agent-00{number}"))
    ids = [f"t-000{number}" for number in range(1, 6)]
    story.gate(30, "green", *ids)
    for task_id in ids:
        story.land(task_id)
    assert "1 gate run (1 green) took 30s in all. One by one it would have been 5" in story.page().words()
    assert "4 saved." in story.page().words()


def test_a_conflict_would_have_cost_no_gate_run(story):
    story.add("one")
    story.submit(story.claim(A))
    story.gate(30, "green", "t-0001")
    story.bring_back("t-0001", "it conflicts with main in a.txt")
    assert "it would have been 0" in story.page().words() and "1 more." in story.page().words()


def test_a_submission_that_no_gate_saw_would_have_cost_none(story):
    story.add("one")
    story.submit(story.claim(A))
    story.gate(30, "red", "t-0001")
    story.bring_back("t-0001", "the gate fails with it: make test")
    story.now += 60
    story.submit(story.claim(A))
    story.bring_back("t-0001", "its commit is gone (cccccccccc)")
    assert "it would have been 1," in story.page().words()


def test_a_gate_that_was_ended_early_is_a_run_all_the_same(story):
    story.add("one")
    story.event("gate-started", ids=["t-0001"], tree="t", slot=1)
    story.now += 10
    story.gate(30, "green", "t-0002")
    assert "2 gate runs (1 ended early, 1 green) took 30s" in story.page().words()


def test_a_gate_of_a_merger_that_is_gone_is_no_more_than_a_mark(story):
    story.add("one")
    story.event("gate-started", ids=["t-0001"], tree="t", slot=1)
    story.now += 600
    story.add("two")
    story.claim(A)
    story.submit(story.claim(A))
    assert ("cut", "target with t-0001: ended early, 0s") in story.page().bars()


def test_work_that_goes_on_is_drawn_until_now(story):
    story.add("one")
    story.claim(A)
    story.now += 7200
    assert story.page().bars() == [("open", "t-0001: not finished, 2h00")]


def test_work_of_a_dead_owner_is_drawn_until_the_last_event(story):
    story.owner = story.owner._replace(start="1")
    story.add("one")
    story.claim(A)
    story.now += 60
    story.event("session-ended", agent=A, cause="its session is gone")
    story.now += 7200
    assert story.page().bars() == [("open", "t-0001: not finished, 1m")]


def test_a_quiet_night_is_cut_out(busy):
    busy.now += 14 * 3600
    busy.submit(busy.claim(A))
    page = busy.page()
    assert ("quiet", "nothing happened for 14h00") in page.bars()
    assert "nothing happened, cut out" in page.words()


def spend(busy, agent: str, task: str, cost: float, tokens: int = 1000, **fields) -> None:
    line = {"at": toolkit.utc(busy.now), "task": task, "agent": agent, "attempt": 1, "fence": f"{task}.{cost}", "preset": "claude",
            "tokens_in": tokens, "tokens_out": 0, "cost_usd": cost, **fields}
    with open(busy.store.path("usage.jsonl"), "a") as file:
        file.write(json.dumps(line) + "\n")


def test_cost_is_told_where_it_is_known(busy):
    assert "Cost" not in busy.page().words()
    spend(busy, A, "t-0002", 0.25), spend(busy, A, "t-0001", 1.5)
    page = busy.page()
    assert page.totals()["Cost"] == "$1.75 2,000 tokens, where agents said it"
    assert page.table("The same in numbers")[0]["Cost"] == "$1.75"
    assert page.table("Failed ones first")[1]["Cost"] == "$1.50"


def test_a_resumed_conversation_costs_once(busy):
    spend(busy, A, "t-0001", 1.5, conversation="c")
    spend(busy, A, "t-0001", 2.5, conversation="c")
    assert busy.page().totals()["Cost"].startswith("$2.50")


def test_where_only_tokens_are_known_they_are_told(busy):
    spend(busy, A, "t-0001", 0.0, 2_500_000)
    assert busy.page().totals()["Cost"].startswith("2.5M tokens")


def strips(page, kind: str) -> list[str]:
    return [text for attributes, text in page.all("path", **{"class": kind}) if text]


def test_times_of_waiting_for_a_person_are_drawn_and_counted(busy):
    busy.add("five")
    busy.add("six")
    busy.submit(busy.claim(B, "t-0005"))
    claim = busy.claim(B, "t-0006")
    busy.event("agent-waits", agent=B, why="May I?", id="t-0006")
    busy.now += 100
    busy.land("t-0005")
    busy.now += 200
    busy.event("agent-goes-on", agent=B, why="", id="t-0006")
    busy.submit(claim)
    page = busy.page()
    assert strips(page, "waits") == ["waited for a person, 5m"]
    assert page.table("The same in numbers")[1]["Waited for a person"] == "5m"
    assert "waited for a person" in page.all("figcaption")[0][1]


def test_the_time_from_submit_to_landing_is_drawn_on_the_agents_row(busy):
    assert "t-0001 work being gated and merged, 2m" in strips(busy.page(), "merging")


def test_a_session_that_started_again_is_marked(busy):
    busy.event("session-started", agent=A)  # seen late, after its first claim
    busy.event("session-started", agent=B)
    page = busy.page()
    assert "session started again" in page.all("figcaption")[0][1]
    assert [row["Restarts"] for row in page.table("The same in numbers")] == ["", "1"]


@pytest.mark.parametrize(("url", "link"), [
    ("git@github.com:ada/engine.git", "https://github.com/ada/engine/commit/"),
    ("https://user:secret@github.com/ada/engine", "https://github.com/ada/engine/commit/"),
    ("ssh://git@gitlab.example.org:2222/a/b/c.git", "https://gitlab.example.org/a/b/c/-/commit/"),
    ("https://bitbucket.org/ada/engine.git", "https://bitbucket.org/ada/engine/commits/"),
    ("https://codeberg.org/ada/engine/", "https://codeberg.org/ada/engine/commit/"),
    ("git@git.sr.ht:~ada/engine", "https://git.sr.ht/~ada/engine/commit/"),
    ("https://example.org/ada/engine.git", None), ("/srv/github/engine.git", None), ("work-github:ada/engine", None),
    ("javascript:alert(1)//github.com/x", None), ("https://github.com/a\"onclick=\"x/b", None),
])
def test_a_commit_leads_to_a_known_forge_and_nowhere_else(busy, url, link):
    git(busy.repo, "config", "remote.origin.url", url)
    page = busy.page()
    assert [attributes["href"] for attributes, _ in page.all("a")] == ([link + "a" * 40, link + "b" * 40] if link else [])
    assert "secret" not in page.text
    assert ("git show " + "a" * 10 in page.words()) == (link is None)


# ---------------------------------------------------------------------------------------------- damage


def test_a_torn_last_line_is_counted_and_said(busy):
    busy.write_line('{"at": "2026-03-01T12:30:00Z", "event": "lan')
    assert "1 line of events.jsonl could not be read" in busy.page().words()


@pytest.mark.parametrize("line", ["no json", "[1]", "7", '"text"', "null", '{"event": "landed"}', '{"at": 5, "event": "x"}',
                                  '{"at": "never", "event": "x"}', '{"at": "2026-03-01T12:00:00Z", "event": 5}', "[" * 100_000,
                                  b"\xff\xfe", b"\0\0"])
def test_a_line_that_is_no_event_is_counted_and_passed_over(busy, line):
    whole = busy.page().table("Failed ones first")
    busy.write_line(b"\n\n" + (line.encode() if isinstance(line, str) else line) + b"\n")
    page = busy.page()
    assert "1 line of events.jsonl could not be read" in page.words()
    assert page.table("Failed ones first") == whole


def test_nothing_is_said_of_lines_when_all_can_be_read(busy):
    assert "could not be read" not in busy.page().words()


def test_a_lost_end_of_an_attempt_is_made_good_by_the_next_claim(story):
    story.add("one")
    for _ in range(2):
        story.store.append_event("claimed", toolkit.Task(id="t-0001", title="one", state="claimed", agent=A), agent=A)
        story.now += 60
    story.event("session-ended", agent=A, cause="done")
    assert story.page().bars() == [("cut", "t-0001: ended early, 1m"), ("open", "t-0001: not finished, 1m")]


def test_a_damaged_queue_file_is_said_and_the_rest_is_shown(busy, capsys):
    Path(busy.store.path("task_queue", "pending.json")).write_text("{")
    target = busy.repo / "page.html"
    assert toolkit.main(["--repo", str(busy.repo), "report", "-o", str(target)]) == toolkit.DamagedState.exit_code
    page = Page(target.read_text(encoding="utf-8"))
    assert "pending.json" in capsys.readouterr().err
    assert "pending.json, line 1" in page.all("p", **{"class": "note"})[0][1]
    assert [row["Task"] for row in page.table("Failed ones first")] == ["t-0001", "t-0002"]


SHORT = st.text(max_size=5)
ODD = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | SHORT,
                   lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SHORT, inner, max_size=2), max_leaves=4)
KINDS = st.sampled_from(["claimed", "submitted", "landed", "returned", "attempt-failed", "owner-died", "gate-started", "gate-ended",
                         "session-ended", "session-started", "added", "new-kind", "gate-", "session-"])
TASKS = st.fixed_dictionaries({}, optional={"id": st.sampled_from(["t-0001", A, "gate 1", ""]) | ODD, "agent": ODD, "state": ODD})
EVENTS = st.fixed_dictionaries({"event": KINDS}, optional={
    "task": TASKS | ODD, "agent": st.sampled_from([A, B]) | ODD, "why": ODD, "cause": ODD, "cost_usd": ODD, "colour": ODD,
    "ids": st.lists(ODD, max_size=3) | ODD, "slot": st.integers(1, 2) | ODD})


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from([0, 1, 60, 86400, 4e9]), EVENTS), min_size=1, max_size=12), st.booleans())
def test_no_event_however_odd_breaks_the_page(moments, is_live):
    history = toolkit.History()
    for at, event in sorted(moments, key=lambda moment: moment[0]):
        history.fold(NOON + at, event)
    history.finish(NOON, is_live)
    Page("<main>" + toolkit.say_totals(history, []) + toolkit.say_pictures(history) + toolkit.say_gates(history)
         + toolkit.say_causes(history) + "</main>")


# ---------------------------------------------------------------------------------------------- foreign text


@pytest.fixture
def hostile(story) -> Story:
    """Every field that comes from outside tries to break out."""
    story.add(EVIL, EVIL)
    story.submit(story.claim(A))
    story.fail(story.claim(A), EVIL, retry=False)
    story.event("session-ended", agent=EVIL, cause=EVIL)
    story.event("gate-started", ids=[EVIL], tree=EVIL, slot=EVIL)
    story.event("gate-ended", ids=[EVIL], tree=EVIL, slot=EVIL, colour=EVIL)
    story.store.append_event("claimed", toolkit.Task(id=EVIL, title=EVIL, agent=EVIL, state=EVIL), agent=EVIL)
    story.store.write_durably(toolkit.FARM_FILE, json.dumps({"settings": {"into": EVIL, "remote": EVIL}}).encode())
    return story


def test_foreign_text_makes_no_element_of_its_own(hostile):
    page = hostile.page()
    assert [text.strip() for _, text in page.all("script")] == [toolkit.PAGE_SCRIPT.strip()]
    assert not [name for _, attributes, _ in page.elements for name in attributes if name.startswith("on")]


def test_foreign_text_is_shown_as_it_is(hostile):
    row = hostile.page().table("Failed ones first")[0]
    assert row["Title, and why it last came back"].startswith('<script>alert(1)</script> & "quoted" red bell')


def test_no_control_character_reaches_the_page(hostile):
    assert not re.findall("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", hostile.page().text)


def test_the_direction_of_a_title_stays_its_own(hostile):
    assert all("\u202e" not in text for attributes, text in hostile.page().all("h1"))
    assert [text for _, text in hostile.page().all("bdi") if "\u202e" in text]


# ---------------------------------------------------------------------------------------------- the page as such


def test_the_page_loads_nothing(busy):
    git(busy.repo, "config", "remote.origin.url", "git@github.com:ada/engine.git")
    page = busy.page()
    for name, attributes, _ in page.elements:
        assert not {"src", "srcset", "data", "poster", "background", "action", "xlink:href"} & set(attributes), (name, attributes)
        assert name == "a" or attributes.get("href", "data:,") == "data:,"
    outside_links = re.sub(r'<a href="[^"]*"', "<a", page.text)
    assert not re.search(r"https?://|//[a-z]|@import|url\((?!#)", outside_links.replace("</", ""))


def test_the_policy_allows_the_pages_own_script_and_no_other(busy):
    page = busy.page()
    policy = next(attributes["content"] for attributes, _ in page.all("meta") if attributes.get("http-equiv"))
    digest = hashlib.sha256(re.search("<script>(.*)</script>", page.text, re.DOTALL)[1].encode()).digest()
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in policy


def test_ids_are_unique_and_every_reference_has_one(busy):
    page = busy.page()
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    named = [name for _, attributes, _ in page.elements for name in attributes.get("aria-labelledby", "").split()]
    assert len(ids) == len(set(ids))
    assert set(named) | set(re.findall(r"url\(#(\w+)\)", page.text)) <= set(ids)


def test_headings_come_in_order(busy):
    levels = [int(name[1]) for name, _, _ in busy.page().elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and set(levels[1:]) == {2}


def test_every_picture_has_a_name_and_a_description(busy):
    pictures = [attributes for attributes, _ in busy.page().all("svg") if attributes.get("aria-hidden") != "true"]
    assert len(pictures) == 3
    assert all(picture["role"] == "img" and len(picture["aria-labelledby"].split()) == 2 for picture in pictures)


def test_every_table_has_a_caption_and_heads_with_a_scope(busy):
    page = busy.page()
    assert len(page.all("caption")) == len(page.all("table")) == 3
    assert {attributes.get("scope") for attributes, _ in page.all("th")} == {"col", "row"}


def test_what_scrolls_can_be_reached_with_the_keyboard_and_has_a_name(busy):
    regions = [attributes for attributes, _ in busy.page().all("div", **{"class": "wide"})]
    assert regions and all(region["tabindex"] == "0" and region["role"] == "region" and region["aria-label"] for region in regions)


def test_each_outcome_in_the_timeline_is_in_the_legend(busy):
    page = busy.page()
    legend = page.all("figcaption")[0][1]
    assert all(toolkit.FATES[fate] in legend for fate, _ in page.bars())


def test_times_are_local_in_text_and_utc_in_their_attribute(busy, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    page = busy.page()
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    assert page.all("time")[0] == ({"datetime": "2026-03-01T12:00:00Z", "data-cut": "0 16"}, "2026-03-01 21:00")
    assert "times in JST" in page.words()


def test_fifty_agents_and_five_hundred_tasks_make_a_small_page_at_once(story, monkeypatch):
    tasks = [toolkit.Task(id=f"t-{number:04d}", title=f"task {number} " + "x" * 60, prompt="p" * 1000, seq=number)
             for number in range(1, 501)]
    lines, landed = [], []

    def note(kind: str, task: toolkit.Task | None = None, **details) -> None:
        record = {"at": toolkit.utc(story.now), "event": kind, **details, **({"task": task.to_json()} if task else {})}
        lines.append(json.dumps(record))

    for number, added in enumerate(tasks):
        agent = f"agent-{number % 50 + 1:03d}"
        task = added._replace(agent=agent, state="claimed")
        for attempt in range(2):
            note("claimed", task, agent=agent)
            story.now += 20
            note("submitted", task._replace(state="ready"))
            note("gate-started", ids=[task.id], tree="t" * 40, slot=number % 4)
            note("gate-ended", ids=[task.id], tree="t" * 40, slot=number % 4, colour="red", seconds=1.0)
            if not attempt:
                note("returned", task._replace(state="pending"), why="the gate fails with it: make test")
        landed.append(task._replace(state="landed", landed_commit="a" * 40, landed_at=toolkit.utc(story.now), reason="r" * 80))
        note("landed", landed[-1])
    with story.store.transaction() as tx:
        tx.state.landed.update((task.id, task) for task in landed)
        tx.write("ready")
    story.write_line("\n".join(lines) + "\n")
    started = time.monotonic()
    page, problems = toolkit.report_page(story.store)
    assert time.monotonic() - started < 2
    assert len(page.encode()) < 1_500_000 and not problems
    assert len(Page(page).table("Failed ones first")) == 500


# ---------------------------------------------------------------------------------------------- in a browser


def read_png(path: Path) -> tuple[int, int, list[bytes]]:
    """(width, bytes a pixel, rows) of an 8-bit PNG."""
    data, chunks, place = path.read_bytes(), b"", 8
    width, _, depth, colour = struct.unpack(">IIBB", data[16:26])
    assert depth == 8
    size = {2: 3, 6: 4}[colour]
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place:place + 8])
        chunks += data[place + 8:place + 8 + length] if kind == b"IDAT" else b""
        place += length + 12
    raw, rows = zlib.decompress(chunks), [bytes(width * size)]
    for start in range(0, len(raw), width * size + 1):
        row, above = bytearray(raw[start + 1:start + 1 + width * size]), rows[-1]
        unfilter = PNG_FILTERS.get(raw[start])
        for index in range(len(row) if unfilter else 0):
            left, corner = (row[index - size], above[index - size]) if index >= size else (0, 0)
            row[index] = (row[index] + unfilter(left, above[index], corner)) & 255
        rows.append(bytes(row))
    return width, size, rows[1:]


def browse(page: Path, *options: str, **environment: str) -> str:
    """What headless Chromium prints about a page; skips the test where there is none."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium here (apt install chromium)")
    profile = page.parent / "browser"
    done = run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                "--disable-component-update", "--disable-sync", "--hide-scrollbars", f"--user-data-dir={profile}",
                "--window-size=800,500", *options, page.as_uri()], env=environment, timeout=120)
    shutil.rmtree(profile, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("options", "is_dark"), [((), False), (("--force-dark-mode",), True)])
def test_a_browser_shows_the_page_in_light_and_dark(busy, options, is_dark):
    busy.page()
    picture = busy.repo / "picture.png"
    browse(busy.repo / "page.html", f"--screenshot={picture}", *options)
    width, size, rows = read_png(picture)
    colours = Counter(row[index:index + 3] for row in rows for index in range(0, width * size, size))
    paper, amount = colours.most_common(1)[0]
    assert amount > 0.6 * width * len(rows) and len(colours) > 100, "blank"
    assert (max(paper) < 64) if is_dark else (min(paper) > 240)


def test_a_browser_runs_the_pages_script_and_says_times_in_the_readers_zone(busy):
    busy.page()
    page = Page(re.sub(r"^.*?(?=<html)", "", browse(busy.repo / "page.html", "--dump-dom", TZ="Asia/Tokyo"), flags=re.DOTALL))
    assert "times in Asia/Tokyo" in page.words()
    assert page.all("time")[0][1] == "2026-03-01 21:00"


def test_a_browser_prints_the_page_on_few_sheets(busy):
    busy.page()
    sheets = busy.repo / "page.pdf"
    browse(busy.repo / "page.html", f"--print-to-pdf={sheets}", "--no-pdf-header-footer")
    data = sheets.read_bytes()
    assert data.startswith(b"%PDF") and 1 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 3
