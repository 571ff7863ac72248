"""Where the farm's checkout is, and repos that are laid out otherwise: one farm, found the same way from everywhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from farm_calls import Caller
from paths import SCRIPTS
from sandbox import git, run

import farm as toolkit

DRAIN = ["run", "-n", "1", "--gate", "true", "--until-drained", "--agent"]


def commit_all(repo: Path, message: str = "more") -> None:
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", message)


def bare_inside(make_repo, root: Path) -> Path:
    git(root, "clone", "-q", "--bare", make_repo("source"), root / "app/.git")
    git(root / "app", "worktree", "add", "-q", "main", "main")
    return root / "app/main"


def bare_beside(make_repo, root: Path) -> Path:
    git(root, "clone", "-q", "--bare", make_repo("source"), root / "app/.bare")
    (root / "app/.git").write_text("gitdir: ./.bare\n")
    git(root / "app", "worktree", "add", "-q", "main", "main")
    return root / "app/main"


def separate(make_repo, root: Path) -> Path:
    git(root, "init", "-q", "--separate-git-dir", root / "elsewhere.git", root / "app")
    (root / "app/a").write_text("a\n")
    commit_all(root / "app")
    return root / "app"


def submodule(make_repo, root: Path) -> Path:
    inner, outer = make_repo("inner"), make_repo("outer")
    git(outer, "submodule", "add", "-q", inner, "sub")
    git(outer / "sub", "checkout", "-q", "-B", "main")
    commit_all(outer)
    return outer / "sub"


@pytest.fixture(params=[bare_inside, bare_beside, separate, submodule])
def place(request, make_repo, sandbox) -> Path:
    return request.param(make_repo, sandbox.work)


def test_a_repo_of_any_layout_has_one_farm_found_from_every_worktree(place):
    farm = Caller(place, os.getpid())
    farm.ok("add", "one")
    farm.ok(*DRAIN, "echo x >f", timeout=60)
    assert "f" in git(place, "ls-tree", "--name-only", "main").split() and (place / "f").exists()
    tree = next(place.parent.glob(f"{place.name}-farm/agent-001-worktree"))
    Caller(tree, os.getpid()).ok("add", "two")
    assert not (tree / "coordination").exists() and len(farm.json("tasks")) == 2
    rows = run([SCRIPTS / "mk-worktrees.sh", "-C", tree, "-n", "1"], check=True).stdout
    assert str(tree) in rows, "the scripts found another place than farm.py"
    farm.ok("clean")


def test_add_refuses_what_up_would_refuse(make_repo, sandbox):
    git(sandbox.work, "clone", "-q", "--bare", make_repo("source"), sandbox.work / "bare.git")
    for verb in (["add", "x"], ["up", "-n", "1", "--agent", "true"]):
        said = Caller(sandbox.work / "bare.git", os.getpid()).refused(3, *verb)
        assert "bare repository" in said and "try: " in said
    assert not (sandbox.work / "bare.git/coordination").exists()


def test_a_checkout_that_a_tool_has_called_bare_is_still_found_and_doctor_says_so(make_repo):
    repo = make_repo()
    farm = Caller(repo, os.getpid())
    git(repo, "config", "core.bare", "true")
    farm.ok("add", "one")
    assert "core.bare" in farm("doctor").stdout


def test_a_note_that_came_with_a_copy_is_not_believed(make_repo, sandbox):
    first = separate(make_repo, sandbox.work)
    Caller(first, os.getpid()).ok("add", "one")
    git_dir = sandbox.work / "other.git"
    run(["cp", "-R", sandbox.work / "elsewhere.git", git_dir], check=True)
    (sandbox.work / "copy").mkdir()
    (sandbox.work / "copy/.git").write_text(f"gitdir: {git_dir}\n")
    assert toolkit.find_repo(str(sandbox.work / "copy")) == str(sandbox.work / "copy")


def test_up_says_where_work_lands_and_where_that_is_checked_out(make_repo, sandbox):
    repo, feat = make_repo(), sandbox.work / "feat"
    git(repo, "worktree", "add", "-q", "-b", "feat", feat)
    farm = Caller(feat, os.getpid())
    said = farm("up", "-n", "1", "--agent", "true", "--into", "feat").stderr
    assert f"work lands on feat, checked out in {feat}" in said
    farm.ok("down", "--now", timeout=60)


def test_a_sparse_checkout_loses_nothing_outside_its_cone(make_repo):
    repo = make_repo(files={"src/a": "a\n", "docs/d": "d\n"})
    git(repo, "sparse-checkout", "set", "src")
    farm = Caller(repo, os.getpid())
    farm.ok("add", "one")
    farm.ok(*DRAIN, "mkdir -p docs other; echo n >docs/new; echo o >other/o; echo s >src/s", timeout=60)
    assert git(repo, "ls-tree", "-r", "--name-only",
               "main").split() == ["docs/d", "docs/new", "other/o", "src/a", "src/s"]


def test_worktrees_inside_the_repo_are_none_of_its_files(make_repo):
    repo = make_repo()
    farm = Caller(repo, os.getpid())
    farm.ok("add", "one")
    farm.ok(*DRAIN, "echo x >f", env={"FARM_WORKTREES": "wt"}, timeout=60)
    assert git(repo, "status", "--porcelain") == ""


def test_the_machine_is_the_same_whatever_it_is_called(make_repo):
    mine = toolkit.identify(os.getpid())
    renamed = mine._replace(host="another-network")
    assert toolkit.find_liveness(renamed) is True
    assert toolkit.find_liveness(renamed._replace(start="0")) is False
    assert toolkit.find_liveness(mine._replace(boot="before")) is False
    assert toolkit.find_liveness(mine._replace(boot="before", machine="", host="gone")) is None


def test_a_claim_that_waits_for_a_lease_says_so(make_repo):
    farm = Caller(make_repo(), os.getpid())
    farm.ok("add", "one")
    farm.claim("agent-001")
    lock = farm.folder / "agent_locks/agent-001.lock"
    claim = json.loads(lock.read_text())
    claim["owner"].update(boot="another", machine="another", host="far.example")
    lock.write_text(json.dumps(claim) + "\n")
    shown = farm("status").stdout
    assert "unseen" in shown and "far.example" in shown and f"release 1 --fence {claim['fence']}" in shown
