"""A remote that has moved, that hangs, that wants LFS content; and what squash keeps."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import pytest
from farm_calls import Caller
from sandbox import git, run, wait_until


@pytest.fixture
def hub(sandbox) -> Path:
    git(sandbox.work, "init", "-q", "--bare", sandbox.work / "hub.git")
    return sandbox.work / "hub.git"


@pytest.fixture
def farm(make_repo, hub) -> Caller:
    repo = make_repo("app", files={"a.txt": "one\n"})
    git(repo, "remote", "add", "origin", hub)
    git(repo, "push", "-q", "-u", "origin", "main")
    return Caller(repo, os.getpid())


def drain(farm: Caller, agent: str, gate: str = "true", **env: str):
    return farm("run", "-n", "1", "--agent", agent, "--gate", gate, "--until-drained",
                env={"FARM_REMOTE": "origin", "FARM_GRACE_SECONDS": "3", **env}, timeout=90)


def push_theirs(hub: Path, root: Path, name: str) -> None:
    git(root, "clone", "-q", hub, root / "colleague")
    (root / "colleague" / name).write_text("theirs\n")
    git(root / "colleague", "add", "-A")
    git(root / "colleague", "commit", "-q", "-m", "theirs")
    git(root / "colleague", "push", "-q")


def test_a_colleagues_push_is_the_new_base_and_is_gated_with_the_work(farm, hub, sandbox):
    push_theirs(hub, sandbox.work, "c")
    farm.ok("add", "one")
    done = drain(farm, "echo x >f", "ls >>\"$HOME/gated\"; true")
    assert done.returncode == 0, done.stderr
    assert git(hub, "ls-tree", "--name-only", "main").split() == ["a.txt", "c", "f"]
    assert "a.txt\nc\nf\n" in (sandbox.home / "gated").read_text(), "the tree that landed was not gated"
    assert (farm.repo / "c").exists() and git(farm.repo, "status", "--porcelain") == ""


def test_commits_of_our_own_that_the_remote_has_not_wait_for_a_person(farm, hub, sandbox):
    push_theirs(hub, sandbox.work, "c")
    (farm.repo / "mine").write_text("mine\n")
    git(farm.repo, "add", "-A")
    git(farm.repo, "commit", "-q", "-m", "mine")
    farm.ok("add", "one")
    done = drain(farm, "echo x >f")
    assert done.returncode == 5 and "has commits that origin/main has not" in done.stderr
    assert farm.task("t-0001")["state"] == "ready"


def test_a_remote_that_hangs_is_given_up_with_all_that_was_started(farm, monkeypatch):
    monkeypatch.setenv("GIT_SSH_COMMAND", "sleep 98765 #")
    git(farm.repo, "remote", "set-url", "origin", "ssh://nowhere.example/x")
    farm.ok("add", "one")
    done = drain(farm, "echo x >f", FARM_REMOTE_TIMEOUT="1")
    assert done.returncode == 5 and "took longer than 1 s" in done.stderr
    farm.ok("up", "-n", "1", env={"FARM_REMOTE": "origin"})
    def sleepers():
        return [p for p in psutil.process_iter(["cmdline"]) if "98765" in " ".join(p.info["cmdline"] or [])]
    wait_until(sleepers, 60, "the push")
    farm.ok("down", "--now", timeout=60)
    wait_until(lambda: not sleepers(), 10, "its end")


needs_lfs = pytest.mark.skipif(not shutil.which("git-lfs"), reason="git-lfs is not installed: apt install git-lfs")


@needs_lfs
@pytest.mark.parametrize("hooks", ["", "/dev/null"], ids=["plain", "core.hooksPath"])
def test_lfs_content_reaches_the_remote_worktrees_and_gates(farm, hub, hooks):
    repo = farm.repo
    git(repo, "lfs", "install", "--local")
    git(repo, "lfs", "track", "*.bin")
    (repo / "old.bin").write_bytes(b"old content\n" * 100)
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "lfs")
    git(repo, "push", "-q")
    if hooks:
        git(repo, "config", "core.hooksPath", hooks)
    farm.ok("add", "one")
    done = drain(farm, "grep -q 'old content' old.bin && head -c 5000 /dev/urandom >new.bin",
                 "[ ! -e new.bin ] || [ \"$(wc -c <new.bin)\" -eq 5000 ]")
    assert done.returncode == 0, done.stderr
    oid = git(hub, "show", "main:new.bin").split("sha256:")[1].split()[0]
    assert list((hub / "lfs").rglob(oid)), "the remote has a pointer to content that it has not"


@needs_lfs
def test_without_git_lfs_nothing_is_pushed_and_it_is_said(farm, hub, sandbox, monkeypatch):
    (farm.repo / ".gitattributes").write_text("*.bin filter=lfs diff=lfs merge=lfs -text\n")
    git(farm.repo, "add", "-A")
    git(farm.repo, "commit", "-q", "-m", "attributes")
    git(farm.repo, "push", "-q")
    tools = sandbox.root / "tools"
    tools.mkdir()
    (tools / "git-lfs").write_text("#!/bin/sh\nexit 127\n")
    (tools / "git-lfs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    farm.ok("add", "one")
    done = drain(farm, "echo x >f")
    assert done.returncode == 5 and "git-lfs is missing" in done.stderr and "git-lfs is missing" in farm(
        "doctor").stdout
    assert git(hub, "ls-tree", "--name-only", "main").split() == [".gitattributes", "a.txt"]


def test_squash_keeps_what_was_said_and_by_whom(farm):
    agent = (
        "git config core.commentChar ';'; echo 1 >f; git add f; git commit -qm 'First step\n\nIt took long.\n\nRefs: #7'; "
        "echo 2 >f; git -c user.name='Second Author' -c user.email=two@example.org commit -qam 'Second step\n\nRefs: #7'"
    )
    farm.ok("add", "The title")
    assert drain(farm, agent, FARM_STYLE="squash", FARM_REMOTE="").returncode == 0
    text, author = git(farm.repo, "log", "-1", "--format=%B", "main"), git(farm.repo, "log", "-1", "--format=%an <%ae>",
                                                                           "main")
    assert text.startswith("The title\n") and "First step" in text and "It took long." in text and "Second step" in text
    assert author == "Second Author <two@example.org>"
    assert text.count("Refs: #7") == 1 and text.count("Farm-Task: t-0001") == 1
    assert "Co-authored-by: Test Person <test@example.org>" in text and "Co-authored-by: Second" not in text
    assert run(["git", "-C", farm.repo, "log", "-1", "--format=%(trailers:key=Refs,valueonly)",
                "main"]).stdout.strip() == "#7"
