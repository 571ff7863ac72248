"""The page of `report` as it is without its script: foreign text, and what it holds."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time

from farm_calls import A
from paths import ROOT
from report_story import ALL_TASKS, EVIL, Page, at
from sandbox import git

import farm as toolkit

# ---------------------------------------------------------------------------------------------- foreign text


def test_foreign_text_makes_no_element_of_its_own(hostile):
    page = hostile.page()
    (_, data), (_, script) = page.all("script")
    assert script in (ROOT / "scripts" / "report.html").read_text()
    assert json.loads(data)["tasks"][0]["title"].startswith("<script>alert(1)</script>")
    assert not [name for _, attributes, _ in page.elements for name in attributes
                if name.startswith("on")]


def test_the_embedded_document_cannot_end_its_element_or_open_another(hostile):
    data = hostile.page().all("script", type="application/json")[0][1]
    assert not re.search("<|\u2028|\u2029", data) and "alert(1)" in data


def test_foreign_text_is_shown_as_it_is(hostile):
    row = hostile.page().table(ALL_TASKS)[0]
    assert row["Title"].startswith('<script>alert(1)</script> & "quoted" red bell')
    assert row["Title"].endswith("{{name}} {{document}}")


def test_no_control_character_reaches_the_page(hostile):
    forbidden = "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    assert not re.findall(forbidden, hostile.page().text)


def test_the_direction_of_a_title_stays_its_own(hostile):
    assert all("\u202e" not in text for attributes, text in hostile.page().all("h1"))
    assert [text for _, text in hostile.page().all("bdi") if "\u202e" in text]
    assert "\u202e" in EVIL


# ---------------------------------------------------------------------------------------------- the page


def test_without_its_script_the_page_has_the_totals(busy):
    assert busy.page().totals() == {
        "Landed": "2 of 4 tasks", "Not finished": "1 0 in the merge queue",
        "Failed": "1 and 0 canceled", "Came back": "2 and 1 failed attempts",
        "Work": "27m in 5 attempts", "Gate runs": "3 one by one it would have been 3",
        "Cost": "$0 0 tokens in, 0 out, where agents said it"}


def test_without_its_script_the_page_has_every_task(busy):
    assert busy.page().table(ALL_TASKS)[2:] == [
        {"Task": "t-0002", "State": "landed", "Title": "two", "Why it last came back": "",
         "Agent": A, "Attempts": "2", "Landed": at(19), "Commit": "b" * 40},
        {"Task": "t-0003", "State": "pending", "Title": "three",
         "Why it last came back": "it conflicts with main in src/a.py", "Agent": A,
         "Attempts": "1", "Landed": "", "Commit": ""}]


def test_the_page_loads_nothing(busy):
    git(busy.repo, "config", "remote.origin.url", "git@github.com:ada/engine.git")
    page = busy.page()
    loading = {"src", "srcset", "data", "poster", "background", "action", "xlink:href"}
    for name, attributes, _ in page.elements:
        assert not loading & set(attributes), (name, attributes)
        assert name == "a" or attributes.get("href", "data:,") == "data:,"
    text = page.text.replace("</", "")
    assert not re.search(r"https?://|//[a-z]|@import|url\((?!#)", text)


def test_the_policy_allows_the_pages_own_script_and_no_other(busy):
    page = busy.page()
    policy = next(attributes["content"] for attributes, _ in page.all("meta")
                  if attributes.get("http-equiv"))
    script = re.search("<script>(.*)</script>", page.text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert policy.count("script-src") == 1 and policy.endswith(f"script-src 'sha256-{digest}'")


def test_the_script_sets_text_only_as_text():
    source = (ROOT / "scripts" / "report.html").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(",
                         source)


def test_headings_come_in_order(busy):
    levels = [int(name[1]) for name, _, _ in busy.page().elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and set(levels[1:]) == {2}


def test_fifty_agents_and_five_hundred_tasks_make_a_small_page_at_once(story):
    tasks = [toolkit.Task(id=f"t-{number:04d}", title=f"task {number} " + "x" * 60,
                          prompt="p" * 1000, seq=number) for number in range(1, 501)]
    lines, landed = [], []

    def note(kind: str, task: toolkit.Task | None = None, **details) -> None:
        record = {"at": toolkit.utc(story.now), "event": kind, **details,
                  **({"task": task.to_json()} if task else {})}
        lines.append(json.dumps(record))

    for number, added in enumerate(tasks):
        agent = f"agent-{number % 50 + 1:03d}"
        task = added._replace(agent=agent, state="claimed")
        gate = {"ids": [task.id], "tree": "t" * 40, "slot": number % 4}
        for attempt in range(2):
            note("claimed", task, agent=agent)
            story.now += 20
            note("submitted", task._replace(state="ready"))
            note("gate-started", **gate)
            note("gate-ended", **gate, colour="red", seconds=1.0)
            if not attempt:
                note("returned", task._replace(state="pending"),
                     why="the gate fails with it: make test")
        landed.append(task._replace(state="landed", landed_commit="a" * 40, reason="r" * 80,
                                    landed_at=toolkit.utc(story.now)))
        note("landed", landed[-1])
    with story.store.transaction() as tx:
        tx.state.landed.update((task.id, task) for task in landed)
        tx.write("ready")
    story.write_line("\n".join(lines) + "\n")
    started = time.process_time()
    page = toolkit.report_page(toolkit.report_document(story.store))
    assert time.process_time() - started < 2
    assert len(page.encode()) < 1_500_000
    assert len(Page(page).table(ALL_TASKS)) == 500
    assert os.path.getsize(ROOT / "scripts" / "report.html") < 60_000
