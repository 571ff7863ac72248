"""For the tests of `report`: a farm whose moves are made in no time, and a page read back."""

from __future__ import annotations

import html.parser
import json
import os
import shutil
from pathlib import Path

import pytest
from farm_calls import A, B
from sandbox import run

import farm as toolkit

NOON = 1_772_366_400.0  # 2026-03-01T12:00:00Z
VOID = {"meta", "link", "br"}
EVIL = ("<script>alert(1)</script> & \"quoted\" \x1b[31mred\x1b[0m bell\x07 \x85 tab\there\nline "
        "\u2028 \u202eend <!-- <script> {{name}} {{document}}")


class Page(html.parser.HTMLParser):
    """A parsed page; fails on a tag that is not closed in order.

    elements: (name, attributes, texts below it).
    """

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
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for _, _, texts in self.open:
            texts.append(data)

    def all(self, tag: str, **wanted: str) -> list[tuple[dict, str]]:
        """(attributes, text) of every element of that name with these attributes."""
        return [(attributes, "".join(texts).strip()) for name, attributes, texts in self.elements
                if name == tag and all(attributes.get(key) == wanted[key] for key in wanted)]

    def words(self) -> str:
        """The text that a reader sees, as one line."""
        return " ".join("".join(self.all("main")[0][1]).split())

    def table(self, caption: str) -> list[dict]:
        """The rows of one table, each a dict by column head."""
        rows, is_in = [], False
        for name, _, texts in self.elements:
            text = " ".join("".join(texts).split())
            if name == "table":
                is_in = text.startswith(caption)
            elif is_in and name == "tr":
                rows.append([])
            elif is_in and name in ("th", "td"):
                rows[-1].append(text)
        heads = rows.pop(0) if rows else []
        return [dict(zip(heads, row, strict=True)) for row in rows]

    def totals(self) -> dict[str, str]:
        """Name -> number and words beside it."""
        values = (" ".join(text.split()) for _, text in self.all("dd"))
        return dict(zip((text for _, text in self.all("dt")), values, strict=True))

    def bars(self) -> list[tuple[str, str]]:
        """(class, tooltip) of each bar of the timeline that is drawn."""
        pairs = zip(self.elements, self.elements[1:], strict=False)
        return [(bar[1]["class"], "".join(tip[2])) for bar, tip in pairs
                if (bar[0], tip[0]) == ("rect", "title")]

    def strips(self, kind: str) -> list[str]:
        """Tooltips of the lines above or below a bar."""
        return [text for _, text in self.all("path", **{"class": kind}) if text]


class Story:
    """A farm whose moves are really made, on a clock that the test sets; git is left out."""

    def __init__(self, repo: Path, monkeypatch: pytest.MonkeyPatch):
        self.repo, self.now = repo, NOON
        monkeypatch.setattr(toolkit.CLOCK, "now", lambda: self.now)
        self.store = toolkit.Store(str(repo))
        self.owner = toolkit.identify(os.getpid())

    def add(self, *titles: str, **fields) -> None:
        with self.store.transaction() as tx:
            tasks = [toolkit.Task(title=title, **fields) for title in titles]
            toolkit.TaskQueue(tx).add(tasks, 3)

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
            tx.move(task._replace(state="landed", landed_commit=commit, reason="",
                                  landed_at=toolkit.utc(self.now)), "landed", "landed")

    def bring_back(self, task_id: str, reason: str) -> None:
        with self.store.transaction() as tx:
            task = tx.state.ready[task_id]
            toolkit.TaskQueue(tx).give_back(task, reason, "return", start="refs/farm/returned/x")

    def event(self, kind: str, **details) -> None:
        self.store.append_event(kind, None, **details)

    def gate(self, seconds: float, colour: str, *ids: str, slot: int = 1) -> None:
        self.event("gate-started", ids=list(ids), tree="t", slot=slot)
        self.now += seconds
        self.event("gate-ended", ids=list(ids), tree="t", slot=slot, colour=colour, exit_code=0,
                   seconds=seconds, note="")

    def write_line(self, line: str | bytes) -> None:
        with open(self.store.path("events.jsonl"), "ab") as file:
            file.write(line.encode() if isinstance(line, str) else line)

    def spend(self, agent: str, task: str, cost: float, tokens: int = 1000, **fields) -> None:
        line = {"at": toolkit.utc(self.now), "task": task, "agent": agent, "attempt": 1,
                "fence": f"{task}.{cost}", "preset": "claude", "tokens_in": tokens,
                "tokens_out": 0, "cost_usd": cost, **fields}
        with open(self.store.path("usage.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")

    def document(self) -> dict:
        """What `report --json` prints."""
        target = self.repo / "report.json"
        args = ["--repo", str(self.repo), "report", "--json", "-o", str(target)]
        assert toolkit.main(args) == 0
        return json.loads(target.read_text(encoding="utf-8"))

    def write_page(self) -> Path:
        """The page, written by the verb."""
        target = self.repo / "page.html"
        assert toolkit.main(["--repo", str(self.repo), "report", "-o", str(target)]) == 0
        return target

    def page(self) -> Page:
        """The page as it is without its script."""
        return Page(self.write_page().read_text(encoding="utf-8"))

    def seen(self, **environment: str) -> Page:
        """The page as a browser shows it."""
        return see(self.write_page(), **environment)


def make_busy(story: Story) -> Story:
    """Two agents, four tasks: one lands at once, one after a red gate, one conflicts, one fails."""
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


def make_hostile(story: Story) -> Story:
    """Every field that comes from outside tries to break out."""
    story.add(EVIL, EVIL)
    story.submit(story.claim(A))
    story.fail(story.claim(A), EVIL, retry=False)
    story.event("session-ended", agent=EVIL, cause=EVIL)
    story.event("gate-started", ids=[EVIL], tree=EVIL, slot=EVIL)
    story.event("gate-ended", ids=[EVIL], tree=EVIL, slot=EVIL, colour=EVIL)
    task = toolkit.Task(id=EVIL, title=EVIL, agent=EVIL, state=EVIL)
    story.store.append_event("claimed", task, agent=EVIL)
    told = json.dumps({"settings": {"into": EVIL, "remote": EVIL}})
    story.store.write_durably(toolkit.FARM_FILE, told.encode())
    return story


def browse(page: Path, *options: str, **environment: str) -> str:
    """What headless Chromium prints about a page; skips the test where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("there is no Chromium here (apt install chromium)")
    profile = page.parent / "browser"
    size = () if any(option.startswith("--window-size") for option in options) else (
        "--window-size=800,500",)
    done = run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--hide-scrollbars", f"--user-data-dir={profile}", *size, *options,
                page.as_uri()], env=environment, timeout=120)
    shutil.rmtree(profile, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def see(page: Path, *options: str, **environment: str) -> Page:
    """The page as Chromium has it once its script has run."""
    return Page("<html" + browse(page, "--dump-dom", *options, **environment).partition("<html")[2])


ALL_TASKS = "Failed ones first"


def at(minutes: float) -> str:
    """The time so long after the story's begin."""
    return toolkit.utc(NOON + 60 * minutes)
