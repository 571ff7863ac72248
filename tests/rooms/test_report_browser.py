"""The page of `report` in a real browser: what its script draws, how it looks, prints and fits."""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections import Counter
from pathlib import Path

import pytest
from farm_calls import A, B
from report_story import ALL_TASKS, browse, make_hostile, see
from sandbox import git

PNG_FILTERS = {
    1: lambda left, up, corner: left,
    2: lambda left, up, corner: up,
    3: lambda left, up, corner: (left + up) // 2,
    4: lambda left, up, corner: min((left, up, corner),
                                    key=lambda near: abs(left + up - corner - near)),
}


# ---------------------------------------------------------------------------------- what is drawn


def test_the_totals_are_worded(busy):
    assert busy.seen().totals() == {
        "Landed": "2 of 4 tasks", "Not finished": "1 0 in the merge queue",
        "Failed": "1 and 0 canceled", "Came back": "2 and 1 failed attempt",
        "Work": "27m in 5 attempts", "Gate runs": "3 0 saved"}


def test_the_timeline_has_a_bar_for_each_attempt_and_gate_run(busy):
    page = busy.seen()
    assert Counter(page.bars()) == Counter([
        ("landed", "t-0001: landed, 10m"), ("returned", "t-0002: came back, 10m"),
        ("returned", "t-0003: came back, 5m"), ("failed", "t-0004: failed, 0s"),
        ("landed", "t-0002: landed, 2m"), ("red", "target with t-0001, t-0002: red, 1m"),
        ("green", "target with t-0001: green, 1m"), ("green", "target with t-0002: green, 1m")])
    labels = [text for _, text in page.all("text", **{"class": "e"})]
    assert labels[:3] == [A, B, "gate 1"]
    assert [text for _, text in page.all("path", **{"class": "end"}) if text] == ["session ended"]
    assert "t-0001 work being gated and merged, 2m" in page.strips("merging")


def test_each_bar_has_its_place_on_the_time_axis(busy):
    page = busy.seen()
    bars = {text: (float(bar["x"]), float(bar["width"])) for bar, text in page.all("rect")
            if text and bar["class"] != "quiet"}
    assert len(bars) == 8
    assert all(x >= 96 and width >= 2 and x + width <= 975 for x, width in bars.values())
    assert bars["t-0001: landed, 10m"][1] == pytest.approx(5 * bars["t-0002: landed, 2m"][1],
                                                           abs=0.5)
    ticks = [(float(tick["x"]), text) for tick, text in page.all("text", **{"class": "m"})]
    assert (96.0, "12:00") in ticks and "12:05" in dict(map(reversed, ticks))


def test_each_outcome_in_the_timeline_is_in_the_legend(busy):
    page = busy.seen()
    legend = page.all("figcaption")[0][1]
    outcomes = {words.rpartition(": ")[2].partition(",")[0] for _, words in page.bars()}
    assert outcomes and all(outcome in legend for outcome in outcomes)


def test_the_numbers_of_the_agents_are_those_of_the_timeline(busy):
    assert busy.seen().table("The same in numbers") == [
        {"Agent": A, "Attempts": "3", "Landed": "2", "Came back": "1", "Failed": "0",
         "Worked": "17m", "Idle": "2m", "Session ends": "0"},
        {"Agent": B, "Attempts": "2", "Landed": "0", "Came back": "1", "Failed": "1",
         "Worked": "10m", "Idle": "5m", "Session ends": "1"}]


def test_the_queues_are_drawn_as_they_were(busy):
    page = busy.seen()
    words = [text for _, text in page.all("desc")]
    assert words[1:] == ["At most 2, at the end 0.", "At most 2, at the end 2."]
    grown = [path["d"] for path, _ in page.all("path", **{"class": "a"}) if "H972" in path["d"]]
    heights = [[float(y) for y in re.findall(r"V([\d.]+)", line)] for line in grown]
    assert min(heights[0]) == 26  # the most that ever waited reaches the top
    assert heights[1] == sorted(heights[1], reverse=True) and heights[1][-1] < 122


def test_a_row_of_the_table_of_tasks_says_all_of_it(busy):
    rows = busy.seen().table(ALL_TASKS)
    assert [row["Task"] for row in rows] == ["t-0004", "t-0001", "t-0002", "t-0003"]
    assert rows[2] == {
        "Task": "t-0002", "State": "\u25cf landed", "Title, and why it last came back": "two",
        "Agent": A, "Attempts": "2", "Worked": "12m", "Landed": "03-01 12:19",
        "Commit": "git show " + "b" * 10}
    assert rows[3]["Title, and why it last came back"] == (
        "threeit conflicts with main in src/a.py")


def test_causes_say_what_happened_to_whom(busy):
    rows = busy.seen().table("Like reasons")
    assert {(row["Cause"], row["What happened"], row["Times"]) for row in rows} == {
        ("It conflicts with main", "came back", "1"),
        ("The gate fails with it", "came back", "1"),
        ("The agent ended without any change", "attempt failed", "1"),
        ("Crashed with exit code 1", "session ended", "1")}


def test_like_causes_are_counted_together(story):
    for number in range(2):
        story.add(f"task {number}")
        claim = story.claim(f"agent-00{number + 1}")
        story.fail(claim, f"{claim.agent} died (pid {4000 + number} is gone)", retry=False)
    story.add("another")
    story.fail(story.claim(A), "no disk: 3 of 7", retry=False)
    rows = story.seen().table("Like reasons")
    assert [(row["Cause"], row["Times"], row["Which"].replace("\u2011", "-")) for row in rows] == [
        ("The agent died (pid \u2026 is gone)", "2", "t-0001, t-0002"), ("No disk", "1", "t-0003")]


def test_gate_runs_are_put_into_words(story):
    story.add("one")
    story.submit(story.claim(A))
    story.event("gate-started", ids=["t-0001"], tree="t", slot=1)
    story.now += 10
    story.gate(30, "green", "t-0001")
    story.bring_back("t-0001", "it conflicts with main in a.txt")
    assert ("2 gate runs (1 ended early, 1 green) took 30s in all. One by one it would have been 0"
            in story.seen().words())
    assert "2 more." in story.seen().words()


def test_a_quiet_night_is_cut_out_and_work_that_goes_on_is_open(busy):
    busy.now += 14 * 3600
    busy.claim(A)
    busy.event("agent-waits", agent=A, why="May I?", id="t-0003")
    busy.now += 300
    busy.event("session-started", agent=B)
    page = busy.seen()
    assert ("quiet", "nothing happened for 14h00") in page.bars()
    assert ("open", "t-0003: not finished, 5m") in page.bars()
    assert page.strips("waits") == ["waited for a person, 5m"]
    legend = page.all("figcaption")[0][1]
    assert all(words in legend for words in (
        "nothing happened, cut out", "waited for a person", "session started again"))
    rows = page.table("The same in numbers")
    assert [row["Waited for a person"] for row in rows] == ["5m", ""]
    assert [row["Restarts"] for row in rows] == ["", "1"]


def test_cost_is_shown_where_it_is_known(busy):
    busy.spend(A, "t-0002", 0.25), busy.spend(A, "t-0001", 1.5)
    page = busy.seen()
    assert page.totals()["Cost"] == "$1.75 2,000 tokens, where agents said it"
    assert page.table("The same in numbers")[0]["Cost"] == "$1.75"
    assert [row["Cost"] for row in page.table(ALL_TASKS)] == ["", "$1.50", "$0.25", ""]


def test_where_only_tokens_are_known_they_are_shown(busy):
    busy.spend(A, "t-0001", 0.0, 2_500_000)
    assert busy.seen().totals()["Cost"].startswith("2.5M tokens")


def test_a_commit_is_a_link_where_the_forge_is_known(busy):
    git(busy.repo, "config", "remote.origin.url", "git@github.com:ada/engine.git")
    address = "https://github.com/ada/engine/commit/"
    assert [link["href"] for link, _ in busy.seen().all("a")] == [
        address + "a" * 40, address + "b" * 40]


def test_an_empty_farm_has_a_whole_page(story):
    page = story.seen()
    assert page.totals()["Landed"] == "0 of 0 tasks"
    assert not page.bars() and "Invalid" not in page.words() and "NaN" not in page.words()


def test_foreign_text_runs_nothing_and_is_shown_as_it_is(story):
    page = make_hostile(story).seen()
    assert len(page.all("script")) == 2
    assert not [name for _, attributes, _ in page.elements for name in attributes
                if name.startswith("on")]
    title = page.table(ALL_TASKS)[0]["Title, and why it last came back"]
    assert title.startswith('<script>alert(1)</script> & "quoted" red bell')
    assert not re.findall("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\ud800-\udfff]",
                          page.words().replace("\u2028", " "))


def test_times_are_in_the_readers_zone(busy):
    page = busy.seen(TZ="Asia/Tokyo")
    assert "times in Asia/Tokyo" in page.words()
    assert page.all("time")[0] == ({"datetime": "2026-03-01T12:00:00Z"}, "2026-03-01 21:00")
    assert page.table(ALL_TASKS)[2]["Landed"] == "03-01 21:19"


# ---------------------------------------------------------------------------------- for everyone


def test_ids_are_unique_and_every_reference_has_one(busy):
    page = busy.seen()
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    named = [name for _, attributes, _ in page.elements
             for name in attributes.get("aria-labelledby", "").split()]
    assert len(ids) == len(set(ids))
    assert set(named) | set(re.findall(r"url\(#(\w+)\)", page.text)) <= set(ids)


def test_pictures_tables_and_what_scrolls_have_names(busy):
    page = busy.seen()
    pictures = [attributes for attributes, _ in page.all("svg")
                if attributes.get("aria-hidden") != "true"]
    assert len(pictures) == 3
    assert all(picture["role"] == "img" and len(picture["aria-labelledby"].split()) == 2
               for picture in pictures)
    assert len(page.all("caption")) == len(page.all("table")) == 3
    assert {attributes.get("scope") for attributes, _ in page.all("th")} == {"col", "row"}
    regions = [attributes for attributes, _ in page.all("div", **{"class": "wide"})]
    assert len(regions) == 6
    assert all(region["tabindex"] == "0" and region["role"] == "region" and region["aria-label"]
               for region in regions)


# ---------------------------------------------------------------------------------- how it looks


PROBE = """<script>
const place = (element) => element.getBoundingClientRect();
const totals = [...document.querySelectorAll("dl div")].map(place);
const edge = place(document.querySelector("main")).right + 1;
const scrolls = (element) => element.closest(".wide") && !element.matches(".wide");
parent.postMessage(JSON.stringify({
  width: innerWidth, scrolled: document.documentElement.scrollWidth, count: totals.length,
  rows: new Set(totals.map((total) => total.top)).size,
  bottom: Math.max(...totals.map((total) => total.bottom)),
  outside: [...document.querySelectorAll("main *")].filter((element) => !scrolls(element) &&
    place(element).right > edge).map((element) => element.outerHTML.slice(0, 80)),
}), "*");</script></body>"""


def measure(page: Path, width: int, height: int) -> dict:
    """What a script of the test's own measures on a screen of that size.

    In a frame: a window of Chromium is not narrower than 500 pixels.
    """
    copy, frame = page.with_name("copy.html"), page.with_name("frame.html")
    text = re.sub("<meta http-equiv[^>]*>", "", page.read_text())
    copy.write_text(text.replace("</body>", PROBE))
    frame.write_text(
        "<html><body><script>onmessage = ({ data }) => document.body.dataset.measured = data"
        f"</script><iframe src='copy.html' style='border:0' width={width} height={height}>"
        "</iframe></body></html>")
    seen = see(frame, "--virtual-time-budget=5000")
    return json.loads(seen.all("body")[0][0]["data-measured"])


@pytest.mark.parametrize("with_cost", [False, True])
def test_the_first_screen_has_the_totals_in_one_row(busy, with_cost):
    if with_cost:
        busy.spend(A, "t-0001", 1234.5, 2_500_000)
    page = busy.write_page()
    for width, height in ((1280, 800), (1000, 660)):
        found = measure(page, width, height)
        assert found["width"] == width
        assert (found["count"], found["rows"]) == (6 + with_cost, 1)
        assert found["bottom"] < height / 2


@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_nothing_is_wider_than_the_screen(busy, size):
    busy.add("An-uncommonly-long-word-without-a-place-to-break-" * 4)
    found = measure(busy.write_page(), *size)
    assert found["width"] == size[0]
    assert found["scrolled"] <= size[0] and found["outside"] == []


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


@pytest.mark.parametrize(("options", "is_dark"), [((), False), (("--force-dark-mode",), True)])
def test_a_browser_shows_the_page_in_light_and_dark(busy, options, is_dark):
    picture = busy.repo / "picture.png"
    browse(busy.write_page(), f"--screenshot={picture}", *options)
    width, size, rows = read_png(picture)
    colours = Counter(row[index:index + 3] for row in rows
                      for index in range(0, width * size, size))
    paper, amount = colours.most_common(1)[0]
    assert amount > 0.6 * width * len(rows) and len(colours) > 100, "blank"
    assert (max(paper) < 64) if is_dark else (min(paper) > 240)


def test_a_browser_prints_the_page_on_few_sheets(busy):
    sheets = busy.repo / "page.pdf"
    browse(busy.write_page(), f"--print-to-pdf={sheets}", "--no-pdf-header-footer")
    data = sheets.read_bytes()
    assert data.startswith(b"%PDF") and 1 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 3


def test_without_a_script_the_page_is_whole_too(busy):
    page = busy.write_page()
    text = page.read_text()
    page.write_text(text[:text.index("<script>")] + "</body></html>")
    seen = see(page)
    assert seen.totals()["Landed"] == "2 of 4 tasks" and len(seen.table(ALL_TASKS)) == 4
