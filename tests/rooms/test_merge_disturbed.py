"""The merge queue among people: what stops it, who works meanwhile, odd entries."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from merge_calls import GREEN, Queue, branch_of, forget_branch, new_file
from sandbox import commit_files, git, wait_until, write_files

import farm as toolkit

pytestmark = pytest.mark.usefixtures("no_gate_is_left")


# ---------------------------------------------------------------------------------------------- what stops a merger that watches


def lose_target(queue: Queue) -> Callable[[], object]:
    git(queue.repo, "checkout", "-q", "--detach")
    git(queue.repo, "branch", "-q", "-m", "main", "away")
    return lambda: git(queue.repo, "branch", "-q", "-m", "away", "main")


def leave_lock(queue: Queue) -> Callable[[], object]:
    lock = queue.repo / ".git/index.lock"
    lock.touch()
    return lock.unlink


@pytest.mark.parametrize("stop", [lose_target, leave_lock])
def test_what_stops_a_merger_that_watches_is_shown_and_the_merger_goes_on_by_itself(
    queue: Queue, stop: Callable[[Queue], Callable[[], object]]
) -> None:
    task_id = queue.ready(new_file("a"))
    now = queue.folder / "merge_queue/now.json"
    with queue.merging(queue.counted(GREEN), "--watch", "--into", "main") as merger:
        wait_until(now.exists, 30, "the merger to begin")
        mend = stop(queue)
        second = queue.ready(new_file("b"), base="HEAD")
        wait_until(lambda: json.loads(now.read_text())["trouble"], 60, "the trouble to be shown")
        shown = json.loads(now.read_text())["trouble"]
        mend()
        wait_until(lambda: queue.states()[second] == "landed", 90, "the entry to land")
        assert merger.poll() is None
    assert shown[0] and shown[1]
    assert queue.landed() == [task_id, second]


def test_a_merger_that_ends_again_and_again_is_started_again_and_again(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.ready(new_file("a"))
    settings, begun = toolkit.load_settings(str(queue.repo), {"gate": "true"}), []
    loop = toolkit.Farm(toolkit.Store(str(queue.repo)), settings, "true", "main")

    class Ended:
        returncode = 1

        def __init__(self, *_args, **_options):
            begun.append(self)

        def poll(self) -> int:
            return self.returncode

    monkeypatch.setattr(subprocess, "Popen", Ended)
    for second in range(900):
        loop.merger.tend(1e9 + second)
    assert 100 < len(begun) < 500


def test_a_merger_makes_anew_what_somebody_has_removed_below_coordination(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    for name in ("results", "returns", "logs"):
        shutil.rmtree(queue.folder / name)
    queue.merge()
    assert queue.landed() == [task_id]


# ---------------------------------------------------------------------------------------------- people at work meanwhile


def test_a_persons_commit_during_a_gate_is_simply_the_new_base(queue: Queue) -> None:
    queue.ready(new_file("a"))
    with queue.merging(queue.blocked(GREEN)) as merger:
        queue.wait_for_gates(1)
        sha = commit_files(queue.repo, new_file("person"))
        queue.go.touch()
        merger.wait(30)
    assert git(queue.repo, "rev-parse", "main^1") == sha


def test_what_lands_after_a_persons_commit_was_gated_together_with_it(queue: Queue) -> None:
    queue.ready(new_file("a"))
    with queue.merging(queue.blocked("! { [ -e a.txt ] && [ -e person.txt ]; }")) as merger:
        queue.wait_for_gates(1)
        commit_files(queue.repo, new_file("person"))
        queue.go.touch()
        merger.wait(30)
    assert queue.landed() == []


def dirty_checkout(queue: Queue) -> Callable[[], tuple]:
    """Edits of every kind that are in nobody's way; the result takes a picture of them."""
    names = ["README.md", "staged.txt", "untracked.bin", "words.txt"]
    write_files(queue.repo, {"README.md": "edited\n", "staged.txt": "new\n", "words.txt": "first\n"})
    git(queue.repo, "add", "staged.txt", "words.txt")
    write_files(queue.repo, {"words.txt": "first\nsecond\n"})
    (queue.repo / "untracked.bin").write_bytes(b"\0\1")
    return lambda: (
        [(queue.repo / name).read_bytes() for name in names],
        git(queue.repo, "diff", "--cached"),
        git(queue.repo, "status", "--porcelain"),
    )


def test_a_landing_brings_files_along_and_keeps_unrelated_edits_as_they_are(queue: Queue) -> None:
    queue.ready(new_file("a"))
    picture = dirty_checkout(queue)
    before = picture()
    queue.merge()
    assert (picture(), (queue.repo / "a.txt").read_text()) == (before, "good\n")


IN_THE_WAY = {"edit": "words.txt", "untracked": "a.txt", "staged": "words.txt"}


def block_landing(queue: Queue, kind: str) -> Path:
    """An entry, and something of a person in its way in the checkout."""
    path = IN_THE_WAY[kind]
    queue.ready({path: "of the entry\n"})
    write_files(queue.repo, {path: "of a person\n"})
    if kind == "staged":
        git(queue.repo, "add", path)
    return queue.repo / path


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_what_is_in_the_way_in_the_checkout_is_named_and_nothing_is_changed(queue: Queue, kind: str) -> None:
    path = block_landing(queue, kind)

    def picture() -> tuple:
        return path.read_bytes(), (queue.repo / ".git/index").read_bytes(), git(queue.repo, "rev-parse", "HEAD", "main")

    before = picture()
    said = queue.merge(code=5).stderr
    assert (f"in the way: {path.name}\n" in said, picture()) == (True, before)


def test_merges_that_a_person_has_had_pruned_are_made_anew(queue: Queue) -> None:
    """What waits for its gate has been merged in memory already, and no ref has that."""
    ids = queue.ready_all([new_file(f"f{number}") for number in range(30)])
    with queue.merging(queue.blocked(GREEN), "--watch"):
        queue.wait_for_gates(1)
        git(queue.repo, "gc", "-q", "--prune=now")
        queue.go.touch()
        wait_until(lambda: queue.landed() == ids, 40, "all to land")


@pytest.mark.parametrize("kind", ["edit", "untracked"])
def test_the_queue_goes_on_by_itself_when_nothing_is_in_the_way_any_more(queue: Queue, kind: str) -> None:
    path = block_landing(queue, kind)
    with queue.merging(queue.counted(GREEN), "--watch"):
        wait_until(lambda: "in the way" in queue.summary(), 30, "the queue to wait")
        path.unlink()
        if kind != "untracked":
            git(queue.repo, "checkout", "-q", "HEAD", "--", path.name)
        wait_until(lambda: len(queue.landed()) == 1, 30, "the entry to land")


def test_a_target_that_another_worktree_has_checked_out_moves_there_with_its_files(queue: Queue) -> None:
    place = queue.outside / "elsewhere"
    git(queue.repo, "checkout", "-q", "-b", "mine")
    git(queue.repo, "worktree", "add", "-q", place, "main")
    queue.ready(new_file("a"))
    queue.merge(GREEN, "--into", "main")
    assert (git(place, "status", "--porcelain"), (place / "a.txt").exists()) == ("", True)


def test_a_target_that_nobody_has_checked_out_moves_alone(queue: Queue) -> None:
    git(queue.repo, "checkout", "-q", "-b", "mine")
    task_id = queue.ready(new_file("a"))
    queue.merge(GREEN, "--into", "main")
    assert (queue.landed(), git(queue.repo, "status", "--porcelain"), (queue.repo / "a.txt").exists()) == ([task_id], "", False)


# ---------------------------------------------------------------------------------------------- odd entries


def test_an_entry_whose_branch_is_gone_lands_by_its_pin(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    forget_branch(queue, task_id)
    queue.merge()
    assert queue.landed() == [task_id]


def test_a_branch_that_moves_after_its_submission_lands_as_it_was_submitted(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    submitted = git(queue.repo, "rev-parse", branch_of(task_id))
    queue.make_branches({task_id: new_file("a", "BAD\n")}, "main")
    queue.merge()
    assert git(queue.repo, "rev-parse", "main^2") == submitted


def test_an_entry_that_changes_nothing_is_landed_without_a_commit(queue: Queue) -> None:
    before = git(queue.repo, "rev-parse", "main")
    task_id = queue.ready({})
    queue.merge()
    assert (queue.task(task_id)["state"], git(queue.repo, "rev-parse", "main")) == ("landed", before)


def test_work_without_common_history_comes_back_with_that_reason(queue: Queue) -> None:
    task_id = queue.ok("add", "from nowhere")
    root = git(queue.repo, "commit-tree", "-m", "root", "main^{tree}")
    queue.submit_task(task_id, "--commit", root)
    queue.merge(code=5)
    assert "shares no history with main" in queue.reason(task_id)


def test_work_that_a_person_merged_by_hand_is_landed_without_a_gate_run(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    git(queue.repo, "merge", "-q", "--no-ff", "--no-edit", branch_of(task_id))
    queue.merge()
    assert (queue.task(task_id)["state"], queue.gated()) == ("landed", [])


def test_work_whose_commit_is_gone_comes_back_with_that_reason(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    git(queue.repo, "update-ref", "-d", f"refs/farm/ready/{task_id}")
    forget_branch(queue, task_id)
    queue.merge(code=5)
    assert "its commit is gone" in queue.reason(task_id)


@pytest.mark.parametrize("how", ["the same commit", "the same change"])
def test_work_that_is_contained_in_untested_work_ahead_is_not_taken_for_landed(queue: Queue, how: str) -> None:
    first = queue.ready(new_file("a", "BAD\n"))
    with queue.merging(queue.blocked(GREEN)) as merger:
        queue.wait_for_gates(1)
        if how == "the same commit":
            second = queue.ok("add", "second")
            queue.submit_task(second, "--commit", branch_of(first))
        else:
            second = queue.ready(new_file("a", "BAD\n"), title="second")
        now = queue.folder / "merge_queue/now.json"
        wait_until(lambda: second in json.loads(now.read_text())["order"], 30, "the merger to notice the new entry")
        queue.go.touch()
        merger.wait(30)
    assert (queue.task(second)["attempts"], queue.landed()) == (1, [])


def make_unreadable(repo: Path, revision: str) -> None:
    """Empty an object's file, as a power cut leaves one that git has not fsynced."""
    for pack in (repo / ".git/objects/pack").glob("*.pack"):
        with pack.open("rb") as file:
            pack.unlink()
            subprocess.run(["git", "-C", repo, "unpack-objects", "-q"], stdin=file, check=True, timeout=60)
    sha = git(repo, "rev-parse", revision)
    path = repo / ".git/objects" / sha[:2] / sha[2:]
    path.chmod(0o600)
    path.write_bytes(b"")


@pytest.mark.parametrize("what", ["", "^{tree}", ":words.txt", ":a.txt"])
def test_work_of_which_git_cannot_read_all_comes_back_and_the_rest_lands(queue: Queue, what: str) -> None:
    broken, whole = queue.ready_all([{"words.txt": "none\nand more\n", "a.txt": "mine\n"}, new_file("b")])
    commit_files(queue.repo, {"words.txt": "more\nnone\n"})
    make_unreadable(queue.repo, branch_of(broken) + what)
    queue.merge(code=5)
    task = queue.task(broken)
    assert (queue.landed(), task["attempts"]) == ([whole], 1)
    assert re.search("git cannot read|its commit is gone", task["reason"])
