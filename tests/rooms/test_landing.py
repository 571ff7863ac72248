"""Landing: styles, ways of merging, remotes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from merge_calls import GREEN, Files, Queue, branch_of, edited_line, new_file
from sandbox import NeverStopped, commit_files, git, run

import farm as toolkit

pytestmark = pytest.mark.usefixtures("no_gate_is_left")


SHAPES = {"merge": 2, "squash": 1, "rebase": 1}


@pytest.mark.parametrize("style", SHAPES)
def test_a_style_lands_its_own_shape_of_commits_and_no_red_tree(queue: Queue, style: str) -> None:
    before = git(queue.repo, "rev-parse", "main")
    ids = queue.ready_all([new_file(f"f{number}", "BAD\n" if number == 1 else "good\n") for number in range(4)])
    queue.merge(GREEN, "--style", style, slots=2, code=5)
    parents = git(queue.repo, "log", "--first-parent", "--format=%P", f"{before}..main").splitlines()
    shapes = [len(line.split()) for line in parents]
    assert (queue.red_values(), queue.landed(), shapes) == ([], [ids[0], ids[2], ids[3]], [SHAPES[style]] * 3)


@pytest.mark.parametrize("style", SHAPES)
def test_a_yes_in_the_middle_of_a_landing_changes_nothing_of_it(queue: Queue, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what has landed by another commit than its own would be taken for work that changes nothing."""
    task_id = queue.ready(new_file("a"))
    store, real, before = toolkit.Store(str(queue.repo)), toolkit.run_script, git(queue.repo, "rev-parse", "main")
    store.ensure_folders()

    def run_script(name: str, *args: str, **options):
        if name == "merge/land.sh":
            toolkit.approve(store, task_id, "", "person")
        return real(name, *args, **options)

    monkeypatch.setattr(toolkit, "run_script", run_script)
    settings = toolkit.load_settings(str(queue.repo), {"gate": "true", "style": style})
    merges = toolkit.MergeQueue(store, settings, "main", f"{queue.repo}-farm")
    toolkit.Merger(merges, forever=False).run(NeverStopped())
    landed = store.snapshot().landed[task_id]
    assert (landed.landed_commit, landed.landed_from) == (git(queue.repo, "rev-parse", "main"), before)
    assert merges.tally.counts["gates"] == 1


def test_rebase_keeps_the_messages_of_the_entrys_own_commits(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    queue.merge(GREEN, "--style", "rebase")
    assert git(queue.repo, "log", "-1", "--format=%s", "main") == f"work of {task_id}"


def test_strict_gates_every_commit_of_the_targets_first_parent_line(queue: Queue) -> None:
    before = git(queue.repo, "rev-parse", "main")
    queue.ready_all([new_file(f"f{number}") for number in range(4)])
    queue.merge(GREEN, "--strict", slots=2)
    trees = git(queue.repo, "log", "--first-parent", "--format=%T", f"{before}..main").split()
    assert len(trees) == 4 and set(trees) <= queue.green_trees()


def ready_in_steps(queue: Queue, *steps: Files) -> str:
    """An entry of a commit for each of `steps`; its id."""
    task_id = queue.ok("add", f"{len(steps)} steps")
    commit = git(queue.repo, "rev-parse", "main")
    for files in steps:
        queue.make_branches({task_id: files}, commit)
        commit = git(queue.repo, "rev-parse", branch_of(task_id))
    queue.submit_task(task_id)
    return task_id


@pytest.mark.parametrize("slots", [1, 3])
def test_strict_gates_every_commit_that_rebase_puts_on_the_line(queue: Queue, slots: int) -> None:
    before = git(queue.repo, "rev-parse", "main")
    for name in ("a", "b"):
        ready_in_steps(queue, *(new_file(f"{name}{number}") for number in range(3)))
    queue.merge(GREEN, "--strict", "--style", "rebase", slots=slots)
    trees = git(queue.repo, "log", "--first-parent", "--format=%T", f"{before}..main").split()
    assert (len(trees), set(trees) - queue.green_trees()) == (6, set())


def test_strict_returns_work_that_rebase_would_put_on_the_line_with_a_red_commit(queue: Queue) -> None:
    before = git(queue.repo, "rev-parse", "main")
    good, bad, last = (
        ready_in_steps(queue, new_file("a"), new_file("b")),
        ready_in_steps(queue, new_file("c"), new_file("x", "BAD\n"), new_file("x", "mended\n")),
        ready_in_steps(queue, new_file("d"), new_file("e")),
    )
    queue.merge(GREEN, "--strict", "--style", "rebase", slots=2, code=5)
    trees = git(queue.repo, "log", "--first-parent", "--format=%T", f"{before}..main").split()
    assert (queue.landed(), len(trees), set(trees) - queue.green_trees()) == ([good, last], 4, set())
    assert "one of its commits before the last" in queue.reason(bad)
    line = re.search(r"^to reproduce: (.*)", queue.returned_text(bad), re.MULTILINE)
    assert run(["bash", "-c", line[1]], cwd=queue.repo).returncode == 1


def test_rebase_without_strict_gates_the_end_of_an_entry_only(queue: Queue) -> None:
    task_id = ready_in_steps(queue, new_file("x", "BAD\n"), new_file("x", "mended\n"))
    queue.merge(GREEN, "--style", "rebase")
    assert (queue.landed(), len(queue.gated())) == ([task_id], 1)


def test_merging_in_a_scratch_worktree_lands_the_same_commits(queue: Queue) -> None:
    queue.ready_all([new_file("a"), edited_line(2, "a"), edited_line(18, "b"), new_file("bad", "BAD\n")])
    twin = Queue(queue.repo.with_name("twin"), queue.outside)
    shutil.copytree(queue.repo, twin.repo, symlinks=True)
    queue.merge(code=5)
    twin.merge(code=5, env={"FARM_MERGE": "worktree"})
    assert git(queue.repo, "log", "--format=%H", "main") == git(twin.repo, "log", "--format=%H", "main")


@pytest.fixture
def bare(queue: Queue) -> Path:
    """The bare repo that `origin` is."""
    folder = queue.outside / "bare.git"
    git(queue.repo, "clone", "-q", "--bare", queue.repo, folder)
    git(queue.repo, "remote", "add", "origin", folder)
    return folder


REMOTE = {"FARM_REMOTE": "origin"}


def push_by_another(queue: Queue, bare: Path) -> str:
    """What somebody else pushed to the target meanwhile."""
    clone = queue.outside / "clone"
    git(queue.outside, "clone", "-q", bare, clone)
    sha = commit_files(clone, new_file("other"))
    git(clone, "push", "-q", "origin", "main")
    return sha


def test_what_lands_is_pushed(queue: Queue, bare: Path) -> None:
    queue.ready(new_file("a"))
    queue.merge(env=REMOTE)
    assert git(bare, "rev-parse", "main") == git(queue.repo, "rev-parse", "main") == queue.reflog()[0]


def test_what_another_has_pushed_is_the_new_base_and_nothing_of_it_is_lost(queue: Queue, bare: Path) -> None:
    task_id = queue.ready(new_file("a"))
    sha = push_by_another(queue, bare)
    queue.merge(env=REMOTE)
    assert (git(bare, "rev-parse", "main"), queue.landed()) == (git(queue.repo, "rev-parse", "main"), [task_id])
    git(bare, "merge-base", "--is-ancestor", sha, "main")


def test_nothing_lands_while_both_have_commits_of_their_own(queue: Queue, bare: Path) -> None:
    task_id = queue.ready(new_file("a"))
    sha = push_by_another(queue, bare)
    commit_files(queue.repo, new_file("ours"))
    queue.merge(code=5, env=REMOTE)
    assert (git(bare, "rev-parse", "main"), queue.landed(), queue.task(task_id)["state"]) == (sha, [], "ready")
