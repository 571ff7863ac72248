"""gate-slot.sh and pins on real git."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from merge_scripts import Repo, branch, footprint
from paths import SCRIPTS
from sandbox import commit_files, git, run, write_files

# ---------------------------------------------------------------------------------------------- slots of gates


def slot(verb: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run([SCRIPTS / "merge/gate-slot.sh", verb, *arguments])


@pytest.fixture
def gate_slot(repo: Repo) -> Path:
    """A slot at main, in a folder of the repo's own checkout, where a mistake would hit that checkout."""
    commit_files(repo, {".gitignore": "/slots/\n/slots-*\ncache/\n"})
    folder = repo / "slots/1"
    assert slot("prepare", "-C", repo, folder, "main").stdout == f"{folder}\n"
    return folder


def test_slot_holds_exactly_the_commit(repo: Repo, gate_slot: Path) -> None:
    assert git(gate_slot, "rev-parse", "HEAD") == git(repo, "rev-parse", "main")
    assert git(gate_slot, "status", "--porcelain", "--ignored") == ""


def test_slot_moves_to_another_commit_and_keeps_ignored_caches(repo: Repo, gate_slot: Path) -> None:
    sha = branch(repo, "w", {"a.txt": "new\n"})
    write_files(gate_slot, {"cache/x": "kept\n", "a.txt": "dirty\n", "untracked/y": "y\n"})
    slot("prepare", "-C", repo, gate_slot, sha)
    assert git(gate_slot, "rev-parse", "HEAD") == sha
    assert git(gate_slot, "status", "--porcelain", "--ignored") == "!! cache/"


def leave_nested_repo(folder: Path) -> None:
    git(folder, "init", "-q", "nested")
    commit_files(folder / "nested", {"x": "x\n"})


def leave_commit(folder: Path) -> None:
    git(folder, "checkout", "-q", "-b", "by-the-gate")
    commit_files(folder, {"a.txt": "by the gate\n"})


def leave_locked_folder(folder: Path) -> None:
    write_files(folder, {"locked/x": "x\n"})
    (folder / "locked").chmod(0o500)


def leave_index_lock(folder: Path) -> None:
    Path(git(folder, "rev-parse", "--absolute-git-dir"), "index.lock").touch()


def leave_broken_index(folder: Path) -> None:
    Path(git(folder, "rev-parse", "--absolute-git-dir"), "index").write_bytes(b"DIRC broken")


def leave_broken_head(folder: Path) -> None:
    Path(git(folder, "rev-parse", "--absolute-git-dir"), "HEAD").write_bytes(b"")


def leave_merge(folder: Path) -> None:
    git(folder, "-c", "user.name=x", "commit", "-q", "--allow-empty", "-m", "x")
    git(folder, "merge", "-q", "--no-commit", "--no-ff", "-s", "ours", git(folder, "rev-parse", "HEAD@{1}"))


def leave_no_git_file(folder: Path) -> None:
    (folder / ".git").unlink()


def leave_no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def leave_half_made(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != ".git":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    Path(git(folder, "rev-parse", "--absolute-git-dir"), "index").unlink()


def leave_forgotten(folder: Path) -> None:
    shutil.rmtree(git(folder, "rev-parse", "--absolute-git-dir"))


def leave_sparse(folder: Path) -> None:
    git(folder, "sparse-checkout", "set", "nowhere")


def leave_unwatched(folder: Path) -> None:
    git(folder, "update-index", "--skip-worktree", "dir/b.txt")
    (folder / "dir/b.txt").unlink()


LEFT = [value for name, value in sorted(globals().items()) if name.startswith("leave_")]


@pytest.mark.parametrize("leave", LEFT, ids=lambda leave: leave.__name__.removeprefix("leave_"))
def test_slot_is_made_good_after_a_gate_left(repo: Repo, gate_slot: Path, leave: Callable[[Path], None]) -> None:
    leave(gate_slot)
    before = footprint(repo)
    done = slot("prepare", "-C", repo, gate_slot, "main")
    assert done.returncode == 0, done.stderr
    assert slot("check", gate_slot, "main").returncode == 0
    assert git(gate_slot, "status", "--porcelain") == ""
    assert (gate_slot / "dir/b.txt").exists()
    assert footprint(repo) == before


def test_a_slot_of_a_sparse_checkout_has_every_file(repo: Repo, sandbox) -> None:
    git(repo, "sparse-checkout", "set", "nowhere")
    assert not (repo / "dir/b.txt").exists()
    assert slot("prepare", "-C", repo, sandbox.work / "slots/1", "main").returncode == 0
    assert (sandbox.work / "slots/1/dir/b.txt").exists()


def test_a_slot_has_what_lands_and_not_what_a_replace_ref_shows(repo: Repo, gate_slot: Path) -> None:
    sha = branch(repo, "w", {"a.txt": "bad\n"})
    git(repo, "replace", git(repo, "rev-parse", f"{sha}:a.txt"), git(repo, "rev-parse", "main:a.txt"))
    assert slot("prepare", "-C", repo, gate_slot, sha).returncode == 0
    assert (gate_slot / "a.txt").read_text() == "bad\n"
    assert slot("check", gate_slot, sha).returncode == 0


def test_slot_check_names_the_changed_files(gate_slot: Path) -> None:
    write_files(gate_slot, {"a.txt": "changed\n", "untracked.txt": "fine\n"})
    (gate_slot / "dir/b.txt").unlink()
    done = slot("check", gate_slot, "main")
    assert (done.returncode, done.stdout) == (1, "a.txt\ndir/b.txt\n")


def test_slot_check_names_a_moved_head(gate_slot: Path) -> None:
    git(gate_slot, "commit", "-q", "--allow-empty", "-m", "by the gate")
    done = slot("check", gate_slot, "main")
    assert (done.returncode, done.stdout) == (1, "HEAD\n")


def test_slot_check_does_not_mind_a_touched_file(gate_slot: Path) -> None:
    os.utime(gate_slot / "a.txt", (1, 1))
    assert slot("check", gate_slot, "main").returncode == 0


def test_slot_of_an_unknown_commit_exits_3(repo: Repo, gate_slot: Path) -> None:
    assert slot("prepare", "-C", repo, gate_slot, "nope").returncode == 3


@pytest.mark.parametrize("verb", ["prepare", "remove"])
def test_a_folder_that_is_no_slot_is_refused_and_left_alone(repo: Repo, verb: str) -> None:
    write_files(repo, {"untracked.txt": "u\n"})
    before = footprint(repo)
    assert slot(verb, "-C", repo, repo, *(["main"] if verb == "prepare" else [])).returncode == 4
    assert footprint(repo) == before


def test_slot_removed_is_forgotten_by_git(repo: Repo, gate_slot: Path) -> None:
    assert slot("remove", gate_slot).returncode == 0
    assert list(gate_slot.parent.iterdir()) == []
    assert len(git(repo, "worktree", "list").splitlines()) == 1


# ---------------------------------------------------------------------------------------------- pins


def pin(repo: Repo, *arguments: str) -> tuple[int, str]:
    done = run([SCRIPTS / "merge/pins.sh", "set", "-C", repo, *arguments])
    return done.returncode, done.stdout.strip()


def test_pin_makes_a_ref_below_refs_farm(repo: Repo) -> None:
    sha = git(repo, "rev-parse", "main")
    assert pin(repo, "refs/farm/ready/t-1", "main") == (0, sha)
    assert git(repo, "rev-parse", "refs/farm/ready/t-1") == sha


def test_pin_of_a_tag_pins_its_commit(repo: Repo) -> None:
    git(repo, "tag", "-a", "v1", "-m", "v1")
    assert pin(repo, "refs/farm/ready/t-1", "v1") == (0, git(repo, "rev-parse", "main"))


@pytest.mark.parametrize("ref", ["refs/heads/main", "refs/farm/", "HEAD", "refs/farm/../heads/x"])
def test_pin_refuses_a_ref_elsewhere(repo: Repo, ref: str) -> None:
    before = git(repo, "for-each-ref")
    assert pin(repo, ref, "main")[0] == 2
    assert git(repo, "for-each-ref") == before


@pytest.mark.parametrize("commit", ["nope", "main:a.txt", "", "-x"])
def test_pin_of_no_commit_exits_3(repo: Repo, commit: str) -> None:
    assert pin(repo, "refs/farm/ready/t-1", commit) == (3, "")
