"""Repos in the states that people have them in: nothing is lost, and one clear line says what is wrong."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from farm_calls import FARM, A, Caller, assert_is_error, drain, landed, make_commit
from sandbox import commit_files, git, run, write_files

LOOKS_AT_THE_REPO = [["tasks"], ["add", "a"], ["status"], ["merge"], ["up", "-n", "1", "--agent", "true"], ["doctor"], ["down"]]


@pytest.mark.parametrize("argv", LOOKS_AT_THE_REPO, ids=lambda argv: argv[0])
def test_outside_a_repo_every_verb_says_so(sandbox, argv):
    done = run([sys.executable, FARM, *argv], cwd=sandbox.home)
    assert_is_error(done, 3)
    assert "git" in done.stderr


@pytest.mark.parametrize("argv", LOOKS_AT_THE_REPO, ids=lambda argv: argv[0])
def test_a_repo_that_is_not_there_is_one_clear_line(sandbox, argv):
    assert_is_error(run([sys.executable, FARM, "--repo", sandbox.home / "nowhere", *argv]), 3)


@pytest.mark.parametrize("argv", [["up", "-n", "1", "--agent", "true"], ["merge"], ["status"]], ids=lambda argv: argv[0])
def test_a_bare_repo_is_one_clear_line(sandbox, argv):
    git(sandbox.work, "init", "-q", "--bare", "bare.git")
    assert_is_error(run([sys.executable, FARM, "--repo", sandbox.work / "bare.git", *argv]), 3)


@pytest.mark.parametrize("argv", [["up", "-n", "1", "--agent", "true"], ["merge"]], ids=lambda argv: argv[0])
def test_a_repo_without_commits_is_one_clear_line(make_repo, argv):
    farm = Caller(make_repo(commits=0), os.getpid())
    assert "commit" in farm.refused(3, *argv)


def test_tasks_can_be_added_before_the_first_commit(make_repo):
    assert Caller(make_repo(commits=0), os.getpid()).ok("add", "a") == "t-0001"


@pytest.mark.parametrize("verb", ["up", "merge"])
def test_a_detached_head_is_refused_and_the_branches_are_named(farm, verb):
    git(farm.repo, "checkout", "-q", "--detach")
    assert "main" in farm.refused(3, verb, *(["-n", "1", "--agent", "true"] if verb == "up" else []))


def test_with_a_detached_head_work_lands_on_the_branch_that_is_named(farm):
    git(farm.repo, "checkout", "-q", "--detach")
    head = git(farm.repo, "rev-parse", "HEAD")
    farm.ok("add", "Write")
    drain(farm, "--into", "main")
    assert git(farm.repo, "ls-tree", "--name-only", "main").split() == ["README.md", "made.txt"]
    assert git(farm.repo, "rev-parse", "HEAD") == head


def test_without_a_main_the_branch_that_is_checked_out_is_the_target(make_repo):
    farm = Caller(make_repo(branch="trunk"), os.getpid())
    farm.ok("add", "Write")
    farm.submit(A, {"a.txt": "a"})
    farm.ok("merge")
    assert "a.txt" in git(farm.repo, "ls-tree", "--name-only", "trunk")


@pytest.mark.parametrize("verb", ["up", "run", "merge"])
def test_a_target_that_is_not_there_names_the_branches_that_are(make_repo, verb):
    farm = Caller(make_repo(branch="trunk"), os.getpid())
    flags = ["-n", "1", "--agent", "true"] if verb != "merge" else []
    assert "trunk" in farm.refused(3, verb, "--into", "main", *flags)


@pytest.mark.parametrize("kind", ["tag", "commit"])
def test_a_target_that_is_no_branch_is_refused(farm, kind):
    git(farm.repo, "tag", "v1")
    farm.refused(3, "merge", "--into", "v1" if kind == "tag" else git(farm.repo, "rev-parse", "HEAD"))


def test_a_shallow_clone_works(farm, sandbox):
    commit_files(farm.repo, {"more.txt": "more"})
    git(sandbox.work, "clone", "-q", "--depth", "1", f"file://{farm.repo}", "shallow")
    clone = Caller(sandbox.work / "shallow", os.getpid())
    clone.ok("add", "Write")
    drain(clone)
    assert "made.txt" in git(clone.repo, "ls-tree", "--name-only", "main")


def test_a_dirty_checkout_keeps_every_edit(farm):
    commit_files(farm.repo, {"tracked.txt": "old\n", "staged.txt": "old\n"})
    write_files(farm.repo, {"tracked.txt": "edited\n", "staged.txt": "staged\n", "untracked.txt": "new\n"})
    git(farm.repo, "add", "staged.txt")
    before = git(farm.repo, "status", "--porcelain", "-uall")
    farm.ok("add", "Write")
    farm.submit(A, {"a.txt": "a"})
    farm.ok("merge")
    assert git(farm.repo, "status", "--porcelain", "-uall") == before
    assert (farm.repo / "tracked.txt").read_text() == "edited\n"


def test_agents_start_from_the_commit_not_from_the_dirty_checkout(farm):
    (farm.repo / "README.md").write_text("half an edit\n")
    farm.ok("add", "Read")
    drain(farm, agent="cp README.md copy.txt")
    assert git(farm.repo, "show", "main:copy.txt") == "a throw-away repo"


def test_work_beside_a_submodule_lands_and_submodules_are_said_not_to_be_supported(farm, make_repo):
    git(farm.repo, "submodule", "add", "-q", str(make_repo("other")), "sub")
    git(farm.repo, "commit", "-q", "-m", "with a submodule")
    farm.ok("add", "Write")
    assert "submodule" in drain(farm).stderr
    assert git(farm.repo, "diff", "--name-only", "main~1", "main") == "made.txt"


def make_hook(repo: Path, *names: str) -> None:
    for name in names:
        path = repo / ".git" / "hooks" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\necho the hook {name} says no >&2\nexit 1\n")
        path.chmod(0o755)


def test_failing_hooks_of_merging_do_not_stop_the_farm(farm):
    make_hook(farm.repo, "post-checkout", "post-merge", "pre-merge-commit", "pre-push", "post-commit", "post-rewrite")
    farm.ok("add", "Write")
    drain(farm)
    assert landed(farm) == ["t-0001"]


def test_a_hook_that_refuses_the_agents_commit_is_the_reason_of_the_failure_and_its_work_is_kept(farm):
    make_hook(farm.repo, "pre-commit")
    farm.ok("add", "Write", "--max-attempts", "1")
    drain(farm, agent="echo precious >made.txt", check=False)
    assert "the hook pre-commit says no" in farm.task("t-0001")["reason"]
    ref = farm.ok("rescue", "list").split("\t")[0]
    assert git(farm.repo, "show", f"{ref}:made.txt") == "precious"


USER_SETTINGS = """merge.ff=false commit.gpgSign=true core.autocrlf=true merge.conflictStyle=diff3 rebase.autoStash=true
status.showUntrackedFiles=no core.quotePath=false color.ui=always push.default=nothing commit.verbose=true"""


def test_the_users_git_settings_do_not_change_what_lands(farm):
    for setting in USER_SETTINGS.split():
        git(farm.repo, "config", *setting.split("="))
    farm.ok("add", "Write")
    commit = make_commit(farm.repo, {"a.txt": "a"})
    farm.ok("submit", A, "--fence", farm.claim(A)["fence"], "--commit", commit)
    farm.ok("merge", "--gate", "test -e a.txt")
    assert landed(farm) == ["t-0001"]


def test_the_users_git_config_is_untouched(farm, sandbox):
    before = (farm.repo / ".git" / "config").read_bytes(), (sandbox.home / ".gitconfig").read_bytes()
    farm.ok("add", "Write")
    drain(farm)
    farm.ok("clean")
    assert ((farm.repo / ".git" / "config").read_bytes(), (sandbox.home / ".gitconfig").read_bytes()) == before
