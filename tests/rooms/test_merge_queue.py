"""The merge queue from outside: `farm.py merge` on real repos with scripted gates, and what it leaves behind.

Every entry is made by claim and submit; gates write a line a run to a file outside of all trees, so that runs can be counted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from merge_calls import AGENT, GITLINK, GREEN, Queue, branch_of, edited_line, forget_branch, new_file
from sandbox import commit_files, git, run, wait_until

import farm as toolkit

pytestmark = pytest.mark.usefixtures("no_gate_is_left")


# ---------------------------------------------------------------------------------------------- never red


BAD_ONES = {1, 4, 7}


def many_entries(queue: Queue) -> list[str]:
    return queue.ready_all([new_file(f"f{number}", "BAD\n" if number in BAD_ONES else "good\n") for number in range(9)])


@pytest.mark.parametrize("slots", [1, 4])
def test_every_value_of_the_target_passes_the_gate_and_exactly_the_bad_come_back(queue: Queue, slots: int) -> None:
    ids = many_entries(queue)
    queue.merge(slots=slots, code=5)
    states = queue.states()
    assert (queue.red_values(), {number for number, task_id in enumerate(ids) if states[task_id] != "landed"}) == ([], BAD_ONES)


def test_good_entries_that_are_many_take_few_gate_runs(queue: Queue) -> None:
    queue.ready_all([new_file(f"f{number}") for number in range(8)])
    queue.merge()
    assert len(queue.gated()) <= 2


# ---------------------------------------------------------------------------------------------- conflicts


def conflicting_with_main(queue: Queue) -> str:
    task_id = queue.ready({"words.txt": "mine\n"})
    commit_files(queue.repo, {"words.txt": "theirs\n"})
    return task_id


def test_a_conflict_with_the_target_comes_back_with_its_hunks(queue: Queue) -> None:
    task_id = conflicting_with_main(queue)
    queue.merge(code=5)
    text = queue.returned_text(task_id)
    assert re.search(r"<<<<<<<.*\n.*theirs\n(.*\n)*=======\n.*mine\n.*>>>>>>>", text), text


def test_a_conflict_with_the_target_spends_no_gate_run(queue: Queue) -> None:
    conflicting_with_main(queue)
    queue.merge(code=5)
    assert queue.gated() == []


def test_an_entry_that_conflicts_with_one_ahead_is_shown_held_behind_it(queue: Queue) -> None:
    first, second = queue.ready_all([{"words.txt": "one\n"}, {"words.txt": "two\n"}])
    with queue.merging(queue.blocked(GREEN)):
        queue.wait_for_gates(1)
        wait_until(lambda: len({row["state"] for row in queue.json("queue")}) == 2, 20, "two states in the queue")
        shown = {row["id"]: (row["state"], row["reason"]) for row in queue.json("queue")}
    assert shown == {first: ("testing", ""), second: ("held", f"held behind {first}")}


def test_an_entry_held_behind_one_that_comes_back_is_tried_again_and_lands(queue: Queue) -> None:
    first, second = queue.ready_all([{"words.txt": "BAD\n"}, {"words.txt": "two\n"}])
    queue.merge(code=5)
    assert queue.landed() == [second]


def test_an_entry_held_behind_one_that_lands_comes_back(queue: Queue) -> None:
    first, second = queue.ready_all([{"words.txt": "one\n"}, {"words.txt": "two\n"}])
    queue.merge(code=5)
    assert (queue.landed(), queue.task(second)["attempts"]) == ([first], 1)


BASE_FILES = {"text": "base\n", "bin": b"\0\1\2" * 90, "old": "a\nb\nc\nd\n" * 9, "gone": "base\n", "sub": f"{GITLINK} {'1' * 40}"}
ODD_CONFLICTS = {
    "binary": ({"bin": b"\0\1\3" * 90}, {"bin": b"\0\1\4" * 90}),
    "rename/rename": ({"old": None, "x": BASE_FILES["old"]}, {"old": None, "y": BASE_FILES["old"]}),
    "edit/delete": ({"gone": None}, {"gone": "edited\n"}),
    "file/folder": ({"new": "a file\n"}, {"new/inner": "in a folder\n"}),
    "submodule": ({"sub": f"{GITLINK} {'2' * 40}"}, {"sub": f"{GITLINK} {'3' * 40}"}),
}


def test_of_two_in_an_odd_conflict_the_later_comes_back_and_a_third_is_not_touched(queue: Queue) -> None:
    queue.make_branches({"base": BASE_FILES}, git(queue.repo, "rev-parse", "main"))
    git(queue.repo, "merge", "-q", "--ff-only", branch_of("base"))
    pairs = {kind: queue.ready_all(works) for kind, works in ODD_CONFLICTS.items()}
    third = queue.ready(new_file("third"))
    queue.merge(code=5)
    assert queue.landed() == [*(first for first, _ in pairs.values()), third]


# ---------------------------------------------------------------------------------------------- guilt


PAIR = "! { [ -e a.txt ] && [ -e b.txt ]; }"


def test_of_two_that_fail_only_together_the_earlier_lands_and_the_later_comes_back(queue: Queue) -> None:
    ids = queue.ready_all([new_file(name) for name in ("u", "a", "v", "b", "w")])
    queue.merge(PAIR, slots=4, code=5)
    assert queue.landed() == [ids[0], ids[1], ids[2], ids[4]]


def test_the_later_of_two_that_fail_only_together_is_told_its_likely_partner(queue: Queue) -> None:
    ids = queue.ready_all([new_file("u"), {**new_file("a"), **edited_line(2, "a")}, {**new_file("b"), **edited_line(18, "b")}])
    queue.merge(PAIR, code=5)
    assert re.search(rf"by itself it is green.*most likely with {ids[1]} \(long.txt\)", queue.reason(ids[2]))


def test_an_entry_that_is_red_by_itself_is_told_so(queue: Queue) -> None:
    task_id = queue.ready(new_file("a", "BAD\n"))
    queue.merge(code=5)
    assert "by itself it is red, too" in queue.returned_text(task_id)


def test_nobody_comes_back_before_the_gate_was_red_twice(queue: Queue) -> None:
    queue.ready(new_file("a", "BAD\n"))
    commit_files(queue.repo, new_file("main"))  # so that the lone run afterwards looks at another tree
    queue.merge(code=5)
    assert sorted(Counter(queue.gated()).values()) == [1, 1, 2]


def test_a_lone_run_is_spared_when_the_same_tree_has_a_verdict(queue: Queue) -> None:
    queue.ready(new_file("a", "BAD\n"))
    queue.merge(code=5)
    assert max(Counter(queue.gated()).values()) == 2


def red_at_first_sight(outside: Path) -> str:
    """A gate that is red when it sees a tree for the first time, and green from then on."""
    seen = outside / "seen"
    seen.mkdir()
    return f'tree=$(git rev-parse "HEAD^{{tree}}"); [ -e {seen}/$tree ] || {{ touch {seen}/$tree; exit 1; }}'


def test_a_flaky_gate_returns_nobody(queue: Queue, outside: Path) -> None:
    ids = queue.ready_all([new_file(f"f{number}") for number in range(4)])
    queue.merge(red_at_first_sight(outside), slots=2)
    assert queue.landed() == ids


def test_a_flaky_gate_is_reported_with_the_tree_that_was_both(queue: Queue, outside: Path) -> None:
    queue.ready(new_file("a"))
    said = queue.merge(red_at_first_sight(outside)).stderr
    assert f"flaky gate: tree {git(queue.repo, 'rev-parse', 'main^{tree}')[:10]} was both" in said


# ---------------------------------------------------------------------------------------------- returned work


def returned_entry(queue: Queue, **fields) -> tuple[str, str]:
    """(a task whose work came back, the commit that it had submitted)."""
    task_id = queue.ready(new_file("a", "BAD\n"), **fields)
    commit = git(queue.repo, "rev-parse", branch_of(task_id))
    queue.merge(f"echo 'the words of the gate'; {GREEN}", code=5)
    return task_id, commit


def test_returned_work_says_what_the_gate_printed_and_how_to_see_it_again(queue: Queue) -> None:
    task_id, _ = returned_entry(queue)
    text = queue.returned_text(task_id)
    line = re.search(r"^to reproduce: (.*)", text, re.MULTILINE)
    assert line is not None and "\nthe words of the gate" in text
    done = run(["bash", "-c", line[1]], cwd=queue.repo)
    assert (done.returncode, "the words of the gate" in done.stdout) == (1, True)


def test_returned_work_is_pinned_and_the_next_attempt_starts_from_it(queue: Queue) -> None:
    task_id, commit = returned_entry(queue)
    queue.ok("retry", task_id)
    start = queue.claim(AGENT)["task"]["start"]
    assert (start, git(queue.repo, "rev-parse", start)) == (f"refs/farm/returned/{task_id}/1", commit)


def test_work_that_comes_back_after_its_last_attempt_is_failed_and_outlives_its_branch_and_a_gc(queue: Queue) -> None:
    task_id, commit = returned_entry(queue, max_attempts=1)
    forget_branch(queue, task_id)
    assert (queue.task(task_id)["state"], git(queue.repo, "cat-file", "-t", commit)) == ("failed", "commit")


def test_returned_work_that_was_mended_lands(queue: Queue) -> None:
    task_id, commit = returned_entry(queue)
    queue.ok("retry", task_id)
    queue.make_branches({task_id: new_file("a", "mended\n")}, commit)
    queue.submit_task(task_id)
    queue.merge()
    assert queue.landed() == [task_id]


# ---------------------------------------------------------------------------------------------- order


def entry(name: str, waited: float, now: float, priority: int = 0, seq: int = 0) -> toolkit.Task:
    return toolkit.Task(id=name, priority=priority, queue_seq=seq, submitted_at=toolkit.utc(now - waited))


NOW = 1_800_000_000.0


def ids_in_order(*tasks: toolkit.Task) -> list[str]:
    return [task.id for task in toolkit.merge_order(list(tasks), NOW)]


def test_of_equal_priority_the_first_comes_first() -> None:
    assert ids_in_order(entry("b", 9, NOW, seq=2), entry("a", 9, NOW, seq=1)) == ["a", "b"]


def test_higher_priority_comes_first() -> None:
    assert ids_in_order(entry("a", 9, NOW, seq=1), entry("b", 9, NOW, 3, seq=2)) == ["b", "a"]


def test_work_that_waits_does_not_starve_beside_a_steady_stream_of_urgent_work() -> None:
    waiting = [entry("old", 0, NOW, 0, 0)]
    for minute in range(600):
        now = NOW + 60 * minute
        waiting += [entry(f"urgent-{minute}-{twin}", 0, now, 5, 1 + 2 * minute + twin) for twin in range(2)]
        waiting = toolkit.merge_order(waiting, now)[1:]
        if waiting and all(task.id != "old" for task in waiting):
            break
    assert minute <= 120  # as urgent as they are after 50 minutes, then behind the hundred that came before


# ---------------------------------------------------------------------------------------------- what it shows


def test_the_summary_says_what_landed_came_back_is_tested_and_is_held(queue: Queue) -> None:
    queue.ready_all([new_file("a"), new_file("b", "BAD\n")])
    queue.merge(code=5)
    first, *_ = queue.ready_all([{"words.txt": "one\n"}, {"words.txt": "two\n"}, new_file("c")])
    with queue.merging(queue.blocked(GREEN)):
        queue.wait_for_gates(1)
        wait_until(lambda: "testing" in queue.summary(), 20, "the merger to say what it tests")
        assert f"landed 1 · returned 1 · testing 1 (main+2) · held 1 behind {first}" in queue.summary()


def test_the_queue_shows_nothing_as_tested_once_the_merger_is_gone(queue: Queue) -> None:
    queue.ready(new_file("a"))
    with queue.merging(queue.blocked(GREEN)) as merger:
        queue.wait_for_gates(1)
        wait_until(lambda: [row["state"] for row in queue.json("queue")] == ["testing"], 20, "the entry to be shown as tested")
        merger.kill()
        merger.wait(30)
        queue.go.touch()
    assert [row["state"] for row in queue.json("queue")] == ["ready"]


def test_work_that_is_canceled_during_its_gate_does_not_land(queue: Queue) -> None:
    canceled, other = queue.ready_all([new_file("a"), new_file("b")])
    with queue.merging(queue.blocked(GREEN)) as merger:
        queue.wait_for_gates(1)
        queue.ok("cancel", canceled)
        queue.go.touch()
        merger.wait(30)
    assert queue.landed() == [other]


def test_odd_titles_gates_and_paths_are_no_trouble(make_repo: Callable[..., Path], outside: Path) -> None:
    queue = Queue(make_repo("a 'repo' é"), outside)
    works = [{"with blank.txt": "good\n"}, {"ümlaut.txt": "good\n"}, {"it's.txt": "BAD\n"}]
    good, _, bad = queue.ready_all(works, title="it's \"odd\" $(touch no)\t\\n é \x1b[31m")
    queue.merge(f"true\n{GREEN}  # a comment", code=5)
    line = re.search(r"^to reproduce: (.*)", queue.returned_text(bad), re.MULTILINE)
    assert line is not None
    assert (len(queue.landed()), run(["bash", "-c", line[1]], cwd=queue.repo).returncode) == (2, 1)


def test_a_second_merge_waits_for_the_first_and_reports_what_it_did(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    with queue.merging(queue.blocked(GREEN)):
        queue.wait_for_gates(1)
        second = queue.start("merge", "--gate", "true", "--json")
        wait_until(lambda: "waiting" in second.stderr.readline(), 20, "the second merge to wait")
        queue.go.touch()
        out, _ = second.communicate(timeout=30)
    assert json.loads(out)["landed"] == [task_id]


@pytest.mark.parametrize(("forever", "kept"), [(True, 0), (False, 1)])
def test_only_who_will_report_it_keeps_a_list_of_what_has_moved(queue: Queue, forever: bool, kept: int) -> None:
    """A farm's merger runs for a year."""
    settings, store = toolkit.load_settings(str(queue.repo)), toolkit.Store(str(queue.repo))
    store.ensure_folders()
    merges = toolkit.MergeQueue(store, settings, "main", f"{queue.repo}-farm")
    toolkit.Merger(merges, forever=forever)
    merges.tally.note("t-0001", "landed", "c0ffee")
    assert (len(merges.tally.moved), merges.tally.counts["landed"]) == (kept, 1)
