"""The verbs queue and merge, as other tools build on them."""

from __future__ import annotations

import json
import signal

import pytest
from farm_calls import HEADS, A, B
from sandbox import commit_files, git, wait_until

import farm as toolkit


def test_a_queue_record_has_the_keys_of_the_contract(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "a"})
    assert set(HEADS["queue"].split()) <= farm.json("queue")[0].keys()


def test_the_queue_of_a_new_repo_is_an_empty_list(farm):
    assert farm.json("queue") == []


def test_merge_of_nothing_exits_0(farm):
    assert farm.ok("merge") == ""


def test_merge_without_a_gate_says_that_nothing_was_tested(farm):
    assert "nothing was tested" in farm("merge").stderr


def test_merge_with_a_gate_does_not_say_that_nothing_was_tested(farm):
    assert "nothing was tested" not in farm("merge", "--gate", "true").stderr


def test_merge_lands_what_is_ready(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "text"})
    farm.ok("merge", "--gate", "test -e a.txt")
    assert git(farm.repo, "show", "main:a.txt") == "text"


def test_a_landed_task_names_its_commit(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "text"})
    farm.ok("merge")
    assert farm.task("t-0001")["landed_commit"] == git(farm.repo, "rev-parse", "main")


def test_merge_exits_5_when_the_gate_is_red(farm):
    farm.ok("add", "a")
    farm.submit(A, {"bad.txt": "text"})
    assert farm("merge", "--gate", "! test -e bad.txt").returncode == 5


def test_work_with_a_red_gate_goes_back_with_the_reason(farm):
    farm.ok("add", "a")
    farm.submit(A, {"bad.txt": "text"})
    farm("merge", "--gate", "! test -e bad.txt")
    task = farm.task("t-0001")
    assert (task["attempts"], "! test -e bad.txt" in task["reason"]) == (1, True)


def test_merge_exits_5_when_work_conflicts(farm):
    farm.ok("add", "a")
    farm.submit(A, {"README.md": "theirs\n"})
    commit_files(farm.repo, {"README.md": "ours\n"})
    assert farm("merge").returncode == 5


def test_work_that_conflicts_goes_back_and_names_the_file(farm):
    farm.ok("add", "a")
    farm.submit(A, {"README.md": "theirs\n"})
    commit_files(farm.repo, {"README.md": "ours\n"})
    farm("merge")
    assert "README.md" in farm.task("t-0001")["reason"]


def test_merge_json_says_what_landed_and_what_came_back(farm):
    farm.ok("add", "-f", "-", input="good\nbad\n")
    farm.submit(A, {"good.txt": "text"})
    farm.submit(B, {"bad.txt": "text"})
    told = json.loads(farm("merge", "--json", "--gate", "! test -e bad.txt").stdout)
    assert (told["landed"], [item["id"] for item in told["returned"]]) == (["t-0001"], ["t-0002"])


def test_merge_with_a_red_target_exits_5_and_keeps_its_entries(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "text"})
    assert farm("merge", "--gate", "false").returncode == 5
    assert [entry["id"] for entry in farm.json("queue")] == ["t-0001"]


def test_merge_with_a_file_in_the_way_exits_5_and_keeps_its_entries(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "text"})
    (farm.repo / "a.txt").write_text("mine")
    assert farm("merge").returncode == 5
    assert [entry["id"] for entry in farm.json("queue")] == ["t-0001"]


def test_merge_names_the_file_that_is_in_the_way(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "text"})
    (farm.repo / "a.txt").write_text("mine")
    assert "a.txt" in farm("merge").stderr


def test_merge_into_a_branch_that_is_not_there_lists_those_that_are(farm):
    assert "main" in farm.refused(3, "merge", "--into", "develop")


def test_merge_into_another_branch_moves_that_one(farm):
    git(farm.repo, "branch", "develop")
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "text"})
    farm.ok("merge", "--into", "develop")
    assert git(farm.repo, "show", "develop:a.txt") == "text"


def test_merge_lands_the_highest_priority_first(farm):
    farm.ok("add", "low")
    farm.ok("add", "high", "--priority", "5")
    farm.submit(A, {"a.txt": "a"}, "--id", "t-0001")
    farm.submit(B, {"b.txt": "b"}, "--id", "t-0002")
    farm.ok("merge")
    landed = git(farm.repo, "log", "--reverse", "--first-parent", "--format=%(trailers:key=Farm-Task,valueonly)", "main").split()
    assert landed == ["t-0002", "t-0001"]


def test_merge_again_lands_nothing_twice(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "a"})
    farm.ok("merge")
    before = git(farm.repo, "rev-parse", "main")
    farm.ok("merge")
    assert git(farm.repo, "rev-parse", "main") == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_merge_with_watch_lands_what_comes_later_until_a_signal_ends_it(farm, number, code):
    watching = farm.start("merge", "--watch", "--gate", "true")
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "a"})
    wait_until(lambda: farm.task("t-0001")["state"] == "landed", timeout=60, message="the landing")
    watching.send_signal(number)
    watching.communicate(timeout=60)
    assert watching.returncode == code


def test_status_with_watch_goes_on_until_a_signal_ends_it(farm):
    farm.ok("add", "a")
    watching = farm.start("status", "--watch")
    first = watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    watching.communicate(timeout=60)
    assert (bool(first), watching.returncode) == (True, 130)


def test_the_queue_is_described_also_when_what_held_it_is_over_in_the_same_moment():
    records = [{"id": "t-0002", "state": "held", "reason": "held behind t-0001"}]
    assert toolkit.describe_queue(toolkit.State(), records, {}) == "landed 0 · returned 0 · held 1 behind t-0001"
