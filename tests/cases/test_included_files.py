"""Files of .worktreeinclude follow the main worktree, in worktrees and gate slots that are there; nobody's edit is lost."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from paths import SCRIPTS
from sandbox import git, run, write_files


@pytest.fixture
def repo(make_repo) -> Path:
    repo = make_repo(files={".gitignore": ".env*\nconf/\n", "a.txt": "a\n"})
    run([SCRIPTS / "mk-worktrees.sh", "-n", "1", "-C", repo], check=True)
    return repo


def worktree_of(repo: Path) -> Path:
    return repo.with_name(repo.name + "-farm") / "agent-001-worktree"


def bring(repo: Path, option: str = "-u", path: Path | None = None) -> str:
    path = path or worktree_of(repo)
    return run([SCRIPTS / "setup-worktree.sh", option, "-C", path, path], check=True).stderr


def begin_task(repo: Path, number: int) -> None:
    run([SCRIPTS / "agent/start-task.sh", "-a", "agent-001", "-t", f"t-{number:04d}", "-b", "main", worktree_of(repo)], check=True)


def text_of(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def test_files_and_folders_follow_the_main_worktree(repo):
    worktree = worktree_of(repo)
    write_files(repo, {".worktreeinclude": ".env\nconf/\n", ".env": "1\n", "conf/deep/é a.json": "{}\n"})
    os.symlink("deep/é a.json", repo / "conf" / "link")
    bring(repo)
    assert text_of(worktree / ".env") == "1\n" and text_of(worktree / "conf" / "deep" / "é a.json") == "{}\n"
    assert os.readlink(worktree / "conf" / "link") == "deep/é a.json"
    (repo / ".env").write_text("2\n")
    (repo / "conf" / "link").unlink()
    os.symlink("elsewhere", repo / "conf" / "link")
    bring(repo)
    assert text_of(worktree / ".env") == "2\n" and os.readlink(worktree / "conf" / "link") == "elsewhere"


def test_a_file_that_an_older_one_has_taken_the_place_of_follows_too(repo):
    write_files(repo, {".worktreeinclude": ".env\n", ".env": "new\n", ".env.old": "old\n"})
    os.utime(repo / ".env.old", (1_000_000_000, 1_000_000_000))
    bring(repo)
    os.replace(repo / ".env.old", repo / ".env")
    bring(repo)
    assert text_of(worktree_of(repo) / ".env") == "old\n"


def test_what_is_gone_from_the_main_worktree_goes_and_is_kept(repo):
    worktree = worktree_of(repo)
    write_files(repo, {".worktreeinclude": ".env*\n", ".env": "1\n", ".env.b": "b\n"})
    bring(repo)
    (repo / ".env.b").unlink()
    said = bring(repo)
    assert text_of(worktree / ".env") == "1\n" and not (worktree / ".env.b").exists()
    kept = Path(said.split("try: ls ")[1].strip()) / ".env.b"
    assert kept.read_text() == "b\n"


def test_an_agents_edit_stays_however_many_tasks_later(repo):
    worktree = worktree_of(repo)
    write_files(repo, {".worktreeinclude": ".env*\n", ".env": "1\n", ".env.b": "b\n"})
    begin_task(repo, 1)
    (worktree / ".env").write_text("mine\n")
    (worktree / ".env.b").write_text("mine too\n")
    for number in (2, 3):
        begin_task(repo, number)
    (repo / ".env").write_text("22\n")
    (repo / ".env.b").unlink()
    said = bring(repo)
    assert text_of(worktree / ".env") == "mine\n" and text_of(worktree / ".env.b") == "mine too\n"
    assert ".env has changed in" in said
    assert bring(repo) == "", "it is said once a change"


def test_an_agents_file_that_was_there_first_stays(repo):
    worktree = worktree_of(repo)
    write_files(worktree, {".env": "mine\n"})
    write_files(repo, {".worktreeinclude": ".env\n", ".env": "1\n"})
    for number in (1, 2):
        (repo / ".env").write_text(f"{number}\n")
        begin_task(repo, number)
    assert text_of(worktree / ".env") == "mine\n"


def test_a_file_that_is_tracked_now_is_left_to_git(repo):
    worktree = worktree_of(repo)
    write_files(repo, {".worktreeinclude": ".env\n", ".env": "1\n"})
    begin_task(repo, 1)
    (repo / ".gitignore").write_text("conf/\n")
    git(repo, "add", "-A")
    git(repo, "commit", "-qm", "track it")
    begin_task(repo, 2)
    assert text_of(worktree / ".env") == "1\n" and git(worktree, "status", "--porcelain") == ""


def test_a_repo_of_its_own_is_copied_once_and_whole(repo):
    worktree = worktree_of(repo)
    git(repo, "init", "-q", "conf/lib")
    write_files(repo, {".worktreeinclude": "conf/\n", "conf/lib/code": "c\n", "conf/x": "x\n"})
    git(repo / "conf" / "lib", "add", "-A")
    git(repo / "conf" / "lib", "commit", "-qm", "inner")
    assert bring(repo) == ""
    assert text_of(worktree / "conf" / "lib" / "code") == "c\n" and text_of(worktree / "conf" / "x") == "x\n"
    assert git(worktree / "conf" / "lib", "log", "--format=%s") == "inner"
    write_files(worktree, {"conf/lib/code": "mine\n"})
    bring(repo)
    assert text_of(worktree / "conf" / "lib" / "code") == "mine\n"


def test_a_slot_has_what_the_main_worktree_has_whatever_a_gate_did(repo):
    slot = worktree_of(repo).with_name("gate-0")
    write_files(repo, {".worktreeinclude": ".env*\n", ".env": "1\n", ".env.b": "b\n"})
    prepare = [SCRIPTS / "merge/gate-slot.sh", "prepare", "-C", repo, slot, "HEAD"]
    run(prepare, check=True)
    (slot / ".env").write_text("of a gate\n")
    (slot / ".env.b").write_text("of a gate\n")
    (repo / ".env.b").unlink()
    run(prepare, check=True)
    assert text_of(slot / ".env") == "1\n" and text_of(slot / ".env.b") is None


def test_a_copy_that_fails_is_said_and_made_good(repo):
    worktree = worktree_of(repo)
    write_files(repo, {".worktreeinclude": ".env\n", ".env": "1\n"})
    bring(repo)
    (worktree / ".env").unlink()
    (worktree / ".env").mkdir()
    write_files(worktree, {".env/file": "in the way\n"})
    done = run([SCRIPTS / "setup-worktree.sh", "-o", "-C", worktree, worktree])
    assert done.returncode == 1 and "not every file of .worktreeinclude reached" in done.stderr
    assert text_of(worktree / ".env" / "file") == "in the way\n"
    shutil.rmtree(worktree / ".env")
    bring(repo)
    assert text_of(worktree / ".env") == "1\n"
